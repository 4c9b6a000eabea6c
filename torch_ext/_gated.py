"""What the references of the gated recurrences share: the loop over time, and what becomes of a state on
its way into the next step."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .linear_scan import state_dtype

# From the inputs of a step, what R (or u) multiplies and the states before to the states after.
Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def run_gated_reference(
    cell: Cell,
    x: Tensor,
    rows: Sequence[Sequence[int]],
    initial_state: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    reset: Tensor | None,
    recurrent_mask: Tensor | None,
    updates: Sequence[Tensor | None],
    gradient_clip: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs ``state = cell(x[:, t], u, state)`` over time. The first state is ``h``, the output.

    ``rows`` are the shapes of one row of each state, ``updates`` what zones them out, or None.
    """
    B, T = x.shape[:2]
    dtype, wide = x.dtype, state_dtype(x.dtype)
    x = x.to(wide)
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        count = B if cu_seqlens is None else len(bounds) - 1
        initial_state = [x.new_zeros([count, *row]) for row in rows]
    if gradient_clip is not None and not gradient_clip >= 0:
        raise ValueError(f"gradient_clip is {gradient_clip}, expected at least 0")
    mask = None if recurrent_mask is None else recurrent_mask.detach().to(wide)
    updates = [None if update is None else update.detach().to(wide) for update in updates]

    outputs = [x.new_zeros([B, *rows[0]])] * T
    final_states = []
    for s, (start, stop) in enumerate(pairwise(bounds)):
        sequence = slice(None) if cu_seqlens is None else slice(s, s + 1)
        state = tuple(y[sequence] for y in initial_state)
        for t in reversed(range(start, stop)) if reverse else range(start, stop):
            if reset is not None:
                state = tuple(torch.where(per_row(reset[:, t], y), 0.0, y) for y in state)
            u = state[0] if gradient_clip is None else clip_gradient(state[0], gradient_clip)
            u = u if mask is None else u * mask[sequence]
            after = cell(x[:, t], u, state)
            state = tuple(
                new if update is None else update[:, t] * new + (1 - update[:, t]) * old
                for update, new, old in zip(updates, after, state, strict=True)
            )
            outputs[t] = state[0]
        final_states.append(state)
    h = torch.stack(outputs, 1) if outputs else x.new_zeros([B, 0, *rows[0]])
    if not final_states:
        return h.to(dtype), tuple(y.clone() for y in initial_state)
    final = tuple(torch.cat(parts) for parts in zip(*final_states, strict=True))
    return h.to(dtype), final


def per_row(x: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` with as many dimensions as ``like``."""
    return x.reshape(-1, *[1] * (like.dim() - 1))


def recurrent_product(
    R: Tensor, u: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_eps: float
) -> Tensor:
    """``R u + bias``, ``(B, G, H, K)``, with the layer norm of ``R u`` over all gates and units of a
    head, where there is one."""
    a = torch.einsum("ghkp,bhp->bghk", R.to(u.dtype), u)
    if norm_weight is not None:
        a = layer_norm(a, (1, 3), norm_eps) * norm_weight.to(u.dtype)
    return a if bias is None else a + bias.to(u.dtype)


def layer_norm(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)


def clip_gradient(x: Tensor, bound: float) -> Tensor:
    """``x``, whose gradient is clamped on its way back."""
    return _ClipGradient.apply(x, bound)


class _ClipGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, bound):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()


def check_choice(owner: str, argument: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        words = " or ".join([f"'{word}'" for word in choices])
        raise ValueError(f"{owner}: {argument} is '{given}', expected {words}")
