"""The functions of the package causal-conv1d (``import causal_conv1d``) on our operators.

Names, layouts and return values are the peer's; beyond it they run on the CPU, take float64, any
width, number of channels and strides, and have derivatives of every order. Inputs are handed over
as they lie in memory; results have their channels side by side, ``(B, D, L)`` with stride 1 along
``D``, whichever of the two orders ``x`` has.

A shape that is wrong raises a ValueError, a dtype a TypeError, an unknown ``activation`` the peer's
NotImplementedError.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._sequence_layer import is_compiling
from ..causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_step_
from ._common import check_indices, check_shape, needs_grad, parameter, write_rows

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution: :func:`torch_ext.causal_conv1d` by causal-conv1d's name.

    Args:
        x: ``(B, D, L)``, either of the last two dimensions side by side in memory.
        weight: ``(D, W)``, the oldest input's tap first.
        bias: ``(D,)``.
        seq_idx: number of the sequence to which each step belongs, where several stand in one row,
            int32 or int64, ``(B, L)``. A new sequence begins wherever it changes, and sees nothing
            of the one before. Steps below 0 are padding: their output is 0.
        initial_states: the ``W - 1`` inputs before the first, oldest first, ``(B, D, W - 1)``.
            Zeros if omitted.
        return_final_states: return the last ``W - 1`` inputs as well.
        final_states_out: ``(B, D, W - 1)``, overwritten with them.
        activation: None, ``"silu"`` or ``"swish"``.

    Returns:
        ``(B, D, L)``, the dtype of ``x``; with ``return_final_states`` also ``(B, D, W - 1)``,
        through which gradients pass.

    Example:
        >>> from torch_ext.compat.causal_conv1d import causal_conv1d_fn
        >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[1.0, 10.0]])
        >>> causal_conv1d_fn(x, weight)
        tensor([[[10., 21., 32., 43.]]])
        >>> causal_conv1d_fn(x, weight, seq_idx=torch.tensor([[0, 0, 1, 1]]))
        tensor([[[10., 21., 30., 43.]]])
    """
    return _convolve(
        causal_conv1d, "causal_conv1d_fn", x, weight, bias, seq_idx, initial_states,
        return_final_states, final_states_out, activation,
    )  # fmt: skip


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What :func:`causal_conv1d_fn` computes, as a plain PyTorch loop over time.

    Example:
        >>> from torch_ext.compat.causal_conv1d import causal_conv1d_ref
        >>> causal_conv1d_ref(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0, 10.0]]))
        tensor([[[10., 21.]]])
    """
    return _convolve(
        causal_conv1d_reference, "causal_conv1d_ref", x, weight, bias, None, initial_states,
        return_final_states, final_states_out, activation,
    )  # fmt: skip


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next step, or steps, of :func:`causal_conv1d_fn` from a state that is overwritten.

    Args:
        x: ``(B, D)`` or ``(B, D, L)``.
        conv_state: the inputs before ``x``, oldest first, ``(B, D, state_len)`` with ``state_len``
            at least ``W - 1``. With ``conv_state_indices`` a pool, ``(num_slots, D, state_len)``.
        weight: ``(D, W)``.
        bias: ``(D,)``.
        activation: None, ``"silu"`` or ``"swish"``.
        cache_seqlens: number of steps of each row before ``x``, int32 or int64, ``(B,)``. The state
            is then a circular buffer: step ``t`` stands in place ``t % state_len``.
        conv_state_indices: slot of each row, int32 or int64, ``(B,)``. Rows below 0 are padding:
            their output is 0 and no state changes.

    Returns:
        The shape and dtype of ``x``.

    Notes:
        Where an input requires grad, gradients pass through the output and through the new state
        (the peer has none).

    Example:
        >>> from torch_ext.compat.causal_conv1d import causal_conv1d_update
        >>> state, weight = torch.tensor([[[7.0, 1.0]]]), torch.tensor([[1.0, 10.0]])
        >>> causal_conv1d_update(torch.tensor([[2.0]]), state, weight)
        tensor([[21.]])
        >>> state
        tensor([[[1., 2.]]])
    """
    return _update(
        causal_conv1d, "causal_conv1d_update", x, conv_state, weight, bias, activation,
        cache_seqlens, conv_state_indices,
    )  # fmt: skip


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """What :func:`causal_conv1d_update` computes, as a plain PyTorch loop over time.

    Example:
        >>> from torch_ext.compat.causal_conv1d import causal_conv1d_update_ref
        >>> state, weight = torch.tensor([[[1.0]]]), torch.tensor([[1.0, 10.0]])
        >>> causal_conv1d_update_ref(torch.tensor([[2.0]]), state, weight), state
        (tensor([[21.]]), tensor([[[2.]]]))
    """
    return _update(
        causal_conv1d_reference, "causal_conv1d_update_ref", x, conv_state, weight, bias,
        activation, cache_seqlens, None,
    )  # fmt: skip


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The states of sequences that stand end to end: the last inputs of each.

    Args:
        x: ``(T, D)``.
        cu_seqlens: sequence ``s`` is the rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, int32 or
            int64, ``(num_sequences + 1,)``.
        state_len: inputs that a state has.

    Returns:
        ``(num_sequences, D, state_len)``, zeros first where a sequence is shorter.

    Example:
        >>> from torch_ext.compat.causal_conv1d import causal_conv1d_varlen_states
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> causal_conv1d_varlen_states(x, torch.tensor([0, 3, 4]), 2)
        tensor([[[2., 3.]],
        <BLANKLINE>
                [[0., 4.]]])
    """
    where = "causal_conv1d_varlen_states"
    check_shape(where, "x", x, T=None, D=None)
    check_indices(where, "cu_seqlens", cu_seqlens, **{"num_sequences + 1": None})
    if state_len < 0:
        raise ValueError(f"{where}: state_len is {state_len}, expected at least 0")
    begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    place = end + torch.arange(-state_len, 0, device=end.device)
    # A row of zeros before the first, to which all places before a sequence point.
    place = torch.where(place < begin, 0, place + 1)
    return F.pad(x, (0, 0, 1, 0))[place].transpose(1, 2)


# It is plain PyTorch already.
causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states


def _name_of(where: str, activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(
            f'{where}: activation is {activation!r}, expected None, "silu" or "swish"'
        )
    return activation and "silu"


def _check(where: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_shape(where, "x", x, B=None, D=None, L=None)
    check_shape(where, "weight", weight, D=x.shape[1], W=None)
    if bias is not None:
        check_shape(where, "bias", bias, D=x.shape[1])


def _convolve(
    convolution: Callable,
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
    final_states_out: Tensor | None,
    activation: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    activation = _name_of(where, activation)
    _check(where, x, weight, bias)
    state = {"B": x.shape[0], "D": x.shape[1], "W - 1": weight.shape[1] - 1}
    weight, bias = parameter(weight, x.dtype), parameter(bias, x.dtype)
    inputs = x.transpose(1, 2)
    if seq_idx is not None:
        for name, given in [
            ("initial_states", initial_states is not None),
            ("return_final_states", return_final_states),
        ]:
            if given:
                raise ValueError(f"{where}: {name} is given, expected none beside seq_idx")
        check_indices(where, "seq_idx", seq_idx, B=x.shape[0], L=x.shape[2])
        return _by_sequence(convolution, inputs, weight, bias, seq_idx, activation)
    if initial_states is not None:
        check_shape(where, "initial_states", initial_states, **state)
        initial_states = initial_states.to(x.dtype)
    y, final = convolution(inputs, weight, bias, initial_states, activation)
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    if final_states_out is not None:
        check_shape(where, "final_states_out", final_states_out, **state)
        with torch.no_grad():
            final_states_out.copy_(final)
        if not final.requires_grad:
            final = final_states_out
    return y, final


def _by_sequence(
    convolution: Callable,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor,
    activation: str | None,
) -> Tensor:
    """All rows end to end, cut where ``seq_idx`` changes and where a row begins."""
    B, L, D = inputs.shape
    count = B * L
    if count == 0:
        return convolution(inputs, weight, bias, None, activation)[0].transpose(1, 2)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if is_compiling():
        # A graph has no shapes that depend on values: as many sequences as there are steps, all
        # but some of which are empty.
        places = torch.nonzero_static(begins.flatten(), size=count, fill_value=count)
    else:
        places = begins.flatten().nonzero()
    cu_seqlens = F.pad(places.squeeze(1), (0, 1), value=count)
    padding = (seq_idx < 0).unsqueeze(2)
    # Looking at a value would make the CPU wait for a GPU.
    padded = is_compiling() or not padding.is_cpu or bool(padding.any())
    if padded:  # a NaN there would reach the gradient of the weight
        inputs = torch.where(padding, 0.0, inputs)
    y, _ = convolution(
        inputs.reshape(1, count, D), weight, bias, None, activation, cu_seqlens=cu_seqlens
    )
    y = y.view(B, L, D)
    if padded:
        y = torch.where(padding, 0.0, y)
    return y.transpose(1, 2)


def _update(
    convolution: Callable,
    where: str,
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    indices: Tensor | None,
) -> Tensor:
    activation = _name_of(where, activation)
    one = x.dim() == 2
    if one:
        x = x.unsqueeze(-1)
    _check(where, x, weight, bias)
    B, D, L = x.shape
    before = weight.shape[1] - 1
    rows = {"B": B} if indices is None else {"num_slots": None}
    check_shape(where, "conv_state", conv_state, **rows, D=D, state_len=None)
    state_len = conv_state.shape[2]
    if state_len < before:
        raise ValueError(
            f"{where}: conv_state has state_len={state_len}, expected at least W - 1={before}"
        )
    if cache_seqlens is not None:
        check_indices(where, "cache_seqlens", cache_seqlens, B=B)
    if indices is not None:
        check_indices(where, "conv_state_indices", indices, B=B)
    weight, bias = parameter(weight, x.dtype), parameter(bias, x.dtype)

    differentiable = needs_grad(x, conv_state, weight, bias)
    if (
        L == 1
        and state_len == before
        and cache_seqlens is None
        and not differentiable
        and convolution is causal_conv1d
        and conv_state.dtype == x.dtype
        and (indices is None or conv_state.is_contiguous())  # else all of the pool is copied
    ):
        y = causal_conv1d_step_(x.squeeze(2), weight, bias, conv_state, indices, activation)
        return y if one else y.unsqueeze(2)

    if indices is not None:
        state = conv_state[indices.clamp(min=0)]
    else:  # the backward needs what is overwritten below
        state = conv_state.clone() if differentiable else conv_state
    if cache_seqlens is None:
        seen = state[..., state_len - before :]
        keep = x[..., max(L - state_len, 0) :]
        new_state = torch.cat([state[..., L:], keep], -1)
    else:
        length = cache_seqlens.long()[:, None]
        steps = torch.arange(-before, L, device=x.device)
        place = (length + steps) % max(state_len, 1)
        place = place[:, None].expand(-1, D, -1)
        seen = state.gather(2, place[..., :before])
        last = min(L, state_len)
        new_state = state.scatter(
            2, place[..., before + L - last :], x[..., L - last :].to(state.dtype)
        )
    y, _ = convolution(x.transpose(1, 2), weight, bias, seen.to(x.dtype), activation)
    y = y.transpose(1, 2)
    if indices is None:
        conv_state.copy_(new_state)
    else:
        valid = write_rows(conv_state, indices, new_state, state)
        y = torch.where(valid[:, None, None], y, 0.0)
    return y.squeeze(2) if one else y
