"""The Mamba layer against its formula in plain PyTorch, in one call, in chunks and in steps."""

import io
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import (
    LAYER_OPTIONAL,
    LAYER_STEP,
    close,
    layer_call,
    layer_sizes,
    layer_step,
    refuses,
    short,
)
from torch._dynamo.testing import CompileCounterWithBackend

import torch_ext


def formula(layer, x):
    """Zero states, float64, one direction: mamba_ssm's equations, a loop over time."""
    T, N, R = x.shape[1], layer.d_state, layer.dt_rank
    inner, z = layer.in_proj(x).chunk(2, -1)
    conv = F.conv1d(
        inner.mT, layer.conv1d.weight, layer.conv1d.bias, padding=layer.d_conv - 1,
        groups=layer.d_inner,
    )  # fmt: skip
    u = F.silu(conv[:, :, :T]).mT
    delta, B, C = (u @ layer.x_proj.weight.T).split([R, N, N], -1)
    delta = F.softplus(layer.dt_proj(delta))
    A, h, outputs = -torch.exp(layer.A_log), x.new_zeros(x.shape[0], layer.d_inner, N), []
    for t in range(T):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + layer.D * u[:, t])
    return layer.out_proj(torch.stack(outputs, 1) * F.silu(z)), h


def make(generator, dtype=torch.float64, **options):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return torch_ext.Mamba(8, d_state=3, **options).to(dtype)


def inputs(generator, B=3, T=11, dtype=torch.float64):
    return torch.randn(B, T, 8, generator=generator, dtype=torch.float64).to(dtype)


def test_parameters():
    layer = torch_ext.Mamba(40, d_state=5, d_conv=3, expand=3)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "in_proj.weight": (240, 40),
        "conv1d.weight": (120, 1, 3),
        "conv1d.bias": (120,),
        "x_proj.weight": (3 + 10, 120),
        "dt_proj.weight": (120, 3),
        "dt_proj.bias": (120,),
        "A_log": (120, 5),
        "D": (120,),
        "out_proj.weight": (40, 120),
    }
    torch.testing.assert_close(layer.A_log[7].exp(), torch.arange(1.0, 6.0))
    assert (layer.D == 1).all()
    dt = F.softplus(layer.dt_proj.bias)
    assert 0.0009 < float(dt.min()) < 0.01 < float(dt.max()) < 0.101
    bound = 1 / math.sqrt(3)
    assert 0.9 * bound < float(layer.dt_proj.weight.abs().max()) <= bound
    assert layer.A_log._no_weight_decay and layer.D._no_weight_decay
    assert layer.dt_proj.bias._no_reinit
    constant = torch_ext.Mamba(16, dt_rank=4, dt_init="constant", dt_scale=2.0, bias=True)
    assert (constant.dt_proj.weight == 1).all()
    assert constant.in_proj.bias is not None and constant.out_proj.bias is not None
    assert torch_ext.Mamba(16, conv_bias=False).conv1d.bias is None
    assert torch_ext.Mamba(16, dtype=torch.bfloat16).A_log.dtype is torch.float32


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"conv_bias": False}, {"d_conv": 1}, {"d_conv": 6}, {"dt_rank": 3}],
    ids=str,
)
def test_formula(options, generator):
    layer, x = make(generator, **options), inputs(generator)
    y, state = layer.prefill(x)
    want, want_state = formula(layer, x)
    close(y.detach(), want.detach())
    close(state[1].detach(), want_state.detach())
    parameters = list(layer.parameters())
    got = torch.autograd.grad(layer(x).sin().sum(), parameters)
    want = torch.autograd.grad(want.sin().sum(), parameters)
    for (name, _), g, w in zip(layer.named_parameters(), got, want, strict=True):
        close(g, w, grad=True, name=name)


@pytest.mark.parametrize("d_conv", [1, 4])
def test_chunks_and_steps(d_conv, generator):
    layer, x = make(generator, d_conv=d_conv), inputs(generator)
    want, (want_conv, want_scan) = layer.prefill(x)
    for cuts in ([0, 1, 2, 11], [0, 5, 5, 11], [0, 10, 11]):
        state, pieces = layer.init_state(3), []
        for i in range(len(cuts) - 1):
            y, state = layer.prefill(x[:, cuts[i] : cuts[i + 1]], state)
            pieces.append(y)
        close(torch.cat(pieces, 1).detach(), want.detach())
        close(state[0].detach(), want_conv.detach())
        close(state[1].detach(), want_scan.detach())
    state, pieces = layer.init_state(3), []
    for t in range(11):
        y, state = layer.step(x[:, t], state)
        pieces.append(y)
    close(torch.stack(pieces, 1).detach(), want.detach())
    close(state[0].detach(), want_conv.detach())
    close(state[1].detach(), want_scan.detach())


@pytest.mark.parametrize("given_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding(padding, given_state, generator):
    """Whatever stands in the padding, NaN included; the gradients as well."""
    if given_state and padding == "left":
        pytest.skip("is an error: see test_errors")
    layer = make(generator, bias=True)
    lengths = torch.tensor([11, 0, 2, 7])
    x = inputs(generator, B=4).requires_grad_()
    state = None
    if given_state:
        shapes = [s.shape for s in layer.init_state(4)]
        state = tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    steps = torch.arange(11) if padding == "right" else 10 - torch.arange(11)
    valid = (steps < lengths[:, None])[..., None]
    padded = torch.where(valid, x, torch.nan)
    y, (conv, scan) = layer.prefill(padded, state, lengths, padding)
    assert (torch.where(valid, 0.0, y) == 0).all()
    wants, loss = [], 0
    for i, n in enumerate(lengths.tolist()):
        row = x[i : i + 1, :n] if padding == "right" else x[i : i + 1, 11 - n :]
        one = None if state is None else tuple(s[i : i + 1] for s in state)
        want, (want_conv, want_scan) = layer.prefill(row, one)
        got = y[i : i + 1, :n] if padding == "right" else y[i : i + 1, 11 - n :]
        close(got.detach(), want.detach())
        close(conv[i : i + 1].detach(), want_conv.detach())
        close(scan[i : i + 1].detach(), want_scan.detach())
        loss = loss + want.square().sum() + want_scan.sin().sum() + want_conv.cos().sum()
    parameters = [x, *layer.parameters()]
    wants = torch.autograd.grad(loss, parameters)
    mine = y.square().sum() + scan.sin().sum() + conv.cos().sum()
    for g, w in zip(torch.autograd.grad(mine, parameters), wants, strict=True):
        close(g, w, grad=True)
    if state is None:
        torch.testing.assert_close(layer(padded, lengths, padding), y)


def test_bidirectional(generator):
    layer, x = make(generator, bidirectional=True), inputs(generator)
    one = make(generator)
    with torch.no_grad():
        outputs = []
        for tail in ("", "_b"):
            names = {"A_log": "A_b_log" if tail else "A_log", "D": "D" + tail}
            theirs = dict(layer.named_parameters())
            for name, p in one.named_parameters():
                head = name.split(".")[0]
                other = name if head in ("in_proj", "out_proj") else name.replace(head, head + tail)
                p.copy_(theirs[names.get(name, other)])
            outputs.append(one(x.flip(1)).flip(1) if tail else one(x))
        close(layer(x), sum(outputs))
        lengths = torch.tensor([11, 3, 6])
        padded = layer(x, lengths)
        for i, n in enumerate(lengths.tolist()):
            close(padded[i : i + 1, :n], layer(x[i : i + 1, :n]))
    with pytest.raises(RuntimeError, match="bidirectional"):
        layer.prefill(x)
    with pytest.raises(RuntimeError, match="bidirectional"):
        layer.step(x[:, 0], layer.init_state(3))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted(bidirectional, generator):
    layer, x = make(generator, bidirectional=bidirectional), inputs(generator)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    torch.testing.assert_close(scripted(x), layer(x))
    lengths = torch.tensor([4, 0, 9])
    torch.testing.assert_close(scripted(x, lengths, "left"), layer(x, lengths, "left"))
    if not bidirectional:
        got, want = scripted.prefill(x), layer.prefill(x)
        torch.testing.assert_close(got, want)
        state = scripted.init_state(3)
        torch.testing.assert_close(scripted.step(x[:, 0], state), layer.step(x[:, 0], state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, generator):
    layer, x = make(generator), inputs(generator)
    want = layer(x)
    got, state = layer.to(dtype).prefill(x.to(dtype))
    assert got.dtype is dtype and all(s.dtype is torch.float32 for s in state)
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.02)
    y, state = layer.step(x[:, 0].to(dtype), state)
    assert y.dtype is dtype and all(s.dtype is torch.float32 for s in state)


def test_autocast(generator):
    layer, x = make(generator, torch.float32), inputs(generator, dtype=torch.float32)
    want, want_state = layer.prefill(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = layer.prefill(x)
        y, _ = layer.step(x[:, 0], layer.init_state(3))
    assert got.dtype is y.dtype is torch.bfloat16
    assert all(s.dtype is torch.float32 for s in state)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)
    torch.testing.assert_close(y, got[:, 0], rtol=0.05, atol=0.02)
    torch.testing.assert_close(state[1], want_state[1], rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_compiled(generator):
    """No graph break, and one compilation for every batch and length."""
    layer = make(generator, torch.float32)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for B, T in ((3, 11), (5, 9), (4, 30)):
        x = inputs(generator, B, T, torch.float32)
        parameters = list(layer.parameters())
        got = torch.autograd.grad(compiled(x).square().sum(), parameters)
        want = torch.autograd.grad(layer(x).square().sum(), parameters)
        torch.testing.assert_close(got, want)
    assert count.frame_count == 1


def test_errors(generator):
    layer, x = make(generator), inputs(generator)
    state = layer.init_state(3)
    for call, message in (
        (lambda: layer(x[0]), r"x has shape \(11, 8\), expected \(B, T, d_model=8\)"),
        (lambda: layer.step(x, state), r"x has shape \(3, 11, 8\), expected \(B, d_model=8\)"),
        (lambda: layer.step(x[:2, 0], state), r"state\[0\] has shape \(3, 16, 3\)"),
        (lambda: layer.prefill(x, (state[0], state[1][:2])), r"state\[1\] has shape \(2, 16, 3\)"),
        (lambda: layer(x, torch.tensor([1, 2])), r"lengths has shape \(2\), expected \(B=3,\)"),
        (lambda: layer(x, torch.tensor([1, 2, 12])), "values from 1 to 12, expected 0 to T=11"),
        (lambda: layer(x, torch.tensor([1, 2, 3]), "top"), 'padding is "top"'),
        (lambda: layer.prefill(x, state, torch.tensor([1, 2, 3]), "left"), "state is given"),
        (lambda: torch_ext.Mamba(0), "d_model is 0"),
        (lambda: torch_ext.Mamba(8, dt_rank="few"), "dt_rank is 'few'"),
        (lambda: torch_ext.Mamba(8, dt_rank=0), "dt_rank is 0"),
        (lambda: torch_ext.Mamba(8, dt_init="zero"), "dt_init is 'zero'"),
        (lambda: torch_ext.Mamba(8, dt_min=1.0, dt_max=0.1), "dt_min is 1.0 and dt_max 0.1"),
        (lambda: torch_ext.Mamba(8, expand=0), "expand is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="lengths has dtype torch.float32"):
        layer(x, torch.ones(3))


# ---- mamba_step: the layer's step as an operator ----


def weights_of(layer, detach=False):
    weights = [
        layer.in_proj.weight, layer.in_proj.bias, layer.conv1d.weight.squeeze(1),
        layer.conv1d.bias, layer.x_proj.weight, layer.dt_proj.weight, layer.dt_proj.bias,
        layer.A_log, layer.D, layer.out_proj.weight, layer.out_proj.bias,
    ]  # fmt: skip
    return [w.detach() if detach and w is not None else w for w in weights]


def random_state(layer, rows, generator):
    return tuple(
        torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s.dtype)
        for s in layer.init_state(rows)
    )


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"conv_bias": False}, {"d_conv": 1}, {"d_conv": 6}], ids=str
)
def test_steps_of_the_operator_yield_the_formula(options, generator):
    layer, x = make(generator, **options), inputs(generator)
    want, want_scan = formula(layer, x)
    weights, state = weights_of(layer, detach=True), layer.init_state(3)
    written = layer.init_state(3)
    for t in range(x.shape[1]):
        y, state = torch_ext.mamba_step(x[:, t], *weights, state)
        close(y, want[:, t].detach())
        assert torch.equal(torch_ext.mamba_step_(x[:, t], *weights, written), y)
        assert torch.equal(written[0], state[0]) and torch.equal(written[1], state[1])
    close(state[1], want_scan.detach())


def test_steps_without_optional_weights(generator):
    layer, x = make(generator), inputs(generator)[:, 0]
    weights, state = weights_of(layer, detach=True), random_state(layer, 3, generator)
    for missing in (6, 8):
        given, absent = list(weights), list(weights)
        given[missing] = torch.zeros_like(weights[missing])
        absent[missing] = None
        want, got = (torch_ext.mamba_step(x, *w, state) for w in (given, absent))
        close(got[0], want[0])
        close(got[1][1], want[1][1])


def test_states_in_a_pool(generator):
    layer, x = make(generator, bias=True), inputs(generator)[:, 0]
    weights, pool = weights_of(layer, detach=True), random_state(layer, 5, generator)
    for dtype in (torch.int32, torch.int64):
        slots = torch.tensor([4, -1, 1], dtype=dtype)
        y, after = torch_ext.mamba_step(x, *weights, pool, slots)
        assert (y[1] == 0).all()
        for row, slot in ((0, 4), (2, 1)):
            alone, state = torch_ext.mamba_step(
                x[row : row + 1], *weights, tuple(s[slot : slot + 1] for s in pool)
            )
            close(y[row], alone[0])
            for new, want in zip(after, state, strict=True):
                close(new[slot], want[0])
        for new, old in zip(after, pool, strict=True):
            assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]])
        written = tuple(s.clone() for s in pool)
        assert torch.equal(torch_ext.mamba_step_(x, *weights, written, slots), y)
        assert all(map(torch.equal, written, after))


def test_half_precision_steps(generator):
    layer = make(generator, torch.bfloat16, bias=True)
    x = inputs(generator, dtype=torch.bfloat16)[:, 0]
    weights, state = weights_of(layer, detach=True), random_state(layer, 3, generator)
    assert state[0].dtype is torch.bfloat16 or state[0].dtype is torch.float32
    exact = [None if w is None else w.double() for w in weights]
    want, _ = torch_ext.mamba_step(x.double(), *exact, tuple(s.double() for s in state))
    y, after = torch_ext.mamba_step(x, *weights, state)
    assert y.dtype is torch.bfloat16
    assert [s.dtype for s in after] == [s.dtype for s in state]
    assert (y - want).norm() < 0.03 * want.norm()
    y = torch_ext.mamba_step_(x, *weights, state)
    assert y.dtype is torch.bfloat16
    assert (y - want).norm() < 0.03 * want.norm()


def test_the_step_under_transforms(generator):
    layer, x = make(generator, torch.float32), inputs(generator, dtype=torch.float32)[:, 0]
    weights, state = weights_of(layer, detach=True), random_state(layer, 3, generator)
    want, _ = torch_ext.mamba_step(x, *weights, state)
    warnings.filterwarnings("error", message="There is a performance drop")
    rows = torch.func.vmap(
        lambda x, *state: torch_ext.mamba_step(x[None], *weights, tuple(s[None] for s in state))[0]
    )(x, *state)
    torch.testing.assert_close(rows[:, 0], want)
    compiled = torch.compile(torch_ext.mamba_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *weights, state)[0], want)
    written = tuple(s.clone() for s in state)
    compiled = torch.compile(torch_ext.mamba_step_, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *weights, written), want)
    assert not torch.equal(written[1], state[1])
    scripted = torch.jit.script(torch_ext.mamba_step)
    torch.testing.assert_close(scripted(x, *weights, state)[0], want)
    with torch.autocast("cpu", torch.bfloat16):
        y, after = torch_ext.mamba_step(x, *weights, state)
    assert y.dtype is torch.bfloat16 and after[1].dtype is torch.float32
    assert (y - want).norm() < 0.03 * want.norm()


# What is decided by this very argument, and makes all others wrong.
DECIDES = {"x": "BM", "A_log": "IN", "conv_weight": "W", "dt_proj_weight": "R"}
DECIDES["out_proj_weight"] = "O"
IN_PLACE = pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])


def refused(error, pieces, call, in_place, indices=None):
    """In these words, and before anything is written."""
    states = [call[name] for name in ("conv_state", "scan_state")]
    before = [s.clone() for s in states if s is not None]
    refuses(error, pieces, layer_step, call, indices, in_place)
    states = [s for s in states if s is not None]
    for s, b in zip(states, before, strict=True):
        assert s.is_meta or torch.equal(s, b), "a refused step changed a state"


@IN_PLACE
def test_shapes_of_the_step(in_place, generator):
    call, sizes = layer_call(generator), layer_sizes()
    name = "mamba_step_: " if in_place else "mamba_step: "
    for argument, letters in LAYER_STEP.items():
        right = tuple(sizes[d] for d in letters)
        wrong = [(*right, 1), right[1:], (1, *right)]
        for d, letter in enumerate(letters):
            if letter not in DECIDES.get(argument, ""):
                wrong += [(*right[:d], n, *right[d + 1 :]) for n in (right[d] + 1, 1)]
        for shape in wrong:
            pieces = [f"{name}{argument} has shape {shape}, expected ("]
            refused(ValueError, pieces, call | {argument: torch.ones(shape)}, in_place)


@IN_PLACE
def test_indices_of_the_step(in_place, generator):
    call, good = layer_call(generator, rows=5), torch.tensor([4, -1, 0])
    layer_step(call, good, in_place)
    for bad, error, pieces in (
        (good + 1, ValueError, ["state_indices[0] is 5", "less than 5"]),
        (good.clamp_min(0), ValueError, ["0 twice"]),
        (good[:2], ValueError, ["shape (2,), expected (B=3)"]),
        (good[None], ValueError, ["shape (1, 3), expected (B=3)"]),
        (good.float(), TypeError, ["float32", "int32 or int64"]),
        (good.to("meta"), RuntimeError, ["meta", "cpu"]),
    ):
        refused(error, ["state_indices", *pieces], call, in_place, bad)
    call["scan_state"] = call["scan_state"][:4]
    refused(ValueError, ["scan_state", "(4, 4, 5)", "num_slots=5"], call, in_place, good)


@IN_PLACE
def test_dtypes_of_the_step(in_place, generator):
    name = "mamba_step_: " if in_place else "mamba_step: "
    for dtype, bad in itertools.product(
        (torch.float32, torch.bfloat16), (torch.float64, torch.int32)
    ):
        call = layer_call(generator, dtype)
        for argument, x in call.items():
            if argument == "conv_state" and bad is torch.float64:
                continue  # may be wider
            expected = "float32" if argument == "scan_state" else short(dtype)
            pieces = [f"{name}{argument} has dtype {short(bad)}, expected {expected}"]
            if argument == "x":
                pieces = [name, "dtype", short(bad), "expected"]
            refused(TypeError, pieces, call | {argument: x.to(bad)}, in_place)
    call = layer_call(generator, torch.bfloat16)
    for argument in ("in_proj_weight", "x_proj_weight", "dt_proj_weight", "out_proj_bias"):
        pieces = [f"{name}{argument} has dtype float32, expected bfloat16"]
        refused(TypeError, pieces, call | {argument: call[argument].float()}, in_place)


@IN_PLACE
def test_devices_of_the_step(in_place, generator):
    call = layer_call(generator)
    for argument, x in list(call.items())[1:]:
        pieces = ["mamba_step", f": {argument} is on meta, expected cpu"]
        refused(RuntimeError, pieces, call | {argument: x.to("meta")}, in_place)


@IN_PLACE
def test_none_for_a_tensor_of_the_step(in_place, generator):
    call = layer_call(generator)
    for argument in LAYER_STEP:
        if argument not in LAYER_OPTIONAL:
            pieces = ["mamba_step", argument, "expected"]
            refused(ValueError, pieces, call | {argument: None}, in_place)


@pytest.mark.parametrize("name", ["conv_state", "scan_state"])
def test_the_step_refuses_shared_memory(name, generator):
    call = layer_call(generator)
    for d in range(3):
        shared = call[name].narrow(d, 0, 1).expand_as(call[name])
        refused(ValueError, ["state", "no two elements"], call | {name: shared}, in_place=True)


def test_the_step_in_place_refuses_gradients(generator):
    call = layer_call(generator)
    for argument, x in call.items():
        pieces = ["mamba_step_: an input requires grad", "mamba_step, which is differentiable"]
        changed = call | {argument: x.clone().requires_grad_()}
        refused(RuntimeError, pieces, changed, in_place=True)
    versions = [call[name]._version for name in ("conv_state", "scan_state")]
    layer_step(call, in_place=True)
    assert [call[name]._version for name in ("conv_state", "scan_state")] > versions


def test_threads_of_the_step(generator, threads):
    """Rows few and many, which go by different products."""
    for rows in (1, 3, 40):
        for dtype in (torch.float32, torch.bfloat16):
            sizes = {"M": 130, "I": 260, "N": 16, "W": 4, "R": 9, "O": 130}
            call = layer_call(generator, dtype, B=rows, **sizes)
            want = None
            for n in (1, 2, 2, 3):
                threads(n)
                got = layer_step(call)
                states = {name: call[name].clone() for name in ("conv_state", "scan_state")}
                in_place = layer_step(call | states, in_place=True), *states.values()
                if rows < 9:  # torch's own product promises less
                    want = want or (*got, *in_place)
                    assert all(map(torch.equal, (*got, *in_place), want)), (
                        f"{rows} rows, {n} threads"
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("rows", [3, 12])
def test_nan_stays_in_its_row_of_the_step(rows, dtype, generator):
    """And in its slot; where nothing is wrong no bit differs."""
    slots = torch.randperm(rows + 2, generator=generator)[:rows]
    for indices in (None, slots):
        call = layer_call(generator, dtype, B=rows, rows=rows if indices is None else rows + 2)
        clean = layer_step(call, indices)
        own = 1 if indices is None else int(slots[1])
        for name, row in (("x", 1), ("conv_state", own), ("scan_state", own)):
            x = call[name].clone()
            x[row].view(-1)[2] = torch.nan
            bad = call | {name: x}
            for in_place in (False, True):
                states = {n: bad[n].clone() for n in ("conv_state", "scan_state")}
                got = layer_step(bad | states, indices, in_place)
                got = (got, *states.values()) if in_place else got
                for g, c, r in zip(got, clean, (1, own, own), strict=True):
                    others = [i for i in range(len(g)) if i != r]
                    assert torch.equal(g[others], c[others]), name
                assert got[0][1].isnan().all(), name


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])
@pytest.mark.unpoisoned
def test_opcheck_of_the_step(in_place, generator):
    packet = torch.ops.torch_ext.mamba_step_ if in_place else torch.ops.torch_ext.mamba_step
    torch.library.opcheck(packet.default, tuple(layer_call(generator).values()))
    pool = (*layer_call(generator, rows=5).values(), torch.tensor([4, -1, 0]))
    torch.library.opcheck(packet.default, pool)
    if not in_place:
        leaves = (x.requires_grad_() for x in layer_call(generator).values())
        torch.library.opcheck(packet.default, tuple(leaves))


@pytest.mark.parametrize("indices", [None, [2, -1]], ids=["rows", "pool"])
def test_derivatives_of_the_step(indices, generator):
    sizes = {"M": 2, "I": 2, "N": 1, "W": 2, "R": 1, "O": 1}
    indices = None if indices is None else torch.tensor(indices)
    rows = 2 if indices is None else 3
    call = layer_call(generator, torch.float64, B=2, rows=rows, **sizes)
    leaves = [x.requires_grad_() for x in call.values()]

    def step(*leaves):
        return layer_step(dict(zip(call, leaves, strict=True)), indices)

    torch.autograd.gradcheck(step, leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(step, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 20])
def test_few_rows_and_many_without_gradients(rows, dtype, generator):
    """Without a gradient few rows go through kernels of their own."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    layer = torch_ext.Mamba(37, d_state=5, bias=True).to(dtype)
    x = torch.randn(rows, 37, generator=generator).to(dtype)
    state = random_state(layer, rows, generator)
    want, want_state = layer.step(x, state)
    assert want.requires_grad
    with torch.no_grad():
        y, after = layer.step(x, state)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.02)
    for a, b in ((y, want), (after[0], want_state[0]), (after[1], want_state[1])):
        torch.testing.assert_close(a, b.detach(), atol=tolerance, rtol=tolerance)
