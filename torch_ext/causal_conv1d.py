r"""Causal depthwise convolution: each channel is filtered along time by taps of its own.

.. math::
    y_t = \text{act}\Big(b + \sum_{k=0}^{W-1} w_k \odot x_{t-W+1+k}\Big)

The short convolution that stands before the recurrence in Mamba (Gu & Dao 2023, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, section 3.4), H3,
xLSTM and gated delta networks, mostly with ``W = 4`` and SiLU. It is what
``torch.nn.functional.conv1d`` computes with ``groups=D`` on an input that is padded on the left,
but its padding is a state: the last ``W - 1`` inputs, from which the next chunk, or the next token,
goes on.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .linear_scan import state_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Causal depthwise convolution with bias and SiLU in one pass.

    .. math::
        y_t = \text{act}\Big(\text{bias} + \sum_{k=0}^{W-1} \text{weight}_{:,k} \odot
        x_{t-W+1+k}\Big)

    Gu & Dao 2023, "Mamba", arXiv:2312.00752, section 3.4.

    Args:
        x: ``(B, T, D)``, channels side by side or time side by side, such as the view
            ``x.transpose(1, 2)`` of ``(B, D, T)``. float64, float32, bfloat16 or float16.
        weight: ``(D, W)``, the oldest input's tap first; any ``W >= 1``. The dtype of ``x``, or
            float32 beside bfloat16 and float16. ``torch.nn.Conv1d(D, D, W, groups=D)`` has it as
            ``weight.squeeze(1)``.
        bias: ``(D,)``, dtypes as for ``weight``. Zeros if omitted.
        initial_state: the ``W - 1`` inputs before the first, oldest first, ``(B, D, W - 1)``, the
            dtype of ``x``. Zeros if omitted.
        activation: None, or ``"silu"``: ``act(v) = v sigmoid(v)``.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, and sees no other. int32
            or int64, ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.

    Returns:
        ``y``, ``(B, T, D)``, contiguous, the dtype of ``x``, and the final state: the last
        ``W - 1`` inputs, ``(B, D, W - 1)``, the dtype of ``x``. Where there are fewer steps they
        come from the initial state; with no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            or ``activation`` is another word.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: ``x`` is on a CUDA device, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run, for every number
        of threads and either layout, gradients of ``weight`` and ``bias`` included. The backward
        saves the inputs alone and recomputes the pre-activation. Differentiable any number of
        times, through the final state as well. Under autocast ``x`` keeps its dtype, and the state
        takes it.

    Example:
        >>> x, weight = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1.0, 10.0]])
        >>> y, final_state = torch_ext.causal_conv1d(x, weight)
        >>> y.flatten()
        tensor([10., 21., 32.])
        >>> final_state
        tensor([[[3.]]])
    """
    return torch.ops.torch_ext.causal_conv1d(x, weight, bias, initial_state, cu_seqlens, activation)


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`causal_conv1d`.

    Args:
        x: ``(B, D)``.
        weight: ``(D, W)``, as in :func:`causal_conv1d`.
        bias: ``(D,)`` or None, as in :func:`causal_conv1d`.
        state: the ``W - 1`` inputs before ``x``, oldest first, ``(B, D, W - 1)``, the dtype of
            ``x``; with ``state_indices`` a pool of states, ``(num_slots, D, W - 1)``.
        state_indices: row of the pool for each row of ``x``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``y`` is 0 and no state changes.
        activation: as in :func:`causal_conv1d`.

    Returns:
        ``y``, ``(B, D)``, the dtype of ``x``, and the new state; with ``state_indices`` the whole
        new pool.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots`` or stands
            there twice, or ``activation`` is another word.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> x, weight = torch.tensor([[2.0]]), torch.tensor([[1.0, 10.0]])
        >>> y, state = torch_ext.causal_conv1d_step(x, weight, None, torch.tensor([[[1.0]]]))
        >>> y, state
        (tensor([[21.]]), tensor([[[2.]]]))
    """
    return torch.ops.torch_ext.causal_conv1d_step(x, weight, bias, state, state_indices, activation)


def causal_conv1d_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""One step of :func:`causal_conv1d` that overwrites ``state``.

    Otherwise as :func:`causal_conv1d_step`; not differentiable, so where an input requires
    grad it raises a RuntimeError outside ``torch.no_grad()``. Under autocast ``x`` takes the dtype
    of the state, not the state that of ``x``.

    Returns:
        ``y``, ``(B, D)``.

    Example:
        >>> pool, slot, weight = torch.zeros(3, 1, 1), torch.tensor([2]), torch.tensor([[1.0, 10.0]])
        >>> y = torch_ext.causal_conv1d_step_(torch.tensor([[2.0]]), weight, None, pool, slot)
        >>> pool.flatten()
        tensor([0., 0., 2.])
    """
    return torch.ops.torch_ext.causal_conv1d_step_(
        x, weight, bias, state, state_indices, activation
    )


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`causal_conv1d` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> causal_conv1d_reference(torch.ones(1, 2, 1), torch.tensor([[1.0, 10.0]]))[0].flatten()
        tensor([10., 11.])
    """
    if activation not in (None, "silu"):
        raise ValueError(f'activation is "{activation}", expected None or "silu"')
    dtype, wide = x.dtype, state_dtype(x.dtype)
    if cu_seqlens is None:
        sequences = list(x.unbind(0))
    else:
        sequences = [x[0, begin:end] for begin, end in pairwise(cu_seqlens.tolist())]
    width, window = weight.shape
    if initial_state is None:
        initial_state = x.new_zeros(len(sequences), width, window - 1)
    rows, finals = [], []
    for sequence, state in zip(sequences, initial_state.unbind(0), strict=True):
        for x_t in sequence.unbind(0):
            seen = torch.cat([state, x_t.unsqueeze(-1)], -1)  # (D, W), as the weight
            v = (weight.to(wide) * seen).sum(-1)
            if bias is not None:
                v = v + bias
            rows.append(v * torch.sigmoid(v) if activation == "silu" else v)
            state = seen[:, 1:]
        finals.append(state)
    y = torch.stack(rows).to(dtype).view(x.shape) if rows else torch.zeros_like(x)
    return y, torch.stack(finals) if finals else initial_state.clone()
