"""benchmarks/gpu_model.py: its arithmetic on a made-up kernel, and that it says what it is."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_model  # noqa: E402

H200 = gpu_model.DEVICES["H200"]
SHAPE = "8x4096x4096"  # 512 columns of 64 channels: enough to fill a GPU
ELEMENTS = 8 * 4096 * 4096


def budget(way=10.0, mufu=0.0, dynamic_shared=60000):
    launch = {
        "threads": 256,
        "dynamic_shared": dynamic_shared,
        "chained_dynamic_shared": 20000,
        "elements_per_thread": 16,
        "steps_per_tile": 64,
        "channels": 64,
        "arrays": 2,
        "outputs": 1,
        "itemsize": 2,
        "stages": 3,
        "tiles_per_link": 32,
        "enough_blocks": 256,
    }
    row = {
        "registers": 64,
        "static_shared": 0,
        "per_element": {"loop": 50.0, "way": way, "mufu": mufu},
    }
    names = [
        f"diagonal_tiles {direction} {operator} bfloat16"
        for direction in gpu_model.DIRECTIONS
        for operator in gpu_model.DIAGONAL
    ]
    kernels = {name: {"launch": launch, "90a": row, "80": row} for name in names}
    for direction, arrays in (("forward", 1), ("backward", 2)):
        tiles = {"arrays": arrays, "steps_per_tile": 128, "tiles_per_block": 8}
        convolution = {"launch": launch | tiles, "90a": row, "80": row}
        kernels[f"causal_conv1d_{direction} bfloat16 4"] = convolution
    tiles = {"threads": 128, "channels": 128, "steps_per_tile": 16, "states": 16, "least_steps": 64}
    scan = {"launch": launch | tiles, "90a": row, "80": row}
    kernels |= {f"selective_scan_wide{name} bfloat16": scan for name in ("", "_backward")}
    kernels |= {name: {"launch": MATRIX_LAUNCH, "90a": row} for name in MATRIX_KERNELS}
    return {"kernels": kernels}


MATRIX_LAUNCH = {"threads": 128, "dynamic_shared": 50000, "steps": 64, "enough_blocks": 512}
MATRIX_KERNELS = [
    *(f"matrix_memory_states {sizes}" for sizes in ("1 64 64", "1 128 64", "3 64 64")),
    *(f"matrix_memory_outputs {sizes}" for sizes in ("1 64", "1 128", "3 64")),
    *(f"matrix_grad_{name} {one}" for name in ("queries", "states", "keys") for one in (0, 1)),
]


def predict(shape=SHAPE, **values):
    return gpu_model.predict(budget(**values), H200, "linear_scan", "forward", shape, "bfloat16")


def test_bound_by_bandwidth():
    row = predict()
    assert row.bound == "memory" and row.schedule == "walking"
    assert row.seconds == pytest.approx(ELEMENTS * 6 / 4.3e12 + 3e-6, rel=0.01)
    assert row.seconds == pytest.approx(row.roof)


def test_bound_by_instructions():
    row = predict(way=200.0)
    assert row.bound == "issue"
    # 512 blocks: four on the busiest of 132 multiprocessors.
    seconds = ELEMENTS * 200 / (132 * 128 * 1.98e9) * 4 / (512 / 132)
    assert row.seconds == pytest.approx(seconds + 3e-6)


def test_few_warps_issue_less():
    # One block of eight warps, two per scheduler, which issue 0.8 instructions per clock.
    assert predict(way=200.0, dynamic_shared=200000).issue == pytest.approx(
        predict(way=200.0).issue / 0.8
    )


def test_bound_by_exponentials():
    row = predict(mufu=16.0)
    assert row.bound == "special"
    assert row.special == pytest.approx(ELEMENTS * 16 / (132 * 16 * 1.98e9) * 4 / (512 / 132))


def test_bound_by_latency():
    # One block and two tiles of 16 KiB on their way, on each multiprocessor.
    row = predict(dynamic_shared=200000)
    assert row.latency == pytest.approx(ELEMENTS * 4 * 0.75e-6 / (132 * 2 * 16384))
    assert row.blocks_per_multiprocessor == 1


def test_few_channels_are_chained():
    row = predict("1x1048576x64")
    assert row.schedule == "chained" and row.launches == 2 and row.bound == "chain"
    assert row.chain == pytest.approx(1048576 / 64 / 32 * 1.5e-6)


def test_convolution():
    def predict(direction, **values):
        return gpu_model.predict(
            budget(**values), H200, "causal_conv1d", direction, SHAPE, "bfloat16"
        )

    row = predict("forward")
    assert row.bound == "memory" and row.launches == 1
    assert row.seconds == pytest.approx(row.roof) == pytest.approx(ELEMENTS * 4 / 4.3e12 + 3e-6)
    # 64 * 256 tiles, eight to a block: 5 sums of each of 4096 channels from 32 blocks.
    sums = 2 * 32 * 5 * 4096 * 4
    assert predict("backward").memory == pytest.approx((ELEMENTS * 6 + sums) / 4.3e12)
    assert predict("forward", way=200.0).bound == "issue"
    # One block to a multiprocessor waits for each of its tiles, and computes it with two warps per scheduler.
    slow = predict("forward", dynamic_shared=200000)
    alone = 128 * 64 * 10 / (128 * 1.98e9 * 0.8)
    assert slow.latency == pytest.approx(math.ceil(64 * 256 / 132) * (0.75e-6 + alone))


def test_selective_scan():
    def predict(direction, shape=SHAPE, **values):
        return gpu_model.predict(
            budget(**values), H200, "selective_scan", direction, shape, "bfloat16"
        )

    row = predict("forward", way=10.0)
    # 256 blocks: two on the busiest of 132 multiprocessors, eight warps that issue 0.8 per clock and scheduler.
    issue = ELEMENTS * 16 * 10 / (132 * 128 * 1.98e9 * 0.8) * 2 / (256 / 132)
    assert row.schedule == "walking" and row.launches == 1
    assert row.issue == pytest.approx(issue)
    # u, delta, z, out; the kept states; B and C.
    moved = ELEMENTS * (8 + 4) + 2 * 8 * 4096 * 16 * 2
    assert row.memory == pytest.approx(moved / 4.3e12)
    assert row.roof == pytest.approx(ELEMENTS * (18 + 90) / (132 * 128 * 1.98e9) + 3e-6)
    # Seven tensors and the kept states; B, C; 32 blocks' sums, written and read.
    moved = ELEMENTS * (14 + 4) + 2 * 8 * 4096 * 16 * 2 + 4 * 8 * 4096 * 16 * 32 * 4
    back = predict("backward")
    assert back.memory == pytest.approx(moved / 4.3e12) and back.launches == 3
    assert predict("forward", mufu=16.0).bound == "special"
    # One block at a time on each multiprocessor: two rounds of 256 tiles, with one warp per scheduler.
    slow = predict("forward", dynamic_shared=200000)
    alone = 16 * 128 * 16 * 10 / (128 * 1.98e9 * 0.4)
    assert slow.latency == pytest.approx(2 * 256 * (2 * 0.75e-6 + alone))
    # 4 blocks of 65536 steps: 64 segments, of which 63 are walked through twice.
    few = predict("forward", "1x65536x512")
    assert few.schedule == "segments" and few.launches == 3
    assert few.special == 0 and few.memory == pytest.approx(
        (65536 * 512 * 12 + 2 * 65536 * 16 * 2) / 4.3e12
    )
    twice = 1 + 0.7 * 63 / 64
    assert few.issue == pytest.approx(issue * 65536 * 512 / ELEMENTS * twice)
    assert predict("forward", "1x100x512").schedule == "walking"  # too few steps to be cut


MLSTM, SSD = "8x8192x16x128x256", "8x8192x64x64x64x1"
TOKENS = 8 * 8192


def kernels(operator, direction, shape=MLSTM, dtype="bfloat16"):
    sizes, itemsize, parts = gpu_model.parse_matrix_shape(shape), 2, 1
    if dtype == "float32":
        itemsize, parts = 4, 3
    if direction == "forward":
        return gpu_model.forward_kernels(sizes, parts, itemsize)
    stabilized = operator == "mlstm"
    return gpu_model.backward_kernels(sizes, parts, itemsize, stabilized, H200, MATRIX_LAUNCH)


def test_products_of_a_matrix_memory():
    """By hand, in m16n8k16: 2048 multiply-adds each."""
    states, outputs = kernels("mlstm", "forward")
    heads = 16 * TOKENS
    # k v^T, of all pairs; the scores of 64 by 64 steps on the diagonal but for a quarter, of 64 by 64
    # below it, for each slice of 128 values; those times values; q C.
    assert states.products == heads * 128 * 256 / 2048
    scores = (0.75 + 1.75) / 2 * 64 * 128 * 2 + (0.75 + 1.75) / 2 * 64 * 256
    assert outputs.products == heads * (scores + 128 * 256) / 2048
    assert states.blocks == 8 * 16 * 4 and outputs.blocks == 8 * 16 * 64 * 2 * 2
    assert (states.name, outputs.name) == (
        "matrix_memory_states 1 128 64",
        "matrix_memory_outputs 1 128",
    )
    kept = heads / 128 * 128 * 256 * 2
    assert states.moved == TOKENS * 16 * 2 * (128 + 256) + kept
    assert outputs.moved == TOKENS * 16 * 2 * (2 * 128 + 2 * 256) + kept
    # Three parts: six products, states in float32, 64 keys and 64 values at a time.
    wide, out = kernels("mlstm", "forward", dtype="float32")
    assert wide.products == 6 * states.products and wide.blocks == 2 * states.blocks
    assert wide.moved == 2 * states.moved
    assert (wide.name, out.name) == ("matrix_memory_states 3 64 64", "matrix_memory_outputs 3 64")


def test_products_of_the_backward():
    states, queries, ends, keys, maxima = kernels("mlstm", "backward")
    heads, half = 16 * TOKENS, 10 / 16 * 64
    carried = 128 * 256
    assert states.products == ends.products == heads * carried / 2048
    assert queries.products == heads * (half * (128 + 256 + 128) + carried) / 2048
    assert keys.products == heads * (half * (128 + 256 + 256 + 128) + 2 * carried) / 2048
    kept = heads / 64 * carried * 2
    assert queries.moved == TOKENS * 16 * 2 * (3 * 128 + 2 * 256) + kept
    assert maxima.products == 0 and maxima.chain == pytest.approx(
        256 * (2 * 0.75e-6 + 32 * 20 / 1.98e9)
    )
    # More than 128 keys: the queries meet the state twice.
    _, again, *_ = kernels("mlstm", "backward", "8x8192x8x256x512")
    heads = 8 * TOKENS
    assert again.products == heads * (half * (256 + 512 + 256) + 2 * 256 * 512) / 2048
    # 64 heads share queries and keys: the scores are made once for them all.
    names = [kernel.name for kernel in kernels("ssd", "backward", SSD)]
    assert names[-1] == "matrix_grad_shared" and "matrix_grad_maxima" not in names
    _, queries, *_, shared = kernels("ssd", "backward", SSD)
    assert queries.blocks == 8 * 128
    of_heads = 64 * (half * (64 + 64) + 64 * 64)
    assert queries.products == TOKENS * (half * 64 + of_heads) / 2048
    assert shared.moved == 2 * TOKENS * 64 * 4 + 2 * TOKENS * 64 * 2


def test_time_of_a_matrix_memory():
    def predict(direction="forward", shape=MLSTM, **values):
        return gpu_model.predict(budget(**values), H200, "mlstm", direction, shape, "bfloat16")

    row = predict(way=5.0, mufu=1.0)
    states, outputs = kernels("mlstm", "forward")
    assert row.schedule == "chunks" and row.launches == 2 and list(row.kernels) == [
        "matrix_memory_states 1 128 64", "matrix_memory_outputs 1 128",
    ]  # fmt: skip
    assert row.seconds == pytest.approx(sum(row.kernels.values()))
    assert row.memory == pytest.approx((states.moved + outputs.moved) / 4.3e12)
    # 512 blocks, four to a multiprocessor, of four warps; many blocks.
    share = 4 / (512 / 132)
    even = math.ceil(outputs.blocks / 132) / (outputs.blocks / 132)
    issued = 132 * 128 * 1.98e9
    assert row.issue == pytest.approx(
        32 * 5 * (states.products * share + outputs.products * even) / issued
    )
    rate = 989e12 * 0.62 / 4096
    assert row.products == pytest.approx((states.products * share + outputs.products * even) / rate)
    special = 132 * 16 * 1.98e9
    assert row.special == pytest.approx(
        32 * (states.products * share + outputs.products * even) / special
    )
    assert predict(way=1.0).bound == "products" or predict(way=1.0).bound == "memory"
    assert predict(way=100.0).bound in ("issue", "latency")
    # The goal is a third of what is published.
    assert row.goal == pytest.approx(6.37e-3 / 3) and row.peer_seconds == 6.37e-3 and not row.misses
    back = predict("backward", way=200.0)
    assert back.goal == pytest.approx((15.2e-3 - 6.37e-3) / 2.5) and back.misses
    assert back.launches == 5
    other = predict(shape="8x2048x4x256x512", way=200.0)
    assert other.goal is None and not other.misses and other.peer is None
    moved = TOKENS * 16 * 2 * (2 * 128 + 2 * 256 + 2)
    assert row.roof == pytest.approx(moved / 4.3e12 + 3e-6)
    # A tile comes while the one before is made: of few blocks, the longer of both for each.
    few = predict(shape="1x8192x1x64x64", way=1.0)
    states, outputs = kernels("mlstm", "forward", "1x8192x1x64x64")
    assert states.blocks == 1 and outputs.blocks == 128
    assert few.kernels["matrix_memory_states 1 64 64"] == pytest.approx(129 * 0.75e-6 + 3e-6)


def test_peer():
    row = predict("8x2048x1536")
    assert row.peer == "accelerated-scan"
    assert row.peer_seconds == pytest.approx(8 * 2048 * 1536 * 6 / (0.8 * 4.3e12) + 3e-6)
    assert predict("8x2047x4096").peer is None  # it takes powers of two


@pytest.fixture
def run(tmp_path, capsys):
    def run(*options, kernels=None):
        file = tmp_path / "budget.json"
        file.write_text(json.dumps(kernels or budget()))
        arguments = ["--budget", str(file), "--out", str(tmp_path), "--device", "H200"]
        assert gpu_model.main([*arguments, "--shapes", f"{SHAPE}:bfloat16", *options]) == 0
        result = json.loads((tmp_path / "gpu_model.json").read_text())
        return capsys.readouterr().out, (tmp_path / "gpu_model.md").read_text(), result

    return run


def test_it_says_that_it_predicts(run, tmp_path):
    printed, table, result = run("--measured", str(tmp_path / "none"))
    for text in (printed, table, result["about"], *(row["label"] for row in result["rows"])):
        assert "prediction, not a measurement" in text
    assert "| measured |" not in table and "measured" not in result["rows"][0]
    assert len(result["rows"]) == 2 * len(gpu_model.MODELLED)
    _, table, result = run("--measured", str(tmp_path / "none"), "--shapes", f"{MLSTM}:bfloat16")
    assert len(result["rows"]) == 2 * len(gpu_model.MATRIX) and "published" in table
    assert "matrix_memory_outputs 1 128" in table and "| products |" in table
    assert all(
        sum(row["kernels"].values()) == pytest.approx(row["seconds"], rel=1e-3)
        for row in result["rows"]
    )


@pytest.mark.parametrize("shape", [SHAPE, [8, 4096, 4096]])
def test_measured_times_stand_beside(run, tmp_path, shape):
    file = tmp_path / "gpu.json"
    one = {
        "device": "NVIDIA H200",
        "operator": "min_gru",
        "direction": "backward",
        "shape": shape,
        "dtype": "bfloat16",
        "seconds": 1e-3,
    }
    file.write_text(json.dumps([one]))
    printed, table, result = run("--measured", str(file))
    assert "measured" in printed and "| measured | error |" in table and "1.00 ms" in table
    (row,) = [row for row in result["rows"] if "measured" in row]
    assert (row["operator"], row["direction"], row["measured"]) == ("min_gru", "backward", 1e-3)
    assert row["error"] == pytest.approx(1e-3 / row["seconds"] - 1, rel=1e-3)


def test_times_of_the_benchmarks_stand_beside(run, tmp_path):
    """Those of what the model predicts, from the files that run.py and gpu_matrix_memory.py write."""
    row = {"mode": "backward", "shape_name": SHAPE, "dtype": "bfloat16", "seconds_min": 1e-3}
    matrix = row | {"operator": "mlstm", "shape_name": MLSTM}
    operators = {
        "linear_scan": "operators",
        "selective_scan[fused]": "mamba",
        "selective_scan": "mamba",
    }
    result = {"machine": {"gpu": "NVIDIA H200"}, "operators": [], "mamba": []}
    for operator, kind in operators.items():
        result[kind].append(row | {"operator": operator, "seconds_min": len(operator) * 1e-3})
    result["operators"].append(row | {"operator": "min_gru", "mode": "forward+backward"})
    other = {"machine": {"gpu": "NVIDIA H200"}, "matrix": [matrix | {"precision": None}]}
    other["matrix"].append(matrix | {"operator": "ssd", "precision": "high"})
    files = [tmp_path / "one.json", tmp_path / "other.json", tmp_path / "missing.json"]
    for file, content in zip(files, (result, other), strict=False):
        file.write_text(json.dumps(content))
    shapes = [f"{SHAPE}:bfloat16", f"{MLSTM}:bfloat16"]
    _, table, found = run("--measured", *map(str, files), "--shapes", *shapes)
    measured = {row["operator"]: row["measured"] for row in found["rows"] if "measured" in row}
    assert measured == {"linear_scan": 0.011, "selective_scan": 0.021, "mlstm": 1e-3}
    assert "| measured | error |" in table


def test_with_the_budget_of_the_kernels(run):
    kernels = json.loads(gpu_model.BUDGET.read_text())
    shapes = [f"{shape}:{dtype}" for shape, dtype in gpu_model.SHAPES]
    _, _, result = run("--device", *gpu_model.DEVICES, "--shapes", *shapes, kernels=kernels)
    assert len(result["rows"]) == len(gpu_model.DEVICES) * len(shapes) * 2 * len(gpu_model.MODELLED)
    assert all(row["seconds"] >= row["roof"] * 0.999 for row in result["rows"])


def test_matrix_memories_with_the_budget_of_the_kernels(run):
    """On the architectures whose machine code has been counted; the others are named."""
    kernels = json.loads(gpu_model.BUDGET.read_text())
    counted = {
        device.name
        for device in gpu_model.DEVICES.values()
        if "per_element" in kernels["kernels"]["matrix_grad_keys 1"][device.code]
    }
    assert {"H200", "H100"} <= counted
    shapes = [
        f"{shape}:{dtype}"
        for shape in {*gpu_model.GPU_MATRIX_SHAPES["mlstm"], *gpu_model.GPU_MATRIX_SHAPES["ssd"]}
        for dtype in gpu_model.MATRIX_DTYPES
    ]
    options = ["--op", "mlstm", "ssd", "--device", *gpu_model.DEVICES, "--shapes", *shapes]
    printed, table, result = run(*options, kernels=kernels)
    assert len(result["rows"]) == len(counted) * len(shapes) * 2 * 2
    assert {row["device"] for row in result["rows"]} == counted
    assert all(row["seconds"] >= row["roof"] * 0.999 for row in result["rows"])
    for device in gpu_model.DEVICES.keys() - counted:
        assert f"mlstm on {device}" in printed and f"ssd on {device}" in table
