"""torch.func: every transform and their nestings, against the same transforms of the reference."""

import warnings

import pytest
import torch
from cases import ALL, close, over, wide
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

FACTOR = 16  # sums of gradients of gradients


def same(got, want, slack=1):
    """Nested tuples of tensors."""
    if isinstance(want, torch.Tensor):
        close(got, want, grad=True, factor=FACTOR * slack, size=1e-3)
        return
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        same(g, w, slack)


def loss(f, *x):
    h, *finals = f(*x)
    return h.sin().sum() + sum(final.pow(3).sum() for final in finals)


def both(case, transform, options=None, **more):
    """The transform of the operator and of its reference must agree."""
    options = dict(case.variants[-1] if options is None else options, **more)
    want = transform(case.bind(case.reference, **options))
    same(transform(case.bind(**options)), want, case.slack)


@pytest.fixture
def x(case, generator, device):
    return tuple(case.leaves(2, 5, 3, torch.float64, generator, device))


@pytest.fixture
def packed(device):
    return {"cu_seqlens": torch.tensor([0, 3, 3, 5], device=device)}


def everything(x):
    return tuple(range(len(x)))


@pytest.mark.consumer("torch.func.grad, vjp")
@over(cases=ALL)
def test_grad(case, options, x):
    both(case, lambda f: grad(lambda *y: loss(f, *y), everything(x))(*x), options)


@pytest.mark.consumer("torch.func.grad, vjp")
@over(variants=False, cases=ALL)
def test_grad_without_state_and_reversed(case, x):
    both(case, lambda f: grad(lambda *y: loss(f, *y))(*x[: case.inputs]), reverse=True)


@pytest.mark.consumer("torch.func.grad, vjp")
@over(variants=False, cases=ALL)
def test_grad_packed(case, generator, device, packed):
    x = case.leaves(1, 5, 3, torch.float64, generator, device, state=3)
    both(case, lambda f: grad(lambda *y: loss(f, *y), everything(x))(*x), **packed)


@pytest.mark.consumer("torch.func.grad of grad, three deep")
@over(cases=ALL)
@pytest.mark.parametrize("depth", [2, 3])
def test_grad_of_grad(case, options, depth, generator, device):
    """The derivatives of a function of one number, s -> loss(s * inputs)."""
    x = case.leaves(1, 4, 1, torch.float64, generator, device)
    s = torch.tensor(0.7, dtype=torch.float64, device=device)

    def nested(f):
        g = lambda s: loss(f, *[y * s for y in x])  # noqa: E731
        for _ in range(depth):
            g = grad(g)
        return g(s)

    both(case, nested, options)


@pytest.mark.consumer("torch.func.grad, vjp")
@over(variants=False, cases=ALL)
def test_grad_over_vjp(case, x):
    def transform(f):
        def inner(first):
            h, pull = vjp(lambda second: f(first, second, *x[2:])[0], x[1])
            return pull(torch.ones_like(h))[0].square().sum()

        return grad(inner)(x[0])

    both(case, transform)


@pytest.mark.consumer("autograd over torch.func.grad")
@over(variants=False, cases=ALL)
def test_autograd_over_func_grad(case, x):
    x = [y.requires_grad_() for y in x]

    def transform(f):
        size = grad(lambda *y: loss(f, *y))(*x).square().sum()
        grads = torch.autograd.grad(size, x, allow_unused=case.loose)
        return [torch.zeros_like(y) if g is None else g for g, y in zip(grads, x, strict=True)]

    both(case, transform)


# The convolution's second argument has two dimensions: its own file has its in_dims.
MOST = [case for case in ALL if case.name != "causal_conv1d"]


def in_dims(n):
    """Which dimension of each leaf is mapped; the last leaf is the state."""
    return [
        (0,) * n,
        (1,) * n,
        (2, 0, *(1,) * (n - 2)),
        (None,) * (n - 1) + (0,),
        (0,) + (None,) * (n - 1),
        (None, 3, *(None,) * (n - 3), 2),
        (-1,) * n,
    ]


def stacked(x, dims):
    return [
        y if d is None else torch.stack([y, y * 0.5, y + 0.1], d)
        for y, d in zip(x, dims, strict=True)
    ]


def without_warnings(f):
    """vmap's fallback, a loop over the batch, says so in a warning."""

    def run(*args):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop")
            return f(*args)

    return run


@pytest.mark.consumer("torch.func.vmap, any in_dims")
@over(variants=False, cases=MOST)
@pytest.mark.parametrize("which", range(7))
def test_vmap(case, which, x):
    dims = in_dims(len(x))[which]
    both(case, lambda f: without_warnings(vmap(f, dims))(*stacked(x, dims)))


@pytest.mark.consumer("torch.func.vmap, any in_dims")
@over(variants=False, cases=ALL)
@pytest.mark.parametrize("out_dims", [0, 1, -1])
def test_vmap_out_dims(case, out_dims, x):
    dims = (0,) * len(x)
    both(case, lambda f: vmap(f, dims, out_dims)(*stacked(x, dims)), reverse=True)


@pytest.mark.consumer("torch.func.vmap, any in_dims")
@over(variants=False, cases=ALL)
def test_vmap_of_vmap(case, x):
    dims = (0,) * len(x)
    deep = [torch.stack([y, y / 2], 1) for y in stacked(x, dims)]
    both(case, lambda f: vmap(vmap(f))(*deep))


@pytest.mark.consumer("torch.func.vmap, any in_dims")
@over(variants=False, cases=ALL)
@pytest.mark.parametrize("empty", ["batch", "time", "channels"])
def test_vmap_of_nothing(case, empty, generator, device):
    B, T, D = (0 if empty == name else 2 for name in ("batch", "time", "channels"))
    x = stacked(case.leaves(B, T, D, torch.float64, generator, device), (0,) * len(case.names))
    h, *finals = vmap(case.bind())(*x)
    assert h.shape == (3, *case.output_shape(B, T, D))
    for name, final in zip(case.states, finals, strict=True):
        assert final.shape == (3, *case.shape(name, B, None, D))


@pytest.mark.consumer("torch.func.vmap, any in_dims")
@over(variants=False, cases=ALL)
def test_vmap_without_state_and_in_other_dtypes(case, generator, device):
    for dtype in case.dtypes:
        x = case.leaves(2, 5, 3, dtype, generator, device, state=False)
        x = stacked(x, (0,) * len(x))
        outputs = vmap(case.bind())(*x)
        for i in range(3):
            want = case.bind()(*[y[i] for y in x])
            for y, w in zip(outputs, want, strict=True):
                if case.loose:  # torch's own operators, whose last bit depends on the size
                    close(y[i], wide(w), factor=case.slack)
                else:
                    assert torch.equal(y[i], w)


@pytest.mark.consumer("torch.func.vmap over packed sequences")
@over(variants=False, cases=MOST)
@pytest.mark.parametrize("which", range(7))
def test_vmap_packed(case, which, generator, device, packed):
    x = case.leaves(1, 5, 3, torch.float64, generator, device, state=3)
    dims = in_dims(len(x))[which]
    both(case, lambda f: without_warnings(vmap(f, dims))(*stacked(x, dims)), **packed)


@pytest.mark.consumer("torch.func.vmap over packed sequences")
@over(variants=False, cases=ALL)
def test_vmap_of_grad_packed(case, generator, device, packed):
    x = case.leaves(1, 5, 3, torch.float64, generator, device, state=3)
    x = stacked(x, (0,) * len(x))
    both(
        case,
        lambda f: without_warnings(vmap(grad(lambda *y: loss(f, *y), everything(x))))(*x),
        **packed,
    )


@pytest.mark.consumer("torch.func.vmap over packed sequences")
@over(variants=False, cases=ALL)
def test_vmap_over_cu_seqlens_is_refused(case, generator, device):
    x = case.leaves(1, 5, 3, torch.float64, generator, device, state=False)
    cu = torch.tensor([[0, 5], [0, 5]], device=device)
    with pytest.raises(ValueError, match=f"{case.name}: cu_seqlens has a vmap dimension"):
        vmap(lambda cu: case.function(*x, cu_seqlens=cu))(cu)


@pytest.mark.consumer("torch.func.vmap(grad), grad(vmap), jacrev(vmap)")
@over(cases=ALL)
def test_vmap_of_grad(case, options, x):
    dims = (0,) * len(x)
    f_grad = lambda f: grad(lambda *y: loss(f, *y), everything(x))  # noqa: E731
    both(case, lambda f: without_warnings(vmap(f_grad(f)))(*stacked(x, dims)), options)


@pytest.mark.consumer("torch.func.vmap(grad), grad(vmap), jacrev(vmap)")
@over(variants=False, cases=ALL)
def test_vmap_of_grad_of_some(case, x):
    """Only some are mapped, and only some differentiated: per-example gradients of a shared
    input."""
    dims = (0,) + (None,) * (len(x) - 1)
    many = stacked(x, dims)
    both(case, lambda f: without_warnings(vmap(grad(lambda *y: loss(f, *y), (1,)), dims))(*many))


@pytest.mark.consumer("torch.func.vmap(grad), grad(vmap), jacrev(vmap)")
@over(variants=False, cases=ALL)
def test_vmap_of_grad_of_grad(case, generator, device):
    x = stacked(case.leaves(1, 3, 2, torch.float64, generator, device), (0,) * len(case.names))

    def penalty(f):
        return lambda *y: grad(lambda *z: loss(f, *z))(*y).square().sum()

    both(case, lambda f: vmap(grad(penalty(f), everything(x)))(*x))


@pytest.mark.consumer("torch.func.vmap(grad), grad(vmap), jacrev(vmap)")
@over(variants=False, cases=ALL)
def test_grad_of_vmap(case, x):
    many = stacked(x, (0,) * len(x))

    def transform(f):
        total = lambda *y: vmap(lambda *z: loss(f, *z))(*y).sum()  # noqa: E731
        return grad(total, everything(x))(*many)

    both(case, transform)


@pytest.mark.consumer("torch.func.jacrev, jacfwd, hessian")
@over(variants=False, cases=ALL)
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
def test_jacobians(case, transform, generator, device):
    x = case.leaves(2, 3, 2, torch.float64, generator, device)
    for i in range(len(x)):
        at = lambda f, i=i: lambda y: f(*x[:i], y, *x[i + 1 :])[0].sin()  # noqa: E731
        both(case, lambda f, at=at, i=i: transform(at(f))(x[i]))


@pytest.mark.consumer("torch.func.jacrev, jacfwd, hessian")
@over(variants=False, cases=ALL)
def test_jacobian_of_a_final_state(case, generator, device):
    x = case.leaves(2, 3, 2, torch.float64, generator, device)
    for transform in (jacrev, jacfwd):
        both(case, lambda f, t=transform: t(lambda *y: f(*y)[1:], everything(x))(*x))


@pytest.mark.consumer("torch.func.jvp, jvp of jvp")
@over(cases=ALL)
def test_jvp(case, options, x):
    tangents = tuple(y.cos() for y in x)
    both(case, lambda f: jvp(f, x, tangents), options)
    both(case, lambda f: jvp(lambda *y: jvp(f, y, y)[1], x, tangents), options)


@pytest.mark.consumer("torch.func.jvp, jvp of jvp")
@over(variants=False, cases=ALL)
def test_jvp_of_one_input(case, x):
    """Tangents for some inputs only, and under plain forward-mode AD."""
    for i in range(len(x)):
        at = lambda f, i=i: lambda y: f(*x[:i], y, *x[i + 1 :])  # noqa: E731
        both(case, lambda f, at=at, i=i: jvp(at(f), (x[i],), (x[i].cos(),)))
    want = jvp(case.bind(case.reference), x, tuple(y.cos() for y in x))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(y, y.cos()) for y in x]
        pairs = [torch.autograd.forward_ad.unpack_dual(y) for y in case.bind()(*duals)]
        same(tuple(zip(*pairs, strict=True)), want, case.slack)


@pytest.mark.consumer("torch.func.jvp, jvp of jvp")
@over(variants=False, cases=ALL)
def test_vmap_of_jvp_and_grad_of_jvp(case, x):
    many = stacked(x, (0,) * len(x))
    both(case, lambda f: vmap(lambda *y: jvp(f, y, y))(*many))
    slope = lambda f: lambda *y: jvp(lambda *z: loss(f, *z), y, y)[1]  # noqa: E731
    both(case, lambda f: grad(slope(f), everything(x))(*x))


@pytest.mark.consumer("torch.func.jvp, jvp of jvp")
@over(variants=False, cases=ALL)
def test_jvp_of_the_step(case, generator, device):
    x = case.leaves(3, 1, 2, torch.float64, generator, device)
    x = tuple(case.at(x, 0))
    one, n = case.bind(case.reference), len(case.arguments)

    def reference(*y):
        h, *states = one(*[z[:, None] for z in y[:n]], *y[n:])
        return h[:, 0], *states

    transforms = (
        lambda f: jvp(f, x, tuple(y.cos() for y in x)),
        lambda f: grad(lambda *y: loss(f, *y), everything(x))(*x),
        lambda f: vmap(f)(*[torch.stack([y, y / 2]) for y in x]),
        lambda f: vmap(grad(lambda *y: loss(f, *y)))(*[torch.stack([y, y / 2]) for y in x]),
    )
    for transform in transforms:
        same(without_warnings(transform)(case.step), transform(reference), case.slack)


@pytest.mark.consumer("per-sample gradients of a module (functional_call)")
@over(variants=False, cases=ALL)
def test_per_sample_gradients(case, generator, device):
    module = case.layer().to(device, torch.float64)
    x = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).to(device)
    parameters = dict(module.named_parameters())

    def one(parameters, x):
        return functional_call(module, parameters, (x[None],))[0].square().sum()

    got = without_warnings(vmap(grad(one), (None, 0)))(parameters, x)
    for i in range(3):
        want = torch.autograd.grad(module(x[i : i + 1])[0].square().sum(), parameters.values())
        for g, w in zip(got.values(), want, strict=True):
            close(g[i], w, grad=True, factor=case.slack)


@pytest.mark.consumer("ensembles (stack_module_state)")
@over(variants=False, cases=ALL)
def test_ensemble(case, generator, device):
    modules = [case.layer().to(device, torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).to(device)

    def run(parameters, buffers):
        return functional_call(modules[0], (parameters, buffers), (x,))[0]

    got = without_warnings(vmap(run))(parameters, buffers)
    for g, module in zip(got, modules, strict=True):
        close(g, module(x)[0].detach(), factor=case.slack)
