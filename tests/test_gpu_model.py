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
    return {"kernels": kernels}


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


def test_with_the_budget_of_the_kernels(run):
    kernels = json.loads(gpu_model.BUDGET.read_text())
    shapes = [f"{shape}:{dtype}" for shape, dtype in gpu_model.SHAPES]
    _, _, result = run("--device", *gpu_model.DEVICES, "--shapes", *shapes, kernels=kernels)
    assert len(result["rows"]) == len(gpu_model.DEVICES) * len(shapes) * 2 * len(gpu_model.MODELLED)
    assert all(row["seconds"] >= row["roof"] * 0.999 for row in result["rows"])
