"""causal_conv1d: what is special to it, and the demands of those suites that are written for
recurrences alone."""

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


def test_no_gradient_of_y_is_zero(generator):
    """Through the final state alone, infinite inputs meet no 0 * inf."""
    x = leaves(1, 20, 5, 4, generator, torch.float32, requires=True)
    with torch.no_grad():
        x[0][0, 3] = torch.inf
    _, final = causal_conv1d(*x, activation="silu")
    grads = torch.autograd.grad(final.sum(), x)
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][:, -3:], torch.ones(1, 3, 5)) and not grads[0][:, :-3].any()


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
@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    "dtype, parameters, activation",
    [
        (torch.float32, torch.float32, None),
        (torch.float32, torch.float32, "silu"),
        (torch.bfloat16, torch.float32, "silu"),
    ],
    ids=str,
)
def test_opcheck(dtype, parameters, activation, generator):
    op, backward = CASE.op, CASE.backward_op
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
    ops = torch.ops.torch_ext
    step, step_ = ops.causal_conv1d_step.default, ops.causal_conv1d_step_.default
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
