#!/usr/bin/env python
"""Every operator once on small awkward inputs: what a sanitizer watches, in seconds.

    compute-sanitizer --tool racecheck python benchmarks/exercise.py --device cuda

Results are compared with the CPU's, so that a run that is clean and wrong does not pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from shapes import OPERATORS, Operator

import torch_ext

# Odd tails; many channels; few channels and many steps, where time is split; one step.
SHAPES = ((3, 37, 83), (2, 65, 256), (1, 700, 5), (2, 1, 40))
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LAYOUTS = ("rows", "time last", "packed", "reverse")
WINDOWS = (1, 4, 7, 11)  # of causal_conv1d: each kind of kernel
SCANS = (  # of selective_scan: layout or form, and states per channel
    ("rows", 16),
    ("time last", 5),
    ("packed", 16),
    ("reverse", 16),
    ("grouped", 16),
    ("constant", 16),
    ("complex", 3),
    ("rows", 130),
    ("step", 16),
)


def inputs_of(
    operator: Operator, shape: tuple[int, int, int], dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _ in operator.inputs]
    if operator.inputs[0] == "a":
        tensors[0].sigmoid_()
    return [tensor.to(dtype) for tensor in tensors]


def run(operator: Operator, inputs: list[torch.Tensor], layout: str, device: str) -> list:
    """Forward and backward, with states, in one of the layouts: all results on the CPU."""
    options: dict = dict(operator.options)
    batch, steps, dim = inputs[0].shape
    rows = batch
    leaves = [tensor.to(device) for tensor in inputs]
    if layout == "time last":
        leaves = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in leaves]
    if layout == "packed":
        leaves = [tensor.reshape(1, batch * steps, dim) for tensor in leaves]
        ends = [0, 0, (batch * steps) // 3, batch * steps]
        options["cu_seqlens"] = torch.tensor(ends, device=device)
        rows = len(ends) - 1
    options["reverse"] = layout == "reverse"
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    wide = torch.float64 if inputs[0].dtype is torch.float64 else torch.float32
    state = torch.linspace(-1, 1, rows * dim, dtype=wide).reshape(rows, dim)
    state = state.to(device).requires_grad_()
    function = getattr(torch_ext, operator.function)
    h, final = function(*leaves, state, **options)
    weights = (torch.cos(h.detach()), torch.sin(final.detach()))
    gradients = torch.autograd.grad((h, final), (*leaves, state), weights)
    return [x.detach().cpu() for x in (h, final, *gradients)]


def run_steps(operator: Operator, inputs: list[torch.Tensor], device: str) -> list:
    """A step, and one in place on a pool with a row that is skipped."""
    options = dict(operator.options)
    first = [tensor[:, 0].to(device) for tensor in inputs]
    batch, dim = first[0].shape
    wide = torch.float64 if inputs[0].dtype is torch.float64 else torch.float32
    pool = torch.linspace(-1, 1, (batch + 2) * dim, dtype=wide).reshape(batch + 2, dim).to(device)
    indices = torch.arange(batch, 0, -1, device=device)
    indices[0] = -1
    h, state = getattr(torch_ext, f"{operator.function}_step")(*first, pool[:batch], **options)
    in_place = getattr(torch_ext, f"{operator.function}_step_")
    h_ = in_place(*first, pool, indices, **options)
    return [x.cpu() for x in (h, state, h_, pool)]


def run_convolution(
    shape: tuple[int, int, int], window: int, dtype: torch.dtype, layout: str, device: str
) -> list:
    """causal_conv1d, forward and backward with states, and steps, as the two functions above."""
    generator = torch.Generator().manual_seed(0)
    batch, steps, dim = shape
    rows, ends = batch, None
    if layout == "packed":
        batch, steps, ends = 1, batch * steps, [0, 0, batch * steps // 3, batch * steps]
        rows = len(ends) - 1
    pool = rows + 2 if layout == "step" else rows
    sizes = ((batch, steps, dim), (dim, window), (dim,), (pool, dim, window - 1))
    leaves = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    if layout == "time last":
        leaves[0] = leaves[0].transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "step":
        x, weight, bias, state = leaves
        indices = torch.arange(batch, 0, -1, device=device)
        indices[0] = -1
        arguments = (x[:, 0], weight, bias, state, indices, "silu")
        return [torch_ext.causal_conv1d_step_(*arguments).cpu(), state.cpu()]
    cu_seqlens = None if ends is None else torch.tensor(ends, device=device)
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    y, final = torch_ext.causal_conv1d(*leaves, "silu", cu_seqlens)
    weights = (torch.cos(y.detach()), torch.sin(final.detach()))
    gradients = torch.autograd.grad((y, final), leaves, weights)
    return [x.detach().cpu() for x in (y, final, *gradients)]


def run_selective_scan(
    shape: tuple[int, int, int], kind: str, states: int, dtype: torch.dtype, device: str
) -> list:
    """selective_scan with everything that it takes, forward and backward, or a step in place."""
    generator = torch.Generator().manual_seed(0)
    batch, steps, dim = shape
    rows, ends = batch, None
    if kind == "packed":
        batch, steps, ends = 1, batch * steps, [0, 0, batch * steps // 3, batch * steps]
        rows = len(ends) - 1
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    of_states = wide.to_complex() if kind == "complex" else wide
    per_token = of_states if kind == "complex" else dtype
    groups = next(n for n in (3, 5, 2, 1) if dim % n == 0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        drawn = of_states if dtype.is_complex else wide
        return torch.randn(size, generator=generator, dtype=drawn).to(device, dtype)

    def token(*size: int) -> torch.Tensor:
        x = draw(*size)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if kind == "time last" else x

    A = draw(dim, states, dtype=of_states)
    A = torch.complex(-A.real.abs(), A.imag) if kind == "complex" else -A.abs()
    size: tuple[int, ...] = (batch, steps, states)
    if kind == "constant":
        size, per_token = (dim, states), of_states
    if kind == "grouped":
        size = (batch, steps, groups, states)
    B, C = draw(*size, dtype=per_token), draw(*size, dtype=per_token)
    D, delta_bias = draw(dim, dtype=wide), draw(dim, dtype=wide) - 2
    u, delta, z = (token(batch, steps, dim) for _ in range(3))
    pool = rows + 2 if kind == "step" else rows
    state = draw(pool, dim, states, dtype=of_states)
    if kind == "step":
        indices = torch.arange(batch, 0, -1, device=device)
        indices[0] = -1
        y = torch_ext.selective_scan_step_(
            u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], delta_bias, state, indices,
            delta_softplus=True,
        )  # fmt: skip
        return [y.cpu(), state.cpu()]
    leaves = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D, z, delta_bias, state)]
    y, final = torch_ext.selective_scan(
        *leaves,
        delta_softplus=True,
        cu_seqlens=None if ends is None else torch.tensor(ends, device=device),
        reverse=kind == "reverse",
    )
    weights = (torch.cos(y.detach()), torch.cos(final.detach().abs()).to(final.dtype))
    gradients = torch.autograd.grad((y, final), leaves, weights)
    return [x.detach().cpu() for x in (y, final, *gradients)]


def all_works() -> Iterator[tuple[str, float, Callable[[str], list]]]:
    """What is run, the error that is accepted, and the work, to be called with a device."""
    for dtype, tolerance in TOLERANCES.items():
        for shape in SHAPES:
            for name, operator in OPERATORS.items():
                inputs = inputs_of(operator, shape, dtype)
                for layout in LAYOUTS:
                    work = partial(run, operator, inputs, layout)
                    yield f"{name} {dtype} {shape} {layout}", tolerance, work
                yield (
                    f"{name} {dtype} {shape} step",
                    tolerance,
                    partial(run_steps, operator, inputs),
                )
            for window in WINDOWS:
                for layout in ("rows", "time last", "packed", "step"):
                    work = partial(run_convolution, shape, window, dtype, layout)
                    yield f"causal_conv1d W={window} {dtype} {shape} {layout}", tolerance, work
            for kind, states in SCANS:
                if kind == "complex" and dtype.itemsize == 2:
                    continue
                work = partial(run_selective_scan, shape, kind, states, dtype)
                yield f"selective_scan N={states} {dtype} {shape} {kind}", tolerance, work


def differences(device: str) -> Iterator[tuple[str, float, float]]:
    """What was run, its largest error in relation to the largest value, and what is accepted."""
    for what, tolerance, work in all_works():
        worst = 0.0
        for got, want in zip(work(device), work("cpu"), strict=True):
            if want.numel() == 0:
                continue
            got, want = (x.to(torch.complex128) for x in (got, want))
            largest = want.abs().max().clamp(min=1)
            error = ((got - want).abs().max() / largest).item()
            worst = max(worst, error if error == error else float("inf"))
        yield what, worst, tolerance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    number, wrong = 0, 0
    for what, error, tolerance in differences(device):
        number += 1
        if not error <= tolerance:
            wrong += 1
            print(f"WRONG: {what}: {error:.1e}, accepted {tolerance:.0e}")
    print(f"{number} runs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
