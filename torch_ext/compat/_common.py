"""What the functions of mamba_ssm and causal_conv1d have in common: checks and dtypes."""

from functools import reduce

import torch
from torch import Tensor

from .._sequence_layer import shape_text


def check_shape(where: str, name: str, x: Tensor, **sizes: int | None) -> None:
    """``sizes``: the names of the dimensions, and how large they have to be, or None."""
    if x.dim() == len(sizes) and all(
        size is None or size == given for size, given in zip(sizes.values(), x.shape, strict=True)
    ):
        return
    expected = ", ".join(k if size is None else f"{k}={size}" for k, size in sizes.items())
    raise ValueError(f"{where}: {name} has shape {shape_text(x)}, expected ({expected})")


def check_indices(where: str, name: str, x: Tensor, **sizes: int | None) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: {name} has dtype {x.dtype}, expected int32 or int64")
    check_shape(where, name, x, **sizes)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the operators accumulate."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def widest(*tensors: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, [x.dtype for x in tensors if x is not None])


def parameter(p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``p`` as the operators take parameters beside inputs of ``dtype``: of that or float32."""
    if p is None or p.dtype == dtype:
        return p
    return p.to(wide_dtype(dtype))


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def write_rows(pool: Tensor, indices: Tensor, rows: Tensor, before: Tensor) -> Tensor:
    """Puts each of ``rows`` into its slot of ``pool``, but for those whose index is below 0.

    ``before``: what was in the slots (in slot 0 for an index below 0). Returns where the index is
    not below 0. No shape depends on values: the rows that are left out write what the first other
    one writes (or, if there is none, what slot 0 has), where it writes it, without a gradient.
    """
    valid = indices >= 0
    if indices.shape[0] == 0:
        return valid
    first = valid.int().argmax(0, keepdim=True)
    writes = valid.index_fill(0, first, True)
    slots = indices.clamp(min=0)
    one = [-1] + [1] * (rows.dim() - 1)
    rows = torch.where(valid.view(one), rows, before)
    rows = torch.where(writes.view(one), rows, rows[first].detach())
    pool.index_put_((torch.where(writes, slots, slots[first]),), rows.to(pool.dtype))
    return valid
