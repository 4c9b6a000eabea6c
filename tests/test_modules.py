"""MinGRU, MinLSTM, MinRNNBlock, MinRNNLM: against plain loops and torch.nn.GRU's contract."""

import copy
import doctest
import importlib
import io
import itertools
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import torch_ext

LAYERS = {
    "MinGRU": (torch_ext.MinGRU, {}),
    "MinGRU-g": (torch_ext.MinGRU, {"activation": "g"}),
    "MinLSTM": (torch_ext.MinLSTM, {}),
    "MinLSTM-raw-g": (torch_ext.MinLSTM, {"activation": "g", "normalize": False}),
}
BOTH = ["MinGRU", "MinLSTM"]
B, T, I, H = 3, 7, 4, 5
BLOCKS = [{}, {"layer": "min_lstm", "norm": "rms_norm", "conv_width": 2, "activation": "g"}]
VOCABULARY = 11

# Both are right; they differ by the order of additions in the projections and by a few roundings.
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
    layer, own = LAYERS[name]
    return layer(*args, **own, **options)


def noise(*shape, **options):
    return torch.randn(*shape, **options)


def g(v):
    return v + 0.5 if v >= 0 else 1 / (1 + (-v).exp())


def plain(module, x, state):
    """The module on one sequence ``x`` (T, I) from ``state`` (rows, H), number by number."""
    finals = []
    directions = ["", "_reverse"] if module.bidirectional else [""]
    activation = g if module.activation == "g" else lambda v: v
    for layer in range(module.num_layers):
        outputs = []
        for suffix in directions:
            weight = getattr(module, f"weight_ih_l{layer}{suffix}").double()
            bias = 0.0
            if module.bias:
                bias = getattr(module, f"bias_ih_l{layer}{suffix}").double()
            h = state[len(finals)].double().clone()
            y = torch.zeros(len(x), len(h), dtype=torch.float64)
            for t in reversed(range(len(x))) if suffix else range(len(x)):
                rows = (weight @ x[t].double() + bias).reshape(-1, len(h))
                for d in range(len(h)):
                    gates = [1 / (1 + (-v).exp()) for v in rows[:-1, d]]
                    if isinstance(module, torch_ext.MinGRU):
                        keep, take = 1 - gates[0], gates[0]
                    elif module.normalize:
                        keep, take = gates[0] / sum(gates), gates[1] / sum(gates)
                    else:
                        keep, take = gates
                    h[d] = keep * h[d] + take * activation(rows[-1, d])
                y[t] = h
            outputs.append(y)
            finals.append(h)
        x = torch.cat(outputs, 1)
    return x, torch.stack(finals)


# ---- values and shapes ----


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "num_layers, bias, batch_first, bidirectional",
    list(itertools.product([1, 2], [True, False], [True, False], [True, False])),
)
@torch.no_grad()
def test_is_the_plain_loop_in_the_form_of_gru(name, num_layers, bias, batch_first, bidirectional):
    arguments = (I, H, num_layers, bias, batch_first, 0.0, bidirectional)
    module, gru = make(name, *arguments), nn.GRU(*arguments)
    x = noise(B, T, I)
    given = x if batch_first else x.transpose(0, 1)
    state = noise(num_layers * (1 + bidirectional), B, H)

    for initial in (None, state):
        y, final = module(given, initial)
        want_y, want_final = gru(given, initial)
        assert y.shape == want_y.shape and final.shape == want_final.shape
        y = y if batch_first else y.transpose(0, 1)
        for b in range(B):
            start = torch.zeros_like(state[:, b]) if initial is None else state[:, b]
            want_y, want_final = plain(module, x[b], start)
            torch.testing.assert_close(y[b].double(), want_y, **CLOSE)
            torch.testing.assert_close(final[:, b].double(), want_final, **CLOSE)

    for initial in (None, state[:, 0]):  # without a batch
        y, final = module(x[0], initial)
        want_y, want_final = gru(x[0], initial)
        assert y.shape == want_y.shape and final.shape == want_final.shape
        start = torch.zeros_like(state[:, 0]) if initial is None else initial
        want_y, want_final = plain(module, x[0], start)
        torch.testing.assert_close(y.double(), want_y, **CLOSE)
        torch.testing.assert_close(final.double(), want_final, **CLOSE)


@pytest.mark.parametrize("name", BOTH)
def test_parameters_are_those_of_gru_without_weight_hh(name):
    module, gru = make(name, I, H, 2, bidirectional=True), nn.GRU(I, H, 2, bidirectional=True)
    gates = {"MinGRU": 2, "MinLSTM": 3}[name]
    want = {
        key: (gates * H, *value.shape[1:])
        for key, value in gru.state_dict().items()
        if "_hh_" not in key
    }
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == want
    assert list(module.state_dict()) == [key for key in gru.state_dict() if "_hh_" not in key]
    assert all(parameter.abs().max() <= H**-0.5 for parameter in module.parameters())
    assert all(parameter.std() > 0.3 * H**-0.5 for parameter in module.parameters())


def test_repr_says_what_differs_from_the_defaults():
    module = torch_ext.MinLSTM(3, 4, 2, dropout=0.5, activation="g", gate_bias_init=(2.0, 9.0))
    assert repr(module) == (
        "MinLSTM(3, 4, num_layers=2, dropout=0.5, activation='g', gate_bias_init=(2.0, 9.0))"
    )
    assert repr(torch_ext.MinGRU(3, 4)) == "MinGRU(3, 4)"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("shape", [(0, T, I), (B, 0, I), (0, 0, I)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_empty(name, shape, bidirectional):
    module = make(name, I, H, 2, batch_first=True, bidirectional=bidirectional)
    state = noise(2 * (1 + bidirectional), shape[0], H, requires_grad=True)
    for lengths in (None, torch.zeros(shape[0], dtype=torch.int64)):
        y, final = module(noise(*shape), state, lengths)
        assert y.shape == (*shape[:2], H * (1 + bidirectional))
        assert torch.equal(final, state)
        (final.sum() + y.sum()).backward()
    assert torch.equal(state.grad, torch.full_like(state, 2.0))


# ---- padding and packing ----


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_packed_is_padded_is_separate(name, bidirectional, batch_first, with_state):
    """Outputs, final states and all gradients, with NaN where nobody may look."""
    lengths = torch.tensor([4, T, 1, 5])
    module = make(name, I, H, 2, True, batch_first, 0.0, bidirectional, dtype=torch.float64)
    x = noise(len(lengths), T, I, dtype=torch.float64)
    start = noise(2 * (1 + bidirectional), len(lengths), H, dtype=torch.float64)
    past = torch.arange(T) >= lengths[:, None]
    x[past] = torch.nan
    weight_y = noise(len(lengths), T, H * (1 + bidirectional), dtype=torch.float64)
    weight_final = noise(*start.shape, dtype=torch.float64)

    def run(how):
        module.zero_grad()
        leaf, state = x.clone().requires_grad_(), start.clone().requires_grad_()
        given = state if with_state else None
        if how == "separate":
            ys, finals = [], []
            for b, length in enumerate(lengths.tolist()):
                y, final = module(leaf[b, :length], None if given is None else given[:, b])
                ys.append(torch.nn.functional.pad(y, (0, 0, 0, T - length)))
                finals.append(final)
            y, final = torch.stack(ys), torch.stack(finals, 1)
        else:
            inputs = leaf if batch_first else leaf.transpose(0, 1)
            if how == "padded":
                y, final = module(inputs, given, lengths)
            elif how == "packed":
                packed = pack_padded_sequence(
                    inputs, lengths, batch_first=batch_first, enforce_sorted=False
                )
                y, final = module(packed, given)
                assert isinstance(y, nn.utils.rnn.PackedSequence)
                y, back = pad_packed_sequence(y, batch_first=batch_first, total_length=T)
                assert torch.equal(back, lengths)
            y = y if batch_first else y.transpose(0, 1)
        assert torch.equal(y[past], torch.zeros_like(y[past]))
        ((y * weight_y).sum() + (final * weight_final).sum()).backward()
        assert torch.equal(leaf.grad[past], torch.zeros_like(leaf.grad[past]))
        gradients = [leaf.grad, *(parameter.grad for parameter in module.parameters())]
        return [y, final, *gradients, *([state.grad] if with_state else [])]

    want = run("separate")
    for how in ("padded", "packed"):
        for got, expected in zip(run(how), want, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", BOTH)
def test_sorted_packed_sequence(name):
    """enforce_sorted=True leaves sorted_indices out."""
    module = make(name, I, H, bidirectional=True)
    sequences = [noise(length, I) for length in (6, 4, 4, 1)]
    packed = pack_sequence(sequences)
    assert packed.sorted_indices is None
    y, final = module(packed)
    assert y.sorted_indices is None and torch.equal(y.batch_sizes, packed.batch_sizes)
    y, lengths = pad_packed_sequence(y)
    for b, sequence in enumerate(sequences):
        want_y, want_final = module(sequence)
        torch.testing.assert_close(y[: lengths[b], b], want_y, **CLOSE)
        torch.testing.assert_close(final[:, b], want_final, **CLOSE)


@pytest.mark.parametrize("name", BOTH)
def test_lengths_of_zero_and_of_any_integer_dtype(name):
    module = make(name, I, H, 2, batch_first=True, bidirectional=True)
    x, state = noise(B, T, I), noise(4, B, H)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        y, final = module(x, state, torch.tensor([0, T, 3], dtype=dtype))
        assert torch.equal(final[:, 0], state[:, 0])
        assert not y[0].any()
        torch.testing.assert_close(y[1], module(x[1], state[:, 1])[0], **CLOSE)


# ---- states ----


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_chunks_are_the_sequence(name, num_layers, bias):
    """With their gradients, which flow through the states that are handed over."""
    module = make(name, I, H, num_layers, bias, batch_first=True, dtype=torch.float64)
    x = noise(B, T, I, dtype=torch.float64)
    weight = noise(B, T, H, dtype=torch.float64)
    start = noise(num_layers, B, H, dtype=torch.float64)

    def run(pieces):
        module.zero_grad()
        leaf, first = x.clone().requires_grad_(), start.clone().requires_grad_()
        state, ys, at = first, [], 0
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
        ((y * weight).sum() + state.square().sum()).backward()
        return [y, state, leaf.grad, first.grad, *(p.grad for p in module.parameters())]

    want = run([T])
    for pieces in ([3, 4], [1] * T, ["step"] * T, [2, "step", 0, 4]):
        for got, expected in zip(run(pieces), want, strict=True):
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", BOTH)
def test_init_state(name):
    module = make(name, I, H, 2, bidirectional=True)
    state = module.init_state(6)
    assert state.shape == (4, 6, H) and state.dtype == torch.float32 and not state.any()
    assert module.double().init_state(6).dtype == torch.float64
    x = noise(T, 6, I, dtype=torch.float64)
    for got, want in zip(module(x, module.init_state(6)), module(x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32(name, dtype):
    x = noise(B, T, I)
    module = make(name, I, H, 2, batch_first=True)
    want, want_state = module(x)
    bound = {"atol": 8 * torch.finfo(dtype).eps, "rtol": 8 * torch.finfo(dtype).eps}

    with torch.autocast("cpu", dtype):
        y, state = module(x)
        y2, state2 = module(x, state, torch.tensor([T, 2, 0]))
        y_t, state_t = module.step(x[:, 0], module.init_state(B))
    assert (y.dtype, state.dtype, state2.dtype, state_t.dtype) == (dtype, *[torch.float32] * 3)
    torch.testing.assert_close(y.float(), want, **bound)
    torch.testing.assert_close(state, want_state, **bound)
    y2.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())

    half = copy.deepcopy(module).to(dtype)
    y, state = half(x.to(dtype))
    y_t, state_t = half.step(x[:, 0].to(dtype), half.init_state(B))
    assert (y.dtype, state.dtype, state_t.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(y.float(), want, **bound)


@pytest.mark.parametrize("name", BOTH)
def test_double_modules_have_double_states(name):
    module = make(name, I, H, 2, batch_first=True, dtype=torch.float64)
    x = noise(B, T, I, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for y, state in (module(x), module.step(x[:, 0], module.init_state(B))):
            assert y.dtype == state.dtype == torch.float64


# ---- gradients ----


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [None, [2, 3]])
def test_gradcheck(name, lengths):
    module = make(name, 2, 2, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    names = [n for n, _ in module.named_parameters()]
    lengths = None if lengths is None else torch.tensor(lengths)

    def run(x, state, *weights):
        return torch.func.functional_call(
            module, dict(zip(names, weights, strict=True)), (x, state, lengths)
        )

    inputs = (noise(2, 3, 2, dtype=torch.float64), noise(4, 2, 2, dtype=torch.float64))
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(run, (*inputs, *module.parameters()))


@pytest.mark.parametrize("name", BOTH)
def test_ensemble_by_vmap(name):
    """torch.func: several modules in one call, and their gradients."""
    modules = [make(name, I, H, 2, batch_first=True, bidirectional=True) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x, lengths = noise(B, T, I), torch.tensor([T, 3, 0])

    def loss(weights, x):
        y, state = torch.func.functional_call(modules[0], weights, (x, None, lengths))
        return y.square().sum() + state.sum()

    got = torch.func.vmap(torch.func.grad(loss), (0, None))(parameters, x)
    for k, module in enumerate(modules):
        want = torch.func.grad(loss)(dict(module.named_parameters()), x)
        for key, gradient in want.items():
            torch.testing.assert_close(got[key][k], gradient.detach(), **CLOSE)


@pytest.mark.parametrize("name", BOTH)
def test_parametrized_weights(name):
    module = make(name, I, H, batch_first=True)
    x = noise(B, T, I)
    want, _ = module(x)
    nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    y, _ = module(x)
    torch.testing.assert_close(y, want, **CLOSE)
    y.sum().backward()
    assert module.parametrizations.weight_ih_l0.original0.grad.any()


# ---- dropout ----


@pytest.mark.parametrize("name", BOTH)
def test_dropout_is_between_layers_in_training(name):
    x = noise(B, T, I)
    module = make(name, I, H, 3, batch_first=True, dropout=0.5)
    sure = make(name, I, H, 3, batch_first=True)
    sure.load_state_dict(module.state_dict())
    module.eval()
    for got, want in zip(module(x), sure(x), strict=True):
        assert torch.equal(got, want)

    module.train()
    y, state = module(x)
    want_y, want_state = sure(x)
    assert torch.equal(state[0], want_state[0])  # the first layer reads x
    assert not torch.allclose(state[1], want_state[1])
    assert y.count_nonzero() == y.numel()  # the last layer's output is whole
    again, _ = module(x)
    assert not torch.equal(y, again)

    module.dropout = 1.0  # all but the biases is gone: the last layer's output is the same for all
    y, _ = module(x)
    torch.testing.assert_close(y, y[:1].expand_as(y))


def test_dropout_without_a_second_layer_warns():
    with pytest.warns(UserWarning, match="MinGRU: dropout is 0.5 with num_layers=1"):
        torch_ext.MinGRU(I, H, dropout=0.5)


# ---- gate_bias_init ----


@torch.no_grad()
def share_kept(module):
    """What is left after one step of a state of one, where x is zero."""
    x = torch.zeros(1, 1, module.input_size)
    ones = torch.ones_like(module.init_state(1))
    return (module(x, ones)[0] - module(x)[0]).flatten()


@pytest.mark.parametrize("name", ["MinGRU", "MinLSTM", "MinLSTM-raw-g"])
def test_gate_bias_init(name):
    negative = -1.0 if name == "MinGRU" else 1.0
    module = make(name, I, 2000, batch_first=True, gate_bias_init=3.0 * negative)
    torch.testing.assert_close(
        share_kept(module), torch.full((2000,), 1 / (1 + torch.tensor(-3.0).exp())), **CLOSE
    )
    assert torch.equal(module.bias_ih_l0[:2000], torch.full((2000,), 3.0 * negative))

    module = make(name, I, 2000, batch_first=True, gate_bias_init=(10.0, 110.0))
    steps = 1 / (1 - share_kept(module))  # the time after which exp(-1) is left, or nearly
    assert steps.min() >= 9.99 and steps.max() <= 110.1
    # uniform: mean 60, deviation 100 / sqrt(12) = 28.9; of 2000 draws the mean is within 0.65
    assert abs(steps.mean() - 60) < 4 and abs(steps.std() - 28.9) < 2
    candidate = module.bias_ih_l0[-2000:]
    assert candidate.abs().max() <= 2000**-0.5 and candidate.std() > 0

    reverse = make(name, I, H, 2, bidirectional=True, gate_bias_init=(5.0, 6.0))
    for key, value in reverse.named_parameters():
        if "bias" in key:
            assert (value[:H] * negative > 1.3).all(), key
    reset = make(name, I, H, 2, gate_bias_init=(5.0, 6.0))
    reset.reset_parameters()
    assert (reset.bias_ih_l1[:H] * negative > 1.3).all()


# ---- TorchScript ----


@script_warnings
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 3, "bias": False}],
    ids=str,
)
def test_script(name, options):
    module = make(name, I, H, batch_first=True, **options)
    scripted = torch.jit.script(module)
    loaded = reload(scripted)
    x, lengths = noise(B, T, I), torch.tensor([2, T, 0])
    rows = module.init_state(B).shape[0]
    for other in (scripted, loaded, copy.deepcopy(scripted)):
        for arguments in [(x,), (x, noise(rows, B, H)), (x, None, lengths), (x[0],)]:
            for got, want in zip(other(*arguments), module(*arguments), strict=True):
                assert torch.equal(got, want)
        assert torch.equal(other.init_state(2), module.init_state(2))
        if not module.bidirectional:
            state = noise(rows, B, H)
            for got, want in zip(
                other.step(x[:, 0], state), module.step(x[:, 0], state), strict=True
            ):
                assert torch.equal(got, want)
        with pytest.raises(Exception, match=r"x has shape \(3, 7, 5\), expected .*input_size=4"):
            other(noise(B, T, I + 1))
        with pytest.raises(Exception, match="lengths has values from 2 to 8"):
            other(x, None, torch.tensor([2, T + 1, 3]))

    # The loaded module's parameters are those that it computes with: it trains and converts.
    module(x)[0].square().sum().backward()
    loaded(x)[0].square().sum().backward()
    for want, got in zip(module.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert torch.equal(loaded(x)[0], torch.zeros(B, T, H * module.num_directions)) or (
        module.activation == "g"
    )
    assert loaded.double()(x.double())[1].dtype == torch.float64


def reload(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch_ext.MinGRU(I, H, 2, batch_first=True)
        self.head = nn.Linear(H, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


@script_warnings
def test_scripted_in_a_larger_module_that_moves_afterwards():
    model, x = Model(), noise(B, T, I)
    torch.jit.script(model)
    model.double()
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x.double()), model(x.double()))
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        copied.rnn.weight_ih_l0.zero_()
    assert torch.equal(torch.jit.script(copied)(x.double()), copied(x.double()))


@script_warnings
@pytest.mark.slow
def test_scripted_trains_in_a_fresh_process(tmp_path, child_environment):
    file, data = tmp_path / "model.pt", tmp_path / "data.pt"
    module, x = torch_ext.MinLSTM(I, H, 2, batch_first=True), noise(B, T, I)
    torch.jit.save(torch.jit.script(module), file)
    torch.save((x, module(x)[0]), data)
    program = f"""
import torch, torch_ext
x, want = torch.load({str(data)!r})
model = torch.jit.load({str(file)!r})
torch.testing.assert_close(model(x)[0], want)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
losses = []
for _ in range(5):
    loss = model(x)[0].square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
assert losses == sorted(losses, reverse=True), losses
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment,
        check=True,
        timeout=300,
        cwd=tmp_path,
    )


# ---- torch.export and torch.compile ----


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_export_with_dynamic_sizes(name, bidirectional):
    module = make(name, I, H, 2, batch_first=True, bidirectional=bidirectional).eval()
    rows = 2 * (1 + bidirectional)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    arguments = (noise(B, T, I), noise(rows, B, H), torch.tensor([T, 1, 3]))
    program = torch.export.export(
        module,
        arguments,
        dynamic_shapes=({0: batch, 1: steps}, {1: batch}, {0: batch}),
    )
    for b, t in [(B, T), (5, 2), (2, 33)]:
        x, state, lengths = noise(b, t, I), noise(rows, b, H), torch.arange(b).clamp(max=t)
        got = program.module()(x, state, lengths)
        for value, want in zip(got, module(x, state, lengths), strict=True):
            assert torch.equal(value, want)


class CompileCounter:
    def __init__(self, backend):
        self.backend, self.count = backend, 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_for_all_sizes_in_the_first_call(name, backend):
    torch._dynamo.reset()
    module = make(name, I, H, 2, batch_first=True, bidirectional=True)
    counter = CompileCounter(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for b, t in [(B, T), (6, 11), (2, 5), (4, 9)]:
        x, state, lengths = noise(b, t, I), noise(4, b, H), torch.arange(b).clamp(max=t)
        results = []
        for run in (compiled, module):
            module.zero_grad()
            y, final = run(x, state, lengths)
            (y.square().sum() + final.sum()).backward()
            results.append([y, final, *(p.grad.clone() for p in module.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
        counts.append(counter.count)
    assert counts == counts[:1] * 4


# ---- copies ----


@pytest.mark.parametrize("name", BOTH)
def test_copies(name):
    module = make(name, I, H, 2, batch_first=True, bidirectional=True)
    x = noise(B, T, I)
    want, _ = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], want)
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert not torch.equal(other(x)[0], want) and torch.equal(module(x)[0], want)
    other = make(name, I, H, 2, batch_first=True, bidirectional=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], want)
    other.flatten_parameters()  # as users of nn.GRU do


# ---- bad arguments ----


def constructor_cases():
    yield lambda c: c(0, 4), ValueError, "input_size is 0, expected at least 1"
    yield lambda c: c(4, -1), ValueError, "hidden_size is -1, expected at least 1"
    yield lambda c: c(4, 4, 0), ValueError, "num_layers is 0, expected at least 1"
    yield lambda c: c(4.0, 4), TypeError, "input_size is 4.0, expected an integer"
    yield lambda c: c(4, True), TypeError, "hidden_size is True, expected an integer"
    yield lambda c: c(4, 4, 2, dropout=1.5), ValueError, "dropout is 1.5, expected a number in"
    yield lambda c: c(4, 4, activation="tanh"), ValueError, "activation is 'tanh', expected"
    yield (
        lambda c: c(4, 4, bias=False, gate_bias_init=1.0),
        ValueError,
        "gate_bias_init is 1.0, expected None with bias=False",
    )
    for pair in [(1.0, 5.0), (9.0, 5.0), (2.0,)]:
        yield (
            lambda c, pair=pair: c(4, 4, gate_bias_init=pair),
            ValueError,
            f"gate_bias_init is {pair}, expected",
        )


def call_cases():
    x, state = torch.zeros(B, T, I), torch.zeros(2, B, H)
    yield (
        lambda m: m(x[..., 1:]),
        ValueError,
        "x has shape (3, 7, 3), expected (B, T, input_size=4)",
    )
    yield lambda m: m(x[0, 0]), ValueError, "x has shape (4), expected"
    yield lambda m: m(x.double()), TypeError, "x has dtype torch.float64, expected torch.float32"
    yield (
        lambda m: m(x, state[:1]),
        ValueError,
        "state has shape (1, 3, 5), expected (num_layers * num_directions=2, B=3, hidden_size=5)",
    )
    yield lambda m: m(x, state[:, :2]), ValueError, "state has shape (2, 2, 5), expected"
    yield lambda m: m(x, state[..., :2]), ValueError, "state has shape (2, 3, 2), expected"
    yield lambda m: m(x, state[:, 0]), ValueError, "state has shape (2, 5), expected"
    yield lambda m: m(x[0], state), ValueError, "since x has no batch"
    yield lambda m: m(x, state.bfloat16()), TypeError, "bfloat16"
    yield (
        lambda m: m(x, None, torch.ones(2, dtype=torch.int64)),
        ValueError,
        "lengths has shape (2), expected (B=3)",
    )
    yield (
        lambda m: m(x, None, torch.ones(3)),
        TypeError,
        "lengths has dtype torch.float32, expected an integer",
    )
    yield (
        lambda m: m(x, None, [1, 2, 3]),
        TypeError,
        "lengths is list, expected a tensor of integers, (B,)",
    )
    yield (
        lambda m: m(x, None, torch.tensor([1, 8, 2])),
        ValueError,
        "lengths has values from 1 to 8, expected values from 0 to T=7",
    )
    yield (
        lambda m: m(x, None, torch.tensor([1, -1, 2])),
        ValueError,
        "lengths has values from -1 to 2, expected values from 0 to T=7",
    )
    yield lambda m: m(x[0], None, torch.tensor([1])), ValueError, "lengths is given, expected None"
    packed = pack_sequence([torch.zeros(3, I), torch.zeros(2, I)])
    yield lambda m: m(packed, None, torch.tensor([3, 2])), ValueError, "lengths is given, expected"
    yield lambda m: m(packed, state), ValueError, "state has shape (2, 3, 5), expected"
    yield (
        lambda m: m(pack_sequence([torch.zeros(3, 2)])),
        ValueError,
        "x.data has shape (3, 2), expected (num_steps, input_size=4)",
    )
    yield lambda m: m.step(x, state), ValueError, "step: x has shape (3, 7, 4), expected (B, input"
    yield lambda m: m.step(x[:, 0], state[:, :1]), ValueError, "state has shape (2, 1, 5), expected"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("call, error, text", list(constructor_cases()), ids=lambda v: str(v)[:40])
def test_bad_constructor_arguments(name, call, error, text):
    with pytest.raises(error) as raised:
        call(LAYERS[name][0])
    assert name in str(raised.value) and text in str(raised.value)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("call, error, text", list(call_cases()), ids=lambda v: str(v)[:40])
def test_bad_arguments(name, call, error, text):
    module = make(name, I, H, 2, batch_first=True)
    with pytest.raises(error) as raised:
        call(module)
    assert text in str(raised.value)


@pytest.mark.parametrize("name", BOTH)
def test_bidirectional_refuses_step(name):
    module = make(name, I, H, bidirectional=True)
    with pytest.raises(RuntimeError, match=f"{name}.step: bidirectional is True, expected False"):
        module.step(noise(B, I), module.init_state(B))


# ---- learning ----


@pytest.mark.parametrize("name", LAYERS)
def test_learns_to_remember(name):
    """The first input's sign, after 20 steps of noise: an error of chance is 0.69."""
    rnn = make(name, 2, 16, 2, batch_first=True, gate_bias_init=(2.0, 20.0))
    head = nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.02)
    for _ in range(80):
        x = noise(32, 20, 2) * 0.3
        x[:, :, 1] = 0
        x[:, 0] = torch.stack([torch.randint(0, 2, (32,)) * 2.0 - 1, torch.ones(32)], 1)
        target = (x[:, 0, 0] > 0).float()
        loss = nn.functional.binary_cross_entropy_with_logits(
            head(rnn(x)[0][:, -1]).squeeze(1), target
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# ---- MinRNNBlock and MinRNNLM ----


@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_block_is_its_equations(options):
    block = torch_ext.MinRNNBlock(6, **options)
    x = noise(B, T, 6)
    width = block.conv_width
    a = block.norm(x)
    padded = nn.functional.pad(a, (0, 0, width - 1, 0))
    convolved = block.conv.bias + sum(
        block.conv.weight[:, 0, w] * padded[:, w : w + T] for w in range(width)
    )
    h, _ = block.rnn(convolved)
    middle = x + block.down(h)
    want = middle + block.mlp_down(nn.functional.gelu(block.mlp_up(block.mlp_norm(middle))))
    y, _ = block(x)
    torch.testing.assert_close(y, want, **CLOSE)
    assert h.shape[2] == 12 and block.mlp_up.out_features == 24


@pytest.mark.parametrize("options", BLOCKS, ids=str)
@pytest.mark.parametrize("kind", ["block", "lm"])
def test_block_and_lm_steps_are_chunks_are_the_sequence(kind, options):
    if kind == "block":
        module = torch_ext.MinRNNBlock(6, dtype=torch.float64, **options)
        x, run, extra = noise(B, T, 6, dtype=torch.float64), module, []
    else:
        module = torch_ext.MinRNNLM(VOCABULARY, 6, 3, dtype=torch.float64, **options)
        x, run, extra = torch.randint(VOCABULARY, (B, T)), module.prefill, [3]
        assert torch.equal(module(x), module.prefill(x)[0])
    results = []
    for pieces in ([T], [3, 4], [1] * T, ["step"] * T, [2, "step", 0, 4]):
        module.zero_grad()
        state, ys, at = module.init_state(B), [], 0
        for steps in pieces:
            if steps == "step":
                y, state = module.step(x[:, at], state)
                y, steps = y.unsqueeze(1), 1
            else:
                y, state = run(x[:, at : at + steps], state)
            ys.append(y)
            at += steps
        y = torch.cat(ys, 1)
        y.square().sum().backward()
        results.append([y, *state, *(p.grad for p in module.parameters())])
    width = options.get("conv_width", 4)
    assert [s.shape for s in state] == [(*extra, B, 6, width - 1), (*extra, B, 12)]
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_lm_states_are_float32(options):
    model, ids = torch_ext.MinRNNLM(VOCABULARY, 6, 2, **options), torch.randint(VOCABULARY, (B, T))
    want = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = model.prefill(ids)
        y_t, state_t = model.step(ids[:, 0], state)
        assert model.generate(ids, 2).shape == (B, T + 2)
    assert all(s.dtype == torch.float32 for s in (*state, *state_t))
    torch.testing.assert_close(y.float(), want, atol=0.1, rtol=0.1)
    model.bfloat16()
    y, state = model.prefill(ids)
    assert y.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in state)
    assert all(s.dtype == torch.float64 for s in model.double().prefill(ids)[1])


def test_lm_generates():
    model = torch_ext.MinRNNLM(VOCABULARY, 6, 2).eval()
    ids = torch.randint(VOCABULARY, (B, 3))
    want = ids
    for _ in range(5):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 5, temperature=0.0), want)
    assert torch.equal(model.generate(ids, 5, top_k=1), want)
    assert torch.equal(model.generate(ids, 0), ids)
    assert not model.generate(ids, 2).requires_grad
    assert model.generate(ids, 4, top_k=100).shape == (B, 7)

    # The frequencies of sampled tokens are softmax(logits / temperature), cut to the top k.
    many, top_k, temperature = 20000, 4, 0.5
    with torch.no_grad():
        model.head.weight.mul_(20)
        logits = model(ids[:1])[0, -1] / temperature
    kept = logits.topk(top_k)
    want = torch.zeros(VOCABULARY).index_copy(0, kept.indices, kept.values.softmax(0))
    tokens = model.generate(ids[:1].expand(many, -1), 1, temperature, top_k)[:, -1]
    got = tokens.bincount(minlength=VOCABULARY) / many
    torch.testing.assert_close(got, want, atol=0.02, rtol=0)  # 5 deviations


@script_warnings
@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_lm_scripts(options):
    model = torch_ext.MinRNNLM(VOCABULARY, 6, 2, **options)
    scripted = torch.jit.script(model)
    loaded, ids = reload(scripted), torch.randint(VOCABULARY, (B, T))
    for other in (scripted, loaded):
        assert torch.equal(other(ids), model(ids))
        assert torch.equal(other.generate(ids, 6, 0.0), model.generate(ids, 6, 0.0))
        assert other.generate(ids, 3).shape == (B, T + 3)
        logits, state = other.prefill(ids)
        logits, state = other.prefill(ids, state)
        want, want_state = model.step(ids[:, 0], state)
        got, got_state = other.step(ids[:, 0], state)
        assert torch.equal(got, want) and torch.equal(got_state[1], want_state[1])
    loaded(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    block = torch_ext.MinRNNBlock(6, **options)
    x = noise(B, T, 6)
    assert torch.equal(reload(torch.jit.script(block))(x)[0], block(x)[0])


@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_lm_exports_with_dynamic_sizes(options):
    model = torch_ext.MinRNNLM(VOCABULARY, 6, 2, **options).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}
    program = torch.export.export(
        model, (torch.randint(VOCABULARY, (B, T)),), dynamic_shapes=(sizes,)
    )
    for b, t in [(B, T), (5, 9), (2, 33)]:
        ids = torch.randint(VOCABULARY, (b, t))
        torch.testing.assert_close(program.module()(ids), model(ids), **CLOSE)


def test_lm_compiles_for_all_sizes_in_the_first_call():
    torch._dynamo.reset()
    model = torch_ext.MinRNNLM(VOCABULARY, 6, 2)
    counter = CompileCounter("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for b, t in [(B, T), (6, 11), (2, 5)]:
        ids = torch.randint(VOCABULARY, (b, t))
        torch.testing.assert_close(compiled(ids), model(ids), **CLOSE)
        compiled(ids).sum().backward()
        counts.append(counter.count)
    assert counts == counts[:1] * 3


def test_block_and_lm_empty():
    block, model = torch_ext.MinRNNBlock(6), torch_ext.MinRNNLM(VOCABULARY, 6, 2)
    for b, t in [(0, T), (B, 0), (0, 0)]:
        assert block(noise(b, t, 6))[0].shape == (b, t, 6)
        ids = torch.zeros(b, t, dtype=torch.int64)
        assert model(ids).shape == (b, t, VOCABULARY)
    state = model.prefill(torch.randint(VOCABULARY, (B, T)))[1]
    for got, want in zip(
        model.prefill(torch.zeros(B, 0, dtype=torch.int64), state)[1], state, strict=True
    ):
        assert torch.equal(got, want)


def test_lm_copies_and_keys():
    model, ids = torch_ext.MinRNNLM(VOCABULARY, 6, 1), torch.randint(VOCABULARY, (B, T))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), model(ids))
    block = ["norm.weight", "norm.bias", "conv.weight", "conv.bias"]
    block += ["rnn.weight_ih_l0", "rnn.bias_ih_l0", "down.weight", "down.bias"]
    block += ["mlp_norm.weight", "mlp_norm.bias", "mlp_up.weight", "mlp_up.bias"]
    block += ["mlp_down.weight", "mlp_down.bias"]
    assert list(torch_ext.MinRNNBlock(6).state_dict()) == block
    assert list(model.state_dict()) == [
        "embedding.weight",
        *(f"layers.0.{key}" for key in block),
        *("norm.weight", "norm.bias", "head.weight", "head.bias"),
    ]


def test_lm_dropout_is_in_training_only():
    model, ids = torch_ext.MinRNNLM(VOCABULARY, 6, 2, dropout=0.5), torch.randint(5, (B, T))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def lm_cases():
    lm, block = torch_ext.MinRNNLM, torch_ext.MinRNNBlock
    ids = torch.zeros(B, T, dtype=torch.int64)
    yield lambda: lm(0, 6, 2), "MinRNNLM: vocab_size is 0, expected at least 1"
    yield lambda: lm(9, 6, 0), "MinRNNLM: num_layers is 0, expected at least 1"
    yield lambda: lm(9, 0, 1), "dim is 0, expected at least 1"
    yield lambda: block(6, layer="gru"), 'layer is \'gru\', expected "min_gru" or "min_lstm"'
    yield lambda: block(6, norm="batch"), "norm is 'batch', expected"
    yield lambda: block(6, conv_width=0), "conv_width is 0, expected at least 1"
    yield lambda: block(6, expansion=0.1), "expansion is 0.1, expected"
    yield lambda: block(6)(torch.zeros(B, T, 5)), "x has shape (3, 7, 5), expected (B, T, dim=6)"
    yield lambda: block(6).step(torch.zeros(B, T, 6), block(6).init_state(B)), "expected (B, dim=6)"
    yield lambda: lm(9, 6, 1)(ids[0]), "ids has shape (7), expected (B, T)"
    yield lambda: lm(9, 6, 1).step(ids, lm(9, 6, 1).init_state(B)), "expected (B,)"
    yield lambda: lm(9, 6, 1).generate(ids[:, :0], 2), "expected (B, T) with T >= 1"
    yield lambda: lm(9, 6, 1).generate(ids, -1), "max_new_tokens is -1, expected at least 0"
    yield lambda: lm(9, 6, 1).generate(ids, 1, -0.5), "temperature is -0.5, expected at least 0"
    yield lambda: lm(9, 6, 1).generate(ids, 1, 1.0, 0), "top_k is 0, expected at least 1"


@pytest.mark.parametrize("call, text", list(lm_cases()), ids=lambda v: str(v)[:40])
def test_bad_lm_arguments(call, text):
    with pytest.raises(ValueError) as raised:
        call()
    assert text in str(raised.value)


def test_lm_learns_a_text():
    text = torch.tensor([[*b"were RNNs all we needed? "]]) % VOCABULARY
    model = torch_ext.MinRNNLM(VOCABULARY, 16, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(50):
        loss = nn.functional.cross_entropy(model(text[:, :-1])[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(model.generate(text[:, :6], text.shape[1] - 6, 0.0), text)


# ---- documentation ----


@pytest.mark.parametrize(
    "name",
    ["linear_scan", "min_gru", "min_lstm", "_sequence_layer", "min_rnn", "causal_conv1d"]
    + ["selective_scan", "mamba", "compat", "compat.minGRU_pytorch", "compat.causal_conv1d"]
    + ["compat._mamba_ssm_ops", "compat._mamba_ssm_layer", "compat._mamba_ssm_models", "mamba_lm"]
    + ["mamba2", "mlstm", "retention", "linear_attention", "compat._mamba_ssm_ssd"]
    + ["compat.mlstm_kernels"],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"torch_ext.{name}")
    before = dict(sys.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module, extraglobs={"torch": torch, "torch_ext": torch_ext})
    for added in set(sys.modules) - set(before):  # compat's example installs a stand-in
        if added.startswith("minGRU_pytorch"):
            del sys.modules[added]
    assert result.failed == 0 and result.attempted > 0


def bad_states(module):
    """Calls with something else than a state."""
    x = torch.randn(2, 8)
    ids = torch.tensor([1, 2])
    step = {"MambaLM": ids, "MinRNNLM": ids}.get(type(module).__name__, x)
    state = module.init_state(2)
    yield lambda: module.step(step, None)
    if isinstance(state, torch.Tensor):
        yield lambda: module.step(step, (state,))
        yield lambda: module(x.unsqueeze(1), (state, state))
        return
    yield lambda: module.step(step, state[0] if isinstance(state, tuple) else state[0][0])
    if isinstance(state, tuple):
        yield lambda: module.step(step, state[:1])
        yield lambda: module.step(step, (state[0], None))


@pytest.mark.parametrize(
    "module",
    [
        torch_ext.MinGRU(8, 4),
        torch_ext.MinLSTM(8, 4),
        torch_ext.MLSTM(8, 4),
        torch_ext.MinRNNBlock(8),
        torch_ext.MinRNNLM(10, 8, 2),
        torch_ext.Mamba(8),
        torch_ext.Mamba2(8, headdim=4),
        torch_ext.MambaBlock(8),
        torch_ext.MambaLM(10, 8, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_something_else_than_a_state(module):
    for call in bad_states(module):
        with pytest.raises(TypeError, match=r"state is .*, expected .*, as init_state makes it"):
            call()
