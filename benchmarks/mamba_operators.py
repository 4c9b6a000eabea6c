"""Mamba's operators: right first, then as a share of what the machine can do."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from measure import Calibration, Effort, calibrate, exp_rate, measure
from operators import REDUCED_SHAPE, TOLERANCES, WrongResult
from shapes import (
    MAMBA_BACKWARD_GOAL,
    MAMBA_GOALS,
    MAMBA_SCALING_GOAL,
    MAMBA_STATES,
    MAMBA_STEP_GOAL,
    MAMBA_TAPS,
    MambaOperator,
)

import torch_ext

Shape = tuple[int, int, int]
Call = Callable[[], object]
SCAN_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
CONV_NAMES = ("x", "weight", "bias")


def names_of(operator: MambaOperator) -> tuple[str, ...]:
    return CONV_NAMES if operator.function == "causal_conv1d" else SCAN_NAMES


def options_of(operator: MambaOperator) -> dict:
    if operator.function == "causal_conv1d":
        return {"activation": "silu"}
    return {"delta_softplus": operator.fused}


def dtype_of(operator: MambaOperator, dtype: torch.dtype) -> torch.dtype:
    return getattr(torch, operator.dtype) if operator.dtype else dtype


@functools.lru_cache(maxsize=24)
def make_inputs(
    operator: MambaOperator, shape: Shape, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    """The operator's tensors in the order of its arguments, and a gradient of y."""
    batch, time, dim = shape
    generator = torch.Generator().manual_seed(0)
    dtype = dtype_of(operator, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def steps(*size: int, low: float, high: float) -> torch.Tensor:
        """Uniform in the logarithm, as the step sizes of a new layer are."""
        uniform = torch.rand(size, generator=generator)
        return (math.log(low) + (math.log(high) - math.log(low)) * uniform).exp()

    def lay(x: torch.Tensor) -> torch.Tensor:
        x = x.to(dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if operator.time_last else x

    grad = draw(*shape)
    if operator.function == "causal_conv1d":
        weight = draw(dim, MAMBA_TAPS) / MAMBA_TAPS**0.5
        return (lay(draw(*shape)), weight.to(wide), draw(dim).to(wide)), lay(grad)

    u = draw(*shape)
    if operator.data == "denormal":  # lanes are channels: each vector has some
        tiny = torch.where(torch.arange(dim) % 2 == 0, 1e-38, 1.0)
        u, grad = u * tiny, grad * tiny
    large = operator.data == "large"
    delta = steps(*shape, low=1.0 if large else 1e-3, high=20.0 if large else 0.1)
    A = -(
        torch.arange(1, MAMBA_STATES + 1) * (0.75 + 0.25 * torch.rand(dim, 1, generator=generator))
    )
    B, C = draw(batch, time, MAMBA_STATES), draw(batch, time, MAMBA_STATES)
    if not operator.fused:
        given = (lay(u), lay(delta), A.to(wide), B.to(dtype), C.to(dtype), None, None, None)
        return given, lay(grad)
    bias = steps(dim, low=1e-3, high=0.1).expm1().log()  # softplus of it is the step size
    return (
        lay(u),
        lay(draw(*shape) / 2),
        A.to(wide),
        B.to(dtype),
        C.to(dtype),
        draw(dim).to(wide),
        lay(draw(*shape)),
        bias.to(wide),
    ), lay(grad)


def run_with_gradient(
    operator: MambaOperator,
    function: Callable,
    inputs: tuple[torch.Tensor | None, ...],
    grad: torch.Tensor,
) -> dict[str, torch.Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y, final = function(*leaves, **options_of(operator))
    given = {n: x for n, x in zip(names_of(operator), leaves, strict=True) if x is not None}
    gradients = torch.autograd.grad((y, final), list(given.values()), (grad, final.detach() / 8))
    named = {f"grad_{name}": g for name, g in zip(given, gradients, strict=True)}
    return {"y": y.detach(), "final_state": final.detach(), **named}


def in_double(
    inputs: tuple[torch.Tensor | None, ...], grad: torch.Tensor
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    return tuple(None if x is None else x.double() for x in inputs), grad.double()


def on_device(
    inputs: tuple[torch.Tensor | None, ...], grad: torch.Tensor, device: str
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    """Copies, in the same layout: buffers of their own."""
    copies = tuple(None if x is None else x.to(device, copy=True) for x in inputs)
    return copies, grad.to(device, copy=True)


class MambaChecker:
    """Compares with float64, and keeps the references between instruction sets.

    The plain PyTorch loop is the reference at the small odd shape. Its backward costs T squared,
    and the gradients of B and C are sums over all channels, so at the full shape the operator in
    float64 takes its place: it is held to the loop itself, at the small shape with its gradients
    and, in a few channels, over all of time. References are the CPU's, whatever `device` is.
    """

    ENDS = 8  # channels at either end that the loop is run for
    reduced: tuple[int, ...] = REDUCED_SHAPE
    tolerances = TOLERANCES
    draw = staticmethod(make_inputs)
    run = staticmethod(run_with_gradient)
    options = staticmethod(options_of)

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.references: dict[tuple, dict[str, torch.Tensor]] = {}
        self.errors: dict[tuple, float] = {}

    def check(
        self, name: str, operator: MambaOperator, shape: Shape, dtype: torch.dtype, variant: tuple
    ) -> float:
        """The largest error, relative to the largest value of its tensor."""
        worst = 0.0
        for size in (self.reduced, shape):
            key = (name, size, dtype, variant)
            if key not in self.errors:
                self.errors[key] = self._check_at(name, operator, size, dtype)
            worst = max(worst, self.errors[key])
        return worst

    def _check_at(
        self, name: str, operator: MambaOperator, shape: Shape, dtype: torch.dtype
    ) -> float:
        inputs, grad = self.draw(operator, shape, dtype)
        key = (name, shape, dtype)
        if key not in self.references:
            self.references[key] = self._reference(name, operator, shape, inputs, grad)
        if self.device != "cpu":
            inputs, grad = on_device(inputs, grad, self.device)
        got = self.run(operator, getattr(torch_ext, operator.function), inputs, grad)
        tolerance = self.tolerances[dtype_of(operator, dtype)]
        return largest_error(name, got, self.references[key], tolerance, shape)

    def _reference(
        self,
        name: str,
        operator: MambaOperator,
        shape: Shape,
        inputs: tuple[torch.Tensor | None, ...],
        grad: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        function = getattr(torch_ext, operator.function)
        loop = getattr(torch_ext, f"{operator.function}_reference")
        exact, exact_grad = in_double(inputs, grad)
        exactly = self.tolerances[torch.float64]
        if shape == self.reduced:
            reference = self.run(operator, loop, exact, exact_grad)
            double = self.run(operator, function, exact, exact_grad)
            largest_error(f"{name} in float64", double, reference, exactly, shape)
            return reference
        reference = self.run(operator, function, exact, exact_grad)
        few, y = self.some(operator, shape, exact, reference["y"])
        with torch.no_grad():
            expected, _ = loop(*few, **self.options(operator))
        largest_error(f"{name} in float64", {"y": y}, {"y": expected}, exactly, shape)
        return reference

    def some(
        self,
        operator: MambaOperator,
        shape: Shape,
        inputs: tuple[torch.Tensor | None, ...],
        y: torch.Tensor,
    ) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """Inputs and y of the channels at either end, which do not meet the others."""
        dim = shape[2]
        chosen = sorted({*range(min(self.ENDS, dim)), *range(max(0, dim - self.ENDS), dim)})
        along = {"u": 2, "delta": 2, "z": 2, "x": 2, "B": None, "C": None}
        few = [
            x if x is None or along.get(n, 0) is None else x.index_select(along.get(n, 0), picked)
            for n, x in zip(names_of(operator), inputs, strict=True)
            for picked in (torch.tensor(chosen),)
        ]
        return few, y[..., chosen]


def largest_error(
    name: str,
    got: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float,
    shape: tuple[int, ...],
) -> float:
    worst = 0.0
    for what, reference in expected.items():
        error = (got[what].cpu().double() - reference).abs().max() / reference.abs().max()
        if not error <= tolerance:  # also catches NaN
            raise WrongResult(
                f"{name}: {what} is wrong by {error:.1e} of its largest value at shape "
                f"{'x'.join(map(str, shape))} {str(got[what].dtype).removeprefix('torch.')} "
                f"(accepted: {tolerance:.0e})"
            )
        worst = max(worst, float(error))
    return worst


def make_call(
    operator: MambaOperator,
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    device: str | None = None,
) -> Call:
    """The forward operator as in inference, or the backward operator as autograd calls it.

    With a device, on copies there, so that several calls have buffers of their own.
    """
    inputs, grad = make_inputs(operator, shape, dtype)
    if device is not None:
        inputs, grad = on_device(inputs, grad, device)
    options = options_of(operator)
    if mode == "forward":
        function = getattr(torch_ext, operator.function)

        def call() -> object:
            with torch.inference_mode():
                return function(*inputs, **options)

        return call
    ops = torch.ops.torch_ext
    if operator.function == "causal_conv1d":

        def call() -> object:
            with torch.inference_mode():
                return ops.causal_conv1d_backward(grad, None, *inputs, None, None, "silu")

        return call
    with torch.no_grad():
        kept = ops.selective_scan(*inputs, None, None, operator.fused, False, checkpoints=True)[2]

    def call() -> object:
        with torch.inference_mode():
            return ops.selective_scan_backward(
                grad, None, *inputs, None, kept, None, operator.fused, False
            )

    return call


class Limits:
    """What the machine can do, asked before and after the calls that it is compared with."""

    def __init__(self, working_sets: set[int], threads: int, seconds: float, exps: bool = True):
        self.threads, self.seconds, self.exps = threads, seconds, exps
        self.bandwidths = {size: Calibration(size, threads, seconds) for size in working_sets}
        self.exp = self.fma = 0.0

    def run(self) -> None:
        for bandwidth in self.bandwidths.values():
            bandwidth.run()
        if self.exps:
            self.exp = max(self.exp, exp_rate(self.threads, self.seconds))
        for _ in range(2):
            rate = calibrate("fma", 2048 * self.threads, False, self.threads, self.seconds)
            self.fma = max(self.fma, rate)


def time_operators(
    operators: dict[str, MambaOperator],
    modes: tuple[str, ...],
    shape_name: str,
    shape: Shape,
    dtype: torch.dtype,
    threads: int,
    isa: str,
    effort: Effort,
    calibration_seconds: float,
) -> Iterator[dict]:
    """A row for each operator and pass; all of them take turns, so their ratios are of one time."""
    calls: dict[tuple[str, str], Call] = {}
    sizes: dict[tuple[str, str], int] = {}
    elements = math.prod(shape)
    for (name, operator), mode in itertools.product(operators.items(), modes):
        itemsize = dtype_of(operator, dtype).itemsize
        sizes[name, mode] = elements * itemsize * operator.tensors_alive(mode)
        calls[name, mode] = make_call(operator, mode, shape, dtype)
    if not calls:
        return
    limits = Limits(set(sizes.values()), threads, calibration_seconds)
    each = Effort(effort.seconds * len(calls), effort.rounds, effort.sample_seconds)
    samples = measure(calls, each, around=limits.run)

    for (name, mode), sample in samples.items():
        operator = operators[name]
        at = dtype_of(operator, dtype)
        work = operator.work(mode)
        convolution = operator.function == "causal_conv1d"
        bandwidth = limits.bandwidths[sizes[name, mode]]
        moved = elements * work.bytes(at.itemsize)
        by_bytes = moved / (bandwidth.best("copy" if convolution else "triad") * 1e9)
        by_arithmetic = elements * 1e-9 * (work.exps / limits.exp + work.operations / limits.fma)
        roof = max(by_bytes, by_arithmetic)
        goals = MAMBA_GOALS.get((name, mode))
        goal = goals[0 if isa == "avx512" else 1] if goals else None
        ordinary = moved / (bandwidth.rates["copy plain"] * 1e9)
        share = (ordinary if convolution else roof) / sample.best
        row = {
            "operator": name,
            "mode": mode,
            "shape": list(shape),
            "shape_name": shape_name,
            "dtype": str(at).removeprefix("torch."),
            "threads": threads,
            "isa": isa,
            **sample.summary(),
            "nanoseconds_per_element": sample.best
            * 1e9
            / (elements * (1 if convolution else MAMBA_STATES)),
            "bytes_moved": moved,
            "working_set_bytes": sizes[name, mode],
            "gigabytes_per_second": moved / sample.best * 1e-9,
            "calibration_gigabytes_per_second": dict(bandwidth.rates),
            "exp_per_nanosecond": limits.exp,
            "fma_per_nanosecond": limits.fma,
            "bandwidth_seconds": by_bytes,
            "arithmetic_seconds": by_arithmetic,
            "bound_by": "bandwidth" if by_bytes >= by_arithmetic else "arithmetic",
            "fraction_of_roof": roof / sample.best,
            "goal": goal,
            "goal_of": "copy" if convolution else "roof",
            "meets_goal": goal is None or share >= goal,
        }
        if convolution:
            row["fraction_of_copy"] = by_bytes / sample.best
            row["fraction_of_ordinary_copy"] = share
        beside = None
        if operator.beside is not None and (operator.beside, mode) in samples:
            beside, at_most = (operator.beside, mode), operator.at_most
        elif mode == "backward" and not convolution and (name, "forward") in samples:
            beside = (name, "forward")
            at_most = MAMBA_BACKWARD_GOAL if name == "selective_scan" else None
        if beside is not None:
            ratio = sample.best / samples[beside].best
            row["beside"] = {
                "what": " ".join(beside),
                "ratio": ratio,
                "at_most": at_most,
                "meets_goal": at_most is None or ratio <= at_most,
            }
        yield row


def add_scaling(rows: list[dict]) -> list[dict]:
    """Puts into the rows with several threads how many times faster they are than with one."""
    case = ("operator", "mode", "shape", "dtype", "isa")
    single = {tuple(map(str, map(row.get, case))): row for row in rows if row["threads"] == 1}
    found = []
    for row in rows:
        one = single.get(tuple(map(str, map(row.get, case))))
        if row["threads"] == 1 or one is None:
            continue
        ratio = one["seconds_min"] / row["seconds_min"]
        goal = None
        if row["operator"] == "selective_scan" and row["threads"] == 2:
            goal = MAMBA_SCALING_GOAL
        row["scaling"] = {"ratio": ratio, "goal": goal, "meets_goal": not goal or ratio >= goal}
        found.append(row)
    return found


# -- one token -------------------------------------------------------------------------------------


def step_inputs(
    operator: MambaOperator, batch: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    """The arguments of the operator's step before the state, and a state; buffers of their own."""
    inputs, _ = make_inputs(operator, (batch, 1, dim), dtype)
    convolution = operator.function == "causal_conv1d"
    size = (batch, dim, MAMBA_TAPS - 1 if convolution else MAMBA_STATES)
    state = torch.randn(size, generator=torch.Generator().manual_seed(1))
    dtype = dtype_of(operator, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    first = tuple(x[:, 0] if x is not None and x.dim() == 3 else x for x in inputs)
    return on_device(first, state.to(dtype if convolution else wide), device)


def make_step(
    operator: MambaOperator, inputs: tuple[torch.Tensor | None, ...], state: torch.Tensor
) -> Call:
    """One token in place."""
    function = getattr(torch_ext, f"{operator.function}_step_")
    options = options_of(operator)

    def call() -> object:
        with torch.inference_mode():
            return function(*inputs, state, **options)

    return call


def check_step(
    name: str, operator: MambaOperator, batch: int, dim: int, dtype: torch.dtype, device: str
) -> float:
    """The first and last rows of a step, either way, against the plain loop over one token."""
    inputs, state = step_inputs(operator, batch, dim, dtype, device)
    rows = sorted({*range(min(4, batch)), *range(max(0, batch - 4), batch)})
    per_row = {"u", "delta", "B", "C", "z", "x"}
    exact: dict = {}
    for argument, x in zip(names_of(operator), inputs, strict=True):
        if x is not None:
            exact[argument] = (x[rows][:, None] if argument in per_row else x).cpu().double()
    y, final = getattr(torch_ext, f"{operator.function}_reference")(
        **exact, initial_state=state[rows].cpu().double(), **options_of(operator)
    )
    with torch.no_grad():
        function = getattr(torch_ext, f"{operator.function}_step")
        got, new_state = function(*inputs, state, **options_of(operator))
        in_place = make_step(operator, inputs, state)()
    worst = 0.0
    found = (("y", got, y[:, 0]), ("y in place", in_place, y[:, 0]))
    found += (("state", new_state, final), ("state in place", state, final))
    for what, tensor, reference in found:
        error = (tensor[rows].cpu().double() - reference).abs().max() / reference.abs().max()
        if not error <= TOLERANCES[dtype_of(operator, dtype)]:
            raise WrongResult(
                f"{name}: a step's {what} is wrong by {error:.1e} of its largest value"
            )
        worst = max(worst, float(error))
    return worst


# -- one layer, one token --------------------------------------------------------------------------


def weights_of(layer: torch_ext.Mamba) -> list[torch.Tensor | None]:
    """The arguments of mamba_step between x and the state."""
    return [
        layer.in_proj.weight, layer.in_proj.bias, layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias, layer.x_proj.weight, layer.dt_proj.weight, layer.dt_proj.bias,
        layer.A_log, layer.D, layer.out_proj.weight, layer.out_proj.bias,
    ]  # fmt: skip


def check_layer_steps(layer: torch_ext.Mamba, tolerance: float) -> float:
    """Three steps, either way, against the whole layer in float64 by plain PyTorch's loops."""
    from peers import PlainMamba

    x = torch.randn(2, 3, layer.d_model, generator=torch.Generator().manual_seed(0))
    exact = PlainMamba(layer, "loop").cpu().double()(x.double())
    x = x.to(layer.in_proj.weight)
    functional, in_place = layer.init_state(2), layer.init_state(2)
    worst = 0.0
    for t in range(3):
        y, functional = layer.step(x[:, t], functional)
        y_ = torch_ext.mamba_step_(x[:, t], *weights_of(layer), in_place)
        for got in (y, y_):
            error = ((got.cpu().double() - exact[:, t]).abs().max() / exact.abs().max()).item()
            if not error <= tolerance:
                raise WrongResult(f"Mamba.step is wrong by {error:.1e} of its largest value")
            worst = max(worst, error)
    return worst


def time_step(
    width: int, batch: int, copies: int, dtype: torch.dtype, threads: int, effort: Effort
) -> Iterator[dict]:
    """A step of a layer beside the time to read its weights once, by the fastest of two ways.

    `copies` layers take turns: one stays in the caches, many come from memory, as in a model.
    """
    torch.manual_seed(0)
    layers = [torch_ext.Mamba(width, dtype=dtype) for _ in range(copies)]
    weight_bytes = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    with torch.inference_mode():
        error = check_layer_steps(layers[0], TOLERANCES[dtype])
    x = torch.randn(batch, width).to(dtype)
    states = [layer.init_state(batch) for layer in layers]
    arguments = [weights_of(layer) for layer in layers]
    rows = max(1, weight_bytes // (dtype.itemsize * width))
    matrices = [torch.randn(rows, width).to(dtype) for _ in layers]
    vector, out = x[0].clone(), torch.empty(rows, dtype=dtype)

    def functional() -> None:
        for layer, state in zip(layers, states, strict=True):
            layer.step(x, state)

    def in_place() -> None:
        for given, state in zip(arguments, states, strict=True):
            torch_ext.mamba_step_(x, *given, state)

    def product() -> None:
        for matrix in matrices:
            torch.mv(matrix, vector, out=out)

    def total() -> None:
        for matrix in matrices:
            matrix.sum()

    calls = {"step": functional, "step_": in_place, "product": product, "sum": total}
    with torch.inference_mode():
        samples = measure(calls, Effort(effort.seconds * 4, effort.rounds, effort.sample_seconds))
    read = min(("product", "sum"), key=lambda way: samples[way].best)
    for key, function in (("step", "Mamba.step"), ("step_", "mamba_step_")):
        summary = samples[key].summary()
        scaled = {k: v / copies if k.startswith("seconds") else v for k, v in summary.items()}
        ratio = samples[key].best / samples[read].best
        goal = MAMBA_STEP_GOAL if batch == 1 and width >= 768 else None
        yield {
            "function": function,
            "width": width,
            "batch": batch,
            "layers_in_turn": copies,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads,
            **scaled,
            "weight_bytes": weight_bytes,
            "read_seconds": samples[read].best / copies,
            "read_by": {"product": "a matrix-vector product", "sum": "a sum"}[read],
            "ratio_to_read": ratio,
            "goal": goal,
            "meets_goal": goal is None or ratio <= goal,
            "error": error,
        }
