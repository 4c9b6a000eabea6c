"""Gradients: against the float64 reference, against finite differences, twice, and forward."""

import gc
import weakref

import pytest
import torch
from cases import (
    ALL,
    CASES,
    DIRECT,
    SHAPES,
    close,
    cotangents,
    gradients,
    over,
    wide,
)

import torch_ext

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def through(outputs, kind):
    """The places of these outputs: all, h alone, the final states alone."""
    every = range(len(outputs))
    return {"all": every, "h": every[:1], "final_state": every[1:]}[kind]


def check_gradients(case, f, reference, leaves, kind, generator):
    outputs = f(*leaves)
    places = through(outputs, kind)
    weights = cotangents([outputs[i] for i in places], generator)
    got = gradients(f, leaves, places, weights, unused=case.loose)
    exact = [wide(x.cpu()) for x in leaves]
    want = gradients(reference, exact, places, [wide(g.cpu()) for g in weights], unused=True)
    for i, (leaf, g, w) in enumerate(zip(leaves, got, want, strict=True)):
        assert g.dtype is leaf.dtype and g.shape == leaf.shape
        name = f"gradient of {case.names[i]}"
        kept = case.promised(g, leaves[0])
        close(g, w, kept, grad=True, name=name, size=0.01, factor=case.slack)


@over(dtypes="all", cases=ALL)
@shapes
def test_gradients(case, options, dtype, shape, generator, device):
    B, T, D = shape
    T = min(T, case.longest)
    for k, kind in enumerate(("all", "h", "final_state")):
        # reverse and the state take turns; test_fuzz.py has the product
        state, reverse = k != 1, bool((k + T + D) % 2)
        x = case.leaves(B, T, D, dtype, generator, device, state=state, grad=True)
        f = case.bind(**options, reverse=reverse)
        reference = case.bind(case.reference, **options, reverse=reverse)
        check_gradients(case, f, reference, x, kind, generator)


@over(dtypes="all", variants=False, cases=ALL)
def test_gradient_of_each_input_alone(case, dtype, generator, device):
    """What does not ask for a gradient gets none, and changes no other's; every output is
    attached."""
    x = case.leaves(2, 9, 17, dtype, generator, device, grad=True)
    f, weights = case.bind(), None
    weights = cotangents(f(*x), generator)
    together = gradients(f, x, weights=weights)
    for i in range(len(x)):
        alone = [y.detach().requires_grad_(j == i) for j, y in enumerate(x)]
        outputs = f(*alone)
        attached = [y.requires_grad for y in outputs]
        cut = "an output is cut from the graph"
        assert any(attached) if case.loose else all(attached), cut
        pairs = [p for p in zip(outputs, weights, strict=True) if p[0].requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        assert [y.grad is None for y in alone] == [j != i for j in range(len(x))]
        assert torch.equal(alone[i].grad, together[i])


@over(variants=False, cases=ALL)
def test_no_graph_without_need(case, generator, device):
    x = case.leaves(2, 5, 3, torch.float32, generator, device)
    assert not any(y.requires_grad for y in case.bind()(*x))
    with torch.no_grad():
        assert not any(y.requires_grad for y in case.bind()(*[y.requires_grad_() for y in x]))
    with torch.inference_mode():
        assert all(y.is_inference() for y in case.bind()(*x))
    x = [y.detach() for y in x]
    x[0].requires_grad_()
    assert all(y.requires_grad for y in case.bind()(*x))


@over(variants=False, cases=ALL)
def test_backward_twice_and_accumulation(case, generator, device):
    x = case.leaves(2, 9, 17, torch.float32, generator, device, grad=True)
    total = sum(y.square().sum() for y in case.bind()(*x))
    total.backward(retain_graph=True)
    first = [y.grad.clone() for y in x]
    total.backward()
    for y, g in zip(x, first, strict=True):
        assert torch.equal(y.grad, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("changed", ["input", "h"])
def test_changed_in_place_before_backward(case, changed, generator, device):
    """What the backward reads is checked for changes since."""
    if changed == "h" and case not in CASES:
        pytest.skip("its backward does not read h")
    x = [y * 1 for y in case.leaves(2, 5, 3, torch.float32, generator, device, grad=True)]
    h, *finals = case.bind()(*x)
    with torch.no_grad():
        (h if changed == "h" else x[case.names.index(case.carrier)]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in finals).backward()


@over(variants=False, cases=ALL)
def test_graph_is_freed(case, generator, device):
    """Saving an output in its own node must not keep both alive."""
    x = case.leaves(2, 5, 3, torch.float32, generator, device, grad=True)
    gc.disable()
    try:
        h, *finals = case.bind()(*x)
        alive = weakref.ref(h)
        del h, finals
        assert alive() is None
    finally:
        gc.enable()


@over(dtypes="all", cases=DIRECT)
def test_backward_operator(case, options, dtype, generator, device):
    """Called by hand, with either gradient absent, or both: absent is zero."""
    x = case.leaves(2, 9, 17, dtype, generator, device)
    h, final = case.bind(**options)(*x)
    gh, gs = cotangents((h, final), generator)
    for p, q in ((gh, gs), (gh, None), (None, gs), (None, None)):
        got = case.backward(p, q, x, h, options)
        filled = [
            torch.zeros_like(o) if g is None else g for g, o in zip((p, q), (h, final), strict=True)
        ]
        want = case.backward(*filled, x, h, options)
        assert [g.dtype for g in got] == [y.dtype for y in x]
        for g, w in zip(got, want, strict=True):
            close(g, wide(w), grad=True)
    absent = case.backward(gh, gs, [*x[:-1], None], h, options)
    assert absent[-1].shape == x[-1].shape and absent[-1].dtype is case.state_dtype(dtype)


# ---- finite differences ----
FORMS = ("plain", "no_state_reverse", "packed", "packed_reverse")
DOUBLE = (torch.float64, torch.complex128)


def over_forms(f):
    """All forms; of options but the first of a case that is `thin`, that which has most in it."""
    rows = over(dtypes=DOUBLE, cases=ALL).args[1]
    values = []
    for row in rows:
        case, options, _ = row.values
        kinds = FORMS[-1:] if case.thin and options != case.variants[0] else FORMS
        values += [pytest.param(*row.values, kind, id=f"{row.id}-{kind}") for kind in kinds]
    return pytest.mark.parametrize(("case", "options", "dtype", "kind"), values)(f)


def form(case, options, name, dtype, generator, device, T=4):
    packed = "packed" in name
    if packed:
        cu = torch.tensor([0, 2, 2, T], device=device)
        options = dict(options, cu_seqlens=cu)
    rows = False if "no_state" in name else 3 if packed else 2
    x = case.leaves(1 if packed else 2, T, 2, dtype, generator, device, state=rows, grad=True)
    return case.bind(**options, reverse="reverse" in name), x


def differentiated(case, options, f, x):
    """gradcheck passes over outputs that do not ask for a gradient: here those alone that are
    constants."""
    constant = case.constant(options) if len(x) == case.inputs else ()
    for at, y in enumerate(f(*x)):
        assert y.requires_grad == (at not in constant)


@pytest.mark.consumer("gradcheck, batched and undefined gradients")
@over_forms
def test_gradcheck(case, options, dtype, kind, generator, device):
    f, x = form(case, options, kind, dtype, generator, device)
    differentiated(case, options, f, x)
    torch.autograd.gradcheck(
        f, x, check_undefined_grad=True, check_batched_grad=True, fast_mode=case.fast
    )


@pytest.mark.consumer("forward-mode AD (gradcheck)")
@over_forms
def test_gradcheck_forward_mode(case, options, dtype, kind, generator, device):
    f, x = form(case, options, kind, dtype, generator, device)
    torch.autograd.gradcheck(
        f,
        x,
        check_forward_ad=True,
        check_backward_ad=False,
        check_undefined_grad=False,
        check_batched_grad=False,
        check_batched_forward_grad=True,
        fast_mode=case.fast,
    )


@pytest.mark.consumer("gradgradcheck, batched gradients")
@over_forms
def test_gradgradcheck(case, options, dtype, kind, generator, device):
    f, x = form(case, options, kind, dtype, generator, device, T=3)
    torch.autograd.gradgradcheck(f, x, check_batched_grad=True, fast_mode=case.fast)


@pytest.mark.consumer("forward over reverse (gradgradcheck)")
@over_forms
def test_gradgradcheck_forward_over_reverse(case, options, dtype, kind, generator, device):
    f, x = form(case, options, kind, dtype, generator, device, T=3)
    torch.autograd.gradgradcheck(
        f,
        x,
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
        fast_mode=case.fast,
    )


@over(cases=ALL)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_double_backward_values(case, options, kind, generator, device):
    """At a size that gradgradcheck cannot afford: a gradient penalty against the reference's."""

    def penalty(f, x):
        h, *finals = f(*x)
        total = h.sin().sum() + sum(final.square().sum() for final in finals)
        grads = torch.autograd.grad(total, x, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), x)

    packed = [0, 9, 9, 30, 40]
    cu = {"cu_seqlens": torch.tensor(packed, device=device)} if kind == "packed" else {}
    x = case.leaves(1 if cu else 2, 40, 5, torch.float64, generator, device, 4 if cu else 2, True)
    got = penalty(case.bind(**options, **cu), x)
    want = penalty(case.bind(case.reference, **options, **cu), x)
    for g, w in zip(got, want, strict=True):
        close(g, w, grad=True, factor=16 * case.slack)


@over(dtypes=(torch.float32, torch.bfloat16), variants=False, cases=ALL)
def test_double_backward_in_low_precision(case, dtype, generator, device):
    """It runs, and is roughly right: the composite rounds between its operations."""
    x = case.leaves(2, 9, 5, dtype, generator, device, grad=True)

    def penalty(f, x):
        grads = torch.autograd.grad(sum(y.sin().sum() for y in f(*x)), x, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in grads), x)

    want = penalty(case.bind(case.reference), [wide(y.cpu()) for y in x])
    for leaf, g, w in zip(x, penalty(case.bind(), x), want, strict=True):
        assert g.dtype is leaf.dtype
        close(g, w, dtype, grad=True, factor=16 * case.slack)


def test_linear_scan_does_not_keep_b(generator):
    """Its gradient does not depend on b."""
    a, b = (torch.rand(2, 5, 3, generator=generator).requires_grad_() for _ in range(2))
    doubled = 2 * b
    kept = weakref.ref(doubled)
    h, _ = torch_ext.linear_scan(a, doubled)
    del doubled
    assert kept() is None
    want = torch.autograd.grad(torch_ext.linear_scan_reference(a, 2 * b)[0].square().sum(), (a, b))
    for g, w in zip(torch.autograd.grad(h.square().sum(), (a, b)), want, strict=True):
        close(g, w, grad=True)
