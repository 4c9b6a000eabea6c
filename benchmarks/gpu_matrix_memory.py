#!/usr/bin/env python
"""Matrix memories on a GPU: right first, then as a share of what the device can do, and beside peers.

    python benchmarks/gpu_matrix_memory.py              mlstm and ssd: passes, single steps, peers
    python benchmarks/gpu_matrix_memory.py --quick      small and short: only to see that it works
    python benchmarks/gpu_matrix_memory.py --op ssd --shapes 8x2048x80x128x64x1 --peers none

bfloat16, and float32 at each of torch.set_float32_matmul_precision's settings. README.md beside this file says how the
figures are made and how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from gpu import Backend, Bandwidth, CudaBackend, GraphTimer, Products, sets_needed
from mamba_operators import on_device
from matrix_memory_operators import (
    MATRIX_TOLERANCES,
    NAMES,
    MatrixChecker,
    make_inputs,
    step_arguments,
    step_inputs,
)
from measure import Machine, available_cpus
from operators import TOLERANCES, WrongResult
from peers import compare, matrix_operator_comparisons, matrix_step_comparisons, why_not
from report import (
    duration,
    eager,
    missed,
    not_run_line,
    peer_line,
    peers_header,
    percent,
    ratio,
    shape_text,
)
from run import calibrate_gpu, make_timer, new_result, survived
from shapes import (
    GPU_MATRIX_COMPARED,
    GPU_MATRIX_PEERS,
    GPU_MATRIX_PRECISIONS,
    GPU_MATRIX_PUBLISHED,
    GPU_MATRIX_SHAPES,
    GPU_MATRIX_STEP_BATCHES,
    GPU_MATRIX_STEP_GOALS,
    GPU_MATRIX_STEP_PEERS,
    GPU_MATRIX_STEP_SHAPES,
    MATRIX_OPERATORS,
    PASSES,
    QUICK_MATRIX_SHAPE,
    QUICK_MLSTM_SHAPE,
    QUICK_STEP_BATCHES,
    MatrixOperator,
    MatrixShape,
    gpu_matrix_goal,
    parse_matrix_shape,
)

import torch_ext

Call = Callable[[], object]
HERE = Path(__file__).resolve().parent
FUNCTIONS = tuple(GPU_MATRIX_SHAPES)
DTYPES = ("bfloat16", "float32")
# Of float32 by setting: three, two or one bfloat16 to an operand.
PRECISION_TOLERANCES = {
    "highest": MATRIX_TOLERANCES[torch.float32],
    "high": 2e-3,
    "medium": MATRIX_TOLERANCES[torch.bfloat16],
}
PEER_PRECISION = "high"  # what peers' kernels make of float32 operands: TF32
QUICK_PRODUCTS = 64


@contextlib.contextmanager
def precision_of(setting: str | None) -> Iterator[None]:
    """torch's setting for products of float32 matrices, for a while."""
    before = torch.get_float32_matmul_precision()
    try:
        if setting is not None:
            torch.set_float32_matmul_precision(setting)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def settings_of(dtype_name: str) -> tuple[str | None, ...]:
    return tuple(GPU_MATRIX_PRECISIONS) if dtype_name == "float32" else (None,)


def run_with_gradient(
    operator: MatrixOperator,
    function: Callable,
    inputs: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """h, the states and all gradients, those of states that take part among them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, state = function(*leaves, **dict(operator.options))
    states = [x for x in (state if isinstance(state, tuple) else (state,)) if x.requires_grad]
    wanted = (grad, *(x.detach() / 8 for x in states))
    gradients = torch.autograd.grad((h, *states), leaves, wanted)
    named = {f"grad_{name}": g for name, g in zip(NAMES[operator.function], gradients, strict=True)}
    finals = {f"final_state[{index}]": x.detach() for index, x in enumerate(states)}
    return {"y": h.detach(), **finals, **named}


class GpuMatrixChecker(MatrixChecker):
    """As MatrixChecker, for operators with options; `variant` is torch's setting for float32, if any."""

    run = staticmethod(run_with_gradient)
    options = staticmethod(lambda operator: dict(operator.options))

    def check(
        self,
        name: str,
        operator: MatrixOperator,
        shape: MatrixShape,
        dtype: torch.dtype,
        variant: tuple,
    ) -> float:
        (setting,) = variant
        self.tolerances = dict(MATRIX_TOLERANCES)
        if dtype is torch.float32 and setting:
            self.tolerances[dtype] = PRECISION_TOLERANCES[setting]
        with precision_of(setting):
            return super().check(name, operator, shape, dtype, variant)


# -- operators -------------------------------------------------------------------------------------


def backward_arguments(
    operator: MatrixOperator, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple:
    """Those of the operator behind mlstm and ssd, as autograd calls its backward."""
    wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
    if operator.function == "ssd":
        v, dt, A, k, q = inputs
        step = dt.to(wide)
        gates, scale, eps, normalizer = (step * A.to(wide), None, step), 1.0, 0.0, "none"
    else:
        q, k, v, i, f = inputs
        gates = (torch.nn.functional.logsigmoid(f.to(wide)), i.to(wide), None)
        scale, eps, normalizer = q.shape[-1] ** -0.5, 1e-6, "stabilized"
    no_states = (None, None, None)
    kept = torch.empty(0, dtype=wide, device=grad.device)
    return (
        grad, *no_states, q, k, v, *gates, *no_states, kept, None, scale, eps, normalizer,
        True, False, False,
    )  # fmt: skip


def make_call(
    operator: MatrixOperator,
    mode: str,
    inputs: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
) -> Call:
    """The forward as in inference; the backward operator alone, as autograd calls it; or both, with
    autograd and all that belongs to the gates."""
    function = functools.partial(getattr(torch_ext, operator.function), **dict(operator.options))
    if mode == "forward":

        def call() -> object:
            with torch.inference_mode():
                return function(*inputs)

    elif mode == "backward":
        with torch.no_grad():
            arguments = backward_arguments(operator, inputs, grad)

        def call() -> object:
            with torch.inference_mode():
                return torch.ops.torch_ext.matrix_memory_backward(*arguments)

    else:
        leaves = [x.detach().requires_grad_() for x in inputs]

        def call() -> object:
            h, _ = function(*leaves)
            return h.detach(), *torch.autograd.grad(h, leaves, grad)

    return call


def floor_of(
    operator: MatrixOperator,
    mode: str,
    shape: MatrixShape,
    dtype: torch.dtype,
    setting: str | None,
    copy: float,
    rate: float,
) -> dict:
    """The time that no kernel can beat, in seconds: the longer of what the bytes (`copy` in GB/s) and the
    matrix products (`rate` in multiply-adds of bfloat16 per ns) take."""
    B, T, H = shape[:3]
    moved = operator.bytes(mode, shape, dtype.itemsize)
    multiply_adds = B * T * H * operator.products(mode, shape)
    times = GPU_MATRIX_PRECISIONS[setting] if setting else 1
    parts = {
        "bandwidth": moved / (copy * 1e9),
        "products": multiply_adds * times / rate * 1e-9,
    }
    bound_by = max(parts, key=lambda part: parts[part])
    return {
        "floor_seconds": parts[bound_by],
        "bound_by": bound_by,
        "bytes_moved": moved,
        "multiply_adds": multiply_adds,
        "bandwidth_seconds": parts["bandwidth"],
        "products_seconds": parts["products"],
    }


def time_operator(
    name: str,
    operator: MatrixOperator,
    modes: Sequence[str],
    shape_name: str,
    shape: MatrixShape,
    dtype: torch.dtype,
    setting: str | None,
    timer: GraphTimer,
    bandwidth: Bandwidth,
    products: Products,
) -> Iterator[dict]:
    """A row for each pass; all of them in turn with copy, triad and products of large matrices."""
    drawn = make_inputs(operator, shape, dtype)
    working_set = operator.bytes("forward", shape, dtype.itemsize)
    sets = sets_needed(working_set, timer.backend.l2_bytes())
    buffers = [on_device(*drawn, timer.device) for _ in range(sets)]
    calls = {mode: [make_call(operator, mode, *one) for one in buffers] for mode in modes}
    clocks = timer.backend.clocks()
    with precision_of(setting):
        samples = timer.measure(calls | bandwidth.variants() | products.variants())
    rates, rate = bandwidth.rates(samples), products.rate(samples)
    dtype_name = str(dtype).removeprefix("torch.")
    published = GPU_MATRIX_PUBLISHED.get((name, shape_name), {})
    for mode in modes:
        sample = samples[mode]
        floor = floor_of(operator, mode, shape, dtype, setting, rates["copy"], rate)
        goal = gpu_matrix_goal(published, mode) if dtype_name == "bfloat16" else None
        yield {
            "operator": name,
            "mode": mode,
            "shape": list(shape),
            "shape_name": shape_name,
            "dtype": dtype_name,
            "precision": setting,
            "threads": None,
            "isa": "GPU",
            **sample.summary(),
            "sets_of_buffers": sets,
            "calibration_gigabytes_per_second": rates,
            "multiply_adds_per_nanosecond": rate,
            **floor,
            "gigabytes_per_second": floor["bytes_moved"] / sample.best * 1e-9,
            "teraflops": 2e-12 * floor["multiply_adds"] / sample.best,
            "fraction_of_roof": floor["floor_seconds"] / sample.best,
            "published_seconds": published.get(mode),
            "goal_seconds": goal,
            "meets_goal": goal is None or sample.best <= goal,
            "clocks_before": clocks,
            "clocks_after": timer.backend.clocks(),
        }


# -- one token -------------------------------------------------------------------------------------


def step_buffers(
    operator: MatrixOperator, shape: MatrixShape, batch: int, dtype: torch.dtype, device: str
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The arguments of a step before the state, and a state: buffers of their own."""
    inputs, state = step_inputs(operator, shape, batch, dtype)
    copies = tuple(x.to(device, copy=True) for x in inputs)
    return copies, tuple(x.to(device, copy=True) for x in state)


def check_step(
    name: str,
    operator: MatrixOperator,
    inputs: tuple[torch.Tensor, ...],
    state: tuple[torch.Tensor, ...],
) -> float:
    """The first and last rows of a step, either way, against the plain loop over one token in float64.
    The state given is not changed."""
    batch = state[0].shape[0]
    rows = sorted({*range(min(2, batch)), *range(max(0, batch - 2), batch)})

    def exact(x: torch.Tensor) -> torch.Tensor:
        return x[rows].cpu().double()

    def tensors(x: object) -> tuple[torch.Tensor, ...]:
        return x if isinstance(x, tuple) else (x,)

    wide = tuple(map(exact, state))
    given = [exact(x)[:, None] if x.dim() > 1 else x.cpu().double() for x in inputs]
    h, final = getattr(torch_ext, f"{operator.function}_reference")(
        *given, initial_state=wide if len(wide) > 1 else wide[0]
    )
    mine = tuple(x.clone() for x in state)
    with torch.no_grad():
        arguments = step_arguments(operator, inputs, mine)
        got, new = getattr(torch_ext, f"{operator.function}_step")(*arguments)
        in_place = getattr(torch_ext, f"{operator.function}_step_")(*arguments)
    found = [("h", got, h[:, 0]), ("h in place", in_place, h[:, 0])]
    found += [("state", a, b) for a, b in zip(tensors(new), tensors(final), strict=True)]
    found += [("state in place", a, b) for a, b in zip(mine, tensors(final), strict=True)]
    worst = 0.0
    for what, tensor, reference in found:
        error = ((exact(tensor) - reference).abs().max() / reference.abs().max()).item()
        if not error <= TOLERANCES[inputs[0].dtype]:
            raise WrongResult(
                f"{name}: a step's {what} is wrong by {error:.1e} of its largest value"
            )
        worst = max(worst, error)
    return worst


def time_step(
    name: str,
    operator: MatrixOperator,
    shape: MatrixShape,
    batch: int,
    dtype: torch.dtype,
    timer: GraphTimer,
    bandwidth: Bandwidth,
) -> dict:
    """NAME_step_: its arguments are read once, h is written, and the state is read and written."""
    inputs, state = step_buffers(operator, shape, batch, dtype, timer.device)
    error = check_step(name, operator, inputs, state)

    def size(tensors: Sequence[torch.Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    moved = size(inputs) + batch * shape[2] * shape[4] * dtype.itemsize + 2 * size(state)
    sets = sets_needed(moved, timer.backend.l2_bytes())
    buffers = [(inputs, state)]
    buffers += [step_buffers(operator, shape, batch, dtype, timer.device) for _ in range(1, sets)]
    function = getattr(torch_ext, f"{operator.function}_step_")

    def make(inputs: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...]) -> Call:
        arguments = step_arguments(operator, inputs, state)

        def call() -> object:
            with torch.inference_mode():
                return function(*arguments)

        return call

    calls = [make(*one) for one in buffers]
    make_inputs.cache_clear()
    seconds, rates, timed = bandwidth.time(timer, calls, moved)
    dtype_name = str(dtype).removeprefix("torch.")
    goal = None
    if dtype_name == "bfloat16" and shape == parse_matrix_shape(GPU_MATRIX_STEP_SHAPES[name]):
        goal = GPU_MATRIX_STEP_GOALS.get(batch)
    share = moved / (rates["copy"] * 1e9) / seconds
    return {
        "function": f"{operator.function}_step_",
        "operator": name,
        "shape": list(shape[2:]),
        "batch": batch,
        "dtype": dtype_name,
        "threads": None,
        **timed,
        "fraction_of_copy": share,
        "goal": goal,
        "meets_goal": goal is None or share >= goal,
        "error": error,
    }


# -- a run -----------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(dict.fromkeys(p for some in GPU_MATRIX_PEERS.values() for p in some))
    known += [p for p in GPU_MATRIX_STEP_PEERS.values() if p not in known]
    modes = (*PASSES, "step")
    add = parser.add_argument
    add("--op", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS), metavar="OP")
    add("--mode", nargs="*", choices=modes, default=list(modes), metavar="MODE")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    add(
        "--shapes",
        nargs="+",
        default=None,
        metavar="SHAPE",
        help="BxTxHxKxV or BxTxHxKxVxG, where G divides H, for all operators (default: each has its own)",
    )
    add(
        "--peers",
        nargs="+",
        choices=(*known, "none"),
        default=known,
        metavar="PEER",
        help=f"some of {', '.join(known)}; or none",
    )
    add("--seconds", type=float, default=None, help="to spend on each timing (default 0.5)")
    add("--quick", action="store_true", help="small and short: the figures mean nothing")
    add("--out", type=Path, default=HERE / "out", help="folder for the JSON and the tables")
    add("--name", default="gpu-matrix", help="name of both files")
    args = parser.parse_args(argv)
    args.device = "cuda"
    args.peers = [peer for peer in args.peers if peer != "none"]
    if args.shapes:
        args.shapes = list(dict.fromkeys(args.shapes))
        for shape in args.shapes:
            parse_matrix_shape(shape)  # says what is wrong with it
    return args


def shapes_of(args: argparse.Namespace, function: str) -> Sequence[str]:
    if args.shapes:
        return args.shapes
    return (QUICK_MATRIX_SHAPE,) if args.quick else GPU_MATRIX_SHAPES[function]


def limits_of(args: argparse.Namespace, settings: dict, result: dict) -> tuple[Bandwidth, Products]:
    """Calibrated once in a run."""
    bandwidth, _ = calibrate_gpu(args, settings, result)
    if "products" not in settings:
        products = Products(settings["backend"].device, *((QUICK_PRODUCTS,) if args.quick else ()))
        sample = make_timer(args, settings).measure(products.variants())
        rate = products.rate(sample)
        result["calibration"]["multiply_adds_per_ns"] = rate
        print(f"products of bfloat16 matrices: {2e-3 * rate:.1f} TFLOP/s")
        settings["products"] = products
    return bandwidth, settings["products"]


def time_operators(args: argparse.Namespace, settings: dict, result: dict) -> None:
    modes = [mode for mode in args.mode if mode in PASSES]
    if not modes:
        return
    bandwidth, products = limits_of(args, settings, result)
    timer = make_timer(args, settings)
    checker = settings.setdefault("checker", GpuMatrixChecker(timer.device))  # for peers as well
    print("\n" + header())
    for dtype_name, name in itertools.product(args.dtype, args.op):
        operator, dtype = MATRIX_OPERATORS[name], getattr(torch, dtype_name)
        for shape_name in shapes_of(args, name):
            shape = parse_matrix_shape(shape_name)
            for setting in settings_of(dtype_name):
                with survived(result, f"{name} {shape_name} {said_dtype(dtype_name, setting)}"):
                    error = checker.check(name, operator, shape, dtype, (setting,))
                    for row in time_operator(
                        name, operator, modes, shape_name, shape, dtype, setting, timer, bandwidth,
                        products,
                    ):  # fmt: skip
                        result["matrix"].append(row | {"error": error})
                        print(operator_line(result["matrix"][-1]), flush=True)
            make_inputs.cache_clear()  # what the next one draws is as large
            checker.references.clear()


def step_cases(args: argparse.Namespace, name: str) -> Iterator[tuple[MatrixShape, int, str]]:
    given = (args.shapes or [QUICK_MATRIX_SHAPE if args.quick else GPU_MATRIX_STEP_SHAPES[name]])[0]
    batches = QUICK_STEP_BATCHES if args.quick else GPU_MATRIX_STEP_BATCHES
    shape = (1, 1, *parse_matrix_shape(given)[2:])
    for dtype_name, batch in itertools.product(args.dtype, batches):
        yield shape, batch, dtype_name


def time_steps(args: argparse.Namespace, settings: dict, result: dict) -> None:
    bandwidth, _ = limits_of(args, settings, result)
    timer = make_timer(args, settings)
    print("\nOne token through a matrix memory, in place")
    for name in args.op:
        for shape, batch, dtype_name in step_cases(args, name):
            dtype = getattr(torch, dtype_name)
            with survived(result, f"{name}_step_ {dtype_name}, B = {batch}"):
                operator = MATRIX_OPERATORS[name]
                row = time_step(name, operator, shape, batch, dtype, timer, bandwidth)
                result["matrix_steps"].append(row)
                print(step_line(row), flush=True)


def time_peers(args: argparse.Namespace, settings: dict, result: dict) -> None:
    """Each peer that is here, in turn with ours; the others are written down with the reason."""
    device, l2_bytes = settings["backend"].device, settings["backend"].l2_bytes()
    names = []
    print("\n" + peers_header(None))
    for peer in args.peers:
        if reason := why_not(peer, args.device):
            result["not_run"].append({"peer": peer, "what": "all", "reason": reason})
            print(not_run_line(result["not_run"][-1]), flush=True)
        else:
            names.append(peer)

    def run(comparisons: Iterator, timer: GraphTimer, **more: object) -> None:
        for comparison in comparisons:
            for kind, row in compare(comparison, timer, None):
                result[kind].append(row | more)
                if kind == "peers":
                    print(peer_line(row), flush=True)
                elif kind == "not_run":
                    print(not_run_line(row), flush=True)
                elif kind == "wrong":
                    print(f"NOT TIMED, {row['what']}", flush=True)

    checker = settings.setdefault("checker", GpuMatrixChecker(device))
    passes = any(mode in PASSES for mode in args.mode)
    cases = itertools.product(args.dtype, GPU_MATRIX_COMPARED.items())
    for dtype_name, (name, operator) in cases:
        chosen = [peer for peer in GPU_MATRIX_PEERS[name] if peer in names]
        if not chosen or operator.function not in args.op or not passes:
            continue
        shapes = shapes_of(args, operator.function)
        if args.quick and not args.shapes and operator.function == "mlstm":
            shapes = (QUICK_MLSTM_SHAPE,)  # a multiple of their chunks
        dtype, setting = getattr(torch, dtype_name), None
        if dtype_name == "float32":
            setting = PEER_PRECISION
        for shape_name in shapes:
            shape = parse_matrix_shape(shape_name)
            sets = sets_needed(operator.bytes("forward", shape, dtype.itemsize), l2_bytes)
            what = f"{name} beside peers, {shape_name} {said_dtype(dtype_name, setting)}"
            with survived(result, what), precision_of(setting):
                comparisons = matrix_operator_comparisons(
                    chosen, name, operator, shape, dtype, checker, (setting,), sets
                )
                timer = make_timer(args, settings, sets)
                run(comparisons, timer, shape_name=shape_name, precision=setting)
            make_inputs.cache_clear()
            checker.references.clear()
    for name in args.op if "step" in args.mode else ():
        if (peer := GPU_MATRIX_STEP_PEERS[name]) not in names:
            continue
        operator = MATRIX_OPERATORS[name]
        for shape, batch, dtype_name in step_cases(args, name):
            dtype = getattr(torch, dtype_name)
            with survived(result, f"{name}_step_ beside {peer}, {dtype_name}, B = {batch}"):
                buffers = [step_buffers(operator, shape, batch, dtype, device)]
                check_step(name, operator, *buffers[0])
                state_bytes = 2 * sum(x.numel() * x.element_size() for x in buffers[0][1])
                sets = sets_needed(state_bytes, l2_bytes)
                buffers += [
                    step_buffers(operator, shape, batch, dtype, device) for _ in range(1, sets)
                ]
                comparisons = matrix_step_comparisons(peer, operator, shape, batch, dtype, buffers)
                run(comparisons, make_timer(args, settings, sets))
            make_inputs.cache_clear()


def run_all(args: argparse.Namespace, settings: dict, result: dict) -> None:
    time_operators(args, settings, result)
    if "step" in args.mode:
        time_steps(args, settings, result)
    if args.peers:
        time_peers(args, settings, result)


# -- what it says ----------------------------------------------------------------------------------


def said_dtype(dtype_name: str, setting: str | None) -> str:
    return f"{dtype_name}, {setting}" if setting else dtype_name


BOUNDS = {"bandwidth": "memory", "products": "matrix products"}


def said_goal(row: dict) -> str:
    return "" if row["meets_goal"] else f", above the goal of {duration(row['goal_seconds'])}"


def header() -> str:
    return (
        f"{'matrix memory':<9} {'pass':<16} {'B x T x H x K x V (x G)':<21} {'dtype':<17} {'best':>9} "
        f"{'median':>7} {'GB/s':>7} {'TFLOP/s':>7} {'floor':>9} {'/floor':>7}  bound"
    )


def operator_line(row: dict) -> str:
    return (
        f"{row['operator']:<13} {row['mode']:<16} {row['shape_name']:<21} "
        f"{said_dtype(row['dtype'], row['precision']):<17} {duration(row['seconds_min']):>9} "
        f"{'+' + percent(row['seconds_median'] / row['seconds_min'] - 1):>7} "
        f"{row['gigabytes_per_second']:>7.1f} {row['teraflops']:>7.1f} "
        f"{duration(row['floor_seconds']):>9} {percent(row['fraction_of_roof']):>7}  "
        f"{BOUNDS[row['bound_by']]}{said_goal(row)}{eager(row)}"
    )


def step_line(row: dict) -> str:
    return (
        f"{row['function']:<13} {shape_text(row['shape']):<18} B = {row['batch']:<5} {row['dtype']:<9} "
        f"{duration(row['seconds_min']):>9} {row['gigabytes_per_second']:>7.1f} GB/s, "
        f"{percent(row['fraction_of_copy'])} of copy{missed(row)}{eager(row)}"
    )


def markdown(result: dict) -> str:
    parts = [f"Matrix memories on {result['machine'].get('gpu', 'a device that is not known')}.\n"]
    if result["matrix"]:
        parts += [
            "Share of the floor, which is the longer of what the bytes take at copy bandwidth and the products at the "
            "rate of large matrices; *backward* is the backward operator alone, *forward+backward* what autograd "
            "does. Published: TFLA's authors on an H100, for whose times the goal is a part of them:\n",
            "| operator | pass | B x T x H x K x V (x G) | dtype | called from Python | time | TFLOP/s | share of the "
            "floor | floor, by | published |",
            "|" + "---|" * 10,
        ]
    for row in result["matrix"]:
        published = row["published_seconds"]
        cells = (
            f"`{row['operator']}`",
            row["mode"],
            row["shape_name"].replace("x", " x "),
            said_dtype(row["dtype"], row["precision"]),
            duration(row["eager_seconds"]),
            duration(row["seconds_min"]),
            f"{row['teraflops']:.1f}",
            f"**{percent(row['fraction_of_roof'])}**{said_goal(row)}",
            f"{duration(row['floor_seconds'])}, {BOUNDS[row['bound_by']]}",
            f"{duration(published)}, {ratio(published / row['seconds_min'])}" if published else "",
        )
        parts.append("| " + " | ".join(cells) + " |")
    if result["matrix_steps"]:
        parts += [
            "\nOne token in place: time, and share of copy bandwidth for the states, read and written, and tokens:\n",
            "| function | H x K x V x G | dtype | B | called from Python | time | GB/s | share of copy |",
            "|" + "---|" * 8,
        ]
    for row in result["matrix_steps"]:
        cells = (
            f"`{row['function']}`",
            shape_text(row["shape"]),
            row["dtype"],
            str(row["batch"]),
            duration(row["eager_seconds"]),
            duration(row["seconds_min"]),
            f"{row['gigabytes_per_second']:.1f}",
            f"**{percent(row['fraction_of_copy'])}**{missed(row)}",
        )
        parts.append("| " + " | ".join(cells) + " |")
    if result["peers"]:
        parts += [
            "\nBeside peers, in turn: how many times faster ours is (range over the rounds):\n",
            "| what | shape | dtype | peer | ours | theirs | ratio |",
            "|" + "---|" * 7,
        ]
    for row in result["peers"]:
        cells = (
            row["what"],
            shape_text(row["shape"]),
            said_dtype(row["dtype"], row.get("precision")),
            f"{row['peer']}, {row['note']}",
            duration(row["ours"]["seconds_min"]),
            duration(row["theirs"]["seconds_min"]),
            f"**{ratio(row['ratio'])}** ({ratio(row['ratio_min'])} to {ratio(row['ratio_max'])})",
        )
        parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def save(args: argparse.Namespace, result: dict) -> list[Path]:
    args.out.mkdir(parents=True, exist_ok=True)
    files = [args.out / f"{args.name}.json", args.out / f"{args.name}.md"]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    files[1].write_text(markdown(result))
    return files


def make_settings(args: argparse.Namespace, backend: Backend) -> dict:
    seconds = args.seconds or (0.05 if args.quick else 0.5)
    return {"backend": backend, "seconds": seconds, "quick": args.quick, "device": "cuda"}


def main(argv: list[str] | None = None, backend: Backend | None = None) -> int:
    args = parse(argv)
    if backend is None:
        if not torch.cuda.is_available():
            sys.exit("gpu_matrix_memory.py: torch.cuda.is_available() is False here")
        backend = CudaBackend()
    started = time.monotonic()
    machine, settings, result = (
        Machine(available_cpus()),
        make_settings(args, backend),
        new_result(),
    )
    result["settings"] = {key: x for key, x in settings.items() if key != "backend"}
    complete = False
    try:
        run_all(args, settings, result)
        complete = True
    finally:  # what was measured before the time was up is kept
        result["machine"] = machine.describe() | backend.describe()
        result["settings"]["minutes"] = round((time.monotonic() - started) / 60, 1)
        result["settings"]["complete"] = complete
        written = save(args, result)
    goals = [row["meets_goal"] for row in result["matrix"] if row["goal_seconds"]]
    goals += [row["meets_goal"] for row in result["matrix_steps"] if row["goal"]]
    print(
        f"\n{sum(goals)} of {len(goals)} goals are reached; {result['settings']['minutes']} minutes."
    )
    print("Written: " + ", ".join(os.path.relpath(path) for path in written))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
