"""MLSTM: against a plain loop, and torch.nn.LSTM's contract with three states."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torch_ext

B, T, I, H, HEADS, QK = 3, 7, 4, 6, 2, 8
OPTIONS = {
    "exp": {"num_heads": HEADS, "qk_size": QK},
    "sigmoid": {"num_heads": HEADS, "input_gate": "sigmoid"},
    "unnormalized": {"input_gate": "sigmoid", "normalize": False},
}

# Both are right; they differ by the order of additions and by a few roundings.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64

script_warnings = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is :DeprecationWarning",
    r"ignore:`torch\.jit\.\w+` is :FutureWarning",
)


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)


def make(name, *args, **options):
    """With gates that depend on the input, which at first they do not."""
    module = torch_ext.MLSTM(*args, **OPTIONS[name], **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def noise(*shape, **options):
    return torch.randn(*shape, **options)


def random_state(module, *batch, dtype=None):
    """Some state that a sequence could have left behind."""
    C, n, m = module.init_state(1)
    return tuple(
        noise(len(C), *batch, *part.shape[2:], dtype=dtype or part.dtype) for part in (C, n, m)
    )


def pick(state, b):
    return None if state is None else tuple(part[:, b] for part in state)


def plain(module, x, state):
    """The module on one sequence ``x`` (T, I), from its parameters by their names."""
    heads, keys, values = module.num_heads, module.qk_size, module.hidden_size
    finals = []
    for layer in range(module.num_layers):
        outputs = []
        for suffix in ["", "_reverse"][: module.num_directions]:
            weight = getattr(module, f"weight_ih_l{layer}{suffix}").double()
            rows = x.double() @ weight.T
            if module.bias:
                rows = rows + getattr(module, f"bias_ih_l{layer}{suffix}").double()
            at, parts = 0, []
            for size in (keys, keys, values, heads, heads, values):
                parts.append(rows[:, at : at + size])
                at += size
            assert at == weight.shape[0]
            q, k, v, i, f, o = parts
            q, k, v = (part.reshape(len(x), heads, -1) for part in (q, k, v))
            C, n, m = (part[len(finals)].double() for part in state)
            y = torch.zeros(len(x), values, dtype=torch.float64)
            for t in reversed(range(len(x))) if suffix else range(len(x)):
                log_f = nn.functional.logsigmoid(f[t])
                if module.input_gate == "exp":
                    before, m = m, torch.maximum(log_f + m, i[t])
                    keep, take = (log_f + before - m).exp(), (i[t] - m).exp()
                    least = (-m).exp()
                else:
                    keep, take, least = f[t].sigmoid(), i[t].sigmoid(), torch.ones_like(m)
                C = keep[:, None, None] * C + take[:, None, None] * torch.einsum(
                    "hk,hv->hkv", k[t], v[t]
                )
                query = q[t] * (keys // heads) ** -0.5
                h = torch.einsum("hkv,hk->hv", C, query)
                if module.normalize:
                    n = keep[:, None] * n + take[:, None] * k[t]
                    r = (n * query).sum(-1).abs()
                    h = h / (torch.maximum(r, least) + module.eps)[:, None]
                y[t] = h.flatten() * o[t].sigmoid()
            outputs.append(y)
            finals.append((C, n, m))
        x = torch.cat(outputs, 1)
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def assert_states(got, want, **close):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **close)


# ---- values and shapes ----


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "num_layers, bias, batch_first, bidirectional",
    [
        (1, True, True, False),
        (2, False, False, True),
        (2, True, False, False),
        (1, False, True, True),
    ],
)
@torch.no_grad()
def test_is_the_plain_loop_in_the_form_of_lstm(name, num_layers, bias, batch_first, bidirectional):
    arguments = (I, H, num_layers, bias, batch_first, 0.0, bidirectional)
    module, lstm = make(name, *arguments).double(), nn.LSTM(*arguments).double()
    x = noise(B, T, I, dtype=torch.float64)
    given = x if batch_first else x.transpose(0, 1)
    state = random_state(module, B)

    for initial in (None, state):
        y, final = module(given, initial)
        assert y.shape == lstm(given)[0].shape
        assert [part.shape for part in final] == [part.shape for part in state]
        y = y if batch_first else y.transpose(0, 1)
        for b in range(B):
            start = pick(module.init_state(B) if initial is None else initial, b)
            want_y, want_final = plain(module, x[b], start)
            torch.testing.assert_close(y[b], want_y, **EXACT)
            assert_states(pick(final, b), want_final, **EXACT)

    y, final = module(x[0], pick(state, 0))  # without a batch
    want_y, want_final = plain(module, x[0], pick(state, 0))
    torch.testing.assert_close(y, want_y, **EXACT)
    assert_states(final, want_final, **EXACT)


def test_parameters_and_their_first_values():
    module = torch_ext.MLSTM(I, H, 2, bidirectional=True, num_heads=HEADS, qk_size=QK)
    rows = 2 * QK + 2 * H + 2 * HEADS
    lstm = nn.LSTM(I, H, 2, bidirectional=True)
    assert list(module.state_dict()) == [key for key in lstm.state_dict() if "_hh_" not in key]
    for key, value in module.state_dict().items():
        width = I if "_l0" in key else 2 * H
        assert value.shape == ((rows,) if "bias" in key else (rows, width))
        assert value[: 2 * QK].std() > 0.3 * H**-0.5 and value[: 2 * QK].abs().max() <= H**-0.5
        gates = value[2 * QK + H : 2 * QK + H + 2 * HEADS]
        if "bias" in key:
            assert gates.tolist() == [0.0, 0.0, 3.0, 6.0]
        else:
            assert not gates.any()

    options = {"num_heads": HEADS, "gate_bias_init": -2.0, "input_gate_bias_init": -10.0}
    module = torch_ext.MLSTM(I, H, **options)
    assert module.bias_ih_l0[3 * H : 3 * H + 4].tolist() == [-10.0, -10.0, -2.0, -2.0]
    module = torch_ext.MLSTM(I, 500, num_heads=500, gate_bias_init=(10.0, 110.0))
    steps = 1 / (1 - module.bias_ih_l0[2000:2500].sigmoid())
    # uniform: mean 60, deviation 100 / sqrt(12) = 28.9; of 500 draws the mean is within 1.3
    assert steps.min() >= 9.9 and steps.max() <= 110.5
    assert abs(steps.mean() - 60) < 6 and abs(steps.std() - 28.9) < 3
    before = module.bias_ih_l0.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.bias_ih_l0)
    assert torch_ext.MLSTM(I, H, bias=False).state_dict().keys() == {"weight_ih_l0"}


def test_repr_says_what_differs_from_the_defaults():
    assert repr(torch_ext.MLSTM(3, 4)) == "MLSTM(3, 4)"
    module = torch_ext.MLSTM(3, 4, 2, num_heads=2, qk_size=6, input_gate="sigmoid", normalize=False)
    assert repr(module) == (
        "MLSTM(3, 4, num_layers=2, normalize=False, num_heads=2, qk_size=6, input_gate='sigmoid')"
    )


@pytest.mark.parametrize("shape", [(0, T, I), (B, 0, I), (0, 0, I)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_empty(shape, bidirectional):
    module = make("exp", I, H, 2, batch_first=True, bidirectional=bidirectional)
    state = tuple(part.requires_grad_() for part in random_state(module, shape[0]))
    for lengths in (None, torch.zeros(shape[0], dtype=torch.int64)):
        y, final = module(noise(*shape), state, lengths)
        assert y.shape == (*shape[:2], H * (1 + bidirectional))
        for got, want in zip(final, state, strict=True):
            assert torch.equal(got, want)
        (sum(part.sum() for part in final) + y.sum()).backward()
    for part in state:
        assert torch.equal(part.grad, torch.full_like(part, 2.0))


# ---- padding and packing ----


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "bidirectional, batch_first, with_state", [(True, True, True), (False, False, False)]
)
def test_packed_is_padded_is_separate(name, bidirectional, batch_first, with_state):
    """Outputs, final states and all gradients, with NaN where nobody may look."""
    lengths = torch.tensor([4, T, 1, 5])
    module = make(name, I, H, 2, True, batch_first, 0.0, bidirectional, dtype=torch.float64)
    x = noise(len(lengths), T, I, dtype=torch.float64)
    start = random_state(module, len(lengths))
    past = torch.arange(T) >= lengths[:, None]
    x[past] = torch.nan
    weight_y = noise(len(lengths), T, H * (1 + bidirectional), dtype=torch.float64)
    weight_final = [noise(*part.shape, dtype=torch.float64) for part in start]

    def run(how):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        state = tuple(part.clone().requires_grad_() for part in start) if with_state else None
        if how == "separate":
            ys, finals = [], []
            for b, length in enumerate(lengths.tolist()):
                y, final = module(leaf[b, :length], pick(state, b))
                ys.append(nn.functional.pad(y, (0, 0, 0, T - length)))
                finals.append(final)
            y = torch.stack(ys)
            final = tuple(torch.stack(parts, 1) for parts in zip(*finals, strict=True))
        else:
            inputs = leaf if batch_first else leaf.transpose(0, 1)
            if how == "padded":
                y, final = module(inputs, state, lengths)
            else:
                packed = pack_padded_sequence(
                    inputs, lengths, batch_first=batch_first, enforce_sorted=False
                )
                y, final = module(packed, state)
                assert isinstance(y, PackedSequence)
                y, back = pad_packed_sequence(y, batch_first=batch_first, total_length=T)
                assert torch.equal(back, lengths)
            y = y if batch_first else y.transpose(0, 1)
        assert torch.equal(y[past], torch.zeros_like(y[past]))
        loss = (y * weight_y).sum()
        for part, weight in zip(final, weight_final, strict=True):
            loss = loss + (part * weight).sum()
        loss.backward()
        assert torch.equal(leaf.grad[past], torch.zeros_like(leaf.grad[past]))
        gradients = [leaf.grad, *(parameter.grad for parameter in module.parameters())]
        # Not all of them have one: a layer without a normaliser never looks at n.
        states = [
            torch.zeros_like(part) if part.grad is None else part.grad for part in state or ()
        ]
        return [y, *final, *gradients, *states]

    want = run("separate")
    for how in ("padded", "packed"):
        for got, expected in zip(run(how), want, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, **EXACT)


def test_lengths_of_zero_and_of_any_integer_dtype():
    module = make("exp", I, H, 2, batch_first=True, bidirectional=True)
    x, state = noise(B, T, I), random_state(module, B)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        y, final = module(x, state, torch.tensor([0, T, 3], dtype=dtype))
        for got, want in zip(pick(final, 0), pick(state, 0), strict=True):
            assert torch.equal(got, want)
        assert not y[0].any()
        torch.testing.assert_close(y[1], module(x[1], pick(state, 1))[0], **CLOSE)


# ---- states ----


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("num_layers, bias", [(1, True), (3, False)])
def test_steps_are_chunks_are_the_sequence(name, num_layers, bias):
    """With their gradients, which flow through the states that are handed over."""
    module = make(name, I, H, num_layers, bias, batch_first=True, dtype=torch.float64)
    x, weight = noise(B, T, I, dtype=torch.float64), noise(B, T, H, dtype=torch.float64)
    start = random_state(module, B)

    def run(pieces):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        state = first = tuple(part.clone().requires_grad_() for part in start)
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
        ((y * weight).sum() + sum(part.square().sum() for part in state)).backward()
        return [
            y,
            *state,
            leaf.grad,
            *(s.grad for s in first),
            *(p.grad for p in module.parameters()),
        ]

    want = run([T])
    for pieces in ([3, 4], ["step"] * T, [2, "step", 0, 4]):
        for got, expected in zip(run(pieces), want, strict=True):
            torch.testing.assert_close(got, expected, **EXACT)


def test_init_state():
    module = make("exp", I, H, 2, bidirectional=True)
    state = module.init_state(5)
    keys, values = QK // HEADS, H // HEADS
    shapes = [(4, 5, HEADS, keys, values), (4, 5, HEADS, keys), (4, 5, HEADS)]
    assert [tuple(part.shape) for part in state] == shapes
    assert all(part.dtype == torch.float32 and not part.any() for part in state)
    assert {part.dtype for part in module.double().init_state(5)} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32(dtype):
    x = noise(B, T, I)
    module = make("exp", I, H, 2, batch_first=True)
    want, want_state = module(x)
    # Two layers round what they hand on, their gates' pre-activations with it.
    bound = {"atol": 32 * torch.finfo(dtype).eps, "rtol": 32 * torch.finfo(dtype).eps}

    with torch.autocast("cpu", dtype):
        y, state = module(x)
        _, state2 = module(x, state, torch.tensor([T, 2, 0]))
        _, state_t = module.step(x[:, 0], module.init_state(B))
    assert y.dtype == dtype
    for part in (*state, *state2, *state_t):
        assert part.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, **bound)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())

    half = copy.deepcopy(module).to(dtype)
    y, state = half(x.to(dtype))
    _, state_t = half.step(x[:, 0].to(dtype), half.init_state(B))
    assert y.dtype == dtype and {part.dtype for part in (*state, *state_t)} == {torch.float32}
    torch.testing.assert_close(y.float(), want, **bound)
    # Padding leaves a state as it is, in half precision as well.
    _, state2 = half(x.to(dtype), state, torch.tensor([T, 2, 0]))
    for got, kept in zip(pick(state2, 2), pick(state, 2), strict=True):
        assert torch.equal(got, kept)


def test_double_modules_have_double_states():
    module = make("exp", I, H, 2, batch_first=True, dtype=torch.float64)
    x = noise(B, T, I, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for y, state in (module(x), module.step(x[:, 0], module.init_state(B))):
            assert {y.dtype, *(part.dtype for part in state)} == {torch.float64}


# ---- gradients ----


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    heads = {**OPTIONS[name], "num_heads": 1, "qk_size": 2}
    module = torch_ext.MLSTM(
        2, 2, batch_first=True, bidirectional=True, **heads, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    names = [n for n, _ in module.named_parameters()]

    def run(x, C, n, m, *weights):
        arguments = (x, (C, n, m), torch.tensor([2, 3]))
        y, (C, n, m) = torch.func.functional_call(
            module, dict(zip(names, weights, strict=True)), arguments
        )
        return (y, C, n, m) if name == "exp" else (y, C)

    inputs = (noise(2, 3, 2, dtype=torch.float64), *random_state(module, 2))
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(run, (*inputs, *module.parameters()))


def test_ensemble_by_vmap():
    """torch.func: several modules in one call, and their gradients."""
    modules = [make("exp", I, H, 2, batch_first=True, bidirectional=True) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x, lengths = noise(B, T, I), torch.tensor([T, 3, 0])

    def loss(weights, x):
        y, state = torch.func.functional_call(modules[0], weights, (x, None, lengths))
        return y.square().sum() + state[0].sum()

    got = torch.func.vmap(torch.func.grad(loss), (0, None))(parameters, x)
    for k, module in enumerate(modules):
        want = torch.func.grad(loss)(dict(module.named_parameters()), x)
        for key, gradient in want.items():
            torch.testing.assert_close(got[key][k], gradient.detach(), atol=1e-4, rtol=1e-4)


def test_dropout_is_between_layers_in_training():
    x = noise(B, T, I)
    module = make("exp", I, H, 3, batch_first=True, dropout=0.5)
    sure = make("exp", I, H, 3, batch_first=True)
    sure.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x)[0], sure(x)[0])
    y, state = module.train()(x)
    want_state = sure(x)[1]
    assert torch.equal(state[0][0], want_state[0][0])  # the first layer reads x
    assert not torch.allclose(state[0][1], want_state[0][1])
    assert y.count_nonzero() == y.numel()  # the last layer's output is whole


# ---- TorchScript, torch.export, torch.compile ----


def reload(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def flat(output):
    return [output[0], *output[1]]


@script_warnings
@pytest.mark.parametrize(
    "name, options",
    list(
        itertools.chain(
            [("exp", {}), ("sigmoid", {"num_layers": 2, "bidirectional": True})],
            [("unnormalized", {"num_layers": 3, "bias": False})],
        )
    ),
    ids=str,
)
def test_script(name, options):
    module = make(name, I, H, batch_first=True, **options)
    scripted = torch.jit.script(module)
    loaded = reload(scripted)
    x, lengths = noise(B, T, I), torch.tensor([2, T, 0])
    state = random_state(module, B)
    for other in (scripted, loaded):
        for arguments in [(x,), (x, state), (x, None, lengths), (x[0],), (x[0], pick(state, 0))]:
            for got, want in zip(flat(other(*arguments)), flat(module(*arguments)), strict=True):
                assert torch.equal(got, want)
        for got, want in zip(other.init_state(2), module.init_state(2), strict=True):
            assert torch.equal(got, want)
        if not module.bidirectional:
            got, want = other.step(x[:, 0], state), module.step(x[:, 0], state)
            for a, b in zip(flat(got), flat(want), strict=True):
                assert torch.equal(a, b)
        with pytest.raises(Exception, match=r"x has shape \(3, 7, 5\), expected .*input_size=4"):
            other(noise(B, T, I + 1))
        with pytest.raises(Exception, match=r"state has shape .*, expected \(num_layers \* num_d"):
            other(x, pick(state, 0))

    # The loaded module's parameters are those that it computes with: it trains and converts.
    for model in (module.double(), loaded.double()):
        y, state = model(x.double())
        assert state[2].dtype == torch.float64
        y.square().sum().backward()
    for want, got in zip(module.parameters(), loaded.parameters(), strict=True):
        # TorchScript has formulas of its own for what is around the operator.
        torch.testing.assert_close(got.grad, want.grad, atol=1e-8, rtol=1e-8)


def test_export_with_dynamic_sizes():
    module = make("exp", I, H, 2, batch_first=True, bidirectional=True).eval()
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    arguments = (noise(B, T, I), random_state(module, B), torch.tensor([T, 1, 3]))
    program = torch.export.export(
        module,
        arguments,
        dynamic_shapes=({0: batch, 1: steps}, ({1: batch},) * 3, {0: batch}),
    )
    for b, t in [(B, T), (5, 2), (2, 33)]:
        arguments = noise(b, t, I), random_state(module, b), torch.arange(b).clamp(max=t)
        got, want = program.module()(*arguments), module(*arguments)
        for a, c in zip(flat(got), flat(want), strict=True):
            assert torch.equal(a, c)


def test_compiles_for_all_sizes_in_the_first_call():
    torch._dynamo.reset()
    module = make("exp", I, H, 2, batch_first=True, bidirectional=True)
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    counts = []
    for b, t in [(5, T), (6, 11), (2, 5)]:  # first none that the state has as well
        x, state, lengths = noise(b, t, I), random_state(module, b), torch.arange(b).clamp(max=t)
        results = []
        for run in (compiled, module):
            module.zero_grad()
            y, final = run(x, state, lengths)
            (y.square().sum() + final[0].sum()).backward()
            results.append([y, *final, *(p.grad.clone() for p in module.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        counts.append(count)
    assert counts == counts[:1] * 3


def test_copies():
    module, x = make("exp", I, H, 2, batch_first=True), noise(B, T, I)
    want, _ = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], want)
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert not torch.equal(other(x)[0], want) and torch.equal(module(x)[0], want)


# ---- bad arguments ----


def constructor_cases():
    yield {"num_heads": 0}, ValueError, "num_heads is 0, expected at least 1"
    yield {"num_heads": 2.0}, TypeError, "num_heads is 2.0, expected an integer"
    yield {"num_heads": 3}, ValueError, "hidden_size is 8, expected a multiple of num_heads=3"
    yield (
        {"num_heads": 2, "qk_size": 3},
        ValueError,
        "qk_size is 3, expected a multiple of num_heads=2",
    )
    yield {"qk_size": 0}, ValueError, "qk_size is 0, expected at least 1"
    yield {"input_gate": "tanh"}, ValueError, "input_gate is 'tanh', expected \"exp\" or"
    yield {"normalize": False}, ValueError, "normalize is False, expected True with input_gate"
    yield {"hidden_size": 8.0}, TypeError, "hidden_size is 8.0, expected an integer"
    yield {"num_layers": 0}, ValueError, "num_layers is 0, expected at least 1"
    yield {"gate_bias_init": (9.0, 5.0)}, ValueError, "gate_bias_init is (9.0, 5.0), expected"
    yield (
        {"gate_bias_init": 1.0, "bias": False},
        ValueError,
        "gate_bias_init is 1.0, expected None with bias=False",
    )
    yield (
        {"input_gate_bias_init": -10.0, "bias": False},
        ValueError,
        "input_gate_bias_init is -10.0, expected 0 with bias=False",
    )


@pytest.mark.parametrize("options, error, text", list(constructor_cases()), ids=str)
def test_bad_constructor_arguments(options, error, text):
    with pytest.raises(error) as raised:
        torch_ext.MLSTM(**{"input_size": 4, "hidden_size": 8, **options})
    assert "MLSTM: " + text in str(raised.value)


def call_cases():
    x = torch.zeros(B, T, I)
    keys, values = QK // HEADS, H // HEADS
    C, n, m = (
        torch.zeros(2, B, *shape) for shape in ((HEADS, keys, values), (HEADS, keys), (HEADS,))
    )
    yield (
        lambda module: module(x, (C[:1], n, m)),
        ValueError,
        "state has shape (1, 3, 2, 4, 3), expected (num_layers * num_directions=2, B=3, "
        "num_heads=2, K=4, V=3)",
    )
    yield lambda module: module(x, (C, n, m[:, :2])), ValueError, "state has shape (2, 2, 2), exp"
    yield lambda module: module(x, (n, C, m)), ValueError, "state has shape (2, 3, 2, 4), expected"
    yield (
        lambda module: module(x[0], (C, n, m)),
        ValueError,
        "(num_layers * num_directions, num_heads, K, V) since x has no batch",
    )
    yield lambda module: module(x, C), TypeError, "state is Tensor, expected a tuple of 3 tensors"
    yield lambda module: module(x, (C, n)), TypeError, "state is (Tensor, Tensor), expected a tuple"
    yield lambda module: module.step(x[:, 0], None), TypeError, "state is NoneType, expected a"
    yield (
        lambda module: module(x[..., 1:]),
        ValueError,
        "x has shape (3, 7, 3), expected (B, T, input_size=4)",
    )
    yield lambda module: module(x.double()), TypeError, "x has dtype torch.float64, expected"
    yield lambda module: module(x, None, torch.ones(3)), TypeError, "lengths has dtype torch.float"


@pytest.mark.parametrize("call, error, text", list(call_cases()), ids=lambda v: str(v)[:40])
def test_bad_arguments(call, error, text):
    module = make("exp", I, H, 2, batch_first=True)
    with pytest.raises(error) as raised:
        call(module)
    assert "MLSTM" in str(raised.value) and text in str(raised.value)


def test_bidirectional_refuses_step():
    module = make("exp", I, H, bidirectional=True)
    with pytest.raises(RuntimeError, match=r"MLSTM.step: bidirectional is True, expected False"):
        module.step(noise(B, I), module.init_state(B))


# ---- learning ----


def test_learns_to_look_up():
    """Which of four values came with the key that is asked for at the end: what a matrix is for. An
    error of chance is 1.39."""
    rnn = torch_ext.MLSTM(16, 32, 2, batch_first=True, num_heads=2)
    head = nn.Linear(32, 4)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.01)
    for _ in range(150):
        keys = torch.stack([torch.randperm(8)[:5] for _ in range(32)])
        values = torch.randint(0, 4, (32, 5))
        asked = torch.randint(0, 5, (32, 1))
        x = torch.zeros(32, 6, 16)
        x[:, :5, :8] = nn.functional.one_hot(keys, 8).float()
        x[:, :5, 8:12] = nn.functional.one_hot(values, 4).float()
        x[:, 5, :8] = nn.functional.one_hot(keys.gather(1, asked).squeeze(1), 8).float()
        x[:, 5, 12] = 1
        loss = nn.functional.cross_entropy(
            head(rnn(x)[0][:, -1]), values.gather(1, asked).squeeze(1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
