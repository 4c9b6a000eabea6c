"""Matrix memories: right first, then as a share of what the machine can do."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from mamba_operators import Call, Limits, MambaChecker, dtype_of
from measure import Calibration, Effort, measure
from operators import TOLERANCES, WrongResult
from shapes import (
    GGML_FMA,
    GGML_GOAL,
    GGML_SSD,
    MATRIX_GOALS,
    MATRIX_SHAPES,
    MatrixOperator,
    MatrixShape,
)

import torch_ext

# Odd, beyond two chunks, two heads to a group.
REDUCED_SHAPE = (2, 131, 4, 19, 21, 2)
# A divisor may be close to 0, and the gradients of gates and decays are sums over all of time.
MATRIX_TOLERANCES = TOLERANCES | {torch.float64: 1e-10, torch.float32: 5e-4, torch.bfloat16: 6e-2}
NAMES = {
    "mlstm": ("q", "k", "v", "i", "f"),
    "ssd": ("x", "dt", "A", "B", "C"),
    "retention": ("q", "k", "v", "decay"),
    "linear_attention": ("q", "k", "v"),
}


@functools.lru_cache(maxsize=8)
def make_inputs(
    operator: MatrixOperator, shape: MatrixShape, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The operator's tensors in the order of its arguments, and a gradient of h."""
    B, T, H, K, V, G = shape
    generator = torch.Generator().manual_seed(0)
    dtype = dtype_of(operator, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    q, k, v, grad = draw(B, T, G, K), draw(B, T, G, K), draw(B, T, H, V), draw(B, T, H, V)
    if operator.function == "ssd":  # step sizes and rates of decay of a new layer
        low, high = math.log(1e-3), math.log(0.1)
        dt = (low + (high - low) * torch.rand((B, T, H), generator=generator)).exp()
        A = -torch.linspace(1, 16, H)
        return (v.to(dtype), dt.to(dtype), A.to(wide), k.to(dtype), q.to(dtype)), grad.to(dtype)
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype)]
    if operator.function == "mlstm":  # a new layer's forget gates remember 20 to 400 steps
        gates = draw(B, T, H), draw(B, T, H) + torch.linspace(3, 6, H)
        inputs += [gate.to(dtype) for gate in gates]
    elif operator.function == "retention":
        inputs += [(1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).to(wide)]
    return tuple(inputs), grad.to(dtype)


def run_with_gradient(
    operator: MatrixOperator,
    function: Callable,
    inputs: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
) -> dict[str, torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, state = function(*leaves)
    state = state if isinstance(state, tuple) else (state,)
    wanted = (grad, *(x.detach() / 8 for x in state))
    gradients = torch.autograd.grad((h, *state), leaves, wanted)
    names = NAMES[operator.function]
    named = {f"grad_{name}": g for name, g in zip(names, gradients, strict=True)}
    states = {f"final_state[{index}]": x.detach() for index, x in enumerate(state)}
    return {"y": h.detach(), **states, **named}


class MatrixChecker(MambaChecker):
    """As MambaChecker. Columns of the values do not meet: the loop is run for a few of them, in the
    first and in the last group of heads."""

    ENDS = 2  # columns at either end
    reduced = REDUCED_SHAPE
    tolerances = MATRIX_TOLERANCES
    draw = staticmethod(make_inputs)
    run = staticmethod(run_with_gradient)
    options = staticmethod(lambda operator: {})

    def some(
        self,
        operator: MatrixOperator,
        shape: MatrixShape,
        inputs: tuple[torch.Tensor, ...],
        y: torch.Tensor,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        _, _, H, K, V, G = shape
        columns = sorted({*range(min(self.ENDS, V)), *range(max(0, V - self.ENDS), V)})
        groups = sorted({0, G - 1})
        heads = [g * (H // G) + h for g in groups for h in sorted({0, H // G - 1})]
        by_group = ("B", "C") if operator.function == "ssd" else ("q", "k")
        few = []
        for name, x in zip(NAMES[operator.function], inputs, strict=True):
            if name in by_group:
                few.append(x[:, :, groups])
            elif name in ("v", "x"):
                few.append(x[:, :, heads][..., columns])
            else:  # (B, T, H), or (H,)
                few.append(x[..., heads])
        return few, y[:, :, heads][..., columns]


def make_call(operator: MatrixOperator, mode: str, shape: MatrixShape, dtype: torch.dtype) -> Call:
    """The forward as in inference, or all of what autograd does after a forward with gradients."""
    inputs, grad = make_inputs(operator, shape, dtype)
    function = getattr(torch_ext, operator.function)
    if mode == "forward":

        def call() -> object:
            with torch.inference_mode():
                return function(*inputs)

        return call
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, _ = function(*leaves)
    return lambda: torch.autograd.grad(h, leaves, grad, retain_graph=True)


def beside_ggml(row: dict) -> dict | None:
    """How many times faster than ggml: its time elsewhere, scaled by what a multiply-add takes on
    one core here and took there."""
    theirs = GGML_SSD.get((row["shape_name"], row["threads"]))
    if row["operator"] != "ssd" or row["mode"] != "forward" or theirs is None:
        return None
    if row["isa"] != "avx512" or row["dtype"] != "float32":
        return None
    here = theirs * row["threads"] / row["fma_per_nanosecond"] / GGML_FMA
    ratio = here / row["nanoseconds_per_element"]
    return {
        "nanoseconds_elsewhere": theirs,
        "nanoseconds_scaled": here,
        "ratio": ratio,
        "goal": GGML_GOAL,
        "meets_goal": ratio >= GGML_GOAL,
    }


def time_operators(
    operators: dict[str, MatrixOperator],
    modes: tuple[str, ...],
    shape_name: str,
    shape: MatrixShape,
    dtype: torch.dtype,
    threads: int,
    isa: str,
    effort: Effort,
    calibration_seconds: float,
) -> Iterator[dict]:
    """A row for each operator and pass; all of them take turns, so their ratios are of one time."""
    calls: dict[tuple[str, str], Call] = {}
    moved: dict[tuple[str, str], int] = {}
    for (name, operator), mode in itertools.product(operators.items(), modes):
        moved[name, mode] = operator.bytes(mode, shape, dtype_of(operator, dtype).itemsize)
        calls[name, mode] = make_call(operator, mode, shape, dtype)
    if not calls:
        return
    # The bytes take a small part of the time: one working set stands for all of them.
    working_set = max(moved.values())
    limits = Limits({working_set}, threads, calibration_seconds, exps=False)
    bandwidth = limits.bandwidths[working_set]
    each = Effort(effort.seconds * len(calls), effort.rounds, effort.sample_seconds)
    samples = measure(calls, each, around=limits.run)

    B, T, H, K, V, _ = shape
    elements = B * T * H * K * V
    for (name, mode), sample in samples.items():
        operator = operators[name]
        operations = B * T * H * operator.operations(mode, shape)
        by_bytes = moved[name, mode] / (bandwidth.best("triad") * 1e9)
        by_arithmetic = operations * 1e-9 / limits.fma
        roof = max(by_bytes, by_arithmetic)
        listed = shape_name in MATRIX_SHAPES[operator.function]
        goal = MATRIX_GOALS[mode] if listed else None
        row = {
            "operator": name,
            "mode": mode,
            "shape": list(shape),
            "shape_name": shape_name,
            "dtype": str(dtype_of(operator, dtype)).removeprefix("torch."),
            "threads": threads,
            "isa": isa,
            **sample.summary(),
            "nanoseconds_per_element": sample.best * 1e9 / elements,
            "operations": operations,
            "bytes_moved": moved[name, mode],
            "working_set_bytes": working_set,
            "gigabytes_per_second": moved[name, mode] / sample.best * 1e-9,
            "calibration_gigabytes_per_second": dict(bandwidth.rates),
            "fma_per_nanosecond": limits.fma,
            "bandwidth_seconds": by_bytes,
            "arithmetic_seconds": by_arithmetic,
            "bound_by": "bandwidth" if by_bytes >= by_arithmetic else "arithmetic",
            "fraction_of_roof": roof / sample.best,
            "goal": goal,
            "goal_of": "roof",
            "meets_goal": goal is None or roof / sample.best >= goal,
        }
        beside = None
        if operator.beside is not None and (operator.beside, mode) in samples:
            beside, at_most = (operator.beside, mode), operator.at_most
        elif mode == "backward" and (name, "forward") in samples:
            beside, at_most = (name, "forward"), None
        if beside is not None:
            ratio = sample.best / samples[beside].best
            row["beside"] = {
                "what": " ".join(beside),
                "ratio": ratio,
                "at_most": at_most if listed else None,
                "meets_goal": at_most is None or not listed or ratio <= at_most,
            }
        if ggml := beside_ggml(row):
            row["ggml"] = ggml
        yield row


# -- one token -------------------------------------------------------------------------------------


def step_inputs(
    operator: MatrixOperator, shape: MatrixShape, batch: int, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The arguments of the operator's step before the state, and the tensors of a state."""
    _, _, H, K, V, G = shape
    inputs, _ = make_inputs(operator, (batch, 1, H, K, V, G), dtype)
    first = tuple(x[:, 0].contiguous() if x.dim() > 1 else x for x in inputs)
    generator = torch.Generator().manual_seed(1)
    size = (batch, H, V, K) if operator.function == "ssd" else (batch, H, K, V)
    state = [torch.randn(size, generator=generator)]
    if operator.function in (
        "mlstm",
        "linear_attention",
    ):  # sums of keys; those of features are > 0
        state.append(torch.randn(size[:3], generator=generator).abs())
    if operator.function == "mlstm":
        state.append(torch.randn(size[:2], generator=generator))
    wide = torch.float64 if dtype_of(operator, dtype) is torch.float64 else torch.float32
    return first, tuple(x.to(wide) for x in state)


def step_arguments(
    operator: MatrixOperator, inputs: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...]
) -> tuple:
    given = state if len(state) > 1 else state[0]
    if operator.function == "ssd":
        return (*inputs, None, None, None, given)
    return (*inputs, given)


def check_step(
    name: str, operator: MatrixOperator, shape: MatrixShape, batch: int, dtype: torch.dtype
) -> float:
    """One step, either way, against the plain loop over one token in float64."""
    inputs, state = step_inputs(operator, shape, batch, dtype)
    state = tuple(x.clone() for x in state)
    exact = [(x[:, None] if x.dim() > 1 else x).double() for x in inputs]
    wide = tuple(x.double() for x in state)
    h, final = getattr(torch_ext, f"{operator.function}_reference")(
        *exact, initial_state=wide if len(wide) > 1 else wide[0]
    )
    with torch.no_grad():
        arguments = step_arguments(operator, inputs, state)
        got, new = getattr(torch_ext, f"{operator.function}_step")(*arguments)
        in_place = getattr(torch_ext, f"{operator.function}_step_")(*arguments)
    final = final if isinstance(final, tuple) else (final,)
    new = new if isinstance(new, tuple) else (new,)
    found = [("h", got, h[:, 0]), ("h in place", in_place, h[:, 0])]
    found += [("state", a, b) for a, b in zip(new, final, strict=True)]
    found += [("state in place", a, b) for a, b in zip(state, final, strict=True)]
    worst = 0.0
    for what, tensor, reference in found:
        error = ((tensor.double() - reference).abs().max() / reference.abs().max()).item()
        if not error <= TOLERANCES[dtype_of(operator, dtype)]:
            raise WrongResult(
                f"{name}: a step's {what} is wrong by {error:.1e} of its largest value"
            )
        worst = max(worst, error)
    return worst


def time_step(
    name: str,
    operator: MatrixOperator,
    shape_name: str,
    shape: MatrixShape,
    batch: int,
    dtype: torch.dtype,
    threads: int,
    effort: Effort,
    calibration_seconds: float,
) -> dict:
    """One token in place, beside a copy of as many bytes as the state has, read and written."""
    error = check_step(name, operator, shape, batch, dtype)
    inputs, state = step_inputs(operator, shape, batch, dtype)
    arguments = step_arguments(operator, inputs, state)
    function = getattr(torch_ext, f"{operator.function}_step_")
    state_bytes = sum(x.numel() * x.element_size() for x in state)

    def call() -> object:
        with torch.inference_mode():
            return function(*arguments)

    bandwidth = Calibration(2 * state_bytes, threads, calibration_seconds)
    sample = measure({"step": call}, effort, around=bandwidth.run)["step"]
    copy_seconds = 2 * state_bytes / (bandwidth.best("copy") * 1e9)
    return {
        "operator": name,
        "function": f"{operator.function}_step_",
        "shape": list(shape),
        "shape_name": shape_name,
        "batch": batch,
        "dtype": str(dtype_of(operator, dtype)).removeprefix("torch."),
        "threads": threads,
        **sample.summary(),
        "state_bytes": state_bytes,
        "gigabytes_per_second": 2 * state_bytes / sample.best * 1e-9,
        "copy_seconds": copy_seconds,
        "fraction_of_copy": copy_seconds / sample.best,
        "error": error,
    }
