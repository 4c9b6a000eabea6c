r"""Mamba-2's scan, structured state-space duality: the selective scan with one decay per head.

.. math::
    d_t &= \text{softplus}(\delta_t + b_\delta) \\
    S_t &= e^{d_t A} S_{t-1} + d_t\, x_t B_t^\top \\
    y_t &= \big(S_t C_t + D x_t\big)\, \text{silu}(z_t)

for every head, whose state is a matrix. Dao & Gu 2024, "Transformers are SSMs: Generalized Models
and Efficient Algorithms Through Structured State Space Duality", arXiv:2405.21060, sections 5
and 7.
"""

import torch
from torch import Tensor

from .linear_attention import per_head, run_matrix_reference, sequences
from .linear_scan import state_dtype


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Mamba-2's scan, with step size, skip and gate, in one pass.

    .. math::
        d_t &= \text{softplus}(\delta_t + b_\delta) \quad (\text{or } \delta_t + b_\delta) \\
        S_t &= e^{d_t A} S_{t-1} + d_t\, x_t B_t^\top \\
        y_t &= \big(S_t C_t + D x_t\big)\, \text{silu}(z_t)

    for every head. Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060, sections 5 and 7. It
    is what the package mamba_ssm calls ``mamba_chunk_scan_combined``.

    Args:
        x: input, ``(B, T, H, P)``. Any strides. float64, float32, bfloat16 or float16.
        dt: step size before bias and softplus, ``(B, T, H)``, the dtype of ``x``.
        A: rate of decay, ``(H,)``, negative for a state that fades, the dtype of ``x`` or float32.
        B: what enters the states, ``(B, T, G, N)``, the dtype of ``x``; ``G`` divides ``H``, and
            head ``h`` has the group ``h // (H / G)``.
        C: what is read out of them, as ``B``.
        D: skip connection, ``(H,)`` or ``(H, P)``, the dtype of ``x`` or float32. None if omitted.
        z: gate, ``(B, T, H, P)``, the dtype of ``x``. None if omitted.
        dt_bias: ``(H,)``, the dtype of ``x`` or float32. Zeros if omitted.
        initial_state: ``(B, H, P, N)``, float32 (float64 for float64 inputs). Zeros if omitted.
        dt_softplus: softplus after the bias; above 20 it is the identity.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).

    Returns:
        ``y``, ``(B, T, H, P)``, the dtype of ``x``, and the final state, ``(B, H, P, N)``, float32
        or float64. With no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, or ``cu_seqlens`` does not ascend from 0 to
            ``T``.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run. For every
        number of threads too, without ``z`` and ``dt_softplus``: torch's own functions may differ in
        the last bit where threads meet. Differentiable any number of times, through the final state as well.

    Example:
        >>> x, one = torch.full((1, 3, 1, 1), 4.0), torch.ones(1, 3, 1, 1)
        >>> A = torch.tensor([-0.6931472])  # a half per unit of dt
        >>> y, final_state = torch_ext.ssd(x, one[..., 0], A, one, one)
        >>> y.flatten()
        tensor([4., 6., 7.])
    """
    return torch.ops.torch_ext.ssd(
        x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse
    )


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`ssd`.

    Args:
        x: ``(B, H, P)``.
        dt: ``(B, H)``, the dtype of ``x``.
        A: as in :func:`ssd`.
        B: ``(B, G, N)``, the dtype of ``x``.
        C: as ``B``.
        D: as in :func:`ssd`, or None.
        z: ``(B, H, P)``, or None.
        dt_bias: as in :func:`ssd`, or None.
        state: ``(B, H, P, N)``; with ``state_indices`` a pool of states, ``(num_slots, H, P, N)``.
        state_indices: row of the pool for each row of ``x``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``y`` is 0 and no state changes.
        dt_softplus: as in :func:`ssd`.

    Returns:
        ``y``, ``(B, H, P)``, the dtype of ``x``, and the new state; with ``state_indices`` the
        whole new pool.

    Raises:
        ValueError: a shape differs from the above, or an index is not below ``num_slots``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> one, A = torch.ones(1, 1, 1), torch.tensor([-0.6931472])
        >>> state = torch.full((1, 1, 1, 1), 4.0)
        >>> y, state = torch_ext.ssd_step(
        ...     4 * one, one[..., 0], A, one, one, None, None, None, state
        ... )
        >>> y
        tensor([[[6.]]])
    """
    return torch.ops.torch_ext.ssd_step(
        x, dt, A, B, C, D, z, dt_bias, state, state_indices, dt_softplus
    )


def ssd_step_(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    r"""One step of :func:`ssd` that overwrites ``state``.

    Otherwise as :func:`ssd_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``y``, ``(B, H, P)``.

    Example:
        >>> one, A = torch.ones(1, 1, 1), torch.tensor([-0.6931472])
        >>> pool, slot = torch.zeros(3, 1, 1, 1), torch.tensor([2])
        >>> y = torch_ext.ssd_step_(
        ...     4 * one, one[..., 0], A, one, one, None, None, None, pool, slot
        ... )
        >>> pool.flatten()
        tensor([0., 0., 4.])
    """
    return torch.ops.torch_ext.ssd_step_(
        x, dt, A, B, C, D, z, dt_bias, state, state_indices, dt_softplus
    )


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`ssd` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> x, one = torch.full((1, 2, 1, 1), 4.0), torch.ones(1, 2, 1, 1)
        >>> ssd_reference(x, one[..., 0], torch.tensor([-0.6931472]), one, one)[0].flatten()
        tensor([4., 6.])
    """
    heads, wide = x.shape[2], state_dtype(x.dtype)
    # What stands beside the loop, in float32 as well.
    d, A = dt.to(wide), A.to(wide)
    skip = None if D is None else D.to(wide)
    if skip is not None and skip.dim() == 1:
        skip = skip[:, None]
    if dt_bias is not None:
        d = d + dt_bias.to(wide)
    if dt_softplus:
        d = torch.nn.functional.softplus(d)

    def step(
        state: tuple[Tensor], x: Tensor, z: Tensor, d: Tensor, B: Tensor, C: Tensor
    ) -> tuple[Tensor, tuple[Tensor]]:
        decay = torch.exp(d * A)[..., None, None]
        S = decay * state[0] + (d[..., None] * x)[..., None] * B[..., None, :]
        y = (S * C[..., None, :]).sum(-1)
        if skip is not None:
            y = y + skip * x
        return y * z, (S,)

    if initial_state is None:
        shape = [sequences(x, cu_seqlens), heads, x.shape[3], B.shape[3]]
        initial_state = x.new_zeros(shape, dtype=wide)
    gate = torch.ones_like(x) if z is None else torch.nn.functional.silu(z.to(wide))
    inputs = [x, gate, d, per_head(B, heads), per_head(C, heads)]
    y, (S,) = run_matrix_reference(step, x, inputs, (initial_state,), cu_seqlens, reverse)
    return y, S
