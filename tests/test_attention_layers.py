"""Retention and LinearAttention against the papers' quadratic forms, in chunks and in steps."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from cases import close
from torch._dynamo.testing import CompileCounterWithBackend

import torch_ext

script_warnings = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is :DeprecationWarning",
    r"ignore:`torch\.jit\.\w+` is :FutureWarning",
)

D, HEADS, B, T = 8, 2, 3, 11
LAYERS = {
    "retention": (torch_ext.Retention, {}),
    "retention-plain": (
        torch_ext.Retention,
        {"rotate": False, "gate": False, "decay": (0.5, 1.0), "value_dim": 6, "bias": True},
    ),
    "retention-eps": (torch_ext.Retention, {"norm_eps": 0.5, "value_dim": 4, "decay": (0.9, 0.4)}),
    "linear": (torch_ext.LinearAttention, {}),
    "linear-relu": (
        torch_ext.LinearAttention,
        {"feature_map": "relu", "d_keys": 3, "d_values": 5, "eps": 0.5, "bias": False},
    ),
    "linear-raw": (torch_ext.LinearAttention, {"feature_map": "identity", "normalize": False}),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
BOTH = pytest.mark.parametrize("name", ["retention", "linear"])


def make(name, generator, dtype=torch.float64):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    kind, options = LAYERS[name]
    layer = kind(D, HEADS, **options, dtype=dtype)
    with torch.no_grad():  # torchscale's first values would hide the norm's eps
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def inputs(generator, rows=B, steps=T, dtype=torch.float64):
    return torch.randn(rows, steps, D, generator=generator, dtype=torch.float64).to(dtype)


def tensors(state):
    return state if isinstance(state, tuple) else (state,)


def rotary(x):
    """xPos' rotation as complex numbers: pair p of step t by t / 10000^(p / (P - 1))."""
    pairs = x.shape[-1] // 2
    theta = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / max(pairs - 1, 1))
    z = torch.view_as_complex(x.unflatten(-1, (pairs, 2)).contiguous())
    z = z * torch.exp(1j * torch.arange(x.shape[1])[:, None] * theta)[:, None]
    return torch.view_as_real(z).flatten(-2)


def formula(name, layer, x):
    """Every step with every other one before it."""
    options, steps = LAYERS[name][1], torch.arange(x.shape[1])
    distance = steps[:, None] - steps
    causal = distance >= 0
    if name.startswith("retention"):
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        if options.get("rotate", True):
            q, k = rotary(q), rotary(k)
        gamma = torch.tensor(options.get("decay", [1 - 1 / 32, 1 - 1 / 64]), dtype=x.dtype)
        weights = torch.where(causal, gamma[:, None, None] ** distance.clamp(min=0), 0)
        scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1]) * weights
        h = torch.einsum("bhts,bshv->bthv", scores, v)
        h = h / (h.square().mean(-1, keepdim=True) + options.get("norm_eps", 1e-5)).sqrt()
        y = h.flatten(-2)
        if options.get("gate", True):
            g = layer.g_proj(x)
            y = g * torch.sigmoid(g) * y
        return layer.out_proj(y)
    q, k, v = (
        p(x).unflatten(-1, (HEADS, -1))
        for p in (layer.query_projection, layer.key_projection, layer.value_projection)
    )
    phi = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}
    phi = phi[options.get("feature_map", "elu")]
    scores = torch.where(causal, torch.einsum("bthk,bshk->bhts", phi(q), phi(k)), 0)
    h = torch.einsum("bhts,bshv->bthv", scores, v)
    if options.get("normalize", True):
        h = h / (scores.sum(-1).mT + options.get("eps", 1e-6))[..., None]
    return layer.out_projection(h.flatten(-2))


@EVERY
def test_formula(name, generator):
    layer, x = make(name, generator), inputs(generator).requires_grad_()
    want, got = formula(name, layer, x), layer(x)
    close(got.detach(), want.detach(), factor=8)
    leaves = [x, *layer.parameters()]
    for g, w in zip(
        torch.autograd.grad(got.sin().sum(), leaves),
        torch.autograd.grad(want.sin().sum(), leaves),
        strict=True,
    ):
        close(g, w, grad=True, factor=8)


@EVERY
def test_chunks_and_steps(name, generator):
    """With their gradients, which flow through the states that are handed over."""
    layer, x = make(name, generator), inputs(generator)

    def run(pieces):
        state, outputs, at = layer.init_state(B), [], 0
        for steps in pieces:
            if steps == "step":
                y, state = layer.step(x[:, at], state)
                y, steps = y[:, None], 1
            else:
                y, state = layer.prefill(x[:, at : at + steps], state)
            outputs.append(y)
            at += steps
        y = torch.cat(outputs, 1)
        loss = y.sin().sum() + sum(part.square().sum() for part in tensors(state))
        return [y, *tensors(state), *torch.autograd.grad(loss, list(layer.parameters()))]

    want = run([T])
    for pieces in ([1, 1, 9], [5, 0, 6], ["step"] * T, [4, "step", 6]):
        for got, w in zip(run(pieces), want, strict=True):
            close(got.detach(), w.detach(), grad=True, factor=8)


@EVERY
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding(name, padding, generator):
    """Every row as it would be alone, with NaN in the padding, and no gradient there."""
    layer, x = make(name, generator), inputs(generator, 4)
    lengths = torch.tensor([T, 4, 1, 0])
    steps = torch.arange(T) if padding == "right" else torch.arange(T).flip(0)
    past = steps >= lengths[:, None]
    x[past] = torch.nan
    x.requires_grad_()
    starts = None
    if padding == "right":
        _, starts = layer.prefill(inputs(generator, 4))
    y, state = layer.prefill(x, starts, lengths, padding)
    assert not y[past].any()
    for b, length in enumerate(lengths.tolist()):
        here = slice(0, length) if padding == "right" else slice(T - length, T)
        start = None if starts is None else tuple(s[b : b + 1] for s in tensors(starts))
        if start is not None and not isinstance(starts, tuple):
            start = start[0]
        want, want_state = layer.prefill(x[b : b + 1, here], start)
        close(y[b : b + 1, here].detach(), want.detach())
        for a, w in zip(tensors(state), tensors(want_state), strict=True):
            close(a[b : b + 1].detach(), w.detach())
    y.sum().backward()
    assert not x.grad[past].any() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    if starts is None:
        assert torch.equal(layer(x, lengths, padding), y)


def test_long_sequences_keep_their_angles(generator):
    """States are turned as seen from the next step: 1e5 steps lose no more than one does."""
    layer = make("retention", generator, torch.float32)
    x = inputs(generator, 1, 40, torch.float32)
    before = inputs(generator, 1, 100_000, torch.float32)
    with torch.no_grad():
        _, state = layer.prefill(before)
        got, _ = layer.prefill(x, state)
        exact = copy.deepcopy(layer).double()
        _, state = exact.prefill(before[:, -3000:].double())  # what was earlier has faded
        want, _ = exact.prefill(x.double(), state)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32(name, dtype, generator):
    layer, x = make(name, generator, torch.float32), inputs(generator, dtype=torch.float32)
    want, _ = layer.prefill(x)
    bound = {"atol": 64 * torch.finfo(dtype).eps, "rtol": 64 * torch.finfo(dtype).eps}
    with torch.autocast("cpu", dtype):
        y, state = layer.prefill(x, None, torch.tensor([T, 4, 0]))
        _, stepped = layer.step(x[:, 0], state)
        y, _ = layer.prefill(x)
    assert {part.dtype for part in (*tensors(state), *tensors(stepped))} == {torch.float32}
    torch.testing.assert_close(y.float(), want, **bound)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    half = copy.deepcopy(layer).to(dtype)
    y, state = half.prefill(x.to(dtype), None, torch.tensor([T, 4, 0]))
    z, stepped = half.step(x[:, 0].to(dtype), state)
    assert y.dtype == z.dtype == dtype
    assert {part.dtype for part in (*tensors(state), *tensors(stepped))} == {torch.float32}
    torch.testing.assert_close(y[0].float(), want[0], **bound)


@script_warnings
@EVERY
def test_script(name, generator):
    layer, x = make(name, generator, torch.float32), inputs(generator, dtype=torch.float32)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    loaded, lengths = torch.jit.load(file), torch.tensor([T, 0, 4])
    close(loaded(x, lengths).detach(), layer(x, lengths).detach())
    y, state = loaded.prefill(x)
    close(y.detach(), layer.prefill(x)[0].detach())
    close(loaded.step(x[:, 0], state)[0].detach(), layer.step(x[:, 0], state)[0].detach())


@BOTH
def test_compiles_and_exports(name, generator):
    layer = make(name, generator, torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows, steps in [(6, 7), (3, 13), (2, 9)]:
        x, lengths = inputs(generator, rows, steps, torch.float32), torch.arange(rows) + 1
        results = []
        for run in (compiled, layer):
            layer.zero_grad()
            y = run(x, lengths)
            y.sin().sum().backward()
            results.append([y, *(p.grad.clone() for p in layer.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("steps")}
    program = torch.export.export(
        layer.eval(), (inputs(generator, dtype=torch.float32),), dynamic_shapes=(sizes,)
    )
    x = inputs(generator, 2, 33, torch.float32)
    close(program.module()(x).detach(), layer(x).detach())


def test_parameters():
    layer = torch_ext.Retention(64, 4)
    shapes = {"q_proj": (64, 64), "k_proj": (64, 64), "v_proj": (128, 64), "g_proj": (128, 64)}
    shapes["out_proj"] = (64, 128)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        f"{name}.weight": shape for name, shape in shapes.items()
    }
    for name, (rows, columns) in shapes.items():
        gain = 0.5 if name == "out_proj" else 2**-2.5
        bound = gain * math.sqrt(6 / (rows + columns))
        size = getattr(layer, name).weight.abs().max()
        assert 0.95 * bound < size <= bound
    assert layer.decay == [1 - 2 ** (-5 - head) for head in range(4)]
    layer = torch_ext.LinearAttention(12, 3, d_values=5)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items() if "weight" in k} == {
        "query_projection.weight": (12, 12),
        "key_projection.weight": (12, 12),
        "value_projection.weight": (15, 12),
        "out_projection.weight": (12, 15),
    }


def bad_calls():
    retention, linear = torch_ext.Retention, torch_ext.LinearAttention
    yield lambda: retention(8, 3), "embed_dim is 8, expected a multiple of num_heads=3"
    yield lambda: retention(6, 2), "embed_dim / num_heads is 3, expected an even number"
    yield lambda: retention(8, 2, 5), "value_dim is 5, expected a multiple of num_heads=2"
    yield lambda: retention(8, 0), "num_heads is 0, expected at least 1"
    yield lambda: retention(8, 2, decay=(0.5,)), r"decay is \(0.5,\), expected num_heads=2 numbers"
    yield lambda: retention(8, 2, decay=(0.5, 1.5)), r"decay is \(0.5, 1.5\), expected num_heads=2"
    yield lambda: linear(8, 3), "d_model is 8, expected a multiple of n_heads=3"
    yield lambda: linear(8, 2, feature_map="softmax"), "feature_map is 'softmax', expected \"elu\""
    yield lambda: linear(8, 2, d_keys=0), "d_keys is 0, expected at least 1"
    for layer, size in [(retention(8, 2), "embed_dim"), (linear(8, 2), "d_model")]:
        x, state = torch.zeros(2, 3, 8), layer.init_state(2)
        short = tuple(s[:1] for s in tensors(state))
        short = short if isinstance(state, tuple) else short[0]
        yield lambda f=layer, x=x: f(x[0]), rf"x has shape \(3, 8\), expected \(B, T, {size}=8\)"
        yield lambda f=layer, x=x, s=state: f.step(x, s), r"step: x has shape \(2, 3, 8\), expected"
        yield lambda f=layer, x=x, s=short: f.prefill(x, s), r"has shape \(1, 2, .*expected \(B=2"
        yield lambda f=layer, x=x: f(x, torch.tensor([4, 1])), "lengths has values from 1 to 4"


@pytest.mark.parametrize("call, text", list(bad_calls()), ids=lambda v: str(v)[:40])
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=f"(Retention|LinearAttention)[a-z.]*:? ?.*{text}"):
        call()


@pytest.mark.parametrize("name", ["retention", "linear"])
def test_something_else_than_a_state(name, generator):
    layer = make(name, generator)
    with pytest.raises(TypeError, match=r"state is .*, expected .*, as init_state makes it"):
        layer.step(inputs(generator)[:, 0], [None, None])


@BOTH
def test_wrong_dtypes(name, generator):
    """Each error names what is wrong, not what the layer made of it."""
    layer, x = make(name, generator, torch.float32), inputs(generator, dtype=torch.float32)
    state = layer.init_state(B)
    half = [s.half() for s in tensors(state)]
    half = half if isinstance(state, tuple) else half[0]
    for call in (lambda: layer.step(x[:, 0], half), lambda: layer.prefill(x, half)):
        with pytest.raises(TypeError, match=r"(state|S) has dtype float16, expected float32"):
            call()
    with pytest.raises(TypeError, match=r"lengths is list, expected a tensor of integers"):
        layer(x, [1] * B)


@BOTH
def test_reset_parameters(name, generator):
    """The constructor's values again, as after to_empty."""
    kind, options = LAYERS[name]
    torch.manual_seed(3)
    want = kind(D, HEADS, **options)
    with torch.device("meta"):
        layer = kind(D, HEADS, **options)
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    for (key, got), parameter in zip(layer.named_parameters(), want.parameters(), strict=True):
        # Retention's constructor has drawn torch.nn's values first
        assert got.isfinite().all(), key
        if parameter.abs().max() > 0:
            assert 0.8 < got.abs().max() / parameter.abs().max() < 1.25, key
    if name == "linear":
        for got, parameter in zip(layer.parameters(), want.parameters(), strict=True):
            assert torch.equal(got, parameter)


@pytest.mark.parametrize("name", ["retention", "linear"])
def test_learns_to_look_back(name, generator):
    """The first input's sign, after 20 steps of noise: an error of chance is 0.69."""
    torch.manual_seed(2)
    kind, options = LAYERS[name]
    layer, head = kind(D, HEADS, **options), torch.nn.Linear(D, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
    for _ in range(120):
        x = torch.randn(32, 20, D) * 0.3
        x[:, :, 1] = 0
        x[:, 0, :2] = torch.stack([torch.randint(0, 2, (32,)) * 2.0 - 1, torch.ones(32)], 1)
        loss = F.binary_cross_entropy_with_logits(
            head(layer(x)[:, -1]).squeeze(1), (x[:, 0, 0] > 0).float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
