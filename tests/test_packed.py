"""Sequences end to end in one row (`cu_seqlens`) == each sequence in a call of its own."""

import pytest
import torch
from cases import ALL, bounds, close, cotangents, gradients, over, wide

LENGTHS = {
    "one": (40,),
    "even": (20, 20),
    "odd": (1, 17, 22),
    "empty_inside": (7, 0, 0, 33),
    "empty_ends": (0, 13, 27, 0),
    "all_empty": (0, 0, 0),
    "no_sequences": (),
    "ones": (1,) * 40,
    "long": (257, 3, 64),
}


def separate(case, options, lengths):
    """One call per sequence."""
    f, cuts = case.bind(**options), bounds(lengths)

    def run(*x):
        inputs, states = x[: case.inputs], x[case.inputs :]
        rows = []
        for s, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            state = [y[s : s + 1] for y in states]
            rows.append(f(*case.at(inputs, slice(start, stop)), *state))
        if not rows:
            h, *finals = f(*inputs)
            return h, *[final[:0] for final in finals]
        h, *finals = zip(*rows, strict=True)
        return torch.cat(h, 1), *map(torch.cat, finals)

    return run


@over(dtypes="all", cases=ALL)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed(case, options, dtype, lengths, reverse, generator, device):
    options = dict(options, reverse=reverse)
    for state in (False, len(lengths)):
        x = case.leaves(1, sum(lengths), 19, dtype, generator, device, state=state, grad=True)
        cu = torch.tensor(bounds(lengths), dtype=torch.int32, device=device)
        packed = case.bind(**options, cu_seqlens=cu)
        apart = separate(case, options, lengths)
        outputs = packed(*x)
        assert outputs[0].shape == case.output_shape(1, sum(lengths), 19)
        for name, final in zip(case.states, outputs[1:], strict=True):
            assert final.shape == case.shape(name, len(lengths), None, 19)
        for name, g, w in zip(("h", *case.states), outputs, apart(*x), strict=True):
            assert g.dtype is w.dtype and g.is_contiguous()
            kept = case.promised(g, x[0])
            close(g, wide(w), kept, factor=2 * case.slack, name=name)
        weights = cotangents(outputs, generator)
        got = gradients(packed, x, weights=weights, unused=case.loose)
        want = gradients(apart, x, weights=weights, unused=True)
        for name, g, w in zip(case.names, got, want, strict=False):
            kept = case.promised(g, x[0])
            close(g, wide(w), kept, True, 2 * case.slack, f"gradient of {name}")


@over(variants=False, cases=ALL)
def test_forms_of_cu_seqlens(case, generator, device):
    """int32 or int64, on the CPU or beside the inputs, contiguous or a view: all the same."""
    x = case.leaves(1, 40, 19, torch.float32, generator, device, state=3, grad=True)
    plain = torch.tensor([0, 1, 18, 40], device=device)
    spread = torch.stack([plain, plain], 1).flatten()
    want = case.bind(cu_seqlens=plain)(*x)
    weights = cotangents(want, generator)
    grads = gradients(case.bind(cu_seqlens=plain), x, weights=weights)
    for cu in (plain.int(), plain.cpu(), plain.int().cpu(), spread[::2], spread.int()[1::2]):
        f = case.bind(cu_seqlens=cu)
        assert all(torch.equal(g, w) for g, w in zip(f(*x), want, strict=True))
        again = gradients(f, x, weights=weights)
        assert all(torch.equal(g, w) for g, w in zip(again, grads, strict=True))


@over(variants=False, cases=ALL)
def test_cu_seqlens_changed_before_backward(case, generator, device):
    """It is part of what was saved: a change is noticed or has no effect, never a wrong
    gradient."""
    x = case.leaves(1, 40, 19, torch.float32, generator, device, state=2, grad=True)
    cu = torch.tensor([0, 10, 40], device=device)
    states = range(1, 1 + len(case.states))
    ones = [torch.ones_like(y) for y in x[case.inputs :]]
    want = gradients(case.bind(cu_seqlens=cu.clone()), x, states, ones, unused=case.loose)
    finals = case.bind(cu_seqlens=cu)(*x)[1:]
    cu.copy_(torch.tensor([0, 30, 40]))
    try:
        got = torch.autograd.grad(finals, x, ones, allow_unused=case.loose)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert all(g is None or torch.equal(g, w) for g, w in zip(got, want, strict=True))


@over(variants=False, cases=ALL)
def test_sequences_do_not_see_each_other(case, generator, device):
    """NaN in one sequence stays there, in values and in gradients."""
    x = case.leaves(1, 40, 19, torch.float32, generator, device, state=3)
    cu = torch.tensor([0, 11, 29, 40], device=device)
    clean = case.bind(cu_seqlens=cu)(*x)
    x[case.arguments.index(case.carrier)][:, 11:29] = torch.nan
    x = [y.requires_grad_() for y in x]
    h, *finals = case.bind(cu_seqlens=cu)(*x)
    assert h[:, 11:29].isnan().all() and any(final[1].isnan().all() for final in finals)
    for part in (slice(0, 11), slice(29, 40)):
        assert torch.equal(h[:, part], clean[0][:, part])
    for final, was in zip(finals, clean[1:], strict=True):
        assert torch.equal(final[::2], was[::2])
    n = len(case.arguments)
    rows = [*x[:n], *x[case.inputs :]]  # parameters are one for all sequences
    outputs = (h, *finals)
    grads = torch.autograd.grad(outputs, rows, [torch.ones_like(y) for y in outputs])
    for g in grads[:n]:
        assert g[:, :11].isfinite().all() and g[:, 29:].isfinite().all()
    for g in grads[n:]:
        assert g[::2].isfinite().all()
