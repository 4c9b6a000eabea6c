"""No NaN, no infinity and no lost digits that the exact answer does not have; those that it has,
arrive."""

import math

import numpy as np
import oracle
import pytest
import torch
from cases import (
    ALL,
    DIRECT,
    GATED,
    HALF,
    MATRICES,
    OTHERS,
    REAL,
    close,
    cotangents,
    error,
    gradients,
    over,
    wide,
)

SIGMOIDS = ("min_gru", "min_lstm")


def gates(case):
    return [i for i, name in enumerate(case.arguments) if "gate" in name]


def both_ways(case, options, x, generator, weights=None):
    """Outputs and gradients of the operator, and of the reference in float64."""
    x = [y.requires_grad_() for y in x]
    f, reference = case.bind(**options), case.bind(case.reference, **options)
    weights = weights or cotangents(f(*x), generator)
    exact = [wide(y.cpu()) for y in x]
    got = [*f(*x), *gradients(f, x, weights=weights, unused=case.loose)]
    exact_weights = [wide(g.cpu()) for g in weights]
    exact_grads = gradients(reference, exact, weights=exact_weights, unused=case.loose)
    want = [*reference(*exact), *exact_grads]
    return got, want


@over(dtypes=REAL)
@pytest.mark.parametrize("size", [20.0, 80.0, 88.75, 104.0, 710.0, 750.0, 1e4, "mixed"])
def test_extreme_gates(case, options, dtype, size, generator, device):
    """Gates far beyond where exp overflows or both sigmoids are 0 in floating point."""
    if case.name not in SIGMOIDS:
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


def leaf(case, x, name):
    return x[case.names.index(name)]


@over(dtypes=REAL, variants=False, cases=OTHERS[1:])
@pytest.mark.parametrize("size", [20.0, 80.0, 104.0, 710.0, 1e4, "mixed"])
def test_extreme_steps(case, dtype, size, generator, device):
    """Steps and gates of the selective scan where exp overflows, on both sides of softplus'
    threshold, beside rates of decay down to -1e4."""
    B, T, D = 2, 33, 35
    x = case.leaves(B, T, D, dtype, generator, device)
    for name in ("delta", "z"):
        sign = torch.randint(-1, 2, (B, T, D), generator=generator).to(device)
        by = size
        if size == "mixed":
            by = 10 ** (5 * torch.rand(B, T, D, generator=generator) - 1).to(device)
        y = leaf(case, x, name)
        y.copy_((sign * by + y).clamp(-1e4, 1e4))
    z, delta = leaf(case, x, "z"), leaf(case, x, "delta")
    # what such a step lets in, and such a gate through, stays a number of the dtype
    leaf(case, x, "u").div_(delta.clamp_min(1) * z.clamp_min(1))
    leaf(case, x, "D").div_(100)
    A = leaf(case, x, "A")
    A[:, 0], A[::2, 1] = -1e4, 0.0
    weights = [
        g / z.clamp_min(1) if g.dim() == 3 and g.shape == z.shape else g
        for g in cotangents(case.bind(delta_softplus=True)(*x), generator)
    ]
    weights = [g.to(o) for g, o in zip(weights, (dtype, case.state_dtype(dtype)), strict=True)]
    got, want = both_ways(case, {"delta_softplus": True}, x, generator, weights)
    for k, (g, w) in enumerate(zip(got, want, strict=True)):
        assert w.isfinite().all()
        w = torch.where(w.abs() > torch.finfo(g.dtype).max, w.sign() * torch.inf, w)
        close(g, w, grad=k > 1, name=("y", "final_state", *case.names)[k])


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


@over(dtypes="all", variants=False, cases=OTHERS[1:])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_exact_decays_of_states(case, dtype, decay, generator, device):
    x = case.leaves(2, 33, 19, dtype, generator, device)
    leaf(case, x, "A").fill_(-1e4 if decay == 0 else 0)
    leaf(case, x, "delta").fill_(0.75)
    leaf(case, x, "delta_bias").fill_(0.25)
    for name in ("u", "B", "initial_state"):
        leaf(case, x, name).mul_(2).round_().clamp_(-2, 2)
    final = case.bind()(*x)[1]
    want = case.bind(case.reference)(*[wide(y.cpu()) for y in x])[1]
    tiny = torch.finfo(case.state_dtype(dtype)).tiny  # where a decay ends
    assert (wide(final).cpu() - want).abs().max() <= (0 if decay else 64 * tiny)


# Of 5000 steps of a matrix memory: test_matrix_memory.py.
@over(dtypes=(torch.float32, torch.bfloat16, torch.complex64), cases=DIRECT)
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
        if case.name == "selective_scan":
            scale = 1 if options["delta_softplus"] else 1e-3  # delta - 7 is such a step, too
            leaf(case, x, "delta").mul_(scale).sub_(7 * (scale == 1))
            leaf(case, x, "delta_bias").mul_(scale)
    f = case.bind(**options)
    h, final = f(*x)
    arrays = [wide(y.cpu()).numpy() for y in x]
    want, last = oracle.loop(case.name, arrays[:-1], arrays[-1], **options)
    # with a memory of n steps, n independent roundings add up to sqrt(n) of them: n is up to 10000
    factor = 8 if memory == "long" else 1
    if case.name == "selective_scan":
        # The sum over states cancels. And of few different steps, in half precision, the same few
        # roundings of decays add up, as they are.
        factor = 4 if memory == "short" else 64 if dtype in HALF else 8
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


# What the state and the output are linear in.
DRIVES = {"b", "candidate", "x", "bias", "u", "initial_state", "c"}


@over(dtypes=(torch.float32, torch.float64), variants=False, cases=ALL)
def test_denormals(case, dtype, generator, device):
    """Inputs, states and results too small for a normal number may become 0, and nothing worse."""
    if "norm_weight" in case.names:
        pytest.skip("a norm makes much of little")
    tiny = torch.finfo(dtype).tiny
    x = case.leaves(2, 40, 19, dtype, generator, device)
    drives = DRIVES | {case.carrier, case.states[0]}
    x = [y * tiny if name in drives else y for name, y in zip(case.names, x, strict=True)]
    got, want = both_ways(case, {}, x, generator)
    n = 1 + len(case.states)
    for g, w in zip(got[:2], want[:2], strict=True):
        assert (wide(g).cpu() - w).abs().max() <= 64 * tiny
    for g, w in zip(got[n:], want[n:], strict=True):
        # a gradient may be a product of something flushed with a sum over hundreds of steps
        assert error(g, w, floor=1e4 * tiny) <= case.slack * 256 * torch.finfo(dtype).eps


FADES = {"a": 0.5, "delta": 1.0, "A": -math.log(2), "B": 1.0, "C": 1.0, "D": 1.0, "z": 3.0}
FADES |= {"q": 1.0, "decay": 0.5, "dt": 1.0}


@over(variants=False, cases=ALL)
def test_decayed_state_does_not_stick(case, generator, device):
    """A state that only decays ends at 0 or at a denormal, also where a step stops changing it."""
    if case.name in ("linear_attention", "slstm"):
        pytest.skip("its normaliser never forgets")
    x = case.leaves(1, 5000, 19, torch.float32, generator, device)
    for name, y in zip(case.names[: case.inputs], x, strict=False):
        y.fill_(FADES.get(name, 0.0))
    h, *finals = case.bind()(*x)
    for final in finals:
        assert final.abs().max() < torch.finfo(torch.float32).tiny
    assert h.isfinite().all()


@over(variants=False, cases=ALL)
def test_flush_mode_stays_inside(case, generator, device, threads):
    """Kernels may flush denormals to zero; the threads that run them, and ours, must not keep
    that."""
    small = torch.full((1 << 20,), 1e-40)
    for n in (1, 2):
        threads(n)
        x = case.leaves(4, 64, 256, torch.float32, generator, device, grad=True)
        sum(y.sum() for y in case.bind()(*x)).backward()
        assert (small * 1).min() > 0, "denormals are flushed after the operator"
        case.step_(*case.at([y.detach() for y in x], 0))
        assert (small * 1).min() > 0, "denormals are flushed after the step"


# ---- what is not a number ----
def poke(x, i, at, value):
    y = [z.clone() for z in x]
    y[i][at] = value
    return y


def places(x, generator):
    """Some elements of x: the first, the last, and two between."""
    drawn = torch.randint(0, x.numel(), (2,), generator=generator).tolist()
    return [torch.unravel_index(torch.tensor(i), x.shape) for i in (0, *drawn, x.numel() - 1)]


@over(dtypes=(torch.float32, torch.bfloat16), cases=ALL)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_nan_stays_in_its_channel(case, options, dtype, reverse, generator, device):
    """A NaN shows where the reference has it: from its step on, in its row and channel. Elsewhere
    no bit differs."""
    x = case.leaves(3, 20, 37, dtype, generator, device)
    if case.name == "retention":  # nothing fades so much that it is left out
        leaf(case, x, "decay").clamp_(min=0.2)
    f = case.bind(**options, reverse=reverse)
    reference = case.bind(case.reference, **options, reverse=reverse)
    clean = f(*x)
    handed_on = [case.states[k - 1] for k in case.constant(options)]
    for i, name in enumerate(case.names):
        if name in handed_on:  # and seen by nothing else
            continue
        for at in places(x[i], generator):
            poked = poke(x, i, at, torch.nan)
            masks = [y.isnan().to(device) for y in reference(*[y.cpu() for y in poked])]
            for k, (g, w, c) in enumerate(zip(f(*poked), masks, clean, strict=True)):
                if (case.name, k) in (("mlstm", 3), ("slstm", 4)):
                    continue  # m is a maximum, which may pass over it: C and n do not
                assert torch.equal(g.isnan(), w), name
                assert torch.equal(g[~w], c[~w]), name
            assert masks[0].any() and not masks[0].all(), name
            if case.letters(name)[0] == "B":
                assert not masks[0][[b for b in range(3) if b != at[0]]].any()
            if case.channel in case.letters(name):
                d = at[case.letters(name).index(case.channel)]
                channels = masks[0].movedim(case.output.index(case.channel), 0)
                assert not channels[[k for k in range(37) if k != d]].any()


@over(dtypes=(torch.float32,), cases=ALL)
def test_nan_in_gradients(case, options, dtype, generator, device):
    """Backwards likewise: a NaN gradient of h[b, t, d] reaches what h[b, t, d] depends on, and of
    the final state what that does."""
    x = case.leaves(3, 20, 37, dtype, generator, device, grad=True)
    f, reference = case.bind(**options), case.bind(case.reference, **options)
    weights = cotangents(f(*x), generator)
    clean = gradients(f, x, weights=weights)
    assert all(y.abs().min() > 0 for y in x[case.inputs :])  # or NaN * 0 * h hides nothing
    finals = [(k, (1, 36, 1, 1)[: w.dim()]) for k, w in enumerate(weights) if k > 0]
    for k, at in ((0, (2, 13, 17, 1)[: weights[0].dim()]), *finals):
        bad = poke(weights, k, at, torch.nan)
        exact = [wide(y.cpu()) for y in x]
        want = gradients(reference, exact, weights=[wide(g.cpu()) for g in bad])
        for g, c, w, name in zip(
            gradients(f, x, weights=bad), clean, want, case.names, strict=True
        ):
            mask = w.isnan().to(device)
            assert not mask.all(), name
            if case in MATRICES + GATED:  # products of many: all of this row and head may have it
                mask = spread(case, mask, name)
                assert (g.isnan() <= mask).all() and (g.isnan() >= w.isnan().to(device)).all(), name
            else:
                assert torch.equal(g.isnan(), mask), name
            assert torch.equal(g[~mask], c[~mask]), name
        # a unit that is off lets nothing by
        assert any(w.isnan().any() for w in want) or options.get("nonlinearity") == "relu"


def spread(case, mask, name):
    """True for a whole row and head, where anything is true in it."""
    kept = [d for d, letter in enumerate(case.letters(name)) if letter in "B" + case.channel]
    over_rest = [d for d in range(mask.dim()) if d not in kept]
    return mask.amax(over_rest, keepdim=True).expand_as(mask) if over_rest else mask


def check_infinity(case, options, i, value, generator, device):
    x = case.leaves(3, 20, 37, torch.float32, generator, device)
    if case.name == "selective_scan":  # no decay is 0, so that none meets an infinite state
        leaf(case, x, "A").clamp_(min=-4)
    f, reference = case.bind(**options), case.bind(case.reference, **options)
    for at in places(x[i], generator):
        y = poke(x, i, at, value)
        for g, w in zip(f(*y), reference(*[wide(z.cpu()) for z in y]), strict=True):
            gated = w.isnan() & (g.cpu().abs() < 1e-30)
            assert not gated.any() or options.get("activation") == "silu" or case.names[i] == "z"
            w = torch.where(gated, 0.0, w)
            assert torch.equal(g.isnan().cpu(), w.isnan()), case.names[i]
            close(g, w, factor=2)


# What decays are made of. Steps backwards in time and growth are none: exp is constant beyond its
# largest number, so that 0 * exp(x) is always 0, and no infinite decay arrives.
DECAYS = ("A", "delta", "delta_bias")


# Matrix memories add products up in another order than the reference: where there are infinities of
# both signs, what comes of them is another.
@over(dtypes=(torch.float32,), cases=DIRECT)
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=["inf", "minus_inf"])
def test_infinities(case, options, dtype, value, generator, device):
    """The same infinities and NaN as the reference, at the same places: sigmoid(inf) is 1, not
    NaN. And no NaN where the reference has one and the exact answer does not: silu(-inf) is 0."""
    for i, name in enumerate(case.names):
        if name not in DECAYS:
            check_infinity(case, options, i, value, generator, device)


@over(cases=OTHERS[1:])
@pytest.mark.parametrize("name", DECAYS[:2])  # a third, every step's, meets an infinite state
def test_infinite_decays(case, options, name, generator, device):
    """A decay of exp(-inf) is 0."""
    value = -math.inf if name == "A" else math.inf
    check_infinity(case, options, case.names.index(name), value, generator, device)


@over(dtypes=(torch.float32, torch.bfloat16), variants=False, cases=OTHERS[1:])
def test_decays_beyond_the_largest_number(case, dtype, generator, device):
    """step * A overflows, of numbers that do not."""
    x = case.leaves(2, 5, 19, dtype, generator, device)
    leaf(case, x, "A").fill_(-3e38)
    leaf(case, x, "delta").add_(2)
    h, final = case.bind()(*x)
    assert h.isfinite().all() and final.isfinite().all()


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


@over(variants=False, cases=DIRECT)
def test_large_values(case, generator, device):
    """Near float32's largest number nothing overflows that the exact answer does not."""
    x = case.leaves(2, 5, 19, torch.float32, generator, device)
    for i, name in enumerate(case.names):
        if name in ("b", "candidate", "x", "u", "initial_state"):
            x[i] = torch.sign(x[i]) * 3e38
    if case.name == "linear_scan":
        x[0].mul_(0.0)
    if case.name == "causal_conv1d":
        x[1].div_(x[1].abs().sum(1, keepdim=True))
    if case.name == "selective_scan":  # 3e38 all over again, of three states
        for name, number in (("A", -1e4), ("delta", 1), ("delta_bias", 0), ("B", 1), ("D", 0)):
            leaf(case, x, name).fill_(number)
        leaf(case, x, "C").fill_(1 / 4)
        leaf(case, x, "z").clamp_(max=1)
    h, final = case.bind()(*x)
    want = case.bind(case.reference)(*[wide(y.cpu()) for y in x])
    assert np.isfinite(want[0].numpy()).all() and want[0].abs().max() < 3.4e38
    close(h, want[0])
    close(final, want[1])
