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

It is optimistic where the kernels wait for their own results, and does not count the exchange
between blocks. "roof" is what no implementation can beat: the bytes of shapes.py and the launch; of
selective_scan the bytes or the instructions there, whichever take longer.
Where results/gpu.json has measured times, they and the model's error stand beside: a list of
{"device", "operator", "direction", "shape", "dtype", "seconds"}.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from kernel_budget import BUDGET, resident_blocks
from report import duration
from shapes import MAMBA_OPERATORS, OPERATORS

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


@dataclass(frozen=True)
class Device:
    name: str
    architecture: str  # whose limits count
    code: str  # the architecture in kernel_budget.json whose instructions count
    multiprocessors: int
    clock: float  # Hz
    copy: float  # bytes read and written per second
    source: str

    @property
    def issue(self) -> float:
        """Instructions of single threads per second: four warps of 32 per clock."""
        return self.multiprocessors * 128 * self.clock

    @property
    def special(self) -> float:
        """Exponentials or reciprocals per second: 16 per clock (CUDA C++ Programming Guide)."""
        return self.multiprocessors * 16 * self.clock


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
            "bandwidth, multiprocessors and clock measured; the clock may be 5 to 10 % lower under load",
        ),
        Device(
            "H100",
            "90a",
            "90a",
            132,
            1.98e9,
            3.35e12 * COPY_SHARE,
            "datasheet of the SXM5 card: 3.35 TB/s, 132 multiprocessors; the clock of an H200",
        ),
        Device(
            "A100",
            "80",
            "80",
            108,
            1.41e9,
            2.039e12 * COPY_SHARE,
            "datasheet of the 80 GB SXM card: 2.039 TB/s, 108 multiprocessors, 1.41 GHz",
        ),
        Device(
            "RTX 4090",
            "89",
            "80",
            128,
            2.52e9,
            1.008e12 * COPY_SHARE,
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
TAPS = 4
DIRECTIONS = ("forward", "backward")


@dataclass
class Prediction:
    device: str
    operator: str
    direction: str
    shape: str
    dtype: str
    schedule: str  # "walking": a block takes all tiles of its channels; "chained": one each; "tiles"; "segments"
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
    label: str = LABEL
    peer: str | None = None
    peer_seconds: float | None = None
    peer_source: str | None = None
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """How much longer the measured time is than the predicted one."""
        return None if self.measured is None else self.measured / self.seconds - 1


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


def markdown(rows: list[Prediction]) -> str:
    measured = any(row.measured is not None for row in rows)
    peers = any(row.peer for row in rows)
    lines = [
        "# Predicted times of the CUDA kernels",
        "",
        f"Each time is a **{LABEL}**; `python benchmarks/gpu_model.py --help` says how it is made. "
        f"Roof: what no implementation can beat; the goal is {GOAL:g} times that. "
        + ("Measured times are marked as such." if measured else "Nothing here has been measured."),
    ]
    for device in dict.fromkeys(row.device for row in rows):
        lines += ["", f"## {device} ({LABEL})", "", DEVICES[device].source + ".", ""]
        head = ["operator", "direction", "shape", "dtype", "schedule", "predicted", "bound by"]
        head += ["memory", "issue", "special", "latency", "chain", "roof", "predicted / roof"]
        head += ["peer"] * peers + ["measured", "error"] * measured
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for row in rows:
            if row.device != device:
                continue
            cells = [row.operator, row.direction, row.shape, row.dtype, row.schedule]
            cells += [duration(row.seconds), row.bound]
            parts = (row.memory, row.issue, row.special, row.latency, row.chain)
            cells += [duration(part) if part else "" for part in parts]
            ratio = row.seconds / row.roof
            cells += [
                duration(row.roof),
                f"{ratio:.2f}" + (", misses the goal" if ratio > GOAL else ""),
            ]
            if peers:
                cells.append(f"{duration(row.peer_seconds)}, {row.peer}" if row.peer else "")
            if measured:
                has = row.measured is not None
                cells += [duration(row.measured), f"{row.error:+.0%}"] if has else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    sources = {f"{row.peer}: {row.peer_source}" for row in rows if row.peer}
    lines += ["", f"Peers, each time a {LABEL}, too. " + "; ".join(sorted(sources)) + "."] * peers
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
    over = sum(row.seconds > GOAL * row.roof for row in rows)
    lines.append(
        f"{over} of {len(rows)} are predicted to take more than {GOAL:g} times their roof."
    )
    return "\n".join(lines)


def record(row: Prediction) -> dict:
    """A row for the JSON file: four digits, and nothing that is not there."""
    values = asdict(row) | {"error": row.error}
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
    add("--op", nargs="+", choices=MODELLED, default=list(MODELLED), metavar="OP")
    add(
        "--shapes",
        nargs="+",
        default=[f"{shape}:{dtype}" for shape, dtype in SHAPES],
        metavar="BxTxD:DTYPE",
    )
    add("--budget", type=Path, default=BUDGET, help="what kernel_budget.py has written")
    add("--measured", type=Path, default=HERE / "results" / "gpu.json")
    add("--out", type=Path, default=HERE / "results", help="folder for gpu_model.json and .md")
    args = parser.parse_args(argv)

    budget = json.loads(args.budget.read_text())
    rows = [
        predict(budget, DEVICES[device], operator, direction, *shape.split(":"))
        for device in args.device
        for shape in args.shapes
        for operator in args.op
        for direction in DIRECTIONS
    ]
    if args.measured.exists():
        add_measured(rows, json.loads(args.measured.read_text()))
    print(text(rows))
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
    (args.out / "gpu_model.md").write_text(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
