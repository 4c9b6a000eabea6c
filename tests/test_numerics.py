"""No NaN, no infinity and no lost digits that the exact answer does not have; those that it has,
arrive."""

import math

import numpy as np
import oracle
import pytest
import torch
from cases import (
    REAL,
    close,
    cotangents,
    error,
    gradients,
    over,
    wide,
)

GATED = ("min_gru", "min_lstm")


def gates(case):
    return [i for i, name in enumerate(case.arguments) if "gate" in name]


def both_ways(case, options, x, generator, weights=None):
    """Outputs and gradients of the operator, and of the reference in float64."""
    x = [y.requires_grad_() for y in x]
    f, reference = case.bind(**options), case.bind(case.reference, **options)
    weights = weights or cotangents(f(*x), generator)
    exact = [wide(y.cpu()) for y in x]
    got = [*f(*x), *gradients(f, x, weights=weights)]
    exact_weights = [wide(g.cpu()) for g in weights]
    want = [*reference(*exact), *gradients(reference, exact, weights=exact_weights)]
    return got, want


@over(dtypes=REAL)
@pytest.mark.parametrize("size", [20.0, 80.0, 88.75, 104.0, 710.0, 750.0, 1e4, "mixed"])
def test_extreme_gates(case, options, dtype, size, generator, device):
    """Gates far beyond where exp overflows or both sigmoids are 0 in floating point."""
    if case.name not in GATED:
        pytest.skip("has no gate nonlinearity")
    B, T, D = 2, 33, 35
    x = case.leaves(B, T, D, dtype, generator, device)
    for i in gates(case):
        sign = torch.randint(-1, 2, (B, T, D), generator=generator).to(device)
        if size == "mixed":
            exponent = 6 * torch.rand(B, T, D, generator=generator) - 2
            x[i] = (sign * 10 ** exponent.to(device)).clamp(-6e4, 6e4).to(dtype)
        else:
            x[i] = (sign * size + x[i]).to(dtype)
    got, want = both_ways(case, options, x, generator)
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        assert w.isfinite().all()
        assert g.isfinite().all()
        close(g, w, grad=k > 1)


@over(dtypes=REAL)
def test_equal_extreme_gates(case, options, dtype, generator, device):
    """Both gates of a pair at the same flank: f / (f + i) is 1/2 where f and i are 0."""
    if case.name != "min_lstm" or not options["normalize"]:
        pytest.skip("has no quotient of gates")
    x = case.leaves(1, 4, 16, dtype, generator, device)
    for i in gates(case):
        x[i][:] = torch.tensor([-1e4, -100.0, 100.0, 1e4], device=device)[None, :, None].to(dtype)
    got, want = both_ways(case, options, x, generator)
    assert torch.allclose(
        want[0][:, 0], 0.5 * (wide(x[-1].cpu()) + _candidate(options, x[2][:, 0]))
    )
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        close(g, w, grad=k > 1)


def _candidate(options, x):
    return torch.from_numpy(oracle.activate(wide(x.cpu()).detach().numpy(), options["activation"]))


@over(dtypes="all", variants=False)
@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_exact_decays(case, dtype, decay, generator, device):
    """A decay of exactly 0 forgets everything, of exactly 1 nothing: bitwise where sums are
    exact."""
    if case.name != "linear_scan":
        pytest.skip("its decay is a sigmoid")
    x = case.leaves(2, 33, 19, dtype, generator, device)
    x[0].fill_(decay)
    x[1] = x[1].real.mul(2).round().clamp(-2, 2).to(dtype)
    x[2] = x[2].real.mul(2).round().clamp(-2, 2).to(x[2].dtype)
    got, want = both_ways(case, {}, x, generator)
    for g, w in zip(got[:2], want[:2], strict=True):
        assert torch.equal(wide(g).cpu(), w.detach())
    for g, w in zip(got[2:], want[2:], strict=True):
        close(g, w, grad=True)


@over(dtypes=(torch.float32, torch.bfloat16, torch.complex64))
@pytest.mark.parametrize("memory", ["short", "long"])
def test_long_sequences(case, options, dtype, memory, generator, device):
    """T = 1e5: no drift. The values against a numpy loop, the gradients against the float64
    operator."""
    T, D = 100_000, 6
    x = case.leaves(1, T, D, dtype, generator, device)
    if memory == "long":  # thousands of steps
        shift = {"gate": -3, "forget_gate": 3, "input_gate": -2}
        for i, name in enumerate(case.arguments):
            if name == "a":
                x[i] = (x[i] / x[i].abs().clamp(min=0.01) * 0.9998).to(dtype)
            elif name in shift:
                x[i] += shift[name]
    f = case.bind(**options)
    h, final = f(*x)
    arrays = [wide(y.cpu()).numpy() for y in x]
    want, last = oracle.loop(case.name, arrays[:-1], arrays[-1], **options)
    # with a memory of n steps, n independent roundings add up to sqrt(n) of them: n is up to 10000
    factor = 8 if memory == "long" else 1
    close(h, torch.from_numpy(want), factor=factor, name="h")
    close(final, torch.from_numpy(last), factor=factor, name="final_state")

    x = [y.requires_grad_() for y in x]
    weights = cotangents((h, final), generator)
    exact = [wide(y) for y in x]
    double = f(*exact)
    close(double[0], torch.from_numpy(want), factor=factor, name="h in float64")
    want = torch.autograd.grad(double, exact, [wide(g).detach() for g in weights])
    for g, w in zip(gradients(f, x, weights=weights), want, strict=True):
        close(g, w, grad=True, factor=factor)


@over(dtypes=(torch.float32, torch.float64), variants=False)
def test_denormals(case, dtype, generator, device):
    """Inputs, states and results too small for a normal number may become 0, and nothing worse."""
    tiny = torch.finfo(dtype).tiny
    x = case.leaves(2, 40, 19, dtype, generator, device)
    x[-2] = x[-2] * tiny  # the candidate, or b
    x[-1] = x[-1] * tiny
    got, want = both_ways(case, {}, x, generator)
    for g, w in zip(got[:2], want[:2], strict=True):
        assert (wide(g).cpu() - w).abs().max() <= 64 * tiny
    for g, w in zip(got[2:], want[2:], strict=True):
        # a gradient may be a product of something flushed with a sum over hundreds of steps
        assert error(g, w, floor=1e4 * tiny) <= 256 * torch.finfo(dtype).eps


@over(variants=False)
def test_decayed_state_does_not_stick(case, generator, device):
    """A state that only decays ends at 0 or at a denormal, also where a step stops changing it."""
    x = case.leaves(1, 5000, 19, torch.float32, generator, device)
    for i, name in enumerate(case.arguments):
        x[i].fill_({"a": 0.5, "gate": 0.0, "forget_gate": 0.0, "input_gate": 0.0}.get(name, 0.0))
    h, final = case.bind()(*x)
    assert final.abs().max() < torch.finfo(torch.float32).tiny
    assert h.isfinite().all()


@over(variants=False)
def test_flush_mode_stays_inside(case, generator, device, threads):
    """Kernels may flush denormals to zero; the threads that run them, and ours, must not keep
    that."""
    small = torch.full((1 << 20,), 1e-40)
    for n in (1, 2):
        threads(n)
        x = case.leaves(4, 64, 256, torch.float32, generator, device, grad=True)
        sum(y.sum() for y in case.bind()(*x)).backward()
        assert (small * 1).min() > 0, "denormals are flushed after the operator"


# ---- what is not a number ----
def poke(x, i, at, value):
    y = [z.clone() for z in x]
    y[i][at] = value
    return y


@over(dtypes=(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_nan_stays_in_its_channel(case, options, dtype, reverse, generator, device):
    """A NaN shows from its step on, in its row and channel, and nowhere else; no bit differs
    elsewhere."""
    x = case.leaves(3, 20, 37, dtype, generator, device)
    f = case.bind(**options, reverse=reverse)
    clean = f(*x)
    for i in range(len(x)):
        for b, t, d in ((1, 0, 0), (2, 13, 17), (0, 19, 36), (1, 7, 35)):
            state = i == len(case.arguments)
            h, final = f(*poke(x, i, (b, d) if state else (b, t, d), torch.nan))
            want = torch.zeros(3, 20, 37, dtype=torch.bool, device=device)
            if state:
                want[b, :, d] = True
            else:
                want[b, : t + 1, d] = reverse
                want[b, t:, d] |= not reverse
            assert torch.equal(h.isnan(), want)
            assert torch.equal(h[~want], clean[0][~want])
            last = want[:, 0 if reverse else -1]
            assert torch.equal(final.isnan(), last)
            assert torch.equal(final[~last], clean[1][~last])


@over(dtypes=(torch.float32,))
def test_nan_in_gradients(case, options, dtype, generator, device):
    """Backwards likewise: a NaN gradient of h[b, t, d] reaches the steps before, of that row and
    channel."""
    x = case.leaves(3, 20, 37, dtype, generator, device, grad=True)
    f = case.bind(**options)
    weights = cotangents(f(*x), generator)
    clean = gradients(f, x, weights=weights)
    weights[0][2, 13, 17] = torch.nan
    for g, c, name in zip(
        gradients(f, x, weights=weights), clean, (*case.arguments, "state"), strict=True
    ):
        want = torch.zeros_like(g, dtype=torch.bool)
        want[(2, 17) if name == "state" else (2, slice(0, 14), 17)] = True
        if name == "a":  # times h before, which is never 0 here
            assert x[-1].abs().min() > 0
        assert torch.equal(g.isnan(), want), name
        assert torch.equal(g[~want], c[~want])


@over(dtypes=(torch.float32,))
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=["inf", "minus_inf"])
def test_infinities(case, options, dtype, value, generator, device):
    """The same infinities and NaN as the reference, at the same places: sigmoid(inf) is 1, not
    NaN."""
    x = case.leaves(3, 20, 37, dtype, generator, device)
    f, reference = case.bind(**options), case.bind(case.reference, **options)
    for i in range(len(x)):
        y = poke(x, i, (1, 17) if i == len(case.arguments) else (1, 7, 17), value)
        got, want = f(*y), reference(*[z.cpu() for z in y])
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.isnan().cpu(), w.isnan())
            close(g, wide(w), factor=2)


@over(dtypes=(torch.float32,))
def test_zero_at_the_kink(case, options, dtype, generator, device):
    """g is continuous at 0, its derivative is not: 0 and -0 take the right-hand one."""
    if options.get("activation") != "g":
        pytest.skip("has no kink")
    x = case.leaves(1, 4, 18, dtype, generator, device)
    x[-2][:] = torch.tensor([0.0, -0.0, 1e-30, -1e-30], device=device)[None, :, None]
    got, want = both_ways(case, options, x, generator)
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        close(g, w, grad=k > 1)


@over(variants=False)
def test_large_values(case, generator, device):
    """Near float32's largest number nothing overflows that the exact answer does not."""
    x = case.leaves(2, 5, 19, torch.float32, generator, device)
    x[-2] = torch.sign(x[-2]) * 3e38
    x[-1] = torch.sign(x[-1]) * 3e38
    if case.name == "linear_scan":
        x[0].mul_(0.0)
    h, final = case.bind()(*x)
    want = case.bind(case.reference)(*[wide(y.cpu()) for y in x])
    assert np.isfinite(want[0].numpy()).all() and want[0].abs().max() < 3.4e38
    close(h, want[0])
    close(final, want[1])
