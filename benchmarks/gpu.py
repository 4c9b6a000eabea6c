"""The GPU side of a run: CUDA graphs replayed in turn, bandwidth and launches, operators.

Everything that touches CUDA is in `CudaBackend`; the rest runs on any device, and in the tests on
the CPU with another backend.
"""

from __future__ import annotations

import gc
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from measure import Effort, Samples, first_line
from operators import make_call
from shapes import GPU_GOALS, Operator

Call = Callable[[], object]

# As one graph: enough that launching it costs nothing beside its kernels.
GRAPH_CALLS = 10
MOST_SETS = 20
BUFFER_BYTES = 2**28  # of each array of copy and triad
PRODUCT_SIZE = 8192  # of the square matrices that are multiplied
LONG_SECONDS = 15.0  # where all rounds would take longer, five have to do
WORKING_SET = 4  # times L2: no call finds there what an earlier one has left


class Backend(Protocol):
    device: str

    def l2_bytes(self) -> int: ...
    def describe(self) -> dict: ...
    def arithmetic_peak(self) -> dict[str, float]: ...
    def clocks(self) -> str: ...
    def synchronize(self) -> None: ...
    def warm_up(self, calls: Sequence[Call]) -> None: ...
    def capture(self, calls: Sequence[Call], keep: int) -> Call: ...
    def seconds(self, work: Call) -> float: ...
    def peak_bytes(self, call: Call) -> int: ...


class CudaBackend:
    device = "cuda"

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)

    def l2_bytes(self) -> int:
        return int(self.properties.L2_cache_size)

    def describe(self) -> dict:
        major, minor = torch.cuda.get_device_capability()
        return {
            "gpu": self.properties.name,
            "compute_capability": f"{major}.{minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "gpu_memory_bytes": self.properties.total_memory,
            "gpu_l2_bytes": self.l2_bytes(),
            "cuda": torch.version.cuda,
            "driver": self._query("driver_version"),
            "cudnn": torch.backends.cudnn.version(),
        }

    def arithmetic_peak(self) -> dict[str, float]:
        """By multiprocessors and highest clock: each starts four warps' instructions per clock, and
        has 16 results of its special function units."""
        per_ns = self.properties.multi_processor_count * self.properties.clock_rate * 1e-6  # kHz
        return {
            "special_per_ns": 16 * per_ns,
            "issue_per_ns": 4 * self.properties.warp_size * per_ns,
        }

    def clocks(self) -> str:
        return self._query("clocks.sm,clocks.mem,temperature.gpu,power.draw")

    def _query(self, fields: str) -> str:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return answer.stdout.strip() or "unknown"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def warm_up(self, calls: Sequence[Call]) -> None:
        """On another stream, as a capture asks for: compilation, autotuning, cuDNN's plans."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call], keep: int) -> Call:
        """One graph of all calls; the last `keep` results stay alive, so that outputs rotate."""
        graph = torch.cuda.CUDAGraph()
        results: deque = deque(maxlen=keep)
        with torch.cuda.graph(graph):
            for call in calls:
                results.append(call())
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def seconds(self, work: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before


def sets_needed(bytes_per_call: int, l2_bytes: int) -> int:
    """How many sets of buffers take turns so that together they exceed WORKING_SET times L2."""
    return max(1, min(MOST_SETS, -(-WORKING_SET * l2_bytes // max(1, bytes_per_call))))


class GraphTimer:
    """Variants as CUDA graphs of GRAPH_CALLS or more calls, replayed in turn, timed by events.

    A variant that cannot be captured is timed call by call, and says so in `timed_as`.
    """

    def __init__(self, backend: Backend, effort: Effort, sets: int = 1):
        self.backend, self.effort, self.sets = backend, effort, sets
        self.device = backend.device

    def measure(self, variants: dict[str, list[Call]], graph: bool = True) -> dict[str, Samples]:
        gc.collect()
        gc.disable()
        try:
            works, results = {}, {}
            for name, calls in variants.items():
                repeats = -(-GRAPH_CALLS // len(calls)) if graph else 1
                many = calls * repeats
                works[name], how = self._prepare(many, len(calls), graph)
                results[name] = Samples(len(many), timed_as=how)
            round_seconds = sum(self.backend.seconds(work) for work in works.values())
            rounds = min(1000, round(self.effort.seconds / max(round_seconds, 1e-9)))
            least = self.effort.rounds
            if least * round_seconds > LONG_SECONDS:
                least = min(5, least)
            for _ in range(max(least, rounds)):
                for name, work in works.items():
                    results[name].seconds.append(self.backend.seconds(work) / results[name].calls)
            for name, calls in variants.items():
                results[name].eager_seconds = self._eager(calls)
        finally:
            gc.enable()
        return results

    def _prepare(self, calls: list[Call], keep: int, graph: bool) -> tuple[Call, str]:
        def one_by_one() -> None:
            for call in calls:
                call()

        self.backend.warm_up(calls[:keep])
        if not graph:
            return one_by_one, "calls"
        try:
            return self.backend.capture(calls, keep), "graph"
        except RuntimeError as error:
            self.backend.synchronize()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            return one_by_one, f"calls, because no graph could be captured: {reason}"

    def _eager(self, calls: list[Call]) -> float:
        """Seconds per call from Python, the device's share included where it is the longer one."""
        best = float("inf")
        for _ in range(3):
            self.backend.synchronize()
            start = time.perf_counter()
            for call in calls:
                call()
            self.backend.synchronize()
            best = min(best, (time.perf_counter() - start) / len(calls))
        return best


# -- the machine's limits --------------------------------------------------------------------------


class Bandwidth:
    """Copy and triad through torch's own kernels, on arrays much larger than L2."""

    def __init__(self, device: str, array_bytes: int = BUFFER_BYTES):
        elements = array_bytes // 4
        self.bytes = {"copy": 2 * elements * 4, "triad": 3 * elements * 4}
        x, y, z = (torch.randn(elements, device=device) for _ in range(3))
        self.calls: dict[str, Call] = {
            "copy": lambda: x.copy_(y),
            "triad": lambda: torch.add(y, z, alpha=0.5, out=x),
        }

    def variants(self) -> dict[str, list[Call]]:
        return {kind: [call] for kind, call in self.calls.items()}

    def rates(self, samples: dict[str, Samples]) -> dict[str, float]:
        """GB/s of the best round."""
        return {kind: size / samples[kind].best * 1e-9 for kind, size in self.bytes.items()}

    def time(
        self, timer: GraphTimer, calls: list[Call], moved: int
    ) -> tuple[float, dict[str, float], dict]:
        """`calls`, which move so many bytes each, in turn with copy and triad: the seconds of one, the rates
        beside it, and what a row of the results says of both."""
        clocks = timer.backend.clocks()
        samples = timer.measure({"call": calls, **self.variants()})
        rates, seconds = self.rates(samples), samples["call"].best
        row = {
            **samples["call"].summary(),
            "bytes_moved": moved,
            "sets_of_buffers": len(calls),
            "gigabytes_per_second": moved / seconds * 1e-9,
            "calibration_gigabytes_per_second": rates,
            "clocks_before": clocks,
            "clocks_after": timer.backend.clocks(),
        }
        return seconds, rates, row


class Products:
    """Matrix products by torch's own kernels, of random bfloat16 numbers: zeros are faster."""

    def __init__(self, device: str, size: int = PRODUCT_SIZE):
        x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(x)
        self.multiply_adds = size**3
        self.call: Call = lambda: torch.matmul(x, y, out=out)

    def variants(self) -> dict[str, list[Call]]:
        return {"products": [self.call]}

    def rate(self, samples: dict[str, Samples]) -> float:
        """Multiply-adds per nanosecond of the best round."""
        return self.multiply_adds / samples["products"].best * 1e-9


def launch_overhead(timer: GraphTimer) -> dict:
    """The time of a kernel that does next to nothing, in a graph and called from Python."""
    tiny = torch.zeros(1, device=timer.device)
    samples = timer.measure({"launch": [lambda: tiny.add_(1.0)] * GRAPH_CALLS * 2})["launch"]
    return samples.summary()


CHAIN = 64


def _exp_chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(CHAIN):
        x = torch.exp(-x)
    return x


def _fma_chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(4 * CHAIN):
        x = x * 0.99 + 0.01
    return x


def arithmetic_rates(timer: GraphTimer, elements: int = 2**24) -> dict:
    """Exponentials and multiply-adds per nanosecond, from chains that torch.compile fuses into one
    kernel: 64 and 256 operations for each value that is read and written."""
    rates: dict = {}
    x = torch.rand(elements, device=timer.device)
    for kind, chain, length in (("exp", _exp_chain, CHAIN), ("fma", _fma_chain, 4 * CHAIN)):
        try:
            call = torch.compile(chain)
            samples = timer.measure({kind: [lambda call=call: call(x)]})[kind]
        except Exception as error:  # whatever the compiler lacks, a run goes on without the rate
            rates[f"{kind}_per_ns"] = None
            rates[f"no_{kind}_because"] = first_line(error)
            continue
        rates[f"{kind}_per_ns"] = elements * length / samples.best * 1e-9
    return rates


# -- operators -------------------------------------------------------------------------------------


def time_operator(
    name: str,
    operator: Operator,
    mode: str,
    shape_name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    timer: GraphTimer,
    bandwidth: Bandwidth,
    exp_rate: float | None,
) -> dict:
    """One row, with copy and triad timed in turn with the operator; shares are of copy."""
    batch, steps, dim = shape
    elements = batch * steps * dim
    moved = elements * dtype.itemsize * operator.tensors_moved(mode)
    working_set = elements * dtype.itemsize * operator.tensors_alive(mode)
    sets = sets_needed(working_set, timer.backend.l2_bytes())
    calls = [
        make_call(operator, mode, shape, dtype, device=timer.device, seed=seed)
        for seed in range(sets)
    ]
    seconds, rates, timed = bandwidth.time(timer, calls, moved)
    bandwidth_seconds = moved / (rates["copy"] * 1e9)
    exp_seconds = elements * operator.exps_needed(mode) / (exp_rate * 1e9) if exp_rate else 0.0
    roof = max(bandwidth_seconds, exp_seconds)
    goal = GPU_GOALS.get((shape_name, str(dtype).removeprefix("torch."), mode))
    share = bandwidth_seconds / seconds
    return {
        "operator": name,
        "mode": mode,
        "shape": list(shape),
        "shape_name": shape_name,
        "in_l2": False,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": None,
        "isa": "GPU",
        **timed,
        "overhead_seconds": 0.0,
        "working_set_bytes": working_set,
        "exp_per_nanosecond": exp_rate,
        "bound_by": "bandwidth" if bandwidth_seconds >= exp_seconds else "exp",
        "fraction_of_triad": moved / (rates["triad"] * 1e9) / seconds,
        "fraction_of_copy": share,
        "fraction_of_roof": roof / seconds,
        "goal": goal,
        "meets_goal": goal is None or share >= goal,
    }


def peak_memory(backend: Backend, cases: Sequence[dict]) -> Iterator[dict]:
    """memory.py's cases by what the caching allocator handed out at most beyond what was there."""
    from memory import make_case

    for case in cases:
        try:
            call = make_case(case, backend.device)
            call()  # a first call may compile, plan and allocate workspaces
            yield {**case, "peak_bytes": backend.peak_bytes(call)}
        except Exception as error:  # a peer that is missing or fails must not end the run
            yield {**case, "failed": first_line(error)}
