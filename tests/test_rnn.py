"""LSTM, GRU, RNN against torch.nn's; these, SLSTM and IndRNN with their options against plain loops; cells;
initialisers."""

import copy
import doctest
import importlib
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import torch_ext
from torch_ext import _gated_layer

THEIRS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
B, T, I, H = 3, 7, 4, 6
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64
MASKS = {"recurrent_dropout": 0.3, "input_dropout": 0.25, "weight_dropout": 0.2}

# What each option is tested with; the last of a layer has all that go together.
OPTIONS = {
    "LSTM": [
        {},
        {"num_heads": 2},
        {"coupled": True},
        {"peephole": True},
        {"proj_size": 4, "num_heads": 2, "peephole": True, "coupled": True},
        {"layer_norm": "haste"},
        {"zoneout": 0.3},
        {"zoneout_c": 0.4},
        {"recurrent_dropout": 0.3},
        {"input_dropout": 0.25},
        {"weight_dropout": 0.2},
        {"recurrent_clip": 0.05},
        {"proj_size": 4, "num_heads": 2, "peephole": True, "layer_norm": "haste", "zoneout": 0.2}
        | {"zoneout_c": 0.1, **MASKS},
    ],
    "GRU": [
        {},
        {"reset_after": False},
        {"reset_after": False, "num_heads": 2, "zoneout": 0.3, "recurrent_clip": 0.05, **MASKS},
        {"layer_norm": "haste"},
        {"recurrent_clip": 0.05},
        {"num_heads": 2, "layer_norm": "haste", "zoneout": 0.3, **MASKS},
    ],
    "RNN": [
        {"nonlinearity": "relu"},
        {"recurrent_clip": 0.05},
        {"num_heads": 2, "layer_norm": "haste", "zoneout": 0.3, **MASKS},
    ],
    "SLSTM": [
        {},
        {"forget_gate": "exp"},
        {"num_heads": 2},
        {"recurrent_clip": 0.05, "num_heads": 2},
        {
            "normalizer": "at_least_one",
            "num_heads": 2,
            "zoneout": 0.2,
            "layer_norm": "haste",
            **MASKS,
        },
    ],
    "IndRNN": [
        {},
        {"nonlinearity": "tanh", "recurrent_clip": 0.05},
        {"recurrent_max": 0.5, "zoneout": 0.3, "recurrent_dropout": 0.3, "input_dropout": 0.25},
    ],
}
ALL = [(name, options) for name, several in OPTIONS.items() for options in several]
EACH = [(name, several[-1]) for name, several in OPTIONS.items()]

script_warnings = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is :DeprecationWarning",
    r"ignore:`torch\.jit\.\w+` is :FutureWarning",
)


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)


def make(name, *arguments, **options):
    """With other norms than those of 1 at the start, and biases of sLSTM within reach."""
    module = getattr(torch_ext, name)(*arguments, **options)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "norm" in key:
                parameter.add_(torch.rand_like(parameter) - 0.5)
            elif name == "SLSTM" and "bias" in key:
                parameter.div_(4)
            elif options.get("recurrent_max") and "weight_hh" in key:
                parameter.mul_(6).sub_(1.5)  # beyond the bound on either side
    return module


def noise(*shape, **options):
    return torch.randn(*shape, **options)


def tensors(x):
    """The tensors in what a layer returns."""
    if isinstance(x, PackedSequence):
        return [x.data]
    return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in tensors(part)]


def close(got, want, **bound):
    got, want = tensors(got), tensors(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **(bound or EXACT))


def state_of(module, rows, dtype=torch.float64):
    """A drawn initial state (with a positive normaliser)."""
    sizes = [sizes[0][1] for sizes in module.state_sizes()]
    count = module.num_layers * module.num_directions
    state = [0.5 * noise(count, rows, size, dtype=dtype) for size in sizes]
    if len(state) == 4:
        state[2] = state[2].abs() + 1
    return tuple(state) if len(state) > 1 else state[0]


# ---- torch.nn ----


def fuzz(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


CALLS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(("LSTM", "GRU", "RNN")),
        "input_size": st.integers(1, 6),
        "hidden_size": st.integers(2, 9),
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
        "proj_size": st.sampled_from((0, 0, 1)),
        "relu": st.booleans(),
        "form": st.sampled_from(("batched", "unbatched", "sorted", "unsorted")),
        "with_state": st.booleans(),
        "lengths": st.lists(st.integers(1, 9), min_size=1, max_size=5),
        "seed": st.integers(0, 2**31 - 1),
    }
)


def both(call):
    """Our layer and torch.nn's with its parameters, the inputs of both, and weights of what comes out."""
    print(call)
    torch.manual_seed(call["seed"])
    keys = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
    options = {key: call[key] for key in keys}
    if call["name"] == "LSTM":
        options["proj_size"] = call["proj_size"]
    if call["name"] == "RNN":
        options["nonlinearity"] = "relu" if call["relu"] else "tanh"
    ours = getattr(torch_ext, call["name"])(**options, dtype=torch.float64)
    theirs = THEIRS[call["name"]](**options, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    lengths = call["lengths"] if call["form"] != "unbatched" else call["lengths"][:1]
    steps, rows = max(lengths), len(lengths)
    shape = (rows, steps) if call["batch_first"] else (steps, rows)
    x = noise(*shape, call["input_size"], dtype=torch.float64)
    state = tensors(state_of(ours, rows))
    if call["form"] == "unbatched":
        x, state = x.squeeze(0 if call["batch_first"] else 1), [s.squeeze(1) for s in state]
    state = state if call["with_state"] else []

    def run(module, leaf, states):
        hx = tuple(states) if len(states) == 2 else states[0] if states else None
        given = leaf
        if call["form"].endswith("sorted"):
            held = sorted(lengths, reverse=True) if call["form"] == "sorted" else lengths
            given = pack_padded_sequence(
                leaf, torch.tensor(held), call["batch_first"], call["form"] == "sorted"
            )
        return module(given, hx)

    return ours, theirs, x, state, run


@fuzz(150)
@given(CALLS)
def test_is_torch_nn(call):
    """Values and the gradients of everything."""
    ours, theirs, x, state, run = both(call)
    got = []
    for module in (ours, theirs):
        leaf, states = x.clone().requires_grad_(), [s.clone().requires_grad_() for s in state]
        out = run(module, leaf, states)
        if isinstance(out[0], PackedSequence):
            got.append([out[0].batch_sizes, *[i for i in out[0][2:] if i is not None]])
        torch.manual_seed(call["seed"])
        sum((noise(*y.shape, dtype=y.dtype) * y).sum() for y in tensors(out)).backward()
        gradients = [p.grad for p in module.parameters()]
        got.append([*tensors(out), leaf.grad, *[s.grad for s in states], *gradients])
    if call["form"] in ("batched", "unbatched"):  # view() works where it does on torch.nn's
        y, want = (tensors(run(module, x, state))[0] for module in (ours, theirs))
        assert y.is_contiguous() or not want.is_contiguous()
    half = len(got) // 2
    for mine, other in zip(got[:half], got[half:], strict=True):
        close(mine, other)


@fuzz(25)
@given(CALLS.filter(lambda call: max(call["lengths"]) < 5 and call["hidden_size"] < 6))
def test_double_backward_is_torch_nns(call):
    call = call | {"num_layers": min(call["num_layers"], 2)}
    ours, theirs, x, state, run = both(call)
    got = []
    for module in (ours, theirs):
        leaf, states = x.clone().requires_grad_(), [s.clone().requires_grad_() for s in state]
        inputs = [leaf, *states, *module.parameters()]
        out = run(module, leaf, states)
        torch.manual_seed(call["seed"])
        loss = sum((noise(*y.shape, dtype=y.dtype) * y).square().sum() for y in tensors(out))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        weighted = sum((noise(*g.shape, dtype=g.dtype) * g).sum() for g in first)
        got.append(torch.autograd.grad(weighted, inputs))
    close(*got)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("bias, bidirectional", list(itertools.product([True, False], repeat=2)))
def test_parameters_are_torch_nns(name, bias, bidirectional, seed):
    several = [{"proj_size": 0}, {"proj_size": 2}] if name == "LSTM" else [{}]
    for options in several:
        modules = []
        for cls in (getattr(torch_ext, name), THEIRS[name]):
            torch.manual_seed(seed)
            options = options | {"bias": bias, "bidirectional": bidirectional}
            modules.append(cls(I, H, 2, **options))
        ours, theirs = (module.state_dict() for module in modules)
        assert list(ours) == list(theirs)  # from the same seed the same numbers
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        for mine, other in zip(modules[0].all_weights, modules[1].all_weights, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert modules[0].all_weights[0][0] is modules[0].weight_ih_l0
        modules[0].flatten_parameters()
        assert repr(modules[0]) == repr(modules[1]) or name == "LSTM"
        torch.manual_seed(seed)
        modules[0].reset_parameters()
        assert torch.equal(modules[0].weight_hh_l1, modules[1].weight_hh_l1)


def test_positional_arguments_are_torch_nns():
    for name, arguments in {
        "LSTM": (I, H, 2, False, True, 0.5, True, 2, "cpu", torch.float64),
        "GRU": (I, H, 2, False, True, 0.5, True, "cpu", torch.float64),
        "RNN": (I, H, 2, "relu", False, True, 0.5, True, "cpu", torch.float64),
    }.items():
        ours, theirs = getattr(torch_ext, name)(*arguments), None
        theirs = THEIRS[name](*(arguments[:-2]), device="cpu", dtype=torch.float64)
        keys = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
        for key in (*keys, *(["nonlinearity"] if name == "RNN" else [])):
            assert getattr(ours, key) == getattr(theirs, key), key
        assert ours.weight_ih_l0.dtype == torch.float64
        x = noise(B, T, I, dtype=torch.float64)
        ours.load_state_dict(theirs.state_dict())
        close(ours.eval()(x), theirs.eval()(x))


# ---- options ----


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bound):
        ctx.bound = bound
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clip(-ctx.bound, ctx.bound), None


def normed(a, gates, heads):
    """Over the gates and units of each head."""
    a = a.reshape(len(a), gates, heads, -1)
    mean = a.mean((1, 3), keepdim=True)
    variance = (a - mean).pow(2).mean((1, 3), keepdim=True)
    return ((a - mean) / (variance + 1e-5).sqrt()).reshape(len(a), -1)


def block(R, h, gates, heads):
    """The block-diagonal product: (G * hidden, P / heads) and (B, P)."""
    parts = R.reshape(gates, heads, -1, R.shape[1]).unbind(1)
    out = []
    for part, u in zip(parts, h.chunk(heads, 1), strict=True):
        out.append(torch.stack([u @ gate.T for gate in part], 1))
    return torch.cat([o.unsqueeze(2) for o in out], 2).reshape(len(h), -1)


def cell(module, x, u, state, get):
    """One step of one layer: what comes of the gates of the input ``x``, what R multiplies, ``u``, and the
    state."""
    name, heads, gates = type(module).__name__, module.num_heads, module.num_gates
    haste = module.layer_norm == "haste"
    if name == "IndRNN":
        act = torch.relu if module.nonlinearity == "relu" else torch.tanh
        return [act(x + get("R") * u)]

    def product(R, u, gates):
        a = block(R, u, gates, heads)
        return normed(a, gates, heads) * get("recurrent_norm_weight") if haste else a

    b = 0.0 if get("bias_hh") is None else get("bias_hh")
    a = product(get("R"), u, gates) + b
    if name == "RNN":
        return [(torch.relu if module.nonlinearity == "relu" else torch.tanh)(x + a)]
    if name == "GRU":
        xr, xz, xn = x.chunk(3, 1)
        ar, az, an = a.chunk(3, 1)
        r, z = torch.sigmoid(xr + ar), torch.sigmoid(xz + az)
        if module.reset_after:
            n = torch.tanh(xn + r * an)
        else:
            size = module.hidden_size
            b = 0.0 if get("bias_hh") is None else get("bias_hh")[2 * size :]
            n = torch.tanh(xn + product(get("R")[2 * size :], r * u, 1) + b)
        return [n - z * n + z * state[0]]
    if name == "SLSTM":
        i, f, z, o = (x + a).chunk(4, 1)
        log_f = f if module.forget_gate == "exp" else F.logsigmoid(f)
        _, c, n, m = state
        # unstabilised: what is remembered is exp(m) c and exp(m) n
        C, N = c * m.exp() * log_f.exp(), n * m.exp() * log_f.exp()
        new = torch.where(n == 0, i, torch.maximum(i, log_f + m))
        C, N = C + i.exp() * torch.tanh(z), N + i.exp()
        c, n = C * (-new).exp(), N * (-new).exp()
        if module.normalizer == "at_least_one":
            n = n.clamp(min=1)
        return [torch.sigmoid(o) * c / n, c, n, new]
    *first, g, o = (x + a).chunk(gates, 1)
    c = state[1]
    peep = list(get("peephole").unbind(0)) if module.peephole else None
    if peep:
        first = [gate + w * c for gate, w in zip(first, peep, strict=False)]
    f = torch.sigmoid(first[-1])
    c = f * c + (1 - f if module.coupled else torch.sigmoid(first[0])) * torch.tanh(g)
    o = o + peep[-1] * c if peep else o
    shown = c
    if haste:
        shown = normed(c, 1, heads) * get("cell_norm_weight") + get("cell_norm_bias")
    h = torch.sigmoid(o) * torch.tanh(shown)
    if module.proj_size:
        W = get("weight_hr").reshape(heads, -1, module.hidden_size // heads)
        parts = zip(W, h.chunk(heads, 1), strict=True)
        h = torch.cat([u @ w.T for w, u in parts], 1)
    return [h, c]


def loop(module, x, state, reset=None):
    """The layers as a plain loop over ``x`` (B, T, I), with masks drawn as the module draws them."""
    finals, training = [], module.training
    rows, steps = x.shape[:2]
    for layer in range(module.num_layers):
        if training and module.input_dropout:
            x = x * F.dropout(x.new_ones(rows, x.shape[2]), module.input_dropout)[:, None]
        outputs = []
        for suffix in ["", "_reverse"][: module.num_directions]:
            R = getattr(module, f"weight_hh_l{layer}{suffix}")
            if module.weight_dropout and training:
                R = F.dropout(R, module.weight_dropout)
            if getattr(module, "recurrent_max", None):
                R = R.clip(-module.recurrent_max, module.recurrent_max)

            def get(kind, tail=f"_l{layer}{suffix}", R=R):
                return R if kind == "R" else getattr(module, kind + tail, None)

            s = [part[len(finals)] for part in tensors(state)]
            mask, updates = None, []
            if training and module.recurrent_dropout:
                mask = F.dropout(torch.ones_like(s[0]), module.recurrent_dropout)
            for part, share in zip(s, (module.zoneout, module.zoneout_c), strict=False):
                shape = (rows, steps, part.shape[1])
                if share and training:
                    updates.append((torch.rand(shape, dtype=x.dtype) >= share).to(x.dtype))
                else:
                    updates.append(x.new_full(shape, 1 - share))
            haste = module.layer_norm == "haste"
            ys = [None] * steps
            for t in reversed(range(steps)) if suffix else range(steps):
                if reset is not None:
                    s = [torch.where(reset[:, t, None], 0.0, part) for part in s]
                wx = x[:, t] @ get("weight_ih").T
                if haste:
                    wx = normed(wx, module.num_gates, module.num_heads) * get("input_norm_weight")
                if module.bias:
                    wx = wx + get("bias_ih")
                clip = module.recurrent_clip
                u = s[0] if clip is None else Clip.apply(s[0], clip)
                new = cell(module, wx, u if mask is None else u * mask, s, get)
                for k, update in enumerate(updates):
                    new[k] = update[:, t] * new[k] + (1 - update[:, t]) * s[k]
                s = new
                ys[t] = s[0]
            finals.append(s)
            outputs.append(torch.stack(ys, 1))
        x = torch.cat(outputs, 2)
    return [x, *[torch.stack(part) for part in zip(*finals, strict=True)]]


@pytest.mark.parametrize("name, options", ALL, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_options_are_the_plain_loop(name, options, training, bidirectional, seed):
    """Values and gradients, with resets."""
    arguments = {"num_layers": 2, "batch_first": True, "bidirectional": bidirectional}
    module = make(name, I, H, **arguments, **options, dtype=torch.float64).train(training)
    x, start = noise(B, T, I, dtype=torch.float64), state_of(module, B)
    reset = torch.rand(B, T) < 0.2
    got = []
    for ours in (True, False):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        state = [s.clone().requires_grad_() for s in tensors(start)]
        hx = tuple(state) if len(state) > 1 else state[0]
        torch.manual_seed(seed)
        out = tensors(module(leaf, hx, None, reset) if ours else loop(module, leaf, hx, reset))
        torch.manual_seed(seed)
        if name == "SLSTM":  # the stabiliser is free, and so is what it scales
            _, _, c, n, m = out
            out = [*out[:2], c * m.exp(), n * m.exp()] if options.get("normalizer") is None else out
        sum((noise(*y.shape, dtype=y.dtype) * y).sum() for y in out).backward()
        grads = [leaf.grad, *[s.grad for s in state], *[p.grad for p in module.parameters()]]
        got.append([*out, *grads])
    assert all(g is not None and g.isfinite().all() for g in got[0])
    for mine, other in zip(*got, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name, options", EACH, ids=str)
def test_masks_are_off_in_evaluation(name, options):
    """And once a sequence in training: a repeated input has a repeated mask."""
    module = make(name, I, H, 2, **options)
    x = noise(T, B, I)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])

    module = make(name, 40, H, batch_first=True, input_dropout=0.5, recurrent_dropout=0.5)
    start = state_of(module, B, torch.float32)
    reset = torch.ones(B, T, dtype=torch.bool)  # no step sees the one before
    x = noise(B, 1, 40).expand(B, T, 40)
    y = module(x, start, None, reset)[0]
    torch.testing.assert_close(y, y[:, :1].expand_as(y), **CLOSE)
    y = module(x[:1].expand(B, T, 40))[0]
    assert not torch.allclose(y[0], y[1])  # sequences have masks of their own


@pytest.mark.parametrize("name", OPTIONS)
def test_masks_of_padded_and_packed_sequences(name):
    """Each has its own, from its first step to its last."""
    lengths = [4, 1, T, 2]
    module = make(name, 40, H, batch_first=True, input_dropout=0.5)
    x = noise(1, 1, 40).expand(len(lengths), T, 40)
    every = torch.ones(len(lengths), T, dtype=torch.bool)
    padded = module(x, None, torch.tensor(lengths), every)[0]
    packed, sizes = pack_sequence([x[0, :length] for length in lengths], False), sum(lengths)
    packed = module(packed, None, None, torch.ones(sizes, dtype=torch.bool))[0]
    for y in (padded, nn.utils.rnn.pad_packed_sequence(packed, True)[0]):
        for row, length in zip(y, lengths, strict=True):
            torch.testing.assert_close(row[:length], row[:1].expand(length, -1), **CLOSE)
        assert len(y[:, 0].round(decimals=4).unique(dim=0)) == len(lengths)

    module = make(name, I, H, batch_first=True, recurrent_dropout=1.0)  # nothing comes through R
    x, start = noise(len(lengths), T, I), state_of(module, len(lengths), torch.float32)
    got = module(x, start, torch.tensor(lengths))
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    close(got, module.eval()(x, start, torch.tensor(lengths)), **CLOSE)


def test_shares_of_masks():
    """Means over many draws, within 6 standard deviations."""
    module = torch_ext.LSTM(2, 50, zoneout=0.2, zoneout_c=0.4, recurrent_dropout=0.3)
    gates = noise(100, 10, 200)
    for share in (0.2, 0.4):
        update = module._update(share, gates, [1, 50])
        assert set(update.unique().tolist()) == {0.0, 1.0}
        assert abs(update.mean() - 1 + share) < 6 * (share * (1 - share) / update.numel()) ** 0.5
    mask = module._recurrent_mask(torch.ones(1000, 1, 50))
    assert abs(mask.mean() - 1) < 6 * (0.3 / 0.7 / mask.numel()) ** 0.5
    module.eval()
    assert torch.equal(module._update(0.25, gates, [1, 50]), torch.full((100, 10, 1, 50), 0.75))


@pytest.mark.parametrize("name", OPTIONS)
def test_dropout_is_between_layers_in_training(name):
    module = make(name, I, H, 2, batch_first=True, dropout=1.0)
    x = noise(B, T, I)
    silent = torch.zeros_like(x)
    assert not torch.equal(module(x)[0], module.eval()(x)[0])
    module.train()
    assert torch.equal(module(x)[0], module(silent)[0])  # nothing comes through
    with pytest.warns(UserWarning, match="dropout is 0.5 with num_layers=1") as record:
        getattr(torch_ext, name)(I, H, dropout=0.5)
    assert record[0].filename == __file__


# ---- padding, packing, resets ----


@pytest.mark.parametrize("name, options", EACH + [("SLSTM", {"forget_gate": "exp"})], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_is_padded_is_separate(name, options, batch_first, bidirectional):
    """Outputs, final states and all gradients, with NaN where nobody may look, and with resets."""
    lengths = torch.tensor([4, T, 0, 1, 5])
    rows = len(lengths)
    arguments = {"batch_first": batch_first, "bidirectional": bidirectional, "num_layers": 2}
    module = make(name, I, H, **arguments, **options, dtype=torch.float64).eval()
    x, start = noise(rows, T, I, dtype=torch.float64), tensors(state_of(module, rows))
    past = torch.arange(T) >= lengths[:, None]
    x[past] = torch.nan
    reset = torch.rand(rows, T) < 0.3
    weights = noise(rows, T, module.output_size() * (1 + bidirectional), dtype=torch.float64)
    final_weights = [noise(*s.shape, dtype=torch.float64) for s in start]

    def run(how):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        states = [s.clone().requires_grad_() for s in start]

        def hx(b):
            parts = [s[:, b] for s in states]
            return tuple(parts) if len(parts) > 1 else parts[0]

        if how == "padded":
            order = (leaf, reset) if batch_first else (leaf.transpose(0, 1), reset.T)
            y, final = module(order[0], hx(slice(None)), lengths, order[1])
            y = y if batch_first else y.transpose(0, 1)
            final = tensors(final)
        elif how == "separate":
            ys, finals = [], []
            for b, length in enumerate(lengths.tolist()):
                y, final = module(leaf[b, :length], hx(b), None, reset[b, :length])
                ys.append(F.pad(y, (0, 0, 0, T - length)))
                finals.append(tensors(final))
            y = torch.stack(ys)
            final = [torch.stack(parts, 1) for parts in zip(*finals, strict=True)]
        else:  # a PackedSequence has no empty sequences
            some = [b for b in range(rows) if lengths[b]]
            packed = pack_sequence([leaf[b, : lengths[b]] for b in some], False)
            marks = pack_sequence([reset[b, : lengths[b]] for b in some], False)
            y, final = module(packed, hx(some), None, marks.data)
            padded, _ = nn.utils.rnn.pad_packed_sequence(y, True, 0.0, T)
            y = torch.zeros(rows, T, padded.shape[2], dtype=x.dtype).index_put(
                (torch.tensor(some),), padded
            )
            final = [
                s.index_copy(1, torch.tensor(some), part)
                for s, part in zip(states, tensors(final), strict=True)
            ]
        assert not y[past].any()
        loss = (y * weights).sum()
        loss = loss + sum((s * w).sum() for s, w in zip(final, final_weights, strict=True))
        loss.backward()
        assert not leaf.grad[past].any()
        grads = [leaf.grad, *[s.grad for s in states], *[p.grad for p in module.parameters()]]
        return [y, *final, *grads]

    want = run("separate")
    for how in ("padded", "packed"):
        for got, expected in zip(run(how), want, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", OPTIONS)
def test_lengths_of_any_integer_dtype_and_growing_padding(name):
    """A recurrence that grows does not overflow in the padding."""
    options = {"nonlinearity": "relu"} if name == "RNN" else {}
    module = make(name, 1, 2, batch_first=True, **options)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "weight_hh" in key:
                parameter.fill_(8.0)
            if "bias" in key:
                parameter.fill_(1.0)
    x = noise(2, 120, 1)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        module.zero_grad()
        y, final = module(x, None, torch.tensor([2, 3], dtype=dtype))
        close(y[0, :2], module(x[0, :2])[0], **CLOSE)
        sum(part.sum() for part in tensors((y, final))).backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(0, T), (B, 0), (0, 0)])
def test_empty(name, shape):
    module = make(name, I, H, 2, batch_first=True, bidirectional=True)
    state = state_of(module, shape[0], torch.float32)
    leaves = [s.requires_grad_() for s in tensors(state)]
    for lengths in (None, torch.zeros(shape[0], dtype=torch.int64)):
        y, final = module(noise(*shape, I), state, lengths)
        assert y.shape == (*shape, 2 * H)
        close(final, state)
        (sum(s.sum() for s in tensors(final)) + y.sum()).backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))


# ---- states ----


@pytest.mark.parametrize("name, options", EACH, ids=str)
def test_steps_are_chunks_are_the_sequence(name, options):
    """With their gradients, which flow through the states that are handed over."""
    module = make(name, I, H, 2, batch_first=True, **options, dtype=torch.float64).eval()
    x, start = noise(B, T, I, dtype=torch.float64), state_of(module, B)
    weight = noise(B, T, module.output_size(), dtype=torch.float64)

    def run(pieces):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        firsts = [s.clone().requires_grad_() for s in tensors(start)]
        state = tuple(firsts) if len(firsts) > 1 else firsts[0]
        ys, at = [], 0
        for steps in pieces:
            if steps == "step":
                y, state = module.step(leaf[:, at], state)
                y, steps = y.unsqueeze(1), 1
            else:
                y, state = module(leaf[:, at : at + steps], state)
            ys.append(y)
            at += steps
        assert at == T
        y = torch.cat(ys, 1)
        ((y * weight).sum() + sum(s.square().sum() for s in tensors(state))).backward()
        grads = [leaf.grad, *[s.grad for s in firsts], *[p.grad for p in module.parameters()]]
        return [y, *tensors(state), *grads]

    want = run([T])
    for pieces in ([3, 4], ["step"] * T, [2, "step", 0, 4]):
        for got, expected in zip(run(pieces), want, strict=True):
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", OPTIONS)
def test_init_state(name):
    module = make(name, I, H, 2, bidirectional=True, dtype=torch.float64)
    x = noise(T, B, I, dtype=torch.float64)
    state = module.init_state(B)
    assert all(s.shape == (4, B, H) and s.dtype == torch.float64 for s in tensors(state))
    assert not any(s.any() for s in tensors(state))
    close(module(x, state), module(x))
    assert all(s.dtype == torch.float32 for s in tensors(module.bfloat16().init_state(B)))


@pytest.mark.parametrize(
    "name, options", [*EACH, ("LSTM", {}), ("GRU", {}), ("SLSTM", {})], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, options, dtype):
    """The module's own and autocast's. States are as they were given, else as torch.nn's."""
    # Norms of what is near 0 enlarge roundings, those of the weights alone as much as these.
    bound = 0.15 if "layer_norm" in options else 2 * torch.finfo(dtype).eps
    module = make(name, I, 48, 2, batch_first=True, **options).eval()
    x = noise(B, T, I)
    want, final = module(x)

    def near(got, want):
        assert got.shape == want.shape
        error = (got.float() - want).square().mean().sqrt()
        assert error < bound, error

    with torch.autocast("cpu", dtype):
        y, state = module(x)
        y_t, _ = module.step(x[:, 0], module.init_state(B))
        y_0, half = module(x[:, :3])
        y_1, half = module(x[:, 3:], half)
    near(torch.cat([y_0, y_1], 1).float(), want)
    assert half[0].dtype == (dtype if name in THEIRS else torch.float32)
    near(y.float(), want)
    near(y_t.float(), want[:, 0])
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())

    half = copy.deepcopy(module).to(dtype)
    y, state = half(x.to(dtype))
    assert y.dtype == dtype
    theirs = name in THEIRS
    assert all(s.dtype == (dtype if theirs else torch.float32) for s in tensors(state))
    near(y.float(), want)
    y, state = half(x.to(dtype), half.init_state(B))
    assert all(s.dtype == torch.float32 for s in tensors(state))
    for got, part in zip(tensors(state), tensors(final), strict=True):
        assert (got - part).norm() < 2 * bound * part.norm()
    packed = pack_sequence([x[0].to(dtype), x[1, :3].to(dtype)])
    near(half(packed)[0].data[0].float(), want[0, 0])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "IndRNN"])
def test_recurrent_weights_in_bfloat16(name):
    module, x = make(name, I, H, batch_first=True), noise(B, T, I)
    with torch.no_grad():
        module.weight_hh_l0.copy_(module.weight_hh_l0.bfloat16())
    want = module(x)
    module.weight_hh_l0.data = module.weight_hh_l0.data.bfloat16()
    assert not module._is_plain()  # torch's own kernel wants one dtype
    close(module(x), want, **CLOSE)


# ---- copies, scripts, graphs ----


@pytest.mark.parametrize("name, options", EACH, ids=str)
def test_copies(name, options):
    module = make(name, I, H, 2, batch_first=True, bidirectional=True, **options).eval()
    x = noise(B, T, I)
    want, _ = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], want)
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert not torch.equal(other(x)[0], want) and torch.equal(module(x)[0], want)
    other = make(name, I, H, 2, batch_first=True, bidirectional=True, **options).eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], want)


def test_repr_says_what_differs_from_the_defaults():
    module = torch_ext.LSTM(3, 8, 2, proj_size=4, num_heads=2, zoneout_c=0.5, recurrent_clip=1)
    assert repr(module) == (
        "LSTM(3, 8, num_layers=2, proj_size=4, num_heads=2, zoneout_c=0.5, recurrent_clip=1.0)"
    )
    assert repr(torch_ext.IndRNN(3, 4, nonlinearity="tanh")) == "IndRNN(3, 4, nonlinearity='tanh')"
    assert (
        repr(torch_ext.GRU(3, 4)) == "GRU(3, 4)" and repr(torch_ext.IndRNN(3, 4)) == "IndRNN(3, 4)"
    )
    assert repr(torch_ext.GRUCell(3, 4, num_heads=2)) == "GRUCell(3, 4, num_heads=2)"


def reload(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@script_warnings
@pytest.mark.parametrize(
    "name, options",
    [*EACH, ("LSTM", {}), ("GRU", {"bias": False}), ("SLSTM", {"bidirectional": True})],
    ids=str,
)
def test_script(name, options):
    module = make(name, I, H, 2, batch_first=True, **options)
    scripted = torch.jit.script(module)
    assert torch.jit.script(copy.deepcopy(module))(noise(B, T, I))[0].shape[:2] == (B, T)
    module.eval(), scripted.eval()
    x, lengths, reset = noise(B, T, I), torch.tensor([2, T, 0]), torch.rand(B, T) < 0.3
    state = state_of(module, B, torch.float32)
    loaded = reload(scripted)
    for other in (scripted, loaded):
        for arguments in [
            (x,),
            (x, state),
            (x, None, lengths),
            (x, state, lengths, reset),
            (x[0],),
        ]:
            close(other(*arguments), module(*arguments), atol=0, rtol=0)
        close(other.init_state(2), module.init_state(2))
        if not module.bidirectional:
            close(other.step(x[:, 0], state), module.step(x[:, 0], state), atol=0, rtol=0)
        with pytest.raises(
            Exception, match=r"input has shape \(3, 7, 5\), expected .*input_size=4"
        ):
            other(noise(B, T, I + 1))
    module(x)[0].square().sum().backward()
    loaded(x)[0].square().sum().backward()
    for want, got in zip(module.parameters(), loaded.parameters(), strict=True):
        # Norms of what is near 0, such as R h in the first steps, make much of a rounding.
        bound = 1e-6 + 2e-4 * want.grad.abs().max().item()
        close(got.grad, want.grad, atol=bound, rtol=0)


@pytest.mark.parametrize("name, options", [*EACH, ("LSTM", {"bidirectional": True})], ids=str)
def test_export_with_dynamic_sizes(name, options):
    module = make(name, I, H, 2, batch_first=True, **options).eval()
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    state = state_of(module, B, torch.float32)
    sizes = [{1: batch} for _ in tensors(state)]
    sizes = tuple(sizes) if len(sizes) > 1 else sizes[0]
    program = torch.export.export(
        module,
        (noise(B, T, I), state, torch.tensor([2, T, 3])),
        dynamic_shapes=({0: batch, 1: steps}, sizes, {0: batch}),
    ).module()
    for rows, length in ((B, T), (5, 11)):
        x, state = noise(rows, length, I), state_of(module, rows, torch.float32)
        lengths = torch.randint(0, length + 1, (rows,))
        close(program(x, state, lengths), module(x, state, lengths), **CLOSE)


class CompileCounter:
    def __init__(self, backend):
        self.backend, self.count = backend, 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", EACH, ids=str)
def test_compiles_without_breaks(name, options):
    """In training: the masks too."""
    torch._dynamo.reset()
    module = make(name, I, H, batch_first=True, **options)
    counter = CompileCounter("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    x = noise(B, T, I)
    assert compiled(x)[0].shape == module(x)[0].shape
    compiled(x)[0].sum().backward()
    module.eval()
    counts = []
    for rows, steps in ((B, T), (5, 4), (4, 9)):
        x, lengths = noise(rows, steps, I), torch.randint(0, steps, (rows,))
        close(compiled(x, None, lengths), module(x, None, lengths), **CLOSE)
        counts.append(counter.count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("name", OPTIONS)
def test_ensemble_by_vmap_and_parametrized_weights(name):
    modules = [make(name, I, H, batch_first=True) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = noise(B, T, I)

    def one(parameters, buffers):
        return torch.func.functional_call(modules[0], (parameters, buffers), (x,))[0]

    stacked = torch.vmap(one)(parameters, buffers)
    for got, module in zip(stacked, modules, strict=True):
        close(got, module(x)[0], **CLOSE)

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    module = copy.deepcopy(modules[0])
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Twice())
    with torch.no_grad():
        modules[0].weight_hh_l0.mul_(2)
    close(module(x)[0], modules[0](x)[0], **CLOSE)


# ---- torch's own kernel ----


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", THEIRS)
def test_torchs_own_kernel(name, monkeypatch):
    """What CUDA's path does, here on the CPU: the same results in every form."""
    asked = []

    def native(x, plain, training):
        asked.append(plain)
        return plain

    kinds = [{}, {"nonlinearity": "relu"}] if name == "RNN" else [{}]
    kinds += [{"proj_size": 2}] if name == "LSTM" else []
    for options, batch_first in itertools.product(kinds, [True, False]):
        arguments = {"batch_first": batch_first, "bidirectional": True, **options}
        module = getattr(torch_ext, name)(I, H, 2, **arguments)
        theirs = THEIRS[name](I, H, 2, **arguments)
        theirs.load_state_dict(module.state_dict())
        x = noise(B, T, I)
        state = state_of(module, B, torch.float32)
        part = tuple(s[:, 0] for s in state) if name == "LSTM" else state[:, 0]
        given = x if batch_first else x.transpose(0, 1)
        packed = pack_sequence([x[0, :2], x[1], x[2, :5]], False)
        for call in ((given,), (given, state), (x[0],), (x[0], part), (packed,), (packed, state)):
            with monkeypatch.context() as patch:
                patch.setattr(_gated_layer, "_native_is_best", native)
                patch.setattr(module, "gated", None)
                got = module(*call)
            assert torch.equal(tensors(got)[0], tensors(theirs(*call))[0])
            close(got, theirs(*call), atol=0, rtol=0)
            close(got, module(*call), **CLOSE)
        with monkeypatch.context() as patch:
            patch.setattr(_gated_layer, "_native_is_best", native)
            lengths = torch.tensor([T, 2, 3])
            y, _ = module(given, None, lengths)  # ours: torch's has no such thing
            y = y if batch_first else y.transpose(0, 1)
            assert not y[1, 2:].any()
    assert all(asked)
    for options in OPTIONS[name]:
        module = getattr(torch_ext, name)(I, H, **options)
        assert module._plain == (not set(options) - {"nonlinearity", "proj_size"})


def test_where_torchs_own_kernel_is_best():
    class Cuda:
        is_cuda = True

    best = _gated_layer._native_is_best
    assert best(Cuda(), True, True) and not best(Cuda(), False, True)
    assert not best(Cuda(), True, False)  # cuDNN's backward is for training alone
    assert not best(torch.zeros(1), True, True)
    with torch.no_grad():
        assert best(Cuda(), True, False)
    with torch.backends.cudnn.flags(enabled=False):
        assert not best(Cuda(), True, True)


# ---- cells ----


@script_warnings
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "RNNCell-relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_torch_nns(name, bias, seed):
    name, *relu = name.split("-")
    options = {"bias": bias, "dtype": torch.float64} | ({"nonlinearity": "relu"} if relu else {})
    modules = []
    for cls in (getattr(torch_ext, name), getattr(nn, name)):
        torch.manual_seed(seed)
        modules.append(cls(I, H, **options))
    ours, theirs = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = noise(B, I, dtype=torch.float64)
    state = [noise(B, H, dtype=torch.float64) for _ in range(2 if name == "LSTMCell" else 1)]
    for with_state, batched in itertools.product([True, False], repeat=2):
        got = []
        for module in modules:
            module.zero_grad()
            leaf = (x if batched else x[0]).clone().requires_grad_()
            parts = [(s if batched else s[0]).clone().requires_grad_() for s in state]
            hx = None if not with_state else tuple(parts) if len(parts) > 1 else parts[0]
            out = tensors(module(leaf, hx))
            sum(y.square().sum() for y in out).backward()
            grads = [leaf.grad, *[p.grad for p in module.parameters()]]
            got.append([*out, *grads, *[s.grad for s in parts if with_state]])
        assert all(g is not None for g in got[0])
        close(*got)
    scripted = reload(torch.jit.script(ours))
    close(scripted(x), theirs(x))
    close(scripted(x[0]), theirs(x[0]))
    half = getattr(torch_ext, name)(I, H).bfloat16()
    assert all(s.dtype == torch.bfloat16 for s in tensors(half(x.bfloat16())))
    close(pickle.loads(pickle.dumps(ours))(x), theirs(x))


@script_warnings
@pytest.mark.parametrize(
    "name, options",
    [
        ("LSTM", {"num_heads": 2, "coupled": True}),
        ("GRU", {"num_heads": 3}),
        ("GRU", {"reset_after": False}),
        ("RNN", {"num_heads": 2, "nonlinearity": "relu"}),
        ("SLSTM", {"num_heads": 2}),
        ("SLSTM", {"forget_gate": "exp", "normalizer": "at_least_one", "bias": False}),
        ("IndRNN", {}),
        ("IndRNN", {"recurrent_max": 0.4, "nonlinearity": "tanh", "bias": False}),
    ],
    ids=str,
)
def test_cells_are_the_layers_steps(name, options):
    layer = make(name, I, H, **options, dtype=torch.float64)
    cell = getattr(torch_ext, name + "Cell")(I, H, **options, dtype=torch.float64)
    names = [key.removesuffix("_l0") for key in layer.state_dict()]
    assert list(cell.state_dict()) == names
    cell.load_state_dict(dict(zip(names, layer.state_dict().values(), strict=True)))
    x, want_state = noise(T, B, I, dtype=torch.float64), layer.init_state(B)
    for other in (cell, torch.jit.script(cell), copy.deepcopy(cell)):
        state, want_state = None, layer.init_state(B)
        for x_t in x:
            want, want_state = layer.step(x_t, want_state)
            state = other(x_t, state)
            if name == "SLSTM":
                y, state = state
                close(y, want)
            close([s.unsqueeze(0) for s in tensors(state)], want_state)
    lone = cell(x[0, 0])
    close([s.unsqueeze(0) for s in tensors(lone)], [s[:1] for s in tensors(cell(x[0]))])
    assert torch.autograd.gradcheck(lambda x: tensors(cell(x))[0], (x[0].requires_grad_(),))


# ---- initialisers ----


MODULES = {
    "LSTM": lambda: torch_ext.LSTM(I, 12, 2, bidirectional=True, num_heads=3),
    "LSTM-coupled": lambda: torch_ext.LSTM(I, 12, coupled=True),
    "GRU": lambda: torch_ext.GRU(I, 12, 2),
    "RNN": lambda: torch_ext.RNN(I, 12),
    "SLSTM": lambda: torch_ext.SLSTM(I, 12, 2, num_heads=2, bidirectional=True),
    "LSTMCell": lambda: torch_ext.LSTMCell(I, 12),
    "SLSTMCell": lambda: torch_ext.SLSTMCell(I, 12, num_heads=2),
    "nn.LSTM": lambda: nn.LSTM(I, 12, 2, proj_size=5),
    "nn.GRUCell": lambda: nn.GRUCell(I, 12),
}


def keeping(module):
    """Rows of the sum of the biases for each layer and direction: of the gate that keeps the state, and all."""
    kinds = {}
    for name, parameter in module.named_parameters():
        if name.startswith("bias"):
            kinds.setdefault(name[len("bias_ih") :], []).append(parameter.detach())
    name = type(module).__name__
    at = 0 if getattr(module, "coupled", False) else 1
    assert name.startswith(("LSTM", "GRU", "SLSTM"))
    return [(sum(p)[at * 12 : at * 12 + 12], sum(p)) for p in kinds.values()]


@pytest.mark.parametrize("name", MODULES)
def test_orthogonal_recurrent(name):
    module = MODULES[name]()
    assert torch_ext.init.orthogonal_recurrent_(module, 2.0) is module
    heads, found = getattr(module, "num_heads", 1), 0
    for key, weight in module.named_parameters():
        if key.startswith("weight_hh"):
            found += 1
            for part in weight.detach().split(12 // heads):
                assert part.shape[0] == 12 // heads
                small = part.T @ part if part.shape[0] >= part.shape[1] else part @ part.T
                torch.testing.assert_close(small, 4 * torch.eye(len(small)), **CLOSE)
    assert found == len([key for key, _ in module.named_parameters() if "weight_ih" in key])


@pytest.mark.parametrize("name", [name for name in MODULES if name != "RNN"])
def test_biases_of_the_gate_that_keeps(name):
    module = MODULES[name]()
    before = copy.deepcopy(module.state_dict())
    assert torch_ext.init.forget_bias_(module, 1.5) is module
    assert all(torch.equal(kept, torch.full((12,), 1.5)) for kept, _ in keeping(module))
    for key, value in module.state_dict().items():  # and nothing else changes
        same = (value == before[key]).float().mean()
        assert same == (1 if "weight" in key else 1 - 1 / (len(value) // 12)), key

    assert torch_ext.init.chrono_(module, 4, 50) is module
    for kept, everything in keeping(module):
        steps = 1 + kept.exp()
        assert steps.min() >= 4 and steps.max() <= 50 and steps.std() > 1
        if name in ("LSTM", "LSTMCell", "nn.LSTM"):
            torch.testing.assert_close(everything[:12], -kept)
    if "GRU" not in name:
        torch_ext.init.power_law_forget_bias_(module, 1, 4)
        heads = getattr(module, "num_heads", 1)
        directions = 2 if getattr(module, "bidirectional", False) else 1
        for at, (kept, _) in enumerate(keeping(module)):
            power = 0.3 + 1.3 * (1 + at // directions) / 3
            units = 12 // heads
            want = [5 - 12 * (k / (units - 1)) ** power for k in range(units)] * heads
            torch.testing.assert_close(kept, torch.tensor(want))


def test_first_biases_of_slstm():
    module = torch_ext.SLSTM(I, 12, 3, num_heads=2)
    for layer, (kept, everything) in enumerate(keeping(module)):
        want = [5 - 12 * (k / 5) ** (0.3 + 1.3 * layer / 2) for k in range(6)] * 2
        torch.testing.assert_close(kept, torch.tensor(want))
        assert not everything[:12].any() and not everything[24:].any()
    module = torch_ext.SLSTM(I, 12, gate_bias_init=2.0)
    assert torch.equal(keeping(module)[0][0], torch.full((12,), 2.0))
    for gate, share in (("sigmoid", torch.sigmoid), ("exp", torch.exp)):
        module = torch_ext.SLSTM(I, 12, forget_gate=gate, gate_bias_init=(5.0, 9.0))
        steps = 1 / (1 - share(keeping(module)[0][0]))
        assert steps.min() > 4.99 and steps.max() < 9.01
    power = torch_ext.SLSTM(I, 12, forget_gate="exp")
    torch.testing.assert_close(
        keeping(power)[0][0], F.logsigmoid(keeping(torch_ext.SLSTM(I, 12))[0][0])
    )


def test_uniform_ind_rnn():
    module = torch_ext.IndRNN(I, 500, 2, bidirectional=True, recurrent_max=0.5)
    assert module.weight_hh_l1.min() >= 0 and 0.45 < module.weight_hh_l0_reverse.max() <= 0.5
    torch_ext.init.uniform_ind_rnn_(module, -0.25, 1.0, last_low=0.9)
    for key in ("weight_hh_l0", "weight_hh_l0_reverse"):
        assert -0.25 <= getattr(module, key).min() < -0.2 and getattr(module, key).max() > 0.95
    for key in ("weight_hh_l1", "weight_hh_l1_reverse"):
        assert getattr(module, key).min() >= 0.9 and getattr(module, key).max() <= 1
    assert torch_ext.IndRNNCell(I, 500).weight_hh.max() > 0.95


def init_errors():
    init, lstm = torch_ext.init, torch_ext.LSTM(I, H)
    yield (
        lambda: init.orthogonal_recurrent_(nn.Linear(2, 2)),
        TypeError,
        "module is Linear, expected",
    )
    yield lambda: init.orthogonal_recurrent_(torch_ext.IndRNN(2, 2)), ValueError, "module is IndRNN"
    yield lambda: init.forget_bias_(torch_ext.RNN(2, 2)), ValueError, "module is RNN, expected"
    yield lambda: init.forget_bias_(torch_ext.LSTM(2, 2, bias=False)), ValueError, "bias=False"
    yield lambda: init.chrono_(lstm, 1, 5), ValueError, "shortest is 1 and longest 5, expected 1 <"
    yield lambda: init.power_law_forget_bias_(nn.GRU(2, 2)), ValueError, "module is GRU, expected"
    yield lambda: init.power_law_forget_bias_(lstm, 2, 2), ValueError, "block_index is 2 of num_bl"
    yield lambda: init.uniform_ind_rnn_(lstm), TypeError, "module is LSTM, expected IndRNN"
    yield lambda: init.uniform_ind_rnn_(torch_ext.IndRNN(2, 2), 2.0), ValueError, "low is 2.0, exp"


@pytest.mark.parametrize("call, error, text", list(init_errors()), ids=lambda v: str(v)[:30])
def test_bad_arguments_of_initialisers(call, error, text):
    with pytest.raises(error, match=text):
        call()


# ---- errors ----


def shared_errors(name):
    """Calls that torch.nn refuses too: the same class of error, and ours names the argument."""
    x, h = noise(T, B, I), noise(1, B, H)
    pair = (lambda *s: s) if name == "LSTM" else (lambda *s: s[0])
    yield lambda m: m(noise(2, T, B, I)), "input has shape"
    yield lambda m: m(noise(I)), "input has shape"
    yield lambda m: m(noise(T, B, I + 1)), "input has shape"
    yield lambda m: m(x.double()), "input has dtype"
    yield lambda m: m(x, pair(noise(1, B, H + 1), h)), "hx.* has shape"
    yield lambda m: m(x, pair(noise(2, B, H), h)), "hx.* has shape"
    yield lambda m: m(x, pair(noise(B, H), h)), "hx.* has shape"
    yield lambda m: m(x[:, 0], pair(h, h)), "hx.* has shape"
    yield lambda m: m(x, pair(h.double(), h.double())), "hx.* has dtype"
    if name != "LSTM":  # torch.nn's does not look
        yield lambda m: m(pack_sequence([noise(3, I + 1)])), "input.data has shape"
    yield lambda m: type(m)(0, 4), "input_size is 0"
    yield lambda m: type(m)(4, 0), "hidden_size is 0"
    yield lambda m: type(m)(4.0, 4), "input_size is 4.0"
    yield lambda m: type(m)(4, 4.0), "hidden_size is 4.0"
    yield lambda m: type(m)(4, 4, 0), "num_layers is 0"
    yield lambda m: type(m)(4, 4, dropout=1.5), "dropout is 1.5"
    yield lambda m: type(m)(4, 4, dropout=True), "dropout is True"
    yield lambda m: type(m)(4, 4, dropout="x"), "dropout is 'x'"
    yield lambda m: type(m)(4, 4, bias=1), "bias is 1"
    yield lambda m: type(m)(4, 4, batch_first=None), "batch_first is None"
    if name == "LSTM":
        yield lambda m: m(x, (h, noise(1, B, H - 1))), r"hx\[1\] has shape"
        yield lambda m: type(m)(4, 4, proj_size=4), "proj_size is 4"
        yield lambda m: type(m)(4, 4, proj_size=-1), "proj_size is -1"
    if name == "RNN":
        yield lambda m: type(m)(4, 4, nonlinearity="sine"), "nonlinearity is 'sine'"


@pytest.mark.parametrize("name", THEIRS)
def test_errors_are_of_torch_nns_class(name):
    for at, (call, text) in enumerate(shared_errors(name)):
        with pytest.raises(Exception) as theirs:
            call(THEIRS[name](I, H))
        with pytest.raises(theirs.type, match=text) as ours:
            call(getattr(torch_ext, name)(I, H))
        assert ours.type is theirs.type, (at, text, theirs.value)


def own_errors():
    x, marks = noise(B, T, I), torch.zeros(B, T, dtype=torch.bool)
    for name in OPTIONS:
        m = getattr(torch_ext, name)(I, H, 2, batch_first=True)
        many, one = m.init_state(B), len(tensors(m.init_state(B)))
        yield lambda m=m: m(x, torch.zeros(())), (TypeError, RuntimeError), "hx (is|has)"
        yield lambda m=m: m(x, [None] * 3), TypeError, "hx is .*NoneType.*, expected"
        yield lambda m=m, s=many: m(x, (*tensors(s), x)), TypeError, "hx is .*, expected a t"
        yield lambda m=m: m(x, None, torch.ones(B + 1)), ValueError, r"lengths has shape \(4\)"
        yield lambda m=m: m(x, None, torch.ones(B)), TypeError, "lengths has dtype"
        yield lambda m=m: m(x, None, torch.tensor([0, 1, T + 1])), ValueError, "values from 0 to 8"
        yield lambda m=m: m(x[0], None, torch.tensor([1])), ValueError, "lengths is given, expected"
        packed = pack_sequence([x[0]])
        yield lambda m=m, p=packed: m(p, None, torch.tensor([1])), ValueError, "lengths is given"
        wide = pack_sequence([noise(3, I + 1)])
        yield lambda m=m, p=wide: m(p), RuntimeError, r"input.data has shape \(3, 5\), expected"
        yield lambda m=m: m(x, None, None, marks.T), ValueError, r"reset has shape \(7, 3\), exp"
        yield (
            lambda m=m: m(x[0], None, None, marks),
            ValueError,
            r"reset has shape .*expected \(7\)",
        )
        yield lambda m=m: m(x, None, None, marks.int()), TypeError, "reset has dtype torch.int32"
        yield lambda m=m, s=many: m.step(x, s), ValueError, r"step: x has shape \(3, 7, 4\), exp"
        yield lambda m=m, k=one: m.step(x[:, 0], (None,) * k), TypeError, "state is .*, expected"
        cls = type(m)
        bad = cls(I, H, bidirectional=True)
        yield lambda m=bad, s=many: m.step(x[:, 0], s), RuntimeError, "bidirectional is True"
        bad = cls(I, H, recurrent_dropout=0.1)
        yield lambda m=bad, s=many: m.step(x[:, 0], s), RuntimeError, "training is True, expected"
        for key in ("zoneout", "recurrent_dropout", "input_dropout"):
            yield lambda c=cls, k=key: c(I, H, **{k: -0.1}), ValueError, f"{key} is -0.1, expected"
        yield lambda c=cls: c(I, H, recurrent_clip=-1.0), ValueError, "recurrent_clip is -1.0, exp"
        if name == "IndRNN":
            yield (
                lambda c=cls: c(I, H, recurrent_max=-1),
                ValueError,
                "recurrent_max is -1, expected",
            )
            continue
        yield lambda c=cls: c(I, H, weight_dropout=2), ValueError, "weight_dropout is 2, expected"
        yield (
            lambda c=cls: c(I, H, num_heads=4),
            ValueError,
            "hidden_size is 6, expected a multiple",
        )
        yield lambda c=cls: c(I, H, num_heads=0), ValueError, "num_heads is 0, expected at least 1"
        yield lambda c=cls: c(I, H, num_heads=2.0), TypeError, "num_heads is 2.0, expected an int"
        yield lambda c=cls: c(I, H, layer_norm="yes"), ValueError, "layer_norm is 'yes', expected"
    L, G, S = torch_ext.LSTM, torch_ext.GRU, torch_ext.SLSTM
    yield (
        lambda: L(I, H, proj_size=3, num_heads=2),
        ValueError,
        "proj_size is 3, expected a multiple",
    )
    yield lambda: L(I, H, zoneout_c=1.5), ValueError, "zoneout_c is 1.5, expected"
    yield (
        lambda: G(I, H, reset_after=False, layer_norm="haste"),
        ValueError,
        "layer_norm is 'haste'",
    )
    yield lambda: S(I, H, forget_gate="relu"), ValueError, "forget_gate is 'relu', expected"
    yield lambda: S(I, H, normalizer="no"), ValueError, "normalizer is 'no', expected"
    yield lambda: S(I, H, bias=False, gate_bias_init=1.0), ValueError, "gate_bias_init is 1.0, exp"
    for name in ("LSTMCell", "GRUCell", "RNNCell", "SLSTMCell", "IndRNNCell"):
        m = getattr(torch_ext, name)(I, H)
        yield lambda m=m: m(x), ValueError, r"Cell: input has shape \(3, 7, 4\), expected"
        yield lambda m=m: m(noise(B, I + 1)), RuntimeError, r"input has shape \(3, 5\), expected"
        states = [noise(B, H) for _ in range({"LSTMCell": 2, "SLSTMCell": 4}.get(name, 1))]
        wrong = [s[:, 1:] for s in states]
        pack = (lambda s: tuple(s)) if len(states) > 1 else (lambda s: s[0])
        wrong, states, double = pack(wrong), pack(states), pack([s.double() for s in states])
        yield (
            lambda m=m, s=wrong: m(x[:, 0], s),
            RuntimeError,
            r"hx.* has shape \(3, 5\), exp",
        )
        yield lambda m=m, s=states: m(x[0, 0], s), ValueError, r"hx.* has shape \(3, 6\), exp"
        yield lambda m=m, s=double: m(x[:, 0], s), RuntimeError, "hx.* has dtype torch.float64, exp"
        yield lambda m=m: m(x[:, 0], [None, None]), TypeError, "hx is .*, expected"
        yield lambda m=m: type(m)(0, 4), ValueError, "input_size is 0, expected at least 1"
        yield lambda m=m: type(m)(4, 4, bias=0), TypeError, "bias is 0, expected a bool"


def test_bad_arguments():
    for call, error, text in own_errors():
        with pytest.raises(error, match=text):
            call()


# ---- documentation ----


@pytest.mark.parametrize("name", ["init", "rnn", "rnn_layers", "rnn_cells"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"torch_ext.{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module, extraglobs={"torch": torch, "torch_ext": torch_ext})
    assert result.failed == 0 and result.attempted > 0
    for cls in (
        v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__
    ):
        if cls.__name__ in torch_ext.__all__ or cls.__name__.endswith("_"):
            assert "Example:" in cls.__doc__ and "Args:" in cls.__doc__, cls
