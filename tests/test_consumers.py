"""Everything that consumes an operator, on every operator. `--consumer-table FILE` writes what came
of it.

What is cheap runs for each operator by itself; what takes a compiler or a process runs on
`Everything`, a module that has them all.
"""

import copy
import faulthandler
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from cases import (
    ALL,
    CASES,
    DIRECT,
    IN_EVERYTHING,
    MATRICES,
    Everything,
    close,
    over,
    wide,
)
from torch import Tensor, nn

import torch_ext

pytestmark = pytest.mark.unpoisoned
HERE = Path(__file__).resolve().parent

# B and T >= 2 and different in the first call: torch specialises size 1, and sizes that are equal
SHAPES = ((2, 7), (3, 33), (5, 12), (4, 64))


def consumer(name):
    return pytest.mark.consumer(name)


@pytest.fixture
def x(case, generator, device):
    return case.leaves(2, 5, 3, torch.float64, generator, device, grad=True)


@pytest.fixture
def layer(case, generator, device):
    return case.layer().to(device)


@pytest.fixture
def everything(generator, device):
    return Everything().to(device)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss(f, *x):
    h, *finals = f(*x)
    return h.sin().sum() + sum(final.pow(3).sum() for final in finals)


def check(got, want, **tolerance):
    torch.testing.assert_close(got, want, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


def counter(backend):
    return torch._dynamo.testing.CompileCounterWithBackend(backend)


def batches(device, shapes=SHAPES):
    for B, T in shapes:
        yield torch.randn(B, T, 4, device=device), torch.randn(B, 4, device=device)


# ---- opcheck ----
@consumer("opcheck, forward and backward operator")
@over(dtypes=(torch.float32, torch.bfloat16, torch.complex64))
def test_opcheck_forward(case, options, dtype, generator, device):
    for state in (True, False):
        for grad in (True, False):
            x = case.leaves(2, 5, 3, dtype, generator, device, state=state, grad=grad)
            torch.library.opcheck(case.op, tuple(x), options)
    x = case.leaves(2, 5, 3, dtype, generator, device, grad=True)
    strided = [y.detach().mT.contiguous().mT.requires_grad_() for y in x]
    torch.library.opcheck(case.op, tuple(strided), options | {"reverse": True})


@consumer("opcheck, forward and backward operator")
@over(cases=[case for case in DIRECT if case.name != "selective_scan"])  # in its own file
def test_opcheck_packed(case, options, generator, device):
    x = case.leaves(1, 6, 3, torch.float32, generator, device, state=3, grad=True)
    cu = torch.tensor([0, 2, 2, 6], device=device)
    torch.library.opcheck(case.op, (*x, cu), options)
    torch.library.opcheck(case.op, (*x[:-1], None, cu.int()), options)


@consumer("opcheck, forward and backward operator")
@over(dtypes=(torch.float32, torch.complex64))
def test_opcheck_backward(case, options, dtype, generator, device):
    *x, state = case.leaves(2, 5, 3, dtype, generator, device)
    h, final = case.bind(**options)(*x, state)
    tail = (None, *options.values(), False)
    torch.library.opcheck(case.backward_op, (h, final, *x, h, state, *tail))
    torch.library.opcheck(case.backward_op, (None, final, *x, h, None, *tail))
    grad = [y.clone().requires_grad_() for y in (h, final, *x, h, state)]
    torch.library.opcheck(case.backward_op, (*grad, *tail))
    *x, state = case.leaves(1, 5, 3, dtype, generator, device, state=2)
    cu = torch.tensor([0, 2, 5], device=device)
    h, final = case.bind(**options, cu_seqlens=cu)(*x, state)
    torch.library.opcheck(case.backward_op, (h, final, *x, h, state, cu, *options.values(), False))


@consumer("opcheck, step and in-place step")
@over()
def test_opcheck_steps(case, options, generator, device):
    packet = getattr(torch.ops.torch_ext, case.name + "_step")
    in_place = getattr(torch.ops.torch_ext, case.name + "_step_")
    x = [
        y[:, 0] if y.dim() == 3 else y
        for y in case.leaves(2, 1, 3, torch.float32, generator, device)
    ]
    pool, indices = torch.randn(5, 3, device=device), torch.tensor([4, -1], device=device)
    torch.library.opcheck(packet.default, tuple(x), options)
    torch.library.opcheck(packet.default, (*x[:-1], pool, indices), options)
    torch.library.opcheck(packet.default, tuple(y.requires_grad_() for y in x), options)
    x = [y.detach() for y in x]
    torch.library.opcheck(in_place.default, tuple(x), options)
    torch.library.opcheck(in_place.default, (*x[:-1], pool, indices), options)


def matrix_memory_call(normalizer, generator, device, rows=2):
    """Of torch_ext.matrix_memory: tensors, by name, and options."""
    shapes = {"q": (1, 6, 1, 3), "k": (1, 6, 1, 3), "v": (1, 6, 2, 4), "log_decay": (1, 6, 2)}
    gate = "log_input" if normalizer == "stabilized" else "input_scale"
    shapes |= {gate: (1, 6, 2), "C": (rows, 2, 3, 4)}
    if normalizer != "none":
        shapes["n"] = (rows, 2, 3)
    if normalizer == "stabilized":
        shapes["m"] = (rows, 2)
    call = {k: torch.randn(s, generator=generator).abs() for k, s in shapes.items()}
    call["log_decay"] = -call["log_decay"]
    options = {"scale": 0.5, "eps": 1e-2, "normalizer": normalizer}
    return {k: x.to(device) for k, x in call.items()}, options


TENSORS = ("q", "k", "v", "log_decay", "log_input", "input_scale", "C", "n", "m")


@consumer("opcheck, forward and backward operator")
@pytest.mark.parametrize(
    ("normalizer", "packed"),
    [("none", True), ("sum", False), ("at_least_one", True), ("stabilized", False)],
)
def test_opcheck_of_all_matrix_memories(normalizer, packed, generator, device):
    """What their members call."""
    ops = torch.ops.torch_ext
    x, options = matrix_memory_call(normalizer, generator, device, 2 if packed else 1)
    cu = torch.tensor([0, 2, 6], device=device) if packed else None
    x = {k: y.requires_grad_() for k, y in x.items()}
    leaves = [x.get(name) for name in TENSORS]
    torch.library.opcheck(ops.matrix_memory.default, (*leaves, cu), options | {"wide_h": packed})
    *outputs, kept = ops.matrix_memory(*[y if y is None else y.detach() for y in leaves], cu,
                                       **options, checkpoints=True)  # fmt: skip
    assert kept.numel() > 0
    grads = [torch.randn_like(y).requires_grad_() if y.numel() else None for y in outputs]
    tail = (kept, cu, 0.5, 1e-2, normalizer, True, False, False)
    grads[1] = grads[1] if packed else None
    # what it is derived to is compared with the reference in test_backward.py; tracing that is slow
    grads, leaves = ([y if y is None else y.detach() for y in z] for z in (grads, leaves))
    torch.library.opcheck(ops.matrix_memory_backward.default, (*grads, *leaves, *tail))


@pytest.mark.parametrize("normalizer", ["none", "sum", "at_least_one", "stabilized"])
def test_backward_operator_of_all_matrix_memories(normalizer, generator, device):
    """Called by hand: with what the forward kept and without, an absent gradient for zeros."""
    ops = torch.ops.torch_ext
    x, options = matrix_memory_call(normalizer, generator, device, 1)
    leaves = [x.get(name) for name in TENSORS]
    *outputs, kept = ops.matrix_memory(*leaves, None, **options, checkpoints=True)
    full = [torch.randn_like(y) if y.numel() else None for y in outputs]
    tail = (None, 0.5, 1e-2, normalizer, True, False, False)
    for absent in ((), (0,), (1, 2, 3), (0, 1, 2, 3)):
        given = [None if k in absent else g for k, g in enumerate(full)]
        zeros = [torch.zeros_like(y) if k in absent and y.numel() else g
                 for k, (g, y) in enumerate(zip(given, outputs, strict=True))]  # fmt: skip
        got = ops.matrix_memory_backward(*given, *leaves, kept, *tail)
        for keeps in (kept, kept[:0]):
            want = ops.matrix_memory_backward(*zeros, *leaves, keeps, *tail)
            for g, w, leaf in zip(got, want, leaves, strict=True):
                assert leaf is None or g.shape == leaf.shape
                close(g, wide(w), grad=True)
    with pytest.raises(ValueError, match="matrix_memory_backward: kept has .* expected"):
        ops.matrix_memory_backward(*full, *leaves, kept[:-1], *tail)
    with pytest.raises(ValueError, match="matrix_memory_backward: grad_h has shape .* expected"):
        ops.matrix_memory_backward(full[0][:, 1:], *full[1:], *leaves, kept, *tail)


@consumer("opcheck, step and in-place step")
@pytest.mark.parametrize("normalizer", ["none", "stabilized"])
def test_opcheck_of_the_step_of_all_matrix_memories(normalizer, generator, device):
    x, options = matrix_memory_call(normalizer, generator, device, 6)
    # the six steps as six rows
    x = {k: y[0] if k not in ("C", "n", "m") else y for k, y in x.items()}
    leaves = [x.get(name) for name in TENSORS]
    op = torch.ops.torch_ext.matrix_memory_step_.default
    torch.library.opcheck(op, tuple(leaves), options)
    indices = torch.tensor([5, -1, 0, 2, 1, 3], device=device)
    torch.library.opcheck(op, (*leaves, indices), options)


# ---- torch.compile ----
@consumer("torch.compile(fullgraph, dynamic), inference, one compilation")
@over(variants=False, cases=ALL)
def test_compile_inference(case, layer, device):
    check_compiled_inference(layer, "aot_eager", device)


def check_compiled_inference(module, backend, device):
    count = counter(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for x, state in batches(device):
            check(compiled(x, state), module(x, state))
        assert count.frame_count == 1, "compiled again for another B or T"
        for x, state in batches(device, ((1, 1), (1, 5), (5, 1))):
            check(compiled(x, state), module(x, state))


@consumer("torch.compile(fullgraph, dynamic), training, one compilation")
@over(variants=False, cases=ALL)
def test_compile_training(case, layer, device):
    check_compiled_training(layer, "aot_eager", device)


def check_compiled_training(module, backend, device):
    count = counter(backend)
    compiled = torch.compile(
        lambda x, state: loss(module, x, state), fullgraph=True, dynamic=True, backend=count
    )
    for x, state in batches(device):
        leaves = [*module.parameters(), state.requires_grad_()]
        want = torch.autograd.grad(loss(module, x, state), leaves)
        check(torch.autograd.grad(compiled(x, state), leaves), want, atol=1e-4)
    assert count.frame_count == 1, "compiled again for another B or T"


@pytest.mark.slow
@consumer("torch.compile with inductor, inference and training")
def test_compile_with_inductor(everything, device):
    check_compiled_inference(everything, "inductor", device)
    torch._dynamo.reset()
    check_compiled_training(everything, "inductor", device)


@consumer("torch.compile, packed sequences, one compilation")
@over(variants=False, cases=IN_EVERYTHING)
def test_compile_packed(case, generator, device):
    """The number of sequences is one more size that may change."""
    count = counter("aot_eager")

    def f(cu, *x):
        return loss(case.bind(cu_seqlens=cu), *x)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=count)
    first = 0
    for steps in ([0, 3, 9, 9, 12], [0, 5, 10], [0, 0, 3, 4, 20, 31]):
        cu = torch.tensor(steps, device=device)
        x = case.leaves(1, steps[-1], 3, torch.float64, generator, device, len(cu) - 1, True)
        want = torch.autograd.grad(f(cu, *x), x)
        check(torch.autograd.grad(compiled(cu, *x), x), want)
        # the sizes of a matrix become constants while the first call is traced, which begins anew
        first = first or count.frame_count
    assert count.frame_count == first and (first == 1 or case.loose)


@consumer("torch.compile, steps")
@over(variants=False, cases=ALL)
def test_compile_steps(case, generator, device):
    """The functional step in a loop that is unrolled, and the in-place step, which is
    functionalised."""

    def run(x, states):
        out = []
        for t in range(3):
            h, *states = case.step(*case.at(x, t), *states)
            out.append(h)
        return torch.stack(out, 1), states

    leaves = case.leaves(4, 3, 5, torch.float32, generator, device)
    x, states = leaves[: case.inputs], leaves[case.inputs :]
    check(torch.compile(run, fullgraph=True, backend="aot_eager")(x, states), run(x, states))

    def in_place(x, pools, indices):
        return case.step_(*x, *pools, indices) + sum(pool.sum() for pool in pools)

    pools = case.leaves(1, 1, 5, torch.float32, generator, device, state=6)[case.inputs :]
    indices = torch.tensor([5, -1, 0, 2], device=device)
    one, other = ([pool.clone() for pool in pools] for _ in range(2))
    x = case.at(x, 0)
    got = torch.compile(in_place, fullgraph=True, backend="aot_eager")(x, one, indices)
    check(got, in_place(x, other, indices))
    check(one, other)
    assert not any(torch.equal(a, b) for a, b in zip(one, pools, strict=True))


@consumer("torch.compile of torch.func.grad")
@over(variants=False, cases=IN_EVERYTHING)
def test_compile_of_func_grad(case, x):
    x = [y.detach() for y in x]
    f = torch.func.grad(lambda *y: loss(case.bind(), *y), tuple(range(len(x))))
    check(torch.compile(f, fullgraph=True, backend="aot_eager")(*x), f(*x))


@consumer("compiled autograd")
@over(variants=False, cases=IN_EVERYTHING)
def test_compiled_autograd(case, layer, device):
    count = counter("aot_eager")
    for x, state in batches(device):
        want = torch.autograd.grad(loss(layer, x, state), layer.parameters())
        layer.zero_grad()
        compiler = torch.compile(backend=count, fullgraph=True, dynamic=True)
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss(layer, x, state).backward()
        check([p.grad for p in layer.parameters()], list(want), atol=1e-4)


@consumer("compiled autograd")
@over(variants=False, cases=IN_EVERYTHING)
def test_compiled_autograd_with_compiled_forward(case, layer, device):
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="aot_eager", dynamic=True)
        def step(x, state):
            loss(layer, x, state).backward()

        for x, state in batches(device, SHAPES[:2]):
            want = torch.autograd.grad(loss(layer, x, state), layer.parameters())
            layer.zero_grad()
            step(x, state)
            check([p.grad for p in layer.parameters()], list(want), atol=1e-4)


# ---- autocast ----
@consumer("autocast")
@over(variants=False, cases=ALL)
def test_autocast(case, layer, device):
    x = torch.randn(2, 5, 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer.inp(x).dtype is torch.bfloat16
        y, final = layer(x)
        assert y.dtype is torch.bfloat16 and final.dtype is torch.float32
        again, final = layer(x, final)
        assert final.dtype is torch.float32
    want, _ = layer(x)
    check(y.float(), want, rtol=0.05, atol=0.05)
    (y.float().sum() + again.float().sum() + final.sum()).backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.any() for p in layer.parameters())


# The convolution goes by its input alone: its own file has that.
PROMOTING = [case for case in ALL if case.name != "causal_conv1d"]


@consumer("autocast")
@over(variants=False, cases=PROMOTING)
def test_autocast_promotes(case, generator, device):
    """Mixed inputs meet in the widest dtype; the state becomes float32; double stays double."""
    n = len(case.arguments)
    x = case.leaves(2, 5, 3, torch.float32, generator, device)
    narrow = [y.bfloat16() for y in x]
    with torch.autocast(device, dtype=torch.bfloat16):
        for mixed in ([*narrow[:1], *x[1:]], [*x[: n - 1], *narrow[n - 1 :]]):
            outputs = case.function(*mixed)
            assert all(y.dtype is torch.float32 for y in outputs)
            want = case.function(*[y.float() for y in mixed])
            assert all(torch.equal(y, w) for y, w in zip(outputs, want, strict=True))
        h, *finals = case.function(*narrow)  # a state in half precision is widened
        assert h.dtype is torch.bfloat16 and all(y.dtype is torch.float32 for y in finals)
        outputs = case.function(*[y.double() for y in x])
        assert all(y.dtype is torch.float64 for y in outputs)
    with pytest.raises(TypeError):
        case.function(*narrow[:1], *x[1:])


@consumer("autocast")
@over(variants=False, cases=PROMOTING)
def test_autocast_of_steps(case, generator, device):
    """Likewise; a state that is written in place has its dtype already, or is refused."""
    x = case.at(case.leaves(3, 1, 3, torch.float32, generator, device), 0)
    inputs, states = x[: case.inputs], x[case.inputs :]
    narrow = [y.bfloat16() for y in inputs]
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = [*narrow[:1], *inputs[1:]]
        want = case.step(*[y.float() for y in mixed], *states)
        got = case.step(*mixed, *[y.bfloat16().float() for y in states])
        assert all(y.dtype is torch.float32 for y in got)
        got = case.step(*mixed, *states)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        h, *after = case.step(*narrow, *[y.bfloat16() for y in states])
        assert h.dtype is torch.bfloat16 and all(y.dtype is torch.float32 for y in after)
        written = [y.clone() for y in states]
        h = case.step_(*mixed, *written)
        assert all(torch.equal(g, w) for g, w in zip((h, *written), want, strict=True))
        for half in range(len(states)):
            bad = [y.bfloat16() if k == half else y.clone() for k, y in enumerate(states)]
            with pytest.raises(TypeError, match=f"{case.name}_step.* has dtype bfloat16, expected"):
                case.step_(*narrow, *bad)
    with pytest.raises(TypeError):
        case.step(*mixed, *states)


@consumer("autocast")
@over(variants=False, cases=PROMOTING)
def test_autocast_gradients(case, generator, device):
    """Each input's gradient has its own dtype, whatever the operator ran in."""
    x = case.leaves(2, 5, 3, torch.float32, generator, device)
    x = [y.bfloat16() if i == 0 else y for i, y in enumerate(x)]
    x = [y.requires_grad_() for y in x]
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = case.function(*x)
    grads = torch.autograd.grad(sum(y.sum() for y in outputs), x)
    assert [g.dtype for g in grads] == [y.dtype for y in x]
    exact = [wide(y) for y in x]
    want = torch.autograd.grad(sum(y.sum() for y in case.function(*exact)), exact)
    for g, w in zip(grads, want, strict=True):
        close(g, w, grad=True, factor=case.slack)


@consumer("autocast under torch.compile")
@over(variants=False, cases=IN_EVERYTHING)
def test_compile_autocast(case, layer, device):
    count = counter("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for x, state in batches(device):
        with torch.autocast(device, dtype=torch.bfloat16):
            y, final = compiled(x, state)
            want, last = layer(x, state)
        assert y.dtype is torch.bfloat16 and final.dtype is torch.float32
        check((y, final), (want, last), rtol=0.02, atol=0.02)
        y.float().sum().backward()
    assert count.frame_count == 1
    assert all(p.grad.dtype is torch.float32 for p in layer.parameters())


@consumer("GradScaler")
def test_grad_scaler(everything, device):
    scaler = torch.amp.GradScaler(device)
    optimizer = torch.optim.SGD(everything.parameters(), 1e-3)
    before = [p.detach().clone() for p in everything.parameters()]
    x, state = next(batches(device))
    with torch.autocast(device, dtype=torch.bfloat16):
        total = loss(everything, x, state).float()
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, q) for p, q in zip(everything.parameters(), before, strict=True))


# ---- torch.export and AOTInductor ----
def dynamic():
    B = torch.export.Dim("B", min=2, max=64)
    return {0: B, 1: torch.export.Dim("T", min=2, max=1 << 20)}, {0: B}


def export(module, device):
    x, state = next(batches(device))
    return torch.export.export(module, (x, state), dynamic_shapes=dynamic())


@consumer("torch.export, dynamic T and B")
@over(variants=False, cases=ALL)
def test_export(case, layer, device):
    program = export(layer.eval(), device)
    name = f"torch_ext.{case.name}.default"
    assert name in str(program.graph)
    program = program.run_decompositions()
    # a matrix memory may have become what it is made of
    lower = "torch_ext.matrix_memory.default" if case in MATRICES else name
    assert name in str(program.graph) or lower in str(program.graph)
    for x, state in batches(device):
        check(program.module()(x, state), layer(x, state))


@consumer("torch.export, dynamic T and B")
@over(variants=False, cases=IN_EVERYTHING)
def test_export_saved_and_loaded(case, layer, device, tmp_path):
    torch.export.save(export(layer.eval(), device), tmp_path / "layer.pt2")
    module = torch.export.load(tmp_path / "layer.pt2").module()
    for x, state in batches(device):
        check(module(x, state), layer(x, state))


@consumer("torch.export, gradients of the exported module")
@over(variants=False, cases=ALL)
def test_export_has_gradients(case, layer, device):
    module = export(layer, device).module()
    x, state = list(batches(device))[1]
    got = torch.autograd.grad(loss(module, x, state), list(module.parameters()))
    want = torch.autograd.grad(loss(layer, x, state), list(layer.parameters()))
    names = [dict(m.named_parameters()).keys() for m in (module, layer)]
    got, want = (dict(zip(n, g, strict=True)) for n, g in zip(names, (got, want), strict=True))
    check(got, want)


class Step(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, *x):
        return self.case.step(*x)


@consumer("torch.export, step")
@over(variants=False, cases=(*CASES, MATRICES[0]))
def test_export_step(case, generator, device):
    x = case.at(case.leaves(4, 1, 5, torch.float32, generator, device), 0)
    B = torch.export.Dim("B", min=2, max=64)
    program = torch.export.export(Step(case), tuple(x), dynamic_shapes=(({0: B},) * len(x),))
    x = [torch.cat([y, y]) for y in x]
    check(program.module()(*x), case.step(*x))


class WithMamba(nn.Module):
    """Every operator, and the Mamba layer, whose methods the C++ program calls too."""

    def __init__(self):
        super().__init__()
        self.everything = Everything()
        self.mamba = torch_ext.Mamba(4, d_state=3)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, final = self.everything(x, state)
        return x + self.mamba(x), final


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, device):
    """One module with every operator, as TorchScript and as an AOTInductor package."""
    torch.manual_seed(0)
    folder = Path(os.environ.get("ARTIFACTS") or tmp_path_factory.mktemp("artifacts"))
    module = WithMamba().to(device).eval()
    script(module).save(str(folder / "everything.ts"))
    torch._inductor.aoti_compile_and_package(
        export(module, device), package_path=str(folder / "everything.pt2")
    )
    return folder, module


@pytest.mark.slow
@consumer("AOTInductor package, run in Python")
def test_aoti(artifacts, device):
    folder, module = artifacts
    compiled = torch._inductor.aoti_load_package(str(folder / "everything.pt2"))
    for x, state in batches(device):
        with torch.no_grad():
            check(compiled(x, state), module(x, state))


# ---- TorchScript: deprecated, says so, and is asked for ----
def script(module):
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        return torch.jit.script(module)


quiet = pytest.mark.filterwarnings(
    r"ignore:.*torch\.jit:FutureWarning", r"ignore:.*torch\.jit:DeprecationWarning"
)


@quiet
@consumer("torch.jit.script, values and gradients")
@over(variants=False, cases=ALL)
def test_script(case, layer, device):
    scripted = script(layer)
    for x, state in batches(device):  # several calls: the profiling executor specialises
        check(scripted(x, state), layer(x, state))
        got = torch.autograd.grad(loss(scripted, x, state), list(scripted.parameters()))
        want = torch.autograd.grad(loss(layer, x, state), list(layer.parameters()))
        check(got, want)
        check(scripted(x), layer(x))
    with torch.no_grad():
        for optimise in (torch.jit.freeze, torch.jit.optimize_for_inference):
            check(optimise(script(layer.eval()))(x, state), layer(x, state))


@quiet
@consumer("torch.jit.script, values and gradients")
@over(variants=False)
def test_script_of_functions(case, generator, device):
    """The Python functions themselves, all of them."""
    n = len(case.arguments)
    x = case.leaves(2, 5, 3, torch.float32, generator, device)
    one = [y[:, 0] for y in x[:n]] + x[n:]
    check(script(case.function)(*x), case.function(*x))
    check(script(case.step)(*one), case.step(*one))
    state = one[-1].clone()
    check(script(case.step_)(*one[:n], state), case.step(*one)[0])
    check(state, case.step(*one)[1])


@quiet
@consumer("torch.jit.script, values and gradients")
@over(variants=False, cases=MATRICES)
def test_script_of_functions_of_matrix_memories(case, generator, device):
    """Whose states are tuples where there are several."""
    n = case.inputs
    x = case.leaves(2, 5, 3, torch.float32, generator, device)
    one = case.at(x, 0)

    def call(function, leaves, key):
        given = case.named(leaves[:n])
        states = tuple(leaves[n:])
        out = function(**given, **{key: states if len(states) > 1 else states[0]})
        return out

    f, step, step_ = (getattr(torch_ext, case.name + tail) for tail in ("", "_step", "_step_"))
    check(call(script(f), x, "initial_state"), call(f, x, "initial_state"))
    want = call(step, one, "state")
    check(call(script(step), one, "state"), want)
    check(call(script(step_), one, "state"), want[0])
    check(one[n:], [*want[1]] if len(one) > n + 1 else [want[1]])


CHILD = """
import sys, torch, torch_ext
module = torch.jit.load(sys.argv[1])
x, state = torch.randn(2, 5, 4), torch.randn(2, 4)
target = x.cumsum(1).tanh()
optimizer = torch.optim.Adam(module.parameters(), 1e-2)
losses = []
for _ in range(50):
    optimizer.zero_grad()
    loss = (module(x, state)[0] - target).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
print("learned")
"""


@quiet
@consumer("TorchScript, saved, loaded and trained in a fresh process")
def test_script_in_a_fresh_process(tmp_path, child_environment):
    script(Everything()).save(str(tmp_path / "module.ts"))
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path / "module.ts"],
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "learned" in out.stdout, out.stderr[-3000:]


# ---- C++ ----
@pytest.fixture(scope="module")
def cpp_output(artifacts, tmp_path_factory, device):
    """tests/consumer, built with find_package(TorchExt) alone, run on the artifacts."""
    if not Path(torch_ext.cmake_prefix_path).is_dir():
        pytest.skip(f"{torch_ext.cmake_prefix_path} is missing: torch_ext is not installed")
    if device != "cpu":
        pytest.skip("the program runs on the CPU")
    build = tmp_path_factory.mktemp("consumer")

    def run(*command, timeout=1200):
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def cmake(*arguments):
        # pip's, where installed: a distribution's may be too old
        return (
            run(sys.executable, "-m", "cmake", *arguments)
            if has_cmake()
            else run("cmake", *arguments)
        )

    cmake(
        *("-S", HERE / "consumer", "-B", build, "-DCMAKE_BUILD_TYPE=Debug"),
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path};{torch_ext.cmake_prefix_path}",
    )
    cmake("--build", build)
    folder, _ = artifacts
    program = build / "consumer"
    out = run(program, folder / "everything.ts", folder / "everything.pt2")
    print(out)
    return out, run("ldd", program)


def has_cmake():
    try:
        import cmake  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        pytest.param("functions ok", marks=consumer("C++ functions (ops.h), double backward")),
        pytest.param("script ok", marks=consumer("TorchScript module, trained in C++")),
        pytest.param("steps ok", marks=consumer("TorchScript module, streamed in C++")),
        pytest.param("package ok", marks=consumer("AOTInductor package, run in C++")),
        pytest.param("dispatcher ok", marks=consumer("C++ program, find_package(TorchExt)")),
    ],
    ids=lambda line: line.split()[0],
)
def test_cpp(cpp_output, line):
    assert line in cpp_output[0], cpp_output[0]


@pytest.mark.slow
@consumer("C++ program, find_package(TorchExt)")
def test_cpp_links_no_python(cpp_output):
    linked = cpp_output[1]
    assert "libtorch_ext.so" in linked
    assert "libpython" not in linked and "torch_python" not in linked, linked


# ---- torch.utils.checkpoint ----
@consumer("torch.utils.checkpoint, both kinds, and compiled")
@over(variants=False, cases=ALL)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpoint(case, reentrant, x):
    from torch.utils.checkpoint import checkpoint

    f = case.bind()
    want = torch.autograd.grad(loss(f, *x), x)
    loss(lambda *y: checkpoint(f, *y, use_reentrant=reentrant), *x).backward()
    assert all(torch.equal(y.grad, w) for y, w in zip(x, want, strict=True))


@consumer("torch.utils.checkpoint, both kinds, and compiled")
@over(variants=False, cases=IN_EVERYTHING)
def test_checkpoint_compiled(case, x):
    from torch.utils.checkpoint import checkpoint

    f = case.bind()

    def run(*x):
        return loss(lambda *y: checkpoint(f, *y, use_reentrant=False), *x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    check(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(f, *x), x))


@consumer("saved-tensor hooks (save_on_cpu)")
@over(variants=False, cases=ALL)
def test_saved_tensor_hooks(case, x):
    """What the operator saves goes through the hooks, once each, and nothing beside them."""
    packed = []

    def pack(y):
        packed.append(y)
        return y.clone()

    want = torch.autograd.grad(loss(case.bind(), *x), x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        outputs = case.function(*x)
    if not case.loose:  # others have operators of torch around, which save something too
        assert len(packed) <= case.inputs + 2, "more than the inputs, the state and h"
    check(torch.autograd.grad(loss(lambda: outputs), x), want)
    with torch.autograd.graph.save_on_cpu():
        outputs = case.function(*x)
    check(torch.autograd.grad(loss(lambda: outputs), x), want)


# ---- copies and processes ----
def _work(module, x):
    return module(x)[0].detach().numpy()


@consumer("deepcopy, pickle, torch.save")
def test_copies(everything, device, tmp_path):
    x, state = next(batches(device))
    want = everything(x, state)
    check(copy.deepcopy(everything)(x, state), want)
    check(pickle.loads(pickle.dumps(everything))(x, state), want)
    torch.save(everything.state_dict(), tmp_path / "state")
    other = Everything().to(device)
    other.load_state_dict(torch.load(tmp_path / "state"))
    check(other(x, state), want)


@pytest.mark.slow
@consumer("multiprocessing, spawn")
def test_spawn(monkeypatch, child_environment):
    monkeypatch.setenv("PYTHONPATH", child_environment["PYTHONPATH"])
    torch.manual_seed(0)
    module, x = Everything(), torch.randn(2, 5, 4)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        check(
            torch.from_numpy(pool.apply_async(_work, (module, x)).get(120)), module(x)[0].detach()
        )


@consumer("multiprocessing, fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_before_the_pool_is_used(child_environment):
    """As a data loader's worker does: the parent has run the operators on one thread."""
    code = """
import os, torch
from cases import Everything
torch.set_num_threads(1)
module, x = Everything(), torch.randn(2, 5, 4)
want = module(x)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(module(x)[0], want) else 1)
assert os.waitpid(child, 0)[1] == 0
print("same")
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "same" in out.stdout, out.stderr[-3000:]


def _train(rank, file):
    faulthandler.dump_traceback_later(90, exit=True)  # a hang becomes a failure that says where
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    module = nn.parallel.DistributedDataParallel(Everything())
    loss(module, torch.randn(2, 5, 4) + rank).backward()
    mine = torch.cat([p.grad.flatten() for p in module.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both)
    torch.manual_seed(0)
    alone = Everything()
    total = sum(loss(alone, x + r) for r, x in enumerate([torch.randn(2, 5, 4)] * 2)) / 2
    total.backward()
    check(torch.cat([p.grad.flatten() for p in alone.parameters()]), mine)
    # The module goes first: were it the last owner of the process group, torch would join the
    # group's threads while it holds the interpreter's lock, for which one of them may be waiting.
    # (A plain nn.Linear hangs so once in some hundred runs; in this order 0 of 1500 did.)
    del module
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@consumer("DistributedDataParallel, two gloo processes")
def test_distributed(tmp_path, monkeypatch, child_environment):
    monkeypatch.setenv("PYTHONPATH", child_environment["PYTHONPATH"])
    torch.multiprocessing.spawn(_train, (tmp_path / "rendezvous",), nprocs=2)


# ---- devices without data ----
@consumer("meta device, FakeTensor, deferred initialisation")
@over(variants=False, cases=ALL)
def test_meta_module(case):
    with torch.device("meta"):
        module = case.layer()
        y, final = module(torch.empty(2, 5, 4))
    assert y.device.type == final.device.type == "meta" and y.shape == (2, 5, 4)
    loss(module, torch.empty(2, 5, 4, device="meta")).backward()
    assert all(p.grad.shape == p.shape for p in module.parameters())
    module = module.to_empty(device="cpu")
    assert module(torch.randn(2, 5, 4))[0].shape == (2, 5, 4)


@consumer("meta device, FakeTensor, deferred initialisation")
@over(variants=False, cases=ALL)
def test_fake_tensors(case, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    fake = [mode.from_tensor(y.detach()).requires_grad_() for y in x]
    with mode:
        outputs = case.function(*fake)
        grads = torch.autograd.grad([y.sum() for y in outputs], fake)
    real = [y.detach().requires_grad_() for y in x]
    want = case.function(*real)
    # Of strides those of real gradients, which are not the leaves' where an operator turns them over.
    real_grads = torch.autograd.grad([y.sum() for y in want], real)
    for got, w in zip((*outputs, *grads), (*want, *real_grads), strict=True):
        assert got.shape == w.shape and got.dtype is w.dtype and got.device == w.device
        assert got.stride() == w.stride()
    assert all(g.shape == y.shape and g.dtype is y.dtype for g, y in zip(grads, x, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@consumer("CUDA graphs")
@over(variants=False)
def test_cuda_graph(case, generator):
    x = case.leaves(2, 64, 33, torch.float32, generator, "cuda")
    want = case.function(*x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.function(*x)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_everything_has_every_operator():
    assert len(Everything().layers) == len(IN_EVERYTHING)
    # of the matrix memories, which are one operator, the one that has most of it
    assert [case for case in ALL if case not in IN_EVERYTHING] == list(MATRICES[1:])
