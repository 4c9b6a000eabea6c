"""The operators themselves: right first, then as a share of what the machine can do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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
LONG = 2048


class WrongResult(Exception):
    pass


def draw_tensors(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """By name; the same seed draws the same numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name in names:
        tensor = torch.randn(shape, generator=generator, device=device)
        # A decay lies in (0, 1); everything else is a pre-activation, a value or a gradient.
        tensors[name] = (tensor.sigmoid() if name == "a" else tensor).to(dtype)
    return tensors


# On the CPU they are kept, because making them takes longer than timing.
_kept_tensors = functools.lru_cache(maxsize=3)(draw_tensors)


def make_inputs(
    operator: Operator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The operator's inputs, and a gradient of h."""
    draw = _kept_tensors if device == "cpu" else draw_tensors
    tensors = draw((*operator.inputs, "grad_h"), shape, dtype, device, seed)
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
    """Compares with the plain PyTorch reference in float64; keeps references between ISAs.

    Beyond LONG steps the reference's loop (whose backward costs T^2) is replaced by the CPU
    operator in float64, which is itself held to the loop at the reduced shape.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
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

    def _check_at(
        self,
        name: str,
        operator: Operator,
        shape: tuple,
        dtype: torch.dtype,
        device: str | None = None,
    ) -> float:
        device = device or self.device
        batch, _, dim = shape
        inputs, grad_h = make_inputs(operator, shape, dtype, device)
        grad_final = torch.randn((batch, dim), generator=torch.Generator().manual_seed(1))
        grad_final = grad_final.to(device)

        key = (name, shape, dtype, device)
        reference = self.references.get(key)
        if reference is None:
            whole = shape == REDUCED_SHAPE
            rows = list(range(batch)) if whole else sorted({0, batch - 1})
            ends = 16
            channels = list(range(dim))
            if not whole and dim > 2 * ends:
                channels = channels[:ends] + channels[-ends:]
            reference = Reference(rows, channels, {})
            exact = [
                reference.pick(tensor).cpu().double() for tensor in (*inputs, grad_h, grad_final)
            ]
            function = getattr(torch_ext, f"{operator.function}_reference")
            if shape[1] > LONG and device != "cpu":
                self._check_at(name, operator, REDUCED_SHAPE, torch.float64, device="cpu")
                function = getattr(torch_ext, operator.function)
            reference.values = run_with_gradient(
                function, operator, exact[: len(inputs)], exact[-2], exact[-1]
            )
            self.references[key] = reference

        function = getattr(torch_ext, operator.function)
        got = run_with_gradient(function, operator, inputs, grad_h, grad_final)
        worst = 0.0
        for what, expected in reference.values.items():
            difference = reference.pick(got[what]).cpu().double() - expected
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
    device: str = "cpu",
    seed: int = 0,
) -> Callable[[], object]:
    """One call as it is timed; without autograd, two operators one after the other."""
    inputs, grad_h = make_inputs(operator, shape, dtype, device, seed)
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


def make_step(
    operator: Operator,
    batch: int,
    dim: int,
    dtype: torch.dtype,
    in_place: bool,
    device: str = "cpu",
    seed: int = 0,
) -> Callable[[], object]:
    """One token through NAME_step, or through NAME_step_, which overwrites the state."""
    inputs = list(draw_tensors(operator.inputs, (batch, dim), dtype, device, seed).values())
    state_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    state = draw_tensors(("state",), (batch, dim), state_dtype, device, seed + 1)["state"]
    function = getattr(torch_ext, f"{operator.function}_step{'_' if in_place else ''}")
    options = dict(operator.options)

    def call() -> object:
        with torch.inference_mode():
            return function(*inputs, state, **options)

    return call


def check_step(
    name: str, operator: Operator, batch: int, dim: int, dtype: torch.dtype, device: str = "cpu"
) -> float:
    """One step and its twin in place against the sequence's float64 reference with T = 1."""
    inputs = list(draw_tensors(operator.inputs, (batch, dim), dtype, device).values())
    state_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    state = draw_tensors(("state",), (batch, dim), state_dtype, device, 1)["state"]
    options = dict(operator.options)
    reference = getattr(torch_ext, f"{operator.function}_reference")
    exact, _ = reference(
        *(x[:, None].cpu().double() for x in inputs), state.cpu().double(), **options
    )
    h, new_state = getattr(torch_ext, f"{operator.function}_step")(*inputs, state, **options)
    h_ = getattr(torch_ext, f"{operator.function}_step_")(*inputs, state, **options)
    worst = 0.0
    for got in (h, h_, new_state, state):
        error = ((got.cpu().double() - exact[:, 0]).abs().max() / exact.abs().max()).item()
        if not error <= TOLERANCES[dtype]:
            raise WrongResult(f"{name}: a step is wrong by {error:.1e} of its largest value")
        worst = max(worst, error)
    return worst


def time_step(
    name: str, operator: Operator, batch: int, dim: int, dtype: torch.dtype, timer, threads: int
) -> Iterator[dict]:
    """A row for NAME_step and one for NAME_step_; what a call costs without channels beside it."""
    error = check_step(name, operator, batch, dim, dtype, timer.device)
    variants = {}
    for in_place in (False, True):
        for width in (dim, 0) if timer.device == "cpu" else (dim,):
            variants[in_place, width] = [
                make_step(operator, batch, width, dtype, in_place, timer.device, 2 * seed)
                for seed in range(timer.sets)
            ]
    samples = timer.measure(variants)
    state_itemsize = max(4, dtype.itemsize)
    for in_place in (False, True):
        # On a GPU no channels are no kernel; its seconds are the kernel's alone anyway.
        overhead = samples[in_place, 0].best if timer.device == "cpu" else 0.0
        yield {
            "operator": name,
            "function": f"{operator.function}_step{'_' if in_place else ''}",
            "shape": [batch, dim],
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads,
            **samples[in_place, dim].summary(),
            "overhead_seconds": overhead,
            "bytes_moved": batch * dim * operator.step_bytes(dtype.itemsize, state_itemsize),
            "error": error,
        }
