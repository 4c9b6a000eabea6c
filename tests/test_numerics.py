"""No NaN, no infinity and no lost digits that the exact answer does not have; those that it has,
arrive."""

import math

import numpy as np
import oracle
import pytest
import torch
from cases import (
    ALL,
    CASES,
    DIRECT,
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

GATED = ("min_gru", "min_lstm")


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


def remember(case, x, memory, options, generator):
    """Changes what decays are made of, so that a memory is short, long or comes and goes at once:
    in `far`, one gate in a hundred is beyond anything."""
    long = {"i": (1, 0), "f": (1 / 3, 8), "dt": (1e-3, 0), "dt_bias": (1e-3, 0)}
    if options.get("dt_softplus"):
        long |= {"dt": (1, -8)}
    for name, y in zip(case.names, x, strict=True):
        if memory == "long" and name in long:
            y.mul_(long[name][0]).add_(long[name][1])
        if memory == "far" and name in ("i", "f", "dt"):
            far = torch.where(torch.rand(y.shape, generator=generator) < 0.5, 1e4, -1e4)
            if name == "dt" and not options["dt_softplus"]:  # backwards in time states explode
                far = far.abs()
            rare = torch.rand(y.shape, generator=generator) < 0.01
            y.copy_(torch.where(rare.to(y.device), far.to(y), y))
        if name == "decay" and memory != "short":
            y.fill_({"long": 0.9998, "far": 1e-30}[memory])[1:] = 1 if memory == "far" else 0.999


def same_divisor(case, want, got):
    """C and n of mlstm divided by e^m of `got`, whose m is rounded: where m is 1e4, by 5e-4."""
    if case.name != "mlstm":
        return want
    h, C, n, m = want
    by = torch.exp(m - wide(got[3].cpu()).detach())
    return h, C * by[..., None, None], n * by[..., None], m


@pytest.mark.slow
@over(dtypes=(torch.float32, torch.bfloat16), cases=MATRICES)
@pytest.mark.parametrize("memory", ["short", "long", "far"])
@pytest.mark.parametrize("heads", [2, 3], ids=["by_chunks", "by_steps"])
def test_long_sequences_of_matrices(
    case, options, dtype, memory, heads, generator, device, monkeypatch
):
    """T = 1e5 likewise. Of memories this small the CPU takes up to two heads chunk by chunk, more of
    them step by step."""
    if case.name == "linear_attention" and memory != "long":
        pytest.skip("never forgets")
    monkeypatch.setattr(type(case), "sizes", dict.fromkeys(case.sizes, 8))
    x = case.leaves(1, 100_000, heads, dtype, generator, device)
    remember(case, x, memory, options, generator)
    f = case.bind(**options)
    outputs = f(*x)
    arrays = {name: wide(y.cpu()).numpy() for name, y in case.named(x).items()}
    h, finals = oracle.matrix_loop(case.name, arrays, **options)
    want = [torch.from_numpy(y) for y in (h, *finals)]
    # As above, a memory of n steps adds up as many roundings; and where a decay is a constant, they
    # are all the same: e^(log decay) of a step is off by up to 3 units of 2^-24.
    factor = case.slack * (1 if memory == "short" else 64 if case.name == "retention" else 8)
    for name, g, w in zip(
        ("h", *case.states), outputs, same_divisor(case, want, outputs), strict=True
    ):
        close(g, w, case.promised(g, x[0]), name=name, factor=factor)

    x = [y.requires_grad_() for y in x]
    weights = cotangents(outputs, generator)
    exact = [wide(y) for y in x]
    double = f(*exact)
    # an exponent of 1e4 has an error of 2e-12 in double, and e to it a relative one of as much
    wider = factor * (64 if memory == "far" else 1)
    for name, g, w in zip(
        ("h", *case.states), double, same_divisor(case, want, double), strict=True
    ):
        close(g, w, name=f"{name} in float64", factor=wider)
    want = gradients(f, exact, weights=[wide(w) for w in weights])
    for name, g, w in zip(case.names, gradients(f, x, weights=weights), want, strict=True):
        assert g.isfinite().all(), name
        close(g, w, case.promised(g, x[0]), grad=True, name=name, factor=factor)


# What the state and the output are linear in.
DRIVES = {"b", "candidate", "x", "bias", "u", "initial_state"}


@over(dtypes=(torch.float32, torch.float64), variants=False, cases=ALL)
def test_denormals(case, dtype, generator, device):
    """Inputs, states and results too small for a normal number may become 0, and nothing worse."""
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
    if case.name == "linear_attention":
        pytest.skip("never forgets")
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
                if case.name == "mlstm" and k == 3:
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


@over(dtypes=(torch.float32, torch.bfloat16), variants=False, cases=[MATRICES[2], MATRICES[3]])
@pytest.mark.parametrize("heads", [1, 3], ids=["by_chunks", "by_steps"])
def test_nan_does_not_fade(case, dtype, heads, generator, device):
    """NaN in the initial state is there for ever, though a number would long have faded to 0."""
    x = case.leaves(1, 70, heads, dtype, generator, device)
    for name, value in {"decay": 0.01, "A": -10.0, "dt": 1.0, "dt_bias": 0.0}.items():
        if name in case.names:
            leaf(case, x, name).fill_(value)
    leaf(case, x, "initial_state")[0, 0, 1, 1] = torch.nan
    f, reference = case.bind(), case.bind(case.reference)
    for g, w in zip(f(*x), reference(*[wide(y.cpu()) for y in x]), strict=True):
        assert w.isnan().any() and torch.equal(g.isnan().cpu(), w.isnan())


# Of float32: the one that hardware makes, its opposite, and those that libraries make: torch's
# log_sigmoid on AVX2 has all bits set.
NANS = (0x7FC00000, -0x400000, 0x7FC00001, 0x7FFFFFFF, -1)


@pytest.mark.parametrize("case", [*CASES[1:], OTHERS[1], MATRICES[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_nan_is_one(case, dtype, generator):
    """Whatever its bits, with every instruction set."""
    c = pytest.importorskip("torch_ext._C", reason="torch_ext._C was not built")
    x = case.leaves(1, 5, 3, dtype, generator)
    try:
        for isa in c.isas():
            for bits in NANS if c.force_isa(isa) else ():
                nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
                if dtype is torch.float64:
                    nan = torch.tensor([bits, bits], dtype=torch.int32).view(dtype)[0]
                    nan = nan if nan.isnan() else torch.tensor(torch.nan, dtype=dtype)
                for name in set(case.names) - {"z", "C", "D"}:  # what the state depends on
                    y = [z.clone() for z in x]
                    leaf(case, y, name).flatten()[-1:] = nan
                    assert case.bind()(*y)[1].isnan().any(), f"{isa}: {name}, {bits:#x}"
    finally:
        c.force_isa("")


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
            if case in MATRICES:  # products of tiles of steps: all of this row and head may have it
                mask = spread(case, mask, name)
                assert (g.isnan() <= mask).all() and (g.isnan() >= w.isnan().to(device)).all(), name
            else:
                assert torch.equal(g.isnan(), mask), name
            assert torch.equal(g[~mask], c[~mask]), name
        assert any(w.isnan().any() for w in want)


def spread(case, mask, name):
    """True for a whole row and head, where anything is true in it."""
    kept = [d for d, letter in enumerate(case.letters(name)) if letter in "BH"]
    over_rest = [d for d in range(mask.dim()) if d not in kept]
    return mask.amax(over_rest, keepdim=True).expand_as(mask) if over_rest else mask


def check_infinity(case, options, i, value, generator, device, width=37):
    x = case.leaves(3 if width > 2 else 1, 20, width, torch.float32, generator, device)
    if case.name == "selective_scan":  # no decay is 0, so that none meets an infinite state
        leaf(case, x, "A").clamp_(min=-4)
    if case.name == "ssd":  # nor does what an infinite number has left fade to 0 in all these steps
        leaf(case, x, "A").clamp_(min=-0.5)
    if case.name == "retention":
        leaf(case, x, "decay").clamp_(min=0.2)
    f, reference = case.bind(**options), case.bind(case.reference, **options)
    for at in places(x[i], generator):
        y = poke(x, i, at, value)
        for g, w in zip(f(*y), reference(*[wide(z.cpu()) for z in y]), strict=True):
            gated = w.isnan() & (g.cpu().abs() < 1e-30)
            assert not gated.any() or options.get("activation") == "silu" or case.names[i] == "z"
            w = torch.where(gated, 0.0, w)
            if case in MATRICES and width <= 2:
                assert torch.equal(g.isfinite().cpu(), w.isfinite()), case.names[i]
                same = w.isfinite() | (w == g.cpu())
                g, w = (torch.where(same, z.cpu(), 0.0) for z in (g, w))
            assert torch.equal(g.isnan().cpu(), w.isnan()), case.names[i]
            close(g, w, factor=2 * case.slack)


# What decays are made of. Steps backwards in time and growth are none: exp is constant beyond its
# largest number, so that 0 * exp(x) is always 0, and no infinite decay arrives.
DECAYS = ("A", "delta", "delta_bias", "dt", "dt_bias", "decay")


@over(dtypes=(torch.float32,), cases=ALL)
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=["inf", "minus_inf"])
def test_infinities(case, options, dtype, value, generator, device):
    """The same infinities and NaN as the reference, at the same places: sigmoid(inf) is 1, not
    NaN. And no NaN where the reference has one and the exact answer does not: silu(-inf) is 0."""
    for i, name in enumerate(case.names):
        if name not in DECAYS:
            check_infinity(case, options, i, value, generator, device)


@over(dtypes=(torch.float32,), cases=MATRICES)
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=["inf", "minus_inf"])
def test_infinities_by_chunks(case, options, dtype, value, generator, device):
    """Nothing else than in the reference is infinite or no number.

    Which of the two is another matter: where v is inf, C has infinities of both signs, whose sum is NaN,
    but the sum of q k is a number, times which inf is an infinity. With an infinite q it is the
    other way about."""
    for i, name in enumerate(case.names):
        if name not in DECAYS:
            check_infinity(case, options, i, value, generator, device, width=2)


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


LARGE = {"b", "candidate", "x", "u", "initial_state", "v", "C", "S"}
# What keeps the exact answer of a matrix memory below that: what was is forgotten, or fades.
KEPT_SMALL = {
    "mlstm": {"q": 1, "k": 1 / 4, "i": 0, "f": -1e4, "n": 1, "m": 0},
    "linear_attention": {"q": -3, "k": -4, "z": 1},
    "retention": {"q": 1, "k": 1 / 4, "decay": 1e-30},
    "ssd": {"C": 1 / 4, "B": 1, "A": -1e4, "dt": 1, "dt_bias": 0, "D": 0, "z": 1},
}


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("shape", [(2, 5, 19), (1, 5, 2)], ids=["wide", "narrow"])
def test_large_values(case, shape, generator, device):
    """Near float32's largest number nothing overflows that the exact answer does not."""
    x = case.leaves(*shape, torch.float32, generator, device)
    small = KEPT_SMALL.get(case.name, {})
    for i, name in enumerate(case.names):
        if name in LARGE and name not in small:
            x[i] = torch.sign(x[i]) * 3e38
        if name in small:
            x[i].fill_(small[name])
    if case.name == "linear_scan":
        x[0].mul_(0.0)
    if case.name == "causal_conv1d":
        x[1].div_(x[1].abs().sum(1, keepdim=True))
    if case.name == "selective_scan":  # 3e38 all over again, of three states
        for name, number in (("A", -1e4), ("delta", 1), ("delta_bias", 0), ("B", 1), ("D", 0)):
            leaf(case, x, name).fill_(number)
        leaf(case, x, "C").fill_(1 / 4)
        leaf(case, x, "z").clamp_(max=1)
    want = case.bind(case.reference)(*[wide(y.cpu()) for y in x])
    assert np.isfinite(want[0].numpy()).all() and 1e37 < want[0].abs().max() < 3.4e38
    for g, w in zip(case.bind()(*x), want, strict=True):
        close(g, w)
