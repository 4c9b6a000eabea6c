r"""First-order linear recurrence with per-channel coefficients, real or complex.

.. math::
    h_t = a_t \odot h_{t-1} + b_t

This is the scan under every diagonal recurrence (minGRU, LRU, S5, RG-LRU, HGRN, QRNN): Blelloch
1990, "Prefix sums and their applications", section 1.4.1; Martin & Cundy 2018, "Parallelizing
linear recurrent neural nets over sequence length", arXiv:1709.04057, whose section 2.2 has the
gradient: the same scan, run backwards in time.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""First-order linear recurrence, fused over time.

    .. math::
        h_t = a_t \odot h_{t-1} + b_t

    Martin & Cundy 2018, arXiv:1709.04057, section 2.

    Args:
        a: factor of the state, ``(B, T, D)``. float64, float32, bfloat16, float16, complex64 or
            complex128.
        b: what is added, ``(B, T, D)``, the dtype of ``a``.
        initial_state: ``(B, D)``, in the state's dtype: float32 for float32 and half-precision
            inputs, else the dtype of ``a``. Zeros if omitted.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence), ``h[t] = a[t] h[t + 1] +
            b[t]``: the initial state enters after the last step and the final state is ``h[0]``.

    Returns:
        ``h`` of all steps, ``(B, T, D)``, the dtype of ``a``, and the final state, ``(B, D)``, the
        state's dtype. With no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, or ``cu_seqlens`` does not ascend from 0 to
            ``T``.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.

    Notes:
        Accumulates in the state's dtype. Bitwise the same on every run and for every number of
        threads. The backward saves ``a``, ``h`` and the initial state. Differentiable any number of
        times, through the final state as well; complex gradients follow torch's convention.

    Example:
        >>> a = torch.tensor([0.5, 0.5, 0.5]).reshape(1, 3, 1)
        >>> b = torch.tensor([8.0, 0.0, 1.0]).reshape(1, 3, 1)
        >>> h, final_state = torch_ext.linear_scan(a, b)
        >>> h.flatten()
        tensor([8., 4., 3.])
        >>> final_state
        tensor([[3.]])
    """
    return torch.ops.torch_ext.linear_scan(a, b, initial_state, cu_seqlens, reverse)


def linear_scan_step(
    a: Tensor, b: Tensor, state: Tensor, state_indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`linear_scan`.

    Args:
        a: ``(B, D)``.
        b: ``(B, D)``, the dtype of ``a``.
        state: ``(B, D)``; with ``state_indices`` a pool of states, ``(num_slots, D)``.
        state_indices: row of the pool for each row of ``a``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.

    Returns:
        ``h``, ``(B, D)``, the dtype of ``a``, and the new state; with ``state_indices`` the whole
        new pool.

    Raises:
        ValueError: a shape differs from the above, or an index is not below ``num_slots``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> a, b, state = torch.full((1, 1), 0.5), torch.ones(1, 1), torch.full((1, 1), 4.0)
        >>> h, state = torch_ext.linear_scan_step(a, b, state)
        >>> state
        tensor([[3.]])
    """
    return torch.ops.torch_ext.linear_scan_step(a, b, state, state_indices)


def linear_scan_step_(
    a: Tensor, b: Tensor, state: Tensor, state_indices: Tensor | None = None
) -> Tensor:
    r"""One step of :func:`linear_scan` that overwrites ``state``.

    Otherwise as :func:`linear_scan_step`; not differentiable, so where an input requires
    grad it raises a RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, D)``.

    Example:
        >>> a, b, state = torch.full((1, 1), 0.5), torch.ones(1, 1), torch.full((1, 1), 4.0)
        >>> h = torch_ext.linear_scan_step_(a, b, state)
        >>> state
        tensor([[3.]])
    """
    return torch.ops.torch_ext.linear_scan_step_(a, b, state, state_indices)


def linear_scan_reference(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`linear_scan` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> linear_scan_reference(torch.full((1, 2, 1), 0.5), torch.ones(1, 2, 1))[1]
        tensor([[1.5000]])
    """

    def step(h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * h + b

    return run_reference(step, [a, b], initial_state, cu_seqlens, reverse)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The state's dtype for inputs of ``dtype``: float32 for half precision, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def run_reference(
    step: Callable[..., Tensor],
    inputs: list[Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Runs ``h = step(h, *(x[:, t] for x in inputs))`` over time: what all references share."""
    B, T, D = inputs[0].shape
    dtype = inputs[0].dtype
    inputs = [x.to(state_dtype(dtype)) for x in inputs]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = inputs[0].new_zeros(B if cu_seqlens is None else len(bounds) - 1, D)

    outputs = [initial_state] * T
    final_states = []
    for s, (start, stop) in enumerate(pairwise(bounds)):
        h = initial_state if cu_seqlens is None else initial_state[s : s + 1]
        for t in reversed(range(start, stop)) if reverse else range(start, stop):
            h = step(h, *(x[:, t] for x in inputs))
            outputs[t] = h
        final_states.append(h)
    h = torch.stack(outputs, 1) if outputs else torch.zeros_like(inputs[0])
    return h.to(dtype), torch.cat(final_states) if final_states else initial_state.clone()
