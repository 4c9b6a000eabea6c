"""The benchmark and the GPU check themselves, without a GPU: what is timed, checked, reported, and
how a part that fails is survived. A backend on the CPU stands for CUDA."""

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


class FakeBackend:
    """CUDA's part of gpu.py on the CPU. A graph is a list of calls, which it counts."""

    device = "cpu"

    def __init__(self, refuses=()):
        self.log, self.refuses = [], refuses

    def l2_bytes(self):
        return 2**16

    def describe(self):
        return {"gpu": "none", "cuda": "0", "driver": "0"}

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
    assert not result["wrong"]
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
    assert len(results) == 4 * (5 * 5 + len(exercise.WINDOWS) * 4)
    assert all(error <= tolerance for _, error, tolerance in results)
