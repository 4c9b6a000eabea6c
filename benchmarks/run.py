#!/usr/bin/env python
"""Times the fused operators against the machine's own limits and against peers.

    python benchmarks/run.py                 everything, about 8 minutes on two cores
    python benchmarks/run.py --quick         small shapes, seconds: only to see that it works
    python benchmarks/run.py --op min_gru --shapes 8x2048x1024 --threads 1 --peers none

README.md beside this file says how the figures are made and how to read them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("minGRU-pytorch", "loops")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from shapes import DEFAULT_MODES, DEFAULT_OPERATORS, MODES, OPERATORS, SHAPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--op", nargs="+", choices=OPERATORS, default=list(DEFAULT_OPERATORS), metavar="OP")
    add("--mode", nargs="+", choices=MODES, default=list(DEFAULT_MODES), metavar="MODE")
    add("--device", choices=("cpu",), default="cpu", help="the CPU is the only one so far")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE")
    add(
        "--shapes",
        nargs="*",
        default=None,
        metavar="SHAPE",
        help=f"names of the table ({', '.join(SHAPES)}) or BxTxD; none: no operator is timed",
    )
    add("--threads", nargs="+", type=int, default=None, metavar="N", help="default: 1 2")
    add("--isa", nargs="+", default=None, metavar="ISA", help="default: avx512 avx2, as supported")
    add("--peers", nargs="*", choices=(*PEERS, "none"), default=list(PEERS), metavar="PEER")
    add("--paper-width", type=int, default=64, help="input and hidden size of the paper's table")
    add("--seconds", type=float, default=None, help="to spend on each timing (default 0.5)")
    add("--quick", action="store_true", help="small and short: the figures mean nothing")
    add("--allocator", choices=("keep", "default"), default="keep", help="see README.md, Memory")
    add("--out", type=Path, default=None, help="folder for JSON and plots (default: results/)")
    add("--name", default="cpu", help="name of the JSON file and prefix of the plots")
    add("--markdown", type=Path, default=None, metavar="FILE", help="tables for a README")
    add("--no-plots", action="store_true")
    args = parser.parse_args(argv)
    if unknown := [op for op in args.op if op not in OPERATORS]:
        parser.error(f"unknown operators {unknown}")
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
    from shapes import OPERATORS, resolve_shape

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
    cases = itertools.product(args.dtype, settings["shapes"], args.op, args.mode, variants)
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
    most = max(settings["threads"])
    first = next(r for r in large if r["threads"] == most and r["isa"] == settings["isas"][0])
    case = ("operator", "dtype", "shape_name", "isa", "threads")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--allocator", "default", "--peers", "none"]
        command += ["--op", first["operator"], "--dtype", first["dtype"], "--isa", first["isa"]]
        command += ["--shapes", first["shape_name"], "--threads", str(first["threads"])]
        command += ["--mode", *args.mode, "--out", folder, "--no-plots"]
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


def time_peers(args: argparse.Namespace, settings: dict, result: dict) -> None:
    from measure import Effort, set_threads
    from operators import WrongResult
    from peers import against_mingru_pytorch, has_mingru_pytorch, papers_table
    from report import peer_line, peers_header
    from shapes import PAPER_TIMES, PEER_SHAPE, QUICK_PAPER_TIMES, QUICK_PEER_SHAPE

    threads = max(settings["threads"])
    set_threads(threads, settings["cpus"])
    effort = Effort(seconds=settings["seconds"] * 2, rounds=5, sample_seconds=0.01)
    print("\n" + peers_header(threads))

    def collect(rows: Iterator[dict], into: list[dict]) -> None:
        try:
            for row in rows:
                into.append(row)
                print(peer_line(row), flush=True)
        except WrongResult as wrong:
            print(f"NOT TIMED, {wrong}", flush=True)
            result["wrong"].append({"what": str(wrong), "threads": threads})

    if "minGRU-pytorch" in args.peers:
        if has_mingru_pytorch():
            shape = QUICK_PEER_SHAPE if args.quick else PEER_SHAPE
            collect(against_mingru_pytorch(shape, threads, effort), result["peers"])
        else:
            print("minGRU-pytorch is not installed: pip install minGRU-pytorch==0.2.1 einops")
    if "loops" in args.peers:
        times = QUICK_PAPER_TIMES if args.quick else PAPER_TIMES
        collect(papers_table(times, args.paper_width, threads, effort), result["paper"])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = time.monotonic()

    from measure import Machine, available_cpus, keep_freed_memory

    kept = args.allocator == "keep" and keep_freed_memory()
    cpus = available_cpus()
    machine = Machine(cpus)
    threads = sorted(set(args.threads or [n for n in (1, 2) if n <= len(cpus)]))
    if max(threads) > len(cpus) or min(threads) < 1:
        sys.exit(f"run.py: --threads {max(threads)}, but this process may use {len(cpus)} CPUs")

    try:
        from torch_ext import _C  # noqa: F401  (calibration and the choice of instruction set)
    except ImportError as error:
        sys.exit(f"run.py: needs torch_ext, installed with its test hooks torch_ext._C: {error}")
    from report import draw, markdown, summary
    from shapes import QUICK_SHAPES, SHAPES

    shapes = list(QUICK_SHAPES if args.quick else SHAPES) if args.shapes is None else args.shapes
    settings = {
        "cpus": cpus,
        "threads": threads,
        "isas": choose_isas(args.isa),
        "shapes": shapes,
        "seconds": args.seconds or (0.05 if args.quick else 0.5),
        "calibration_seconds": 0.005 if args.quick else 0.06,
    }
    result: dict = {
        "machine": machine.describe(),
        "settings": {
            **{key: value for key, value in settings.items() if key != "cpus"},
            "quick": args.quick,
            "freed_memory_kept": kept,
        },
        "arithmetic": [],
        "operators": [],
        "wrong": [],
        "default_allocator": [],
        "peers": [],
        "paper": [],
    }
    print(f"torch_ext {result['machine']['torch_ext']} on {result['machine']['cpu']}")
    if machine.load > 0.3:
        print(f"The load average is {machine.load:.1f}: something else runs, do not trust figures.")
    if args.quick:
        print("--quick: these figures show that everything works, and nothing else.")

    if shapes:
        time_operators(args, settings, result)
        if kept:
            time_default_allocator(args, settings, result)
    if "none" not in args.peers and args.peers:
        time_peers(args, settings, result)

    result["machine"] = machine.describe()
    result["settings"]["minutes"] = round((time.monotonic() - started) / 60, 1)
    print("\n" + summary(result))

    folder = args.out or (None if args.quick else HERE / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{args.name}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        written = [file]
        if not args.no_plots:
            written += draw(result, folder, args.name)
        print("Written: " + ", ".join(os.path.relpath(path) for path in written))
    if args.markdown is not None:
        args.markdown.write_text(markdown(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
