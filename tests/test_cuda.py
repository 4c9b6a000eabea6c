"""What only a GPU can show: CUDA graphs, streams, no waiting for the device, offsets beyond 32 bits,
time split among blocks. The other suites run there as well, with --device cuda."""

import pytest
import torch
from cases import OTHERS, close, cotangents, gradients, over, short, wide
from test_selective_scan import FORMS
from test_selective_scan import draw as draw_scan
from test_selective_scan import grads as grads_of_scan

import torch_ext

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CUDA = "cuda"
# Many channels; few channels and many steps, where blocks share out the time of a sequence and hand
# on what they carry; a width that is no multiple of anything.
PLANS = {"wide": (4, 150, 2048), "chained": (1, 9000, 33), "one_channel": (1, 20000, 1)}
PLAN = pytest.mark.parametrize("plan", PLANS)
HALF_AND_FULL = (torch.float32, torch.bfloat16)


def training(case, options=None, **more):
    """Forward and backward as one function of the leaves and their cotangents."""
    f = case.bind(**(options or {}), **more)

    def run(leaves, weights):
        outputs = f(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    return run


def prepared(case, shape, dtype, generator, grad=True):
    x = case.leaves(*shape, dtype, generator, CUDA, grad=grad)
    return x, cotangents(case.bind()(*x), generator)


def same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def captured(work):
    """`work` in a graph, after the warm-up that torch asks for: the graph and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph, outputs


@pytest.fixture
def no_waiting():
    """Within it, everything that waits for the device is an error."""

    class Guard:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield Guard()
    torch.cuda.set_sync_debug_mode("default")


# ---- CUDA graphs ----
@over(variants=False, dtypes=HALF_AND_FULL)
@PLAN
def test_graph_of_forward(case, dtype, plan, generator):
    x, _ = prepared(case, PLANS[plan], dtype, generator, grad=False)
    graph, outputs = captured(lambda: case.function(*x))
    for _ in range(3):  # new numbers in the same memory, and every replay afresh
        for y in x:
            y.copy_(y.flip(0) if y.shape[0] > 1 else y.roll(1, -1))
        graph.replay()
        same(outputs, case.function(*x))


@over(variants=False, dtypes=HALF_AND_FULL)
@PLAN
def test_graph_of_training(case, dtype, plan, generator):
    x, weights = prepared(case, PLANS[plan], dtype, generator)
    run = training(case)
    graph, outputs = captured(lambda: run(x, weights))
    for _ in range(3):
        with torch.no_grad():
            for y in x:
                y.copy_(y.flip(0) if y.shape[0] > 1 else y.roll(1, -1))
        graph.replay()
        same(outputs, run(x, weights))


@over(variants=False)
def test_graph_of_packed_sequences(case, generator):
    cu = torch.tensor([0, 5, 5, 600, 1500], device=CUDA)
    x = case.leaves(1, 1500, 40, torch.float32, generator, CUDA, state=4, grad=True)
    run = training(case, cu_seqlens=cu)
    weights = cotangents(case.bind(cu_seqlens=cu)(*x), generator)
    graph, outputs = captured(lambda: run(x, weights))
    cu.copy_(torch.tensor([0, 700, 701, 701, 1500]))
    graph.replay()
    same(outputs, run(x, weights))


@over(variants=False)
def test_graph_of_steps(case, generator):
    """A decoder: one step captured, replayed for every token, the state updated in place."""
    x = case.leaves(3, 20, 70, torch.float32, generator, CUDA)
    token, state = [y[:, 0].clone() for y in x[:-1]], x[-1].clone()
    graph, h = captured(lambda: case.step_(*token, state))
    state.copy_(x[-1])  # the warm-up has advanced it
    want, final = case.function(*x)
    for t in range(20):
        for to, y in zip(token, x[:-1], strict=True):
            to.copy_(y[:, t])
        graph.replay()
        close(h, wide(want[:, t]))
    close(state, wide(final))


# ---- streams ----
@over(variants=False)
@PLAN
def test_other_stream(case, plan, generator):
    """Work goes to the current stream: inputs that are made there, late, are waited for."""
    x, weights = prepared(case, PLANS[plan], torch.float32, generator)
    run = training(case)
    want = run(x, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [y.detach().clone().requires_grad_() for y in x]
        got = run(late, weights)
        copies = [y.clone() for y in got]
    torch.cuda.current_stream().wait_stream(stream)
    same(copies, want)


@over(variants=False)
@PLAN
def test_two_streams_at_once(case, plan, generator):
    """Scratch memory and counters belong to a call: two that overlap do not meet."""
    x, weights = prepared(case, PLANS[plan], torch.float32, generator)
    run = training(case)
    want = run(x, weights)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(x, weights))
    torch.cuda.synchronize()
    for got in results:
        same(got, want)


# ---- the host does not wait ----
@over(dtypes=HALF_AND_FULL)
@PLAN
def test_no_synchronisation(case, options, dtype, plan, generator, no_waiting):
    x, weights = prepared(case, PLANS[plan], dtype, generator)
    run = training(case, options)
    run(x, weights)
    with no_waiting:
        run(x, weights)


@over(variants=False)
def test_no_synchronisation_packed(case, generator, no_waiting):
    cu = torch.tensor([0, 5, 5, 600, 1500], device=CUDA)
    x = case.leaves(1, 1500, 40, torch.float32, generator, CUDA, state=4, grad=True)
    run = training(case, cu_seqlens=cu)
    weights = cotangents(case.bind(cu_seqlens=cu)(*x), generator)
    with no_waiting:
        run(x, weights)


@over(variants=False)
def test_no_synchronisation_in_a_step(case, generator, no_waiting):
    x = case.leaves(3, 1, 70, torch.float32, generator, CUDA)
    token, state = [y[:, 0] for y in x[:-1]], x[-1]
    case.step_(*token, state)
    with no_waiting:
        case.step(*token, state)
        case.step_(*token, state)


# ---- the same bits, and the right ones ----
@over(variants=False, dtypes="all")
@PLAN
def test_two_launches_give_the_same_bits(case, dtype, plan, generator):
    x, weights = prepared(case, PLANS[plan], dtype, generator)
    run = training(case)
    want = run(x, weights)
    for _ in range(5):
        same(run(x, weights), want)


@over(dtypes=(torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@PLAN
def test_like_the_cpu(case, options, dtype, reverse, plan, generator):
    """Against the CPU's operator in float64, which has a driver of its own."""
    B, T, D = PLANS[plan]
    x, weights = prepared(case, (B, T, min(D, 300)), dtype, generator)
    f = case.bind(**options, reverse=reverse)
    exact = [wide(y.cpu()) for y in x]
    for got, want in zip(f(*x), f(*exact), strict=True):
        close(got, want)
    got = gradients(f, x, weights=weights)
    want = gradients(f, exact, weights=[wide(w.cpu()) for w in weights])
    for g, w, name in zip(got, want, [*case.arguments, "state"], strict=True):
        close(g, w, grad=True, name=name)


@over(variants=False, dtypes=HALF_AND_FULL)
@PLAN
def test_time_contiguous(case, dtype, plan, generator):
    """(B, D, T) in memory, seen as (B, T, D): the same numbers as from rows."""
    B, T, D = PLANS[plan]
    x, weights = prepared(case, (B, T, D), dtype, generator)
    run = training(case)
    want = run(x, weights)
    turned = [
        y.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for y in x[:-1]
    ]
    assert all(y.stride(1) == 1 or T == 1 for y in turned)
    same(run([*turned, x[-1]], weights), want)


# ---- devices ----
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@over(variants=False)
@PLAN
def test_another_device_is_current(case, plan, generator):
    x, weights = prepared(case, PLANS[plan], torch.float32, generator)
    want = training(case)(x, weights)
    with torch.cuda.device(1):
        same(training(case)(x, weights), want)
    there = [y.detach().to("cuda:1").requires_grad_() for y in x]
    got = training(case)(there, [w.to("cuda:1") for w in weights])
    assert all(y.device == torch.device("cuda:1") for y in got)
    same([y.to("cuda:0") for y in got], want)


# ---- more elements than 32 bits count ----
@pytest.mark.slow
@pytest.mark.unpoisoned
@over(variants=False)
def test_more_elements_than_int32(case):
    """The last channels of the last row, whose offsets are beyond 2^31 in every tensor, against the
    same channels alone on the CPU."""
    B, T, D, edge = 2, 2**16, 2**14 + 8, 8
    n = len(case.arguments)
    size = 2 * B * T * D
    needed = (2 * n + 4) * size
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    generator = torch.Generator(CUDA).manual_seed(0)
    x = []
    for name in case.arguments:
        y = torch.empty(B, T, D, device=CUDA, dtype=torch.bfloat16).normal_(generator=generator)
        x.append((y.sigmoid_() if name == "a" else y).requires_grad_())
    grad = torch.empty(B, T, D, device=CUDA, dtype=torch.bfloat16).normal_(generator=generator)
    assert B * T * D > 2**31
    h, final = case.function(*x)
    got = [h, final, *torch.autograd.grad(h, x, grad)]
    corner = (slice(B - 1, B), ..., slice(D - edge, D))
    exact = [wide(y.detach()[corner].cpu()).requires_grad_() for y in x]
    h, final = case.function(*exact)
    want = [h, final, *torch.autograd.grad(h, exact, wide(grad[corner].cpu()))]
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        close(g.detach()[corner], w, grad=index > 1, factor=4.0, name=f"{short(g.dtype)} {index}")


# ---- causal_conv1d: cut along time, so the same plans are other splits ----
CONVOLUTION = next(case for case in OTHERS if case.name == "causal_conv1d")
WINDOWS = pytest.mark.parametrize("window", [1, 4, 7, 11])  # each kind of kernel


def convolution(shape, window, dtype, generator, rows=None):
    B, T, D = shape
    shapes = ((B, T, D), (D, window), (D,), (rows or B, D, window - 1))
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(CUDA, dtype).requires_grad_()
        for s in shapes
    ]


@WINDOWS
@PLAN
@pytest.mark.parametrize("dtype", CONVOLUTION.dtypes, ids=short)
def test_convolution_like_the_cpu(dtype, window, plan, generator):
    """Values and gradients against the CPU's operator in float64, the same bits in every launch and
    with time side by side, and no waiting for the device."""
    B, T, D = PLANS[plan]
    x = convolution((B, T, min(D, 300)), window, dtype, generator)
    f = CONVOLUTION.bind(activation="silu")
    weights = cotangents(f(*x), generator)
    exact = [wide(y.cpu()) for y in x]
    got = [*f(*x), *gradients(f, x, weights=weights)]
    want = [*f(*exact), *gradients(f, exact, weights=[wide(w.cpu()) for w in weights])]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        close(g, w, grad=i > 1, size=0.25 if i < 2 else 0.01)
    same([*f(*x), *gradients(f, x, weights=weights)], got)
    turned = x[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    same([*f(turned, *x[1:]), *gradients(f, [turned, *x[1:]], weights=weights)], got)


@WINDOWS
def test_convolution_of_packed_sequences(window, generator, no_waiting):
    """Like each sequence alone, in a graph that is replayed for other lengths, without waiting."""
    cu = torch.tensor([0, 5, 5, 600, 1500], device=CUDA)
    x = convolution((1, 1500, 40), window, torch.float32, generator, rows=4)
    f = CONVOLUTION.bind(cu_seqlens=cu, activation="silu")
    weights = cotangents(f(*x), generator)
    with no_waiting:
        gradients(f, x, weights=weights)
    graph, outputs = captured(lambda: [*f(*x), *gradients(f, x, weights=weights)])
    for lengths in ([0, 5, 5, 600, 1500], [0, 700, 701, 701, 1500]):
        cu.copy_(torch.tensor(lengths))
        graph.replay()
        got = [y.clone() for y in outputs]
        same([*f(*x), *gradients(f, x, weights=weights)], got)
        exact = [wide(y.cpu()) for y in x]
        g = CONVOLUTION.bind(cu_seqlens=cu.cpu(), activation="silu")
        want = [*g(*exact), *gradients(g, exact, weights=[wide(w.cpu()) for w in weights])]
        for i, (y, w) in enumerate(zip(got, want, strict=True)):
            close(y, w, grad=i > 1, size=0.25 if i < 2 else 0.01)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", CONVOLUTION.dtypes, ids=short)
def test_convolution_of_steps(dtype, window, generator, no_waiting):
    """In place in a pool, by vectors and one by one, without waiting; a negative index has no state."""
    for D in (64, 33):
        x, weight, bias, pool = (
            y.detach() for y in convolution((4, 1, D), window, dtype, generator, rows=6)
        )
        rows = torch.tensor([5, -1, 0, 2], device=CUDA)
        token, before = x[:, 0], pool.clone()
        with no_waiting:
            y = torch_ext.causal_conv1d_step_(token, weight, bias, pool, rows, activation="silu")
        has = rows >= 0
        want, after = torch_ext.causal_conv1d_step(
            *(wide(z.cpu()) for z in (token, weight, bias, before)), rows.cpu(), activation="silu"
        )
        close(y, want, size=0.25)
        assert not y[~has].any()
        close(pool, after)
        assert torch.equal(pool[[1, 3, 4]], before[[1, 3, 4]])


# ---- selective_scan: few channels and many steps, where blocks share out a sequence, and the rest ----
SCANS = {"wide": (4, 150, 256, 16), "segments": (1, 3000, 33, 16), "many_states": (2, 70, 5, 150)}
SCAN = pytest.mark.parametrize("scan", SCANS)
PER_TOKEN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def scan_of(scan, dtype, generator, **forms):
    B, T, D, N = SCANS[scan]
    x = draw_scan(generator, B=B, T=T, D=D - D % 2, N=N, dtype=dtype, **forms)
    return {name: y.to(CUDA) for name, y in x.items()}


@SCAN
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", PER_TOKEN.values(), ids=PER_TOKEN)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("complex_states", [False, True], ids=["real", "complex"])
def test_scan_like_the_cpu(complex_states, form, dtype, reverse, scan, generator):
    """Values and gradients against the CPU's operator in float64; the same bits in every launch."""
    if complex_states and dtype == torch.bfloat16:
        pytest.skip("no complex states beside bfloat16")
    x = scan_of(scan, dtype, generator, form_b=form, form_c="token", complex_states=complex_states)
    options = {"delta_softplus": True, "reverse": reverse}
    weights = cotangents(torch_ext.selective_scan(**x, **options), generator)
    outputs, got = grads_of_scan(torch_ext.selective_scan, x, weights, **options)
    exact = {name: wide(y.cpu()) for name, y in x.items()}
    precise = [wide(w.cpu()) for w in weights]
    wants, want = grads_of_scan(torch_ext.selective_scan, exact, precise, **options)
    factor = 16 if complex_states else 4
    for name, one, other in zip(("y", "final_state"), outputs, wants, strict=True):
        close(one.detach(), other.detach(), factor=factor, name=name)
    for name in x:
        close(got[name], want[name], grad=True, factor=factor, name=f"gradient of {name}")
    again, twice = grads_of_scan(torch_ext.selective_scan, x, weights, **options)
    same([*again, *twice.values()], [*outputs, *got.values()])


@SCAN
def test_scan_with_time_contiguous(scan, generator):
    """(B, D, T) and (B, N, T) in memory: the same numbers as from rows."""
    x = scan_of(scan, torch.bfloat16, generator)
    turned = dict(x)
    for name in ("u", "delta", "z", "B", "C"):
        turned[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)
    weights = cotangents(torch_ext.selective_scan(**x), generator)
    outputs, got = grads_of_scan(torch_ext.selective_scan, x, weights)
    turned_outputs, turned_got = grads_of_scan(torch_ext.selective_scan, turned, weights)
    same([*turned_outputs, *turned_got.values()], [*outputs, *got.values()])


def test_scan_of_packed_sequences(generator, no_waiting):
    """Like the CPU's, in a graph that is replayed for other lengths, without waiting."""
    cu = torch.tensor([0, 5, 5, 600, 1500], device=CUDA)
    x = draw_scan(generator, B=1, T=1500, D=40, N=16, dtype=torch.float32, sequences=4)
    x = {name: y.to(CUDA).requires_grad_() for name, y in x.items()}
    weights = cotangents(torch_ext.selective_scan(**x, cu_seqlens=cu), generator)

    def run(x, cu, weights):
        outputs = torch_ext.selective_scan(**x, cu_seqlens=cu)
        return [*outputs, *torch.autograd.grad(outputs, list(x.values()), weights)]

    run(x, cu, weights)
    with no_waiting:
        run(x, cu, weights)
    graph, outputs = captured(lambda: run(x, cu, weights))
    for lengths in ([0, 5, 5, 600, 1500], [0, 700, 701, 701, 1500]):
        cu.copy_(torch.tensor(lengths))
        graph.replay()
        got = [y.clone() for y in outputs]
        same(run(x, cu, weights), got)
        exact = {name: wide(y.cpu()) for name, y in x.items()}
        want = run(exact, cu.cpu(), [wide(w.cpu()) for w in weights])
        for i, (y, w) in enumerate(zip(got, want, strict=True)):
            close(y, w, grad=i > 1, factor=4)


@pytest.mark.parametrize("dtype", PER_TOKEN.values(), ids=PER_TOKEN)
def test_scan_of_steps(dtype, generator, no_waiting):
    """In place in a pool, without waiting; a negative index has no state."""
    for D, N in ((64, 16), (34, 5)):
        x = draw_scan(generator, B=4, T=1, D=D, N=N, dtype=dtype, sequences=6)
        x = {name: y.to(CUDA) for name, y in x.items()}
        pool = x.pop("initial_state")
        for name in ("u", "delta", "B", "C", "z"):
            x[name] = x[name][:, 0]
        rows = torch.tensor([5, -1, 0, 2], device=CUDA)
        before = pool.clone()
        with no_waiting:
            y = torch_ext.selective_scan_step_(
                **x, state=pool, state_indices=rows, delta_softplus=True
            )
        exact = {name: wide(v.cpu()) for name, v in x.items()}
        want, after = torch_ext.selective_scan_step(
            **exact, state=wide(before.cpu()), state_indices=rows.cpu(), delta_softplus=True
        )
        close(y, want)
        assert not y[rows < 0].any()
        close(pool, after)
        assert torch.equal(pool[[1, 3, 4]], before[[1, 3, 4]])
