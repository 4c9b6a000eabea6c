"""The same bits in every run and for every number of threads; the same numbers on every instruction
set."""

import os
import subprocess
import sys
import time

import pytest
import torch
from cases import ALL, CASES, close, cotangents, gradients, over, wide

# wide, long and narrow (where a driver may split time), odd, and many short rows
SHAPES = ((3, 257, 100), (1, 4099, 3), (1, 300, 33), (64, 17, 40), (2, 70, 1000))


def run(case, options, x, weights):
    f = case.bind(**options)
    return [*f(*x), *gradients(f, x, weights=weights)]


def problems(case, options, dtype, generator, device):
    for B, T, D in SHAPES:
        for reverse in (False, True):
            yield (
                dict(options, reverse=reverse),
                case.leaves(B, T, D, dtype, generator, device, grad=True),
            )
    cu = torch.tensor([0, 5, 5, 600, 1500], device=device)
    yield (
        dict(options, cu_seqlens=cu),
        case.leaves(1, 1500, 40, dtype, generator, device, state=4, grad=True),
    )


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@over(dtypes="all", cases=ALL)
def test_runs_and_threads(case, options, dtype, generator, device, threads):
    for settings, x in problems(case, options, dtype, generator, device):
        weights = cotangents(case.bind(**settings)(*x), generator)
        threads(1)
        one = run(case, settings, x, weights)
        assert equal(run(case, settings, x, weights), one), "two runs differ"
        if device == "cpu":
            for n in (2, 3):
                threads(n)
                other = run(case, settings, x, weights)
                if case.by_torch(settings):
                    for got, want in zip(other, one, strict=True):
                        close(got, wide(want), factor=2 * case.slack, grad=True)
                else:
                    assert equal(other, one), f"{n} threads differ from one"


@over(variants=False, cases=ALL)
def test_step_and_threads(case, generator, device, threads):
    x = case.at(case.leaves(600, 1, 100, torch.float32, generator, device), 0)
    indices = torch.randperm(600, generator=generator).to(device)
    threads(1)
    want = case.step(*x, state_indices=indices)
    threads(2)
    assert equal(case.step(*x, state_indices=indices), want)


@over(variants=False, cases=ALL)
def test_slots_named_twice(case, generator, device, threads):
    """Two rows on one slot of a pool: refused, or the same in every run and for every number of
    threads. Never a race."""
    rows = case.leaves(600, 1, 100, torch.float32, generator, device, state=5)
    x = case.at(rows, 0)
    indices = torch.randint(0, 5, (600,), generator=generator).to(device)
    want = None
    for n in (1, 2, 2, 2):
        threads(n)
        states = [y.clone() for y in x[case.inputs :]]
        try:
            h = case.step_(*x[: case.inputs], *states, indices)
        except ValueError as error:
            assert f"{case.name}_step" in str(error) and "state_indices" in str(error)
            return
        got = [h, *states]
        want = want or got
        assert equal(got, want), f"{n} threads"
        assert equal(got, case.step(*x, indices))


@pytest.mark.unpoisoned
@over(variants=False, cases=ALL)
def test_more_than_one_thread_works(case, generator, device, threads):
    """Bitwise equality would hold just as well if all ran on one thread."""
    if device != "cpu":
        pytest.skip("about the CPU's thread pool")
    threads(2)
    x = case.leaves(8, 512, 512, torch.float32, generator, grad=True)
    weights = cotangents(case.bind()(*x), generator)
    forward = backward = 0.0

    def others():
        """CPU time of this process that is not this thread's."""
        return time.process_time() - time.thread_time()

    begin = time.thread_time()
    while time.thread_time() - begin < 0.5:
        start = others()
        outputs = case.bind()(*x)
        middle = others()
        torch.autograd.grad(outputs, x, weights)
        forward += middle - start
        backward += others() - middle
    # the other thread of a pool of two does about half; a call alone on its thread, nothing
    assert forward > 0.05 and backward > 0.05, f"other threads: {forward:.2f} s, {backward:.2f} s"


# ---- instruction sets ----
CHILD = """
import sys, torch, torch_ext
from cases import ALL
tasks, out = sys.argv[1:]
torch.set_num_threads(2)
results = []
for name, options, x, weights in torch.load(tasks):
    f = next(case for case in ALL if case.name == name).bind(**options)
    x = [y.requires_grad_() for y in x]
    outputs = f(*x)
    results.append([y.detach() for y in (*outputs, *torch.autograd.grad(outputs, x, weights))])
torch.save(results, out)
"""
CAPABILITIES = {"default": "generic", "avx2": "avx2", "avx512": "avx512"}


def isa_tasks():
    tasks = []
    for case in ALL:
        g = torch.Generator().manual_seed(len(tasks))
        for options in case.variants:
            for dtype in case.dtypes:
                for shape in ((2, 40, 37), (1, 70, 64), (3, 5, 3)):
                    x = case.leaves(*shape, dtype, g)
                    weights = cotangents(case.bind(**options)(*x), g)
                    tasks.append((case.name, options, x, weights))
    return tasks


@pytest.fixture(scope="module")
def by_capability(tmp_path_factory, child_environment):
    """What a fresh process computes under each value of ATEN_CPU_CAPABILITY."""
    folder = tmp_path_factory.mktemp("isa")
    torch.save(isa_tasks(), folder / "tasks")
    found = {}
    c = pytest.importorskip("torch_ext._C", reason="torch_ext._C was not built")
    for capability, isa in CAPABILITIES.items():
        there = c.force_isa(isa)
        c.force_isa("")
        if not there:
            continue  # torch itself would take the variable at its word, and die
        out = folder / capability
        subprocess.run(
            [sys.executable, "-c", CHILD, folder / "tasks", out],
            env=dict(child_environment, ATEN_CPU_CAPABILITY=capability),
            check=True,
            timeout=300,
        )
        found[capability] = torch.load(out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_instruction_sets(case, device, by_capability):
    """Each is as right as the reference demands, so that they differ by rounding alone."""
    if device != "cpu":
        pytest.skip("about the CPU's instruction sets")
    for k, (name, options, x, weights) in enumerate(isa_tasks()):
        if name != case.name:
            continue
        exact = [wide(y).requires_grad_() for y in x]
        f = case.bind(case.reference, **options)
        want = [*f(*exact), *gradients(f, exact, weights=[wide(g) for g in weights])]
        for capability, results in by_capability.items():
            for j, (g, w) in enumerate(zip(results[k], want, strict=True)):
                grad = j > len(case.states)
                close(g, w, grad=grad, factor=case.slack, name=f"{capability}, output {j}")


def test_force_isa(generator, device):
    """The same in one process, by the hook of torch_ext._C: what is not built or not there is
    refused."""
    c = pytest.importorskip("torch_ext._C", reason="torch_ext._C was not built")
    if device != "cpu":
        pytest.skip("about the CPU's instruction sets")
    assert set(c.isas()) <= {"generic", "avx2", "avx512"} and "generic" in c.isas()
    chosen = c.isa()
    case = CASES[-1]
    x = case.leaves(2, 40, 37, torch.float32, generator, grad=True)
    weights = cotangents(case.bind()(*x), generator)
    want = run(case, {}, [wide(y) for y in x], [wide(g) for g in weights])
    try:
        assert not c.force_isa("mmx")
        for isa in c.isas():
            if c.force_isa(isa):
                assert c.isa() == isa
                for k, (g, w) in enumerate(zip(run(case, {}, x, weights), want, strict=True)):
                    close(g, w, grad=k > 1, name=isa)
    finally:
        assert c.force_isa("")
    assert c.isa() == chosen


def test_chosen_isa_follows_the_environment(child_environment):
    pytest.importorskip("torch_ext._C", reason="torch_ext._C was not built")
    code = "import torch, torch_ext._C as c; print(c.isa())"
    env = dict(child_environment, ATEN_CPU_CAPABILITY="default")
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "generic", os.environ.get("ATEN_CPU_CAPABILITY")
