#!/usr/bin/env python
"""Every operator once on small awkward inputs: what a sanitizer watches, in seconds.

    compute-sanitizer --tool racecheck python benchmarks/exercise.py --device cuda

Results are compared with the CPU's, so that a run that is clean and wrong does not pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch
from shapes import OPERATORS, Operator

import torch_ext

# Odd tails; many channels; few channels and many steps, where time is split; one step.
SHAPES = ((3, 37, 83), (2, 65, 256), (1, 700, 5), (2, 1, 40))
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LAYOUTS = ("rows", "time last", "packed", "reverse")


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


def differences(device: str) -> Iterator[tuple[str, float, float]]:
    """What was run, its largest error in relation to the largest value, and what is accepted."""
    for name, operator in OPERATORS.items():
        for dtype, tolerance in TOLERANCES.items():
            for shape in SHAPES:
                inputs = inputs_of(operator, shape, dtype)
                works = {layout: partial(run, operator, inputs, layout) for layout in LAYOUTS}
                works["step"] = partial(run_steps, operator, inputs)
                for what, work in works.items():
                    worst = 0.0
                    for got, want in zip(work(device), work("cpu"), strict=True):
                        largest = want.double().abs().max().clamp(min=1)
                        error = ((got.double() - want.double()).abs().max() / largest).item()
                        worst = max(worst, error if error == error else float("inf"))
                    yield f"{name} {dtype} {shape} {what}", worst, tolerance


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
