#!/usr/bin/env python
"""How long the CUDA kernels should take: a model, so that a measurement has something to stand beside.

    python benchmarks/gpu_model.py                     a table; also results/gpu_model.json and .md
    python benchmarks/gpu_model.py --device A100 --shapes 8x4096x1024:bfloat16

Everything this prints is a prediction, not a measurement. The time of a call is the longest of what cannot be shared
out better, plus its launches:

    memory    bytes that the kernel moves / bandwidth of a copy
    issue     instructions (kernel_budget.json, the usual way) / instructions per second, which few
              warps do not reach
    special   exponentials and reciprocals / their rate
    latency   bytes read / (bytes on their way at once / time of one access)
    chain     few channels: blocks hand the state on, one hop per 32 tiles

causal_conv1d, with four taps and SiLU, has no such pipeline and no chain: its latency is that of blocks
which wait for a tile and then compute it, one after the other.

selective_scan, with 16 states, D, z, delta_bias, softplus, and B and C per token, is as the convolution; a block
waits twice in each of its tiles. Where blocks are few, time is cut into segments, which all but
one walk through twice. Smaller problems than those get kernels of their own, which the model does
not know: it takes the others' instructions.

mlstm and ssd (shapes BxTxHxKxV or BxTxHxKxVxG; float32 as at torch's setting "highest", in three parts) are several
kernels, and their times are added up. Of each:

    memory    inputs and results once, and the states at the starts of chunks, written and read; so are the
              gradients of states, and sums over heads that share queries and keys
    issue     products by warps (m16n8k16) x instructions per product; what is made once in a chunk (gates, scores'
              weights in the backward) is counted where the usual way leads through it
    products  the same products / their rate
    latency   a block that steps from tile to tile, or of which several come one after the other
    chain     the stabiliser's gradient: a warp goes through all of time, 32 steps at once

It is optimistic where the kernels wait for their own results, and does not count the exchange
between blocks. "roof" is what no implementation can beat: the bytes of shapes.py and the launch; of
selective_scan the bytes or the instructions there, of mlstm and ssd the bytes or the products, whichever take longer.
Measured times and the model's error stand beside where gpu_check.py, run.py or gpu_matrix_memory.py have written them
(--measured FILE...), or a list of {"device", "operator", "direction", "shape", "dtype", "seconds"}. Those of mlstm and
ssd are of the operator behind them: backward as it is, forward with torch's kernels for the gates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel_budget import BUDGET, resident_blocks
from report import duration
from shapes import (
    GPU_MATRIX_GOALS,
    GPU_MATRIX_PRECISIONS,
    GPU_MATRIX_PUBLISHED,
    GPU_MATRIX_SHAPES,
    MAMBA_OPERATORS,
    MATRIX_OPERATORS,
    OPERATORS,
    is_matrix_shape,
    parse_matrix_shape,
)

HERE = Path(__file__).resolve().parent
LABEL = "prediction, not a measurement"

LATENCY = (
    0.75e-6  # seconds of a read from memory under load; commonly reported for H100, not measured
)
HOP = 1.5e-6  # seconds to publish a state and have it read: two accesses; a guess
WARP_ISSUE = 0.4  # instructions per clock of a warp whose steps wait for each other; a guess
LAUNCH = 3e-6  # seconds; commonly reported are 2 to 4 outside of graphs
COPY_SHARE = 4.3 / 4.8  # of the datasheet's bandwidth that a copy reaches: measured on an H200
EFFECT_SHARE = 0.7  # of the scan's instructions: what a segment does from zero; a guess
PEER_SHARE = 0.8  # of a copy's bandwidth: what accelerated-scan is expected to reach
GOAL = 1.4  # times the roof
MATMUL_SHARE = (
    790 / 989
)  # of the datasheet's bfloat16 products that large matrices reach: measured on an H200
# ... that mma.sync reaches, as reported for H100, whose full rate takes other instructions; before, those of matrices.
MMA_SHARE = {"90a": 0.62, "80": MATMUL_SHARE}
DOUBLE_ADD = 20  # clocks of a sum in double that the next one waits for, with its shuffle; a guess


@dataclass(frozen=True)
class Device:
    name: str
    architecture: str  # whose limits count
    code: str  # the architecture in kernel_budget.json whose instructions count
    multiprocessors: int
    clock: float  # Hz
    copy: float  # bytes read and written per second
    tensor: float  # operations of dense bfloat16 products with float32 sums per second, datasheet
    source: str

    @property
    def issue(self) -> float:
        """Instructions of single threads per second: four warps of 32 per clock."""
        return self.multiprocessors * 128 * self.clock

    @property
    def special(self) -> float:
        """Exponentials or reciprocals per second: 16 per clock (CUDA C++ Programming Guide)."""
        return self.multiprocessors * 16 * self.clock

    @property
    def mma(self) -> float:
        """Products m16n8k16 of bfloat16 by warps per second."""
        return self.tensor * MMA_SHARE[self.code] / (2 * 16 * 8 * 16)


DEVICES = {
    device.name: device
    for device in (
        Device(
            "H200",
            "90a",
            "90a",
            132,
            1.98e9,
            4.3e12,
            989e12,
            "bandwidth, multiprocessors and clock measured; the clock may be 5 to 10 % lower under load",
        ),
        Device(
            "H100",
            "90a",
            "90a",
            132,
            1.98e9,
            3.35e12 * COPY_SHARE,
            989e12,
            "datasheet of the SXM5 card: 3.35 TB/s, 132 multiprocessors; the clock of an H200",
        ),
        Device(
            "A100",
            "80",
            "80",
            108,
            1.41e9,
            2.039e12 * COPY_SHARE,
            312e12,
            "datasheet of the 80 GB SXM card: 2.039 TB/s, 108 multiprocessors, 1.41 GHz",
        ),
        Device(
            "RTX 4090",
            "89",
            "80",
            128,
            2.52e9,
            1.008e12 * COPY_SHARE,
            165e12,
            "datasheet: 1.008 TB/s, 128 multiprocessors, 2.52 GHz boost; instructions as for sm_80",
        ),
    )
}

SHAPES = (
    ("8x4096x1024", "bfloat16"),
    ("8x1024x4096", "bfloat16"),
    ("64x512x1024", "bfloat16"),
    ("32x2048x2048", "bfloat16"),
    ("1x65536x512", "bfloat16"),
    ("8x2048x1536", "float32"),
    ("8x8192x256", "float32"),
)
DIAGONAL = ("linear_scan", "min_gru", "min_lstm")
MODELLED = (*DIAGONAL, "causal_conv1d", "selective_scan")
MATRIX = tuple(GPU_MATRIX_SHAPES)
MATRIX_DTYPES = ("bfloat16", "float32")
TAPS = 4
DIRECTIONS = ("forward", "backward")


@dataclass
class Prediction:
    device: str
    operator: str
    direction: str
    shape: str
    dtype: str
    # "walking": a block takes all tiles of its channels; "chained": one each; "tiles"; "segments"; "chunks"
    schedule: str
    memory: float
    issue: float
    special: float
    latency: float
    chain: float
    launches: int
    seconds: float
    bound: str
    roof: float
    blocks_per_multiprocessor: int
    products: float = 0.0
    kernels: dict[str, float] | None = None  # the seconds of each, where there are several
    goal: float | None = None  # seconds; else a multiple of the roof
    label: str = LABEL
    peer: str | None = None
    peer_seconds: float | None = None
    peer_source: str | None = None
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """How much longer the measured time is than the predicted one."""
        return None if self.measured is None else self.measured / self.seconds - 1

    @property
    def misses(self) -> bool:
        """Is it predicted to take longer than its goal?"""
        if self.operator in MATRIX:
            return self.goal is not None and self.seconds > self.goal
        return self.seconds > GOAL * self.roof


@dataclass(frozen=True)
class Residency:
    """How a launch's blocks lie over the multiprocessors."""

    device: Device
    blocks: int
    resident: int  # blocks that a multiprocessor has room for
    warps: float  # of a block, per scheduler

    @classmethod
    def of(cls, device: Device, row: dict, launch: dict, blocks: int, shared: int) -> Residency:
        """`row` is the compiled kernel; `shared`, in bytes, is what a block asks for at its launch."""
        threads = launch["threads"]
        static = row["static_shared"]
        resident = resident_blocks(device.architecture, threads, row["registers"], static + shared)
        return cls(device, blocks, resident, threads / 32 / 4)

    @property
    def share(self) -> float:
        """What the busiest multiprocessor does, in even shares: idle others do not help it."""
        even = self.blocks / self.device.multiprocessors
        return math.ceil(even) / even

    @property
    def at_once(self) -> int:
        return min(self.resident, math.ceil(self.blocks / self.device.multiprocessors))

    def issue(self, blocks: int) -> float:
        """Instructions per second of the device, with that many blocks on each multiprocessor."""
        return self.device.issue * min(1.0, blocks * self.warps * WARP_ISSUE)


def parse_shape(shape: str) -> tuple[int, int, int]:
    batch, time, width = (int(size) for size in shape.split("x"))
    return batch, time, width


def predict(
    budget: dict, device: Device, operator: str, direction: str, shape: str, dtype: str
) -> Prediction:
    """The time of one call, with contiguous (batch, time, channel) tensors."""
    if operator in MATRIX:
        return predict_matrix(budget, device, operator, direction, shape, dtype)
    if operator == "causal_conv1d":
        return predict_convolution(budget, device, direction, shape, dtype)
    if operator == "selective_scan":
        return predict_scan(budget, device, direction, shape, dtype)
    batch, time, width = parse_shape(shape)
    kernel = budget["kernels"][f"diagonal_tiles {direction} {operator} {dtype}"]
    launch, row = kernel["launch"], kernel[device.code]
    counts = row["per_element"]
    elements = batch * time * width
    columns = batch * math.ceil(width / launch["channels"])
    tiles = math.ceil(time / launch["steps_per_tile"])
    chained = columns < launch["enough_blocks"] and tiles > 1
    blocks = columns * tiles if chained else columns
    shared = launch["chained_dynamic_shared" if chained else "dynamic_shared"]
    over = Residency.of(device, row, launch, blocks, shared)
    tile_bytes = (
        launch["arrays"] * launch["steps_per_tile"] * launch["channels"] * launch["itemsize"]
    )
    on_the_way = min(over.resident * device.multiprocessors, blocks) * tile_bytes
    on_the_way *= 1 if chained else launch["stages"] - 1
    read = elements * launch["itemsize"] * launch["arrays"]
    parts = {
        "memory": elements
        * launch["itemsize"]
        * (launch["arrays"] + launch["outputs"])
        / device.copy,
        "issue": elements * counts["way"] * over.share / over.issue(over.at_once),
        "special": elements * counts["mufu"] * over.share / device.special,
        "latency": read * LATENCY / on_the_way,
        "chain": tiles // launch["tiles_per_link"] * HOP if chained else 0.0,
    }
    launches = 2 if chained else 1  # chained: flags are set to zero first
    bound = max(parts, key=lambda part: parts[part])
    needed = OPERATORS[operator].tensors_moved(direction) * launch["itemsize"] * elements
    found = Prediction(
        device.name,
        operator,
        direction,
        shape,
        dtype,
        "chained" if chained else "walking",
        **parts,
        launches=launches,
        seconds=parts[bound] + launches * LAUNCH,
        bound=bound,
        roof=needed / device.copy + LAUNCH,
        blocks_per_multiprocessor=over.resident,
    )
    add_peer(found, device)
    return found


def predict_convolution(
    budget: dict, device: Device, direction: str, shape: str, dtype: str
) -> Prediction:
    """causal_conv1d with four taps and SiLU."""
    batch, time, width = parse_shape(shape)
    kernel = budget["kernels"][f"causal_conv1d_{direction} {dtype} {TAPS}"]
    launch, row = kernel["launch"], kernel[device.code]
    elements, itemsize = batch * time * width, launch["itemsize"]
    groups = math.ceil(width / launch["channels"])
    tiles = batch * math.ceil(time / launch["steps_per_tile"])
    run = min(max(1, tiles * groups // launch["enough_blocks"]), launch["tiles_per_block"])
    parts = math.ceil(tiles / run)
    blocks = groups * parts
    over = Residency.of(device, row, launch, blocks, launch["dynamic_shared"])
    instructions = elements * row["per_element"]["way"]
    # The gradient of the weight: each part's sums, written and read.
    sums = 2 * parts * (TAPS + 1) * width * 4 if direction == "backward" else 0
    moved = elements * itemsize * (launch["arrays"] + 1)
    rounds = math.ceil(blocks * run / (over.resident * device.multiprocessors))
    alone = instructions / (blocks * run) / (over.issue(1) / device.multiprocessors)
    found = {
        "memory": (moved + sums) / device.copy,
        "issue": instructions * over.share / over.issue(over.at_once),
        "special": elements * row["per_element"]["mufu"] * over.share / device.special,
        "latency": rounds * (LATENCY + alone),
        "chain": 0.0,
    }
    launches = 2 if direction == "backward" else 1
    bound = max(found, key=lambda part: found[part])
    return Prediction(
        device.name,
        "causal_conv1d",
        direction,
        shape,
        dtype,
        "tiles",
        **found,
        launches=launches,
        seconds=found[bound] + launches * LAUNCH,
        bound=bound,
        roof=moved / device.copy + LAUNCH,
        blocks_per_multiprocessor=over.resident,
    )


def scan_segments(time: int, blocks: int, launch: dict) -> int:
    """Into how many segments csrc/cuda/selective_scan.cu cuts a row, where that many blocks take the rows."""
    if blocks >= launch["enough_blocks"]:
        return 1
    steps = math.ceil(time / math.ceil(launch["enough_blocks"] / blocks))
    tiles = math.ceil(max(steps, launch["least_steps"]) / launch["steps_per_tile"])
    segments = math.ceil(time / (tiles * launch["steps_per_tile"]))
    return segments if segments >= 3 else 1


def predict_scan(
    budget: dict, device: Device, direction: str, shape: str, dtype: str
) -> Prediction:
    """selective_scan as in Mamba: 16 states, all inputs, one group of B and C per token."""
    batch, time, width = parse_shape(shape)
    backward = direction == "backward"
    kernel = budget["kernels"][f"selective_scan_wide{'_backward' * backward} {dtype}"]
    launch, row = kernel["launch"], kernel[device.code]
    elements, itemsize, states = batch * time * width, launch["itemsize"], launch["states"]
    groups = math.ceil(width / launch["channels"])
    segments = scan_segments(time, batch * groups, launch)
    blocks = batch * groups * segments
    over = Residency.of(device, row, launch, blocks, launch["dynamic_shared"])
    counts = row["per_element"]
    # Segments but one are walked through first, from zero.
    twice = 1 + EFFECT_SHARE * (segments - 1) / segments
    instructions = elements * states * counts["way"] * twice
    work = MAMBA_OPERATORS["selective_scan[fused]"].work(direction)
    moved = elements * work.bytes(itemsize)
    # B and C; forward, the states that are kept; backward, sums of gradients over each block's
    # channels, written and read.
    more = 2 * batch * time * states * itemsize
    more += 2 * 2 * batch * time * states * groups * 4 if backward else elements * 4
    tiles = math.ceil(time / segments / launch["steps_per_tile"])
    rounds = math.ceil(blocks / (over.resident * device.multiprocessors))
    alone = instructions / (blocks * tiles) / (over.issue(1) / device.multiprocessors)
    found = {
        "memory": (moved + more) / device.copy,
        "issue": instructions * over.share / over.issue(over.at_once),
        "special": elements * states * counts["mufu"] * twice * over.share / device.special,
        "latency": rounds * tiles * (2 * LATENCY + alone),
        "chain": 0.0,
    }
    launches = (3 if backward else 1) + (2 if segments > 1 else 0)
    bound = max(found, key=lambda part: found[part])
    least = elements * (work.exps + work.operations) / device.issue
    return Prediction(
        device.name,
        "selective_scan",
        direction,
        shape,
        dtype,
        "segments" if segments > 1 else "walking",
        **found,
        launches=launches,
        seconds=found[bound] + launches * LAUNCH,
        bound=bound,
        roof=max(moved / device.copy, least) + LAUNCH,
        blocks_per_multiprocessor=over.resident,
    )


class NotCounted(Exception):
    """The budget has no instructions of a kernel on an architecture."""


@dataclass
class Kernel:
    """One of the launches of a call, with blocks that each make `passes` tiles one after the other."""

    name: str  # in the budget
    blocks: int
    passes: float
    products: float  # by warps, of all blocks
    moved: float  # bytes
    ahead: bool  # are tiles on their way while the one before is made?
    chain: float = 0.0

    def parts(self, budget: dict, device: Device) -> dict[str, float]:
        found = {"memory": self.moved / device.copy, "chain": self.chain}
        if not self.products:
            return found
        kernel = budget["kernels"][self.name]
        launch, row = kernel["launch"], kernel[device.code]
        if "per_element" not in row:
            raise NotCounted(f"{self.name}, sm_{device.code}")
        counts = row["per_element"]
        over = Residency.of(device, row, launch, self.blocks, launch["dynamic_shared"])
        instructions = 32 * self.products * counts["way"]
        rounds = math.ceil(self.blocks / (over.resident * device.multiprocessors))
        alone = (
            instructions / (self.blocks * self.passes) / (over.issue(1) / device.multiprocessors)
        )
        waits = max(0.0, LATENCY - alone) if self.ahead else LATENCY
        return found | {
            "issue": instructions * over.share / over.issue(over.at_once),
            "special": 32 * self.products * counts["mufu"] * over.share / device.special,
            "latency": rounds * (LATENCY + self.passes * (alone + waits)),
            "products": self.products * over.share / device.mma,
        }


def products_of(rows: float, columns: float, depth: float) -> float:
    """Products m16n8k16 of a product of matrices."""
    return math.ceil(rows / 16) * math.ceil(columns / 8) * math.ceil(depth / 16)


def states_kernel(shape: tuple[int, ...], parts: int, interval: int, itemsize: int) -> Kernel:
    """csrc/cuda/matrix_memory.cu: the states at the starts of chunks."""
    B, T, H, K, V, G = shape
    keys, values, rows = 128 if parts == 1 and K > 64 else 64, 64, 64
    tiles = math.ceil(T / rows)
    blocks = B * H * math.ceil(K / keys) * math.ceil(V / values)
    times = parts * (parts + 1) / 2
    states = B * H * math.ceil(T / interval) * K * V * (2 if parts == 1 else 4)
    moved = B * T * (G * K + H * V) * itemsize + states
    return Kernel(
        f"matrix_memory_states {parts} {keys} {values}", blocks, tiles,
        blocks * tiles * products_of(keys, values, rows) * times, moved, parts == 1,
    )  # fmt: skip


def forward_kernels(shape: tuple[int, ...], parts: int, itemsize: int) -> list[Kernel]:
    B, T, H, K, V, G = shape
    chunk, rows, values = 128, 64, 128 if parts == 1 and V > 64 else 64
    chunks, slices = math.ceil(T / chunk), math.ceil(V / values)
    blocks = B * H * chunks * (chunk // rows) * slices
    times = parts * (parts + 1) / 2
    # The first 64 steps of a chunk meet themselves, the others the first as well. On the diagonal a
    # quarter of the scores, and of their products with values, is left out.
    tiles = (0.75 + 1.75) / 2
    each = tiles * (products_of(rows, rows, K) + products_of(rows, values, rows))
    each += products_of(rows, values, K)
    items = 1.5 * (math.ceil(K / (64 if parts == 1 else 32)) + 1)
    states = B * H * chunks * K * V * (2 if parts == 1 else 4)
    moved = B * T * (2 * G * K + 2 * H * V) * itemsize + states
    outputs = Kernel(
        f"matrix_memory_outputs {parts} {values}", blocks, items, blocks * each * times, moved,
        parts == 1,
    )  # fmt: skip
    return [states_kernel(shape, parts, chunk, itemsize), outputs]


def backward_kernels(
    shape: tuple[int, ...],
    parts: int,
    itemsize: int,
    stabilized: bool,
    device: Device,
    launch: dict,
) -> list[Kernel]:
    """csrc/cuda/matrix_memory_backward.cu."""
    B, T, H, K, V, G = shape
    steps, of = launch["steps"], int(parts == 1)
    slots = B * math.ceil(T / steps)
    sets = min(math.ceil(launch["enough_blocks"] / (slots * G)), H // G)
    sets = math.ceil(H / G / math.ceil(H / G / sets))
    times = parts * (parts + 1) / 2
    across_K, across_V = math.ceil(K / 64), math.ceil(V / 64)
    half = 10 / 16  # of 16 blocks of 16 by 16, those up to the diagonal
    keys, tokens = B * T * G * K * itemsize, B * T * H * V * itemsize
    states = slots * H * K * V * (2 if parts == 1 else 4)
    gradients = slots * H * K * V * 2 * parts
    shares = 2 * sets * B * T * G * K * 4 if H != G else 0  # of queries and of keys
    scores = G * sets * half * products_of(steps, steps, K)
    carried = products_of(steps, K, V)
    again = 2 if across_K > 2 else 1
    of_heads = H * (
        half * products_of(steps, steps, V) + again * carried + half * products_of(steps, K, steps)
    )
    met = H * (
        half * products_of(steps, steps, V) + 2 * carried
        + half * (products_of(steps, K, steps) + products_of(steps, V, steps))
    )  # fmt: skip
    heads = H / G / sets
    found = [
        states_kernel(shape, parts, steps, itemsize),
        Kernel(
            f"matrix_grad_queries {of}", slots * G * sets,
            across_K + heads * (across_V * (1 + again * across_K) + 2 * across_K),
            slots * (scores + of_heads) * times,
            3 * keys + 2 * tokens + states + shares / 2, parts == 1,
        ),
        Kernel(
            f"matrix_grad_states {of}", B * H * across_K * across_V, math.ceil(T / steps),
            slots * H * across_K * across_V * products_of(64, 64, steps) * times,
            keys + tokens + states + gradients, parts == 1,
        ),
        Kernel(
            f"matrix_grad_keys {of}", slots * G * sets,
            across_K + heads * (across_V + 2 * across_K * across_V + across_K + across_V),
            slots * (scores + met) * times,
            3 * keys + 3 * tokens + gradients + shares / 2, parts == 1,
        ),
    ]  # fmt: skip
    if stabilized:
        wait = (
            LATENCY * 2 + 32 * DOUBLE_ADD / device.clock
        )  # fields come, then the gradient to add to
        chain = math.ceil(T / 32) * wait * math.ceil(B * H / (32 * device.multiprocessors))
        found.append(Kernel("matrix_grad_maxima", B * H, 1, 0, 0, False, chain))
    if H != G:
        found.append(Kernel("matrix_grad_shared", 1, 1, 0, shares + 2 * keys, False))
    return found


def predict_matrix(
    budget: dict, device: Device, operator: str, direction: str, shape: str, dtype: str
) -> Prediction:
    """mlstm and ssd: the kernels of one call, one after the other, without those of torch that make the gates."""
    sizes, itemsize, parts = parse_matrix_shape(shape), 2, 1
    if dtype == "float32":
        itemsize, parts = 4, 3
    if direction == "forward":
        kernels = forward_kernels(sizes, parts, itemsize)
    else:
        launch = budget["kernels"][f"matrix_grad_queries {int(parts == 1)}"]["launch"]
        kernels = backward_kernels(sizes, parts, itemsize, operator == "mlstm", device, launch)
    names = ("memory", "issue", "special", "latency", "chain", "products")
    found = dict.fromkeys(names, 0.0)
    each = {}
    for kernel in kernels:
        of_kernel = kernel.parts(budget, device)
        each[kernel.name] = max(of_kernel.values()) + LAUNCH
        for part, seconds in of_kernel.items():
            found[part] += seconds
    work = MATRIX_OPERATORS[operator]
    B, T, H = sizes[:3]
    operations = 2 * B * T * H * work.products(direction, sizes)
    operations *= GPU_MATRIX_PRECISIONS["highest"] if dtype == "float32" else 1
    roof = max(
        work.bytes(direction, sizes, itemsize) / device.copy,
        operations / (device.tensor * MATMUL_SHARE),
    )
    row = Prediction(
        device.name,
        operator,
        direction,
        shape,
        dtype,
        "chunks",
        **found,
        launches=len(kernels),
        seconds=sum(each.values()),
        bound=max(found, key=lambda part: found[part]),
        roof=roof + LAUNCH,
        blocks_per_multiprocessor=0,
        kernels=each,
    )
    add_published(row)
    return row


def add_published(row: Prediction) -> None:
    """What others have published, and the time that is our goal."""
    published = GPU_MATRIX_PUBLISHED.get((row.operator, row.shape), {})
    forward, both = published.get("forward"), published.get("forward+backward")
    if row.dtype != "bfloat16" or forward is None or both is None:
        return
    row.peer = (
        "mlstm_kernels" if row.operator == "mlstm" else "mamba_ssm, with convolution and gate"
    )
    row.peer_seconds = forward if row.direction == "forward" else both - forward
    row.peer_source = "published by TFLA's authors of an H100"
    row.goal = row.peer_seconds / GPU_MATRIX_GOALS[row.direction]


# Published: https://github.com/proger/accelerated-scan, (batch, channel, time) = (8, 1536, 2048).
PUBLISHED = {("linear_scan", "forward", "8x2048x1536", "float32"): 0.355e-3}


def add_peer(row: Prediction, device: Device) -> None:
    """accelerated-scan, forward: computed from its bytes; with the gates in PyTorch, six more passes."""
    batch, time, width = parse_shape(row.shape)
    if row.direction != "forward" or time & (time - 1) or not 32 <= time <= 65536:
        return
    if row.operator not in ("linear_scan", "min_gru"):
        return
    gates = row.operator == "min_gru"
    itemsize = 4 if row.dtype == "float32" else 2
    moved = batch * time * width * itemsize * (3 + 6 * gates)
    row.peer = "accelerated-scan" + (" after PyTorch's gates" if gates else "")
    row.peer_seconds = moved / (device.copy * PEER_SHARE) + LAUNCH * (4 if gates else 1)
    row.peer_source = f"computed: {PEER_SHARE:.0%} of the bandwidth of a copy"
    published = PUBLISHED.get((row.operator, row.direction, row.shape, row.dtype))
    if published:
        row.peer_source += f"; published {published * 1e3:g} ms on a card that is not named"


def add_measured(rows: list[Prediction], measured: list[dict]) -> None:
    """Measured times to the predictions that they belong to. The device may be a longer name."""
    for row in rows:
        for one in measured:
            shape = one["shape"]
            shape = shape if isinstance(shape, str) else "x".join(map(str, shape))
            same = all(one[key] == getattr(row, key) for key in ("operator", "direction", "dtype"))
            if same and shape == row.shape and row.device in one["device"]:
                row.measured = one["seconds"]


# What the model calls otherwise than the benchmark.
BENCHMARKED = {"selective_scan[fused]": "selective_scan", "selective_scan": None}


def measured_in(result: dict | list[dict]) -> list[dict]:
    """The measured times of a file, as a list of what `add_measured` takes."""
    if isinstance(result, list):
        return result
    device = result.get("machine", {}).get("gpu", "")
    return [
        {
            "device": device,
            "operator": BENCHMARKED.get(row["operator"], row["operator"]),
            "direction": row["mode"],
            "shape": row["shape_name"],
            "dtype": row["dtype"],
            "seconds": row["seconds_min"],
        }
        for kind in ("operators", "mamba", "matrix")
        for row in result.get(kind, [])
        if row["mode"] in DIRECTIONS and row.get("precision") in (None, "highest")
    ]


def markdown(rows: list[Prediction]) -> str:
    measured = any(row.measured is not None for row in rows)
    peers = any(row.peer for row in rows)
    lines = [
        "# Predicted times of the CUDA kernels",
        "",
        f"Each time is a **{LABEL}**; `python benchmarks/gpu_model.py --help` says how it is made. "
        f"Roof: what no implementation can beat; the goal is {GOAL:g} times that, but of mlstm and ssd a part of what "
        "is published. "
        + ("Measured times are marked as such." if measured else "Nothing here has been measured."),
    ]
    for device in dict.fromkeys(row.device for row in rows):
        lines += ["", f"## {device} ({LABEL})", "", DEVICES[device].source + ".", ""]
        head = ["operator", "direction", "shape", "dtype", "schedule", "predicted", "bound by"]
        head += ["memory", "issue", "special", "latency", "chain", "products", "roof"]
        head += ["predicted / roof"]
        head += ["peer"] * peers + ["measured", "error"] * measured
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for row in rows:
            if row.device != device:
                continue
            cells = [row.operator, row.direction, row.shape, row.dtype, row.schedule]
            cells += [duration(row.seconds), row.bound]
            parts = (row.memory, row.issue, row.special, row.latency, row.chain, row.products)
            cells += [duration(part) if part else "" for part in parts]
            ratio = row.seconds / row.roof
            cells += [
                duration(row.roof),
                f"{ratio:.2f}" + (", misses the goal" if row.misses else ""),
            ]
            if peers:
                cells.append(f"{duration(row.peer_seconds)}, {row.peer}" if row.peer else "")
            if measured:
                has = row.measured is not None
                cells += [duration(row.measured), f"{row.error:+.0%}"] if has else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    sources = {f"{row.peer}: {row.peer_source}" for row in rows if row.peer}
    said = f"Peers, each time a {LABEL}, too, but where it is published: "
    lines += ["", said + "; ".join(sorted(sources)) + "."] * peers
    several = [row for row in rows if row.kernels]
    if several:
        lines += ["", f"## Kernels of mlstm and ssd ({LABEL})", ""]
        lines += ["| device | operator | direction | shape | dtype | kernels |", "|" + " --- |" * 6]
    for row in several:
        each = ", ".join(f"{name} {duration(x)}" for name, x in (row.kernels or {}).items())
        cells = [row.device, row.operator, row.direction, row.shape, row.dtype, each]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Constants: " + "; ".join(constants()) + "."]
    return "\n".join(lines) + "\n"


def constants() -> list[str]:
    return [
        f"an access to memory takes {LATENCY * 1e6:g} us (reported for H100)",
        f"a hop between blocks {HOP * 1e6:g} us (a guess)",
        f"a launch {LAUNCH * 1e6:g} us (reported: 2 to 4)",
        f"a copy reaches {COPY_SHARE:.1%} of the datasheet's bandwidth (measured on an H200)",
        "four warps of 32 threads issue an instruction per clock and multiprocessor",
        f"one warp alone issues {WARP_ISSUE:g} per clock (a guess)",
        f"a segment from zero takes {EFFECT_SHARE:.0%} of a scan's instructions (a guess)",
        "16 exponentials or reciprocals per clock and multiprocessor",
        f"matrix products reach {MATMUL_SHARE:.0%} of the datasheet (measured on an H200), by mma.sync on Hopper "
        f"{MMA_SHARE['90a']:.0%} (reported)",
        f"a sum in double that the next one waits for takes {DOUBLE_ADD} clocks (a guess)",
    ]


def text(rows: list[Prediction]) -> str:
    measured = any(row.measured is not None for row in rows)
    lines = [f"Predicted times: each a {LABEL}."]
    lines.append(
        f"{'device':<9} {'operator':<14} {'pass':<9} {'shape':<13} {'dtype':<9} {'schedule':<8} "
        f"{'predicted':>9} {'bound':<8} {'memory':>9} {'issue':>9} {'roof':>9} {'/roof':>6}"
        + (f" {'measured':>9} {'error':>6}" if measured else "")
    )
    for row in rows:
        line = (
            f"{row.device:<9} {row.operator:<14} {row.direction:<9} {row.shape:<13} {row.dtype:<9} "
            f"{row.schedule:<8} {duration(row.seconds):>9} {row.bound:<8} {duration(row.memory):>9} "
            f"{duration(row.issue):>9} {duration(row.roof):>9} {row.seconds / row.roof:>6.2f}"
        )
        if row.measured is not None:
            line += f" {duration(row.measured):>9} {row.error:>+6.0%}"
        lines.append(line)
    over = sum(row.misses for row in rows if row.operator not in MATRIX)
    channels = sum(row.operator not in MATRIX for row in rows)
    if channels:
        lines.append(
            f"{over} of {channels} are predicted to take more than {GOAL:g} times their roof."
        )
    goals = [row.misses for row in rows if row.goal]
    if goals:
        lines.append(f"{sum(goals)} of {len(goals)} are predicted to take longer than their goal.")
    return "\n".join(lines)


def record(row: Prediction) -> dict:
    """A row for the JSON file: four digits, and nothing that is not there."""
    values = asdict(row) | {"error": row.error}
    if row.kernels:
        values["kernels"] = {name: float(f"{x:.4g}") for name, x in row.kernels.items()}
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in values.items()
        if value is not None
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", nargs="+", choices=DEVICES, default=list(DEVICES), metavar="DEVICE")
    operators = (*MODELLED, *MATRIX)
    add("--op", nargs="+", choices=operators, default=list(operators), metavar="OP")
    add(
        "--shapes",
        nargs="+",
        default=None,
        metavar="BxTxD:DTYPE",
        help="or, of mlstm and ssd, BxTxHxKxV:DTYPE and BxTxHxKxVxG:DTYPE",
    )
    add("--budget", type=Path, default=BUDGET, help="what kernel_budget.py has written")
    files = [HERE / "out" / name for name in ("gpu.json", "gpu-matrix.json")]
    add("--measured", nargs="+", type=Path, default=files, metavar="FILE")
    add("--out", type=Path, default=HERE / "results", help="folder for gpu_model.json and .md")
    args = parser.parse_args(argv)

    budget = json.loads(args.budget.read_text())
    given = args.shapes or [f"{shape}:{dtype}" for shape, dtype in SHAPES]
    cases = [
        (operator, shape)
        for shape in given
        for operator in args.op
        if is_matrix_shape(shape) == (operator in MATRIX)
    ]
    if args.shapes is None:  # of these each has its own
        cases += [
            (operator, f"{shape}:{dtype}")
            for operator in MATRIX
            if operator in args.op
            for dtype in MATRIX_DTYPES
            for shape in GPU_MATRIX_SHAPES[operator]
        ]
    rows, left_out = [], {}
    for device, (operator, shape), direction in itertools.product(args.device, cases, DIRECTIONS):
        try:
            row = predict(budget, DEVICES[device], operator, direction, *shape.split(":"))
            rows.append(row)
        except NotCounted:
            left_out[f"{operator} on {device}"] = True
    for file in args.measured:
        if file.exists():
            add_measured(rows, measured_in(json.loads(file.read_text())))
    print(text(rows))
    said = f"Not counted in the budget, and left out: {', '.join(left_out)}." if left_out else ""
    print(said + "\n" * bool(said), end="")
    lines = [
        "{",
        f' "about": "Written by benchmarks/gpu_model.py: each time is a {LABEL}. Seconds.",',
        f' "constants": {json.dumps(constants())},',
        f' "devices": {json.dumps([asdict(DEVICES[name]) for name in args.device])},',
        ' "rows": [',
        ",\n".join("  " + json.dumps(record(row)) for row in rows),
        " ]",
        "}",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_model.json").write_text("\n".join(lines) + "\n")
    (args.out / "gpu_model.md").write_text(markdown(rows) + f"\n{said}\n" * bool(said))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
