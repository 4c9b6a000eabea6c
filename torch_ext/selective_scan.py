r"""Mamba's selective scan: a linear recurrence whose decay, input and readout depend on the token.

.. math::
    d_t &= \text{softplus}(\delta_t + b_\delta) \\
    h_t &= \exp(d_t A) \odot h_{t-1} + d_t B_t u_t \\
    y_t &= \big(C_t^\top h_t + D u_t\big)\, \text{silu}(z_t)

for every channel, with :math:`N` states each. Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling
with Selective State Spaces", arXiv:2312.00752, section 3.2 and algorithm 2.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .linear_scan import state_dtype


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Mamba's selective scan, with step size, skip and gate, in one pass.

    .. math::
        d_t &= \text{softplus}(\delta_t + b_\delta) \quad (\text{or } \delta_t + b_\delta) \\
        h_t &= \exp(d_t A) \odot h_{t-1} + d_t B_t u_t \\
        y_t &= \big(C_t^\top h_t + D u_t\big)\, \text{silu}(z_t)

    Gu & Dao 2023, "Mamba", arXiv:2312.00752, section 3.2. With complex ``A`` the states are complex
    and ``2 Re(C^T h)`` takes the place of ``C^T h``.

    Args:
        u: input, ``(B, T, D)``, channels side by side or time side by side, such as the view
            ``x.transpose(1, 2)`` of ``(B, D, T)``. float64, float32, bfloat16 or float16.
        delta: step size before bias and softplus, ``(B, T, D)``, the dtype of ``u``.
        A: rate of decay, ``(D, N)``, negative for a state that fades. float32 (float64 for float64
            inputs), the dtype of ``u``, or, beside float32 and float64 inputs, complex.
        B: what enters the states, per token ``(B, T, N)`` or ``(B, T, G, N)``, the dtype of ``u``;
            channel ``d`` has the group ``d // (D / G)``. Or constant ``(D, N)``, dtypes as for
            ``A``. Complex if ``A`` is.
        C: what is read out of them, as ``B``.
        D: skip connection, ``(D,)``, the dtype of ``u`` or float32. None if omitted.
        z: gate, ``(B, T, D)``, the dtype of ``u``. None if omitted.
        delta_bias: ``(D,)``, the dtype of ``u`` or float32. Zeros if omitted.
        initial_state: ``(B, D, N)``, float32 (float64 for float64 inputs), complex if ``A`` is.
            Zeros if omitted.
        delta_softplus: softplus after the bias; above 20 it is the identity.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).

    Returns:
        ``y``, ``(B, T, D)``, the dtype of ``u``, and the final state, ``(B, D, N)``, the state's
        dtype. With no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, or ``cu_seqlens`` does not ascend from 0 to
            ``T``.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run and for every
        number of threads. For the backward the states of every 16th step are kept (of fewer where
        there are more than 16 states per channel), the others computed again. Differentiable any
        number of times, through the final state as well; complex gradients follow torch's
        convention.

    Example:
        >>> one = torch.ones(1, 3, 1)
        >>> decay = torch.full((1, 1), -0.6931472)  # a half per unit of delta
        >>> y, final_state = torch_ext.selective_scan(4 * one, one, decay, one, one)
        >>> y.flatten()
        tensor([4., 6., 7.])
    """
    y, final_state, _ = torch.ops.torch_ext.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse
    )
    return y, final_state


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`selective_scan`.

    Args:
        u: ``(B, D)``.
        delta: ``(B, D)``, the dtype of ``u``.
        A: as in :func:`selective_scan`.
        B: ``(B, N)`` or ``(B, G, N)``, the dtype of ``u``, complex if ``A`` is. A constant one is
            ``(D, N)`` expanded to ``(B, D, N)``.
        C: as ``B``.
        D: as in :func:`selective_scan`, or None.
        z: ``(B, D)``, or None.
        delta_bias: as in :func:`selective_scan`, or None.
        state: ``(B, D, N)``; with ``state_indices`` a pool of states, ``(num_slots, D, N)``.
        state_indices: row of the pool for each row of ``u``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``y`` is 0 and no state changes.
        delta_softplus: as in :func:`selective_scan`.

    Returns:
        ``y``, ``(B, D)``, the dtype of ``u``, and the new state; with ``state_indices`` the whole
        new pool.

    Raises:
        ValueError: a shape differs from the above, or an index is not below ``num_slots``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> one, decay = torch.ones(1, 1), torch.full((1, 1), -0.6931472)
        >>> state = torch.full((1, 1, 1), 4.0)
        >>> y, state = torch_ext.selective_scan_step(
        ...     4 * one, one, decay, one, one, None, None, None, state
        ... )
        >>> y
        tensor([[6.]])
    """
    return torch.ops.torch_ext.selective_scan_step(
        u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus
    )


def selective_scan_step_(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    r"""One step of :func:`selective_scan` that overwrites ``state``.

    Otherwise as :func:`selective_scan_step`; not differentiable, so where an input requires grad it
    raises a RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``y``, ``(B, D)``.

    Example:
        >>> one, decay = torch.ones(1, 1), torch.full((1, 1), -0.6931472)
        >>> pool, slot = torch.zeros(3, 1, 1), torch.tensor([2])
        >>> y = torch_ext.selective_scan_step_(
        ...     4 * one, one, decay, one, one, None, None, None, pool, slot
        ... )
        >>> pool.flatten()
        tensor([0., 0., 4.])
    """
    return torch.ops.torch_ext.selective_scan_step_(
        u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus
    )


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`selective_scan` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> one, decay = torch.ones(1, 2, 1), torch.full((1, 1), -0.6931472)
        >>> selective_scan_reference(4 * one, one, decay, one, one)[0].flatten()
        tensor([4., 6.])
    """
    rows, T, width = u.shape
    wide = state_dtype(u.dtype)
    states = torch.promote_types(A.dtype, wide)

    def per_channel(x: Tensor) -> Tensor:  # (B or 1, T or 1, D or 1, N)
        x = x.to(states)
        if x.dim() == 2:
            return x[None, None]
        return x[:, :, None] if x.dim() == 3 else x.repeat_interleave(width // x.shape[2], 2)

    A, B, C = A.to(states), per_channel(B), per_channel(C)
    d, v = delta.to(wide), u.to(wide)
    if delta_bias is not None:
        d = d + delta_bias.to(wide)
    if delta_softplus:
        d = torch.nn.functional.softplus(d)

    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        sequences = rows if cu_seqlens is None else len(bounds) - 1
        initial_state = torch.zeros(sequences, width, A.shape[1], dtype=states, device=u.device)
    outputs = [torch.zeros_like(v[:, 0])] * T if T else []
    final_states = []
    for s, (start, stop) in enumerate(pairwise(bounds)):
        h = initial_state if cu_seqlens is None else initial_state[s : s + 1]
        for t in reversed(range(start, stop)) if reverse else range(start, stop):
            b, c = B[:, min(t, B.shape[1] - 1)], C[:, min(t, C.shape[1] - 1)]
            h = torch.exp(d[:, t, :, None] * A) * h + (d[:, t] * v[:, t])[..., None] * b
            y = (c * h).sum(-1)
            outputs[t] = 2 * y.real if y.is_complex() else y
        final_states.append(h)
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    if D is not None:
        y = y + D.to(wide) * v
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    return y.to(u.dtype), torch.cat(final_states) if final_states else initial_state.clone()
