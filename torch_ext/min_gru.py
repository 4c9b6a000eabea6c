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

from ._sequence_layer import GateBiasInit, OneStateLayer, chrono_
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

    Otherwise as :func:`min_gru_step`; not differentiable, so where an input requires
    grad it raises a RuntimeError outside ``torch.no_grad()``.

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


def check_activation(name: str, activation: str) -> None:
    if activation not in ("identity", "g"):
        raise ValueError(f'{name}: activation is {activation!r}, expected "identity" or "g"')


class MinGRU(OneStateLayer):
    r"""Layers of :func:`torch_ext.min_gru` with the constructor and contract of torch.nn.GRU.

    .. math::
        z_t &= \sigma(W_z x_t + b_z) \\
        h_t &= (1 - z_t) \odot h_{t-1} + z_t \odot \text{act}(W_h x_t + b_h)

    Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201v3, section 3.1. The gate sees
    ``x`` alone, so one layer cannot count or copy: use two or more (the paper's Table 1).

    Args:
        input_size: channels of ``x``.
        hidden_size: channels of the state and of each direction's output.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out ``b_z`` and ``b_h``.
        batch_first: ``x`` and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; the state
            is ``(num_layers * num_directions, B, hidden_size)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output
            is appended to the first one's.
        activation: ``"identity"``, or ``"g"`` for the paper's positive candidates (appendix B).
        gate_bias_init: None leaves the uniform initialisation, under which a unit keeps about half
            of its state at each step. A number is the value of ``b_z``; negative is long memory. A
            pair ``(shortest, longest)`` of numbers of steps, above 1, draws the time ``tau`` that a
            unit remembers uniformly between them: ``b_z = -log(tau - 1)`` (chrono initialisation,
            Tallec & Ollivier 2018, arXiv:1804.11188).
        device: of the parameters.
        dtype: of the parameters. The state is float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(2 * hidden_size, in)``, the rows of ``W_z``, then ``W_h``;
            ``in`` is ``input_size`` for ``k = 0``, else ``num_directions * hidden_size``.
        bias_ih_l{k}[_reverse]: ``(2 * hidden_size,)``, ``b_z``, then ``b_h``.

    Example:
        >>> rnn = torch_ext.MinGRU(3, 8, num_layers=2, batch_first=True)
        >>> x = torch.randn(4, 100, 3)
        >>> y, state = rnn(x)
        >>> y.shape, state.shape
        (torch.Size([4, 100, 8]), torch.Size([2, 4, 8]))
        >>> state = rnn.init_state(batch_size=4)
        >>> for t in range(100):
        ...     y_t, state = rnn.step(x[:, t], state)
        >>> torch.allclose(y_t, y[:, -1], atol=1e-6)
        True
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        activation: str = "identity",
        gate_bias_init: GateBiasInit = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation("MinGRU", activation)
        super().__init__(
            2,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            gate_bias_init,
            device,
            dtype,
        )
        self.activation = activation

    def init_gate_bias(self, bias: Tensor) -> None:
        gate = bias[: self.hidden_size]
        if isinstance(self.gate_bias_init, tuple | list):
            chrono_(gate, *self.gate_bias_init).neg_()  # 1 - z is the share that is kept
        else:
            gate.fill_(self.gate_bias_init)

    def recurrence(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        gate, candidate = gates.chunk(2, -1)
        if valid is not None:  # z = 0 keeps the state
            gate = torch.where(valid, gate, -1e4)
            candidate = torch.where(valid, candidate, 0.0)
        h, final_state = min_gru(gate, candidate, state[0], self.activation, cu_seqlens, reverse)
        return h, [final_state]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        gate, candidate = gates.chunk(2, -1)
        h, new_state = min_gru_step(gate, candidate, state[0], None, self.activation)
        return h, [new_state]
