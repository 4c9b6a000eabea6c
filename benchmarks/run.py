#!/usr/bin/env python
"""Times the fused operators against the machine's own limits and against peers.

    python benchmarks/run.py                 everything, about 20 minutes on two cores
    python benchmarks/run.py --op mamba      Mamba's operators, layer and language models alone
    python benchmarks/run.py --op matrix     the same of the matrix memories: mLSTM, SSD and others
    python benchmarks/run.py --device cuda   on a GPU: operators, steps, layers, peers
    python benchmarks/run.py --quick         small shapes, seconds: only to see that it works
    python benchmarks/run.py --op min_gru --shapes 8x2048x1024 --threads 1 --peers none

README.md beside this file says how the figures are made and how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from peers import PEERS
    from shapes import (
        DEFAULT_DTYPES,
        DEFAULT_MODES,
        GPU_MAMBA_OPERATORS,
        GPU_SHAPES,
        GROUPS,
        MAMBA_OPERATORS,
        MATRIX_OPERATORS,
        MODES,
        OPERATORS,
        SHAPES,
        is_matrix_shape,
    )

    known = (*OPERATORS, *MAMBA_OPERATORS, *MATRIX_OPERATORS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--op",
        nargs="+",
        choices=(*known, *GROUPS),
        default=None,
        metavar="OP",
        help=f"some of {', '.join(known)}; or {', '.join(GROUPS)} for all of a kind, its layers and "
        "models too",
    )
    add("--mode", nargs="+", choices=MODES, default=None, metavar="MODE", help=" ".join(MODES))
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", nargs="+", choices=DTYPES, default=None, metavar="DTYPE")
    add(
        "--shapes",
        nargs="*",
        default=None,
        metavar="SHAPE",
        help=f"names of the table ({', '.join(SHAPES | GPU_SHAPES)}) or BxTxD, "
        "for matrix memories BxTxHxKxV or BxTxHxKxVxG; none: no operator is timed",
    )
    add("--threads", nargs="+", type=int, default=None, metavar="N", help="default: 1 2")
    add("--isa", nargs="+", default=None, metavar="ISA", help="default: avx512 avx2, as supported")
    add(
        "--peers",
        nargs="*",
        choices=(*PEERS, "none"),
        default=list(PEERS),
        metavar="PEER",
        help=f"some of {', '.join(PEERS)}; or none",
    )
    add("--peer-shapes", nargs="*", default=None, metavar="BxTxD")
    add("--paper-width", type=int, default=64, help="input and hidden size of the paper's table")
    add("--seconds", type=float, default=None, help="to spend on each timing (default 0.5)")
    add("--quick", action="store_true", help="small and short: the figures mean nothing")
    add("--allocator", choices=("keep", "default"), default="keep", help="see README.md, Memory")
    add("--out", type=Path, default=None, help="folder for JSON and plots (default: results/)")
    add("--name", default=None, help="name of the JSON file and prefix of the plots: the device")
    add(
        "--markdown",
        type=Path,
        default=None,
        metavar="FILE",
        help="writes the tables: between two marks where FILE has them, else the whole FILE",
    )
    add("--no-plots", action="store_true")
    args = parser.parse_args(argv)
    groups = GROUPS
    if args.device != "cpu":  # matrix memories are timed on a CPU
        groups = GROUPS | {"mamba": GPU_MAMBA_OPERATORS, "matrix": ()}
    chosen = args.op or list(GROUPS)
    chosen = [name for op in chosen for name in groups.get(op, (op,))]
    args.op = [name for name in dict.fromkeys(chosen) if name in OPERATORS]
    args.mamba = [name for name in dict.fromkeys(chosen) if name in MAMBA_OPERATORS]
    args.matrix = [name for name in dict.fromkeys(chosen) if name in MATRIX_OPERATORS]
    if args.matrix and args.device != "cpu":
        parser.error("--device cuda: matrix memories are timed on a CPU alone")
    args.matrix_shapes = None
    if args.shapes is not None:
        args.matrix_shapes = [name for name in args.shapes if is_matrix_shape(name)]
        args.shapes = [name for name in args.shapes if not is_matrix_shape(name)]
        if args.shapes and not args.matrix_shapes and not args.op and not args.mamba:
            parser.error("--shapes: matrix memories take BxTxHxKxV or BxTxHxKxVxG")
    args.mode = args.mode or list(DEFAULT_MODES[args.device])
    args.dtype = args.dtype or list(DEFAULT_DTYPES[args.device])
    args.name = args.name or args.device
    args.peers = [peer for peer in args.peers if peer != "none"]
    return args


def choose_isas(wanted: list[str] | None) -> list[str]:
    """The instruction sets to time, best first; those that this CPU cannot run are left out."""
    from torch_ext import _C

    supported = []
    for isa in wanted or ("avx512", "avx2"):
        if isa in list(_C.isas()) and _C.force_isa(isa) is not False:
            supported.append(isa)
        elif wanted:
            sys.exit(f"run.py: instruction set {isa!r} is not built or not supported by this CPU")
    _C.force_isa("")
    return supported or [_C.isa()]


def time_operators(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from measure import Effort, cache_bytes, calibrate, exp_rate, set_threads
    from operators import Checker, WrongResult, time_operator
    from report import operator_line, operators_header
    from shapes import OPERATORS, PASSES, resolve_shape

    from torch_ext import _C

    variants = list(itertools.product(settings["threads"], settings["isas"]))
    exps = {}
    for threads, isa in variants:
        set_threads(threads, settings["cpus"])
        _C.force_isa(isa)
        exps[threads, isa] = exp_rate(threads, settings["calibration_seconds"])
        fmas = calibrate("fma", 2048 * threads, False, threads, settings["calibration_seconds"])
        result["arithmetic"].append(
            {"threads": threads, "isa": isa, "exp_per_ns": exps[threads, isa], "fma_per_ns": fmas}
        )

    effort = Effort(settings["seconds"], rounds=5, sample_seconds=0.002)
    l2_bytes = cache_bytes(2) or 2**20
    checker = Checker()
    calibrations: dict = {}
    print(operators_header())
    modes = [mode for mode in args.mode if mode in PASSES]
    cases = itertools.product(args.dtype, settings["shapes"], args.op, modes, variants)
    for dtype_name, shape_name, name, mode, (threads, isa) in cases:
        dtype, operator = getattr(torch, dtype_name), OPERATORS[name]
        shape = resolve_shape(shape_name, operator, mode, threads, dtype.itemsize, l2_bytes)
        set_threads(threads, settings["cpus"])
        _C.force_isa(isa)
        try:
            error = checker.check(name, operator, shape, dtype, (threads, isa))
        except WrongResult as wrong:
            print(f"NOT TIMED, {wrong}; {isa}, {threads} threads", flush=True)
            result["wrong"].append({"what": str(wrong), "isa": isa, "threads": threads})
            continue
        row = time_operator(
            name,
            operator,
            mode,
            shape,
            dtype,
            threads,
            in_l2=shape_name == "in-L2",
            calibrations=calibrations.setdefault((threads, isa), {}),
            exp_rate=exps[threads, isa],
            effort=effort,
            calibration_seconds=settings["calibration_seconds"],
        )
        row |= {"isa": isa, "shape_name": shape_name, "error": error}
        result["operators"].append(row)
        print(operator_line(row), flush=True)
    _C.force_isa("")


def time_default_allocator(args: argparse.Namespace, settings: dict, result: dict) -> None:
    """The first large case again, in a process that leaves malloc as it is, as users do."""
    from report import allocator_line

    large = [row for row in result["operators"] if not row["in_l2"]]
    if not large:
        return
    from shapes import PASSES

    most = max(settings["threads"])
    first = next(r for r in large if r["threads"] == most and r["isa"] == settings["isas"][0])
    case = ("operator", "dtype", "shape_name", "isa", "threads")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--allocator", "default", "--peers", "none"]
        command += ["--op", first["operator"], "--dtype", first["dtype"], "--isa", first["isa"]]
        command += ["--shapes", first["shape_name"], "--threads", str(first["threads"])]
        modes = [mode for mode in args.mode if mode in PASSES]
        command += ["--mode", *modes, "--out", folder, "--no-plots"]
        command += ["--quick"] if args.quick else []
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            print(f"With malloc left as it is: failed, {child.stderr.strip()[-300:]}")
            return
        rows = json.loads((Path(folder) / "cpu.json").read_text())["operators"]
    for row in rows:
        same = {key: row[key] for key in (*case, "mode")}
        kept = next(r for r in large if all(r[key] == value for key, value in same.items()))
        row["with_freed_memory_kept"] = kept["seconds_min"]
        result["default_allocator"].append(row)
        print(allocator_line(row), flush=True)


def mamba_modes(args: argparse.Namespace) -> tuple[str, ...]:
    """The passes that are timed: a forward+backward is the two of them."""
    wanted = {"forward": {"forward"}, "backward": {"backward", "forward+backward"}}
    return tuple(mode for mode, asked in wanted.items() if asked & set(args.mode))


def time_where_right(
    operators: dict[str, Any],
    checker: Any,
    time_operators: Callable[..., Iterator[dict]],
    case: tuple,
    effort: Any,
    settings: dict,
    result: dict,
    rows: str,
) -> None:
    """Operators of one shape and dtype (`case`: passes, the shape's name, shape, dtype) for each number
    of threads and instruction set: checked, timed if right, and put into the result's `rows`."""
    from measure import set_threads
    from operators import WrongResult
    from report import mamba_line

    from torch_ext import _C

    _, _, shape, dtype = case
    errors: dict[str, float] = {}
    for threads, isa in itertools.product(settings["threads"], settings["isas"]):
        set_threads(threads, settings["cpus"])
        _C.force_isa(isa)
        right = {}  # what may be timed
        for name, operator in operators.items():
            try:
                errors[name] = checker.check(name, operator, shape, dtype, (threads, isa))
                right[name] = operator
            except WrongResult as wrong:
                print(f"NOT TIMED, {wrong}; {isa}, {threads} threads", flush=True)
                about = {"what": str(wrong), "isa": isa, "threads": threads}
                result["wrong"].append(about)
        calibration = settings["calibration_seconds"]
        for row in time_operators(right, *case, threads, isa, effort, calibration):
            result[rows].append(row | {"error": errors[row["operator"]]})
            print(mamba_line(result[rows][-1]), flush=True)


def time_mamba_operators(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from mamba_operators import MambaChecker, add_scaling, make_inputs, time_operators
    from measure import Effort
    from report import mamba_header, not_run_line, scaling_line
    from shapes import MAMBA_OPERATORS, MAMBA_SHAPES, QUICK_MAMBA_SHAPE, parse_shape

    from torch_ext import _C

    modes = mamba_modes(args)
    if not modes:
        return
    # Longer samples than elsewhere: operators take turns, and find the caches full of the others.
    effort = Effort(settings["seconds"] / 2, rounds=5, sample_seconds=0.03)
    if args.quick:
        effort = Effort(settings["seconds"] / 10, rounds=3, sample_seconds=0.002)
    print("\n" + mamba_header())
    for function in MAMBA_SHAPES:
        shapes = [QUICK_MAMBA_SHAPE] if args.quick else MAMBA_SHAPES[function]
        if args.shapes:  # as given, but for names that are for others
            shapes = [name for name in args.shapes if name != "in-L2"]
        chosen = {name: MAMBA_OPERATORS[name] for name in args.mamba}
        chosen = {name: op for name, op in chosen.items() if op.function == function}
        everything = chosen
        for shape_name, dtype_name in itertools.product(shapes, args.dtype if chosen else ()):
            if dtype_name == "float64":
                reason = "the machine's rates are calibrated for float32"
                about = {"peer": "torch_ext", "what": f"{function} in float64", "reason": reason}
                result["not_run"].append(about)
                print(not_run_line(about))
                continue
            # Variants are compared with float32.
            chosen = {
                name: op
                for name, op in everything.items()
                if dtype_name == "float32" or (op.dtype is None and op.data == "normal")
            }
            shape, dtype = parse_shape(shape_name), getattr(torch, dtype_name)
            time_where_right(
                chosen, MambaChecker(), time_operators, (modes, shape_name, shape, dtype), effort, settings,
                result, "mamba",
            )  # fmt: skip
            make_inputs.cache_clear()
    _C.force_isa("")
    for row in add_scaling(result["mamba"]):
        print(scaling_line(row))


def time_matrix_operators(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from mamba_operators import add_scaling
    from matrix_memory_operators import MatrixChecker, make_inputs, time_operators
    from measure import Effort
    from report import mamba_header, not_run_line, scaling_line
    from shapes import MATRIX_OPERATORS, MATRIX_SHAPES, QUICK_MATRIX_SHAPE, parse_matrix_shape

    from torch_ext import _C

    modes = mamba_modes(args)
    if not modes:
        return
    effort = Effort(settings["seconds"] / 3, rounds=5, sample_seconds=0.02)
    if args.quick:
        effort = Effort(settings["seconds"] / 10, rounds=3, sample_seconds=0.002)
    print("\n" + mamba_header("matrix memory", "B x T x H x K x V"))
    for function in MATRIX_SHAPES:
        shapes = [QUICK_MATRIX_SHAPE] if args.quick else MATRIX_SHAPES[function]
        shapes = shapes if args.matrix_shapes is None else args.matrix_shapes
        everything = {name: MATRIX_OPERATORS[name] for name in args.matrix}
        everything = {name: op for name, op in everything.items() if op.function == function}
        for shape_name, dtype_name in itertools.product(shapes, args.dtype if everything else ()):
            if dtype_name == "float64":
                reason = "the machine's rates are calibrated for float32"
                about = {"peer": "torch_ext", "what": f"{function} in float64", "reason": reason}
                result["not_run"].append(about)
                print(not_run_line(about))
                continue
            chosen = {  # variants are compared with float32
                name: op
                for name, op in everything.items()
                if dtype_name == "float32" or op.dtype is None
            }
            shape, dtype = parse_matrix_shape(shape_name), getattr(torch, dtype_name)
            time_where_right(
                chosen, MatrixChecker(), time_operators, (modes, shape_name, shape, dtype), effort, settings,
                result, "matrix",
            )  # fmt: skip
            make_inputs.cache_clear()
    _C.force_isa("")
    for row in add_scaling(result["matrix"]):
        print(scaling_line(row))


def time_matrix_steps(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from matrix_memory_operators import time_step
    from measure import Effort, set_threads
    from operators import WrongResult
    from report import matrix_step_line
    from shapes import (
        MATRIX_OPERATORS,
        MATRIX_SHAPES,
        MATRIX_STEP_BATCHES,
        QUICK_MATRIX_SHAPE,
        parse_matrix_shape,
    )

    print("\nOne token through a matrix memory, in place")
    effort = Effort(settings["seconds"] / 2, rounds=5, sample_seconds=0.005)
    functions = dict.fromkeys(MATRIX_OPERATORS[name].function for name in args.matrix)
    for name, dtype_name, batch, threads in itertools.product(
        functions, args.dtype, MATRIX_STEP_BATCHES, settings["threads"]
    ):
        set_threads(threads, settings["cpus"])
        shapes = (QUICK_MATRIX_SHAPE,) if args.quick else MATRIX_SHAPES[name]
        shape_name = (args.matrix_shapes or shapes)[0]
        given = (shape_name, parse_matrix_shape(shape_name), batch, getattr(torch, dtype_name))
        try:
            row = time_step(
                name, MATRIX_OPERATORS[name], *given, threads, effort,
                settings["calibration_seconds"],
            )  # fmt: skip
        except WrongResult as wrong:
            print(f"NOT TIMED, {wrong}", flush=True)
            result["wrong"].append({"what": str(wrong), "threads": threads})
            continue
        result["matrix_steps"].append(row)
        print(matrix_step_line(row), flush=True)


def time_mamba_steps(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from mamba_operators import time_step
    from measure import Effort, cache_bytes, set_threads
    from operators import WrongResult
    from report import mamba_step_line
    from shapes import MAMBA_STEP_BATCHES, MAMBA_WIDTH, QUICK_MAMBA_WIDTH

    width = QUICK_MAMBA_WIDTH if args.quick else MAMBA_WIDTH
    print(f"\nOne token through a Mamba layer, d_model = {width}")
    # Long enough samples that what the caches can keep of the weights is there for most calls.
    effort = Effort(settings["seconds"] / 2, 5, sample_seconds=0.002 if args.quick else 0.02)
    for dtype_name, threads in itertools.product(args.dtype, settings["threads"]):
        dtype = getattr(torch, dtype_name)
        set_threads(threads, settings["cpus"])
        # About 6.5 width^2 weights. As many layers as exceed four times the last cache.
        in_memory = 4 * (cache_bytes(3) or 2**25) // int(6.5 * width**2 * dtype.itemsize) + 1
        for batch, copies in itertools.product(MAMBA_STEP_BATCHES, (1, min(in_memory, 32))):
            try:
                for row in time_step(width, batch, copies, dtype, threads, effort):
                    result["mamba_steps"].append(row)
                    print(mamba_step_line(row), flush=True)
            except WrongResult as wrong:
                print(f"NOT TIMED, {wrong}", flush=True)
                result["wrong"].append({"what": str(wrong), "threads": threads})


def time_models(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import language_models
    import torch
    from measure import Effort, set_threads
    from operators import WrongResult
    from report import count, model_line, not_run_line
    from shapes import MODEL_SIZES, QUICK_MODEL_SIZES

    sizes = QUICK_MODEL_SIZES if args.quick else MODEL_SIZES
    threads = max(settings["threads"])
    set_threads(threads, settings["cpus"])
    effort = Effort(settings["seconds"] * 2, rounds=3 if args.quick else 5, sample_seconds=0.01)
    print(f"\nLanguage models of equal size, one sequence, {count(threads)}")
    for dtype_name in args.dtype:
        try:
            for kind, row in language_models.time_models(
                sizes, getattr(torch, dtype_name), threads, effort, "transformer" in args.peers
            ):
                result[kind].append(row)
                print(model_line(row) if kind == "models" else not_run_line(row), flush=True)
        except WrongResult as wrong:
            print(f"NOT TIMED, {wrong}", flush=True)
            result["wrong"].append({"what": str(wrong), "threads": threads})


def time_xlstm_models(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import language_models
    import torch
    from measure import Effort, set_threads
    from peers import why_not
    from report import count, model_line, not_run_line
    from shapes import QUICK_XLSTM_SIZES, XLSTM_SIZES

    sizes = QUICK_XLSTM_SIZES if args.quick else XLSTM_SIZES
    threads = max(settings["threads"])
    set_threads(threads, settings["cpus"])
    effort = Effort(settings["seconds"], rounds=3 if args.quick else 5, sample_seconds=0.01)
    print(f"\nxLSTM language models with the same weights, one sequence, {count(threads)}")
    names = [name for name in args.peers if why_not(name, "cpu") is None]
    for dtype_name in args.dtype:
        for kind, row in language_models.time_xlstm_models(
            sizes, getattr(torch, dtype_name), threads, effort, names
        ):
            result[kind].append(row)
            if kind == "xlstm_models":
                print(model_line(row), flush=True)
            elif kind == "not_run":
                print(not_run_line(row), flush=True)
            else:
                print(f"NOT TIMED, {row['what']}", flush=True)


def time_long_input(args: argparse.Namespace, settings: dict, result: dict) -> None:
    from memory import make_long_cases, peak_memory
    from report import long_line
    from shapes import LONG_INPUT, QUICK_LONG_INPUT

    sizes = QUICK_LONG_INPUT if args.quick else LONG_INPUT
    print("\nA long text, read whole and in chunks: time, and memory beyond the model")
    for row in peak_memory(make_long_cases(sizes, args.dtype[0]), max(settings["threads"])):
        result["long"].append(row)
        print(long_line(row), flush=True)


def device_of(args: argparse.Namespace, settings: dict) -> str:
    """Where tensors are: the backend's word, so that tests can run a GPU's path without one."""
    return "cpu" if args.device == "cpu" else settings["backend"].device


def make_timer(args: argparse.Namespace, settings: dict, sets: int = 1):
    """Samples of peers are longer than those of operators: they are slow, and we compare."""
    from measure import CpuTimer, Effort

    if args.device == "cpu":
        return CpuTimer(Effort(settings["seconds"] * 2, rounds=5, sample_seconds=0.01))
    from gpu import GraphTimer

    rounds = 3 if args.quick else 20
    return GraphTimer(settings["backend"], Effort(settings["seconds"], rounds, 0.0), sets)


def time_steps(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from measure import CpuTimer, Effort, set_threads
    from operators import WrongResult, time_step
    from report import step_line
    from shapes import OPERATORS, QUICK_STEP_BATCHES, QUICK_STEP_DIM, STEP_BATCHES, STEP_DIM

    batches = QUICK_STEP_BATCHES if args.quick else STEP_BATCHES
    dim = QUICK_STEP_DIM if args.quick else STEP_DIM
    print("\nOne token, D = " + str(dim))
    on_cpu = args.device == "cpu"
    for dtype_name, name, batch, threads in itertools.product(
        args.dtype, args.op, batches, settings["threads"] if on_cpu else [None]
    ):
        if on_cpu:
            set_threads(threads, settings["cpus"])
            timer = CpuTimer(Effort(settings["seconds"] / 2, rounds=5, sample_seconds=0.002))
        else:
            timer = make_timer(args, settings, sets=4)
        try:
            for row in time_step(
                name, OPERATORS[name], batch, dim, getattr(torch, dtype_name), timer, threads
            ):
                result["steps"].append(row)
                print(step_line(row), flush=True)
        except WrongResult as wrong:
            print(f"NOT TIMED, {wrong}", flush=True)
            result["wrong"].append({"what": str(wrong), "threads": threads})


def time_memory(args: argparse.Namespace, settings: dict, result: dict) -> None:
    from memory import make_cases, peak_memory, tensors_needed
    from peers import why_not
    from report import memory_line
    from shapes import MEMORY_SHAPES, QUICK_MEMORY_SHAPE, parse_shape

    shape = parse_shape(QUICK_MEMORY_SHAPE if args.quick else MEMORY_SHAPES[args.device])
    peers = [name for name in args.peers if why_not(name, args.device) is None]
    cases = make_cases([*args.op, *args.mamba], peers, shape, args.dtype[0])
    if args.device == "cpu":
        rows = peak_memory(cases, max(settings["threads"]))
    else:
        from gpu import peak_memory as peak_memory_on_gpu

        rows = peak_memory_on_gpu(settings["backend"], cases)
    print("\nPeak memory beyond the inputs")
    for row in rows:
        row["tensors_needed"] = tensors_needed(row)
        result["memory"].append(row)
        print(memory_line(row), flush=True)


def time_peers(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from measure import first_line, set_threads
    from operators import WrongResult
    from peers import (
        LAYERS,
        compare,
        gate_comparisons,
        layer_comparisons,
        mamba_comparison,
        papers_table,
        scan_comparisons,
        why_not,
    )
    from report import not_run_line, peer_line, peers_header
    from shapes import (
        LAYERS_TIMED,
        MAMBA_LAYERS_TIMED,
        MAMBA_WIDTH,
        PAPER_TIMES,
        PEER_SHAPES,
        QUICK_MAMBA_TIME,
        QUICK_MAMBA_WIDTH,
        QUICK_PAPER_TIMES,
        QUICK_PEER_SHAPE,
        parse_shape,
    )

    device, threads = device_of(args, settings), None
    if args.device == "cpu":
        threads = max(settings["threads"])
        set_threads(threads, settings["cpus"])
    print("\n" + peers_header(threads))

    names = []
    for name in args.peers:
        if reason := why_not(name, args.device):
            result["not_run"].append({"peer": name, "what": "all", "reason": reason})
            print(not_run_line(result["not_run"][-1]))
        else:
            names.append(name)

    def failed(wrong: WrongResult) -> None:
        print(f"NOT TIMED, {wrong}", flush=True)
        result["wrong"].append({"what": str(wrong), "threads": threads})

    def run(comparisons: Iterator, timer) -> None:
        try:
            for comparison in comparisons:
                for kind, row in compare(comparison, timer, threads):
                    result[kind].append(row)
                    if kind == "peers":
                        print(peer_line(row), flush=True)
                    elif kind == "not_run":
                        print(not_run_line(row), flush=True)
                    elif kind == "wrong":
                        print(f"NOT TIMED, {row['what']}", flush=True)
        except WrongResult as wrong:
            failed(wrong)
        except Exception as error:  # memory, the compiler, the device: the next may work
            result["not_run"].append(
                {"peer": "torch_ext and peers", "what": "a comparison", "reason": first_line(error)}
            )
            print(not_run_line(result["not_run"][-1]), flush=True)

    families = {name.partition("[")[0] for name in args.op}
    given = args.peer_shapes
    if given is None and args.quick:
        given = [QUICK_PEER_SHAPE]
    dtypes = [getattr(torch, name) for name in args.dtype]
    for shape_name, dtype in itertools.product(
        PEER_SHAPES[args.device] if given is None else given, dtypes
    ):
        shape, sets = parse_shape(shape_name), 1
        if args.device != "cpu":
            from gpu import sets_needed

            bytes_per_call = 3 * shape[0] * shape[1] * shape[2] * dtype.itemsize
            sets = sets_needed(bytes_per_call, settings["backend"].l2_bytes())
        timer = make_timer(args, settings, sets)
        scans = ("associative_scan", "accelerated-scan", "accelerated-scan (Triton)", "fla-hgrn")
        if "linear_scan" in families and set(scans) & set(names):
            run(scan_comparisons(names, shape, dtype, device, sets), timer)
        if "min_gru" in families and any(name.startswith("minGRU") for name in names):
            run(gate_comparisons(names, shape, dtype, device, sets), timer)
    if args.device != "cpu" and args.mamba:
        for comparisons, timer in compare_mamba_on_gpu(args, settings, names):
            run(comparisons, timer)
    if "layer" in args.mode:
        timed = LAYERS_TIMED[args.device]
        if given is not None:
            timed = tuple(itertools.product(LAYERS, given, [None]))
        for (layer, shape_name, beside), dtype in itertools.product(timed, dtypes):
            if {"MinGRU": "min_gru", "MinLSTM": "min_lstm"}[layer] in families:
                chosen = [name for name in names if beside is None or name in beside]
                shape = parse_shape(shape_name)
                comparisons = layer_comparisons(layer, chosen, shape, dtype, device)
                run(comparisons, make_timer(args, settings))
    if "layer" in args.mode and args.mamba and args.device == "cpu" and "float32" in args.dtype:
        width = QUICK_MAMBA_WIDTH if args.quick else MAMBA_WIDTH
        for length, mode, beside in MAMBA_LAYERS_TIMED:
            length = QUICK_MAMBA_TIME if args.quick else length
            if chosen := [name for name in names if name in beside]:
                comparison = (mamba_comparison(mode, length, width, chosen) for _ in range(1))
                run(comparison, make_timer(args, settings))
    if args.matrix:
        for comparisons in matrix_comparisons(args, names):
            run(comparisons, make_timer(args, settings))
    if "loops" in names and args.op:
        times = QUICK_PAPER_TIMES if args.quick else PAPER_TIMES
        try:
            for row in papers_table(times, args.paper_width, threads, make_timer(args, settings)):
                result["paper"].append(row)
                print(peer_line(row), flush=True)
        except WrongResult as wrong:
            failed(wrong)


def matrix_comparisons(args: argparse.Namespace, names: list[str]) -> Iterator[Iterator]:
    """mlstm beside mlstm_kernels; layers beside those with the same weights."""
    from peers import matrix_layer_comparisons, mlstm_comparisons
    from shapes import (
        MATRIX_LAYERS_TIMED,
        MLSTM_SHAPE,
        QUICK_MATRIX_TIME,
        QUICK_MATRIX_WIDTH,
        QUICK_MLSTM_SHAPE,
        parse_matrix_shape,
    )

    if "float32" not in args.dtype:
        return
    if "mlstm" in args.matrix and "mlstm_kernels" in names:
        shape = QUICK_MLSTM_SHAPE if args.quick else MLSTM_SHAPE
        yield mlstm_comparisons(parse_matrix_shape(shape))
    for layer, steps, width in MATRIX_LAYERS_TIMED if "layer" in args.mode else ():
        if ("ssd" if layer == "Mamba2" else "mlstm") in args.matrix:
            sizes = (QUICK_MATRIX_TIME, QUICK_MATRIX_WIDTH) if args.quick else (steps, width)
            yield matrix_layer_comparisons(layer, *sizes, names)


def compare_mamba_on_gpu(
    args: argparse.Namespace, settings: dict, names: list[str]
) -> Iterator[tuple[Iterator, object]]:
    """Mamba's operators and steps beside those of the peers that are here."""
    import torch
    from gpu import sets_needed
    from mamba_operators import MambaChecker
    from peers import mamba_operator_comparisons, mamba_step_comparisons
    from shapes import (
        GPU_MAMBA_COMPARED,
        GPU_MAMBA_SHAPES,
        GPU_MAMBA_STEP_BATCHES,
        GPU_MAMBA_WIDTH,
        MAMBA_STATES,
        QUICK_MAMBA_SHAPE,
        QUICK_MAMBA_WIDTH,
        QUICK_STEP_BATCHES,
        parse_shape,
    )

    device, l2_bytes = device_of(args, settings), settings["backend"].l2_bytes()
    checker = settings.setdefault("mamba_checker", MambaChecker(device))
    beside = {"selective_scan": "mamba_ssm", "causal_conv1d": "causal-conv1d"}
    functions = {name.partition("[")[0] for name in args.mamba}
    chosen = [name for function, name in beside.items() if function in functions]
    chosen = [name for name in chosen if name in names]
    dtypes = [name for name in args.dtype if name != "float64"]  # which they do not have
    for (name, operator), dtype_name in itertools.product(GPU_MAMBA_COMPARED.items(), dtypes):
        if beside[operator.function] not in chosen:
            continue
        dtype = getattr(torch, dtype_name)
        shapes = [QUICK_MAMBA_SHAPE] if args.quick else GPU_MAMBA_SHAPES[operator.function]
        for shape_name in shapes if args.peer_shapes is None else args.peer_shapes:
            shape = parse_shape(shape_name)
            size = shape[0] * shape[1] * shape[2] * dtype.itemsize
            sets = sets_needed(operator.tensors_alive("forward") * size, l2_bytes)
            yield (
                mamba_operator_comparisons(chosen, name, operator, shape, dtype, checker, sets),
                make_timer(args, settings, sets),
            )
    dim = 2 * (QUICK_MAMBA_WIDTH if args.quick else GPU_MAMBA_WIDTH)
    batches = QUICK_STEP_BATCHES if args.quick else GPU_MAMBA_STEP_BATCHES
    for dtype_name, batch, name in itertools.product(dtypes, batches, chosen):
        dtype = getattr(torch, dtype_name)
        state = 8 * MAMBA_STATES if name == "mamba_ssm" else 8 * dtype.itemsize
        sets = sets_needed(batch * dim * state, l2_bytes)
        yield (
            mamba_step_comparisons([name], batch, dim, dtype, device, sets),
            make_timer(args, settings, sets),
        )


def calibrate_gpu(args: argparse.Namespace, settings: dict, result: dict) -> tuple:
    """Bandwidth and arithmetic, once in a run: whatever is timed asks for them first."""
    if "gpu_limits" in settings:
        return settings["gpu_limits"]
    from gpu import Bandwidth, arithmetic_rates, launch_overhead
    from report import duration

    device = device_of(args, settings)
    timer = make_timer(args, settings)
    small = 2**20 if args.quick else None
    bandwidth = Bandwidth(device, small) if small else Bandwidth(device)
    samples = timer.measure(bandwidth.variants())
    launch = launch_overhead(timer)
    arithmetic = arithmetic_rates(timer, small) if small else arithmetic_rates(timer)
    result["calibration"] = {
        "gigabytes_per_second": bandwidth.rates(samples),
        **{kind: sample.summary() for kind, sample in samples.items()},
        "launch": launch,
    }
    peak = settings["backend"].arithmetic_peak()
    result["arithmetic"].append({"threads": None, "isa": "GPU", **arithmetic, "peak": peak})
    rates = ", ".join(f"{k} {v:.0f} GB/s" for k, v in bandwidth.rates(samples).items())
    print(
        f"{rates}; a launch takes {duration(launch['seconds_min'])} in a graph, "
        f"{duration(launch['eager_seconds'])} from Python"
    )
    for kind, unit in (("exp", "special"), ("fma", "issue")):
        rate = arithmetic[f"{kind}_per_ns"]
        said = f"{rate:.0f} per ns" if rate else arithmetic[f"no_{kind}_because"]
        print(f"{kind}: {said}; {peak[f'{unit}_per_ns']:.0f} by multiprocessors and clock")
    settings["gpu_limits"] = bandwidth, arithmetic
    return bandwidth, arithmetic


def time_operators_on_gpu(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from gpu import time_operator
    from measure import first_line
    from operators import Checker, WrongResult
    from report import operator_line, operators_header
    from shapes import OPERATORS, PASSES, resolve_shape

    timer = make_timer(args, settings)
    bandwidth, arithmetic = calibrate_gpu(args, settings, result)
    checker = Checker(device_of(args, settings))
    print(operators_header())
    modes = [mode for mode in args.mode if mode in PASSES]
    for dtype_name, shape_name, name, mode in itertools.product(
        args.dtype, settings["shapes"], args.op, modes
    ):
        dtype, operator = getattr(torch, dtype_name), OPERATORS[name]
        shape = resolve_shape(shape_name, operator, mode, 1, dtype.itemsize, 2**20)
        try:
            error = checker.check(name, operator, shape, dtype, ())
            row = time_operator(
                name,
                operator,
                mode,
                shape_name,
                shape,
                dtype,
                timer,
                bandwidth,
                arithmetic["exp_per_ns"],
            )
        except WrongResult as wrong:
            print(f"NOT TIMED, {wrong}", flush=True)
            result["wrong"].append({"what": str(wrong), "isa": "GPU", "threads": None})
            continue
        except torch.cuda.OutOfMemoryError as error:
            about = {"peer": "torch_ext", "what": f"{name} {mode}", "shape": list(shape)}
            result["not_run"].append({**about, "reason": first_line(error)})
            continue
        result["operators"].append(row | {"error": error})
        print(operator_line(result["operators"][-1]), flush=True)


@contextlib.contextmanager
def survived(result: dict, what: str) -> Iterator[None]:
    """One case on a GPU: a result that is wrong or a call that fails is written down, and the run
    goes on; only what this device or build cannot do leaves the exit status as it is."""
    import torch
    from measure import first_line
    from operators import WrongResult
    from report import not_run_line

    try:
        yield
    except (torch.cuda.OutOfMemoryError, NotImplementedError) as error:
        about = {"peer": "torch_ext", "what": what, "reason": first_line(error)}
        result["not_run"].append(about)
        print(not_run_line(about), flush=True)
    except (WrongResult, RuntimeError) as error:
        text = str(error) if isinstance(error, WrongResult) else f"{what}: {first_line(error)}"
        print(f"NOT TIMED, {text}", flush=True)
        result["wrong"].append({"what": text, "isa": "GPU", "threads": None})


def time_mamba_operators_on_gpu(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from gpu_mamba import best_rates, time_operator
    from mamba_operators import MambaChecker, make_inputs
    from report import gpu_mamba_header, gpu_mamba_line, not_run_line
    from shapes import GPU_MAMBA_SHAPES, MAMBA_OPERATORS, QUICK_MAMBA_SHAPE, parse_shape

    modes = mamba_modes(args)
    if not modes:
        return
    timer = make_timer(args, settings)
    bandwidth, arithmetic = calibrate_gpu(args, settings, result)
    rates = best_rates(settings["backend"], arithmetic)
    # Peers' comparisons ask for some of the same.
    checker = settings.setdefault("mamba_checker", MambaChecker(timer.device))
    print("\n" + gpu_mamba_header())
    operators = {name: MAMBA_OPERATORS[name] for name in args.mamba}
    cases = [  # some have a dtype of their own
        (name, operator, dtype_name)
        for name, operator in operators.items()
        for dtype_name in ([operator.dtype] if operator.dtype else args.dtype)
    ]
    for name, operator, dtype_name in cases:
        dtype = getattr(torch, dtype_name)
        if dtype_name == "float64":
            reason = "the device's rates are those of float32"
            about = {"peer": "torch_ext", "what": f"{name} in float64", "reason": reason}
            result["not_run"].append(about)
            print(not_run_line(about))
            continue
        shapes = [QUICK_MAMBA_SHAPE] if args.quick else GPU_MAMBA_SHAPES[operator.function]
        if args.shapes:  # as given, but for names that are for others
            shapes = [shape for shape in args.shapes if shape != "in-L2"]
        for shape_name in shapes:
            shape = parse_shape(shape_name)
            with survived(result, f"{name} {dtype_name} {shape_name}"):
                error = checker.check(name, operator, shape, dtype, ())
                for mode in modes:
                    row = time_operator(
                        name, operator, mode, shape_name, shape, dtype, timer, bandwidth, rates
                    )
                    result["mamba"].append(row | {"error": error})
                    print(gpu_mamba_line(result["mamba"][-1]), flush=True)
            make_inputs.cache_clear()  # what the next one draws is as large
            checker.references.clear()


def time_mamba_steps_on_gpu(args: argparse.Namespace, settings: dict, result: dict) -> None:
    import torch
    from gpu_mamba import time_layer_step, time_operator_step
    from report import gpu_mamba_step_line
    from shapes import (
        GPU_MAMBA_STEP_BATCHES,
        GPU_MAMBA_WIDTH,
        MAMBA_OPERATORS,
        QUICK_MAMBA_WIDTH,
        QUICK_STEP_BATCHES,
    )

    width = QUICK_MAMBA_WIDTH if args.quick else GPU_MAMBA_WIDTH
    batches = QUICK_STEP_BATCHES if args.quick else GPU_MAMBA_STEP_BATCHES
    functions = {name.partition("[")[0] for name in args.mamba}
    timer = make_timer(args, settings)
    bandwidth, _ = calibrate_gpu(args, settings, result)
    print(f"\nOne token of Mamba, d_model = {width}, D = {2 * width}")
    for dtype_name, batch in itertools.product(args.dtype, batches):
        dtype = getattr(torch, dtype_name)
        works = {}
        for name in ("selective_scan[fused]", "causal_conv1d"):
            if (function := name.partition("[")[0]) in functions:
                given = (name, MAMBA_OPERATORS[name], batch, 2 * width, dtype, timer, bandwidth)
                works[f"{function}_step_"] = functools.partial(time_operator_step, *given)
        given = (width, batch, dtype, timer, bandwidth)
        works["Mamba.step"] = functools.partial(time_layer_step, *given)
        for what, work in works.items():
            with survived(result, f"{what} {dtype_name}, B = {batch}"):
                for row in work():
                    result["mamba_steps"].append(row)
                    print(gpu_mamba_step_line(row), flush=True)


def make_settings(args: argparse.Namespace, cpus: list[int]) -> dict:
    from shapes import DEFAULT_SHAPES, QUICK_SHAPES

    shapes = args.shapes
    if shapes is None:
        shapes = list(QUICK_SHAPES) if args.quick else list(DEFAULT_SHAPES[args.device])
    if args.device != "cpu":
        shapes = [name for name in shapes if name != "in-L2"]
    settings: dict = {
        "device": args.device,
        "cpus": cpus,
        "shapes": shapes,
        "seconds": args.seconds or (0.05 if args.quick else 0.5),
        "calibration_seconds": 0.005 if args.quick else 0.06,
        "quick": args.quick,
    }
    if args.device == "cuda":
        return settings | {"threads": [], "isas": []}
    threads = sorted(set(args.threads or [n for n in (1, 2) if n <= len(cpus)]))
    if max(threads) > len(cpus) or min(threads) < 1:
        sys.exit(f"run.py: --threads {max(threads)}, but this process may use {len(cpus)} CPUs")
    return settings | {"threads": threads, "isas": choose_isas(args.isa)}


def new_result() -> dict:
    lists = ("arithmetic", "operators", "steps", "memory", "wrong", "not_run")
    lists += ("default_allocator", "alone", "peers", "paper")
    lists += ("mamba", "mamba_steps", "models", "long", "matrix", "matrix_steps", "xlstm_models")
    return {"machine": {}, "settings": {}, **{name: [] for name in lists}}


def run_all(args: argparse.Namespace, settings: dict, result: dict) -> None:
    """Every part that was asked for. A GPU needs `backend` in the settings."""
    on_cpu = args.device == "cpu"
    if settings["shapes"] and args.op:
        (time_operators if on_cpu else time_operators_on_gpu)(args, settings, result)
        if on_cpu and settings["freed_memory_kept"]:
            time_default_allocator(args, settings, result)
    if args.mamba and settings["shapes"]:
        (time_mamba_operators if on_cpu else time_mamba_operators_on_gpu)(args, settings, result)
    if args.matrix and (settings["shapes"] or args.matrix_shapes):
        time_matrix_operators(args, settings, result)
    if "step" in args.mode and args.op:
        time_steps(args, settings, result)
    if "step" in args.mode and args.mamba:
        (time_mamba_steps if on_cpu else time_mamba_steps_on_gpu)(args, settings, result)
    if "step" in args.mode and args.matrix:
        time_matrix_steps(args, settings, result)
    if "memory" in args.mode and (args.op or args.mamba):
        time_memory(args, settings, result)
    if args.peers or "layer" in args.mode:
        time_peers(args, settings, result)
    if "model" in args.mode and args.mamba and on_cpu:
        time_models(args, settings, result)
        time_long_input(args, settings, result)
    if "model" in args.mode and args.matrix:
        time_xlstm_models(args, settings, result)


def save(result: dict, args: argparse.Namespace) -> list[Path]:
    from report import draw, merge_markdown

    written = []
    folder = args.out or (None if args.quick else HERE / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{args.name}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        written = [file]
        if not args.no_plots:
            written += draw(result, folder, args.name)
    if args.markdown is not None:
        merge_markdown(args.markdown, result)
        written.append(args.markdown)
    return written


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = time.monotonic()

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("run.py: --device cuda: torch.cuda.is_available() is False here")
    from measure import Machine, available_cpus, keep_freed_memory

    kept = args.allocator == "keep" and keep_freed_memory()
    cpus = available_cpus()
    machine = Machine(cpus)
    try:
        from torch_ext import _C  # noqa: F401  (calibration and the choice of instruction set)
    except ImportError as error:
        sys.exit(f"run.py: needs torch_ext, installed with its test hooks torch_ext._C: {error}")
    from report import summary

    settings = make_settings(args, cpus) | {"freed_memory_kept": kept}
    result = new_result()
    result["machine"] = machine.describe()
    gpu: dict = {}
    if args.device == "cuda":
        from gpu import CudaBackend

        settings["backend"] = CudaBackend()
        gpu = settings["backend"].describe()
    hidden = ("cpus", "backend")
    result["settings"] = {key: value for key, value in settings.items() if key not in hidden}
    where = gpu.get("gpu", result["machine"]["cpu"])
    print(f"torch_ext {result['machine']['torch_ext']} on {where}")
    if machine.load > 0.3:
        print(f"The load average is {machine.load:.1f}: something else runs, do not trust figures.")
    if args.quick:
        print("--quick: these figures show that everything works, and nothing else.")

    complete = False
    try:
        run_all(args, settings, result)
        complete = True
    finally:  # what was measured before a part failed, or before the time was up, is kept
        result["machine"] = machine.describe() | gpu
        result["settings"]["minutes"] = round((time.monotonic() - started) / 60, 1)
        result["settings"]["complete"] = complete
        written = save(result, args)
    print("\n" + summary(result))
    if written:
        print("Written: " + ", ".join(os.path.relpath(path) for path in written))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
