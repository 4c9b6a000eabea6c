r"""IndRNN: a recurrent network whose units see nothing of the step before but themselves.

.. math::
    h_t = \text{relu}(x_t + u \odot h_{t-1} + b)

or tanh in the place of relu. Li, Li, Cook, Zhu, Gao 2018, "Independently Recurrent Neural Network (IndRNN):
Building A Longer and Deeper RNN", arXiv:1803.04831.
"""

import torch
from torch import Tensor

from ._gated import check_choice, run_gated_reference


def ind_rnn(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    nonlinearity: str = "relu",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    gradient_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Independently recurrent network: recurrent weights, nonlinearity and state in one pass.

    .. math::
        h_t = \text{relu}(x_t + u \odot h_{t-1} + b)

    Li et al. 2018, "Independently Recurrent Neural Network (IndRNN)", arXiv:1803.04831. Units see
    each other in the layers between, not over time.

    Args:
        x: what the input adds, ``(B, T, D)``. Any strides. float64, float32, bfloat16 or float16.
        u: recurrent weight of each unit, ``(D,)``, the dtype of ``x`` or float32; up to 1 in size, or
            long sequences grow with relu.
        bias: ``(D,)``, the dtype of ``x`` or float32. Zeros if omitted.
        initial_state: ``(B, D)``, float32 (float64 for float64 inputs). Zeros if omitted.
        nonlinearity: ``"relu"`` or ``"tanh"``.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).
        reset: steps before which the state is replaced by zeros, bool, ``(B, T)``.
        recurrent_mask: factor of ``h`` on its way into the product with ``u``, ``(B, D)`` (a row for each sequence
            with ``cu_seqlens``), floating point: variational dropout (Gal & Ghahramani 2016,
            arXiv:1512.05287). It has no gradient.
        h_update: share of the new ``h``, ``(B, T, D)``, floating point; the rest is the old one:
            zoneout (Krueger et al. 2017, arXiv:1606.01305), a mask in training and ``1 - p``
            otherwise. It has no gradient.
        gradient_clip: bound, at least 0, on each element of the gradient that comes back through
            ``u`` to the state before; 0 cuts it. What comes of it is not the forward's gradient.

    Returns:
        ``h``, ``(B, T, D)``, the dtype of ``x``, and the final state, ``(B, D)``, float32 or float64.
        With no step at all it is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            ``nonlinearity`` is another word, or ``gradient_clip`` is negative.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Gradients are those of the forward, through the final
        state as well. Differentiable any number of times.

    Example:
        >>> h, final_state = torch_ext.ind_rnn(torch.ones(1, 3, 1), torch.tensor([0.5]))
        >>> h.flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    return torch.ops.torch_ext.ind_rnn(
        x,
        u,
        bias,
        initial_state,
        nonlinearity,
        cu_seqlens,
        reverse,
        reset,
        recurrent_mask,
        h_update,
        gradient_clip,
    )


def ind_rnn_step(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    nonlinearity: str = "relu",
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`ind_rnn`.

    Args:
        x: ``(B, D)``.
        u: as in :func:`ind_rnn`.
        bias: as in :func:`ind_rnn`, or None.
        state: ``(B, D)``; with ``state_indices`` a pool of states, ``(num_slots, D)``.
        state_indices: row of the pool for each row of ``x``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        nonlinearity: as in :func:`ind_rnn`.
        recurrent_mask: ``(B, D)``, a row for each of ``x``.
        h_update: as in :func:`ind_rnn`, ``(B, D)``.

    Returns:
        ``h``, ``(B, D)``, the dtype of ``x``, and the new state; with ``state_indices`` the whole new
        pool.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``, or
            ``nonlinearity`` is another word.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> x, u, state = torch.ones(1, 1), torch.tensor([0.5]), torch.full((1, 1), 4.0)
        >>> h, state = torch_ext.ind_rnn_step(x, u, None, state)
        >>> h
        tensor([[3.]])
    """
    return torch.ops.torch_ext.ind_rnn_step(
        x, u, bias, state, state_indices, nonlinearity, recurrent_mask, h_update
    )


def ind_rnn_step_(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    nonlinearity: str = "relu",
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
) -> Tensor:
    r"""One step of :func:`ind_rnn` that overwrites ``state``.

    Otherwise as :func:`ind_rnn_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, D)``.

    Example:
        >>> x, u, pool = torch.ones(1, 1), torch.tensor([0.5]), torch.full((3, 1), 4.0)
        >>> h = torch_ext.ind_rnn_step_(x, u, None, pool, torch.tensor([2]))
        >>> pool.flatten()
        tensor([4., 4., 3.])
    """
    return torch.ops.torch_ext.ind_rnn_step_(
        x, u, bias, state, state_indices, nonlinearity, recurrent_mask, h_update
    )


def ind_rnn_reference(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    nonlinearity: str = "relu",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    gradient_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`ind_rnn` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> ind_rnn_reference(torch.ones(1, 2, 1), torch.tensor([0.5]))[0].flatten()
        tensor([1.0000, 1.5000])
    """
    check_choice("ind_rnn", "nonlinearity", nonlinearity, ("tanh", "relu"))
    activate = torch.tanh if nonlinearity == "tanh" else torch.relu

    def cell(x: Tensor, seen: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a = x + u.to(x.dtype) * seen
        return (activate(a if bias is None else a + bias.to(x.dtype)),)

    h, (final,) = run_gated_reference(
        cell, x, [x.shape[2:]], None if initial_state is None else [initial_state], cu_seqlens,
        reverse, reset, recurrent_mask, (h_update,), gradient_clip,
    )  # fmt: skip
    return h, final
