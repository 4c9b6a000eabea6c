"""How a time is taken: allocator, pinning, calibration, samples; and what machine this is."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed to it, so that a fresh output is memory that was used before.

    glibc serves blocks of more than 32 MiB by mmap and returns them at once: every call would then
    pay for having the kernel map and clear each 4 KiB page of its output, which costs more than the
    operator itself. Applies to this whole process, so to the peers as well.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def set_threads(threads: int, cpus: list[int]) -> None:
    """`threads` workers on that many CPUs; every thread of this process, the pool's included."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cpus[:threads])
        except OSError:  # a thread that ended in between
            continue


def available_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def first_line(error: BaseException) -> str:
    """Why something could not run, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@dataclass
class Samples:
    """Seconds per call, one entry per round; each is the mean over `calls` calls in a row."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    page_faults: float = 0.0  # per call, mean over all rounds
    # On a GPU `seconds` is the time of the kernels in a CUDA graph; this is a call from Python.
    eager_seconds: float | None = None
    timed_as: str = "calls"

    @property
    def best(self) -> float:
        return min(self.seconds)

    def summary(self) -> dict:
        if len(self.seconds) > 1:
            low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        else:
            low = high = self.seconds[0]
        result = {
            "seconds_min": self.best,
            "seconds_quartile_1": low,
            "seconds_median": statistics.median(self.seconds),
            "seconds_quartile_3": high,
            "seconds_max": max(self.seconds),
            "rounds": len(self.seconds),
            "calls_per_round": self.calls,
            "page_faults_per_call": round(self.page_faults, 2),
        }
        if self.eager_seconds is not None:
            result |= {"eager_seconds": self.eager_seconds, "timed_as": self.timed_as}
        return result


@dataclass(frozen=True)
class Effort:
    """How long to look: rounds until `seconds` have passed, at least `rounds` of them; a sample
    repeats a short call until it lasts `sample_seconds`."""

    seconds: float
    rounds: int
    sample_seconds: float


LONG_ROUND = 4.0  # seconds: three rounds of that length have to do


def _time_calls(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def _warm_up(call: Callable[[], object]) -> float:
    """First calls pay for dispatch caches, the thread pool, page faults. Seconds of a later one."""
    total, once = 0.0, 0.0
    for calls in (1, 1, 1, 10):
        once = _time_calls(call, calls)
        total += once * calls
        if total > 0.3:
            break
    return once


def measure(
    calls: dict[str, Callable[[], object]],
    effort: Effort,
    around: Callable[[], object] | None = None,
) -> dict[str, Samples]:
    """Times several callables in turn: every round takes one sample of each.

    Taking turns lets a slow phase of the machine hit all of them; short samples let some of them
    fall between two disturbances. `around` (the calibration) runs before and after.
    """
    gc.collect()
    gc.disable()
    try:
        once = {name: _warm_up(call) for name, call in calls.items()}
        results = {
            name: Samples(max(1, round(effort.sample_seconds / once[name]))) for name in calls
        }
        round_seconds = sum(once[name] * result.calls for name, result in results.items())
        least = effort.rounds if round_seconds < LONG_ROUND else min(3, effort.rounds)
        rounds = max(least, min(1000, round(effort.seconds / round_seconds)))
        faults = dict.fromkeys(calls, 0)
        if around is not None:
            around()
        for _ in range(rounds):
            for name, call in calls.items():
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                results[name].seconds.append(_time_calls(call, results[name].calls))
                faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        if around is not None:
            around()
    finally:
        gc.enable()
    for name, result in results.items():
        result.page_faults = faults[name] / (rounds * result.calls)
    return results


class CpuTimer:
    """What the comparisons with peers are timed by; gpu.GraphTimer is its twin.

    A variant is a list of equal calls on different buffers. One is enough here: what the caches
    keep of the inputs they keep for everybody.
    """

    device = "cpu"
    sets = 1

    def __init__(self, effort: Effort):
        self.effort = effort

    def measure(
        self, variants: dict[str, list[Callable[[], object]]], graph: bool = True
    ) -> dict[str, Samples]:
        return measure({name: calls[0] for name, calls in variants.items()}, self.effort)


class Calibration:
    """The machine's own limits at one working set, each the best of all times it was asked."""

    def __init__(self, working_set: int, threads: int, seconds: float):
        self.working_set = working_set
        self.threads = threads
        self.seconds = seconds
        self.rates: dict[str, float] = {}
        self.runs = 0

    def run(self) -> None:
        self.runs += 1
        if self.runs > 4:  # operators of one size share it: by then it has been asked often enough
            return
        for kind, arrays in (("triad", 3), ("copy", 2)):
            elements = self.working_set // (4 * arrays)
            for store, nontemporal in (("plain", False), ("nontemporal", True)):
                self._keep_best(f"{kind} {store}", kind, elements, nontemporal)

    def _keep_best(self, name: str, kind: str, elements: int, nontemporal: bool) -> None:
        rate = calibrate(kind, elements, nontemporal, self.threads, self.seconds)
        self.rates[name] = max(rate, self.rates.get(name, 0.0))

    def best(self, kind: str) -> float:
        """GB/s with whichever kind of store is faster here."""
        return max(rate for name, rate in self.rates.items() if name.startswith(kind))


L1_ELEMENTS = 2048  # per thread: two arrays of 8 KiB


def calibrate(kind: str, elements: int, nontemporal: bool, threads: int, seconds: float) -> float:
    """GB/s of copy and triad (bytes that the program asks for), G results/s of exp and fma."""
    from torch_ext import _C

    return float(_C.calibrate(kind, elements, nontemporal, threads, seconds)["rate"])


def exp_rate(threads: int, seconds: float, rounds: int = 5) -> float:
    return max(
        calibrate("exp", L1_ELEMENTS * threads, False, threads, seconds) for _ in range(rounds)
    )


# --------------------------------------------------------------------------------------------------


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def cache_bytes(level: int) -> int | None:
    """Size of one data or unified cache of that level, as CPU 0 sees it."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if _read(index / "level") == str(level) and _read(index / "type") != "Instruction":
            size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
            if size:
                return int(size[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[size[2]]
    return None


def _cpu_model() -> str:
    info = _read("/proc/cpuinfo")
    fields = dict(
        re.split(r"\s*:\s*", line, maxsplit=1) for line in info.splitlines() if ":" in line
    )
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        return "unknown"
    return (commit or "unknown") + (" with local changes" if changes else "")


def _steal_and_total() -> tuple[int, int]:
    ticks = [int(tick) for tick in _read("/proc/stat").partition("\n")[0].split()[1:9]] or [0] * 8
    return ticks[7], sum(ticks)


class Machine:
    """What a reader must know to compare: nothing that names the host or its paths."""

    def __init__(self, cpus: list[int]):
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self.steal = _steal_and_total()
        self.cpus = cpus

    def describe(self) -> dict:
        from torch_ext import _C

        steal, total = (
            now - then for now, then in zip(_steal_and_total(), self.steal, strict=True)
        )
        return {
            "cpu": _cpu_model(),
            "cpus_available": len(self.cpus),
            "l1d_bytes": cache_bytes(1),
            "l2_bytes": cache_bytes(2),
            "l3_bytes": cache_bytes(3),
            "isas": [str(isa) for isa in _C.isas()],
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch_ext": _C.build_info()["version"],
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
            "load_average_at_start": round(self.load, 2),
            "stolen_cpu_percent": round(100 * steal / total, 2) if total else 0.0,
        }
