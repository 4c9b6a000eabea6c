"""EchoStateNetwork: the reservoir against a plain loop, the readout against numpy's least squares, what it is for."""

import copy
import doctest
import importlib
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import torch_ext

B, T, I, H, O = 3, 12, 2, 20, 3
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64
CASES = [
    {},
    {"num_layers": 3, "leak_rate": 0.3},
    {"read_input": False, "spectral_radius": 1.3, "bias_scale": 0.0},
    {"num_layers": 2, "density": 1.0, "input_scale": 0.2, "read_input": False, "leak_rate": 0.8},
]

script_warnings = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is :DeprecationWarning",
    r"ignore:`torch\.jit\.\w+` is :FutureWarning",
)


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)


def make(output_size=O, dtype=torch.float64, batch_first=True, **options):
    net = torch_ext.EchoStateNetwork(
        I, H, output_size, batch_first=batch_first, dtype=dtype, **options
    )
    with torch.no_grad():
        net.weight_out.normal_(), net.bias_out.normal_()
    return net


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def close(got, want, **bound):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **(bound or EXACT))


def loop(net, x, state):
    """Features of all steps of ``x`` (B, T, I), and the final state."""
    a, state, features = net.leak_rate, list(state.unbind(0)), []
    for t in range(x.shape[1]):
        u, parts = x[:, t], [x[:, t]] if net.read_input else []
        for k, h in enumerate(state):
            W = net.weight_between[k - 1] if k else net.weight_ih
            new = torch.tanh(u @ W.T + h @ net.weight_hh[k].T + net.bias_ih[k])
            state[k] = u = (1 - a) * h + a * new
            parts.append(u)
        features.append(torch.cat(parts, 1))
    return torch.stack(features, 1), torch.stack(state)


# ---- the reservoir ----


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_is_the_plain_loop(options, batch_first):
    net = make(batch_first=batch_first, **options)
    x, start = noise(B, T, I), noise(net.num_layers, B, H).tanh()
    order = (lambda v: v) if batch_first else (lambda v: v.transpose(0, 1))
    for state in (None, start):
        h, final = loop(net, x, torch.zeros_like(start) if state is None else state)
        assert h.shape[2] == net.num_features
        y = h @ net.weight_out.T + net.bias_out
        close(net(order(x), state), (order(y), final))
        close(net.features(order(x), state), (order(h), final))
    close(net(x[0], start[:, 0]), [v.squeeze(0) for v in (y[:1], final[:, :1].transpose(0, 1))])
    close(
        net.features(x[0]),
        [net.features(order(x))[0].select(1 - batch_first, 0)] + [net(order(x))[1][:, 0]],
    )


@pytest.mark.parametrize("options", CASES, ids=str)
def test_steps_are_chunks_are_the_sequence(options):
    net = make(**options)
    x, start = noise(B, T, I), noise(net.num_layers, B, H).tanh()
    want, final = net(x, start)
    ys, state = [], start
    for t in range(T - 5):
        y, state = net.step(x[:, t], state)
        ys.append(y.unsqueeze(1))
    y, state = net(x[:, T - 5 :], state)
    close([torch.cat([*ys, y], 1), state], [want, final])
    y, state = net(x[:, :0], start)
    assert y.shape == (B, 0, O) and torch.equal(state, start)


def test_gradients():
    net = make(num_layers=2, leak_rate=0.4)
    x, state = noise(1, 3, I).requires_grad_(), noise(2, 1, H).requires_grad_()
    assert torch.autograd.gradcheck(net, (x, state))
    net(x, state)[0].sum().backward()
    assert [name for name, _ in net.named_parameters()] == ["weight_out", "bias_out"]
    assert all(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("radius", [0.0, 0.5, 1.25])
@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_reservoirs_are_as_asked(radius, density):
    net = torch_ext.EchoStateNetwork(
        50, 60, 1, 2, spectral_radius=radius, density=density, input_scale=0.7, bias_scale=0.3
    )
    for R in net.weight_hh.double().numpy():
        np.testing.assert_allclose(abs(np.linalg.eigvals(R)).max(), radius, rtol=1e-4)
        if radius:
            assert ((R != 0).sum(1) == max(1, round(density * 60))).all()
    for values, bound in ((net.weight_ih, 0.7), (net.bias_ih, 0.3)):
        assert 0.9 * bound < values.abs().max() <= bound and values.min() < 0 < values.max()
    for W in net.weight_between.double().numpy():
        np.testing.assert_allclose(np.linalg.svd(W)[1].max(), 0.7, rtol=1e-5)
    assert net.weight_between.shape == (1, 60, 60)


def test_the_seed_is_the_network():
    before = torch.get_rng_state()
    nets = [torch_ext.EchoStateNetwork(I, H, O, 2, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)  # torch's own is left alone
    a, b, c = (net.state_dict() for net in nets)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["weight_hh"], c["weight_hh"])
    generator = torch.Generator().manual_seed(3)
    first, second = (torch_ext.EchoStateNetwork(I, H, O, 2, seed=generator) for _ in range(2))
    assert torch.equal(first.weight_hh, nets[0].weight_hh)
    assert not torch.equal(first.weight_hh, second.weight_hh)
    double = torch_ext.EchoStateNetwork(I, H, O, 2, seed=3, dtype=torch.float64)
    assert torch.equal(double.weight_hh.float(), nets[0].weight_hh)


def test_what_was_long_ago_is_forgotten():
    """The echo state property, which a radius below 1 has in practice."""
    net = make(spectral_radius=0.8, num_layers=2)
    x = noise(1, 300, I)
    finals = [net(x, noise(2, 1, H).tanh())[1] for _ in range(2)]
    close(finals[:1], finals[1:], atol=1e-9, rtol=0)
    early = [net(x[:, :2], noise(2, 1, H).tanh())[1] for _ in range(2)]
    assert (early[0] - early[1]).abs().max() > 0.01


# ---- the readout ----


def least_squares(h, target, ridge):
    """Ridge regression by numpy, of rows that the penalty adds; none for the bias."""
    h, target = h.numpy(), target.numpy()
    n = h.shape[1]
    A = np.block([[h, np.ones((len(h), 1))], [ridge**0.5 * np.eye(n), np.zeros((n, 1))]])
    Y = np.concatenate([target, np.zeros((n, target.shape[1]))])
    W = np.linalg.lstsq(A, Y, rcond=None)[0]
    return torch.from_numpy(W[:-1].T.copy()), torch.from_numpy(W[-1])


def readout(net):
    return [net.weight_out.detach().clone(), net.bias_out.detach().clone()]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("ridge", [1e-3, 2.0])
@pytest.mark.parametrize("batch_first", [True, False])
def test_readout_is_numpys(options, ridge, batch_first):
    """With washout; and a state that goes on has none."""
    net = make(batch_first=batch_first, washout=5, **options)
    x, target = noise(B, 60, I), noise(B, 60, O) + 2
    order = (lambda v: v) if batch_first else (lambda v: v.transpose(0, 1))
    h, last = loop(net, x, net.init_state(B))
    final = net.fit(order(x), order(target), ridge)
    want = least_squares(h[:, 5:].flatten(0, 1), target[:, 5:].flatten(0, 1), ridge)
    bound = {"atol": 1e-7, "rtol": 1e-7}
    close(readout(net), want, **bound)
    close([final], [last])

    h, _ = loop(net, x, last)
    net.fit(order(x), order(target), ridge, state=last)
    close(readout(net), least_squares(h.flatten(0, 1), target.flatten(0, 1), ridge), **bound)

    alone = net.fit(x[0], target[0], ridge)
    assert alone.shape == (net.num_layers, H)
    h, _ = loop(net, x[:1], net.init_state(1))
    close(readout(net), least_squares(h[0, 5:], target[0, 5:], ridge), **bound)


def test_pieces_and_rows_add_up():
    net = make(washout=7, leak_rate=0.5)
    x, target = noise(B, 50, I), noise(B, 50, O)
    net.fit(x, target, 0.1)
    want = readout(net)
    other = make(washout=7, leak_rate=0.5)
    for b in range(B):
        state = other.partial_fit(x[b : b + 1, :20], target[b : b + 1, :20])
        state = other.partial_fit(x[b : b + 1, 20:], target[b : b + 1, 20:], state)
    other.solve(0.1)
    close(readout(other), want, atol=1e-9, rtol=1e-9)
    other.solve(3.0)  # the sums are there still
    net.fit(x, target, 3.0)
    close(readout(other), readout(net), atol=1e-9, rtol=1e-9)
    other.fit(x[:1], target[:1], 0.1)  # what was before is forgotten
    net.fit(x[:1], target[:1], 0.1)
    assert all(torch.equal(a, b) for a, b in zip(readout(other), readout(net), strict=True))


def test_lengths():
    net = make(washout=3)
    lengths = torch.tensor([30, 17, 2])
    x, target = noise(B, 30, I), noise(B, 30, O)
    clean = x.clone()
    for b, length in enumerate(lengths):
        x[b, length:] = target[b, length:] = torch.nan
    net.fit(x, target, 0.1, lengths=lengths)
    rows = [
        loop(net, clean[b : b + 1], net.init_state(1))[0][0, 3:n] for b, n in enumerate(lengths)
    ]
    targets = [target[b, 3:n] for b, n in enumerate(lengths)]
    close(
        readout(net), least_squares(torch.cat(rows), torch.cat(targets), 0.1), atol=1e-8, rtol=1e-8
    )


def test_fewer_steps_than_features():
    """Without a penalty it is the smallest readout of those that are exact."""
    net = make()
    x, target = noise(1, T, I), noise(1, T, O)
    net.fit(x, target, 0)
    close([net(x)[0]], [target], atol=1e-6, rtol=0)
    h = loop(net, x, net.init_state(1))[0][0].numpy()
    W = np.linalg.lstsq(np.concatenate([h, np.ones((T, 1))], 1), target[0].numpy(), rcond=None)[0]
    close(
        readout(net),
        [torch.from_numpy(W[:-1].T.copy()), torch.from_numpy(W[-1])],
        atol=1e-5,
        rtol=0,
    )
    net.fit(x * 0, target * 0, 1e-300)  # lost beside the rounding
    assert all(not w.any() for w in readout(net))


def test_single_precision_sums_in_double():
    net = make(dtype=torch.float32)
    wide = make()
    wide.load_state_dict(net.state_dict())
    x, target = noise(1, 3000, I), noise(1, 3000, O)
    net.fit(x.float(), target, 1e-2)
    wide.fit(x.float().double(), target, 1e-2)
    assert net.weight_out.dtype == torch.float32
    close([w.double() for w in readout(net)], readout(wide), atol=2e-4, rtol=1e-3)


# ---- what it is for ----


def narma(steps, generator):
    """The tenth-order nonlinear moving average of Atiya & Parlos 2000: its input and its output."""
    u = 0.5 * torch.rand(steps, dtype=torch.float64, generator=generator)
    y = torch.zeros(steps, dtype=torch.float64)
    for t in range(9, steps - 1):
        y[t + 1] = 0.3 * y[t] + 0.05 * y[t] * y[t - 9 : t + 1].sum() + 1.5 * u[t - 9] * u[t] + 0.1
    return u[:-1, None], y[1:, None]


def error(y, target):
    """Root of the mean square, in standard deviations of the target."""
    return ((y - target).square().mean() / target.var()).sqrt().item()


def test_narma_beside_linear_regression():
    """On unseen data, beside a linear regression on the same input and 29 before it."""
    u, y = narma(3500, torch.Generator().manual_seed(1))
    train, test = slice(0, 2500), slice(2500, None)
    net = torch_ext.EchoStateNetwork(
        1,
        150,
        1,
        batch_first=True,
        washout=100,
        input_scale=0.3,
        bias_scale=0.5,
        dtype=torch.float64,
    )
    state = net.fit(u[train], y[train], 1e-8)
    got = error(net(u[test], state)[0], y[test])

    window = nn.functional.pad(u.T, (29, 0)).unfold(1, 30, 1)[0]
    W, b = least_squares(window[train][100:], y[train][100:], 0)
    linear = error(window[test] @ W.T + b, y[test])
    print(f"errors: echo state network {got:.3f}, linear regression {linear:.3f}")
    assert got < 0.7 * linear < 0.5


def test_it_goes_on_by_itself():
    """Two sines, for a thousand steps of its own outputs."""
    t = torch.arange(2000, dtype=torch.float64)[:, None]
    series = torch.sin(0.2 * t) + 0.5 * torch.sin(0.311 * t)
    net = torch_ext.EchoStateNetwork(
        1, 100, 1, washout=200, input_scale=0.3, leak_rate=0.3, dtype=torch.float64
    )
    state = net.fit(series[:999], series[1:1000], 1e-8)
    with torch.no_grad():
        y, _ = net.generate(series[999:1000], state.unsqueeze(1), 1000)
    assert y.shape == (1000, 1, 1)
    print(f"greatest error {(y[:, 0] - series[1000:]).abs().max():.2e}")
    assert (y[:, 0] - series[1000:]).abs().max() < 0.02


def test_generate_is_steps():
    for batch_first in (True, False):
        net = make(output_size=I, batch_first=batch_first, num_layers=2)
        x, state = noise(B, I), noise(2, B, H).tanh()
        ys, want_state, u = [], state, x
        for _ in range(4):
            u, want_state = net.step(u, want_state)
            ys.append(u)
        close(net.generate(x, state, 4), [torch.stack(ys, int(batch_first)), want_state])
        y, same = net.generate(x, state, 0)
        assert y.shape == ((B, 0, I) if batch_first else (0, B, I)) and torch.equal(same, state)


# ---- copies, scripts, graphs ----


def test_copies():
    net = make(num_layers=2, washout=3)
    x, target = noise(B, T, I), noise(B, T, O)
    net.partial_fit(x, target)
    assert list(net.state_dict()) == [
        "weight_out",
        "bias_out",
        "weight_ih",
        "weight_between",
        "weight_hh",
        "bias_ih",
    ]
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for other in copies:
        assert torch.equal(other(x)[0], net(x)[0])
        other.solve(0.1)
    net.solve(0.1)
    for other in copies:
        close(readout(other), readout(net))
    other = make(num_layers=2, seed=7)  # another reservoir, until it is loaded
    assert not torch.equal(other(x)[1], net(x)[1])
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other(x), net(x), strict=True))


def test_repr_says_what_differs_from_the_defaults():
    net = torch_ext.EchoStateNetwork(2, 20, 3, leak_rate=0.5, washout=10)
    assert repr(net) == "EchoStateNetwork(2, 20, 3, leak_rate=0.5, washout=10)"


@script_warnings
@pytest.mark.parametrize("options", CASES, ids=str)
def test_script(options):
    net = make(output_size=I, **options)
    net.partial_fit(noise(B, T, I), noise(B, T, I))  # whose sums are Python's
    scripted, file = torch.jit.script(net), io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    x, state = noise(B, T, I), noise(net.num_layers, B, H)
    loaded = torch.jit.load(file)
    for other in (scripted, loaded):
        for arguments in ((x,), (x, state), (x[0],)):
            close(other(*arguments), net(*arguments))
        close(other.features(x, state), net.features(x, state))
        close(other.step(x[:, 0], state), net.step(x[:, 0], state))
        close(other.generate(x[:, 0], state, 3), net.generate(x[:, 0], state, 3))
        close([other.init_state(4)], [net.init_state(4)])
        with pytest.raises(
            Exception, match=r"x has shape \(3, 12, 1\), expected \(B, T, input_size"
        ):
            other(x[..., 1:])
    loaded.float()  # buffers go along
    close(loaded(x.float()), [v.float() for v in net(x)], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", CASES[1:3], ids=str)
def test_export_with_dynamic_sizes(options):
    net = make(**options)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    arguments = (noise(B, T, I), noise(net.num_layers, B, H))
    dynamic = ({0: batch, 1: steps}, {1: batch})
    program = torch.export.export(net, arguments, dynamic_shapes=dynamic).module()
    for rows, length in ((B, T), (5, 31)):
        x, state = noise(rows, length, I), noise(net.num_layers, rows, H)
        close(program(x, state), net(x, state))


@pytest.mark.slow
def test_compiles_without_breaks():
    torch._dynamo.reset()
    net = make(num_layers=2, leak_rate=0.5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, length in ((B, T), (5, 31)):
        x = noise(rows, length, I)
        close(compiled(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net = make(dtype=torch.float32, num_layers=2, leak_rate=0.5)
    x, target = noise(B, 200, I, dtype=torch.float32), noise(B, 200, O, dtype=torch.float32)
    net.fit(x, target, 1.0)
    y, final = net(x)
    bound = {"atol": 0.1, "rtol": 0.1}
    with torch.autocast("cpu", dtype):
        got, state = net(x)
    assert got.dtype == dtype and state.dtype == torch.float32
    close([got.float(), state], [y, final], **bound)
    half = copy.deepcopy(net).to(dtype)
    got, state = half(x.to(dtype))
    assert got.dtype == dtype and state.dtype == torch.float32
    close([got.float(), state], [y, final], **bound)
    half.fit(x.to(dtype), target.to(dtype), 1.0)
    close([half(x.to(dtype))[0].float()], [y], **bound)


# ---- errors ----


def errors():
    E = torch_ext.EchoStateNetwork
    net = E(I, H, O, batch_first=True, washout=4)
    x, y = noise(B, T, I, dtype=torch.float32), noise(B, T, O, dtype=torch.float32)
    state = net.init_state(B)
    yield (
        lambda: net(x[..., 1:]),
        ValueError,
        r"x has shape \(3, 12, 1\), expected \(B, T, input_size=2\)",
    )
    yield lambda: net(x[0, 0]), ValueError, r"x has shape \(2\), expected"
    yield lambda: net(x.double()), TypeError, "x has dtype torch.float64, expected torch.float32"
    yield lambda: net([1.0]), TypeError, "x is list, expected a tensor"
    yield (
        lambda: net(x, state[:, 1:]),
        ValueError,
        r"state has shape \(1, 2, 20\), expected \(num_lay",
    )
    yield lambda: net(x[0], state), ValueError, r"expected \(num_layers=1, hidden_size=20\)"
    yield (
        lambda: net(x, state.long()),
        TypeError,
        "state has dtype torch.int64, expected torch.float32",
    )
    yield lambda: net(x, [state]), TypeError, "state is .*, expected a tensor"
    yield (
        lambda: net.step(x, state),
        ValueError,
        r"step: x has shape \(3, 12, 2\), expected \(B, inp",
    )
    yield (
        lambda: net.step(x[:, 0], state[0]),
        ValueError,
        r"step: state has shape \(3, 20\), expected",
    )
    yield (
        lambda: net.generate(x[:, 0], state, 3),
        ValueError,
        "output_size is 3, expected input_size=2",
    )
    square = E(I, H, I)
    yield (
        lambda: square.generate(x[:, 0], state, -1),
        ValueError,
        "num_steps is -1, expected at least",
    )
    yield (
        lambda: net.fit(x, y[:, 1:]),
        ValueError,
        r"target has shape \(3, 11, 3\), expected \(3, 12, 3\)",
    )
    yield (
        lambda: net.fit(x, y.long()),
        TypeError,
        "target is torch.int64, expected a floating-point",
    )
    yield lambda: net.fit(x, None), TypeError, "target is NoneType, expected a floating-point"
    yield lambda: net.fit(None, y), TypeError, "x is NoneType, expected a tensor"
    yield (
        lambda: net.fit(x, y, -1.0),
        ValueError,
        "ridge is -1.0, expected a finite number, at least 0",
    )
    yield lambda: net.fit(x, y, "1"), TypeError, "ridge is '1', expected a number"
    yield (
        lambda: net.fit(x * torch.inf, y),
        ValueError,
        "x or target has values that are not finite",
    )
    yield (
        lambda: net.fit(x, y * torch.nan),
        ValueError,
        "x or target has values that are not finite",
    )
    yield (
        lambda: net.fit(x[:, :4], y[:, :4]),
        ValueError,
        "x had no step, expected .* beyond washout=4",
    )
    yield lambda: E(I, H, O).solve(), ValueError, "x had no step, expected"
    yield (
        lambda: net.fit(x, y, lengths=torch.ones(2)),
        ValueError,
        r"lengths has shape \(2\), expected",
    )
    yield lambda: net.fit(x, y, lengths=torch.ones(3)), TypeError, "lengths has dtype torch.float32"
    yield lambda: net.fit(x, y, lengths=[1, 2, 3]), TypeError, "lengths is list, expected"
    long = torch.tensor([0, 1, 13])
    yield (
        lambda: net.fit(x, y, lengths=long),
        ValueError,
        "from 0 to 13, expected values from 0 to T=12",
    )
    yield lambda: E(0, H, O), ValueError, "input_size is 0, expected at least 1"
    yield lambda: E(I, 2.0, O), TypeError, "hidden_size is 2.0, expected an integer"
    yield lambda: E(I, H, True), TypeError, "output_size is True, expected an integer"
    yield lambda: E(I, H, O, 0), ValueError, "num_layers is 0, expected at least 1"
    yield lambda: E(I, H, O, washout=-1), ValueError, "washout is -1, expected at least 0"
    yield lambda: E(I, H, O, batch_first=1), TypeError, "batch_first is 1, expected"
    yield (
        lambda: E(I, H, O, spectral_radius=-0.1),
        ValueError,
        "spectral_radius is -0.1, expected a fin",
    )
    yield lambda: E(I, H, O, input_scale=float("nan")), ValueError, "input_scale is nan, expected"
    yield lambda: E(I, H, O, bias_scale=None), TypeError, "bias_scale is None, expected a number"
    yield lambda: E(I, H, O, density=0), ValueError, r"density is 0, expected a number in \(0, 1\]"
    yield (
        lambda: E(I, H, O, leak_rate=1.1),
        ValueError,
        r"leak_rate is 1.1, expected a number in \(0, 1\]",
    )
    yield (
        lambda: E(I, H, O, seed=0.5),
        TypeError,
        "seed is 0.5, expected an integer or a torch.Generator",
    )


def test_bad_arguments():
    for call, error, text in errors():
        with pytest.raises(error, match=text):
            call()


def test_examples_in_docstrings():
    module = importlib.import_module("torch_ext.echo_state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module, extraglobs={"torch": torch, "torch_ext": torch_ext})
    assert result.failed == 0 and result.attempted > 0
    cls = torch_ext.EchoStateNetwork
    assert cls.__name__ in torch_ext.__all__
    assert all(part in cls.__doc__ for part in ("Args:", "Attributes:", "Raises:", "Example:"))
