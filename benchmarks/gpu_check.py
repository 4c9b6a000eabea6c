#!/usr/bin/env python
"""Everything that a machine with an NVIDIA GPU can say about torch_ext, in one command.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --part tests --limit 540     one part, in at most nine minutes

tests       the pytest suite on --device cuda, each file in a process of its own
sanitizer   compute-sanitizer's memcheck, racecheck, initcheck and synccheck over exercise.py
graphs      CUDA graphs: capture and replay, in tests/test_cuda.py and of every consumer
benchmark   run.py --device cuda: operators, steps, memory; and the shares that are their goals
peers       run.py --device cuda: layers, and ours beside peers; and the ratios that are its goals
matrix      gpu_matrix_memory.py: mlstm and ssd, their steps, ours beside peers; and the times that are its goals

Writes gpu_check.json and gpu_check.log into --out. Parts that ran earlier stay in the JSON, so that
they can be run one by one. A part that fails or is stopped at its limit does not stop the others;
the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART")
    add("--limit", type=float, default=3600, help="seconds for each part (default 3600)")
    add("--out", type=Path, default=HERE / "out", help="folder of the JSON and the log")
    add("--jobs", type=int, default=4, help="test files at a time (default 4)")
    add("--tests", nargs="*", default=None, metavar="FILE", help="some files of tests/")
    add("--quick", action="store_true", help="the benchmark with small shapes")
    return parser.parse_args(argv)


class Log:
    """One file for the output of all that is run; parallel commands take turns by the block."""

    def __init__(self, path: Path):
        self.path = path
        self.lock = threading.Lock()

    def write(self, text: str) -> None:
        with self.lock, self.path.open("a") as file:
            file.write(text)


def run_command(
    command: Sequence[str], seconds: float, log: Log, environment: dict[str, str] | None = None
) -> dict:
    """Runs it to its end or its limit. On the limit the whole process group is told to end."""
    started = time.monotonic()
    result: dict = {"command": [Path(part).name for part in command]}
    output = ""
    try:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=TESTS,  # not the root, whose torch_ext/ would hide the installed package
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
    except OSError as error:
        result |= {"returncode": None, "reason": str(error)}
    else:
        try:
            output, _ = child.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGINT)  # lets Python say where it was, and save
            try:
                output, _ = child.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                output, _ = child.communicate()
            result["reason"] = f"stopped after {seconds:.0f} s"
        result["returncode"] = child.returncode
    result["seconds"] = round(time.monotonic() - started, 1)
    result["ok"] = result["returncode"] == 0 and "reason" not in result
    log.write(f"\n######## {' '.join(result['command'])}\n{output}\n{summary_of(result)}\n")
    return result | {"output": output}


def summary_of(result: dict) -> str:
    state = "passed" if result["ok"] else f"FAILED ({result.get('reason', result['returncode'])})"
    return f"######## {state} in {result['seconds']} s"


class Deadline:
    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


# -- the parts -------------------------------------------------------------------------------------


def read_pytest(output: str) -> dict:
    """Counts of the last line, or of the lines so far where there is none; names of failures."""
    counts = dict.fromkeys(OUTCOMES, 0)
    last = re.findall(r"^=+ (.*) in [\d.]+s.*=+$", output, re.MULTILINE)
    if last:
        for number, word in re.findall(r"(\d+) (\w+)", last[-1]):
            word = {"errors": "error"}.get(word, word)
            if word in counts:
                counts[word] = int(number)
    else:
        for word in OUTCOMES:
            counts[word] = len(re.findall(rf"::.* {word.upper()}\b", output))
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)", output, re.MULTILINE)
    return {**counts, "failures": sorted(set(failures))}


def run_pytest(arguments: Sequence[str], seconds: float, log: Log) -> dict:
    command = [sys.executable, "-m", "pytest", "--device", "cuda", "-v", "--tb=short", *arguments]
    result = run_command(command, seconds, log)
    result |= read_pytest(result.pop("output"))
    if result["returncode"] == 5 and "reason" not in result:  # nothing was selected
        result["ok"] = True
    return result


def part_tests(args: argparse.Namespace, log: Log) -> dict:
    deadline = Deadline(args.limit)
    files = args.tests or sorted(path.name for path in TESTS.glob("test_*.py"))
    files.sort(key=lambda name: name != "test_cuda.py")  # what only this machine can run: first

    def one(name: str) -> tuple[str, dict]:
        if deadline.left() < 1:
            return name, {"ok": False, "reason": "no time was left", "seconds": 0.0}
        return name, run_pytest([name], deadline.left(), log)

    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        results = dict(pool.map(one, files))
    totals = {word: sum(one.get(word, 0) for one in results.values()) for word in OUTCOMES}
    return {"ok": all(one["ok"] for one in results.values()), **totals, "files": results}


def find_sanitizer() -> str | None:
    """The toolkit's, or that of `pip install nvidia-cuda-sanitizer-api`."""
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    packages = sorted(path for entry in sys.path for path in Path(entry).glob("nvidia/cu*"))
    for folder in (None, home / "bin", *(path / "bin" for path in packages)):
        found = shutil.which("compute-sanitizer", path=folder and str(folder))
        if found:
            return found
    return None


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    if tool != "memcheck":  # torch's kernels are not ours to judge, and slow to watch
        command += ["--kernel-name", "kernel_substring=torch_ext"]
    if tool == "racecheck":
        command += ["--racecheck-report", "all"]
    return [*command, sys.executable, str(HERE / "exercise.py"), "--device", "cuda"]


def read_sanitizer(output: str) -> dict:
    """The tool's own count, in both of its forms, and what exercise.py said."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", output)
    runs = re.findall(r"^(\d+ runs, \d+ wrong)$", output, re.MULTILINE)
    return {"summary": found[-1] if found else None, "exercise": runs[-1] if runs else None}


def part_sanitizer(args: argparse.Namespace, log: Log) -> dict:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return {"ok": False, "reason": "compute-sanitizer is not in PATH, CUDA_HOME or pip"}
    deadline, results = Deadline(args.limit), {}
    for index, tool in enumerate(TOOLS):
        seconds = deadline.left() / (len(TOOLS) - index)
        # torch's caching allocator would hide overruns from memcheck and old data from initcheck
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = run_command(sanitizer_command(sanitizer, tool), seconds, log, environment)
        result |= read_sanitizer(result.pop("output"))
        result["ok"] = result["ok"] and result["summary"] is not None
        results[tool] = result
    return {"ok": all(result["ok"] for result in results.values()), "tools": results}


def part_graphs(args: argparse.Namespace, log: Log) -> dict:
    tests = ["test_cuda.py", "test_consumers.py::test_cuda_graph", "-k", "graph"]
    result = run_pytest(tests, args.limit, log)
    if result.get("passed", 0) == 0:
        result["ok"] = False
        result.setdefault("reason", "no test ran")
    return result


def run_benchmark(
    args: argparse.Namespace,
    log: Log,
    name: str,
    options: Sequence[str],
    goals: Callable[[dict], list[dict]],
    program: str = "run.py",
) -> dict:
    """A benchmark on the GPU. Stopped at its limit it still writes what it has measured."""
    file = args.out.resolve() / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / program), "--name", name, "--out", str(file.parent)]
    command += [*options, *(["--quick"] if args.quick else [])]
    result = run_command(command, args.limit, log)
    del result["output"]
    if file.exists():
        result["result"] = json.loads(file.read_text())
        result["goals"] = goals(result["result"])
        result["ok"] = result["ok"] and all(goal["met"] for goal in result["goals"])
    return result


def part_benchmark(args: argparse.Namespace, log: Log) -> dict:
    modes = ["--mode", "forward", "backward", "forward+backward", "step", "memory"]
    return run_benchmark(
        args,
        log,
        "gpu",
        [*on_cuda(args, "gpu"), *modes, "--peers", "none"],
        lambda result: share_goals(result) + mamba_goals(result),
    )


def part_peers(args: argparse.Namespace, log: Log) -> dict:
    options = [*on_cuda(args, "gpu-peers"), "--mode", "layer", "--shapes"]
    return run_benchmark(args, log, "gpu-peers", options, ratio_goals)


def part_matrix(args: argparse.Namespace, log: Log) -> dict:
    return run_benchmark(args, log, "gpu-matrix", [], matrix_goals, "gpu_matrix_memory.py")


def on_cuda(args: argparse.Namespace, name: str) -> list[str]:
    """What tells run.py that it is on a GPU, and where its tables go."""
    return ["--device", "cuda", "--markdown", str(args.out.resolve() / f"{name}.md")]


def goal_of(what: str, goal: float, found: float | None) -> dict:
    """What was not measured is not met."""
    return {"what": what, "goal": goal, "found": found, "met": found is not None and found >= goal}


def share_goals(result: dict) -> list[dict]:
    """Shares of copy bandwidth that we promise on a GPU."""
    sys.path.insert(0, str(HERE))
    from shapes import DEFAULT_OPERATORS, GPU_GOALS

    shares = {
        (row["shape_name"], row["dtype"], row["mode"], row["operator"]): row["fraction_of_copy"]
        for row in result["operators"]
    }
    return [
        goal_of(
            f"{name} {mode}, {shape} {dtype}: share of copy bandwidth",
            goal,
            shares.get((shape, dtype, mode, name)),
        )
        for (shape, dtype, mode), goal in GPU_GOALS.items()
        for name in DEFAULT_OPERATORS
    ]


def mamba_goals(result: dict) -> list[dict]:
    """Shares of the floor and of copy bandwidth that we promise of Mamba's operators and steps."""
    sys.path.insert(0, str(HERE))
    from shapes import GPU_MAMBA_GOALS, GPU_MAMBA_SHAPES, GPU_MAMBA_STEP_GOALS

    rows = {
        (row["operator"], row["mode"], row["shape_name"]): row
        for row in result["mamba"]
        if row["dtype"] == "bfloat16"
    }
    found = []
    for (name, mode), goal in GPU_MAMBA_GOALS.items():
        function = name.partition("[")[0]
        key, of = ("fraction_of_roof", "the floor")
        if function == "causal_conv1d":
            key, of = ("fraction_of_copy", "copy bandwidth")
        for shape in GPU_MAMBA_SHAPES[function]:
            what = f"{name} {mode}, {shape} bfloat16: share of {of}"
            found.append(goal_of(what, goal, rows.get((name, mode, shape), {}).get(key)))
    steps = {
        (row["function"], row["batch"]): row["fraction_of_copy"]
        for row in result["mamba_steps"]
        if row["dtype"] == "bfloat16"
    }
    for (function, batch), goal in GPU_MAMBA_STEP_GOALS.items():
        what = f"{function}, B = {batch} bfloat16: share of copy bandwidth"
        found.append(goal_of(what, goal, steps.get((function, batch))))
    return found


def matrix_goals(result: dict) -> list[dict]:
    """Times in which mlstm and ssd are to be done, as ratios: to those that TFLA's authors published of an H100, and to
    those of their kernels here, where they are installed; and shares of copy bandwidth of steps."""
    sys.path.insert(0, str(HERE))
    from shapes import (
        GPU_MATRIX_PUBLISHED,
        GPU_MATRIX_STEP_GOALS,
        GPU_MATRIX_STEP_SHAPES,
        gpu_matrix_goal,
        parse_matrix_shape,
    )

    times = {
        (row["operator"], row["shape_name"], row["mode"]): row["seconds_min"]
        for row in result["matrix"]
        if row["dtype"] == "bfloat16"
    }
    found = []

    def goal(what: str, theirs: dict[str, float], ours: dict[str, float | None]) -> None:
        for mode, seconds in theirs.items():
            if wanted := gpu_matrix_goal(theirs, mode):
                is_there = ours.get(mode)
                found.append(
                    goal_of(
                        what.format(mode),
                        round(seconds / wanted, 2),
                        is_there and seconds / is_there,
                    )
                )

    for (name, shape), published in GPU_MATRIX_PUBLISHED.items():
        what = f"{name} {{}}, {shape} bfloat16: ratio to what is published of an H100"
        goal(what, published, {mode: times.get((name, shape, mode)) for mode in published})
    beside: dict[tuple[str, str, str], list[dict]] = {}
    for row in result["peers"]:
        if row["dtype"] != "bfloat16":
            continue
        name, _, mode = row["what"].partition(": ")
        if mode and row["peer"].startswith("mlstm_kernels"):
            beside.setdefault((name, row["shape_name"], row["peer"]), []).append(row)
        else:  # not slower, at any shape
            what = f"{row['what']}, {'x'.join(map(str, row['shape']))} bfloat16: ratio to {row['peer']}"
            found.append(goal_of(what, 1.0, row["ratio"]))
    for (name, shape, peer), rows in beside.items():
        theirs, ours = (
            {row["what"].partition(": ")[2]: row[whose]["seconds_min"] for row in rows}
            for whose in ("theirs", "ours")
        )
        goal(f"{name} {{}}, {shape} bfloat16: ratio to {peer}", theirs, ours)
    steps = {
        (row["operator"], tuple(row["shape"]), row["batch"]): row["fraction_of_copy"]
        for row in result["matrix_steps"]
        if row["dtype"] == "bfloat16"
    }
    for name, shape in GPU_MATRIX_STEP_SHAPES.items():
        for batch, share in GPU_MATRIX_STEP_GOALS.items():
            what = f"{name}_step_, B = {batch} bfloat16: share of copy bandwidth"
            found.append(
                goal_of(what, share, steps.get((name, parse_matrix_shape(shape)[2:], batch)))
            )
    return found


def ratio_goals(result: dict) -> list[dict]:
    """Peers that ours must not be slower than, at any shape; Mamba's, which take a compiler and
    minutes to install, where they are here."""
    sys.path.insert(0, str(HERE))
    from shapes import GPU_MAMBA_PEERS, GPU_PEERS_TO_BEAT

    found = []
    for row in result["peers"]:
        if row["peer"] in GPU_MAMBA_PEERS:
            shape = "x".join(map(str, row["shape"]))
            what = f"{row['what']}, {shape} {row['dtype']}: ratio to {row['peer']}"
            found.append(goal_of(what, 1.0, row["ratio"]))
    for peer in GPU_PEERS_TO_BEAT:
        rows = [row for row in result["peers"] if row["peer"] == peer]
        for row in rows:
            shape = "x".join(map(str, row["shape"]))
            what = f"{row['what']}, {shape} {row['dtype']}: ratio to {peer}"
            found.append(goal_of(what, 1.0, row["ratio"]))
        for row in result["not_run"]:
            if row["peer"] == peer:
                shape = "x".join(map(str, row.get("shape", ())))
                missing = goal_of(f"{row['what']} {shape}: ratio to {peer}", 1.0, None)
                found.append(missing | {"reason": row["reason"]})
        if not any(peer in goal["what"] for goal in found):
            found.append(goal_of(f"ratio to {peer}", 1.0, None) | {"reason": "not timed"})
    return found


PARTS: dict[str, Callable[[argparse.Namespace, Log], dict]] = {
    "tests": part_tests,
    "sanitizer": part_sanitizer,
    "graphs": part_graphs,
    "benchmark": part_benchmark,
    "peers": part_peers,
    "matrix": part_matrix,
}


def run_parts(args: argparse.Namespace, machine: dict) -> dict:
    """Runs the parts that were asked for and writes the JSON after each of them."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu_check.json"
    result: dict = {"parts": {}}
    if file.exists():
        try:
            result = json.loads(file.read_text())
        except ValueError:
            print(f"{file.name} was not JSON and is replaced")
    if result.get("machine", {}).get("commit") != machine.get("commit"):
        result = {"parts": {}}  # of another state of the sources
    result["machine"] = machine
    log = Log(args.out / "gpu_check.log")
    log.write(f"\n######## {time.strftime('%Y-%m-%d %H:%M:%S')} {json.dumps(machine)}\n")
    for name in args.part:
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        try:
            part = PARTS[name](args, log)
        except Exception as error:  # the next part may tell more
            part = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
        part["seconds"] = round(time.monotonic() - started, 1)
        result["parts"][name] = part
        result["ok"] = all(one["ok"] for one in result["parts"].values())
        file.write_text(json.dumps(result, indent=1) + "\n")
        print("\n".join(describe(name, part)), flush=True)
    return result


def describe(name: str, part: dict) -> list[str]:
    """A line for the part, and one for each thing in it that is not as it should be."""
    state = "passed" if part["ok"] else "FAILED"
    counts = ", ".join(f"{part[word]} {word}" for word in OUTCOMES if part.get(word))
    lines = [f"{name:<10} {state:<7} {part['seconds']:>7.1f} s  {counts}"]
    if "reason" in part:
        lines.append(f"    {part['reason']}")
    for group in ("files", "tools"):
        for key, one in part.get(group, {}).items():
            if not one["ok"]:
                why = one.get("reason") or one.get("summary") or f"status {one.get('returncode')}"
                lines.append(f"    {key}: {why}")
                lines += [f"        {failure}" for failure in one.get("failures", [])[:10]]
    for row in part.get("result", {}).get("not_run", []):
        shape = " at " + "x".join(map(str, row["shape"])) if row.get("shape") else ""
        lines.append(f"    not timed: {row['peer']}, {row['what']}{shape}: {row['reason']}")
    for goal in part.get("goals", []):
        found = "not measured" if goal["found"] is None else f"{goal['found']:.2f}"
        met = "met" if goal["met"] else "MISSED"
        reason = f" ({goal['reason']})" if "reason" in goal else ""
        lines.append(f"    {met}: {goal['what']}: {found}, goal {goal['goal']:.2f}{reason}")
    return lines


def describe_machine() -> dict:
    sys.path.insert(0, str(HERE))
    from gpu import CudaBackend
    from measure import Machine, available_cpus

    return Machine(available_cpus()).describe() | CudaBackend().describe()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py: there is no NVIDIA GPU that torch can use here.")
        return 1
    args.out = args.out.resolve()
    result = run_parts(args, describe_machine())
    print(f"Written: {args.out / 'gpu_check.json'}, {args.out / 'gpu_check.log'}")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
