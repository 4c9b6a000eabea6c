"""What is particular about the gated recurrences, beside what the shared suites ask of each: their options
and each pair of them, masks, resets, sizes of heads, gates that are far out, torch.nn's own layers."""

import pytest
import torch
import torch._dynamo.testing
from cases import close, cotangents, refuses, short, state_dtype
from test_gated_references import (
    BY_NAME,
    COMMON,
    MASKS,
    NN,
    check_torch_nn,
    check_torch_nn_packed,
    from_nn,
    label,
    nn_case,
    over,
    over_sets,
    second_formula,
)

import torch_ext

# What `close` allows sums of K products and of T steps; a norm of few numbers divides by what they
# differ by, which may be little.
FACTOR = 8


def factor(chosen):
    text = label(chosen)
    return FACTOR * (256 if "cell_norm" in text else 16 if "norm" in text else 1)


def operator(r, tail=""):
    return getattr(torch_ext, r.name + tail)


# All at once, of each operator: what options there are that go together.
RICH = {
    "slstm": ("exp", "at_least_one", "norm"),
    "lstm": ("peephole", "projection", "norm", "cell_norm_bias", "c_update"),
    "gru": ("norm",),
    "elman": ("norm",),
    "ind_rnn": ("tanh",),
}
MASKED = ("reset", "recurrent_mask", "h_update")


def wide(leaves):
    return {k: y.detach().double().requires_grad_(y.requires_grad) for k, y in leaves.items()}


def leaf_list(leaves):
    return [y for y in leaves.values() if y.requires_grad]


def gradients(outputs, leaves, weights, **more):
    """Of the leaves, by name; zeros where one is not seen."""
    pairs = [(y, w) for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    wanted = {k: y for k, y in leaves.items() if y.requires_grad}
    if not pairs:
        return {k: torch.zeros_like(y) for k, y in wanted.items()}
    got = torch.autograd.grad(
        [y for y, _ in pairs],
        list(wanted.values()),
        [w for _, w in pairs],
        allow_unused=True,
        **more,
    )
    return {
        k: torch.zeros_like(y) if g is None else g
        for (k, y), g in zip(wanted.items(), got, strict=True)
    }


def compare(got, want, **how):
    """Dictionaries of gradients, or outputs."""
    for name in want:
        w = want[name]
        size = float(w.abs().max()) if w.numel() else 0.0
        assert got[name].isfinite().all(), name
        close(got[name], w, name=name, size=size / 8, **how)


def both(r, leaves, options, generator, exact=None, factor=FACTOR, scale=1.0):
    """The operator's values and gradients are those of the reference, through all outputs, through
    the output alone and through the final states alone."""
    exact = leaves if exact is None else exact
    given = {k: y.double() if k in MASKS and k != "reset" else y for k, y in options.items()}
    got = r.call(operator(r), leaves, **options)
    want = r.call(r.reference, exact, **given)
    names = ("output", *r.states)
    dtype = leaves["x"].dtype
    for name, g, w in zip(names, got, want, strict=True):
        assert g.dtype is (dtype if name == "output" else state_dtype(dtype))
        close(g, w, name=name, factor=factor, size=0.25)
    weights = [w * scale for w in cotangents(got, generator)]
    for places in (range(len(got)), range(1), range(1, len(got))):
        mine = gradients([got[i] for i in places], leaves, [weights[i] for i in places],
                         retain_graph=True)  # fmt: skip
        theirs = gradients([want[i] for i in places], exact,
                           [weights[i].to(want[i].dtype) for i in places], retain_graph=True)  # fmt: skip
        for name, g in mine.items():
            assert g.dtype is leaves[name].dtype and g.shape == leaves[name].shape
        compare(mine, theirs, grad=True, factor=factor)
    return got


# ---- values and gradients ----
@over_sets(2)
def test_options_and_their_pairs(recurrence, chosen, generator):
    leaves, options = recurrence.draw(chosen, generator, grad=True, K=5)
    both(recurrence, leaves, options, generator, factor=factor(chosen))


SIZES = [(1, 1, 1, 1), (2, 70, 1, 17), (3, 5, 3, 33), (1, 33, 2, 8), (2, 3, 1, 130), (5, 2, 2, 64)]


@over
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=short
)
def test_sizes_and_dtypes(recurrence, sizes, rich, dtype, generator):
    B, T, H, K = sizes
    chosen = RICH[recurrence.name] + MASKED if rich else ()
    leaves, options = recurrence.draw(
        chosen, generator, dtype, grad=True, B=B, T=T, H=H, K=K, P=max(1, K // 2)
    )
    if rich and K < 5 and not recurrence.dense:  # the norm of one number or two is 0 or 1
        options["norm_eps"] = 0.5
    both(recurrence, leaves, options, generator, wide(leaves), 4 * factor(chosen))


@over
@pytest.mark.parametrize("number", range(30))
def test_random_combinations(recurrence, number, generator):
    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    features = (*recurrence.features, *COMMON)
    chosen = tuple(f for f in features if pick(True, False, False))
    for a, b in recurrence.apart:
        if a in chosen and b in chosen:
            chosen = tuple(f for f in chosen if f != pick(a, b))
    dtype = pick(torch.float64, torch.float64, torch.float32, torch.bfloat16)
    leaves, options = recurrence.draw(
        chosen, generator, dtype, grad=True, B=pick(1, 2, 5), T=pick(7, 8, 19, 40), H=pick(1, 2, 3),
        K=pick(4, 5, 8, 17), P=pick(1, 3, 8),
    )  # fmt: skip
    print(chosen, dtype, {k: tuple(y.shape) for k, y in leaves.items()})
    bound = pick(None, None, 0.5)
    if bound is not None:
        options["gradient_clip"] = bound
    # where a gradient meets its bound within a rounding, both are right: nowhere, mostly
    both(recurrence, leaves, options, generator, wide(leaves), 4 * factor(chosen))


@over
@pytest.mark.parametrize(
    "state_dtype_of", [torch.float32, torch.bfloat16, torch.float16], ids=short
)
def test_float32_parameters(recurrence, state_dtype_of, generator):
    """Beside half precision, and beside float32."""
    chosen = RICH[recurrence.name]
    leaves, options = recurrence.draw(chosen, generator, torch.float32, grad=True, K=8, T=20)
    leaves["x"] = leaves["x"].detach().to(state_dtype_of).requires_grad_()
    both(recurrence, leaves, options, generator, wide(leaves), 4 * factor(chosen))


@over
def test_bfloat16_weights(recurrence, generator):
    """R in bfloat16 beside float32: the product is that of the same numbers in float32."""
    if recurrence.dense:
        pytest.skip("has no R")
    leaves, options = recurrence.draw((), generator, torch.float32, grad=True, K=17, T=20)
    leaves["R"] = leaves["R"].detach().bfloat16().requires_grad_()
    got = both(recurrence, leaves, options, generator, wide(leaves), 4 * FACTOR)
    same = {k: y.detach().float() for k, y in leaves.items()}
    for g, w in zip(got, recurrence.call(operator(recurrence), same), strict=True):
        close(g, w.double(), factor=FACTOR)


# ---- what ends a past, or lets it by in part ----
@over
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_resets_are_the_bounds_of_sequences(recurrence, reverse, generator):
    """A reset before the first step of each sequence == cu_seqlens, values and gradients."""
    chosen = RICH[recurrence.name]
    leaves, options = recurrence.draw((*chosen, "no_state"), generator, grad=True, B=1, T=12, K=5)
    options.pop("c_update", None)
    bounds = [0, 3, 4, 12]
    cu, reset = torch.tensor(bounds), torch.zeros(1, 12, dtype=torch.bool)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        reset[0, stop - 1 if reverse else start] = True
    f = operator(recurrence)
    one = recurrence.call(f, leaves, reset=reset, reverse=reverse, **options)
    many = recurrence.call(f, leaves, cu_seqlens=cu, reverse=reverse, **options)
    last = 0 if reverse else 2
    many = [many[0], *[y[last : last + 1] for y in many[1:]]]
    for g, w in zip(one, many, strict=True):
        close(g, w, factor=FACTOR)
    weights = cotangents(one, generator)
    compare(
        gradients(one, leaves, weights),
        gradients(many, leaves, weights),
        grad=True,
        factor=factor(chosen),
    )


@over
def test_reset_forgets_everything(recurrence, generator):
    """Infinities and NaN too, and no gradient comes through."""
    leaves, _ = recurrence.draw((), generator, torch.float32, K=5)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 2] = True
    want = recurrence.call(operator(recurrence), leaves, reset=reset)
    for bad in (torch.nan, torch.inf):
        other = {k: y.clone() for k, y in leaves.items()}
        for name in recurrence.states:
            other[name][:] = bad
        got = recurrence.call(operator(recurrence), other, reset=reset)
        assert torch.equal(got[0][:, 2:], want[0][:, 2:])
        for g, w in zip(got[1:], want[1:], strict=True):
            assert torch.equal(g, w)
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    got = recurrence.call(operator(recurrence), leaves, reset=reset)
    total = got[0][:, 2:].sum() + sum(y.sum() for y in got[1:])
    grads = torch.autograd.grad(total, [leaves[k] for k in recurrence.states])
    assert not any(g.any() for g in grads)


@over
def test_every_step_reset(recurrence, generator):
    """Nothing recurs: R is without effect."""
    leaves, _ = recurrence.draw((), generator, grad=True)
    out = recurrence.call(operator(recurrence), leaves, reset=torch.ones(2, 7, dtype=torch.bool))
    R = "u" if recurrence.dense else "R"
    grads = gradients(out, leaves, cotangents(out, generator))
    assert not grads[R].any() and not grads["h"].any() and grads["x"].any()


@over
def test_zoneout_of_everything(recurrence, generator):
    """0 keeps the output as it was, at every step; 1 is as without."""
    leaves, _ = recurrence.draw((), generator, torch.float32, K=5)
    h = leaves["h"]
    mask = torch.zeros(2, 7, *h.shape[1:])
    for like in (mask, mask.bool().float()[:, :1].expand_as(mask)):  # memory of its own, or not
        out = recurrence.call(operator(recurrence), leaves, h_update=like)
        assert torch.equal(out[0], h[:, None].expand_as(out[0])) and torch.equal(out[1], h)
    whole = recurrence.call(operator(recurrence), leaves, h_update=torch.ones_like(mask))
    for g, w in zip(whole, recurrence.call(operator(recurrence), leaves), strict=True):
        close(g, w.double(), factor=FACTOR)


def test_zoneout_of_the_cell(generator):
    r = BY_NAME["lstm"]
    leaves, _ = r.draw((), generator, torch.float32, K=5)
    out = r.call(operator(r), leaves, c_update=torch.zeros(2, 7, 2, 5))
    assert torch.equal(out[2], leaves["c"]) and not torch.equal(out[1], leaves["h"])


@over
def test_masks_have_no_gradient(recurrence, generator):
    """And say so, rather than leave whoever waits for one without."""
    leaves, options = recurrence.draw(("recurrent_mask", "h_update"), generator, grad=True)
    for name in set(options) & {*MASKS} - {"reset"}:
        asking = options | {name: options[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} requires grad, expected a constant"):
            recurrence.call(operator(recurrence), leaves, **asking)
        with torch.no_grad():
            recurrence.call(operator(recurrence), leaves, **asking)


@over
def test_expanded_masks(recurrence, generator):
    """A number for all of them, or for all steps, in memory of one."""
    chosen = ("recurrent_mask", "h_update") + ("c_update",) * (recurrence.name == "lstm")
    leaves, options = recurrence.draw(chosen, generator, torch.float32, K=5)
    for index in ((slice(None), slice(0, 1)), (slice(0, 1),), ()):
        small = {k: y[index] if index else y.flatten()[0] for k, y in options.items()}
        flat = {k: small[k].expand_as(y) for k, y in options.items()}
        got = recurrence.call(operator(recurrence), leaves, **flat)
        want = recurrence.call(
            operator(recurrence), leaves, **{k: y.contiguous() for k, y in flat.items()}
        )
        for g, w in zip(got, want, strict=True):
            close(g, w.double(), factor=FACTOR)


@over
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_masks_of_other_dtypes(recurrence, dtype, generator):
    """Any floating point: 0, 1 and what 16 bits hold exactly mean the same in each."""
    leaves, options = recurrence.draw(("recurrent_mask", "h_update"), generator, torch.float32, K=5)
    options = {k: y.mul(4).round().div(4) for k, y in options.items()}
    got = recurrence.call(
        operator(recurrence), leaves, **{k: y.to(dtype) for k, y in options.items()}
    )
    for g, w in zip(got, recurrence.call(operator(recurrence), leaves, **options), strict=True):
        close(g, w.double(), factor=FACTOR)


# ---- gradient_clip ----
@over_sets(1)
@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, torch.inf], ids=str)
def test_gradient_clip(recurrence, chosen, bound, generator):
    leaves, options = recurrence.draw(chosen, generator, grad=True, K=5)
    both(
        recurrence,
        leaves,
        options | {"gradient_clip": bound},
        generator,
        factor=factor(chosen),
        scale=3,
    )


@over
def test_gradient_clip_matters_and_leaves_values_alone(recurrence, generator):
    leaves, _ = recurrence.draw((), generator, torch.float32, grad=True, T=20)
    f = operator(recurrence)
    free, bound = (recurrence.call(f, leaves, gradient_clip=c) for c in (None, 1e-2))
    for a, b in zip(free, bound, strict=True):
        assert torch.equal(a, b)
    weights = [10 * w for w in cotangents(free, generator)]
    one, other = gradients(free, leaves, weights), gradients(bound, leaves, weights)
    assert not torch.equal(one["x"][:, 0], other["x"][:, 0])
    assert torch.equal(one["x"][:, -1], other["x"][:, -1])


# ---- steps, pieces ----
STEP_FEATURES = {"recurrent_mask", "no_bias"}


def over_step_sets():
    rows = []
    for row in over_sets(2).args[1]:
        r, chosen = row.values
        allowed = STEP_FEATURES | set(r.features) - {"c_update"}
        if set(chosen) <= allowed:
            rows.append(row)
    return pytest.mark.parametrize(("recurrence", "chosen"), rows)


def states_of(r, leaves):
    states = tuple(leaves[k] for k in r.states)
    return states if len(states) > 1 else states[0]


def step(r, leaves, t, states, tail="_step", **options):
    """(h, *states), or h of the step in place."""
    given = {k: y for k, y in leaves.items() if k not in r.states}
    given |= {"x": leaves["x"][:, t], "bias": leaves.get("bias")}
    states = tuple(states) if len(states) > 1 else states[0]
    out = operator(r, tail)(**given, state=states, **options)
    if tail == "_step_":
        return out
    h, after = out
    return (h, *(after if isinstance(after, tuple) else (after,)))


@over_step_sets()
def test_steps(recurrence, chosen, generator):
    """Step by step == the sequence, values and gradients; in place the same."""
    r = recurrence
    leaves, options = r.draw(chosen, generator, grad=True, K=5, T=6)
    whole = r.call(operator(r), leaves, **options)
    states, outputs = [leaves[k] for k in r.states], []
    placed = [y.detach().clone() for y in states]
    for t in range(6):
        with torch.no_grad():
            h_ = step(r, leaves, t, placed, "_step_", **options)
        h, *states = step(r, leaves, t, states, **options)
        close(h_, h, factor=factor(chosen))
        outputs.append(h)
    got = [torch.stack(outputs, 1), *states]
    for g, w, p in zip(got, whole, (None, *placed), strict=True):
        close(g, w, factor=factor(chosen), size=0.25)
        assert p is None or close(p, w, factor=factor(chosen), size=0.25) is None
    weights = cotangents(whole, generator)
    compare(
        gradients(got, leaves, weights),
        gradients(whole, leaves, weights),
        grad=True,
        factor=factor(chosen),
    )


@over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_pools(recurrence, dtype, generator):
    """Rows of pools, with the options that a step has: a negative index skips, others are by themselves."""
    r, slots = recurrence, torch.tensor([4, -1, 0])
    chosen = (*[f for f in RICH[r.name] if f != "c_update"], "recurrent_mask")
    leaves, options = r.draw(chosen, generator, dtype, B=3, T=1, K=8)
    rows = r.draw(chosen, generator, dtype, B=6, T=1, K=8)[0]
    pools = [rows[k] for k in r.states]
    before = [p.clone() for p in pools]
    h, *after = step(r, leaves, 0, pools, state_indices=slots, **options)
    assert all(torch.equal(p, b) for p, b in zip(pools, before, strict=True))
    placed = [p.clone() for p in pools]
    h_ = step(r, leaves, 0, placed, "_step_", state_indices=slots, **options)
    assert torch.equal(h_, h) and all(torch.equal(p, a) for p, a in zip(placed, after, strict=True))
    assert not h[1].any()
    for p, b in zip(after, before, strict=True):
        assert torch.equal(p[[1, 2, 3, 5]], b[[1, 2, 3, 5]])
    for row, slot in ((0, 4), (2, 0)):
        one = {k: y[row : row + 1] if k == "x" else y for k, y in leaves.items()}
        mine = options | {"recurrent_mask": options["recurrent_mask"][row : row + 1]}
        want = step(r, one, 0, [p[slot : slot + 1] for p in before], **mine)
        close(h[row], want[0][0].double(), dtype, factor=factor(chosen))
        for a, w in zip(after, want[1:], strict=True):
            close(a[slot], w[0].double(), factor=factor(chosen))


@over
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("rich", [False, True], ids=["plain", "rich"])
def test_pieces(recurrence, reverse, rich, generator):
    """Cut anywhere, also to nothing, with the state and each step's masks handed over."""
    r = recurrence
    chosen = RICH[r.name] + MASKED if rich else ()
    leaves, options = r.draw(chosen, generator, grad=True, T=20, K=5)
    whole = r.call(operator(r), leaves, **options, reverse=reverse)
    cuts = [(0, 7), (7, 7), (7, 8), (8, 20)]
    states, outputs = {k: leaves[k] for k in r.states}, []
    for start, stop in cuts[::-1] if reverse else cuts:
        now = {
            k: y[:, start:stop] if MASKS.get(k, "").startswith("BT") else y
            for k, y in options.items()
        }
        piece = leaves | states | {"x": leaves["x"][:, start:stop]}
        h, *after = r.call(operator(r), piece, **now, reverse=reverse)
        outputs.append(h)
        states = dict(zip(r.states, after, strict=True))
    got = [torch.cat(outputs[::-1] if reverse else outputs, 1), *states.values()]
    for g, w in zip(got, whole, strict=True):
        close(g, w, factor=factor(chosen), size=0.25)
    weights = cotangents(whole, generator)
    compare(
        gradients(got, leaves, weights),
        gradients(whole, leaves, weights),
        grad=True,
        factor=factor(chosen),
    )


@over
def test_nothing(recurrence, generator):
    """No steps, rows, heads or sequences: the state comes back, gradients of the rest are zeros."""
    r = recurrence
    for sizes in ({"T": 0}, {"B": 0}, {"H": 0}):
        leaves, options = r.draw(
            ("recurrent_mask", "h_update", "reset"), generator, grad=True, **sizes
        )
        out = r.call(operator(r), leaves, **options)
        assert out[0].shape == (*leaves["x"].shape[:2], *leaves["h"].shape[1:])
        for y, name in zip(out[1:], r.states, strict=True):
            assert y.shape == leaves[name].shape
            assert "T" not in sizes or torch.equal(y, leaves[name])
        grads = gradients(out, leaves, [torch.ones_like(y) for y in out])
        for name, g in grads.items():
            assert g.shape == leaves[name].shape
            assert (
                torch.equal(g, torch.ones_like(g))
                if name in r.states and "T" in sizes
                else not g.any()
            )
    leaves, _ = r.draw(("no_state",), generator, B=1, T=0)
    out = r.call(operator(r), leaves, cu_seqlens=torch.tensor([0]))
    assert all(y.shape[0] == 0 for y in out[1:])


# ---- far gates, far away ends ----
@over
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("gate", range(4))
def test_far_gates(recurrence, size, gate, generator):
    """Far out once in each unit, and all else as exact as ever."""
    r = recurrence
    if gate >= r.gates:
        pytest.skip("has fewer gates")
    for words in ((), ("exp", "at_least_one"), ("coupled",), ("reset_before",)):
        if not set(words) <= set(r.features):
            continue
        leaves, options = r.draw(words, generator, torch.float32, T=40, K=5)
        x = leaves["x"]
        x = x[:, :, None] if r.dense else x
        if gate >= x.shape[2]:
            continue
        at = torch.randint(40, (x.shape[0], 1, *x.shape[3:]), generator=generator)
        x[:, :, gate].scatter_(1, at, size)
        if "relu" in words or (r.name == "ind_rnn" and size > 0):
            leaves["u"].clamp_(-0.5, 0.5)
        leaves = {k: y.requires_grad_() for k, y in leaves.items()}
        both(r, leaves, options, generator, wide(leaves), 4 * FACTOR)


@pytest.mark.parametrize("m", [-torch.inf, 3.0, 1e4])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("normalizer", ["sum", "at_least_one"])
def test_slstm_without_a_past(m, forget_gate, normalizer, generator):
    """Where n is 0, unit by unit, m is not looked at; no infinity comes of it, forwards or backwards."""
    r = BY_NAME["slstm"]
    words = {"forget_gate": forget_gate, "normalizer": normalizer}
    leaves, _ = r.draw((), generator, K=5)
    empty = torch.rand(leaves["n"].shape, generator=generator) < 0.5
    for name in ("c", "n", "m"):
        leaves[name] = torch.where(empty, m if name == "m" else 0.0, leaves[name])
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    got = both(r, leaves, words, generator)
    grads = gradients(got, leaves, [torch.ones_like(y) for y in got])
    assert all(g.isfinite().all() for g in grads.values())
    assert not grads["m"][empty].any()
    zeros = leaves | {"m": torch.where(empty, 0.0, leaves["m"])}
    for g, w in zip(got, r.call(operator(r), zeros, **words), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("normalizer", ["sum", "at_least_one"])
def test_slstm_of_a_small_normaliser(normalizer, generator):
    """n between 0 and 1: the two normalisers differ, and each has its gradient."""
    r = BY_NAME["slstm"]
    leaves, _ = r.draw((), generator, K=5)
    leaves["n"] = torch.rand(leaves["n"].shape, generator=generator).double() * 0.9 + 0.05
    leaves["m"] = leaves["m"] + 2
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    got = both(r, leaves, {"normalizer": normalizer}, generator)
    other = {"sum": "at_least_one", "at_least_one": "sum"}[normalizer]
    assert not torch.allclose(got[0], r.call(operator(r), leaves, normalizer=other)[0])


@pytest.mark.slow
@over
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
def test_long(recurrence, dtype, generator):
    """T = 1e5: no drift, against a numpy loop; gradients against those in float64."""
    r = recurrence
    leaves, _ = r.draw((), generator, dtype, grad=True, B=1, T=100_000, H=1, K=2)
    got = r.call(operator(r), leaves)
    exact = wide(leaves)
    for g, w in zip(got, second_formula(r, exact, {}), strict=True):
        close(g, w, factor=4 * FACTOR)
    double = r.call(operator(r), exact)
    weights = cotangents(got, generator)
    theirs = gradients(double, exact, [w.double() for w in weights])
    compare(gradients(got, leaves, weights), theirs, grad=True, factor=4 * FACTOR)


@over
def test_nan_stays_where_it_is(recurrence, generator):
    """In its row, from its step on, in its sequence."""
    r = recurrence
    leaves, _ = r.draw((), generator, torch.float32, T=20, K=5)
    clean = r.call(operator(r), leaves)[0]
    dirty = leaves | {"x": leaves["x"].clone()}
    dirty["x"][1, 12] = torch.nan
    got = r.call(operator(r), dirty)[0]
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1, :12], clean[1, :12])
    assert got[1, 12].isnan().all()
    got = r.call(operator(r), dirty, reverse=True)[0]
    want = r.call(operator(r), leaves, reverse=True)[0]
    assert torch.equal(got[1, 13:], want[1, 13:]) and got[1, 12].isnan().all()


# ---- torch.nn ----
@pytest.mark.parametrize("name", NN)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
def test_torch_nn(name, reverse, dtype, generator):
    """Values and gradients."""
    f = operator(BY_NAME[name.split("_")[0]])
    check_torch_nn(name, reverse, generator, f, 4 * FACTOR, dtype, K=17)


@pytest.mark.parametrize("name", NN)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_torch_nn_packed(name, reverse, generator):
    check_torch_nn_packed(name, reverse, generator, operator(BY_NAME[name.split("_")[0]]), FACTOR)


@pytest.mark.parametrize("name", [n for n in NN if n != "elman_relu"])
def test_torch_nn_double_backward(name, generator):
    """Of a gradient penalty."""
    r, module, states, words = nn_case(name, generator)
    data = torch.randn(3, 5, 4, generator=generator).double().requires_grad_()
    project, given = from_nn(module)
    given |= dict(zip(r.states, [s[0][:, None] for s in states], strict=True))
    leaves = [data, *states, *module.parameters()]

    def penalty(outputs):
        total = sum(y.sin().sum() for y in outputs)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    y, final = module(data, states if len(states) > 1 else states[0])
    want = penalty([y, *(final if isinstance(final, tuple) else (final,))])
    got = penalty(r.call(operator(r), given | {"x": project(data)}, **words))
    for g, w in zip(got, want, strict=True):
        close(g, w, grad=True, factor=4 * FACTOR)


# ---- derivatives of other kinds ----
def of_leaves(r, function, names, options):
    return lambda *y: r.call(function, dict(zip(names, y, strict=True)), **options)


@over_sets(1)
def test_gradcheck(recurrence, chosen, generator):
    leaves, options = recurrence.draw(chosen, generator, grad=True, K=2, H=1)
    f = of_leaves(recurrence, operator(recurrence), list(leaves), options)
    x = tuple(leaves.values())
    torch.autograd.gradcheck(f, x, fast_mode=True, check_forward_ad=True, check_batched_grad=True)


@over_sets(1)
def test_double_backward(recurrence, chosen, generator):
    """Of what went before, with all options and masks: against the reference."""
    leaves, options = recurrence.draw(chosen, generator, grad=True, K=3)

    def penalty(function):
        out = recurrence.call(function, leaves, **options)
        total = sum(y.sin().sum() for y in out)
        x = list(leaves.values())
        grads = torch.autograd.grad(total, x, create_graph=True, allow_unused=True)
        size = sum(g.square().sum() for g in grads if g is not None)
        second = torch.autograd.grad(size, x, allow_unused=True)
        return {
            k: torch.zeros_like(y) if g is None else g
            for (k, y), g in zip(leaves.items(), second, strict=True)
        }

    want = penalty(recurrence.reference)
    compare(penalty(operator(recurrence)), want, grad=True, factor=8 * factor(chosen))


@over
def test_double_backward_of_clipped_gradients(recurrence, generator):
    """The derivative of the gradient that is made, clipped as it is: the forward itself is not
    clipped. (The reference's autograd function would clip what goes back through the forward, too.)"""
    leaves, options = recurrence.draw((), generator, grad=True, K=3)
    options["gradient_clip"] = 0.05
    weights = None

    def gradient(*x):
        nonlocal weights
        out = recurrence.call(operator(recurrence), dict(zip(leaves, x, strict=True)), **options)
        weights = weights or [torch.rand(y.shape, generator=generator).double() for y in out]
        total = sum((y * w).sum() for y, w in zip(out, weights, strict=True))
        return torch.autograd.grad(total, x, create_graph=True)

    torch.autograd.gradcheck(gradient, tuple(leaves.values()), fast_mode=True)


@over_sets(1)
def test_forward_mode(recurrence, chosen, generator):
    leaves, options = recurrence.draw(chosen, generator, K=3)
    x = tuple(leaves.values())

    def run(function):
        f = of_leaves(recurrence, function, list(leaves), options)
        return torch.func.jvp(f, x, tuple(y.cos() for y in x))[1]

    pairs = zip(run(operator(recurrence)), run(recurrence.reference), strict=True)
    for g, w in pairs:
        close(g, w, grad=True, factor=factor(chosen), size=float(w.abs().max()) / 8)


@over
@pytest.mark.parametrize("which", ["all", "x", "parameters", "masks"])
def test_vmap(recurrence, which, generator):
    """Over leaves and masks, or some of them; and of gradients."""
    r = recurrence
    drawn = [r.draw((*RICH[r.name], *MASKED), generator) for _ in range(3)]
    leaves, options = drawn[0]
    words = {k: v for k, v in options.items() if k not in MASKS}
    tensors = [leaf | {f"mask {k}": o[k] for k in MASKS if k in o} for leaf, o in drawn]
    mapped = {
        "all": set(tensors[0]),
        "x": {"x"},
        "parameters": set(leaves) - {"x", *r.states},
        "masks": {k for k in tensors[0] if k.startswith("mask")},
    }[which]
    dims = {k: 0 if k in mapped else None for k in tensors[0]}
    given = {
        k: torch.stack([t[k] for t in tensors]) if k in mapped else y for k, y in tensors[0].items()
    }

    def f(function):
        def run(given):
            masks = {k[5:]: y for k, y in given.items() if k.startswith("mask ")}
            mine = {k: y for k, y in given.items() if not k.startswith("mask ")}
            return r.call(function, mine, **words, **masks)

        return run

    def slope(function):
        def loss(x, given):
            return sum(y.sin().sum() for y in f(function)(given | {"x": x}))

        return lambda given: torch.func.grad(loss)(given["x"], given)

    got = torch.func.vmap(f(operator(r)), (dims,))(given)
    steep = torch.func.vmap(slope(operator(r)), (dims,))(given)
    for i in range(3):
        one = {k: y[i] if k in mapped else y for k, y in given.items()}
        for g, w in zip(got, f(r.reference)(one), strict=True):
            close(g[i], w, factor=factor(RICH[r.name]), size=0.25)
        want = slope(r.reference)(one)
        close(
            steep[i], want, grad=True, factor=factor(RICH[r.name]), size=float(want.abs().max()) / 8
        )


@pytest.mark.parametrize("dims", [(2, 0, 1, 1), (None, 0, None, 1), (0, None, 1, None)], ids=str)
def test_vmap_of_ind_rnn(dims, generator):
    """Whose u has one dimension: of those of the shared suite not all fit."""
    r = BY_NAME["ind_rnn"]
    leaves, _ = r.draw((), generator)
    x = [
        y if d is None else torch.stack([y, y / 2, y + 0.1], d)
        for y, d in zip(leaves.values(), dims, strict=True)
    ]
    outputs = [
        torch.func.vmap(of_leaves(r, f, list(leaves), {}), dims)(*x)
        for f in (operator(r), r.reference)
    ]
    for g, w in zip(*outputs, strict=True):
        close(g, w, factor=FACTOR)


# ---- consumers: with the arguments that the shared suites leave at None ----
def flat_call(r, leaves, options):
    """Of the dispatcher's operator, whose states are arguments each."""
    names = {"h": "initial_state"} if len(r.states) == 1 else {}
    return {names.get(k, k) if k in r.states else k: y for k, y in leaves.items()} | options


@over_sets(1)
def test_opcheck(recurrence, chosen, generator):
    op = getattr(torch.ops.torch_ext, recurrence.name).default
    for grad in (False, True):
        leaves, options = recurrence.draw(chosen, generator, torch.float32, grad=grad)
        torch.library.opcheck(op, (), flat_call(recurrence, leaves, options))


@over_step_sets()
def test_opcheck_of_steps(recurrence, chosen, generator):
    if len(chosen) > 1:
        pytest.skip("each by itself")
    r = recurrence
    leaves, options = r.draw(chosen, generator, torch.float32)
    call = flat_call(r, leaves, options) | {"bias": leaves.get("bias")}
    call = {"state" if k == "initial_state" else k: y for k, y in call.items()}
    call["x"] = call["x"][:, 0]
    for tail in ("_step", "_step_"):
        torch.library.opcheck(getattr(torch.ops.torch_ext, r.name + tail).default, (), call)


@over
def test_compile(recurrence, generator):
    """With masks, for another B and T without another compilation."""
    r = recurrence
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(leaves, options):
        return sum(y.sin().sum() for y in r.call(operator(r), leaves, **options))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    compiled_once = 0
    for B, T in ((5, 7), (6, 33), (8, 12)):  # no two sizes alike, which torch would rely on
        leaves, options = r.draw((*RICH[r.name], *MASKED), generator, grad=True, B=B, T=T, K=9)
        got = torch.autograd.grad(compiled(leaves, options), list(leaves.values()))
        want = torch.autograd.grad(loss(leaves, options), list(leaves.values()))
        for g, w in zip(got, want, strict=True):
            close(g, w, grad=True, factor=factor(RICH[r.name]), size=float(w.abs().max()) / 8)
        compiled_once = compiled_once or count.frame_count
    assert count.frame_count == compiled_once, "compiled again for another B or T"
    torch._dynamo.reset()


@over
def test_autocast(recurrence, generator):
    """Half-precision inputs beside float32 parameters and states run as they are."""
    leaves, options = recurrence.draw(
        (*RICH[recurrence.name], *MASKED), generator, torch.float32, K=8
    )
    leaves["x"] = leaves["x"].bfloat16()
    want = recurrence.call(operator(recurrence), leaves, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = recurrence.call(operator(recurrence), leaves, **options)
    for g, w in zip(got[1:], want[1:], strict=True):
        assert g.dtype is torch.float32
        close(g, w.double(), torch.float32, factor=factor(RICH[recurrence.name]))
    close(got[0], want[0].double(), torch.bfloat16)


@over
def test_threads(recurrence, threads, generator):
    """The same bits in every run and for every number of threads, with masks and without."""
    r = recurrence
    for chosen in ((), (*RICH[r.name], *MASKED), ("packed", "reverse")):
        leaves, options = r.draw(chosen, generator, torch.float32, grad=True, B=5, T=90, H=3, K=17)
        weights, first = None, None
        for n in (1, 1, 2, 3):
            threads(n)
            out = r.call(operator(r), leaves, **options)
            weights = weights or cotangents(out, generator)
            got = [*out, *gradients(out, leaves, weights).values()]
            first = first or got
            assert all(torch.equal(g, w) for g, w in zip(got, first, strict=True)), f"{n} threads"


@over
def test_layouts(recurrence, generator):
    """Turned round in memory, and between other numbers."""
    r = recurrence
    leaves, options = r.draw((*RICH[r.name], *MASKED), generator, K=5)
    layouts = (
        lambda y: (
            y.permute(*reversed(range(y.dim()))).contiguous().permute(*reversed(range(y.dim())))
        ),
        lambda y: torch.stack([y, y.logical_not() if y.dtype is torch.bool else y * torch.nan], -1)[
            ..., 0
        ],
        lambda y: y.repeat_interleave(2, 0)[::2],
    )
    want = both(r, {k: y.clone().requires_grad_() for k, y in leaves.items()}, options, generator,
                factor=factor(RICH[r.name]))  # fmt: skip
    for layout in layouts:
        moved = {k: layout(y).requires_grad_() for k, y in leaves.items()}
        mine = {k: layout(y) if isinstance(y, torch.Tensor) else y for k, y in options.items()}
        got = both(r, moved, mine, generator, factor=factor(RICH[r.name]))
        for g, w in zip(got, want, strict=True):
            close(g, w, factor=factor(RICH[r.name]))


# ---- errors ----
def everything(r, generator):
    """A valid call with all arguments that go together."""
    chosen = (*RICH[r.name], *MASKED)
    leaves, options = r.draw(chosen, generator, torch.float32)
    return leaves, options


def masks_of(r):
    return [k for k in MASKS if k != "c_update" or r.name == "lstm"]


@over
def test_shapes_are_refused(recurrence, generator):
    """Every tensor argument by name, also where it could be broadcast."""
    r = recurrence
    leaves, options = everything(r, generator)
    given = leaves | {k: y for k, y in options.items() if k in MASKS}
    optional = {
        "norm_weight",
        "peephole",
        "cell_norm_weight",
        "cell_norm_bias",
        "bias",
        *masks_of(r),
    }
    for name in optional & set(given):
        y = given[name]
        wrong = [y[None], y[..., :0], y.flatten()]
        wrong += [torch.cat([y, y.narrow(d, 0, 1)], d) for d in range(y.dim())]
        wrong += [y.narrow(d, 0, 1) for d in range(y.dim()) if y.shape[d] > 1]
        for bad in wrong:
            if bad.shape == y.shape:
                continue
            mine = dict(leaves), dict(options)
            mine[name in MASKS][name] = bad
            pieces = [f"{r.name}: {name} has shape {tuple(bad.shape)}", "expected"]
            if name == "projection":
                pieces = [r.name, "expected"]
            refuses(ValueError, pieces, r.call, operator(r), mine[0], **mine[1])


@over
def test_dtypes_are_refused(recurrence, generator):
    r = recurrence
    leaves, options = everything(r, generator)
    for name in leaves:
        if name == "x":
            continue
        for dtype in (torch.float64, torch.float16, torch.int64):
            bad = leaves | {name: leaves[name].to(dtype)}
            pieces = [f"{r.name}: ", f" has dtype {short(dtype)}, expected float32"]
            pieces.append(name if len(r.states) > 1 or name != "h" else "initial_state")
            refuses(TypeError, pieces, r.call, operator(r), bad, **options)
    for name in masks_of(r):
        for dtype in (torch.int64, torch.float32 if name == "reset" else torch.bool):
            bad = options | {name: options[name].to(dtype)}
            pieces = [f"{r.name}: {name} has dtype {short(dtype)}, expected"]
            pieces += ["bool"] * (name == "reset")
            refuses(TypeError, pieces, r.call, operator(r), leaves, **bad)


@over
def test_devices_are_refused(recurrence, generator):
    r = recurrence
    leaves, options = everything(r, generator)
    for name in [*leaves, *masks_of(r)][1:]:
        mine = dict(leaves), dict(options)
        mine[name in MASKS][name] = mine[name in MASKS][name].to("meta")
        named = "initial_state" if name == "h" and len(r.states) == 1 else name
        refuses(
            RuntimeError,
            [f"{r.name}: ", named, "meta", "cpu"],
            r.call,
            operator(r),
            mine[0],
            **mine[1],
        )


@over
def test_numbers_and_words_are_refused(recurrence, generator):
    r = recurrence
    leaves, _ = r.draw((), generator, torch.float32)
    bad = [
        ({"gradient_clip": -1.0}, "gradient_clip is -1"),
        ({"gradient_clip": torch.nan}, "gradient_clip is nan"),
    ]
    words = {"forget_gate": ("sigmoid", "exp"), "normalizer": ("sum", "at_least_one")}
    words = words if r.name == "slstm" else {}
    if r.name in ("elman", "ind_rnn"):
        words = {"nonlinearity": ("tanh", "relu")}
    for option, known in words.items():
        for word in ("", "Tanh", "softplus", known[0] + " "):
            bad.append(({option: word}, f"{option} is '{word}'"))
            for f in (operator(r, "_step"), operator(r, "_step_")):
                given = {k: y for k, y in leaves.items() if k not in r.states}
                given |= {"x": leaves["x"][:, 0], "state": states_of(r, leaves)}
                pieces = [f"{r.name}_step", f"{option} is '{word}'", "expected", *known]
                refuses(ValueError, pieces, f, **given, **{option: word})
    for options, text in bad:
        refuses(ValueError, [r.name, text, "expected"], r.call, operator(r), leaves, **options)


def test_what_does_not_go_together(generator):
    gru, lstm = BY_NAME["gru"], BY_NAME["lstm"]
    leaves, _ = gru.draw(("norm",), generator)
    pieces = ["gru: norm_weight", "expected", "reset_after"]
    refuses(ValueError, pieces, gru.call, operator(gru), leaves, reset_after=False)
    leaves, _ = lstm.draw(("cell_norm_bias",), generator)
    del leaves["cell_norm_weight"]
    refuses(
        ValueError, ["lstm: cell_norm_bias", "cell_norm_weight"], lstm.call, operator(lstm), leaves
    )
    leaves, _ = lstm.draw(("peephole",), generator)
    pieces = ["lstm: x has shape", "(2, 7, 4, 2, 3)", "3"]
    refuses(ValueError, pieces, lstm.call, operator(lstm), leaves, coupled=True)
    leaves, _ = lstm.draw(("coupled",), generator)
    refuses(
        ValueError, ["lstm: x has shape", "(2, 7, 3, 2, 3)", "4"], lstm.call, operator(lstm), leaves
    )
    leaves, _ = lstm.draw(("projection",), generator)
    del leaves["projection"]
    refuses(
        ValueError,
        ["lstm: R has shape (4, 2, 3, 2)", "expected"],
        lstm.call,
        operator(lstm),
        leaves,
    )


@over
def test_number_of_gates(recurrence, generator):
    if recurrence.dense:
        pytest.skip("has none")
    r = recurrence
    leaves, _ = r.draw((), generator)
    for count in {1, 2, 3, 4, 5} - {r.gates}:
        x = torch.zeros(2, 7, count, 2, 3, dtype=torch.float64)
        pieces = [f"{r.name}: x has shape (2, 7, {count}, 2, 3)", "expected", str(r.gates)]
        refuses(ValueError, pieces, r.call, operator(r), leaves | {"x": x})


@over
def test_states_that_are_no_tuples(recurrence, generator):
    r = recurrence
    if len(r.states) == 1:
        pytest.skip("has one state")
    leaves, _ = r.draw(("no_state",), generator)
    one = torch.zeros(2, 2, 3)
    expected = f"expected a tuple of {len(r.states)} tensors, ({', '.join(r.states)})"
    for bad in (one, (one,), (one,) * 5, (one,) * (len(r.states) - 1) + (None,)):
        refuses(
            TypeError,
            [f"{r.name}: initial_state is", expected],
            operator(r),
            **leaves,
            initial_state=bad,
        )


@over
def test_masks_of_packed_sequences(recurrence, generator):
    """One row for each sequence, not for the one row of x."""
    leaves, options = recurrence.draw(("packed", "recurrent_mask"), generator, torch.float32)
    mask = options.pop("recurrent_mask")
    pieces = [f"{recurrence.name}: recurrent_mask has shape", "expected (num_sequences=4"]
    refuses(
        ValueError, pieces, recurrence.call, operator(recurrence), leaves, **options,
        recurrent_mask=mask[:1],
    )  # fmt: skip
    recurrence.call(operator(recurrence), leaves, **options, recurrent_mask=mask)


@over
def test_in_place_refuses_gradients(recurrence, generator):
    leaves, _ = recurrence.draw((), generator, torch.float32, grad=True)
    states = [leaves[k].detach().clone() for k in recurrence.states]
    with pytest.raises(RuntimeError, match=f"{recurrence.name}_step_: an input requires grad"):
        step(recurrence, leaves, 0, states, "_step_")
