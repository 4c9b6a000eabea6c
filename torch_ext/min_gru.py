r"""minGRU: a GRU whose gate sees the input alone, so that its recurrence is linear in the state.

.. math::
    z_t &= \sigma(\text{gate}_t) \\
    h_t &= (1 - z_t) \odot h_{t-1} + z_t \odot \text{act}(\text{candidate}_t)

Feng, Tung, Ahmed, Bengio, Hajimirsadeghi 2024, "Were RNNs All We Needed?", arXiv:2410.01201v3:
section 3.1 and appendix A with ``activation="identity"``; appendix B, whose states are positive,
with ``activation="g"``:

.. math::
    g(x) = x + 0.5 \text{ for } x \ge 0, \quad \sigma(x) \text{ for } x < 0

The two are different models. The paper computes the second in log space; here both run in linear
space, which is exact where the logarithms lose digits with growing ``T``, and which allows a zero
state.
"""

import torch
from torch import Tensor

from .linear_scan import run_reference


def min_gru(
    gate: Tensor,
    candidate: Tensor,
    initial_state: Tensor | None = None,
    activation: str = "identity",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Minimal gated recurrent unit: gate, candidate and recurrence in one pass.

    .. math::
        z_t &= \sigma(\text{gate}_t) \\
        h_t &= (1 - z_t) \odot h_{t-1} + z_t \odot \text{act}(\text{candidate}_t)

    Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201v3, section 3.1 (``"identity"``),
    appendix B (``"g"``).

    Args:
        gate: pre-activation of the update gate, ``(B, T, D)``. float64, float32, bfloat16 or
            float16.
        candidate: pre-activation of the candidate state, ``(B, T, D)``, the dtype of ``gate``.
        initial_state: ``h`` before the first step, ``(B, D)``, float32 (float64 for float64
            inputs). Zeros if omitted. It is the state itself: no activation is applied to it,
            whatever ``activation`` says.
        activation: of the candidate: ``"identity"``, or ``"g"``: ``x + 0.5`` for ``x >= 0``,
            ``sigmoid(x)`` below.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence). The initial state enters
            after the last step and the final state is ``h[0]``.

    Returns:
        ``h`` of all steps, ``(B, T, D)``, the dtype of ``gate``, and the final state, ``(B, D)``,
        float32 or float64. With no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            or ``activation`` is another word.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run and for every
        number of threads. The backward saves ``gate``, ``candidate``, ``h`` and the initial state,
        and recomputes the rest. Differentiable any number of times, through the final state as
        well.

    Example:
        >>> h, final_state = torch_ext.min_gru(torch.zeros(1, 3, 1), torch.full((1, 3, 1), 8.0))
        >>> h.flatten()
        tensor([4., 6., 7.])
        >>> final_state
        tensor([[7.]])
    """
    return torch.ops.torch_ext.min_gru(
        gate, candidate, initial_state, cu_seqlens, activation, reverse
    )


def min_gru_step(
    gate: Tensor,
    candidate: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    activation: str = "identity",
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`min_gru`.

    Args:
        gate: ``(B, D)``.
        candidate: ``(B, D)``, the dtype of ``gate``.
        state: ``(B, D)``, float32 or float64; with ``state_indices`` a pool of states,
            ``(num_slots, D)``.
        state_indices: row of the pool for each row of ``gate``, int32 or int64, ``(B,)``. Rows with
            a negative index are skipped: their ``h`` is 0 and no state changes.
        activation: as in :func:`min_gru`.

    Returns:
        ``h``, ``(B, D)``, the dtype of ``gate``, and the new state; with ``state_indices`` the
        whole new pool.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``,
            or ``activation`` is another word.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> candidate, state = torch.full((1, 1), 8.0), torch.full((1, 1), 4.0)
        >>> h, state = torch_ext.min_gru_step(torch.zeros(1, 1), candidate, state)
        >>> state
        tensor([[6.]])
    """
    return torch.ops.torch_ext.min_gru_step(gate, candidate, state, state_indices, activation)


def min_gru_step_(
    gate: Tensor,
    candidate: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    r"""One step of :func:`min_gru` that overwrites ``state``.

    Otherwise as :func:`min_gru_step`; not differentiable.

    Returns:
        ``h``, ``(B, D)``.

    Example:
        >>> pool, slot = torch.zeros(3, 1), torch.tensor([2])
        >>> h = torch_ext.min_gru_step_(torch.zeros(1, 1), torch.full((1, 1), 8.0), pool, slot)
        >>> pool.flatten()
        tensor([0., 0., 4.])
    """
    return torch.ops.torch_ext.min_gru_step_(gate, candidate, state, state_indices, activation)


def min_gru_reference(
    gate: Tensor,
    candidate: Tensor,
    initial_state: Tensor | None = None,
    activation: str = "identity",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`min_gru` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> min_gru_reference(torch.zeros(1, 2, 1), torch.full((1, 2, 1), 8.0))[1]
        tensor([[6.]])
    """

    def step(h: Tensor, gate: Tensor, candidate: Tensor) -> Tensor:
        z = torch.sigmoid(gate)
        return (1 - z) * h + z * candidate_activation(candidate, activation)

    return run_reference(step, [gate, candidate], initial_state, cu_seqlens, reverse)


def candidate_activation(x: Tensor, activation: str) -> Tensor:
    """The paper's candidate: ``x`` itself (appendix A) or ``g(x)`` (appendix B.2)."""
    if activation == "identity":
        return x
    if activation == "g":
        return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))
    raise ValueError(f'activation is "{activation}", expected "identity" or "g"')
