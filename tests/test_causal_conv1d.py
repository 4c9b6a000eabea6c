"""causal_conv1d: what is special to it, and the demands of those suites that are written for
recurrences alone."""

import inspect
import warnings

import pytest
import torch
from cases import HALF, OTHERS, REAL, bounds, close, cotangents, error, gradients, short, wide
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional as F

import torch_ext
from torch_ext import (
    causal_conv1d,
    causal_conv1d_reference,
    causal_conv1d_step,
    causal_conv1d_step_,
)

CASE = next(case for case in OTHERS if case.name == "causal_conv1d")
WINDOWS = pytest.mark.parametrize("W", range(1, 10))
ACTIVATIONS = pytest.mark.parametrize("activation", [None, "silu"])
DTYPES = pytest.mark.parametrize("dtype", REAL, ids=short)
PARAMETERS = [(d, d) for d in REAL] + [(d, torch.float32) for d in HALF]
MIXED = pytest.mark.parametrize(
    "dtype, parameters", PARAMETERS, ids=[f"{short(d)}-{short(p)}" for d, p in PARAMETERS]
)


def leaves(B, T, D, W, generator, dtype=torch.float64, parameters=None, rows=None, requires=False):
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parameters = parameters or dtype
    x = [
        draw(B, T, D).to(dtype),
        draw(D, W).to(parameters),
        draw(D).to(parameters),
        draw(B if rows is None else rows, D, W - 1).to(dtype),
    ]
    return [y.requires_grad_(requires) for y in x]


def by_torch(x, weight, bias=None, state=None, activation=None):
    """torch's own convolution of the state and x, side by side."""
    D, W = weight.shape
    if state is None:
        state = x.new_zeros(x.shape[0], D, W - 1)
    seen = torch.cat([state, x.transpose(1, 2)], -1)
    # torch refuses an input that is shorter than the window
    y = F.conv1d(seen, weight.unsqueeze(1), bias, groups=D) if x.shape[1] else x.transpose(1, 2)
    y = F.silu(y) if activation == "silu" else y
    return y.transpose(1, 2), seen[..., seen.shape[-1] - (W - 1) :]


def check(f, reference, x, generator, factor=1.0):
    """Values, and gradients through both outputs, against the reference in float64."""
    outputs = f(*x)
    weights = cotangents(outputs, generator)
    exact = [wide(y) for y in x]
    for g, w in zip(outputs, reference(*exact), strict=True):
        close(g, w, size=0.25, factor=factor)
    got = gradients(f, x, weights=weights)
    want = gradients(reference, exact, weights=[wide(g) for g in weights], unused=True)
    for y, g, w in zip(x, got, want, strict=True):
        assert g.dtype is y.dtype and g.shape == y.shape
        close(g, w, grad=True, size=0.01, factor=factor)


# ---- values ----
def test_by_hand():
    """Two channels, W = 3, bias, three steps from a state."""
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    weight = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 1.0]])
    state = torch.tensor([[[7.0, 8.0], [0.0, 5.0]]])
    y, final = causal_conv1d(x, weight, torch.tensor([100.0, 0.5]), state)
    # 7 + 2*8 + 4*1,  8 + 2*1 + 4*2,  1 + 2*2 + 4*3, each + 100;  10 - 5, 20 - 10, 30 - 20, + 0.5
    assert y[0].T.tolist() == [[127, 118, 117], [5.5, 10.5, 10.5]]
    assert final[0].tolist() == [[2, 3], [20, 30]]
    g = torch.autograd.functional.vjp(
        lambda *a: causal_conv1d(*a)[0], (x, weight, torch.zeros(2), state), torch.ones_like(x)
    )[1]
    # inputs -2 .. 2 are seen by taps 0; 0, 1; 0, 1, 2; 1, 2; 2
    assert g[3][0].tolist() == [[1, 3], [0, -1]]
    assert g[0][0].T.tolist() == [[7, 6, 4], [0, 0, 1]]
    assert g[1].tolist() == [[16, 11, 6], [15, 35, 60]] and g[2].tolist() == [3, 3]


@WINDOWS
@ACTIVATIONS
@DTYPES
def test_against_torch(W, activation, dtype, generator):
    for B, T, D in ((2, 33, 19), (1, 150, 5), (3, 1, 16), (2, 2, 33), (1, 4, 8)):
        x = leaves(B, T, D, W, generator, dtype, requires=True)
        for given in (x, x[:3], x[:2]):
            check(
                lambda *y: causal_conv1d(*y, activation=activation),
                lambda *y: by_torch(*y, activation=activation),
                given,
                generator,
            )


@MIXED
@ACTIVATIONS
def test_dtypes_of_parameters(dtype, parameters, activation, generator):
    x = leaves(2, 70, 33, 4, generator, dtype, parameters, requires=True)
    check(
        lambda *y: causal_conv1d(*y, activation=activation),
        lambda *y: by_torch(*y, activation=activation),
        x,
        generator,
    )
    one = [x[0][:, 0], *x[1:]]
    y, state = causal_conv1d_step(*one, activation=activation)
    assert y.dtype is dtype and state.dtype is dtype


@WINDOWS
def test_reference(W, generator):
    """The reference is a loop of its own; it must agree with torch too."""
    x = leaves(2, 7, 3, W, generator, requires=True)
    check(causal_conv1d_reference, by_torch, x, generator)
    assert torch.autograd.gradcheck(
        causal_conv1d_reference, leaves(1, 3, 2, W, generator, requires=True)
    )
    assert torch.equal(
        causal_conv1d_reference(*x[:3])[0],
        causal_conv1d_reference(*x[:3], torch.zeros_like(x[3]))[0],
    )


# ---- states ----
@WINDOWS
@pytest.mark.parametrize(
    "lengths", [(1,) * 12, (5, 0, 1, 2, 4), (12, 0), (2, 10)], ids=["ones", "odd", "all", "short"]
)
def test_chunks(W, lengths, generator):
    """Also chunks that are shorter than the state."""
    x = leaves(2, 12, 19, W, generator, requires=True)

    def chunked(x, weight, bias, state):
        rows = []
        for piece in x.split(lengths, 1):
            y, state = causal_conv1d(piece, weight, bias, state, activation="silu")
            rows.append(y)
        return torch.cat(rows, 1), state

    check(chunked, lambda *y: by_torch(*y, activation="silu"), x, generator)


@WINDOWS
def test_step_by_step(W, generator):
    x = leaves(2, 12, 19, W, generator, requires=True)

    def stepped(x, weight, bias, state):
        rows = []
        for t in range(x.shape[1]):
            y, state = causal_conv1d_step(x[:, t], weight, bias, state, activation="silu")
            rows.append(y)
        return torch.stack(rows, 1), state

    check(stepped, lambda *y: by_torch(*y, activation="silu"), x, generator)
    x = [y.detach() for y in x]
    want, final = causal_conv1d(*x, activation="silu")
    state = x[3].clone()
    for t in range(12):
        y = causal_conv1d_step_(x[0][:, t], x[1], x[2], state, activation="silu")
        assert torch.equal(y, want[:, t])
    assert torch.equal(state, final)


@WINDOWS
@pytest.mark.parametrize(
    "lengths", [(1, 17, 22), (0, 2, 0, 1, 3, 0), (3,) * 30, (150, 70)], ids=str
)
def test_packed(W, lengths, generator):
    total, n = sum(lengths), len(lengths)
    cu = torch.tensor(bounds(lengths))
    x = leaves(1, total, 19, W, generator, rows=n, requires=True)

    def separate(x, weight, bias, state):
        pairs = [
            by_torch(piece, weight, bias, state[s : s + 1], "silu")
            for s, piece in enumerate(x.split(lengths, 1))
        ]
        return torch.cat([y for y, _ in pairs], 1), torch.cat([s for _, s in pairs])

    check(lambda *y: causal_conv1d(*y, cu_seqlens=cu, activation="silu"), separate, x, generator)


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])
def test_pool(in_place, generator):
    for W in (1, 4, 9):
        x, weight, bias, pool = leaves(3, 1, 17, W, generator, rows=6)
        x = x[:, 0]
        indices = torch.tensor([4, -2, 0], dtype=torch.int32)
        want_y, want_state = causal_conv1d_step(x[::2], weight, bias, pool[[4, 0]])
        before = pool.clone()
        if in_place:
            y, after = causal_conv1d_step_(x, weight, bias, pool, indices), pool
        else:
            y, after = causal_conv1d_step(x, weight, bias, pool, indices)
            assert torch.equal(pool, before)
        assert torch.equal(y[::2], want_y) and not y[1].any()
        assert torch.equal(after[[4, 0]], want_state)
        assert torch.equal(after[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


def test_pool_in_a_view(generator):
    """A pool inside something larger, its rows, channels or taps apart."""
    x, weight, bias, _ = leaves(3, 1, 17, 4, generator)
    x = x[:, 0]
    for view in (
        lambda big: big[::2, 1:18, 2:5],
        lambda big: big[:5, ::2, ::2][:, :17, :3],
        lambda big: big.permute(0, 2, 1)[:5, :6:2].transpose(1, 2)[:, :17],
    ):
        big = torch.randn(10, 34, 6, generator=generator, dtype=torch.float64)
        pool = view(big)
        inside = torch.zeros_like(big, dtype=torch.bool)
        view(inside)[:] = True
        outside = big[~inside].clone()
        indices = torch.tensor([4, 1, 0])
        want, after = causal_conv1d_step(x, weight, bias, pool.clone(), indices)
        assert torch.equal(causal_conv1d_step_(x, weight, bias, pool, indices), want)
        assert torch.equal(pool, after) and torch.equal(big[~inside], outside)


# ---- layouts, determinism ----
@DTYPES
def test_layouts_agree_bitwise(dtype, generator):
    """Channels or time side by side, windows of another tensor, expanded: the same bits."""
    x = leaves(2, 150, 37, 4, generator, dtype, requires=True)
    f = lambda *y: causal_conv1d(*y, activation="silu")  # noqa: E731
    weights = cotangents(f(*x), generator)
    want = [*f(*x), *gradients(f, x, weights=weights)]
    turned = lambda y: y.detach().mT.contiguous().mT  # noqa: E731
    spread = lambda y: y.detach().repeat_interleave(2, -1)[..., ::2]  # noqa: E731
    for lay in (turned, spread):
        laid = [lay(y).requires_grad_() if y.dim() > 1 else y for y in x]
        got = [*f(*laid), *gradients(f, laid, weights=[lay(g) for g in weights])]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert got[0].is_contiguous() and got[1].is_contiguous()
    one = x[0].detach()[:1, :1, :1]
    for shape in ((2, 150, 37), (2, 0, 37)):
        big = one.expand(shape)
        for g, w in zip(f(big, *x[1:]), f(big.contiguous(), *x[1:]), strict=True):
            assert torch.equal(g, w)


def test_threads(generator, threads):
    """The weight's gradient is a sum over B and T: its order does not depend on the threads."""
    for B, T, D in ((3, 500, 100), (1, 5000, 3), (64, 17, 40), (2, 300, 2500)):
        x = leaves(B, T, D, 4, generator, torch.float32, requires=True)
        f = lambda *y: causal_conv1d(*y, activation="silu")  # noqa: E731
        weights = cotangents(f(*x), generator)
        found = []
        for n in (1, 2, 3, 2):
            threads(n)
            found.append([*f(*x), *gradients(f, x, weights=weights)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_any_size(generator):
    for B, T, D in ((0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)):
        for W in (1, 4, 11):
            x = leaves(B, T, D, W, generator, requires=True)
            y, final = causal_conv1d(*x)
            assert y.shape == (B, T, D) and final.shape == (B, D, W - 1)
            grads = torch.autograd.grad((y.sum() + final.sum()), x)
            assert [g.shape for g in grads] == [z.shape for z in x]
            assert not grads[1].any() and torch.equal(grads[3], torch.ones_like(x[3])) or T > 0
            if T == 0:
                assert torch.equal(final, x[3])


def test_fuzz(generator):
    """Whatever the sizes: random ones, with everything optional present or not."""
    pick = lambda n: int(torch.randint(0, n, (), generator=generator))  # noqa: E731
    for _ in range(150):
        B, T, D, W = pick(4), pick(200) if pick(4) else pick(6), pick(70), 1 + pick(12)
        dtype = REAL[pick(len(REAL))]
        activation = ("silu", None)[pick(2)]
        cu = None
        if pick(3) == 0:
            B, cuts = 1, sorted(pick(T + 1) for _ in range(pick(6)))
            cu = torch.tensor([0, *cuts, T])
        rows = None if cu is None else len(cu) - 1
        x = leaves(B, T, D, W, generator, dtype, rows=rows, requires=True)
        n = 2 + pick(3)
        options = {"activation": activation, "cu_seqlens": cu}
        check(
            lambda *y, o=options: causal_conv1d(*y, **o),
            lambda *y, o=options: causal_conv1d_reference(*y, **o),
            x[:n],
            generator,
        )


# ---- numerics ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_silu_far_out(dtype):
    """x sigmoid(x) and its slope where exp overflows, and where sigmoid stops and x goes on."""
    values = [0.0, 1.0, 20.0, 80.0, 87.0, 89.0, 104.0, 700.0, 750.0, 1e4, 1e30, 3e38]
    x = torch.tensor([v * s for v in values for s in (1, -1)], dtype=dtype).requires_grad_()
    y, _ = causal_conv1d(x[None, :, None], torch.ones(1, 1, dtype=dtype), activation="silu")
    exact = wide(x)
    want = F.silu(exact)
    floor = 2e-33 if dtype is torch.float32 else 1e-300
    assert error(y.flatten(), want, floor, 1e-30) <= 16 * torch.finfo(dtype).eps
    (got,) = torch.autograd.grad(y.sum(), x)
    slope = torch.autograd.grad(want.sum(), exact)[0]
    assert error(got, slope, floor) <= 16 * torch.finfo(dtype).eps


def test_infinite_inputs_stay_where_they_are_seen(generator):
    x, weight, bias, state = leaves(1, 40, 5, 4, generator, torch.float32)
    x[0, 10, 2] = torch.inf
    y, final = causal_conv1d(x, weight, bias, state, activation="silu")
    bad = ~y.isfinite()
    assert not bad[:, :10].any() and not bad[:, 14:].any() and not bad[..., [0, 1, 3, 4]].any()
    assert final.isfinite().all()
    assert causal_conv1d(x[:, :10], weight, bias, state)[0].isfinite().all()


def test_no_gradient_of_y_is_zero(generator):
    """Through the final state alone, infinite inputs meet no 0 * inf."""
    x = leaves(1, 20, 5, 4, generator, torch.float32, requires=True)
    with torch.no_grad():
        x[0][0, 3] = torch.inf
    _, final = causal_conv1d(*x, activation="silu")
    grads = torch.autograd.grad(final.sum(), x)
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][:, -3:], torch.ones(1, 3, 5)) and not grads[0][:, :-3].any()


def test_long_sequence(generator):
    """T = 1e5: the weight's gradient is a sum of as many terms."""
    x = leaves(1, 100_000, 6, 4, generator, torch.float32, requires=True)
    check(
        lambda *y: causal_conv1d(*y, activation="silu"),
        lambda *y: by_torch(*y, activation="silu"),
        x,
        generator,
    )


def test_sequences_do_not_see_each_other(generator):
    x, weight, bias, state = leaves(1, 40, 19, 4, generator, torch.float32, rows=3)
    cu = torch.tensor([0, 11, 29, 40])
    clean = causal_conv1d(x, weight, bias, state, cu_seqlens=cu)
    x[:, 11:29] = torch.nan
    x.requires_grad_()
    y, final = causal_conv1d(x, weight, bias, state, cu_seqlens=cu)
    for part in (slice(0, 11), slice(29, 40)):
        assert torch.equal(y[:, part], clean[0][:, part])
    (g,) = torch.autograd.grad(y[:, :11].sum() + y[:, 29:].sum(), x)
    assert g[:, :11].isfinite().all() and g[:, 29:].isfinite().all()


# ---- derivatives and transforms ----
@ACTIVATIONS
@pytest.mark.parametrize("W", [1, 3, 9])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_gradcheck(activation, W, kind, generator):
    cu = torch.tensor([0, 2, 2, 4]) if kind == "packed" else None
    x = leaves(
        1 if kind == "packed" else 2,
        4,
        2,
        W,
        generator,
        rows=3 if kind == "packed" else 2,
        requires=True,
    )
    f = lambda *y: causal_conv1d(*y, activation, cu)  # noqa: E731
    x = x if W > 1 else x[:3]
    if W == 1:  # a state without columns has no derivative
        f = lambda *y: causal_conv1d(*y, None, activation, cu)[0]  # noqa: E731
    torch.autograd.gradcheck(
        f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    torch.autograd.gradgradcheck(f, x, check_batched_grad=True, check_fwd_over_rev=True)


IN_DIMS = [
    (0, 0, 0, 0),
    (1, 1, 1, 1),
    (-1, -1, -1, -1),
    (0, None, None, 0),
    (None, None, None, 0),
    (None, 0, None, None),
    (None, None, 0, None),
    (2, None, 1, 3),
]


@pytest.mark.parametrize("dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "packed", "step", "pool"])
def test_vmap(dims, kind, generator):
    """Against a loop: values, and gradients of each example."""
    options, rows, B = {"activation": "silu"}, None, 2
    if kind == "packed":
        options["cu_seqlens"], rows, B = torch.tensor([0, 3, 3, 5]), 3, 1
    if kind == "pool":
        options["state_indices"], rows = torch.tensor([3, -1]), 4
    x = leaves(B, 5, 3, 4, generator, rows=rows)
    if kind in ("step", "pool"):
        x[0] = x[0][:, 0]
        dims = tuple(min(d, 1) if i == 0 and d is not None else d for i, d in enumerate(dims))
    function = causal_conv1d_step if kind in ("step", "pool") else causal_conv1d
    f = lambda *y: function(*y, **options)  # noqa: E731
    loss = lambda *y: sum(z.sin().sum() for z in f(*y))  # noqa: E731
    many = [
        y if d is None else torch.stack([y, y * 0.5, y + 0.1], d)
        for y, d in zip(x, dims, strict=True)
    ]
    one = lambda i: [  # noqa: E731
        y if d is None else y.select(d, i) for y, d in zip(many, dims, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop")
        got = vmap(f, dims)(*many)
        slopes = vmap(grad(loss, (0, 1, 2, 3)), dims)(*many)
    for i in range(3):
        for g, w in zip(got, f(*one(i)), strict=True):
            close(g[i], w)
        for g, w in zip(slopes, grad(loss, (0, 1, 2, 3))(*one(i)), strict=True):
            close(g[i], w, grad=True)


def test_vmap_over_indices_is_refused(generator):
    x = leaves(2, 1, 3, 4, generator, rows=5)
    with pytest.raises(ValueError, match="causal_conv1d_step: state_indices has a vmap dimension"):
        vmap(lambda i: causal_conv1d_step(x[0][:, 0], *x[1:], i))(torch.tensor([[0, 1], [2, 3]]))


def test_hessian_and_jvp(generator):
    x = leaves(1, 5, 2, 3, generator)
    for f in (causal_conv1d, causal_conv1d_reference):
        loss = lambda *y, f=f: f(*y, activation="silu")[0].square().sum()  # noqa: E731
        found = hessian(loss, (0, 1))(*x), jvp(loss, tuple(x), tuple(y.cos() for y in x))
        if f is causal_conv1d:
            got = found
    for g, w in zip(
        (*got[0][0], *got[0][1], *got[1]), (*found[0][0], *found[0][1], *found[1]), strict=True
    ):
        close(g, w, grad=True, factor=4)


# ---- registration and consumers ----
SCHEMAS = {
    "causal_conv1d": "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
    "Tensor? cu_seqlens=None, str? activation=None) -> (Tensor y, Tensor final_state)",
    "causal_conv1d_backward": "(Tensor? grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, "
    "Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, str? activation) -> (Tensor grad_x, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_initial_state)",
    "causal_conv1d_step": "(Tensor x, Tensor weight, Tensor? bias, Tensor state, "
    "Tensor? state_indices=None, str? activation=None) -> (Tensor y, Tensor state)",
    "causal_conv1d_step_": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, "
    "Tensor? state_indices=None, str? activation=None) -> Tensor y",
}


def test_schemas_and_signatures():
    for name, schema in SCHEMAS.items():
        found = getattr(torch.ops.torch_ext, name).default._schema
        assert str(found) == f"torch_ext::{name}{schema}"
    for tail in ("", "_step", "_step_"):
        f = getattr(torch_ext, "causal_conv1d" + tail)
        arguments = getattr(torch.ops.torch_ext, f.__name__).default._schema.arguments
        parameters = inspect.signature(f).parameters
        # The operator's options come last, Python's before cu_seqlens, as for the recurrences.
        assert set(parameters) == {a.name for a in arguments}
        if not tail:
            assert list(parameters)[-2:] == ["activation", "cu_seqlens"]
        for argument in arguments:
            parameter = parameters[argument.name]
            given = parameter.default is not inspect.Parameter.empty
            assert given == argument.has_default_value()
            assert not given or parameter.default is None
    assert (
        inspect.signature(causal_conv1d).parameters
        == inspect.signature(causal_conv1d_reference).parameters
    )


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype, parameters", PARAMETERS[1:], ids=str)
@ACTIVATIONS
def test_opcheck(dtype, parameters, activation, generator):
    op, backward = (getattr(torch.ops.torch_ext, n).default for n in list(SCHEMAS)[:2])
    options = {"activation": activation}
    for requires in (False, True):
        x = leaves(2, 5, 3, 4, generator, dtype, parameters, requires=requires)
        torch.library.opcheck(op, tuple(x), options)
        torch.library.opcheck(op, tuple(x[:2]), options)
        turned = [y.detach().mT.contiguous().mT.requires_grad_(requires) for y in x[:2]]
        torch.library.opcheck(op, (*turned, *x[2:]), options)
        outputs = [y.detach().requires_grad_(requires) for y in op(*x)]
        torch.library.opcheck(backward, (*outputs, *x, None, activation))
        torch.library.opcheck(backward, (None, outputs[1], *x[:2], None, None, None, activation))
        cu = torch.tensor([0, 2, 2, 5])
        x = leaves(1, 5, 3, 4, generator, dtype, parameters, rows=3, requires=requires)
        outputs = [y.detach() for y in op(*x, cu, activation)]
        torch.library.opcheck(backward, (*outputs, *x, cu, activation))


@pytest.mark.unpoisoned
@ACTIVATIONS
def test_opcheck_steps(activation, generator):
    step, step_ = (getattr(torch.ops.torch_ext, n).default for n in list(SCHEMAS)[2:])
    indices, options = torch.tensor([4, -1]), {"activation": activation}
    for requires in (False, True):
        x = leaves(2, 1, 3, 4, generator, torch.float32)
        x[0] = x[0][:, 0].clone()
        pool = torch.randn(5, 3, 3)
        x = [y.requires_grad_(requires) for y in x]
        torch.library.opcheck(step, tuple(x), options)
        torch.library.opcheck(step, (*x[:2], None, pool, indices), options)
    x = [y.detach() for y in x]
    torch.library.opcheck(step_, tuple(x), options)
    torch.library.opcheck(step_, (*x[:2], None, pool, indices), options)


@pytest.mark.filterwarnings(
    "ignore:.*torch\\.jit:FutureWarning", "ignore:.*torch\\.jit:DeprecationWarning"
)
def test_script_of_functions(generator):
    x = leaves(2, 5, 3, 4, generator, torch.float32)
    one = [x[0][:, 0], *x[1:]]
    script = torch.jit.script
    for got, want in (
        (script(causal_conv1d)(*x), causal_conv1d(*x)),
        (script(causal_conv1d)(*x, "silu"), causal_conv1d(*x, "silu")),
        (script(causal_conv1d_step)(*one), causal_conv1d_step(*one)),
    ):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    state = one[3].clone()
    assert torch.equal(script(causal_conv1d_step_)(*one[:3], state), causal_conv1d_step(*one)[0])
    assert torch.equal(state, causal_conv1d_step(*one)[1])


def test_export_step(generator):
    class Step(torch.nn.Module):
        def forward(self, x, weight, bias, state):
            return causal_conv1d_step(x, weight, bias, state, None, "silu")

    x = leaves(3, 1, 5, 4, generator, torch.float32)
    x[0] = x[0][:, 0].clone()
    B = torch.export.Dim("B", min=2, max=64)
    program = torch.export.export(Step(), tuple(x), dynamic_shapes=({0: B}, None, None, {0: B}))
    x = [torch.cat([x[0], x[0]]), x[1], x[2], torch.cat([x[3], x[3]])]
    for g, w in zip(program.module()(*x), Step()(*x), strict=True):
        assert torch.equal(g, w)


def test_autocast(generator):
    """x keeps its dtype, the state takes it, and parameters in float32 are used as they are."""
    x, weight, bias, state = leaves(2, 5, 3, 4, generator, torch.float32)
    half = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = causal_conv1d(half, weight, bias, state)
        assert y.dtype is final.dtype is torch.bfloat16
        want = causal_conv1d(half, weight, bias, state.bfloat16())
        assert torch.equal(y, want[0]) and torch.equal(final, want[1])
        assert causal_conv1d(x, weight.bfloat16(), bias.half(), state)[0].dtype is torch.float32
        assert causal_conv1d(half, weight.half(), bias, state)[0].dtype is torch.bfloat16
        y, after = causal_conv1d_step(half[:, 0], weight, bias, state)
        assert y.dtype is after.dtype is torch.bfloat16
        pool = state.clone()
        y = causal_conv1d_step_(half[:, 0], weight, bias, pool)
        assert y.dtype is torch.float32 and torch.equal(pool[..., :-1], state[..., 1:])
    leaf = weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = causal_conv1d(half, leaf, bias)
    assert torch.autograd.grad(y.float().sum(), leaf)[0].dtype is torch.float32


def test_changed_in_place_before_backward(generator):
    x = [y * 1 for y in leaves(2, 5, 3, 4, generator, requires=True)]
    y, _ = causal_conv1d(*x)
    with torch.no_grad():
        x[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_operator_without_gradients(generator):
    """Absent is zero."""
    x = leaves(2, 9, 5, 4, generator)
    gy, gs = cotangents(causal_conv1d(*x), generator)
    op = torch.ops.torch_ext.causal_conv1d_backward.default
    for p, q in ((gy, gs), (gy, None), (None, gs), (None, None)):
        filled = [torch.zeros_like(o) if g is None else g for g, o in ((p, gy), (q, gs))]
        for g, w in zip(op(p, q, *x, None, "silu"), op(*filled, *x, None, "silu"), strict=True):
            close(g, w, grad=True)


@pytest.mark.skipif(bool(torch_ext.build_info.cuda), reason="this build has CUDA kernels")
def test_no_cuda_kernel_in_this_build(generator):
    """What the dispatcher would call for tensors on a GPU says so."""
    x = leaves(1, 2, 3, 4, generator)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.torch_ext.causal_conv1d.default
    with pytest.raises(
        NotImplementedError, match="causal_conv1d: its inputs are on a CUDA device.*expected cpu"
    ):
        op.redispatch(cuda, *x, None, None)


# ---- errors ----
def refuses(error, pieces, f, *args, **kwargs):
    with pytest.raises(error) as caught:
        f(*args, **kwargs)
    assert caught.type is error
    message = str(caught.value).split("\n")[0]
    for piece in pieces:
        assert str(piece) in message, f"{piece!r} is not in {message!r}"


@pytest.fixture(params=["cpu", "meta"])
def call(request, generator):
    """A valid call, by name."""
    names = ("x", "weight", "bias", "initial_state")
    x = leaves(3, 5, 4, 3, generator, torch.float32)
    return {name: y.to(request.param) for name, y in zip(names, x, strict=True)}


SHAPES_REFUSED = {
    "x": ([(5, 4), (4,), (3, 5, 4, 1)], ["(B, T, D)"]),
    "weight": ([(3,), (5, 3), (1, 3), (4, 0), (4, 1, 3)], ["(D=4, W)"]),
    "bias": ([(), (1,), (3,), (4, 1), (1, 4)], ["(D=4)"]),
    "initial_state": (
        [(4, 2), (3, 4), (3, 4, 3), (3, 4, 1), (1, 4, 2), (3, 2, 4), (3, 4, 2, 1)],
        ["(B=3, D=4, W-1=2)"],
    ),
}


@pytest.mark.parametrize("name", SHAPES_REFUSED)
def test_shapes(name, call):
    shapes, pieces = SHAPES_REFUSED[name]
    for shape in shapes:
        bad = torch.ones(shape, device=call["x"].device)
        came = str(tuple(shape))
        said = [f"causal_conv1d: {name}", "shape", came, "expected", *pieces]
        refuses(ValueError, said, causal_conv1d, **call | {name: bad})


def test_dtypes(call):
    for dtype in (torch.int64, torch.bool, torch.complex64):
        bad = call | {"x": call["x"].to(dtype)}
        pieces = ["causal_conv1d: x", "dtype", short(dtype), "expected", "float32", "bfloat16"]
        refuses(TypeError, pieces, causal_conv1d, **bad)
    for name in ("weight", "bias"):
        for dtype in (torch.float64, torch.bfloat16, torch.int32):
            bad = call | {name: call[name].to(dtype)}
            pieces = [
                f"causal_conv1d: {name}",
                short(dtype),
                "expected float32",
                "x has dtype float32",
            ]
            refuses(TypeError, pieces, causal_conv1d, **bad)
    half = {k: v.bfloat16() for k, v in call.items()}
    for dtype in (torch.float16, torch.float64):
        bad = half | {"weight": half["weight"].to(dtype)}
        pieces = ["weight", short(dtype), "expected bfloat16 or float32"]
        refuses(TypeError, pieces, causal_conv1d, **bad)
    bad = half | {"initial_state": half["initial_state"].float()}
    refuses(TypeError, ["initial_state", "float32", "expected bfloat16"], causal_conv1d, **bad)


def test_devices(generator):
    x = leaves(3, 5, 4, 3, generator)
    for i, name in enumerate(("weight", "bias", "initial_state"), 1):
        bad = [y.to("meta") if i == j else y for j, y in enumerate(x)]
        refuses(
            RuntimeError, [f"causal_conv1d: {name}", "meta", "expected cpu"], causal_conv1d, *bad
        )


def test_activation(call):
    for word in ("relu", "", "SiLU", "swish", "identity"):
        pieces = ["causal_conv1d: activation", f"'{word}'", "expected None or 'silu'"]
        refuses(ValueError, pieces, causal_conv1d, **call, activation=word)
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d_reference(torch.ones(1, 1, 1), torch.ones(1, 1), activation="relu")


def test_cu_seqlens(call):
    one = call | {"x": call["x"][:1]}
    where = call["x"].device
    cu = torch.tensor([0, 2, 2, 5], device=where)
    causal_conv1d(**one, cu_seqlens=cu)
    refuses(ValueError, ["causal_conv1d: x", "expected B=1"], causal_conv1d, **call, cu_seqlens=cu)
    refuses(
        TypeError, ["cu_seqlens", "float32", "int32"], causal_conv1d, **one, cu_seqlens=cu.float()
    )
    refuses(ValueError, ["cu_seqlens", "shape"], causal_conv1d, **one, cu_seqlens=cu[None])
    pieces = ["initial_state", "num_sequences=2, D=4, W-1=2"]
    refuses(ValueError, pieces, causal_conv1d, **one, cu_seqlens=cu[:3])
    if where.type == "cpu":
        for bad, pieces in (
            ([1, 2, 3, 5], ["starts at 1", "expected 0"]),
            ([0, 3, 2, 5], ["descends from 3 to 2"]),
            ([0, 2, 2, 4], ["ends at 4", "T=5"]),
        ):
            refuses(ValueError, pieces, causal_conv1d, **one, cu_seqlens=torch.tensor(bad))


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])
def test_steps_refuse(in_place, call):
    f = causal_conv1d_step_ if in_place else causal_conv1d_step
    x, weight, bias, state = call["x"][:, 0], call["weight"], call["bias"], call["initial_state"]
    name = "causal_conv1d_step: "
    refuses(ValueError, [name + "x", "(B, D)"], f, call["x"], weight, bias, state)
    refuses(ValueError, [name + "weight", "(D=4, W)"], f, x, weight[:2], bias, state)
    refuses(ValueError, [name + "bias", "(D=4)"], f, x, weight, bias[:2], state)
    for bad in (state[:2], state[..., :1], state[:, :3], state[0]):
        refuses(ValueError, [name + "state", "B=3, D=4, W-1=2"], f, x, weight, bias, bad)
    refuses(TypeError, [name + "state", "float64", "float32"], f, x, weight, bias, state.double())
    i = torch.tensor([0, 2, -1], device=x.device)
    for bad in (state[..., :1], state[:, :3], state[0]):
        refuses(ValueError, [name + "state", "num_rows, D=4, W-1=2"], f, x, weight, bias, bad, i)
    refuses(
        TypeError,
        ["state_indices", "expected int32 or int64"],
        f,
        x,
        weight,
        bias,
        state,
        i.float(),
    )
    refuses(ValueError, ["state_indices", "(B=3)"], f, x, weight, bias, state, i[:2])
    refuses(ValueError, ["activation", "'g'"], f, x, weight, bias, state, i, "g")
    if x.is_cpu:
        before = state.clone()
        i[2] = 3
        refuses(ValueError, ["state_indices[2] is 3", "less than 3"], f, x, weight, bias, state, i)
        i[2] = 2
        refuses(ValueError, ["state_indices has 2 twice"], f, x, weight, bias, state, i)
        assert torch.equal(state, before)


def test_in_place_step_refuses(generator):
    x, weight, bias, state = leaves(3, 1, 4, 3, generator)
    x = x[:, 0]
    for i in range(4):
        args = [y.clone().requires_grad_(i == j) for j, y in enumerate((x, weight, bias, state))]
        refuses(
            RuntimeError,
            ["causal_conv1d_step_: an input requires grad"],
            causal_conv1d_step_,
            *args,
        )
    for shared in (
        state[:1].expand(3, 4, 2),
        state[..., :1].expand(3, 4, 2),
        torch.zeros(20, dtype=x.dtype).as_strided((3, 4, 2), (4, 1, 1)),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"state|single memory location"):
            causal_conv1d_step_(x, weight, bias, shared)
    before = state._version
    causal_conv1d_step_(x, weight, bias, state)
    assert state._version > before
