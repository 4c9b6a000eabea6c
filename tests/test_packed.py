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
            h, final = f(*inputs)
            return h, final[:0]
        return torch.cat([h for h, _ in rows], 1), torch.cat([s for _, s in rows])

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
        h, final = packed(*x)
        assert h.shape == x[0].shape and final.shape == case.state_shape(len(lengths), 19)
        assert h.is_contiguous() and final.is_contiguous()
        for name, g, w in zip(("h", "final_state"), (h, final), apart(*x), strict=True):
            assert g.dtype is w.dtype
            close(g, wide(w), factor=2, name=name)
        weights = cotangents((h, final), generator)
        got = gradients(packed, x, weights=weights)
        want = gradients(apart, x, weights=weights, unused=True)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            close(g, wide(w), grad=True, factor=2, name=f"gradient of leaf {i}")


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
    want = gradients(
        case.bind(cu_seqlens=cu.clone()), x, through=(1,), weights=[torch.ones_like(x[-1])]
    )
    final = case.bind(cu_seqlens=cu)(*x)[1]
    cu.copy_(torch.tensor([0, 30, 40]))
    try:
        got = torch.autograd.grad(final, x, torch.ones_like(final))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@over(variants=False, cases=ALL)
def test_sequences_do_not_see_each_other(case, generator, device):
    """NaN in one sequence stays there, in values and in gradients."""
    x = case.leaves(1, 40, 19, torch.float32, generator, device, state=3)
    cu = torch.tensor([0, 11, 29, 40], device=device)
    clean = case.bind(cu_seqlens=cu)(*x)
    x[0][:, 11:29] = torch.nan
    x = [y.requires_grad_() for y in x]
    h, final = case.bind(cu_seqlens=cu)(*x)
    assert h[:, 11:29].isnan().all() and final[1].isnan().all()
    for part in (slice(0, 11), slice(29, 40)):
        assert torch.equal(h[:, part], clean[0][:, part])
    assert torch.equal(final[::2], clean[1][::2])
    rows = [*x[: len(case.arguments)], x[-1]]  # parameters are one for all sequences
    grads = torch.autograd.grad((h, final), rows, (torch.ones_like(h), torch.ones_like(final)))
    for g in grads:
        if g is not grads[-1]:
            assert g[:, :11].isfinite().all() and g[:, 29:].isfinite().all()
        else:
            assert g[::2].isfinite().all()
