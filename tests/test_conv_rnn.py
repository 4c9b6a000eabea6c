"""ConvLSTM and ConvGRU against plain loops of convolutions, and against LSTM and GRU where the space is one place."""

import copy
import doctest
import importlib
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_ext

B, T, I, H = 2, 4, 3, 4
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SPACE = {1: (5,), 2: (4, 5), 3: (3, 4, 2)}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CASES = [
    ("ConvLSTM", 1, {"kernel_size": 5}),
    ("ConvLSTM", 2, {"kernel_size": (3, 5), "num_layers": 2, "bidirectional": True}),
    ("ConvLSTM", 2, {"kernel_size": 3, "num_layers": 2, "peephole": True}),
    ("ConvLSTM", 2, {"kernel_size": 3, "peephole": True, "spatial_size": SPACE[2]}),
    ("ConvLSTM", 3, {"kernel_size": 3, "bias": False, "peephole": True, "spatial_size": SPACE[3]}),
    ("ConvGRU", 1, {"kernel_size": 3, "bidirectional": True, "reset_after": True}),
    ("ConvGRU", 2, {"kernel_size": (3, 5), "num_layers": 2}),
    ("ConvGRU", 2, {"kernel_size": 1, "num_layers": 2, "bidirectional": True, "bias": False}),
    ("ConvGRU", 3, {"kernel_size": (1, 3, 1), "reset_after": True, "num_layers": 2}),
]
SOME = [CASES[1], CASES[3], CASES[5], CASES[6]]
STREAMS = [case for case in CASES if not case[2].get("bidirectional")]

script_warnings = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is :DeprecationWarning",
    r"ignore:`torch\.jit\.\w+` is :FutureWarning",
)


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)


def make(name, dim, options, dtype=torch.float64, **more):
    return getattr(torch_ext, name)(I, H, **options, **more, dim=dim, dtype=dtype)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def tensors(x):
    return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in tensors(part)]


def close(got, want, **bound):
    for one, other in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(one, other, **(bound or EXACT))


def state_of(module, rows, space, dtype=torch.float64):
    count = module.num_layers * module.num_directions
    state = [noise(count, rows, H, *space, dtype=dtype) for _ in range(module.num_states())]
    return tuple(state) if len(state) > 1 else state[0]


def loop(module, x, state):
    """The layers step by step, ``x`` (B, T, I, *space)."""
    finals, size = [], module.hidden_size

    def conv(x, weight, bias=None):
        # Zeros around written out, and not by the convolution.
        pad = [n // 2 for n in reversed(weight.shape[2:]) for _ in range(2)]
        return CONV[module.dim](F.pad(x, pad), weight, bias)

    for layer in range(module.num_layers):
        outputs = []
        for suffix in ["", "_reverse"][: 1 + module.bidirectional]:

            def get(kind, tail=f"_l{layer}{suffix}"):
                return getattr(module, kind + tail, None)

            s = [part[len(finals)] for part in tensors(state)]
            W, R, b = get("weight_ih"), get("weight_hh"), get("bias_ih")
            ys = [None] * x.shape[1]
            for t in reversed(range(x.shape[1])) if suffix else range(x.shape[1]):
                wx = conv(x[:, t], W, b)
                if isinstance(module, torch_ext.ConvLSTM):
                    h, c = s
                    i, f, g, o = torch.split(wx + conv(h, R), size, 1)
                    p = get("peephole") if module.peephole else [0.0] * 3
                    i, f = i + p[0] * c, f + p[1] * c
                    c = c / (1 + (-f).exp()) + torch.tanh(g) / (1 + (-i).exp())
                    o = o + p[2] * c
                    s = [torch.tanh(c) / (1 + (-o).exp()), c]
                else:
                    h = s[0]
                    xr, xz, xn = torch.split(wx, size, 1)
                    Rr, Rz, Rn = torch.split(R, size, 0)
                    bh = get("bias_hh")
                    br, bz, bn = [None] * 3 if bh is None else torch.split(bh, size)
                    r, z = torch.sigmoid(xr + conv(h, Rr, br)), torch.sigmoid(xz + conv(h, Rz, bz))
                    n = r * conv(h, Rn, bn) if module.reset_after else conv(r * h, Rn)
                    n = torch.tanh(xn + n)
                    s = [n - z * n + z * h]
                ys[t] = s[0]
            finals.append(s)
            outputs.append(torch.stack(ys, 1))
        x = torch.cat(outputs, 2)
    return [x, *[torch.stack(part) for part in zip(*finals, strict=True)]]


# ---- values ----


@pytest.mark.parametrize("name, dim, options", CASES, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_is_the_plain_loop(name, dim, options, batch_first, seed):
    """Values and the gradients of everything."""
    module, space = make(name, dim, options, batch_first=batch_first), SPACE[dim]
    x, start = noise(B, T, I, *space), state_of(module, B, space)
    got = []
    for ours in (True, False):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        states = [s.clone().requires_grad_() for s in tensors(start)]
        state = tuple(states) if len(states) > 1 else states[0]
        if ours:
            y, final = module(leaf if batch_first else leaf.transpose(0, 1), state)
            out = [y if batch_first else y.transpose(0, 1), *tensors(final)]
        else:
            out = loop(module, leaf, state)
        torch.manual_seed(seed)
        sum((noise(*y.shape) * y).sum() for y in out).backward()
        got.append([*out, leaf.grad, *[s.grad for s in states]])
        got[-1] += [p.grad for p in module.parameters()]
    assert all(g is not None and g.isfinite().all() for g in got[0])
    close(*got)
    close(module(x if batch_first else x.transpose(0, 1))[1], loop(module, x, zeros(start))[1:])


def zeros(state):
    return [torch.zeros_like(s) for s in tensors(state)]


@pytest.mark.parametrize("name, dim, options", SOME, ids=str)
def test_without_a_batch(name, dim, options):
    module, space = make(name, dim, options), SPACE[dim]
    x, state = noise(T, I, *space), state_of(module, 1, space)
    alone = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]
    y, final = module(x, alone)
    want, want_final = module(x.unsqueeze(1), state)
    close(y, want.squeeze(1))
    close(final, [s[:, 0] for s in tensors(want_final)])
    close(module(x)[0], module(x.unsqueeze(1))[0].squeeze(1))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_where_the_space_is_one_place_it_is_lstm_and_gru(dim):
    ones = (1,) * dim
    x = noise(T, B, I)
    for name, theirs in [("ConvLSTM", nn.LSTM(I, H, 2)), ("ConvGRU", nn.GRU(I, H, 2))]:
        theirs.double()
        options = {"kernel_size": 1, "num_layers": 2}
        options |= {"reset_after": True} if name == "ConvGRU" else {}
        module = make(name, dim, options)
        weights = {
            key: value.reshape(*value.shape, *ones) if "weight" in key else value
            for key, value in theirs.state_dict().items()
        }
        if name == "ConvLSTM":  # one bias in the place of two
            for key in [key for key in weights if "bias_hh" in key]:
                weights[key.replace("hh", "ih")] = (
                    weights.pop(key) + weights[key.replace("hh", "ih")]
                )
        module.load_state_dict(weights)
        y, final = module(x.reshape(T, B, I, *ones))
        want, want_final = theirs(x)
        close(y.flatten(2), want)
        close([s.flatten(2) for s in tensors(final)], want_final)


def test_peepholes_of_the_packages_lstm():
    ours = make("ConvLSTM", 1, {"kernel_size": 1, "peephole": True})
    theirs = torch_ext.LSTM(I, H, peephole=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.bias_hh_l0.zero_()
        for key, value in ours.state_dict().items():
            getattr(theirs, key).copy_(value.reshape(getattr(theirs, key).shape))
    x = noise(T, B, I)
    y, final = ours(x.unsqueeze(-1))
    want, want_final = theirs(x)
    close(y.squeeze(-1), want)
    close([s.squeeze(-1) for s in final], want_final)


@pytest.mark.parametrize(
    "name, options",
    [("ConvLSTM", {"peephole": True}), ("ConvGRU", {}), ("ConvGRU", {"reset_after": True})],
    ids=str,
)
def test_gradcheck(name, options):
    """First and second gradients, of the parameters and the states too."""
    module = getattr(torch_ext, name)(1, 2, 3, dim=1, dtype=torch.float64, **options)
    names = list(module.state_dict())

    def run(x, *given):
        states, weights = given[: module.num_states()], given[module.num_states() :]
        state = tuple(states) if len(states) > 1 else states[0]
        weights = dict(zip(names, weights, strict=True))
        return tuple(tensors(torch.func.functional_call(module, weights, (x, state))))

    inputs = [noise(2, 1, 1, 3), *[noise(1, 1, 2, 3) for _ in range(module.num_states())]]
    inputs += [p.detach().clone() for p in module.parameters()]
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name, dim, options", STREAMS, ids=str)
def test_steps_are_chunks_are_the_sequence(name, dim, options):
    """With their gradients, which flow through the states that are handed over."""
    module, space = make(name, dim, options, batch_first=True), SPACE[dim]
    x, start, weight = noise(B, T, I, *space), state_of(module, B, space), noise(B, T, H, *space)

    def run(pieces):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        firsts = [s.clone().requires_grad_() for s in tensors(start)]
        state, ys, at = tuple(firsts) if len(firsts) > 1 else firsts[0], [], 0
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
    for pieces in (["step"] * T, [1, "step", 0, 2]):
        close(run(pieces), want)


def test_any_size_of_the_space_and_no_step_at_all():
    for name in ("ConvLSTM", "ConvGRU"):
        module = make(name, 2, {"kernel_size": 3, "bidirectional": True})
        for space in ((1, 1), (7, 2)):
            x = noise(T, B, I, *space)
            close(module(x, module.init_state(B, space)), module(x))
        for shape in ((0, B), (T, 0)):
            state = state_of(module, shape[1], (4, 5))
            leaves = [s.requires_grad_() for s in tensors(state)]
            y, final = module(noise(*shape, I, 4, 5), state)
            assert y.shape == (*shape, 2 * H, 4, 5)
            close(final, state)
            sum(s.sum() for s in tensors((y, final))).backward()
            assert all(torch.equal(leaf.grad, torch.ones_like(leaf)) for leaf in leaves)


def test_strided_input_and_channels_last():
    module = make("ConvLSTM", 2, {"kernel_size": 3, "num_layers": 2})
    x = noise(T, B, 4, 5, I).permute(0, 1, 4, 2, 3)
    close(module(x), module(x.contiguous()))
    want = module(x)
    close(module.to(memory_format=torch.channels_last)(x), want)


@pytest.mark.parametrize("name", ["ConvLSTM", "ConvGRU"])
def test_dropout_is_between_layers_in_training(name):
    module = make(name, 1, {"kernel_size": 3, "num_layers": 2, "dropout": 1.0})
    x = noise(T, B, I, 5)
    assert torch.equal(module(x)[0], module(torch.zeros_like(x))[0])  # nothing comes through
    module.eval()
    assert not torch.equal(module(x)[0], module(torch.zeros_like(x))[0])
    with pytest.warns(UserWarning, match="dropout is 0.5 with num_layers=1") as record:
        getattr(torch_ext, name)(I, H, 3, dropout=0.5)
    assert record[0].filename == __file__


@pytest.mark.parametrize("name, dim, options", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dim, options, dtype):
    module, space = make(name, dim, options, torch.float32), SPACE[dim]
    x = noise(T, B, I, *space, dtype=torch.float32)
    want, final = module(x)
    bound = {"atol": 16 * torch.finfo(torch.bfloat16).eps, "rtol": 0.1}
    with torch.autocast("cpu", dtype):
        y, state = module(x)
    assert y.dtype == dtype and all(s.dtype == torch.float32 for s in tensors(state))
    close(y.float(), want, **bound)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    half = copy.deepcopy(module).to(dtype)
    y, state = half(x.to(dtype), half.init_state(B, space))
    assert y.dtype == dtype and all(s.dtype == torch.float32 for s in tensors(state))
    close(y.float(), want, **bound)
    close(state, final, **bound)
    close(half(x.to(dtype), half.init_state(B, space)), (y, state), atol=0, rtol=0)


def test_initialisers():
    module = make("ConvLSTM", 2, {"kernel_size": (3, 5), "num_layers": 2, "peephole": True})
    bound = (H * 15) ** -0.5
    assert all(0.5 * bound < p.abs().max() <= bound for p in module.parameters())
    torch_ext.init.forget_bias_(module, 1.5)
    assert (module.bias_ih_l1.reshape(4, H)[1] == 1.5).all()
    module = make("ConvGRU", 2, {"kernel_size": 3, "reset_after": True})
    torch_ext.init.chrono_(module, 5.0, 5.0)
    steps = 1 + (module.bias_ih_l0 + module.bias_hh_l0).exp().reshape(3, H)[1]
    torch.testing.assert_close(steps, torch.full_like(steps, 5.0))


def test_it_learns_what_moves(threads):
    """A dot that moves by one place a step: where it will be next is not in one image alone."""
    threads(1)
    module = torch_ext.ConvLSTM(1, 6, 3, batch_first=True, dim=1)
    readout = nn.Conv1d(6, 1, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *readout.parameters()], lr=0.03)
    at = torch.randint(0, 12, (32, 1)) + torch.tensor([-1, 1]).repeat(16)[:, None] * torch.arange(6)
    images = F.one_hot(at % 12, 12).float().unsqueeze(2)
    losses = []
    for _ in range(100):
        y = readout(module(images[:, :-1])[0].flatten(0, 1)).squeeze(1)
        losses.append(
            F.cross_entropy(y.reshape(32, 5, 12)[:, 1:].flatten(0, 1), at[:, 2:].flatten() % 12)
        )
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    # At the border a dot leaves on one side and comes in on the other, which no kernel of 3 sees.
    assert losses[-1] < 0.6 < 2.0 < losses[0]


# ---- copies, scripts, graphs ----


@pytest.mark.parametrize("name, dim, options", SOME, ids=str)
def test_copies(name, dim, options):
    module = make(name, dim, options)
    x = noise(T, B, I, *SPACE[dim])
    want, _ = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], want)
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert not torch.equal(other(x)[0], want) and torch.equal(module(x)[0], want)
    other = make(name, dim, options)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], want)


def test_repr_says_what_differs_from_the_defaults():
    module = torch_ext.ConvLSTM(
        2, 3, (1, 3), 2, batch_first=True, peephole=True, spatial_size=(4, 5)
    )
    assert repr(module) == (
        "ConvLSTM(2, 3, (1, 3), num_layers=2, batch_first=True, peephole=True, spatial_size=(4, 5))"
    )
    assert repr(torch_ext.ConvGRU(2, 3, 5)) == "ConvGRU(2, 3, 5)"
    module = torch_ext.ConvGRU(2, 3, 5, dim=1, reset_after=True)
    assert repr(module) == "ConvGRU(2, 3, 5, dim=1, reset_after=True)"


@script_warnings
@pytest.mark.parametrize("name, dim, options", CASES, ids=str)
def test_script(name, dim, options):
    module, space = make(name, dim, options), SPACE[dim]
    scripted, file = torch.jit.script(module), io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x, state = noise(T, B, I, *space), state_of(module, B, space)
    for other in (scripted, loaded, torch.jit.script(copy.deepcopy(module))):
        for arguments in [(x,), (x, state), (x[:2],), (x[:, 0],)]:
            close(other(*arguments), module(*arguments), atol=0, rtol=0)
        close(other.init_state(3, list(space)), module.init_state(3, space))
        if not module.bidirectional:
            close(other.step(x[0], state), module.step(x[0], state), atol=0, rtol=0)
        with pytest.raises(Exception, match=r"x has shape .*, expected \(T, B, input_size=3, "):
            other(x[:, :, 1:])
    module(x)[0].square().sum().backward()
    loaded(x)[0].square().sum().backward()
    for want, got in zip(module.parameters(), loaded.parameters(), strict=True):
        close(got.grad, want.grad)


@pytest.mark.parametrize("name, dim, options", SOME, ids=str)
def test_export_with_dynamic_sizes(name, dim, options):
    """B and the space; the steps are one by one in the graph."""
    module, space = make(name, dim, options), SPACE[dim]
    batch = torch.export.Dim("batch")
    sizes = {} if "spatial_size" in options else {k: torch.export.Dim(f"s{k}") for k in range(dim)}
    state = state_of(module, B, space)
    shapes = [{1: batch, **{3 + k: size for k, size in sizes.items()}} for _ in tensors(state)]
    dynamic = (shapes[0], tuple(shapes) if len(shapes) > 1 else shapes[0])
    arguments = (noise(T, B, I, *space), state)
    program = torch.export.export(module, arguments, dynamic_shapes=dynamic).module()
    for rows, more in ((B, 0), (5, 2)):
        space = tuple(size + more * bool(sizes) for size in SPACE[dim])
        x, state = noise(T, rows, I, *space), state_of(module, rows, space)
        close(program(x, state), module(x, state))


@pytest.mark.slow
@pytest.mark.parametrize("name, dim, options", [CASES[3], CASES[6]], ids=str)
def test_compiles_without_breaks(name, dim, options):
    torch._dynamo.reset()
    module = make(name, dim, options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x, state = noise(T, B, I, *SPACE[dim]), state_of(module, B, SPACE[dim])
    close(compiled(x, state), module(x, state))
    got = []
    for run in (compiled, module):
        module.zero_grad()
        run(x, state)[0].square().sum().backward()
        got.append([p.grad for p in module.parameters()])
    close(*got)


@pytest.mark.parametrize("name, dim, options", SOME, ids=str)
def test_ensemble_by_vmap(name, dim, options):
    modules = [make(name, dim, options) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = noise(T, B, I, *SPACE[dim])

    def one(parameters, buffers):
        return torch.func.functional_call(modules[0], (parameters, buffers), (x,))[0]

    for got, module in zip(torch.vmap(one)(parameters, buffers), modules, strict=True):
        close(got, module(x)[0])


# ---- errors ----


def errors():
    for name in ("ConvLSTM", "ConvGRU"):
        cls = getattr(torch_ext, name)
        m = cls(I, H, 3, batch_first=True)
        x = noise(B, T, I, 4, 5, dtype=torch.float32)
        state = m.init_state(B, [4, 5])
        short = tuple(s[..., 1:] for s in state) if name == "ConvLSTM" else state[..., 1:]
        whole = tuple(s.long() for s in state) if name == "ConvLSTM" else state.long()
        shape = r"x has shape \(.*\), expected \(B, T, input_size=3, S1, S2\)"
        yield lambda m=m, x=x: m(x[:, :, 1:]), ValueError, shape
        yield lambda m=m, x=x: m(x.unsqueeze(0)), ValueError, "x has shape .*, expected"
        yield (
            lambda m=m, x=x: m(x[0, 0]),
            ValueError,
            r"x has shape \(3, 4, 5\), expected \(B, T, inp",
        )
        yield lambda m=m, x=x: m(x[0, :, 1:]), ValueError, r"expected \(T, input_size=3, S1, S2\)"
        yield (
            lambda m=m, x=x: m(x.double()),
            TypeError,
            "x has dtype torch.float64, expected torch.f",
        )
        yield lambda m=m: m([1.0]), TypeError, "x is list, expected a tensor"
        yield (
            lambda m=m, x=x, s=short: m(x, s),
            ValueError,
            r"state has shape \(1, 2, 4, 4, 4\), exp",
        )
        yield lambda m=m, x=x, s=whole: m(x, s), TypeError, "state has dtype torch.int64, expected"
        yield (
            lambda m=m, x=x: m(x, [1, 2, 3]),
            TypeError,
            r"state is \(int, int, int\), expected a t",
        )
        yield (
            lambda m=m, x=x, s=state: m(x[0], s),
            ValueError,
            r"state has .* \(.*=1, hidden_size=4, 4, 5",
        )
        yield (
            lambda m=m, x=x, s=state: m.step(x, s),
            ValueError,
            r"step: x has shape .*, expected \(B, input_size=3, S1, S2\)",
        )
        yield lambda m=m, x=x: m.step(x[:, 0], None), TypeError, "step: state is NoneType, expected"
        yield (
            lambda m=m: m.init_state(B, [4]),
            ValueError,
            "spatial_size has 1 numbers, expected dim=2",
        )
        both = cls(I, H, 3, bidirectional=True)
        yield lambda m=both, x=x, s=state: m.step(x[:, 0], s), RuntimeError, "bidirectional is True"
        yield lambda c=cls: c(I, H, 4), ValueError, "kernel_size is 4, expected odd"
        yield (
            lambda c=cls: c(I, H, (3, 3, 3)),
            ValueError,
            r"kernel_size is \(3, 3, 3\), exp.* dim=2",
        )
        yield lambda c=cls: c(I, H, -1), ValueError, "kernel_size is -1, expected an integer"
        yield lambda c=cls: c(I, H, 3.0), TypeError, "kernel_size is 3.0, expected an integer"
        yield lambda c=cls: c(I, H, 3, dim=4), ValueError, "dim is 4, expected 1, 2 or 3"
        yield lambda c=cls: c(I, H, 3, dim="2"), TypeError, "dim is '2', expected 1, 2 or 3"
        yield lambda c=cls: c(0, H, 3), ValueError, "input_size is 0, expected at least 1"
        yield lambda c=cls: c(I, 4.0, 3), TypeError, "hidden_size is 4.0, expected an integer"
        yield lambda c=cls: c(I, H, 3, bias=1), TypeError, "bias is 1, expected"
        yield lambda c=cls: c(I, H, 3, dropout=2.0), ValueError, "dropout is 2.0, expected"
    L = torch_ext.ConvLSTM
    yield lambda: L(I, H, 3, peephole=2), TypeError, "peephole is 2, expected"
    yield (
        lambda: L(I, H, 3, spatial_size=4),
        ValueError,
        "spatial_size is 4, expected None with peep",
    )
    yield (
        lambda: L(I, H, 3, peephole=True, spatial_size=(4,)),
        ValueError,
        r"spatial_size is \(4,\), e",
    )
    fixed = L(I, H, 3, peephole=True, spatial_size=(4, 5))
    bad = noise(T, B, I, 5, 4, dtype=torch.float32)
    yield lambda: fixed(bad), ValueError, r"x has shape .*, expected \(.*, spatial_size=4, 5\)"
    yield lambda: torch_ext.ConvGRU(I, H, 3, reset_after=0), TypeError, "reset_after is 0, expected"


def test_bad_arguments():
    for call, error, text in errors():
        with pytest.raises(error, match=text):
            call()


def test_examples_in_docstrings():
    module = importlib.import_module("torch_ext.conv_rnn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module, extraglobs={"torch": torch, "torch_ext": torch_ext})
    assert result.failed == 0 and result.attempted > 0
    for cls in (torch_ext.ConvLSTM, torch_ext.ConvGRU):
        assert cls.__name__ in torch_ext.__all__
        assert all(part in cls.__doc__ for part in ("Args:", "Attributes:", "Raises:", "Example:"))
