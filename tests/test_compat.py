"""torch_ext.compat: other packages' names and weights, against those packages where installed."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

import torch_ext
from torch_ext.compat import minGRU_pytorch as ours

B, T, D = 3, 9, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # the peer's log space loses digits
EXACT = {"atol": 1e-10, "rtol": 1e-10}
NAMES = ["minGRU", "minLSTM"]
SHAPES = [{}, {"expansion_factor": 1.5}, {"expansion_factor": 2.0, "proj_out": False}]
SHAPES += [{"proj_out": True}]

needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("minGRU_pytorch") is None, reason="minGRU-pytorch is not installed"
)


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)


def peer(name, **options):
    # The package has a module and a class of each name; only the submodules' are always the class.
    return getattr(importlib.import_module(f"minGRU_pytorch.{name}"), name)(D, **options)


def g(x):
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def plain(name, weight, x, h):
    """The states of the peer's step-by-step form, one step after the other."""
    states = []
    for t in range(x.shape[1]):
        candidate, *gates = (x[:, t] @ weight.T).chunk(2 if name == "minGRU" else 3, 1)
        gates = [gate.sigmoid() for gate in gates]
        if name == "minGRU":
            h = (1 - gates[0]) * h + gates[0] * g(candidate)
        else:
            h = (gates[0] * h + gates[1] * g(candidate)) / (gates[0] + gates[1])
        states.append(h)
    return torch.stack(states, 1)


def projection(layer):
    return next(p for name, p in layer.named_parameters() if name.startswith("to_hidden"))


# ---- minGRU_pytorch: the modules ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@torch.no_grad()
def test_is_the_plain_loop(name, options, with_state):
    layer = getattr(ours, name)(D, **options).double()
    width = layer.dim_inner
    x = torch.randn(B, T, D, dtype=torch.float64)
    start = torch.rand(B, width, dtype=torch.float64) if with_state else x.new_zeros(B, width)
    want = plain(name, projection(layer), x, start)

    hidden = start.unsqueeze(1) if with_state else None
    y, last = layer(x, hidden, return_next_prev_hidden=True)
    torch.testing.assert_close(y, layer.to_out(want), **EXACT)
    torch.testing.assert_close(last, want[:, -1:], **EXACT)
    assert torch.equal(layer(x, hidden), y)

    ys = []  # chunks and single steps are the whole
    for piece in x.split([3, 1, 1, 4], 1):
        y_piece, hidden = layer(piece, hidden, return_next_prev_hidden=True)
        ys.append(y_piece)
    torch.testing.assert_close(torch.cat(ys, 1), y, **EXACT)


@needs_peer
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_is_the_peer(name, options):
    """Its weights load as they are and give its outputs and gradients."""
    theirs, layer = peer(name, **options), getattr(ours, name)(D, **options)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in layer.state_dict().items()
    }
    layer.load_state_dict(theirs.state_dict())
    weight_y = None
    results = []
    x = torch.randn(B, T, D)
    for module in (theirs, layer):
        leaf = x.clone().requires_grad_()
        y, hidden = module(leaf, return_next_prev_hidden=True)
        weight_y = torch.randn_like(y) if weight_y is None else weight_y
        ((y * weight_y).sum() + hidden.sum()).backward()
        results.append([y, hidden, leaf.grad, *(p.grad for p in module.parameters())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)

    # One step from a state, and none, where the two conventions agree.
    _, hidden = theirs(x, return_next_prev_hidden=True)
    for state in (hidden, None):
        for want, got in zip(
            theirs(x[:, :1], state, return_next_prev_hidden=True),
            layer(x[:, :1], state, return_next_prev_hidden=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, **CLOSE)


@needs_peer
@torch.no_grad()
def test_handing_a_state_to_several_steps():
    """The peer's minGRU agrees with its own steps there, and so do we; its minLSTM begins with
    ``h + 0.5``: ours follows its steps."""
    x, more = torch.randn(B, T, D), torch.randn(B, T, D)
    for name in NAMES:
        theirs, layer = peer(name), getattr(ours, name)(D)
        layer.load_state_dict(theirs.state_dict())
        _, hidden = theirs(x, return_next_prev_hidden=True)
        steps, state = [], hidden
        for t in range(T):
            y_t, state = theirs(more[:, t : t + 1], state, return_next_prev_hidden=True)
            steps.append(y_t)
        steps = torch.cat(steps, 1)
        torch.testing.assert_close(layer(more, hidden), steps, **CLOSE)
        whole = theirs(more, hidden)
        if name == "minGRU":
            torch.testing.assert_close(whole, steps, **CLOSE)
        else:
            assert not torch.allclose(whole, steps, atol=0.01)
            torch.testing.assert_close(layer(more, hidden + 0.5), whole, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_of_the_state(name):
    layer, x = getattr(ours, name)(D).bfloat16(), torch.randn(B, T, D).bfloat16()
    y, hidden = layer(x, return_next_prev_hidden=True)
    assert y.dtype == torch.bfloat16 and hidden.dtype == torch.float32
    a, b = layer(x, hidden), layer(x, hidden.bfloat16())
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        y, hidden = layer.float()(x.float(), hidden, return_next_prev_hidden=True)
    assert y.dtype == torch.bfloat16 and hidden.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_bad_state(name):
    layer, x = getattr(ours, name)(D), torch.randn(B, T, D)
    for state in (torch.zeros(B, D), torch.zeros(1, B, D), torch.zeros(B, 1, D + 1)):
        with pytest.raises(ValueError) as raised:
            layer(x, state)
        assert f"{name}: prev_hidden has shape {tuple(state.shape)}, expected (B=3, 1, dim" in str(
            raised.value
        )


# ---- minGRU_pytorch: the loader ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("source", ["module", "state_dict", "file"])
@torch.no_grad()
def test_load(name, options, source, tmp_path):
    layer = getattr(ours, name)(D, **options)
    given = {"module": layer, "state_dict": layer.state_dict(), "file": tmp_path / "layer.pt"}
    torch.save(layer.state_dict(), given["file"])
    rnn, to_out = ours.load(given[source])
    assert type(rnn) is {"minGRU": torch_ext.MinGRU, "minLSTM": torch_ext.MinLSTM}[name]
    assert (to_out is None) == isinstance(layer.to_out, torch.nn.Identity)

    x, start = torch.randn(B, T, D), torch.rand(B, 1, layer.dim_inner)
    want, want_hidden = layer(x, start, return_next_prev_hidden=True)
    y, state = rnn(x, start.transpose(0, 1))
    torch.testing.assert_close(y if to_out is None else to_out(y), want)
    torch.testing.assert_close(state.transpose(0, 1), want_hidden)
    rnn.weight_ih_l0.zero_()  # a copy
    assert projection(layer).any()


@needs_peer
@torch.no_grad()
def test_load_from_a_whole_model():
    min_lm = importlib.import_module("minGRU_pytorch.minLM").minLM
    x = torch.randn(B, T, D)
    for use_lstm in (False, True):
        model = min_lm(num_tokens=5, dim=D, depth=2, use_lstm=use_lstm).double()
        rnn, to_out = ours.load(model, prefix="layers.1.2.")
        assert rnn.weight_ih_l0.dtype == torch.float64
        theirs = model.layers[1][2]
        torch.testing.assert_close(to_out(rnn(x.double())[0]), theirs(x.double()), **CLOSE)


def test_load_of_something_else():
    with pytest.raises(ValueError) as raised:
        ours.load(torch.nn.Linear(2, 2), prefix="rnn.")
    for text in ("rnn.to_hidden_and_gate.weight", "expected one of them", "['weight', 'bias']"):
        assert text in str(raised.value)


# ---- install ----


def run(program, environment, tmp_path):
    subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, timeout=300, cwd=tmp_path
    )


def test_install(child_environment, tmp_path):
    program = """
import importlib.util
import torch_ext
real = importlib.util.find_spec  # as if the package were not installed
importlib.util.find_spec = lambda name, *rest: None if "minGRU" in name else real(name, *rest)
assert torch_ext.compat.install("minGRU_pytorch") == ["minGRU_pytorch"]
assert torch_ext.compat.install()[0] == "minGRU_pytorch"
from minGRU_pytorch import minGRU
from minGRU_pytorch.minGRU import minGRU as same
from minGRU_pytorch.minLSTM import minLSTM
assert minGRU is same is torch_ext.compat.minGRU_pytorch.minGRU
assert minLSTM is torch_ext.compat.minGRU_pytorch.minLSTM
"""
    run(program, child_environment, tmp_path)


@needs_peer
def test_install_leaves_an_installed_package_alone(child_environment, tmp_path):
    program = """
import torch_ext
assert "minGRU_pytorch" not in torch_ext.compat.install()
import minGRU_pytorch
assert "torch_ext" not in minGRU_pytorch.__file__
assert torch_ext.compat.install("minGRU_pytorch") == []
"""
    run(program, child_environment, tmp_path)


def test_install_of_an_unknown_name():
    with pytest.raises(ValueError, match=r'names has "nothing", expected some of \[.minGRU_py'):
        torch_ext.compat.install("nothing")
