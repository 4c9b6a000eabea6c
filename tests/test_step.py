"""One step at a time: the functional operator, its in-place twin, and pools of states."""

import pytest
import torch
from cases import ALL, close, cotangents, gradients, over, wide

INTS = pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])


def step_leaves(case, B, D, dtype, generator, device, rows=None, grad=False):
    x = case.leaves(B, 1, D, dtype, generator, device, state=B if rows is None else rows)
    return (
        [y.contiguous() for y in case.at(x, 0)]
        if not grad
        else [y.requires_grad_() for y in step_leaves(case, B, D, dtype, generator, device, rows)]
    )


def sequence(case, options):
    """The same step by the reference: f(*inputs, *states) -> (h, *states)."""
    f, n = case.bind(case.reference, **options), len(case.arguments)

    def step(*x):
        h, *states = f(*[y[:, None] for y in x[:n]], *x[n:])
        return h[:, 0], *states

    return step


def pooled(case, options, indices):
    """The pool's step by the reference: a negative index skips its row."""

    def step(*x):
        keep = [b for b, i in enumerate(indices) if i >= 0]
        rows = torch.tensor([indices[b] for b in keep], dtype=torch.int64)
        n, m = len(case.arguments), case.inputs
        inputs = [*[y[keep] for y in x[:n]], *x[n:m]]
        h, *states = sequence(case, options)(*inputs, *[pool[rows] for pool in x[m:]])
        out = h.new_zeros(len(indices), *h.shape[1:])
        return out.index_put((torch.tensor(keep, dtype=torch.int64),), h), *[
            pool.index_put((rows,), state) for pool, state in zip(x[m:], states, strict=True)
        ]

    return step


def states_of(case, x):
    return x[case.inputs :]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@over(dtypes="all", cases=ALL)
def test_step(case, options, dtype, generator, device):
    for B, D in ((0, 5), (3, 0), (1, 1), (3, 33), (2, 100)):
        x = step_leaves(case, B, D, dtype, generator, device)
        before = [y.clone() for y in states_of(case, x)]
        h, *states = case.bind_step(**options)(*x)
        want = sequence(case, options)(*[wide(y.cpu()) for y in x])
        assert h.dtype is dtype and h.shape == case.output_shape(B, None, D)
        close(h, want[0], name="h", factor=case.slack)
        for name, state, w in zip(case.states, states, want[1:], strict=True):
            assert state.dtype is case.state_dtype(dtype)
            close(state, w, name=name, factor=case.slack)
        assert equal(states_of(case, x), before), "the functional step changed its state"
        h_ = case.bind_step(case.step_, **options)(*x)
        assert torch.equal(h_, h) and equal(states_of(case, x), states)


@over(dtypes="all", cases=ALL)
def test_step_gradients(case, options, dtype, generator, device):
    x = step_leaves(case, 3, 33, dtype, generator, device, grad=True)
    weights = cotangents(case.bind_step(**options)(*x), generator)
    got = gradients(case.bind_step(**options), x, weights=weights)
    exact = [wide(y.cpu()) for y in x]
    want = gradients(sequence(case, options), exact, weights=[wide(g.cpu()) for g in weights])
    for y, g, w in zip(x, got, want, strict=True):
        assert g.dtype is y.dtype
        close(g, w, grad=True, factor=case.slack)


@over(dtypes=(torch.float64, torch.complex128), cases=ALL)
@pytest.mark.parametrize("kind", ["rows", "pool"])
def test_step_gradcheck(case, options, dtype, kind, generator, device):
    indices = {"rows": None, "pool": torch.tensor([3, -1, 0], device=device)}[kind]
    x = step_leaves(
        case, 3, 2, dtype, generator, device, rows=4 if kind == "pool" else 3, grad=True
    )
    f = case.bind_step(**options)
    if kind == "pool":
        f = lambda *y, step=f: step(*y, state_indices=indices)  # noqa: E731
    assert all(y.requires_grad for y in f(*x))
    torch.autograd.gradcheck(f, x, check_forward_ad=True, fast_mode=case.fast)
    torch.autograd.gradgradcheck(f, x, fast_mode=case.fast)


@over(dtypes=(torch.float32, torch.bfloat16), cases=ALL)
@INTS
def test_pool(case, options, dtype, index, generator, device):
    for indices in ([4, 0, 2], [-1, 3, -7], [-1, -1, -1], [], [2]):
        B = len(indices)
        x = step_leaves(case, B, 17, dtype, generator, device, rows=5)
        i = torch.tensor(indices, dtype=index, device=device)
        h, *pools = case.bind_step(**options)(*x, state_indices=i)
        want = pooled(case, options, indices)(*[wide(y.cpu()) for y in x])
        close(h, want[0], name="h", factor=case.slack)
        for b, slot in enumerate(indices):
            assert slot >= 0 or not h[b].any(), "a skipped row has an output"
        untouched = [r for r in range(5) if r not in indices]
        rows = zip(case.states, pools, want[1:], states_of(case, x), strict=True)
        for name, pool, w, before in rows:
            close(pool, w, name=name, factor=case.slack)
            assert torch.equal(pool[untouched], before[untouched])
        h_ = case.bind_step(case.step_, **options)(*x, state_indices=i)
        assert torch.equal(h_, h) and equal(states_of(case, x), pools)


@over(variants=False, cases=ALL)
def test_pool_gradients(case, generator, device):
    """Rows that no index names, and skipped rows, pass their gradient straight through."""
    indices = [4, -1, 0]
    x = step_leaves(case, 3, 17, torch.float64, generator, device, rows=6, grad=True)
    f = case.bind_step()
    i = torch.tensor(indices, device=device)
    step = lambda *y: f(*y, state_indices=i)  # noqa: E731
    weights = cotangents(step(*x), generator)
    got = gradients(step, x, weights=weights)
    exact = [wide(y.cpu()) for y in x]
    want = gradients(pooled(case, {}, indices), exact, weights=[w.cpu() for w in weights])
    for g, w in zip(got, want, strict=True):
        close(g, w, grad=True, factor=case.slack)
    for g, w in zip(states_of(case, got), weights[1:], strict=True):
        assert torch.equal(g[[1, 2, 3, 5]], w[[1, 2, 3, 5]])


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])
def test_index_out_of_range(case, in_place, generator, device):
    x = step_leaves(case, 2, 17, torch.float32, generator, device, rows=5)
    before = [y.clone() for y in states_of(case, x)]
    f = case.step_ if in_place else case.step
    for bad in (5, 2**31 - 1):
        i = torch.tensor([0, bad], device=device)
        with pytest.raises((IndexError, ValueError), match=rf"state_indices.*{bad}.*5"):
            f(*x, state_indices=i)
        assert equal(states_of(case, x), before), "a refused step changed the pool"


VIEWS = {
    "rows": lambda big: big[1::2, :17],
    "channels": lambda big: big[:4, ::2],
    "last": lambda big: big[:4, :17] if big.dim() == 2 else big[:4, :17, ::2],
    "transposed": lambda big: big.transpose(0, 1)[:4, :8],
    "channels_first": lambda big: big.movedim(1, -1).contiguous().movedim(-1, 1)[:4, :17],
}


@over(dtypes=(torch.float32, torch.bfloat16), variants=False, cases=ALL)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_in_place_on_views(case, dtype, view, generator, device):
    """States inside something larger."""
    kind, states, watched = case.state_dtype(dtype), [], []
    for name in case.states:
        n = case.shape(name, 4, None, 17)[2:]
        big = torch.randn(8, 34, *(2 * k for k in n), generator=generator).abs().to(device, kind)
        state = view(big)
        base = state._base if state._base is not None else state
        state = state[(slice(None), slice(17), *map(slice, n))]
        assert state.shape[2:] == n and state._base is not None
        inside = state.storage_offset() + sum(
            torch.arange(k, device=device).view(-1, *(1,) * (state.dim() - 1 - d)) * state.stride(d)
            for d, k in enumerate(state.shape)
        )
        memory = base.as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0)
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside[inside.flatten()] = False
        states.append(state)
        watched.append((memory, outside, memory[outside].clone()))
    leaves = step_leaves(case, 4, states[0].shape[1], dtype, generator, device)
    inputs = leaves[: case.inputs]
    for indices in (None, torch.tensor([2, -1, 0, 3], device=device)):
        h, *want = case.step(*inputs, *[y.clone() for y in states], state_indices=indices)
        h_ = case.step_(*inputs, *states, state_indices=indices)
        assert torch.equal(h_, h) and equal(states, want)
        for memory, outside, before in watched:
            assert torch.equal(memory[outside], before), "wrote outside the state"


@over(dtypes=(torch.float32, torch.complex64), variants=False, cases=ALL)
def test_in_place_on_a_lazy_state(case, dtype, generator, device):
    """Conjugation and negation that torch has only noted, not done."""
    x = step_leaves(case, 4, 5, dtype, generator, device)
    lazy = [torch._neg_view(-y) for y in states_of(case, x)]
    lazy = [y.conj() if dtype.is_complex else y for y in lazy]
    inputs = x[: case.inputs]
    h, *want = case.step(*inputs, *[y.resolve_neg().resolve_conj() for y in lazy])
    assert torch.equal(case.step_(*inputs, *lazy), h) and equal(lazy, want)


@over(variants=False, cases=ALL)
def test_in_place_counts_versions(case, generator, device):
    x = step_leaves(case, 2, 5, torch.float32, generator, device)
    states = states_of(case, x)
    before = [y._version for y in states]
    case.step_(*x)
    assert all(y._version > b for y, b in zip(states, before, strict=True))
    bases = [y[:1] for y in states]
    for base in bases:
        base._version  # noqa: B018
    seen = [y._version for y in states]
    n, m = len(case.arguments), case.inputs
    case.step_(*[y[:1] for y in x[:n]], *x[n:m], *bases)
    bumped = [y._version > s for y, s in zip(states, seen, strict=True)]
    assert all(bumped), "a step on a view did not bump its base"


@over(variants=False, cases=ALL)
def test_in_place_spoils_a_saved_state(case, generator, device):
    """A graph that saved the state notices that a step overwrote it."""
    for at in range(len(case.states)):
        x = step_leaves(case, 2, 5, torch.float32, generator, device)
        state = states_of(case, x)[at]
        w = torch.ones_like(state, requires_grad=True)
        y = (w * state).sum()
        case.step_(*x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("which", ["input", "state", "view"])
def test_in_place_refuses_gradients(case, which, generator, device):
    """It has no derivative: it says so, and points to the functional step, instead of dropping
    one."""
    x = step_leaves(case, 2, 5, torch.float32, generator, device)
    n = case.inputs
    before = [y.clone() for y in x[n:]]
    for i in range(n) if which == "input" else range(n, len(x)):
        y = [z.clone() for z in x]
        y[i].requires_grad_()
        if which != "input":
            y[i] = y[i] * 1
            y[i] = y[i][:, :] if which == "view" else y[i]
        with pytest.raises(RuntimeError, match=f"{case.name}_step_: an input requires grad"):
            case.step_(*y)
        assert equal([z.detach() for z in y[n:]], before)
        with torch.no_grad():
            case.step_(*y)
        assert not any(torch.equal(z.detach(), b) for z, b in zip(y[n:], before, strict=True))


@over(variants=False, cases=ALL)
def test_streaming_in_place_is_the_sequence(case, generator, device):
    x = case.leaves(3, 50, 17, torch.float32, generator, device)
    h, *finals = case.bind()(*x)
    inputs, states = x[: case.inputs], [y.clone() for y in states_of(case, x)]
    for t in range(50):
        h_ = case.step_(*case.at(inputs, t), *states)
        close(h_, wide(h[:, t]), factor=case.slack)
    for state, final in zip(states, finals, strict=True):
        close(state, wide(final), factor=case.slack)
