"""Mamba's operators and steps on a GPU: right first, then as a share of what the device can do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu import Backend, Bandwidth, GraphTimer, sets_needed
from mamba_operators import (
    check_layer_steps,
    check_step,
    dtype_of,
    make_call,
    make_inputs,
    make_step,
    step_inputs,
    weights_of,
)
from operators import TOLERANCES
from shapes import (
    GPU_MAMBA_GOALS,
    GPU_MAMBA_SHAPES,
    GPU_MAMBA_STEP_GOALS,
    MAMBA_STATES,
    POLYNOMIAL,
    GpuWork,
    MambaOperator,
)
from torch.nn import functional as F

import torch_ext


@dataclass(frozen=True)
class Rates:
    """Results of special functions, and instructions of single threads, per nanosecond."""

    special: float
    issue: float


def best_rates(backend: Backend, arithmetic: dict) -> Rates:
    """What the device promises at its highest clock, or what chains of exponentials and of
    multiply-adds have shown here, if that is more: no kernel can do better than both."""
    peak = backend.arithmetic_peak()
    return Rates(
        max(peak["special_per_ns"], arithmetic.get("exp_per_ns") or 0.0),
        max(peak["issue_per_ns"], arithmetic.get("fma_per_ns") or 0.0),
    )


def floor_of(elements: int, work: GpuWork, bytes_moved: int, rates: Rates, copy: float) -> dict:
    """The time that no kernel can beat, in seconds: the largest of what memory (`copy` in GB/s),
    special functions and issue of instructions take.

    Where special functions take longest, some exponentials are counted as polynomials, as many as
    let them and the instructions take equally long.
    """
    special, issue = work.special / rates.special, work.issue / rates.issue
    moved = (special - issue) / (1 / rates.special + POLYNOMIAL / rates.issue)
    moved = min(max(moved, 0.0), work.movable)
    seconds = elements * 1e-9
    parts = {
        "bandwidth": bytes_moved / (copy * 1e9),
        "special": seconds * (work.special - moved) / rates.special,
        "issue": seconds * (work.issue + POLYNOMIAL * moved) / rates.issue,
    }
    bound_by = max(parts, key=lambda part: parts[part])
    return {
        "floor_seconds": parts[bound_by],
        "bound_by": bound_by,
        "bandwidth_seconds": parts["bandwidth"],
        "special_seconds": seconds * special,  # with every exponential there
        "issue_seconds": seconds * issue,
        "arithmetic_seconds": max(parts["special"], parts["issue"]),
        "exponentials_as_polynomials": moved,
    }


def time_operator(
    name: str,
    operator: MambaOperator,
    mode: str,
    shape_name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    timer: GraphTimer,
    bandwidth: Bandwidth,
    rates: Rates,
) -> dict:
    """One row, with copy and triad timed in turn with the operator."""
    at = dtype_of(operator, dtype)
    elements, convolution = math.prod(shape), operator.function == "causal_conv1d"
    moved = elements * operator.work(mode).bytes(at.itemsize)
    working_set = elements * at.itemsize * operator.tensors_alive(mode)
    sets = sets_needed(working_set, timer.backend.l2_bytes())
    calls = [make_call(operator, mode, shape, dtype, timer.device) for _ in range(sets)]
    seconds, found, timed = bandwidth.time(timer, calls, moved)
    work = operator.gpu_work(mode, at.itemsize)
    floor = floor_of(elements, work, moved, rates, found["copy"])
    fraction_of_copy = floor["bandwidth_seconds"] / seconds
    fraction_of_roof = floor["floor_seconds"] / seconds
    goal = goal_of(name, mode, shape_name, str(at).removeprefix("torch."))
    share = fraction_of_copy if convolution else fraction_of_roof
    return {
        "operator": name,
        "mode": mode,
        "shape": list(shape),
        "shape_name": shape_name,
        "dtype": str(at).removeprefix("torch."),
        "threads": None,
        "isa": "GPU",
        **timed,
        "nanoseconds_per_element": seconds
        * 1e9
        / (elements * (1 if convolution else MAMBA_STATES)),
        "working_set_bytes": working_set,
        "special_per_nanosecond": rates.special,
        "instructions_per_nanosecond": rates.issue,
        **floor,
        "fraction_of_copy": fraction_of_copy,
        "fraction_of_roof": fraction_of_roof,
        "goal": goal,
        "goal_of": "copy" if convolution else "roof",
        "meets_goal": goal is None or share >= goal,
    }


def goal_of(name: str, mode: str, shape_name: str, dtype: str) -> float | None:
    function = name.partition("[")[0]
    if dtype != "bfloat16" or shape_name not in GPU_MAMBA_SHAPES[function]:
        return None
    return GPU_MAMBA_GOALS.get((name, mode))


# -- one token -------------------------------------------------------------------------------------


def _size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _step_row(
    function: str, width: int, batch: int, dtype: torch.dtype, moved: int, sets: int, sample, rates
) -> dict:
    share = moved / (rates["copy"] * 1e9) / sample.best
    name = str(dtype).removeprefix("torch.")
    goal = GPU_MAMBA_STEP_GOALS.get((function, batch)) if name == "bfloat16" else None
    return {
        "function": function,
        "width": width,
        "batch": batch,
        "dtype": name,
        "threads": None,
        **sample.summary(),
        "bytes_moved": moved,
        "sets_of_buffers": sets,
        "gigabytes_per_second": moved / sample.best * 1e-9,
        "calibration_gigabytes_per_second": rates,
        "fraction_of_copy": share,
        "goal": goal,
        "meets_goal": goal is None or share >= goal,
    }


def time_operator_step(
    name: str,
    operator: MambaOperator,
    batch: int,
    dim: int,
    dtype: torch.dtype,
    timer: GraphTimer,
    bandwidth: Bandwidth,
) -> Iterator[dict]:
    """NAME_step_: its arguments are read once, y is written, and the state is read and written."""
    error = check_step(name, operator, batch, dim, dtype, timer.device)
    inputs, state = step_inputs(operator, batch, dim, dtype, timer.device)
    moved = _size(inputs) + batch * dim * dtype.itemsize + 2 * _size([state])
    sets = sets_needed(moved, timer.backend.l2_bytes())
    buffers = [(inputs, state)]
    buffers += [step_inputs(operator, batch, dim, dtype, timer.device) for _ in range(1, sets)]
    calls = [make_step(operator, *one) for one in buffers]
    make_inputs.cache_clear()
    samples = timer.measure({"call": calls, **bandwidth.variants()})
    rates, function = bandwidth.rates(samples), f"{operator.function}_step_"
    row = _step_row(function, dim, batch, dtype, moved, sets, samples["call"], rates)
    yield row | {"error": error}


def time_layer_step(
    width: int, batch: int, dtype: torch.dtype, timer: GraphTimer, bandwidth: Bandwidth
) -> Iterator[dict]:
    """Mamba.step and mamba_step_: the weights and x are read once, y is written, states both. The
    layer's four products alone are timed with them."""
    torch.manual_seed(0)

    def make() -> torch_ext.Mamba:
        return torch_ext.Mamba(width, device=timer.device, dtype=dtype).requires_grad_(False)

    layers = [make()]
    with torch.inference_mode():
        error = check_layer_steps(layers[0], TOLERANCES[dtype])

    def draw_states() -> tuple[torch.Tensor, torch.Tensor]:
        conv, scan = layers[0].init_state(batch)
        return torch.randn_like(conv), torch.randn_like(scan)

    states = [draw_states()]
    x = torch.randn(batch, width, device=timer.device).to(dtype)
    moved = _size(layers[0].parameters()) + 2 * _size(states[0]) + 2 * _size([x])
    sets = sets_needed(moved, timer.backend.l2_bytes())
    layers += [make() for _ in range(1, sets)]
    states += [draw_states() for _ in range(1, sets)]
    inner = torch.randn(batch, layers[0].d_inner, device=timer.device).to(dtype)
    rank = torch.randn(batch, layers[0].dt_rank, device=timer.device).to(dtype)

    def functional(index: int) -> object:
        with torch.inference_mode():
            return layers[index].step(x, states[index])

    def in_place(index: int) -> object:
        with torch.inference_mode():
            return torch_ext.mamba_step_(x, *weights_of(layers[index]), states[index])

    def products(index: int) -> object:
        layer = layers[index]
        with torch.inference_mode():
            return [
                F.linear(given, linear.weight)
                for given, linear in (
                    (x, layer.in_proj), (inner, layer.x_proj), (rank, layer.dt_proj),
                    (inner, layer.out_proj),
                )
            ]  # fmt: skip

    works = {"Mamba.step": functional, "mamba_step_": in_place, "products": products}
    calls = {
        key: [lambda index=index, work=work: work(index) for index in range(sets)]
        for key, work in works.items()
    }
    samples = timer.measure(calls | bandwidth.variants())
    rates = bandwidth.rates(samples)
    for function in ("Mamba.step", "mamba_step_"):
        row = _step_row(function, width, batch, dtype, moved, sets, samples[function], rates)
        yield row | {"error": error, "products_seconds": samples["products"].best}
