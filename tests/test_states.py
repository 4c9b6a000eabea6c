"""The whole sequence == chunks with the state handed over == step by step, values and gradients."""

import pytest
import torch
from cases import ALL, bounds, close, cotangents, gradients, over, wide

CUTS = pytest.mark.parametrize(
    "lengths", [(40,), (1,) * 40, (16, 16, 8), (17, 0, 1, 22)], ids=["one", "ones", "tiles", "odd"]
)


def chunked(case, options, lengths, reverse):
    f = case.bind(**options, reverse=reverse)
    cuts = bounds(lengths)
    pieces = list(zip(cuts, cuts[1:], strict=False))

    def run(*x):
        inputs, states = x[: case.inputs], x[case.inputs :]
        out = []
        for start, stop in reversed(pieces) if reverse else pieces:
            h, *states = f(*case.at(inputs, slice(start, stop)), *states)
            out.append(h)
        return torch.cat(out[::-1] if reverse else out, 1), *states

    return run


def stepped(case, options):
    def run(*x):
        inputs, states = x[: case.inputs], x[case.inputs :]
        out = []
        for t in range(inputs[0].shape[1]):
            h, *states = case.step(*case.at(inputs, t), *states, **options)
            out.append(h)
        return torch.stack(out, 1), *states

    return run


def check(case, options, reverse, other, dtype, generator, device):
    x = case.leaves(2, 40, 19, dtype, generator, device, grad=True)
    f = case.bind(**options, reverse=reverse)
    whole, parts = f(*x), other(*x)
    for name, w, p in zip(("h", *case.states), whole, parts, strict=True):
        assert w.dtype is p.dtype
        # two float32 sums of equal quality, each off by its own bound; half precision may round
        # differently where they differ in the last bit, by one unit
        kept = case.promised(p, x[0])
        close(p, wide(w), kept, factor=2 * case.slack, name=name)
    weights = cotangents(whole, generator)
    got = gradients(other, x, weights=weights)
    want = gradients(f, x, weights=weights)
    for name, g, w in zip(case.names, got, want, strict=True):
        kept = case.promised(g, x[0])
        close(g, wide(w), kept, True, 2 * case.slack, f"gradient of {name}")


@over(dtypes="all", cases=ALL)
@CUTS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_chunks(case, options, dtype, lengths, reverse, generator, device):
    check(
        case, options, reverse, chunked(case, options, lengths, reverse), dtype, generator, device
    )


@over(dtypes="all", cases=ALL)
def test_steps(case, options, dtype, generator, device):
    check(case, options, False, stepped(case, options), dtype, generator, device)


@over(variants=False, cases=ALL)
def test_truncated_backpropagation(case, generator, device):
    """A detached hand-over stops the gradient and leaves the values alone."""
    x = case.leaves(2, 20, 5, torch.float64, generator, device, grad=True)
    inputs, states = x[: case.inputs], x[case.inputs :]
    f = case.bind()
    first = f(*case.at(inputs, slice(10)), *states)
    second = f(*case.at(inputs, slice(10, None)), *[y.detach() for y in first[1:]])
    grads = torch.autograd.grad(second[0].sum(), inputs[: len(case.arguments)])
    for g in grads:
        assert not g[:, :10].any()
    assert any(g[:, 10:].any() for g in grads)
    for name, got, want in zip(case.states, second[1:], f(*x)[1:], strict=True):
        close(got, want, factor=case.slack, name=name)


@over(variants=False, cases=ALL)
def test_forward_then_reverse_is_time_reversal(case, generator, device):
    """reverse=True on flipped inputs is the forward direction, flipped."""
    x = case.leaves(2, 23, 17, torch.float32, generator, device)
    h, *finals = case.bind()(*x)
    n = len(case.arguments)
    flipped = case.bind(reverse=True)(*[y.flip(1) for y in x[:n]], *x[n:])
    close(flipped[0].flip(1), wide(h), factor=2 * case.slack)
    for got, want in zip(flipped[1:], finals, strict=True):
        close(got, wide(want), factor=2 * case.slack)
