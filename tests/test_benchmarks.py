"""The benchmark and the GPU check themselves, without a GPU: what is timed, checked, reported, and
how a part that fails is survived. A backend on the CPU stands for CUDA."""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not here"),
]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # Before each timing; in a process that has imported everything it takes a quarter of a second.
    monkeypatch.setattr(gc, "collect", lambda: 0)


class FakeBackend:
    """CUDA's part of gpu.py on the CPU. A graph is a list of calls, which it counts."""

    device = "cpu"

    def __init__(self, refuses=()):
        self.log, self.refuses = [], refuses

    def l2_bytes(self):
        return 2**16

    def describe(self):
        return {"gpu": "none", "cuda": "0", "driver": "0"}

    def arithmetic_peak(self):  # those of an H200
        return {"special_per_ns": 4181.8, "issue_per_ns": 33454.0}

    def clocks(self):
        return "unknown"

    def synchronize(self):
        pass

    def warm_up(self, calls):
        for call in calls:
            call()

    def capture(self, calls, keep):
        if any(call in self.refuses for call in calls):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay():
            self.log.append((calls[0], len(calls)))
            for call in calls:
                call()

        return replay

    def seconds(self, work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def peak_bytes(self, call):
        call()
        return 2**20


def graph_timer(backend, sets=1, rounds=4):
    from gpu import GraphTimer
    from measure import Effort

    return GraphTimer(backend, Effort(0.0, rounds, 0.0), sets)


# ---- timing on a GPU ----
def test_variants_take_turns():
    def a():
        pass

    def b():
        pass

    def c():
        pass

    backend = FakeBackend()
    samples = graph_timer(backend).measure({"one": [a], "two": [b, c]})
    assert samples["one"].calls == 10 and samples["two"].calls == 10
    assert len(samples["one"].seconds) == len(samples["two"].seconds) == 4
    assert [call for call, _ in backend.log[-8:]] == [a, b] * 4
    assert all(sample.timed_as == "graph" for sample in samples.values())
    assert all(sample.eager_seconds > 0 for sample in samples.values())
    summary = samples["one"].summary()
    names = ("min", "quartile_1", "median", "quartile_3", "max")
    assert [summary[f"seconds_{name}"] for name in names] == sorted(
        summary[f"seconds_{name}"] for name in names
    )


def test_what_cannot_be_captured_says_so():
    def refused():
        pass

    def fine():
        pass

    samples = graph_timer(FakeBackend(refuses=(refused,))).measure({"a": [refused], "b": [fine]})
    assert "not permitted" in samples["a"].timed_as and "more" not in samples["a"].timed_as
    assert samples["b"].timed_as == "graph" and len(samples["a"].seconds) == 4


def test_buffers_exceed_the_cache():
    from gpu import MOST_SETS, sets_needed

    assert sets_needed(2**30, 2**26) == 1
    assert sets_needed(2**27, 2**26) == 2
    assert sets_needed(100, 2**26) == MOST_SETS


def test_arithmetic_without_a_compiler(monkeypatch):
    import gpu

    def no_compiler(_):
        raise RuntimeError("no C compiler\nfound")

    monkeypatch.setattr(torch, "compile", no_compiler)
    rates = gpu.arithmetic_rates(graph_timer(FakeBackend()), 8)
    assert rates["exp_per_ns"] is None and rates["no_fma_because"] == "RuntimeError: no C compiler"


def arguments(*argv):
    from run import parse

    return parse(["--quick", "--device", "cuda", *argv])


@pytest.mark.slow
def test_a_whole_run_on_a_gpu(tmp_path, monkeypatch):
    import gpu
    import report
    import run
    from gpu_check import ratio_goals, share_goals
    from measure import Machine

    rates = {"exp_per_ns": 100.0, "fma_per_ns": None, "no_fma_because": "not asked"}
    monkeypatch.setattr(gpu, "arithmetic_rates", lambda *_: rates)
    args = arguments("--op", "linear_scan", "min_gru[g]", "--shapes", "2x40x24", "in-L2")
    args.dtype = ["float32", "bfloat16"]
    args.peers = ["torch.nn", "accelerated-scan", "minGRU-pytorch"]
    args.peer_shapes, args.out = ["2x32x8"], tmp_path
    settings = run.make_settings(args, [0]) | {"backend": FakeBackend(), "seconds": 0.001}
    result = run.new_result()
    run.run_all(args, settings, result)
    assert not result["wrong"] and not result["mamba"] and not result["mamba_steps"]
    modes = {"forward", "backward", "forward+backward"}
    assert {row["mode"] for row in result["operators"]} == modes
    assert len(result["operators"]) == 2 * 3 * 2
    for row in result["operators"]:
        assert row["fraction_of_copy"] > 0 and row["timed_as"] == "graph"
        assert row["sets_of_buffers"] > 1 and row["goal"] is None
    assert {row["function"] for row in result["steps"]} == {
        "linear_scan_step",
        "linear_scan_step_",
        "min_gru_step",
        "min_gru_step_",
    }
    assert all(row["peak_bytes"] for row in result["memory"] if "failed" not in row)
    assert "torch.nn" in {row["peer"] for row in result["peers"]}
    assert {row["what"] for row in result["alone"]} >= {"MinGRU: layer, training step"}

    result["machine"] = Machine([0]).describe() | FakeBackend().describe()
    result["settings"] = {"minutes": 0.1}
    written = run.save(result, args)
    assert {path.name for path in written} >= {"cuda.json"}
    assert json.loads((tmp_path / "cuda.json").read_text())["operators"]
    text = report.markdown(result)
    assert "copy bandwidth" in text and "called from Python" in text
    assert "Peak memory" in text and "One token" in text
    assert report.summary(result)
    assert share_goals(result) and not any(goal["met"] for goal in share_goals(result))
    assert all(goal.get("reason") or goal["found"] for goal in ratio_goals(result))


def test_goals_of_a_gpu():
    from gpu_check import ratio_goals, share_goals
    from shapes import DEFAULT_OPERATORS, GPU_GOALS

    rows = [
        {"shape_name": shape, "dtype": dtype, "mode": mode, "operator": name}
        | {"fraction_of_copy": goal - (0.1 if name == "min_lstm" else 0)}
        for (shape, dtype, mode), goal in GPU_GOALS.items()
        for name in DEFAULT_OPERATORS
    ]
    found = share_goals({"operators": rows})
    assert [goal["what"].split()[0] for goal in found if not goal["met"]] == ["min_lstm"] * 4
    assert share_goals({"operators": rows[1:]})[0]["found"] is None

    row = {"what": "linear_scan: forward", "shape": [1, 2, 3], "dtype": "bfloat16"}
    peers = [row | {"peer": "accelerated-scan", "ratio": 0.9}]
    missing = [{"peer": "fla-hgrn", "what": "all", "reason": "not installed"}]
    found = ratio_goals({"peers": peers, "not_run": missing})
    assert not any(goal["met"] for goal in found)
    assert [goal.get("reason") for goal in found] == [None, "not timed", "not installed"]


# ---- comparing with peers ----
def comparison(*contenders):
    from peers import Comparison

    x = torch.ones(3)
    return Comparison("adding", (3,), "float32", lambda index: lambda: (x + 1,), list(contenders))


def test_each_contender_is_checked_for_itself():
    from peers import Contender, compare

    def broken(index):
        raise NotImplementedError("only for widths of 32\nTraceback")

    contenders = (
        Contender("right", lambda index: lambda: (torch.full((3,), 2.0),), 1e-6),
        Contender("wrong", lambda index: lambda: (torch.full((3,), 2.5),), 1e-6),
        Contender("not a number", lambda index: lambda: (torch.full((3,), torch.nan),), 1e-6),
        Contender("broken", broken, 1e-6),
        Contender("another model", lambda index: lambda: (torch.zeros(3),), None),
    )
    rows = list(compare(comparison(*contenders), graph_timer(FakeBackend()), None))
    kinds = [(kind, row.get("peer")) for kind, row in rows]
    assert kinds == [
        ("wrong", "wrong"),
        ("wrong", "not a number"),
        ("not_run", "broken"),
        ("alone", None),
        ("peers", "right"),
        ("peers", "another model"),
    ]
    assert rows[2][1]["reason"] == "NotImplementedError: only for widths of 32"
    assert rows[4][1]["ratio_min"] <= rows[4][1]["ratio_max"]


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    import peers

    monkeypatch.setitem(peers.PEERS, "other", peers.Peer("no.such.module", "pip install other"))
    assert peers.why_not("other", "cpu") == "not installed: pip install other"
    assert peers.why_not("fla-hgrn", "cpu") == "runs on cuda only"
    assert peers.why_not("torch.nn", "cpu") is None


@pytest.mark.parametrize("layer", ["MinGRU", "MinLSTM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_have_the_peers_weights(layer, dtype):
    import peers

    if peers.why_not("minGRU-pytorch", "cpu"):
        pytest.skip("minGRU-pytorch is not installed")
    names = ["minGRU-pytorch", "torch.nn"]
    (only,) = peers.layer_comparisons(layer, names, (2, 9, 16), dtype, "cpu")
    rows = list(peers.compare(only, graph_timer(FakeBackend(), rounds=2), None))
    assert [kind for kind, _ in rows] == ["alone", "peers", "peers"], rows


def test_hgrn_is_compared_in_terms_of_a(monkeypatch):
    """With a stand-in for the package: its gate is log a, so its gradient is turned into ours."""
    import peers

    import torch_ext

    def fla_hgrn():
        return lambda g, x: torch_ext.linear_scan_reference(g.exp(), x)[0]

    monkeypatch.setattr(peers, "_fla_hgrn", fla_hgrn)
    for only in peers.scan_comparisons(["fla-hgrn"], (2, 9, 4), torch.float32, "cpu", 2):
        rows = list(peers.compare(only, graph_timer(FakeBackend(), sets=2, rounds=2), None))
        assert [kind for kind, _ in rows] == ["alone", "peers"], rows


# ---- a run on the CPU ----
@pytest.mark.slow
def test_a_run_on_the_cpu(tmp_path, child_environment):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--threads", "1"]
    command += ["--op", "min_gru", "--shapes", "2x64x64", "--peers", "torch.nn"]
    command += ["--out", str(tmp_path), "--markdown", str(tmp_path / "table.md"), "--no-plots"]
    child = subprocess.run(
        command, capture_output=True, text=True, env=child_environment, timeout=300
    )
    assert child.returncode == 0, child.stdout + child.stderr
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["settings"]["complete"] and not result["wrong"]
    assert {row["mode"] for row in result["operators"]} == {"forward", "forward+backward"}
    assert len(result["steps"]) == 4 and len(result["memory"]) == 4
    assert {row["peer"] for row in result["peers"]} == {"torch.nn"}
    # An operator's memory beyond its inputs: its results, and little else.
    for row in result["memory"]:
        if row["tensors_needed"]:
            size = row["shape"][0] * row["shape"][1] * row["shape"][2] * 4
            assert row["peak_bytes"] >= 0.9 * row["tensors_needed"] * size, row
    assert "Share of the machine's own triad" in (tmp_path / "table.md").read_text()


# ---- Mamba ----
def test_operators_of_a_kind():
    from run import parse
    from shapes import DEFAULT_OPERATORS, GPU_MAMBA_OPERATORS, MAMBA_OPERATORS, MATRIX_OPERATORS

    everything = parse([])
    assert everything.matrix == list(MATRIX_OPERATORS) and everything.matrix_shapes is None
    matrix = parse(["--op", "matrix", "--shapes", "1x9x2x3x4", "2x3x4"])
    assert matrix.op == matrix.mamba == [] and matrix.matrix == list(MATRIX_OPERATORS)
    assert matrix.matrix_shapes == ["1x9x2x3x4"] and matrix.shapes == ["2x3x4"]
    assert parse(["--op", "ssd"]).matrix == ["ssd"]
    assert parse(["--device", "cuda"]).matrix == []
    for wrong in (["--shapes", "2x3x4"], ["--device", "cuda"]):
        with pytest.raises(SystemExit):
            parse(["--op", "mlstm", *wrong])
    assert everything.op == list(DEFAULT_OPERATORS) and everything.mamba == list(MAMBA_OPERATORS)
    mamba = parse(["--op", "mamba"])
    assert mamba.op == [] and mamba.mamba == list(MAMBA_OPERATORS)
    assert parse(["--op", "diagonal"]).mamba == []
    some = parse(["--op", "causal_conv1d", "min_lstm", "causal_conv1d"])
    assert some.op == ["min_lstm"] and some.mamba == ["causal_conv1d"]
    on_gpu = parse(["--device", "cuda"])
    assert on_gpu.op == list(DEFAULT_OPERATORS) and on_gpu.mamba == list(GPU_MAMBA_OPERATORS)
    assert parse(["--device", "cuda", "--op", "mamba"]).mamba == list(GPU_MAMBA_OPERATORS)
    with pytest.raises(SystemExit):
        parse(["--op", "no_such_operator"])


@pytest.mark.slow
def test_mamba_on_a_gpu(tmp_path, monkeypatch):
    """Operators, steps, layers, memory and peers, with stand-ins for CUDA and for the peers."""
    import gpu
    import peers
    import report
    import run
    from gpu_check import describe, mamba_goals, ratio_goals
    from measure import Machine

    rates = {"exp_per_ns": None, "no_exp_because": "not asked", "fma_per_ns": 20.0}
    monkeypatch.setattr(gpu, "arithmetic_rates", lambda *_: rates)
    stand_in_peers(monkeypatch)
    monkeypatch.setattr(peers, "why_not", lambda name, device: None)
    args = arguments("--op", "mamba", "--peers", "mamba_ssm", "causal-conv1d")
    args.out = tmp_path
    settings = run.make_settings(args, [0]) | {"backend": FakeBackend(), "seconds": 0.001}
    result = run.new_result()
    run.run_all(args, settings, result)
    assert not result["wrong"] and not result["not_run"] and not result["operators"]

    cases = {(row["operator"], row["mode"], row["dtype"]) for row in result["mamba"]}
    names = ("selective_scan", "selective_scan[fused]", "selective_scan[B,D,T]", "causal_conv1d")
    assert cases == {
        (name, mode, dtype)
        for name in names
        for mode in ("forward", "backward")
        for dtype in ("bfloat16", "float32")
    }
    assert len(result["mamba"]) == len(cases)
    for row in result["mamba"]:
        parts = [row[f"{part}_seconds"] for part in ("bandwidth", "arithmetic")]
        assert row["floor_seconds"] == max(parts) and row["timed_as"] == "graph"
        assert row["fraction_of_roof"] == row["floor_seconds"] / row["seconds_min"] > 0
        assert row["sets_of_buffers"] >= 1 and row["goal"] is None and row["error"] < 3e-2
    assert {row["sets_of_buffers"] for row in result["mamba"]} > {1}
    steps = {(row["function"], row["batch"], row["dtype"]) for row in result["mamba_steps"]}
    functions = ("selective_scan_step_", "causal_conv1d_step_", "Mamba.step", "mamba_step_")
    assert len(result["mamba_steps"]) == len(steps) == len(functions) * 2 * 2
    assert {function for function, *_ in steps} == set(functions)
    assert all(row["fraction_of_copy"] > 0 for row in result["mamba_steps"])
    memory = {row["what"] for row in result["memory"] if "failed" not in row}
    assert memory == {"selective_scan", "selective_scan[fused]", "causal_conv1d"}
    assert {(row["peer"], row["what"].partition(":")[0]) for row in result["peers"]} == {
        ("mamba_ssm", "selective_scan[fused]"),
        ("mamba_ssm", "selective_scan[B,D,T]"),
        ("mamba_ssm", "selective_scan_step_"),
        ("causal-conv1d", "causal_conv1d"),
        ("causal-conv1d", "causal_conv1d[B,D,T]"),
        ("causal-conv1d", "causal_conv1d_step_"),
    }
    assert len(result["peers"]) == 4 * 2 * 2 + 2 * 2 * 2

    result["machine"] = Machine([0]).describe() | FakeBackend().describe()
    result["settings"] = {"minutes": 0.1}
    written = {path.name for path in run.save(result, args)}
    assert "cuda.json" in written
    text = report.markdown(result)
    assert "share of the floor" in text and "products alone" in text and "mamba_ssm" in text
    assert report.summary(result)
    goals = mamba_goals(result)
    assert goals and not any(goal["met"] for goal in goals)  # other shapes than theirs
    judged = [goal for goal in ratio_goals(result) if "mamba_ssm" in goal["what"]]
    assert len(judged) == 2 * 2 * 2 + 2 * 2 and all(goal["found"] for goal in judged)
    lines = "\n".join(describe("benchmark", {"ok": False, "seconds": 1.0, "goals": goals}))
    assert "selective_scan[fused] backward, 8x2048x5120 bfloat16: share of the floor" in lines
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    assert {"cuda-mamba.png", "cuda-mamba-bfloat16.png", "cuda-peers.png"} <= written


def test_cases_on_a_gpu_fail_one_by_one(monkeypatch):
    import gpu_mamba
    import report
    import run
    from operators import WrongResult

    def layer(width, batch, dtype, *_):
        raise torch.cuda.OutOfMemoryError("out of memory\nand more")
        yield

    def operator(name, operator, batch, *_):
        if name == "causal_conv1d":
            raise WrongResult("a step's y is wrong")
        if batch > 1:
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        yield {"function": "kept"}

    monkeypatch.setattr(gpu_mamba, "time_layer_step", layer)
    monkeypatch.setattr(gpu_mamba, "time_operator_step", operator)
    monkeypatch.setattr(report, "gpu_mamba_step_line", str)
    args = arguments("--op", "mamba", "--dtype", "float32")
    result = run.new_result()
    settings = run.make_settings(args, [0]) | {"backend": FakeBackend()}
    settings["gpu_limits"] = None, {}
    run.time_mamba_steps_on_gpu(args, settings, result)
    assert [row["function"] for row in result["mamba_steps"]] == ["kept"]
    assert [row["what"] for row in result["wrong"]] == [
        "a step's y is wrong",
        "selective_scan_step_ float32, B = 8: RuntimeError: CUDA error: an illegal memory access",
        "a step's y is wrong",
    ]
    assert [(row["what"], row["reason"]) for row in result["not_run"]] == [
        (f"Mamba.step float32, B = {batch}", "OutOfMemoryError: out of memory") for batch in (1, 8)
    ]


def test_dtypes_of_mamba_on_a_gpu(monkeypatch):
    import gpu
    import run

    rates = {"exp_per_ns": 1.0, "fma_per_ns": 1.0}
    monkeypatch.setattr(gpu, "arithmetic_rates", lambda *_: rates)
    args = arguments("--op", "selective_scan[bfloat16]", "causal_conv1d", "--shapes", "2x9x8")
    args.dtype, args.mode = ["float64", "float16"], ["forward"]
    result = run.new_result()
    settings = run.make_settings(args, [0]) | {"backend": FakeBackend(), "seconds": 0.001}
    run.time_mamba_operators_on_gpu(args, settings, result)
    assert [(row["operator"], row["dtype"]) for row in result["mamba"]] == [
        ("selective_scan[bfloat16]", "bfloat16"),
        ("causal_conv1d", "float16"),
    ]
    assert [row["what"] for row in result["not_run"]] == ["causal_conv1d in float64"]


def stand_in_peers(monkeypatch, factor=1.0):
    """mamba_ssm's and causal-conv1d's functions by their signatures and layouts, from references."""
    import peers

    import torch_ext

    def turned(x):
        return x.transpose(1, 2) if x is not None and x.dim() == 3 else x

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert all(x.stride(-1) == 1 for x in (u, delta, B, C) if x is not None)
        given = map(turned, (u, delta, A, B, C, D, z, delta_bias))
        y, _ = torch_ext.selective_scan(*given, delta_softplus=delta_softplus)
        return factor * turned(y)

    def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        y = torch_ext.selective_scan_step_(
            x, dt, A, B, C, D, z, dt_bias, state, delta_softplus=dt_softplus
        )
        return factor * y

    def causal_conv1d_fn(x, weight, bias, activation):
        assert 1 in (x.stride(1), x.stride(2))
        return factor * turned(
            torch_ext.causal_conv1d(turned(x), weight, bias, activation=activation)[0]
        )

    def causal_conv1d_update(x, conv_state, weight, bias, activation):
        y = torch_ext.causal_conv1d_step_(x, weight, bias, conv_state, activation=activation)
        return factor * y

    functions = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
    monkeypatch.setattr(peers, "_mamba_ssm_scan", lambda: selective_scan_fn)
    monkeypatch.setattr(peers, "_mamba_ssm_step", lambda: selective_state_update)
    monkeypatch.setattr(peers, "_causal_conv1d", functions.__getitem__)


def test_mambas_peers_are_checked(monkeypatch):
    import peers
    from mamba_operators import MambaChecker
    from shapes import GPU_MAMBA_COMPARED

    names, timer = ["mamba_ssm", "causal-conv1d"], graph_timer(FakeBackend(), sets=2, rounds=2)
    checker = MambaChecker()

    def kinds():
        comparisons = [
            comparison
            for name, operator in GPU_MAMBA_COMPARED.items()
            for comparison in peers.mamba_operator_comparisons(
                names, name, operator, (2, 9, 8), torch.float32, checker, 2
            )
        ]
        comparisons += peers.mamba_step_comparisons(names, 3, 8, torch.float32, "cpu", 2)
        assert len(comparisons) == 10
        return {kind for one in comparisons for kind, _ in peers.compare(one, timer, None)}

    stand_in_peers(monkeypatch)
    assert kinds() == {"alone", "peers"}
    stand_in_peers(monkeypatch, factor=1.001)
    assert kinds() == {"wrong", "alone"}


def test_a_package_whose_root_fails(tmp_path, monkeypatch):
    import peers

    (tmp_path / "broken_root" / "ops").mkdir(parents=True)
    (tmp_path / "broken_root" / "__init__.py").write_text("from torch import no_such_name\n")
    (tmp_path / "broken_root" / "ops" / "__init__.py").write_text("")
    (tmp_path / "broken_root" / "ops" / "scan.py").write_text(
        "from broken_root.ops import other\nanswer = other.answer\n"
    )
    (tmp_path / "broken_root" / "ops" / "other.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers._import_from("broken_root", "ops.scan").answer == 42
    with pytest.raises(ImportError):
        peers._import_from("broken_root", "ops.missing")
    with pytest.raises(ModuleNotFoundError):
        peers._import_from("no_such_root", "ops")
    for name in [name for name in sys.modules if name.startswith("broken_root")]:
        del sys.modules[name]


def test_floors_are_those_of_an_h200():
    """The times that the design was made for, in microseconds, at 4.3 TB/s."""
    from gpu_mamba import Rates, best_rates, floor_of
    from shapes import MAMBA_OPERATORS

    rates = best_rates(FakeBackend(), {"exp_per_ns": 4000.0, "fma_per_ns": None})
    assert rates == Rates(4181.8, 33454.0)
    assert best_rates(FakeBackend(), {"exp_per_ns": 5000.0}).special == 5000.0
    fused, conv = MAMBA_OPERATORS["selective_scan[fused]"], MAMBA_OPERATORS["causal_conv1d"]

    def floor(operator, mode, elements, itemsize=2):
        work = operator.gpu_work(mode, itemsize)
        moved = elements * operator.work(mode).bytes(itemsize)
        return floor_of(elements, work, moved, rates, 4300.0)

    for shape, forward, backward in (
        ((8, 2048, 5120), 326e-6, 594e-6),
        ((1, 8192, 1536), 49e-6, 89e-6),
    ):
        elements = shape[0] * shape[1] * shape[2]
        found = floor(fused, "forward", elements)
        assert found["floor_seconds"] == pytest.approx(forward, rel=0.01)
        assert found["exponentials_as_polynomials"] == pytest.approx(2.8, abs=0.05)
        assert found["special_seconds"] > found["floor_seconds"] > found["issue_seconds"]
        found = floor(fused, "backward", elements)
        assert found["bound_by"] == "issue" and found["exponentials_as_polynomials"] == 0
        assert found["floor_seconds"] == pytest.approx(backward, rel=0.01)
    for mode, seconds in (("forward", 62e-6), ("backward", 94e-6)):
        found = floor(conv, mode, 8 * 4096 * 2048)
        assert found["bound_by"] == "bandwidth"
        assert found["floor_seconds"] == pytest.approx(seconds, rel=0.01)


def test_goals_of_mamba_on_a_gpu():
    from gpu_check import describe, mamba_goals, ratio_goals
    from gpu_mamba import goal_of
    from shapes import GPU_MAMBA_GOALS, GPU_MAMBA_SHAPES, GPU_MAMBA_STEP_GOALS

    assert goal_of("selective_scan[fused]", "forward", "8x2048x5120", "bfloat16") == 0.60
    assert goal_of("selective_scan", "backward", "1x8192x1536", "bfloat16") == 0.45
    assert goal_of("causal_conv1d", "backward", "8x2048x4096", "bfloat16") == 0.85
    assert goal_of("selective_scan", "forward", "8x2048x5120", "float32") is None
    assert goal_of("selective_scan", "forward", "1x2x3", "bfloat16") is None

    rows = [
        {"operator": name, "mode": mode, "shape_name": shape, "dtype": dtype}
        | {"fraction_of_copy": 0.85, "fraction_of_roof": goal - 0.1 * (mode == "backward")}
        for (name, mode), goal in GPU_MAMBA_GOALS.items()
        for shape in GPU_MAMBA_SHAPES[name.partition("[")[0]]
        for dtype in ("bfloat16", "float32")
    ]
    steps = [
        {"function": function, "batch": batch, "dtype": "bfloat16", "fraction_of_copy": 0.8}
        for function, batch in GPU_MAMBA_STEP_GOALS
    ]
    found = mamba_goals({"mamba": rows, "mamba_steps": steps[1:]})
    assert len(found) == 2 * len(GPU_MAMBA_GOALS) + len(GPU_MAMBA_STEP_GOALS)
    missed = [goal["what"] for goal in found if not goal["met"]]
    assert len(missed) == 2 * 3 + 1 and missed[-1].startswith("selective_scan_step_, B = 128")
    assert all(what.startswith("selective_scan") and "backward" in what for what in missed[:-1])

    # Mamba's peers count where they are, and are named where they are not.
    row = {"what": "selective_scan[fused]: forward", "shape": [1, 2, 3], "dtype": "bfloat16"}
    missing = [{"peer": "causal-conv1d", "what": "all", "reason": "not installed: pip"}]
    result = {"peers": [row | {"peer": "mamba_ssm", "ratio": 3.0}], "not_run": missing}
    found = ratio_goals(result)
    assert [goal["met"] for goal in found if "mamba_ssm" in goal["what"]] == [True]
    assert not any("causal-conv1d" in goal["what"] for goal in found)
    part = {"ok": True, "seconds": 1.0, "result": result}
    assert "causal-conv1d, all: not installed" in describe("peers", part)[1]


@pytest.mark.parametrize("name", ["selective_scan[fused]", "causal_conv1d"])
def test_wrong_steps_are_found(name, monkeypatch):
    import mamba_operators
    from operators import WrongResult
    from shapes import MAMBA_OPERATORS

    import torch_ext

    operator = MAMBA_OPERATORS[name]
    function = f"{operator.function}_step_"
    right = getattr(torch_ext, function)
    given = (name, operator, 9, 24, torch.float32, "cpu")
    assert 0 < mamba_operators.check_step(*given) < 2e-5

    def output(*args, **options):
        y = right(*args, **options)
        y[-1, -1] += 1e-3 * y.abs().max()
        return y

    def state(*args, **options):
        y = right(*args, **options)
        args[len(mamba_operators.names_of(operator))][0, 0, 0] += 1e-2
        return y

    for broken, message in ((output, "y in place is"), (state, "state in place is")):
        monkeypatch.setattr(torch_ext, function, broken)
        with pytest.raises(WrongResult, match=message):
            mamba_operators.check_step(*given)


def test_what_mamba_must_move():
    from shapes import MAMBA_OPERATORS

    scan, conv = MAMBA_OPERATORS["selective_scan"], MAMBA_OPERATORS["causal_conv1d"]
    forward, backward = scan.work("forward"), scan.work("backward")
    assert (forward.exps, forward.operations, forward.bytes(4)) == (16, 64, 12)
    assert (backward.exps, backward.operations) == (16, 176)
    # u, delta, grad_y, grad_u, grad_delta; and a float32 of kept states beside each element.
    assert backward.bytes(4) == 24 and backward.bytes(2) == 14
    assert MAMBA_OPERATORS["selective_scan[fused]"].work("forward").bytes(4) == 16
    assert conv.work("forward").bytes(4) == 8 and conv.work("backward").bytes(4) == 12
    assert conv.work("forward").operations == 11
    for operator in MAMBA_OPERATORS.values():
        assert operator.beside is None or operator.beside in MAMBA_OPERATORS


@pytest.mark.parametrize(
    "name", ["selective_scan[fused]", "selective_scan[B,D,T]", "causal_conv1d"]
)
def test_wrong_operators_are_found(name, monkeypatch):
    import mamba_operators
    from operators import WrongResult
    from shapes import MAMBA_OPERATORS

    import torch_ext

    operator = MAMBA_OPERATORS[name]
    right = getattr(torch_ext, operator.function)
    shape, dtype = (2, 19, 24), torch.float32
    check = mamba_operators.MambaChecker().check
    assert 0 < check(name, operator, shape, dtype, ()) < 2e-5

    def one_value(*args, **options):
        """One of the last step's, and only in float32."""
        y, final = right(*args, **options)
        off = torch.zeros_like(y)
        off[-1, -1, -1] = 1e-3 * y.detach().abs().max() * (y.dtype == torch.float32)
        return y + off, final

    def gradient(*args, **options):
        twice = [args[0] * 2 - args[0].detach(), *args[1:]]
        return right(*(twice if args[0].dtype == torch.float32 else args), **options)

    def everywhere(*args, **options):  # in float64 as well, where it stands for the reference
        y, final = right(*args, **options)
        return y * 1.001, final

    for broken, message in ((one_value, "y is"), (gradient, "grad_"), (everywhere, "in float64")):
        monkeypatch.setattr(torch_ext, operator.function, broken)
        with pytest.raises(WrongResult, match=message):
            mamba_operators.MambaChecker().check(name, operator, shape, dtype, ())


def test_the_inputs_are_what_they_are_called():
    from mamba_operators import make_inputs, on_device
    from shapes import MAMBA_OPERATORS

    def inputs(kind):
        operator = MAMBA_OPERATORS[f"selective_scan[{kind}]"]
        return make_inputs(operator, (1, 64, 48), torch.float32)

    smallest = torch.finfo(torch.float32).smallest_normal
    (u, delta, A, B, *_), grad = inputs("denormal")
    entering = (delta * u)[..., None] * B[:, :, None]
    for lanes in entering.abs().unfold(2, 8, 8).unbind(2):  # each vector of channels
        assert ((lanes > 0) & (lanes < smallest)).any(-1).float().mean() > 0.9
    assert grad[..., ::2].abs().max() < 1e-36 < u[..., 1::2].abs().mean()
    (u, delta, A, *_), _ = inputs("large")
    exponents = delta[..., None] * A
    assert exponents.min() < -250 and (exponents.exp() < smallest).float().mean() > 0.1
    (u, delta, *_), grad = inputs("B,D,T")
    assert all(x.stride()[1] == 1 for x in (u, delta, grad))
    (copy, *_), copied_grad = on_device((u, None), grad, "cpu")
    assert copy.stride()[1] == copied_grad.stride()[1] == 1 and copy.data_ptr() != u.data_ptr()
    (u, _, A, B, *_), _ = inputs("fused,bfloat16")
    assert u.dtype is B.dtype is torch.bfloat16 and A.dtype is torch.float32


def test_scaling_is_between_equal_cases():
    from mamba_operators import add_scaling

    def row(operator, threads, seconds, isa="avx2"):
        case = {"operator": operator, "mode": "forward", "shape": [1, 2, 3], "dtype": "float32"}
        return case | {"isa": isa, "threads": threads, "seconds_min": seconds}

    rows = [row("selective_scan", 1, 4.0), row("selective_scan", 2, 2.5), row("other", 1, 1.0)]
    rows += [row("other", 2, 0.5), row("selective_scan", 2, 1.0, "avx512")]
    found = [(r["operator"], r["scaling"]) for r in add_scaling(rows)]
    assert found == [
        ("selective_scan", {"ratio": 1.6, "goal": 1.85, "meets_goal": False}),
        ("other", {"ratio": 2.0, "goal": None, "meets_goal": True}),
    ]


@pytest.mark.parametrize("mode", ["forward", "training step"])
def test_mamba_layers_have_our_weights(mode):
    import peers

    names = ["transformers", "mambapy", "associative_scan eager"]
    names = [name for name in names if peers.why_not(name, "cpu") is None]
    comparison = peers.mamba_comparison(mode, 9, 16, names)
    rows = list(peers.compare(comparison, graph_timer(FakeBackend(), rounds=2), None))
    assert [kind for kind, _ in rows] == ["alone", *["peers"] * len(names)], rows
    assert all(row["relative_difference"] < 1e-5 for kind, row in rows if kind == "peers")


def test_the_transformer_sees_its_context():
    """Against attention written out, without a cache; a wrong cache is found before it is timed."""
    import language_models
    from operators import WrongResult

    import torch_ext

    torch.manual_seed(0)
    model = language_models.Transformer(50, 24, 2, 3).eval()
    ids = torch.randint(50, (2, 7))

    @torch.no_grad()
    def plainly():
        x = model.embedding(ids)
        for block in model.blocks:
            q, k, v = block.qkv(block.norm_1(x)).view(2, 7, 3, 3, 8).unbind(2)
            scores = torch.einsum("bihc,bjhc->bhij", q, k) / 8**0.5
            scores = scores.masked_fill(torch.ones(7, 7).triu(1) > 0, -torch.inf).softmax(-1)
            x = x + block.out(torch.einsum("bhij,bjhc->bihc", scores, v).flatten(2))
            x = x + block.down(torch.nn.functional.gelu(block.up(block.norm_2(x))))
        return model.norm(x[:, -1]) @ model.embedding.weight.T

    with torch.no_grad():
        torch.testing.assert_close(model(ids, model.make_cache(2, 7)), plainly())
        mamba = torch_ext.MambaLM(50, 24, 2)
        assert 0 <= language_models._check(mamba, model, 50, torch.float32) < 1e-4
        model(ids[:, :4], cache := model.make_cache(2, 6))
        with pytest.raises(ValueError, match="ids has 2 tokens, expected 1"):
            model(ids[:, 4:6], cache, 4)

    class Forgets(language_models.Transformer):
        def forward(self, ids, cache, start=0):
            if start:
                cache[1][:, :, :, 0] = 0
            return super().forward(ids, cache, start)

    model.__class__ = Forgets
    with torch.no_grad(), pytest.raises(WrongResult, match="transformer: token by token differs"):
        language_models._check(mamba, model, 50, torch.float32)


@pytest.mark.slow
def test_a_run_of_mamba(tmp_path, child_environment):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--threads", "1"]
    command += ["--op", "selective_scan", "selective_scan[bfloat16]", "causal_conv1d"]
    command += ["--peers", "associative_scan eager", "transformer", "--seconds", "0.01"]
    command += ["--mode", "forward", "forward+backward", "step", "layer", "memory", "model"]
    command += ["--out", str(tmp_path), "--markdown", str(tmp_path / "table.md")]
    child = subprocess.run(
        command, capture_output=True, text=True, env=child_environment, timeout=300
    )
    assert child.returncode == 0, child.stdout + child.stderr
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["settings"]["complete"] and not result["wrong"]
    assert not result["operators"] and not result["paper"] and not result["steps"]
    isas = len(result["settings"]["isas"])
    assert len(result["mamba"]) == 3 * 2 * isas
    for row in result["mamba"]:
        assert row["fraction_of_roof"] > 0 and row["error"] < 3e-2
        convolution = row["operator"] == "causal_conv1d"
        assert ("fraction_of_copy" in row) == ("fraction_of_ordinary_copy" in row) == convolution
        half, scan = "bfloat16" in row["operator"], row["operator"] == "selective_scan"
        assert ("beside" in row) == (half or (scan and row["mode"] == "backward"))
        assert row["dtype"] == ("bfloat16" if half else "float32")
    assert {(row["batch"], row["function"]) for row in result["mamba_steps"]} == {
        (batch, name) for batch in (1, 8) for name in ("Mamba.step", "mamba_step_")
    }
    assert all(row["ratio_to_read"] > 0 for row in result["mamba_steps"])
    assert {row["peer"] for row in result["peers"]} == {"associative_scan eager"}
    assert {row["what"] for row in result["peers"]} == {
        "Mamba: layer, forward, T=32",
        "Mamba: layer, training step, T=32",
    }
    both = {"MambaLM", "transformer"}
    cells = {(row["who"], row["phase"], row["context"]) for row in result["models"]}
    assert cells == {(who, "prefill", n) for who in both for n in (32, 64)} | {
        (who, "decode", n) for who in both for n in (32, 64, 128)
    }
    assert all(row["tokens_per_second"] > 0 for row in result["models"])
    # Operators hold their results, and the states that the scan keeps: one tensor more at most.
    for row in result["memory"]:
        size = row["shape"][0] * row["shape"][1] * row["shape"][2] * 4
        kept = 1 if "scan" in row["what"] and row["mode"] != "forward" else 0
        assert 0.9 * size <= row["peak_bytes"] - (row["tensors_needed"] - 1) * size, row
        assert row["peak_bytes"] <= (row["tensors_needed"] + kept + 0.5) * size, row
    # Reading in chunks, memory does not grow with the text.
    peaks = {(row["chunk"], row["tokens"]): row["peak_bytes"] for row in result["long"]}
    assert peaks[512, 16384] < peaks[None, 4096] / 2 and peaks[512, 16384] < 8 * 2**20
    text = (tmp_path / "table.md").read_text()
    for words in ("Mamba's operators", "One token through a Mamba layer", "Language models of"):
        assert words in text
    assert "A long text through a MambaLM" in text and "in chunks of 512" in text
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    for plot in ("mamba", "models", "peers"):
        assert (tmp_path / f"cpu-{plot}.png").read_bytes()[:4] == b"\x89PNG"


def test_tables_go_between_the_marks(tmp_path, monkeypatch):
    import report

    monkeypatch.setattr(report, "markdown", lambda result: "| new |\n")
    file = tmp_path / "README.md"
    begin, end = report.MARKS
    file.write_text(f"before\n{begin}\n| old |\n{end}\nafter\n")
    report.merge_markdown(file, {})
    assert file.read_text() == f"before\n{begin}\n| new |\n{end}\nafter\n"
    file.write_text("without marks")
    report.merge_markdown(file, {})
    assert file.read_text() == "| new |\n"


def test_a_child_that_dies_is_a_result():
    import os

    import memory

    assert memory._forked(lambda: {"peak_bytes": 1}) == {"peak_bytes": 1}
    assert "status" in memory._forked(lambda: os._exit(3))["failed"]
    assert "ValueError" in memory._forked(lambda: {"peak_bytes": int("no")})["failed"]


# ---- gpu_check.py ----
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu(capsys):
    import gpu_check

    assert gpu_check.main([]) == 1
    said = capsys.readouterr().out
    assert said == "gpu_check.py: there is no NVIDIA GPU that torch can use here.\n"


def test_parts_fail_one_by_one(tmp_path, monkeypatch, capsys):
    import gpu_check

    def fails(args, log):
        log.write("it failed\n")
        return {"ok": False, "files": {"test_x.py": {"ok": False, "failures": ["test_x.py::one"]}}}

    def raises(args, log):
        raise OSError("no such device")

    parts = {"tests": fails, "sanitizer": raises, "graphs": lambda *_: {"ok": True, "passed": 3}}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    out = ["--out", str(tmp_path)]
    result = gpu_check.run_parts(gpu_check.parse(out), {"commit": "a"})
    assert not result["ok"]
    assert {name: part["ok"] for name, part in result["parts"].items()} == {
        "tests": False,
        "sanitizer": False,
        "graphs": True,
    }
    said = capsys.readouterr().out
    assert "test_x.py::one" in said and "OSError: no such device" in said and "3 passed" in said
    assert "it failed" in (tmp_path / "gpu_check.log").read_text()

    # One part again: the others stay; until the sources change.
    parts["tests"] = lambda *_: {"ok": True}
    one = gpu_check.parse([*out, "--part", "tests"])
    gpu_check.run_parts(one, {"commit": "a"})
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    assert saved["parts"]["tests"]["ok"] and not saved["parts"]["sanitizer"]["ok"]
    result = gpu_check.run_parts(one, {"commit": "b"})
    assert result["ok"] and list(result["parts"]) == ["tests"]


def test_commands_have_a_limit(tmp_path):
    import gpu_check

    log = gpu_check.Log(tmp_path / "log")
    sleeps = "print('started', flush=True)\nimport time\ntime.sleep(60)"
    result = gpu_check.run_command([sys.executable, "-c", sleeps], 3, log)
    assert not result["ok"] and result["reason"] == "stopped after 3 s"
    assert "started" in result["output"] and "started" in log.path.read_text()
    assert gpu_check.run_command([sys.executable, "-c", ""], 60, log)["ok"]
    missing = gpu_check.run_command(["no-such-program"], 60, log)
    assert not missing["ok"] and "no-such-program" in missing["reason"]


def test_pytest_is_read():
    from gpu_check import read_pytest

    whole = (
        "test_a.py::test_x[one-two] PASSED [ 50%]\nFAILED test_a.py::test_y - assert 1 == 2\n"
        "ERROR test_a.py::test_z - OSError\n"
        "===== 1 failed, 5 passed, 2 skipped, 1 error in 3.21s =====\n"
    )
    read = read_pytest(whole)
    assert (read["failed"], read["passed"], read["skipped"], read["error"]) == (1, 5, 2, 1)
    assert read["failures"] == ["test_a.py::test_y", "test_a.py::test_z"]
    cut = "test_a.py::test_x[one] PASSED [ 1%]\ntest_a.py::test_y FAILED [ 2%]\ntest_a.py::test_z "
    read = read_pytest(cut)
    assert (read["failed"], read["passed"]) == (1, 1)


def test_sanitizers_are_read(monkeypatch):
    import gpu_check

    read = gpu_check.read_sanitizer("400 runs, 0 wrong\n========= ERROR SUMMARY: 0 errors\n")
    assert read == {"summary": "0 errors", "exercise": "400 runs, 0 wrong"}
    race = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert gpu_check.read_sanitizer(race)["summary"].startswith("1 hazard")
    assert gpu_check.read_sanitizer("")["summary"] is None
    for tool in gpu_check.TOOLS:
        command = gpu_check.sanitizer_command("compute-sanitizer", tool)
        assert command[1:3] == ["--tool", tool] and "--device" in command


def test_the_sanitized_calls_are_right(monkeypatch):
    import exercise

    monkeypatch.setattr(exercise, "SHAPES", ((2, 5, 3),))
    results = list(exercise.differences("cpu"))
    number = 4 * (5 * 5 + len(exercise.WINDOWS) * 4 + len(exercise.SCANS)) - 2  # no complex halves
    assert len(results) == number
    assert all(error <= tolerance for _, error, tolerance in results)


# ---- matrix memories ----
def test_matrix_memories_on_the_cpu(tmp_path, monkeypatch):
    """Operators, steps, layers and language models, small, with a stand-in for mlstm_kernels."""
    import peers
    import report
    import run
    from measure import Machine

    import torch_ext

    def kernel(q, k, v, i, f):
        turned = (x.transpose(1, 2) for x in (q, k, v, i, f))
        return torch_ext.mlstm(*turned)[0].transpose(1, 2)

    absent = {"xlstm", "transformers xlstm"}
    monkeypatch.setattr(peers, "_mlstm_kernels", lambda chunk: kernel)
    monkeypatch.setattr(peers, "why_not", lambda name, _: "not here" if name in absent else None)
    args = run.parse(["--quick", "--op", "matrix", "--threads", "1", "--peers", "mlstm_kernels"])
    args.peers += sorted(absent)
    args.out = tmp_path
    settings = run.make_settings(args, [0]) | {"freed_memory_kept": False, "seconds": 0.001}
    settings |= {"isas": settings["isas"][:1], "calibration_seconds": 0.0005}
    result = run.new_result()
    run.run_all(args, settings, result)
    assert not result["wrong"] and not result["operators"] and not result["mamba"]
    assert {row["peer"] for row in result["not_run"]} == absent

    functions = ("mlstm", "ssd", "retention", "linear_attention")
    names = {f"{name}{dtype}" for name in functions for dtype in ("", "[bfloat16]")}
    rows = result["matrix"]
    assert {(row["operator"], row["mode"]) for row in rows} == {
        (name, mode) for name in names for mode in ("forward", "backward")
    }
    assert len(rows) == 2 * len(names)
    for row in rows:
        assert row["fraction_of_roof"] > 0 and row["goal"] is None and "ggml" not in row
        assert row["error"] < (6e-2 if row["dtype"] == "bfloat16" else 5e-4)
        arithmetic = row["operations"] / row["fma_per_nanosecond"] * 1e-9
        assert row["arithmetic_seconds"] == pytest.approx(arithmetic)
        held = row["beside"]["what"] if "beside" in row else None
        assert (held is None) == (row["operator"] in functions and row["mode"] == "forward")
    steps = {(row["function"], row["batch"]) for row in result["matrix_steps"]}
    assert steps == {(f"{name}_step_", batch) for name in functions for batch in (1, 32)}
    assert len(result["peers"]) == 2 * 4 and all(row["ratio"] > 0 for row in result["peers"])
    assert [row["goal"] for row in result["peers"]] == [2.5, None, None, None, 5, None, None, None]
    models = {(row["who"], row["phase"]) for row in result["xlstm_models"]}
    assert models == {
        (who, phase) for who in ("xLSTMLarge", "xLSTMLM") for phase in ("prefill", "decode")
    }

    result["machine"] = Machine([0]).describe()
    result["settings"] = {"minutes": 0.1}
    assert "cpu.json" in {path.name for path in run.save(result, args)}
    text = report.markdown(result)
    assert "Matrix memories" in text and "`ssd[bfloat16]`" in text and "xLSTMLarge" in text
    assert "`mlstm_step_`" in text and "mlstm_kernels, chunks of 32" in text
    assert report.summary(result)


def test_what_matrix_memories_must_compute():
    """The counts of the design: multiply-adds per (step, head, K, V)."""
    from matrix_memory_operators import beside_ggml
    from shapes import MATRIX_OPERATORS, MATRIX_SHAPES, parse_matrix_shape

    def each(name, mode, shape):
        shape = parse_matrix_shape(shape)
        return MATRIX_OPERATORS[name].operations(mode, shape) / (shape[3] * shape[4])

    ssd, mlstm = MATRIX_SHAPES["ssd"][1], MATRIX_SHAPES["mlstm"][0]
    assert each("ssd", "forward", ssd) == pytest.approx(2.27, abs=0.005)
    assert each("mlstm", "forward", mlstm) == 2 + 32 / 128 + 32 / 256
    assert each("mlstm", "backward", mlstm) == 4 + 32 * (3 / 256 + 2 / 128)
    assert each("mlstm", "forward", "1x9x2x16x16") == 3  # step by step
    assert each("mlstm", "backward", "1x9x2x16x16") == 8
    shape = parse_matrix_shape("2x3x4x5x6x2")
    assert MATRIX_OPERATORS["mlstm"].bytes("forward", shape, 4) == 6 * 4 * (20 + 24 + 8 + 24)
    assert MATRIX_OPERATORS["ssd"].bytes("backward", shape, 2) == 6 * 2 * (2 * (20 + 24 + 4) + 24)
    for wrong in ("1x2x3", "1x2x3x4x5x2", "axbxcxdxe", "1x2x3x4x5x0"):
        with pytest.raises(SystemExit, match="BxTxHxKxV"):
            parse_matrix_shape(wrong)

    # A core that is twice as fast halves the time of ggml as well.
    row = {"operator": "ssd", "mode": "forward", "shape_name": ssd, "threads": 1, "isa": "avx512"}
    row |= {"dtype": "float32", "nanoseconds_per_element": 0.02, "fma_per_nanosecond": 2 / 0.0114}
    assert beside_ggml(row)["ratio"] == pytest.approx(0.131 / 2 / 0.02)
    two = beside_ggml(row | {"threads": 2, "fma_per_nanosecond": 4 / 0.0114})
    assert two["ratio"] == pytest.approx(0.065 / 2 / 0.02) and not two["meets_goal"]
    assert beside_ggml(row | {"isa": "avx2"}) is None


@pytest.mark.parametrize("name", ["mlstm", "ssd"])
def test_wrong_matrix_memories_are_found(name, monkeypatch):
    import matrix_memory_operators as benchmark
    from operators import WrongResult
    from shapes import MATRIX_OPERATORS

    import torch_ext

    operator, shape = MATRIX_OPERATORS[name], (1, 70, 4, 5, 6, 2)
    given = (name, operator, shape, torch.float32, ())
    monkeypatch.setattr(benchmark.MatrixChecker, "reduced", (1, 9, 4, 3, 2, 2))
    checker = benchmark.MatrixChecker()
    assert 0 < checker.check(*given) < 5e-4
    assert 0 < benchmark.check_step(name, operator, shape, 3, torch.float32) < 2e-5

    right, step = getattr(torch_ext, name), getattr(torch_ext, f"{name}_step_")

    def late(*args):  # wrong beyond the small shape, in one head's last step
        h, state = right(*args)
        mask = torch.ones_like(h)
        mask[:, 69:, -1] = 1.05
        return h * mask.to(h.dtype), state

    def state(*args):
        h = step(*args)
        states = args[-1] if isinstance(args[-1], tuple) else args[-1:]
        states[0][0, 0, 0, 0] += 0.1
        return h

    monkeypatch.setattr(torch_ext, name, late)
    with pytest.raises(WrongResult, match=f"{name}"):
        benchmark.MatrixChecker().check(*given)
    monkeypatch.setattr(torch_ext, f"{name}_step_", state)
    with pytest.raises(WrongResult, match="state in place"):
        benchmark.check_step(name, operator, shape, 3, torch.float32)


# ---- matrix memories on a GPU ----
def stand_in_matrix_peers(monkeypatch, factor=1.0):
    """The modules of mlstm_kernels, fla and mamba_ssm, by their signatures and layouts. As the package's, mlstm's
    divisor has no gradient."""
    import functools
    import types

    import torch_ext.compat.mamba_ssm as mamba_ssm
    import torch_ext.compat.mlstm_kernels as mlstm_kernels
    from torch_ext.compat import _mamba_ssm_ssd

    def kernel(name):
        assert name.startswith("chunkwise--triton_")
        found = functools.partial(mlstm_kernels.get_mlstm_kernel(name), normalizer_grad=False)
        return lambda *args, **options: factor * found(*args, **options)

    def step(name):
        found = mlstm_kernels.get_mlstm_step_kernel(name)

        def call(*args):
            h, state = found(*args)
            return factor * h, state

        return call

    def simple_gla(q, k, v, g, scale):
        out = torch.ops.torch_ext.matrix_memory(q, k, v, g, scale=scale)
        return factor * out[0], out[1]

    def chunk_scan(x, dt, A, B, C, chunk_size):
        return factor * _mamba_ssm_ssd.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size)

    def update(state, x, dt, A, B, C, D, dt_bias):
        assert dt.stride(-1) == A.stride(-1) == A.stride(-2) == dt_bias.stride(-1) == 0
        y = mamba_ssm.selective_state_update(state, x, dt, A, B, C, D=D, dt_bias=dt_bias)
        return factor * y

    modules = {
        "mlstm_kernels.torch": {"get_mlstm_kernel": kernel, "get_mlstm_step_kernel": step},
        "fla.ops.simple_gla": {"chunk_simple_gla": simple_gla},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": chunk_scan},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": update},
    }
    for name, functions in modules.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def matrix_on_gpu(tmp_path, monkeypatch):
    """Runs gpu_matrix_memory.py on the backend that stands for CUDA: status and result."""
    import gpu
    import gpu_matrix_memory

    rates = {"exp_per_ns": None, "no_exp_because": "not asked", "fma_per_ns": 20.0}
    monkeypatch.setattr(gpu, "arithmetic_rates", lambda *_: rates)

    def run(*options):
        arguments = ["--quick", "--seconds", "0.001", "--out", str(tmp_path), *options]
        status = gpu_matrix_memory.main(arguments, FakeBackend())
        return status, json.loads((tmp_path / "gpu-matrix.json").read_text())

    return run


def test_matrix_memories_on_a_gpu(matrix_on_gpu, tmp_path, monkeypatch, capsys):
    """Operators, steps and peers, with stand-ins for CUDA and for the peers."""
    import peers
    from gpu_check import describe, matrix_goals
    from shapes import GPU_MATRIX_COMPARED, GPU_MATRIX_PEERS, GPU_MATRIX_PRECISIONS

    stand_in_matrix_peers(monkeypatch)
    monkeypatch.setattr(peers, "why_not", lambda name, device: None)
    monkeypatch.setattr("gpu_matrix_memory.why_not", lambda name, device: None)
    before = torch.get_float32_matmul_precision()
    status, result = matrix_on_gpu()
    assert torch.get_float32_matmul_precision() == before
    assert status == 0 and not result["wrong"] and not result["not_run"]
    assert result["settings"]["complete"] and result["calibration"]["multiply_adds_per_ns"] > 0

    settings = [("bfloat16", None), *(("float32", name) for name in GPU_MATRIX_PRECISIONS)]
    cases = {
        (row["operator"], row["mode"], row["dtype"], row["precision"]) for row in result["matrix"]
    }
    modes = ("forward", "backward", "forward+backward")
    assert cases == {
        (name, mode, *each) for name in ("mlstm", "ssd") for mode in modes for each in settings
    }
    assert len(result["matrix"]) == len(cases)
    for row in result["matrix"]:
        parts = [row[f"{part}_seconds"] for part in ("bandwidth", "products")]
        assert row["floor_seconds"] == max(parts) and row["timed_as"] == "graph"
        assert row["fraction_of_roof"] == row["floor_seconds"] / row["seconds_min"] > 0
        assert row["goal_seconds"] is None and row["meets_goal"] and row["sets_of_buffers"] > 1
        assert 0 < row["error"] < 6e-2
    steps = {(row["function"], row["batch"], row["dtype"]) for row in result["matrix_steps"]}
    assert len(result["matrix_steps"]) == len(steps) == 2 * 2 * 2
    assert {function for function, *_ in steps} == {"mlstm_step_", "ssd_step_"}
    found = {(row["what"], row["peer"], row["dtype"]) for row in result["peers"]}
    assert found == {
        (f"{name}: {mode}", peer, dtype)
        for name in GPU_MATRIX_COMPARED
        for mode in ("forward", "forward+backward")
        for peer in GPU_MATRIX_PEERS[name]
        for dtype in ("bfloat16", "float32")
    } | {
        (f"{name}_step_", peer, dtype)
        for name, peer in (("mlstm", "mlstm_kernels step"), ("ssd", "mamba_ssm"))
        for dtype in ("bfloat16", "float32")
    }
    assert len(result["peers"]) == 2 * 2 * 5 + 2 * 2 * 2
    halves = [row["precision"] for row in result["peers"] if ": " in row["what"]]
    assert halves.count("high") == halves.count(None) == 10

    text = (tmp_path / "gpu-matrix.md").read_text()
    for words in ("Share of the floor", "float32, medium", "One token", "xl_chunk, its Triton"):
        assert words in text
    goals = matrix_goals(result)
    judged = [goal for goal in goals if "mlstm_kernels xl_chunk" in goal["what"]]
    assert len(judged) == 4 and all(goal["found"] for goal in judged)
    assert {goal["goal"] for goal in judged if " forward," in goal["what"]} == {3.0}
    assert all(2.5 <= g["goal"] <= 3 for g in judged if "forward+backward" in g["what"])
    assert {goal["goal"] for goal in goals if goal["what"].endswith("mamba_ssm")} == {1.0}
    missing = [goal for goal in goals if goal["found"] is None]  # other shapes than theirs
    assert len(missing) == 5 + 4 and not any(goal["met"] for goal in missing)
    lines = "\n".join(describe("matrix", {"ok": False, "seconds": 1.0, "goals": goals}))
    assert "mlstm forward, 8x8192x16x128x256 bfloat16: ratio to what is published" in lines
    assert "products of bfloat16 matrices" in capsys.readouterr().out


def test_matrix_peers_that_are_wrong_or_missing(matrix_on_gpu, monkeypatch):
    stand_in_matrix_peers(monkeypatch, factor=1.1)
    monkeypatch.setattr(
        "gpu_matrix_memory.why_not", lambda name, _: None if "mamba" in name else "no"
    )
    status, result = matrix_on_gpu("--mode", "forward", "step", "--dtype", "bfloat16")
    assert status == 1 and not result["peers"]
    wrong = {(row["what"].split(":")[0].split(", ")[0], row["peer"]) for row in result["wrong"]}
    assert {peer for _, peer in wrong} == {"mamba_ssm"}
    assert len(result["wrong"]) == 2 + 2  # both passes; steps of both batches
    missing = {row["peer"]: row["reason"] for row in result["not_run"]}
    names = ("xl_chunk", "limit_chunk", "step")
    assert missing == dict.fromkeys(
        [*(f"mlstm_kernels {n}" for n in names), "fla-simple-gla"], "no"
    )


def test_matrix_memories_on_a_gpu_fail_one_by_one(matrix_on_gpu, monkeypatch):
    import gpu_matrix_memory

    import torch_ext

    right = torch_ext.mlstm

    def wrong(*args, **options):  # in half precision
        h, state = right(*args, **options)
        return h * (1.2 if h.dtype == torch.bfloat16 else 1.0), state

    def step(name, operator, shape, batch, *_):
        if batch == 1:
            raise torch.cuda.OutOfMemoryError("out of memory\nand more")
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    monkeypatch.setattr(torch_ext, "mlstm", wrong)
    monkeypatch.setattr(gpu_matrix_memory, "time_step", step)
    status, result = matrix_on_gpu("--peers", "none", "--mode", "forward", "step", "--op", "mlstm")
    assert status == 1
    assert {(row["dtype"], row["precision"]) for row in result["matrix"]} == {
        ("float32", name) for name in ("highest", "high", "medium")
    }
    assert ["y is wrong" in row["what"] for row in result["wrong"]] == [True, False, False]
    assert "mlstm_step_ float32, B = 8: RuntimeError: CUDA error" in result["wrong"][2]["what"]
    assert [row["reason"] for row in result["not_run"]] == ["OutOfMemoryError: out of memory"] * 2


def test_options_of_matrix_memories_on_a_gpu(matrix_on_gpu, capsys):
    import gpu_matrix_memory

    args = gpu_matrix_memory.parse(["--shapes", "1x9x4x3x5x2", "1x9x4x3x5x2", "--peers", "none"])
    assert args.shapes == ["1x9x4x3x5x2"] and args.peers == [] and args.op == ["mlstm", "ssd"]
    for wrong in (["--shapes", "2x3x4"], ["--op", "retention"], ["--dtype", "float64"]):
        with pytest.raises(SystemExit):
            gpu_matrix_memory.parse(wrong)
    given = ["--shapes", "1x9x4x3x5x2", "--peers", "none", "--op", "ssd", "--dtype", "float32"]
    status, result = matrix_on_gpu(*given, "--mode", "backward")
    assert status == 0 and not result["matrix_steps"]
    assert {tuple(row["shape"]) for row in result["matrix"]} == {(1, 9, 4, 3, 5, 2)}
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="is_available"):
            gpu_matrix_memory.main(given)


@pytest.mark.parametrize("name", ["mlstm", "ssd"])
def test_the_backward_alone_is_that_of_autograd(name):
    from gpu_matrix_memory import make_call
    from matrix_memory_operators import NAMES, make_inputs
    from shapes import MATRIX_OPERATORS

    operator, shape = MATRIX_OPERATORS[name], (2, 9, 4, 3, 5, 2)
    inputs, grad = make_inputs(operator, shape, torch.float64)
    alone = make_call(operator, "backward", inputs, grad)()
    names = ("q", "k", "v", "log_decay", "log_input", "input_scale")
    alone = dict(zip(names, alone[:6], strict=True))
    both = make_call(operator, "forward+backward", inputs, grad)()
    grads = dict(zip(NAMES[name], both[1:], strict=True))
    torch.testing.assert_close(both[0], make_call(operator, "forward", inputs, grad)()[0])
    if name == "ssd":
        alone = {"C": alone["q"], "B": alone["k"], "x": alone["v"]} | {
            "dt": alone["input_scale"] + alone["log_decay"] * inputs[2],
            "A": (alone["log_decay"] * inputs[1]).sum((0, 1)),
        }
    else:
        f = inputs[4]
        alone |= {"i": alone["log_input"], "f": alone["log_decay"] * (-f).sigmoid()}
    for key, expected in grads.items():
        torch.testing.assert_close(alone[key], expected, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["mlstm", "ssd"])
def test_wrong_steps_of_matrix_memories_on_a_gpu_are_found(name, monkeypatch):
    import gpu_matrix_memory as benchmark
    from operators import WrongResult
    from shapes import MATRIX_OPERATORS

    import torch_ext

    operator = MATRIX_OPERATORS[name]
    given = benchmark.step_buffers(operator, (1, 1, 4, 5, 6, 2), 7, torch.float32, "cpu")
    before = [x.clone() for x in given[1]]
    assert 0 < benchmark.check_step(name, operator, *given) < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(given[1], before, strict=True))
    step = getattr(torch_ext, f"{name}_step_")

    def state(*args):  # in the last row
        h = step(*args)
        states = args[-1] if isinstance(args[-1], tuple) else args[-1:]
        states[0][-1, -1, 0, 0] += 0.1
        return h

    monkeypatch.setattr(torch_ext, f"{name}_step_", state)
    with pytest.raises(WrongResult, match="state in place"):
        benchmark.check_step(name, operator, *given)


def test_wrong_options_of_matrix_memories_are_found(monkeypatch):
    """Each setting has its own tolerance; options reach the operator and its reference."""
    import gpu_matrix_memory as benchmark
    from operators import WrongResult
    from shapes import GPU_MATRIX_COMPARED

    import torch_ext

    shape, right = (1, 70, 4, 5, 6, 2), torch_ext.mlstm
    monkeypatch.setattr(benchmark.GpuMatrixChecker, "reduced", (1, 9, 4, 3, 2, 2))

    def check(name, setting):
        operator = GPU_MATRIX_COMPARED[name]
        return benchmark.GpuMatrixChecker().check(name, operator, shape, torch.float32, (setting,))

    for name in GPU_MATRIX_COMPARED:
        assert 0 < check(name, "highest") < 5e-4

    def rounded(*args, **options):  # as "medium" would
        h, state = right(*args, **options)
        off = 1.0 if h.dtype is torch.float64 else 1.01
        return h * off, state

    monkeypatch.setattr(torch_ext, "mlstm", rounded)
    assert 5e-3 < check("mlstm[sigmoid]", "medium") < 6e-2
    for setting in ("highest", "high"):
        with pytest.raises(WrongResult, match="y is wrong"):
            check("mlstm[sigmoid]", setting)


def test_what_matrix_memories_need_on_a_gpu():
    from gpu_matrix_memory import floor_of
    from shapes import (
        GPU_MATRIX_PUBLISHED,
        GPU_MATRIX_SHAPES,
        MATRIX_OPERATORS,
        gpu_matrix_goal,
        parse_matrix_shape,
    )

    def floor(name, mode, index, dtype=torch.bfloat16, setting=None):
        shape = parse_matrix_shape(GPU_MATRIX_SHAPES[name][index])
        return floor_of(MATRIX_OPERATORS[name], mode, shape, dtype, setting, 4300.0, 395e3)

    # 65536 tokens of 16 heads: q and k of 128, v and h of 256, two gates; at 790 TFLOP/s.
    found = floor("mlstm", "forward", 0)
    assert found["bytes_moved"] == 65536 * 16 * 2 * (2 * 128 + 2 * 256 + 2)
    assert found["floor_seconds"] == pytest.approx(376e-6, rel=0.01)
    assert found["bound_by"] == "bandwidth"
    assert found["multiply_adds"] == 65536 * 16 * (2 * 128 * 256 + 32 * (128 + 256))
    both = floor("mlstm", "forward+backward", 0)
    alone = floor("mlstm", "backward", 0)
    for key in ("bytes_moved", "multiply_adds", "products_seconds"):
        assert both[key] == pytest.approx(found[key] + alone[key])
    wide = floor("mlstm", "forward", 0, torch.float32, "highest")
    assert wide["products_seconds"] == pytest.approx(6 * found["products_seconds"])
    assert wide["bound_by"] == "products" and wide["bytes_moved"] == 2 * found["bytes_moved"]
    medium = floor("mlstm", "forward", 0, torch.float32, "medium")
    assert medium["products_seconds"] == pytest.approx(found["products_seconds"])
    # All heads share B and C.
    shared = floor("ssd", "forward", 1)
    assert shared["bytes_moved"] == 65536 * 2 * (2 * 64 + 2 * 64 * 64 + 64)
    assert shared["multiply_adds"] == 65536 * 64 * (2 * 64 * 64 + 32 * (64 / 64 + 64))

    published = {"forward": 6.0, "forward+backward": 16.0}
    assert gpu_matrix_goal(published, "forward") == 2.0
    assert gpu_matrix_goal(published, "forward+backward") == 2.0 + 10.0 / 2.5
    assert gpu_matrix_goal({"forward+backward": 5.0}, "forward+backward") == 2.0
    assert gpu_matrix_goal({"forward+backward": 5.0}, "forward") is None
    assert gpu_matrix_goal(published, "backward") is gpu_matrix_goal({}, "forward") is None
    assert all(shape in GPU_MATRIX_SHAPES[name] for name, shape in GPU_MATRIX_PUBLISHED)


def test_goals_of_matrix_memories_on_a_gpu():
    from gpu_check import matrix_goals
    from shapes import (
        GPU_MATRIX_PUBLISHED,
        GPU_MATRIX_STEP_GOALS,
        GPU_MATRIX_STEP_SHAPES,
        gpu_matrix_goal,
        parse_matrix_shape,
    )

    rows = [
        {"operator": name, "shape_name": shape, "mode": mode, "dtype": dtype}
        | {"seconds_min": gpu_matrix_goal(published, mode) * (1.01 if name == "ssd" else 0.99)}
        for (name, shape), published in GPU_MATRIX_PUBLISHED.items()
        for mode in published
        for dtype in ("bfloat16", "float32")
    ]
    steps = [
        {"operator": name, "shape": list(parse_matrix_shape(shape)[2:]), "batch": batch}
        | {"dtype": "bfloat16", "fraction_of_copy": goal}
        for name, shape in GPU_MATRIX_STEP_SHAPES.items()
        for batch, goal in GPU_MATRIX_STEP_GOALS.items()
    ]
    times = {"ours": {"seconds_min": 1.0}, "theirs": {"seconds_min": 2.9}, "ratio": 2.9}
    row = {"what": "mlstm[sigmoid]: forward", "shape": [1, 2], "shape_name": "1x2", **times}
    row |= {"dtype": "bfloat16"}
    peers = [row | {"peer": peer} for peer in ("mlstm_kernels xl_chunk", "fla-simple-gla")]
    found = matrix_goals({"matrix": rows, "matrix_steps": steps[1:], "peers": peers})
    missed = [goal["what"] for goal in found if not goal["met"]]
    assert len(found) == 5 + 2 + 4 and len(missed) == 2 + 1 + 1
    assert missed[0].startswith("ssd forward,") and missed[1].startswith("ssd forward+backward,")
    assert missed[2] == "mlstm[sigmoid] forward, 1x2 bfloat16: ratio to mlstm_kernels xl_chunk"
    assert missed[3].startswith("mlstm_step_, B = 128")
    assert [goal["found"] for goal in found if "fla-simple-gla" in goal["what"]] == [2.9]


def test_the_check_runs_matrix_memories(tmp_path, monkeypatch):
    """The program and its arguments are those that it takes, and its file is the one that is read."""
    import gpu_check
    import gpu_matrix_memory
    import run

    commands = []

    def run_command(command, seconds, log, environment=None):
        commands.append(command)
        (tmp_path / f"{command[command.index('--name') + 1]}.json").write_text("{}")
        return {"ok": True, "returncode": 0, "output": ""}

    monkeypatch.setattr(gpu_check, "run_command", run_command)
    for name in ("matrix_goals", "share_goals", "mamba_goals", "ratio_goals"):
        monkeypatch.setattr(gpu_check, name, lambda result: [{"met": False}])
    args = gpu_check.parse(["--out", str(tmp_path), "--quick"])
    assert args.part[-1] == "matrix"
    for part in ("matrix", "benchmark", "peers"):
        found = gpu_check.PARTS[part](args, None)
        assert found["result"] == {} and not found["ok"]
    (matrix, *others) = commands
    assert Path(matrix[1]).name == "gpu_matrix_memory.py" and Path(matrix[1]).is_file()
    parsed = gpu_matrix_memory.parse(matrix[2:])
    assert parsed.out == tmp_path and parsed.name == "gpu-matrix" and parsed.quick
    for command in others:
        assert Path(command[1]).name == "run.py"
        parsed = run.parse(command[2:])
        assert parsed.device == "cuda" and parsed.out == tmp_path and parsed.quick
        assert parsed.markdown == tmp_path / f"{parsed.name}.md"
    assert run.parse(others[1][2:]).shapes == []
