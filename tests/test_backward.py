"""Gradients: against the float64 reference, against finite differences, twice, and forward."""

import gc
import weakref

import pytest
import torch
from cases import (
    ALL,
    OTHERS,
    SHAPES,
    close,
    cotangents,
    gradients,
    over,
    wide,
)

import torch_ext

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
THROUGH = {"both": (0, 1), "h": (0,), "final_state": (1,)}


def check_gradients(f, reference, leaves, through, generator):
    outputs = [f(*leaves)[i] for i in through]
    weights = cotangents(outputs, generator)
    got = gradients(f, leaves, through, weights)
    exact = [wide(x.cpu()) for x in leaves]
    want = gradients(reference, exact, through, [wide(g.cpu()) for g in weights], unused=True)
    for i, (leaf, g, w) in enumerate(zip(leaves, got, want, strict=True)):
        assert g.dtype is leaf.dtype and g.shape == leaf.shape
        close(g, w, grad=True, name=f"gradient of leaf {i}", size=0.01)


@over(dtypes="all", cases=ALL)
@shapes
def test_gradients(case, options, dtype, shape, generator, device):
    B, T, D = shape
    for k, through in enumerate(THROUGH.values()):
        # reverse and the state take turns; test_fuzz.py has the product
        state, reverse = k != 1, bool((k + T + D) % 2)
        x = case.leaves(B, T, D, dtype, generator, device, state=state, grad=True)
        f = case.bind(**options, reverse=reverse)
        reference = case.bind(case.reference, **options, reverse=reverse)
        check_gradients(f, reference, x, through, generator)


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
        assert all(y.requires_grad for y in outputs), "an output is cut from the graph"
        torch.autograd.backward(outputs, weights)
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
    assert [y.requires_grad for y in case.bind()(*x)] == [True, True]


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
    if changed == "h" and case in OTHERS:
        pytest.skip("its backward does not read h")
    x = [y * 1 for y in case.leaves(2, 5, 3, torch.float32, generator, device, grad=True)]
    h, final = case.bind()(*x)
    with torch.no_grad():
        (h if changed == "h" else x[0]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        final.sum().backward()


@over(variants=False, cases=ALL)
def test_graph_is_freed(case, generator, device):
    """Saving an output in its own node must not keep both alive."""
    x = case.leaves(2, 5, 3, torch.float32, generator, device, grad=True)
    gc.disable()
    try:
        h, final = case.bind()(*x)
        alive = weakref.ref(h)
        del h, final
        assert alive() is None
    finally:
        gc.enable()


@over(dtypes="all", cases=ALL)
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


def form(case, options, name, dtype, generator, device, T=4):
    packed = "packed" in name
    if packed:
        cu = torch.tensor([0, 2, 2, T], device=device)
        options = dict(options, cu_seqlens=cu)
    rows = False if "no_state" in name else 3 if packed else 2
    x = case.leaves(1 if packed else 2, T, 2, dtype, generator, device, state=rows, grad=True)
    return case.bind(**options, reverse="reverse" in name), x


@pytest.mark.consumer("gradcheck, batched and undefined gradients")
@over(dtypes=DOUBLE, cases=ALL)
@pytest.mark.parametrize("kind", FORMS)
def test_gradcheck(case, options, dtype, kind, generator, device):
    f, x = form(case, options, kind, dtype, generator, device)
    assert all(y.requires_grad for y in f(*x))  # gradcheck passes over outputs that do not
    torch.autograd.gradcheck(f, x, check_undefined_grad=True, check_batched_grad=True)


@pytest.mark.consumer("forward-mode AD (gradcheck)")
@over(dtypes=DOUBLE, cases=ALL)
@pytest.mark.parametrize("kind", FORMS)
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
    )


@pytest.mark.consumer("gradgradcheck, batched gradients")
@over(dtypes=DOUBLE, cases=ALL)
@pytest.mark.parametrize("kind", FORMS)
def test_gradgradcheck(case, options, dtype, kind, generator, device):
    f, x = form(case, options, kind, dtype, generator, device, T=3)
    torch.autograd.gradgradcheck(f, x, check_batched_grad=True)


@pytest.mark.consumer("forward over reverse (gradgradcheck)")
@over(dtypes=DOUBLE, cases=ALL)
@pytest.mark.parametrize("kind", FORMS)
def test_gradgradcheck_forward_over_reverse(case, options, dtype, kind, generator, device):
    f, x = form(case, options, kind, dtype, generator, device, T=3)
    torch.autograd.gradgradcheck(
        f, x, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


@over(cases=ALL)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_double_backward_values(case, options, kind, generator, device):
    """At a size that gradgradcheck cannot afford: a gradient penalty against the reference's."""

    def penalty(f, x):
        h, final = f(*x)
        grads = torch.autograd.grad(h.sin().sum() + final.square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), x)

    packed = [0, 9, 9, 30, 40]
    cu = {"cu_seqlens": torch.tensor(packed, device=device)} if kind == "packed" else {}
    x = case.leaves(1 if cu else 2, 40, 5, torch.float64, generator, device, 4 if cu else 2, True)
    got = penalty(case.bind(**options, **cu), x)
    want = penalty(case.bind(case.reference, **options, **cu), x)
    for g, w in zip(got, want, strict=True):
        close(g, w, grad=True, factor=16)


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
        close(g, w, dtype, grad=True, factor=16)


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
