"""Padded batches, as the blocks and language models take them: one row per sequence, filled up to
the length of the longest on either side."""

import torch
from torch import Tensor

from ._sequence_layer import check_lengths_type, is_compiling, shape_text


def valid_steps(name: str, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor | None:
    """Where ``x`` ``(B, T, ...)`` is no padding, ``(B, T, 1)``; ``name`` begins what errors say."""
    if padding != "right" and padding != "left":
        raise ValueError(f'{name}: padding is "{padding}", expected "right" or "left"')
    if lengths is None:
        return None
    if not torch.jit.is_scripting():
        check_lengths_type(name, lengths)
    if lengths.dim() != 1 or lengths.shape[0] != x.shape[0]:
        raise ValueError(
            f"{name}: lengths has shape {shape_text(lengths)}, expected (B={x.shape[0]},)"
        )
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{name}: lengths has dtype {lengths.dtype}, expected an integer")
    if lengths.is_cpu and lengths.numel() > 0 and not is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > x.shape[1]:
            raise ValueError(
                f"{name}: lengths has values from {low} to {high}, expected 0 to T={x.shape[1]}"
            )
    steps = torch.arange(x.shape[1], device=x.device)
    if padding == "left":
        steps = x.shape[1] - 1 - steps
    return (steps < lengths.to(x.device).unsqueeze(1)).unsqueeze(2)


def last_inputs(before: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
    """What a convolution over ``x`` ``(B, T, D)``, padded on the right, needs for the next steps.

    Args:
        before: its inputs before the first step, ``(B, D, W - 1)``.
        x: its inputs.
        lengths: of each row, ``(B,)``.

    Returns:
        The last ``W - 1`` inputs of each row before its padding, ``(B, D, W - 1)``.
    """
    everything = torch.cat([before.transpose(1, 2).to(x.dtype), x], 1)
    place = lengths.to(x.device)[:, None] + torch.arange(before.shape[2], device=x.device)
    place = place[:, :, None].expand(-1, -1, x.shape[2])
    return everything.gather(1, place).transpose(1, 2)


def last_step(x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
    """The last step of each row of ``x`` ``(B, T, D)``, ``(B, D)``; of an empty row just any."""
    if lengths is None or padding == "left":
        return x[:, -1]
    last = (lengths.to(x.device).long() - 1).clamp_min(0)[:, None, None]
    return x.gather(1, last.expand(-1, 1, x.shape[2])).squeeze(1)
