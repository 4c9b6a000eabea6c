"""The operators themselves: right first, then as a share of what the machine can do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Calibration, Effort, measure
from shapes import GOALS, Operator

import torch_ext

# Largest error against float64, relative to the largest value of that tensor. Gates and sums are
# made in float32, so half precision errs by the rounding of h, of its saved copy, of gradients.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# What the small check uses: odd, so that every tail of rows, tiles and lanes is met.
REDUCED_SHAPE = (3, 37, 83)


class WrongResult(Exception):
    pass


@functools.lru_cache(maxsize=3)
def random_tensors(
    names: tuple[str, ...], shape: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """By name and always the same; kept, because making them takes longer than timing."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        tensor = torch.randn(shape, generator=generator)
        # A decay lies in (0, 1); everything else is a pre-activation, a value or a gradient.
        tensors[name] = (tensor.sigmoid() if name == "a" else tensor).to(dtype)
    return tensors


def make_inputs(
    operator: Operator, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The operator's inputs, and a gradient of h."""
    tensors = random_tensors((*operator.inputs, "grad_h"), shape, dtype)
    *inputs, grad_h = (tensor.detach() for tensor in tensors.values())
    return inputs, grad_h


def run_with_gradient(
    function: Callable,
    operator: Operator,
    inputs: list[torch.Tensor],
    grad_h: torch.Tensor,
    grad_final: torch.Tensor,
) -> dict[str, torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    h, final = function(*leaves, **dict(operator.options))
    gradients = torch.autograd.grad((h, final), leaves, (grad_h, grad_final.to(final.dtype)))
    named = {f"grad_{name}": grad for name, grad in zip(operator.inputs, gradients, strict=True)}
    return {"h": h.detach(), "final_state": final.detach(), **named}


@dataclass
class Reference:
    """The float64 answer for a few rows and channels; channels do not meet, so a chunk is exact."""

    rows: list[int]
    channels: list[int]
    values: dict[str, torch.Tensor]

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.rows][..., self.channels]


class Checker:
    """Compares with the plain PyTorch reference in float64; keeps references between ISAs."""

    def __init__(self) -> None:
        self.references: dict[tuple, Reference] = {}
        self.errors: dict[tuple, float] = {}

    def check(
        self, name: str, operator: Operator, shape: tuple, dtype: torch.dtype, variant: tuple
    ) -> float:
        """The largest relative error at the reduced shape and in a chunk of the full one.

        `variant` names the threads and instruction set in force: each is checked once.
        """
        worst = 0.0
        for size in (REDUCED_SHAPE, shape):
            key = (name, size, dtype, variant)
            if key not in self.errors:
                self.errors[key] = self._check_at(name, operator, size, dtype)
            worst = max(worst, self.errors[key])
        return worst

    def _check_at(self, name: str, operator: Operator, shape: tuple, dtype: torch.dtype) -> float:
        batch, _, dim = shape
        inputs, grad_h = make_inputs(operator, shape, dtype)
        grad_final = torch.randn((batch, dim), generator=torch.Generator().manual_seed(1))

        key = (name, shape, dtype)
        reference = self.references.get(key)
        if reference is None:
            whole = shape == REDUCED_SHAPE
            rows = list(range(batch)) if whole else sorted({0, batch - 1})
            ends = 16
            channels = list(range(dim))
            if not whole and dim > 2 * ends:
                channels = channels[:ends] + channels[-ends:]
            reference = Reference(rows, channels, {})
            exact = [reference.pick(tensor).double() for tensor in (*inputs, grad_h, grad_final)]
            function = getattr(torch_ext, f"{operator.function}_reference")
            reference.values = run_with_gradient(
                function, operator, exact[: len(inputs)], exact[-2], exact[-1]
            )
            self.references[key] = reference

        function = getattr(torch_ext, operator.function)
        got = run_with_gradient(function, operator, inputs, grad_h, grad_final)
        worst = 0.0
        for what, expected in reference.values.items():
            difference = reference.pick(got[what]).double() - expected
            error = (difference.abs().max() / expected.abs().max()).item()
            if not error <= TOLERANCES[dtype]:  # also catches NaN
                raise WrongResult(
                    f"{name}: {what} is wrong by {error:.1e} of its largest value at shape "
                    f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} "
                    f"(accepted: {TOLERANCES[dtype]:.0e})"
                )
            worst = max(worst, error)
        return worst


def make_call(
    operator: Operator,
    mode: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    autograd: bool = True,
) -> Callable[[], object]:
    """One call as it is timed; without autograd, two operators one after the other."""
    inputs, grad_h = make_inputs(operator, shape, dtype)
    function = getattr(torch_ext, operator.function)
    options = dict(operator.options)

    # The backward operator as autograd calls it: no state, no gradient of the final one.
    backward = getattr(torch.ops.torch_ext, f"{operator.function}_backward").default
    tail: tuple = (None, None)  # initial_state, cu_seqlens
    if operator.function in ("min_gru", "min_lstm"):
        tail += (options.get("activation", "identity"),)
    if operator.function == "min_lstm":
        tail += (True,)  # normalize
    tail += (False,)  # reverse

    if mode == "forward":

        def call() -> object:
            with torch.inference_mode():
                return function(*inputs, **options)

    elif mode == "backward":
        with torch.no_grad():
            saved, _ = function(*inputs, **options)

        def call() -> object:
            with torch.inference_mode():
                return backward(grad_h, None, *inputs, saved, *tail)

    elif autograd:
        leaves = [tensor.requires_grad_() for tensor in inputs]

        def call() -> object:
            h, _ = function(*leaves, **options)
            return torch.autograd.grad(h, leaves, grad_h)

    else:

        def call() -> object:
            with torch.inference_mode():
                h, _ = function(*inputs, **options)
                return backward(grad_h, None, *inputs, h, *tail)

    return call


def time_operator(
    name: str,
    operator: Operator,
    mode: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    threads: int,
    in_l2: bool,
    calibrations: dict[int, Calibration],
    exp_rate: float,
    effort: Effort,
    calibration_seconds: float,
) -> dict:
    """One row of the result: seconds, bandwidth, shares of triad and of the roof."""
    batch, time, dim = shape
    elements = batch * time * dim
    itemsize = torch.empty((), dtype=dtype).element_size()
    moved = elements * itemsize * operator.tensors_moved(mode)
    working_set = elements * itemsize * operator.tensors_alive(mode)

    # One calibration per working set: a further operator of the same size adds to its evidence.
    calibration = calibrations.setdefault(
        working_set, Calibration(working_set, threads, calibration_seconds)
    )
    calls = {"call": make_call(operator, mode, shape, dtype, autograd=not in_l2)}
    if in_l2:
        # The same call without a single step: interpreter, dispatcher, empty outputs.
        calls["overhead"] = make_call(operator, mode, (batch, 0, dim), dtype, autograd=False)
    samples = measure(calls, effort, around=calibration.run)

    seconds = samples["call"].best
    overhead = samples["overhead"].best if in_l2 else 0.0
    kernel = seconds - overhead
    triad = calibration.best("triad") * 1e9
    bandwidth_seconds = moved / triad
    exp_seconds = elements * operator.exps_needed(mode) / (exp_rate * 1e9)
    roof = max(bandwidth_seconds, exp_seconds)
    goal = GOALS["in-L2" if in_l2 else "streamed"]
    return {
        "operator": name,
        "mode": mode,
        "shape": list(shape),
        "in_l2": in_l2,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        **samples["call"].summary(),
        "overhead_seconds": overhead,
        "bytes_moved": moved,
        "working_set_bytes": working_set,
        "gigabytes_per_second": moved / kernel * 1e-9,
        "calibration_gigabytes_per_second": dict(calibration.rates),
        "exp_per_nanosecond": exp_rate,
        "bound_by": "bandwidth" if bandwidth_seconds >= exp_seconds else "exp",
        "fraction_of_triad": bandwidth_seconds / kernel,
        "fraction_of_roof": roof / kernel,
        "fraction_of_triad_with_call_overhead": bandwidth_seconds / seconds,
        "goal": goal,
        "meets_goal": bandwidth_seconds / kernel >= goal,
    }
