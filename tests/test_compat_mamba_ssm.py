"""torch_ext.compat.mamba_ssm and .causal_conv1d against loops over time in float64, written here."""

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import close
from torch.multiprocessing.reductions import StorageWeakRef

import torch_ext
from torch_ext.compat import _mamba_ssm_ops, causal_conv1d, mamba_ssm

B, D, L, N = 2, 6, 11, 3
DOUBLE, SINGLE = torch.float64, torch.float32
COMPLEX = torch.complex128


@pytest.fixture
def draw(generator):
    """Random tensors; complex ones of two."""

    def draw(*shape, dtype=DOUBLE, requires=True):
        if dtype.is_complex:
            x = torch.randn(*shape, 2, generator=generator, dtype=DOUBLE)
            x = torch.view_as_complex(x).to(dtype)
        else:
            x = torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)
        return x.requires_grad_(requires)

    return draw


def same(f, reference, x, generator, **tolerance):
    """Values and gradients of all outputs. Inputs that are None are passed on."""
    leaves = [y for y in x if y is not None and y.requires_grad]

    def results(f):
        outputs = f(*x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for y in outputs:
            assert y.requires_grad or not leaves
        state = generator.get_state()
        weights = [torch.randn(y.shape, generator=generator, dtype=DOUBLE) for y in outputs]
        generator.set_state(state)
        loss = sum((w * (y.real + (y.imag if y.is_complex() else 0))).sum()
                   for w, y in zip(weights, outputs, strict=True))  # fmt: skip
        return outputs, torch.autograd.grad(loss, leaves)

    (got, got_grads), (want, want_grads) = results(f), results(reference)
    for g, w in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert g.shape == w.shape and g.dtype is w.dtype
        torch.testing.assert_close(g, w, **tolerance)


# ---- causal_conv1d: loops ----


def conv_loop(x, weight, bias=None, before=None, activation=None):
    """``(B, D, L)``: every output by its own sum."""
    width = weight.shape[1]
    if before is None:
        before = x.new_zeros(*x.shape[:2], width - 1)
    seen = torch.cat([before, x], -1)
    outputs = []
    for t in range(x.shape[2]):
        y = sum(weight[:, k] * seen[:, :, t + k] for k in range(width))
        y = y if bias is None else y + bias
        outputs.append(y / (1 + torch.exp(-y)) if activation else y)
    return torch.stack(outputs, -1), seen[..., seen.shape[-1] - (width - 1) :]


LAYOUTS = pytest.mark.parametrize("layout", ["channel-first", "channel-last", "sliced"])


def lay(x, layout):
    """The same values with other strides, differentiable."""
    if layout == "channel-last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    return x


@LAYOUTS
@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("options", ["", "bias", "bias states silu", "states", "swish"])
def test_conv(layout, width, options, draw, generator):
    x = [draw(B, D, L), draw(D, width), draw(D) if "bias" in options else None]
    x.append(draw(B, D, width - 1) if "states" in options else None)
    activation = next((a for a in ("silu", "swish") if a in options), None)

    def ours(function):
        def run(x, weight, bias, before):
            y, final = function(
                lay(x, layout), weight, bias, initial_states=before, return_final_states=True,
                activation=activation,
            )  # fmt: skip
            return (y, final) if width > 1 else y

        return run

    def loop(*x):
        y, final = conv_loop(*x, activation)
        return (y, final) if width > 1 else y

    same(ours(causal_conv1d.causal_conv1d_fn), loop, x, generator)
    same(ours(causal_conv1d.causal_conv1d_ref), loop, x, generator)
    y = causal_conv1d.causal_conv1d_fn(x[0], x[1], x[2], initial_states=x[3], activation=activation)
    torch.testing.assert_close(y, loop(*x)[0] if width > 1 else loop(*x))


def test_conv_hands_over_views(draw, monkeypatch):
    """What reaches the operator is the caller's memory."""
    seen = []
    monkeypatch.setattr(
        causal_conv1d,
        "causal_conv1d",
        lambda x, *rest, **options: seen.append(x) or torch_ext.causal_conv1d(x, *rest, **options),
    )
    x, weight = draw(1, D, L, requires=False), draw(D, 4, requires=False)
    wide = draw(B, L, D, requires=False).transpose(1, 2)
    causal_conv1d.causal_conv1d_fn(x, weight)
    causal_conv1d.causal_conv1d_fn(wide, weight)
    index = torch.zeros(1, L, dtype=torch.int32)
    causal_conv1d.causal_conv1d_fn(x, weight, seq_idx=index)
    causal_conv1d.causal_conv1d_fn(wide, weight, seq_idx=index.expand(B, L))
    for given, got in zip((x, wide, x, wide), seen, strict=True):
        assert got.data_ptr() == given.data_ptr()


def test_conv_final_states_out(draw):
    x, weight = draw(B, D, L), draw(D, 4)
    out = torch.zeros(B, D, 3, dtype=DOUBLE)
    for _ in range(2):  # as in a training loop, which has one buffer
        y, final = causal_conv1d.causal_conv1d_fn(
            x, weight, return_final_states=True, final_states_out=out
        )
        assert torch.equal(out, x[..., -3:]) and torch.equal(final, out)
        (g,) = torch.autograd.grad(final.sum() + 0 * y.sum(), x)
        assert torch.equal(g, F.pad(torch.ones(B, D, 3), (L - 3, 0)).to(DOUBLE))
    with torch.no_grad():
        _, final = causal_conv1d.causal_conv1d_fn(
            x, weight, return_final_states=True, final_states_out=out
        )
    assert final is out


INDEX = [[0, 0, 0, 1, 2, 2, 2, 2, 2, 5, 5], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]]
PADDED = [[-1, -1, 0, 0, 0, 1, 1, 1, -1, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0, -1, 7, 7]]


def by_sequence(x, weight, bias, index, activation):
    rows = []
    for b, row in enumerate(index):
        begins = [t for t in range(len(row)) if t == 0 or row[t] != row[t - 1]] + [len(row)]
        pieces = []
        for begin, end in zip(begins, begins[1:], strict=False):
            y, _ = conv_loop(x[b : b + 1, :, begin:end], weight, bias, None, activation)
            pieces.append(y if row[begin] >= 0 else 0 * y)
        rows.append(torch.cat(pieces, -1))
    return torch.cat(rows)


@LAYOUTS
@pytest.mark.parametrize("index", [INDEX, PADDED, [INDEX[0]], [PADDED[0]]], ids=len)
def test_conv_seq_idx(layout, index, draw, generator):
    numbers = torch.tensor(index, dtype=torch.int32)
    x = [draw(len(index), D, L), draw(D, 4), draw(D)]
    same(
        lambda x, weight, bias: causal_conv1d.causal_conv1d_fn(
            lay(x, layout), weight, bias, numbers, activation="silu"
        ),
        lambda x, weight, bias: by_sequence(x, weight, bias, index, "silu"),
        x,
        generator,
    )


@LAYOUTS
def test_conv_seq_idx_ignores_what_is_in_the_padding(layout, draw):
    numbers = torch.tensor(PADDED)
    x, weight, bias = draw(B, D, L), draw(D, 4), draw(D)
    padding = (numbers < 0)[:, None].expand_as(x)
    results = []
    for what in (0.0, torch.nan, torch.inf):
        given = x.masked_fill(padding, what).detach().requires_grad_()
        y = causal_conv1d.causal_conv1d_fn(lay(given, layout), weight, bias, numbers)
        results.append([y, *torch.autograd.grad(y.square().sum(), [given, weight, bias])])
    for result in results:
        assert (result[0][padding] == 0).all() and (result[1][padding] == 0).all()
        for g, w in zip(result, results[0], strict=True):
            assert torch.equal(g, w)


def test_conv_seq_idx_compiles(draw):
    """Without a break, and for other boundaries without another compilation."""
    compiled = torch.compile(
        lambda *x: causal_conv1d.causal_conv1d_fn(*x, activation="silu"),
        backend="aot_eager",
        fullgraph=True,
    )
    x = [draw(B, D, L), draw(D, 4), draw(D)]
    for index in (INDEX, PADDED):
        numbers = torch.tensor(index)
        with torch.compiler.set_stance("default" if index is INDEX else "fail_on_recompile"):
            got = compiled(*x, numbers)
        want = by_sequence(*x, index, "silu")
        torch.testing.assert_close(got, want)
        for g, w in zip(
            torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x), strict=True
        ):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, SINGLE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, SINGLE], ids=str)
def test_conv_dtypes(dtype, parameters, draw):
    """All pairs that the peer takes."""
    x, weight = draw(B, D, L, dtype=dtype), draw(D, 4, dtype=parameters)
    bias = draw(D, dtype=parameters)
    y = causal_conv1d.causal_conv1d_fn(x, weight, bias, activation="silu")
    assert y.dtype is dtype
    want, _ = conv_loop(x.double(), weight.double(), bias.double(), None, "silu")
    close(y, want)
    gradients = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert [g.dtype for g in gradients] == [dtype, parameters, parameters]
    state = draw(B, D, 4, dtype=dtype, requires=False)
    want, _ = conv_loop(x.double(), weight.double(), bias.double(), state[..., 1:].double(), "silu")
    with torch.no_grad():
        y = causal_conv1d.causal_conv1d_update(x, state, weight, bias, "silu")
    assert y.dtype is dtype
    close(y, want)


# ---- causal_conv1d: updates ----


@pytest.mark.parametrize("state_len", [3, 4, 7])
@pytest.mark.parametrize("steps", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("circular", [False, True])
def test_update(state_len, steps, indexed, circular, draw, generator):
    """Calls one after the other, against the convolution of everything."""
    weight, bias = draw(D, 4, requires=False), draw(D, requires=False)
    slots = torch.tensor([4, 1], dtype=torch.int32) if indexed else torch.arange(2)
    pool = torch.zeros(5 if indexed else B, D, state_len, dtype=DOUBLE)
    pool[:] = 77 if indexed else 0
    pool[slots.long()] = 0
    length = torch.zeros(B, dtype=torch.int32)
    whole, outputs = [], []
    for _ in range(3):
        x = draw(B, D, steps or 1, requires=False)
        whole.append(x)
        y = causal_conv1d.causal_conv1d_update(
            x if steps else x.squeeze(2), pool, weight, bias, "silu",
            length if circular else None, slots if indexed else None,
        )  # fmt: skip
        assert y.shape == (x.shape if steps else x.shape[:2])
        outputs.append(y if steps else y.unsqueeze(2))
        length = length + (steps or 1)
    x = torch.cat(whole, -1)
    want, _ = conv_loop(x, weight, bias, None, "silu")
    torch.testing.assert_close(torch.cat(outputs, -1), want)

    expected = F.pad(x, (state_len, 0))[..., -state_len:]
    if circular:
        place = (torch.arange(-state_len, 0) + x.shape[2]) % state_len
        expected = torch.empty_like(expected).index_copy_(2, place, expected)
    assert torch.equal(pool[slots.long()], expected)
    if indexed:
        assert (pool[torch.tensor([0, 2, 3])] == 77).all()
    else:
        again = torch.zeros(B, D, state_len, dtype=DOUBLE)
        y = causal_conv1d.causal_conv1d_update_ref(
            x, again, weight, bias, "silu", torch.zeros(B, dtype=torch.int32) if circular else None
        )
        torch.testing.assert_close(y, want)
        assert torch.equal(again, pool)


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("state_len", [3, 5])
@pytest.mark.parametrize("shape", [(3, D), (3, D, 2)], ids=str)
def test_update_of_padding(state_len, shape, layout, draw):
    x, weight = draw(*shape, requires=False), draw(D, 4, requires=False)
    pool = lay(draw(4, D, state_len, requires=False), layout)
    before, slots = pool.clone(), torch.tensor([2, -1, 0], dtype=torch.int32)
    y = causal_conv1d.causal_conv1d_update(x, pool, weight, conv_state_indices=slots)
    one = before[[2, 0]]
    want = causal_conv1d.causal_conv1d_update(x[[0, 2]], one, weight)
    assert (y[1] == 0).all() and torch.equal(y[[0, 2]], want)
    assert torch.equal(pool[[2, 0]], one) and torch.equal(pool[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_update_has_gradients(circular, indexed, draw, generator):
    x = [draw(B, D, 2), draw(B, D, 2), draw(D, 4), draw(D), draw(B, D, 4)]

    def ours(first, second, weight, bias, start):
        state = start.clone()
        outputs = []
        for k, piece in enumerate((first, second)):
            length = torch.full((B,), 2 * k) if circular else None
            slots = torch.tensor([1, 0]) if indexed else None
            outputs.append(
                causal_conv1d.causal_conv1d_update(
                    piece, state, weight, bias, "silu", length, slots
                )
            )
        return *outputs, state[[1, 0]] if indexed else state

    def loop(first, second, weight, bias, start):
        start = start[[1, 0]] if indexed else start
        # The buffer's first place is where step 0 goes: the three before it are the last ones.
        y, _ = conv_loop(torch.cat([first, second], -1), weight, bias, start[..., 1:], "silu")
        return y[..., :2], y[..., 2:], torch.cat([first, second], -1)

    same(ours, loop, x[:4] + [x[4]], generator)


@pytest.mark.parametrize("slots", [[0, 2, 3], [-1, 2, -1], [3, -1, 0], [-1, -1, -1]], ids=str)
def test_update_of_a_pool_has_gradients(slots, draw, generator):
    """Rows without a slot count nowhere, and those with one once."""
    x, weight, start = draw(3, D, 2), draw(D, 4), draw(4, D, 5)

    def ours(x, weight, start):
        pool = start.clone()
        indices = torch.tensor(slots)
        y = causal_conv1d.causal_conv1d_update(x, pool, weight, conv_state_indices=indices)
        return y, pool

    def loop(x, weight, start):
        pool, rows = list(start.unbind()), []
        for row, slot in enumerate(slots):
            seen = torch.cat([pool[max(slot, 0)], x[row]], -1)[None]
            y, _ = conv_loop(x[row : row + 1], weight, None, seen[..., 2:5])
            rows.append(y if slot >= 0 else 0 * y)
            if slot >= 0:
                pool[slot] = seen[0, :, 2:]
        return torch.cat(rows), torch.stack(pool)

    same(ours, loop, [x, weight, start], generator)


@pytest.mark.parametrize("slots", [[4, 1], [-1, 2], [-1, -1]], ids=str)
@pytest.mark.parametrize("state_len", [3, 4])
def test_updates_compile(slots, state_len, draw):
    """Without a break, pools included."""
    slots = torch.tensor(slots, dtype=torch.int32)
    x, weight = draw(B, D, requires=False), draw(D, 4, requires=False)
    A, coefficient = -draw(D, N, requires=False).abs(), draw(B, N, requires=False)
    single = draw(5, D, N, requires=False).float()
    calls = [
        lambda state: causal_conv1d.causal_conv1d_update(
            x, state, weight, None, "silu", None, slots
        ),
        lambda state: mamba_ssm.selective_state_update(
            state, x, x, A, coefficient, coefficient, state_batch_indices=slots
        ),
    ]
    for call, start in zip(calls, (draw(5, D, state_len, requires=False), single), strict=True):
        state, want_state = start.clone(), start.clone()
        got = torch.compile(call, backend="aot_eager", fullgraph=True)(state)
        torch.testing.assert_close(got, call(want_state))
        assert torch.equal(state, want_state)
        assert torch.equal(state, start) == bool((slots < 0).all())


def test_varlen_states(draw, generator):
    x, cu_seqlens = draw(9, D), torch.tensor([0, 1, 1, 7, 9], dtype=torch.int32)
    for state_len in (0, 1, 4):

        def loop(x, state_len=state_len):
            rows = [
                F.pad(x[a:b].T, (state_len, 0))[:, b - a : b - a + state_len]
                for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
            ]
            return torch.stack(rows)

        def ours(x, state_len=state_len):
            return causal_conv1d.causal_conv1d_varlen_states(x, cu_seqlens, state_len)

        if state_len:
            same(ours, loop, [x], generator)
        assert torch.equal(ours(x), loop(x))
    assert (
        causal_conv1d.causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), 2).abs().sum() == 0
    )


CONV_MISTAKES = [
    ({"x": (B, L)}, ValueError, "x has shape (2, 11), expected (B, D, L)"),
    ({"weight": (D + 1, 4)}, ValueError, "weight has shape (7, 4), expected (D=6, W)"),
    ({"bias": (2,)}, ValueError, "bias has shape (2), expected (D=6)"),
    (
        {"initial_states": (B, D, 4)},
        ValueError,
        "initial_states has shape (2, 6, 4), expected (B=2, D=6, W - 1=3)",
    ),
    ({"activation": "gelu"}, NotImplementedError, "activation is 'gelu', expected None, \"silu\""),
    ({"seq_idx": (B, L)}, TypeError, "seq_idx has dtype torch.float64, expected int32 or int64"),
]


@pytest.mark.parametrize("change, error, text", CONV_MISTAKES, ids=lambda x: str(x)[:30])
def test_conv_mistakes(change, error, text, draw):
    arguments = {"x": (B, D, L), "weight": (D, 4)} | change
    arguments = {k: draw(*v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    with pytest.raises(error) as raised:
        causal_conv1d.causal_conv1d_fn(**arguments)
    assert f"causal_conv1d_fn: {text}" in str(raised.value)


def test_conv_mistakes_of_several(draw):
    x, weight, state = draw(B, D, L), draw(D, 4), draw(B, D, 3)
    index = torch.zeros(B, L, dtype=torch.int32)
    with pytest.raises(ValueError, match="initial_states is given, expected none beside seq_idx"):
        causal_conv1d.causal_conv1d_fn(x, weight, None, index, state)
    with pytest.raises(ValueError, match="return_final_states is given, expected none beside seq"):
        causal_conv1d.causal_conv1d_fn(x, weight, None, index, return_final_states=True)
    with pytest.raises(ValueError, match="state_len=2, expected at least W - 1=3"):
        causal_conv1d.causal_conv1d_update(x, state[..., 1:].detach(), weight)
    with pytest.raises(ValueError, match=r"conv_state has shape \(1, 6, 3\), expected \(B=2, D=6"):
        causal_conv1d.causal_conv1d_update(x, state[:1], weight)
    with pytest.raises(NotImplementedError, match="causal_conv1d_update: activation is 'relu'"):
        causal_conv1d.causal_conv1d_update(x, state, weight, None, "relu")


# ---- the scan ----


def softplus(x):
    return torch.log1p(torch.exp(x))


def scan_loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """``(B, D, L)``, one channel and step after the other; B and C ``(D, N)``, ``(B, N, L)`` or
    ``(B, G, N, L)``, complex ones with ``2L``."""

    def at(c, b, d, t):
        if c.dim() == 2:
            return c[d]
        c = c.unsqueeze(1) if c.dim() == 3 else c
        c = c[b, d // (u.shape[1] // c.shape[1])]
        return torch.complex(c[:, 2 * t], c[:, 2 * t + 1]) if A.is_complex() else c[:, t]

    rows, states = [], []
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            h, row = torch.zeros_like(A[d]), []
            for t in range(u.shape[2]):
                step = delta[b, d, t] if delta_bias is None else delta[b, d, t] + delta_bias[d]
                step = softplus(step) if delta_softplus else step
                h = torch.exp(step * A[d]) * h + step * u[b, d, t] * at(B, b, d, t)
                y = (at(C, b, d, t) * h).sum()
                y = 2 * y.real if A.is_complex() else y
                y = y if D is None else y + D[d] * u[b, d, t]
                row.append(y if z is None else y * z[b, d, t] / (1 + torch.exp(-z[b, d, t])))
            rows.append(torch.stack(row))
            states.append(h)
    return torch.stack(rows).view(u.shape), torch.stack(states).view(*u.shape[:2], -1)


def scan_inputs(draw, kind, steps=5, dtype=DOUBLE):
    """``kind``: words from complex, all, and for B and C constant, grouped."""
    states = COMPLEX if "complex" in kind else dtype
    length = steps * (2 if "complex" in kind else 1)
    A = -torch.rand(D, N, dtype=DOUBLE).to(dtype)
    if "complex" in kind:
        A = torch.complex(A, torch.randn(D, N, dtype=dtype))
    B_or_C = {
        "constant": lambda: draw(D, N, dtype=states),
        "grouped": lambda: draw(B, 2, N, length, dtype=dtype),
        "plain": lambda: draw(B, N, length, dtype=dtype),
    }
    B_kind, C_kind = kind.split()[:2]
    x = [draw(B, D, steps, dtype=dtype), draw(B, D, steps, dtype=dtype), A.requires_grad_()]
    x += [B_or_C[B_kind](), B_or_C[C_kind]()]
    if "all" in kind:
        return [*x, draw(D, dtype=dtype), draw(B, D, steps, dtype=dtype), draw(D, dtype=dtype)]
    return x + [None] * 3


KINDS = [f"{b} {c}" for b in ("plain", "grouped", "constant") for c in ("plain", "constant")]
KINDS = [f"{kind}{more}" for kind in KINDS for more in ("", " all", " complex all")]


@pytest.mark.parametrize("kind", KINDS)
def test_scan(kind, draw, generator):
    x = scan_inputs(draw, kind)
    softplus = "all" in kind
    for function in (mamba_ssm.selective_scan_fn, mamba_ssm.selective_scan_ref):
        same(
            lambda *x, f=function: f(*x, delta_softplus=softplus, return_last_state=True),
            lambda *x: scan_loop(*x, delta_softplus=softplus),
            x,
            generator,
        )
        assert torch.equal(
            function(*x, delta_softplus=softplus),
            function(*x, delta_softplus=softplus, return_last_state=True)[0],
        )


def test_scan_takes_complex_numbers_as_they_are(draw):
    x = scan_inputs(draw, "plain grouped complex all")
    want = mamba_ssm.selective_scan_fn(*x)
    x[3] = torch.view_as_complex(x[3].unflatten(-1, (-1, 2)))
    assert torch.equal(mamba_ssm.selective_scan_fn(*x), want)


def test_scan_hands_over_views(draw, monkeypatch):
    seen = []
    monkeypatch.setattr(
        _mamba_ssm_ops,
        "selective_scan",
        lambda *x: seen.append(x) or torch_ext.selective_scan(*x),
    )
    for layout in ("channel-first", "channel-last"):
        x = [lay(y.detach(), layout) if y.dim() == 3 else y for y in scan_inputs(draw, KINDS[1])]
        mamba_ssm.selective_scan_fn(*x)
        got = seen.pop()
        assert [g.data_ptr() for g in got[:8]] == [y.data_ptr() for y in x]


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, SINGLE], ids=str)
def test_scan_dtypes(dtype, complex_, draw):
    """The peer's: parameters float32 beside inputs of half precision. And a float32 delta."""
    x = scan_inputs(draw, "plain plain" + " complex" * complex_ + " all")
    cast = [y if y.is_complex() else y.to(dtype) for y in x]
    for k in (2, 5, 7):
        cast[k] = x[k].to(torch.complex64 if x[k].is_complex() else SINGLE)
    y, state = mamba_ssm.selective_scan_fn(*cast, True, True)
    assert y.dtype is dtype and state.dtype is (torch.complex64 if complex_ else SINGLE)
    exact = [y.to(COMPLEX if y.is_complex() else DOUBLE) for y in cast]
    close(y, scan_loop(*exact, True)[0])
    cast[1] = x[1].to(SINGLE)
    exact[1] = cast[1].double()
    y = mamba_ssm.selective_scan_fn(*cast, True)
    assert y.dtype is dtype
    close(y, scan_loop(*exact, True)[0])


SCAN_MISTAKES = [
    (0, (B, D), "u has shape (2, 6), expected (B, D, L)"),
    (1, (B, D, 4), "delta has shape (2, 6, 4), expected (B=2, D=6, L=5)"),
    (2, (D,), "A has shape (6), expected (D=6, N)"),
    (3, (D, 2), "B has shape (6, 2), expected (D=6, N=3)"),
    (3, (B, 5, N), "B has shape (2, 5, 3), expected (B=2, N=3, L=5)"),
    (4, (B, 4, N, 5), "C has G=4 groups, expected a number that divides D=6"),
    (5, (D, 1), "D has shape (6, 1), expected (D=6)"),
    (6, (B, D, 1), "z has shape (2, 6, 1), expected (B=2, D=6, L=5)"),
    (7, (1,), "delta_bias has shape (1), expected (D=6)"),
]


@pytest.mark.parametrize("at, shape, text", SCAN_MISTAKES, ids=[m[2] for m in SCAN_MISTAKES])
def test_scan_mistakes(at, shape, text, draw):
    x = scan_inputs(draw, "plain plain all")
    x[at] = draw(*shape)
    with pytest.raises(ValueError) as raised:
        mamba_ssm.selective_scan_fn(*x)
    assert str(raised.value) == f"selective_scan_fn: {text}"


def test_scan_of_complex_parameters_beside_a_real_one(draw):
    x = scan_inputs(draw, "constant plain")
    with pytest.raises(TypeError, match="expected real ones, as A has dtype torch.float64"):
        mamba_ssm.selective_scan_fn(*x[:3], x[3].to(COMPLEX), x[4])


# ---- one step ----


def step_loop(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """One channel after the other, after flattening heads."""
    shape, group = x.shape, x[0].numel()
    flat = lambda t, at=1: None if t is None else t.reshape(*t.shape[:at], group)  # noqa: E731
    x, dt, z, D, dt_bias = flat(x), flat(dt), flat(z), flat(D, 0), flat(dt_bias, 0)
    h, A = state.reshape(len(x), group, -1), A.reshape(group, -1)
    outputs, states = [], []
    for b in range(x.shape[0]):
        for d in range(group):
            at = lambda c, b=b, d=d: c[b] if c.dim() == 2 else c[b, d // (group // c.shape[1])]  # noqa: E731
            step = dt[b, d] if dt_bias is None else dt[b, d] + dt_bias[d]
            step = softplus(step) if dt_softplus else step
            new = torch.exp(step * A[d]) * h[b, d] + step * x[b, d] * at(B)
            y = (at(C) * new).sum()
            y = y if D is None else y + D[d] * x[b, d]
            outputs.append(y if z is None else y * z[b, d] / (1 + torch.exp(-z[b, d])))
            states.append(new)
    return torch.stack(outputs).view(shape), torch.stack(states).view(state.shape)


def step_inputs(draw, heads, groups, extras, tied=False):
    channels = (4, 3) if heads else (D,)
    if tied:
        expand = lambda t: t[..., None].expand(*t.shape, 3)  # noqa: E731
        dt, bias = expand(draw(B, 4)), expand(draw(4))
        A = -torch.rand(4, dtype=DOUBLE).requires_grad_()
        A = A[:, None, None].expand(4, 3, N)
    else:
        dt, bias = draw(B, *channels), draw(*channels)
        A = -torch.rand(*channels, N, dtype=DOUBLE)
        A.requires_grad_()
    coefficient = (B, groups, N) if groups else (B, N)
    x = [draw(B, *channels, N), draw(B, *channels), dt, A, draw(*coefficient), draw(*coefficient)]
    extra = [draw(*channels), draw(B, *channels), bias]
    return x + (extra if extras else [None] * 3)


STEPS = [(False, 0, False), (False, 0, True), (False, 2, True)]
STEPS += [(True, 1, False), (True, 2, True), (True, 4, True)]


@pytest.mark.parametrize("heads, groups, extras", STEPS)
def test_step(heads, groups, extras, draw, generator):
    x = step_inputs(draw, heads, groups, extras)

    def ours(function):
        def run(state, *rest):
            state = state.clone()
            return function(state, *rest, dt_softplus=extras), state

        return run

    loop = lambda *x: step_loop(*x, extras)  # noqa: E731
    same(ours(mamba_ssm.selective_state_update), loop, x, generator)
    same(ours(mamba_ssm.selective_state_update_ref), loop, x, generator)

    want, want_state = loop(*x)
    with torch.no_grad():
        state = x[0].clone()
        y = mamba_ssm.selective_state_update(state, *x[1:], dt_softplus=extras)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(state, want_state)
        # A state that is a part of another, with its dimensions in another order.
        whole = torch.zeros(*x[0].shape[::-1], 2, dtype=DOUBLE)
        part = whole[..., 1].permute(*reversed(range(whole.dim() - 1)))
        part.copy_(x[0])
        torch.testing.assert_close(
            mamba_ssm.selective_state_update(part, *x[1:], dt_softplus=extras), want
        )
        torch.testing.assert_close(part, want_state)
        assert (whole[..., 0] == 0).all()


@pytest.mark.parametrize("extras", [False, True])
def test_step_with_tied_heads(extras, draw, generator):
    x = step_inputs(draw, True, 2, extras, tied=True)
    assert x[2].stride(2) == 0 and x[3].stride()[1:] == (0, 0)
    with torch.no_grad():
        want, want_state = step_loop(*x, True)
        state = x[0].clone()
        y = mamba_ssm.selective_state_update(state, *x[1:], dt_softplus=True)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, want_state)


@pytest.mark.parametrize("state_dtype", [SINGLE, torch.bfloat16, DOUBLE], ids=str)
@pytest.mark.parametrize("heads", [False, True])
def test_step_in_a_pool(heads, state_dtype, draw):
    x = [y if y is None else y.detach() for y in step_inputs(draw, heads, 2, True)]
    inputs = x if state_dtype is DOUBLE else [y.float() for y in x]
    pool = draw(5, *x[0].shape[1:], requires=False).to(state_dtype)
    before = pool.clone()
    for slots in ([3, 0], [4, -1], [-1, -1]):
        slots = torch.tensor(slots, dtype=torch.int32)
        valid = slots >= 0
        rows = pool[slots[valid].long()]
        others = [k for k in range(5) if k not in slots.tolist()]
        before = pool.clone()
        y = mamba_ssm.selective_state_update(
            pool, *inputs[1:], dt_softplus=True, state_batch_indices=slots
        )
        assert y.dtype is inputs[1].dtype and (y[~valid] == 0).all()
        if valid.any():
            some = [v[valid] if k in (1, 2, 4, 5, 7) else v for k, v in enumerate(x)]
            want, state = step_loop(rows.double(), *some[1:], True)
            close(y[valid], want)
            close(pool[slots[valid].long()], state)
        assert torch.equal(pool[others], before[others])


def test_step_of_mixed_dtypes(draw):
    """What Triton takes: everything is read as float32, and the output has the dtype of x."""
    x = [y.detach() for y in step_inputs(draw, False, 0, True)]
    dtypes = [SINGLE, torch.bfloat16, SINGLE, SINGLE, torch.bfloat16, torch.bfloat16]
    dtypes += [torch.bfloat16, torch.bfloat16, SINGLE]
    x = [y.to(dtype) for y, dtype in zip(x, dtypes, strict=True)]
    want, state = step_loop(*(y.double() for y in x), True)
    y = mamba_ssm.selective_state_update(*x, dt_softplus=True)
    assert y.dtype is torch.bfloat16
    close(y, want)
    close(x[0], state)


STEP_MISTAKES = [
    (0, (B, D), "state has shape (2, 6), expected (B, D, N)"),
    (0, (3, D, N), "state has shape (3, 6, 3), expected (B=2, D=6, N=3)"),
    (1, (B, D, 1), "x has shape (2, 6, 1), expected (B=2, D=6)"),
    (2, (B, 1), "dt has shape (2, 1), expected (B=2, D=6)"),
    (3, (D, 1), "A has shape (6, 1), expected (D=6, N=3)"),
    (4, (B, 1), "B has shape (2, 1), expected (B=2, N=3)"),
    (5, (B, 4, N), "C has G=4 groups, expected a number that divides D=6"),
    (6, (1,), "D has shape (1), expected (D=6)"),
]


@pytest.mark.parametrize("at, shape, text", STEP_MISTAKES, ids=[m[2] for m in STEP_MISTAKES])
def test_step_mistakes(at, shape, text, draw):
    x = step_inputs(draw, False, 0, True)
    x[at] = draw(*shape)
    with pytest.raises(ValueError) as raised:
        mamba_ssm.selective_state_update(*x)
    assert str(raised.value) == f"selective_state_update: {text}"


# ---- the inner function ----


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def inner_inputs(draw, kind, rank=2, width=3, out=4):
    """Everything by name. ``kind``: words from complex, constant, bias, norms, wide."""
    complex_ = "complex" in kind
    A = -torch.rand(D, N, dtype=DOUBLE)
    if complex_:
        A = torch.complex(A, torch.randn(D, N, dtype=DOUBLE))
    states, constant = N * (2 if complex_ else 1), "constant" in kind
    x = {
        "xz": draw(B, 2 * D, 5),
        "conv1d_weight": draw(D, 1, width),
        "conv1d_bias": draw(D) if "bias" in kind else None,
        "x_proj_weight": draw(rank + (1 if constant else 2) * states, D),
        "delta_proj_weight": draw(D, rank),
        "out_proj_weight": draw(out, D),
        "out_proj_bias": draw(out) if "bias" in kind else None,
        "A": A.requires_grad_(),
    }
    if constant:
        x["B"] = draw(D, N, dtype=COMPLEX if complex_ else DOUBLE)
    if "bias" in kind:
        x |= {"D": draw(D), "delta_bias": draw(D), "C_proj_bias": draw(states)}
        if not constant:
            x["B_proj_bias"] = draw(states)
    if "norms" in kind:
        x |= {"c_rms_weight": draw(states), "dt_rms_weight": draw(D if "wide" in kind else rank)}
        if not constant:
            x["b_rms_weight"] = draw(states)
    return x


def inner_loop(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None,
    delta_softplus=True, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, eps=1e-3,
):  # fmt: skip
    rank, states = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    x, z = xz.chunk(2, 1)
    u, _ = conv_loop(x, conv1d_weight[:, 0], conv1d_bias, None, "silu")
    rows = u.transpose(1, 2) @ x_proj_weight.T
    delta = rows[..., :rank]
    if dt_rms_weight is not None and len(dt_rms_weight) == rank:
        delta = norm(delta, dt_rms_weight, eps)
    elif dt_rms_weight is not None:
        delta = norm(delta, 1, eps)
    delta = delta @ delta_proj_weight.T
    if dt_rms_weight is not None and len(dt_rms_weight) != rank:
        delta = delta * dt_rms_weight

    def coefficient(c, bias, weight):
        c = c if bias is None else c + bias
        c = c if weight is None else norm(c, weight, eps)
        if A.is_complex():  # (B, L, 2N) to (B, N, 2L)
            return c.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2)
        return c.transpose(1, 2)

    if B is None:
        B = coefficient(rows[..., rank : rank + states], B_proj_bias, b_rms_weight)
    if C is None:
        C = coefficient(rows[..., -states:], C_proj_bias, c_rms_weight)
    y, _ = scan_loop(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    y = y.transpose(1, 2) @ out_proj_weight.T
    return y if out_proj_bias is None else y + out_proj_bias


INNER = ["", "bias", "bias norms", "norms wide", "constant bias", "constant", "complex"]
INNER += ["complex bias", "complex constant bias", "complex norms bias", "constant norms"]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("kind", INNER)
def test_inner(kind, level, draw, generator):
    x = inner_inputs(draw, kind)
    names = list(x)

    def call(function, **options):
        return lambda *values: function(**dict(zip(names, values, strict=True)), **options)

    same(
        call(mamba_ssm.mamba_inner_fn, checkpoint_lvl=level, b_c_dt_rms_eps=1e-3),
        call(inner_loop),
        list(x.values()),
        generator,
    )
    if level == 0 and "norms" not in kind:
        same(call(mamba_ssm.mamba_inner_ref), call(inner_loop), list(x.values()), generator)
        got = call(mamba_ssm.mamba_inner_fn, delta_softplus=False)(*x.values())
        torch.testing.assert_close(got, call(inner_loop, delta_softplus=False)(*x.values()))


@pytest.mark.parametrize("level", [0, 1])
def test_inner_keeps_less(level, draw, monkeypatch):
    """With checkpoint_lvl=1 the convolution's output and delta are gone after the forward, and each
    backward computes them once."""
    memory, calls = [], []

    def convolution(*x):
        y, final = torch_ext.causal_conv1d(*x)
        memory.append(StorageWeakRef(y.untyped_storage()))
        calls.append(1)
        return y, final

    def scan(u, delta, *rest):
        memory.append(StorageWeakRef(delta.untyped_storage()))
        return torch_ext.selective_scan(u, delta, *rest)

    monkeypatch.setattr(_mamba_ssm_ops, "causal_conv1d", convolution)
    monkeypatch.setattr(_mamba_ssm_ops, "selective_scan", scan)
    x = inner_inputs(draw, "bias")
    inputs = [v for v in x.values() if v is not None]
    y = mamba_ssm.mamba_inner_fn(**x, checkpoint_lvl=level)
    assert [m.expired() for m in memory] == [level == 1] * 2
    for times in (1, 2):  # the graph can be used again
        torch.autograd.grad(y.sum(), inputs, retain_graph=times == 1)
        assert len(calls) == 1 + (times if level else 0)
    assert all(m.expired() for m in memory)


def test_inner_has_second_derivatives(draw):
    x = inner_inputs(draw, "bias")
    inputs = [v for v in x.values() if v is not None]

    def second(level):
        y = mamba_ssm.mamba_inner_fn(**x, checkpoint_lvl=level)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for g, w in zip(second(1), second(0), strict=True):
        torch.testing.assert_close(g, w)


def test_inner_under_autocast_func_and_checkpoint(draw):
    x = {k: v.detach().float() for k, v in inner_inputs(draw, "bias").items()}
    leaves = {k: v.requires_grad_() for k, v in x.items()}
    call = lambda xz: mamba_ssm.mamba_inner_fn(**(x | {"xz": xz}))  # noqa: E731
    (want,) = torch.autograd.grad(call(x["xz"]).sum(), x["xz"])
    got = torch.func.grad(lambda xz: call(xz).sum())(x["xz"])
    torch.testing.assert_close(got, want)
    y = torch.utils.checkpoint.checkpoint(call, x["xz"], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x["xz"])[0], want)
    mapped = torch.func.vmap(call)(x["xz"][None])
    torch.testing.assert_close(mapped[0], call(x["xz"]))
    grads = []
    for level in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            y = mamba_ssm.mamba_inner_fn(**x, checkpoint_lvl=level)
        assert y.dtype is torch.bfloat16
        grads.append(torch.autograd.grad(y.float().sum(), [*leaves.values()]))
    for g, w in zip(*grads, strict=True):
        assert torch.equal(g, w)
    want, y = call(x["xz"]).detach(), y.detach()
    assert float((y - want).norm()) < 0.1 * float(want.norm())  # inputs of the sums are bfloat16


def test_inner_compiles(draw):
    x = inner_inputs(draw, "bias norms")
    inputs = [v for v in x.values() if v is not None]
    compiled = torch.compile(mamba_ssm.mamba_inner_fn, backend="aot_eager", fullgraph=True)
    got, want = compiled(**x), mamba_ssm.mamba_inner_fn(**x)
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(g, w)


INNER_MISTAKES = [
    ("xz", (B, D, 5), "xz has shape (2, 6, 5), expected (B, 2 Di=12, L)"),
    ("x_proj_weight", (5, D), "x_proj_weight has shape (5, 6), expected (R + B + C=8, Di=6)"),
    ("dt_rms_weight", (5,), "dt_rms_weight has shape (5), expected (R or Di=6)"),
    ("b_rms_weight", (5,), "b_rms_weight has shape (5), expected (N=3)"),
    ("conv1d_weight", (D, 3), "conv1d_weight has shape (6, 3), expected (Di, one=1, W)"),
]


@pytest.mark.parametrize("name, shape, text", INNER_MISTAKES)
def test_inner_mistakes(name, shape, text, draw):
    x = inner_inputs(draw, "bias norms") | {name: draw(*shape)}
    with pytest.raises(ValueError) as raised:
        mamba_ssm.mamba_inner_fn(**x)
    assert str(raised.value) == f"mamba_inner_fn: {text}"


# ---- the layer ----


def layer(generator, dtype=DOUBLE, **options):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return mamba_ssm.Mamba(8, d_state=N, layer_idx=3, dtype=dtype, **options)


def test_layer_is_ours(generator):
    """Parameters, their names and values, and outputs."""
    ours = torch_ext.Mamba(8, d_state=N, bias=True)
    other = mamba_ssm.Mamba(8, d_state=N, bias=True)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(B, L, 8, generator=generator)
    assert torch.equal(other(x), ours(x))


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "conv_bias": False}, {"d_conv": 1}], ids=str
)
@pytest.mark.parametrize("pieces", [(L,), (1,) * L, (2, 1, 1, 3, 4), (7, 4)], ids=str)
def test_layer_with_a_cache(pieces, options, dtype, generator):
    mamba = layer(generator, dtype, **options)
    wide = layer(generator, DOUBLE, **options)
    wide.load_state_dict({k: v.double() for k, v in mamba.state_dict().items()})
    x = torch.randn(B, L, 8, generator=generator, dtype=DOUBLE).to(dtype)
    params = mamba_ssm.InferenceParams(max_seqlen=L, max_batch_size=B)
    outputs = []
    with torch.no_grad():
        want, _ = wide.prefill(x.double())
        seen = wide.in_proj(x.double())[..., : wide.d_inner].transpose(1, 2)
        for piece in x.split(pieces, 1):
            outputs.append(mamba(piece, inference_params=params))
            params.seqlen_offset += piece.shape[1]
            _, (_, scan) = wide.prefill(x[:, : params.seqlen_offset].double())
            conv_state, ssm_state = params.key_value_memory_dict[3]
            assert conv_state.dtype is dtype and conv_state.shape == (B, 16, mamba.d_conv)
            last = F.pad(seen[..., : params.seqlen_offset], (mamba.d_conv, 0))
            close(conv_state, last[..., -mamba.d_conv :], factor=4)
            close(ssm_state, scan, dtype, size=0.01, factor=4)
        close(torch.cat(outputs, 1), want, size=0.1, factor=4)

        # Another generation with the same caches begins from zeros.
        params.seqlen_offset = 0
        assert torch.equal(mamba(x[:, :2], inference_params=params), mamba(x[:, :2]))
        same_memory = params.key_value_memory_dict[3]
        assert same_memory[0] is conv_state and same_memory[1] is ssm_state


def test_layer_step(generator):
    mamba = layer(generator)
    x = torch.randn(B, L, 8, generator=generator, dtype=DOUBLE)
    for dtype in (None, SINGLE):
        conv_state, ssm_state = mamba.allocate_inference_cache(B, L, dtype=dtype)
        assert conv_state.shape == (B, 16, 4) and ssm_state.shape == (B, 16, N)
        assert conv_state.dtype is ssm_state.dtype is (dtype or DOUBLE)
        outputs = []
        for t in range(L):
            y, conv, ssm = mamba.step(x[:, t : t + 1], conv_state, ssm_state)
            assert conv is conv_state and ssm is ssm_state
            outputs.append(y)
        y, want = torch.cat(outputs, 1), mamba(x)
        torch.testing.assert_close(
            y, want, **({} if dtype is None else {"atol": 1e-5, "rtol": 1e-4})
        )
        if dtype is None:  # gradients pass through all the steps
            grads = [torch.autograd.grad(v.square().sum(), mamba.parameters()) for v in (y, want)]
            for g, w in zip(*grads, strict=True):
                torch.testing.assert_close(g, w)


def test_layer_mistakes(generator):
    mamba, x = layer(generator), torch.randn(B, L, 8, dtype=DOUBLE)
    params = mamba_ssm.InferenceParams(max_seqlen=L, max_batch_size=B)
    mamba(x, inference_params=params)
    params.seqlen_offset = L
    with pytest.raises(ValueError, match="hidden_states has B=1, expected that of the cache, 2"):
        mamba(x[:1, :1], inference_params=params)
    states = params.key_value_memory_dict[3]
    with pytest.raises(ValueError, match=r"step: hidden_states has shape \(2, 11, 8\), expected"):
        mamba.step(x, *states)
    with pytest.raises(ValueError, match=r"step: conv_state has shape \(2, 16, 3\), expected"):
        mamba.step(x[:, :1], states[0][..., 1:], states[1])
    mamba.layer_idx = None
    with pytest.raises(ValueError, match="layer_idx is None, expected a number"):
        mamba(x, inference_params=params)


# ---- signatures ----

SIGNATURES = {
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out "
    "activation",
    "causal_conv1d_ref": "x weight bias initial_states return_final_states final_states_out "
    "activation",
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
    "causal_conv1d_update_ref": "x conv_state weight bias activation cache_seqlens",
    "causal_conv1d_varlen_states": "x cu_seqlens state_len",
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "selective_scan_ref": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "mamba_inner_fn": "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight "
    "out_proj_weight out_proj_bias A B C D delta_bias B_proj_bias C_proj_bias delta_softplus "
    "checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    "selective_state_update_ref": "state x dt A B C D z dt_bias dt_softplus",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """Named one by one, since callers look, in the peer's order."""
    module = causal_conv1d if name.startswith("causal") else mamba_ssm
    assert name in module.__all__
    assert list(inspect.signature(getattr(module, name)).parameters) == SIGNATURES[name].split()


# ---- install ----

stands_in = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d")),
    reason="mamba_ssm or causal_conv1d itself is installed",
)


@stands_in
def test_install(child_environment, tmp_path):
    program = """
import importlib, importlib.metadata, importlib.util, pickle
from torch_ext import compat
for name in ("mamba_ssm", "causal_conv1d"):
    assert importlib.util.find_spec(name) is None
assert compat.install("mamba_ssm", "causal_conv1d") == ["mamba_ssm", "causal_conv1d"]
assert compat.install("mamba_ssm", "causal_conv1d") == ["mamba_ssm", "causal_conv1d"]
import mamba_ssm, causal_conv1d
from mamba_ssm import Mamba, MambaLMHeadModel, mamba_inner_fn, selective_scan_fn
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel as same
from mamba_ssm.modules.mamba_simple import Mamba as layer
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as scan, mamba_inner_fn as f
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref, mamba_inner_ref
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
from mamba_ssm.utils.generation import InferenceParams
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
assert MambaLMHeadModel is same is compat.mamba_ssm.MambaLMHeadModel
assert layer is Mamba and scan is selective_scan_fn and f is mamba_inner_fn
assert mamba_ssm.ops.triton.selective_state_update.selective_state_update is selective_state_update
for module, name in ((mamba_ssm, "Mamba-SSM"), (causal_conv1d, "causal.conv1d")):
    assert importlib.metadata.version(name) == module.__version__
    assert importlib.metadata.version(module.__name__) == module.__version__
    spec = importlib.util.find_spec(module.__name__)
    assert spec is module.__spec__ and spec.loader is module.__loader__
    assert importlib.util.find_spec(module.__name__ + ".nothing") is None
    assert importlib.reload(module) is module
    assert "torch_ext" in module.__file__
    assert module.__name__ in importlib.metadata.packages_distributions()
for missing in ("from mamba_ssm import Mamba3", "import mamba_ssm.ops.triton.mamba3"):
    try:
        exec(missing)
    except ImportError as e:
        assert "mamba_ssm" in str(e)
    else:
        raise AssertionError(missing)
assert pickle.loads(pickle.dumps(Mamba(8))).d_model == 8
assert type(pickle.loads(b"cmamba_ssm.models.config_mamba\\nMambaConfig\\n)\\x81.")) is MambaConfig
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment,
        check=True,
        timeout=300,
        cwd=tmp_path,
    )


@stands_in
def test_install_leaves_an_installed_package_alone(child_environment, tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("real = True")
    program = """
import sys
sys.path.insert(0, ".")
import torch_ext
assert torch_ext.compat.install("mamba_ssm", "causal_conv1d") == ["causal_conv1d"]
import mamba_ssm
assert mamba_ssm.real
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment,
        check=True,
        timeout=300,
        cwd=tmp_path,
    )


@stands_in
def test_importing_ours_installs_nothing():
    assert "mamba_ssm" not in sys.modules and "causal_conv1d" not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm")
