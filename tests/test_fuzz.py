"""Thousands of drawn calls: each gives the reference's numbers, or, where the call is wrong, says
so.

Derandomised: the same calls in every run.
"""

import string
from types import SimpleNamespace

import pytest
import torch
from cases import (
    ALL,
    HALF,
    LAYER_OPTIONAL,
    LAYER_STEP,
    MATRICES,
    REAL,
    bounds,
    close,
    gradients,
    label,
    layer_sample,
    layer_sizes,
    layer_step,
    layer_step_formula,
    short,
    state_dtype,
    wide,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def fuzz(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


SIZES = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65))
LENGTHS = st.sampled_from((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 23, 33))
VARIANTS = [(case, options) for case in ALL for options in case.variants]


class Names:
    """Prints a drawn call in one readable line, where hypothesis would print tensors."""

    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __repr__(self):
        def show(x):
            if isinstance(x, torch.Tensor):
                if x.dim() < 2 and not x.is_floating_point():
                    return f"{x.tolist()} {short(x.dtype)}"
                return f"{short(x.dtype)}{tuple(x.shape)} strides {x.stride()}"
            return [show(y) for y in x] if isinstance(x, list) else x

        return ", ".join(f"{k}={show(v)}" for k, v in self.__dict__.items())


@st.composite
def laid_out(draw, case, argument, shape, dtype, generator, expand=True):
    """A tensor of this shape with drawn order of dimensions in memory, gaps, offset and stride
    0."""
    n = len(shape)
    order = draw(st.permutations(range(n)))
    gaps = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in shape]
    skips = [draw(st.sampled_from((0, 0, 0, 1, 5))) for _ in shape]
    flat = [expand and draw(st.integers(0, 9)) == 0 for _ in shape]
    sizes = [1 if f else s for f, s in zip(flat, shape, strict=True)]
    memory = [sizes[d] * gaps[d] + skips[d] for d in order]
    x = case.sample(argument, tuple(memory), dtype, generator)
    x = x.permute([order.index(d) for d in range(n)])
    for d in range(n):
        x = x.narrow(d, skips[d], sizes[d] * gaps[d])
        x = x[(slice(None),) * d + (slice(None, None, gaps[d]),)]
    return x.expand(shape)


COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


@st.composite
def forms(draw, case, D, dtype, step=False):
    """What an operator may be called with: of each argument but the state that is there, its
    dimensions and its dtype; the sizes of those that others do not have; the state's dtype."""
    absent = [name for name in case.optional if draw(st.integers(0, 3)) == 0]
    given = {
        name: (case.letters(name), draw(st.sampled_from((dtype, *case.also(name, dtype)))))
        for name in case.names[: case.inputs]
        if name not in absent
    }
    sizes, states = {}, case.state_dtype(dtype)
    if case in MATRICES:
        sizes = {d: draw(st.sampled_from((1, 2, 3, 5, 8, 9, 17))) for d in case.sizes}
        divisors = [n for n in range(1, D + 1) if D % n == 0] or [1, 2]
        sizes |= {"H": D, "G": draw(st.sampled_from(divisors))}
    if case.name == "causal_conv1d":
        sizes["W"] = draw(st.sampled_from((1, 2, 3, 4, 4, 5, 8, 9, 13)))
        sizes["V"] = sizes["W"] - 1
    if case.name == "selective_scan":
        sizes["N"] = draw(st.sampled_from((1, 2, 3, 4, 8, 11, 16, 17)))
        divisors = [n for n in range(1, D + 1) if D % n == 0] or [1, 2]
        sizes |= {"G": draw(st.sampled_from(divisors)), "H": draw(st.sampled_from(divisors))}
        if dtype in COMPLEX and draw(st.integers(0, 4)) == 0:
            states = COMPLEX[dtype]
            given["A"] = ("DN", states)
        for name, group in (("B", "G"), ("C", "H")):
            letters = draw(st.sampled_from(("BTN", f"BT{group}N", "DN")[: 2 if step else 3]))
            own = dtype if "T" in letters and not states.is_complex else states
            given[name] = (letters, own)
    return given, sizes, states


def rest(case, options):
    """The options that the function itself takes."""
    return {k: v for k, v in options.items() if k != "reverse" or case.name != "causal_conv1d"}


@st.composite
def sequence_calls(draw):
    case, options = draw(st.sampled_from(VARIANTS))
    dtype = draw(st.sampled_from(case.dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    options = rest(case, dict(options, reverse=draw(st.booleans())))
    D = draw(SIZES)
    cu = None
    if draw(st.booleans()):
        lengths = draw(st.lists(LENGTHS, max_size=5))
        B, T, rows = 1, sum(lengths), len(lengths)
        cu = torch.tensor(bounds(lengths), dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    else:
        B, T = draw(st.sampled_from((0, 1, 1, 2, 3, 5))), draw(LENGTHS)
        rows = B
    given, sizes, states = draw(forms(case, D, dtype))
    sizes |= {"B": B, "T": T, "D": D}
    x = {
        name: draw(laid_out(case, name, tuple(sizes[d] for d in letters), kind, generator))
        for name, (letters, kind) in given.items()
    }
    if draw(st.booleans()):
        for name in case.states:
            shape = tuple((sizes | {"B": rows})[d] for d in case.letters(name))
            drawn = "state" if name == "initial_state" else name
            x[name] = draw(laid_out(case, drawn, shape, states, generator))
    return Names(case=case.name, options=options, cu=cu, **x), case, x, states, generator


def by_name(function, names, options):
    return lambda *y: function(**dict(zip(names, y, strict=True)), **options)


@fuzz(1300)
@given(sequence_calls(), st.data())
def test_sequences(device, call, data):
    """Values and gradients of any valid call."""
    names, case, leaves, states, generator = call
    cu = names.cu if names.cu is None else names.cu.to(device)
    missing = {name: None for name in case.optional if name not in leaves}
    f = by_name(case.function, leaves, names.options | missing | {"cu_seqlens": cu})
    options = names.options | missing | {"cu_seqlens": names.cu}
    reference = by_name(case.reference, leaves, options)
    x = [y.to(device).requires_grad_(data.draw(st.booleans(), "grad")) for y in leaves.values()]
    exact = [wide(y.cpu()) for y in x]
    got, want = f(*x), reference(*exact)
    assert got[0].dtype is x[0].dtype and all(y.dtype is states for y in got[1:])
    # the phase of a complex decay, of several turns, is rounded before its sine is taken
    factor = 16 if case.name == "selective_scan" and states.is_complex else case.slack
    for name, g, w in zip(("h", *case.states), got, want, strict=True):
        assert g.is_contiguous()
        close(g, w, case.promised(g, x[0]), name=name, size=0.25, factor=factor)
    if not any(y.requires_grad for y in x):
        return
    every = tuple(range(len(got)))
    through = data.draw(st.sampled_from((every, every[:1], every[1:])), label="through")
    weights = [
        data.draw(laid_out(case, "weight", tuple(o.shape), o.dtype, generator)).to(device)
        for o in (got[i] for i in through)
    ]
    want = gradients(reference, exact, through, [wide(g.cpu()) for g in weights], unused=True)
    # a half-precision gradient that exactly cancels, h == candidate, keeps the rounding of the
    # saved h
    size = 0.5 if x[0].dtype in HALF else 0.02
    mine = gradients(f, x, through, weights, unused=case.loose)
    for g, w in zip(mine, want, strict=True):
        kept = case.promised(g, x[0])
        close(g, w, kept, grad=True, name="gradient", size=size, factor=factor)


def step_states(case):
    """What a step calls them."""
    return ["state" if name == "initial_state" else name for name in case.states]


@st.composite
def step_calls(draw):
    case, options = draw(st.sampled_from(VARIANTS))
    dtype = draw(st.sampled_from(case.dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    B, D = draw(st.sampled_from((0, 1, 2, 3, 5, 8))), draw(SIZES)
    indices, rows = None, B
    if draw(st.booleans()):
        rows = draw(st.integers(B, B + 4))
        chosen = draw(st.permutations(range(rows)))[:B]
        chosen = [-1 - i if draw(st.integers(0, 4)) == 0 else i for i in chosen]
        indices = torch.tensor(chosen, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    given, sizes, states = draw(forms(case, D, dtype, step=True))
    sizes |= {"B": B, "D": D}
    x = {}
    for name, (letters, kind) in given.items():
        shape = tuple(sizes[d] for d in letters.replace("T", ""))
        x[name] = draw(laid_out(case, name, shape, kind, generator))
    for name, key in zip(case.states, step_states(case), strict=True):
        shape = tuple((sizes | {"B": rows})[d] for d in case.letters(name))
        x[key] = draw(laid_out(case, key, shape, states, generator, expand=False))
    over_time = [name for name, (letters, _) in given.items() if "T" in letters]
    return Names(case=case.name, options=options, indices=indices, **x), case, x, over_time


@fuzz(800)
@given(step_calls())
def test_steps(device, call):
    """Functional and in place, with and without a pool."""
    names, case, leaves, over_time = call
    x = {name: y.to(device) for name, y in leaves.items()}
    missing = {name: None for name in case.optional if name not in leaves}
    exact = {name: wide(y) for name, y in leaves.items()} | missing
    keys = step_states(case)
    states = [exact.pop(key) for key in keys]

    def reference(keep, states):
        now = {k: y[keep][:, None] if k in over_time else y for k, y in exact.items()}
        now |= dict(zip(case.states, states, strict=True))
        h, *after = case.reference(**now, **names.options)
        return h[:, 0], after

    if names.indices is None:
        h, want = reference(slice(None), states)
        indices = None
    else:
        indices = names.indices.to(device)
        keep = [b for b, i in enumerate(names.indices.tolist()) if i >= 0]
        rows = names.indices[keep].long()
        part, new = reference(keep, [state[rows] for state in states])
        h, want = part.new_zeros(len(names.indices), *part.shape[1:]), []
        h[keep] = part
        for state, after in zip(states, new, strict=True):
            want.append(state.clone())
            want[-1][rows] = after
    call = x | missing | names.options | {"state_indices": indices}
    before = [x[key].clone() for key in keys]
    got = case.step(**call)
    complex_states = case.name == "selective_scan" and before[0].is_complex()
    factor = 16 if complex_states else case.slack
    for name, g, w in zip(("h", *keys), got, (h, *want), strict=True):
        close(g, w, name=name, size=0.25, factor=factor)
    assert all(torch.equal(x[key], b) for key, b in zip(keys, before, strict=True))
    in_place = case.step_(**call)
    assert torch.equal(in_place, got[0])
    assert all(torch.equal(x[key], g) for key, g in zip(keys, got[1:], strict=True))


@st.composite
def layer_calls(draw):
    dtype = draw(st.sampled_from(REAL))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    small = st.sampled_from((1, 2, 3, 5, 8, 9, 16, 17, 33))
    sizes = {d: draw(small) for d in "MINRO"} | {"W": draw(st.sampled_from((1, 2, 4, 5)))}
    B = draw(st.sampled_from((0, 1, 2, 3, 5, 8, 9)))
    indices, rows = None, B
    if draw(st.booleans()):
        rows = draw(st.integers(B, B + 3))
        chosen = draw(st.permutations(range(rows)))[:B]
        chosen = [-1 if draw(st.integers(0, 4)) == 0 else i for i in chosen]
        indices = torch.tensor(chosen, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    sizes, call = layer_sizes(B=B, **sizes), {}
    wide_state = state_dtype(dtype)
    for name, letters in LAYER_STEP.items():
        if name in LAYER_OPTIONAL and draw(st.integers(0, 3)) == 0:
            call[name] = None
            continue
        own = sizes | ({"B": rows} if "state" in name else {})
        kinds = [dtype]
        if name in ("conv_weight", "conv_bias", "dt_proj_bias", "A_log", "D", "conv_state"):
            kinds.append(wide_state)
        kind = wide_state if name == "scan_state" else draw(st.sampled_from(kinds))
        shape = tuple(own[d] for d in letters)
        sampler = SimpleNamespace(sample=layer_sample)
        call[name] = draw(laid_out(sampler, name, shape, kind, generator, "state" not in name))
    return Names(indices=indices, **call), call


@fuzz(250)
@given(layer_calls(), st.booleans())
def test_layer_steps(device, drawn, grad):
    """mamba_step and mamba_step_, with a gradient, which goes by other products, and without."""
    names, call = drawn
    indices = names.indices
    exact = {k: None if x is None else wide(x) for k, x in call.items()}
    if indices is None:
        want = list(layer_step_formula(**exact))
    else:
        keep = [b for b, i in enumerate(indices.tolist()) if i >= 0]
        rows = indices[keep].long()
        part = dict(exact, x=exact["x"][keep])
        part |= {name: exact[name][rows] for name in ("conv_state", "scan_state")}
        y, *states = layer_step_formula(**part)
        want = [torch.zeros(len(indices), y.shape[1]).double()]
        want[0][keep] = y
        for name, new in zip(("conv_state", "scan_state"), states, strict=True):
            want.append(exact[name].clone())
            want[-1][rows] = new
        indices = indices.to(device)
    call = {k: None if x is None else x.to(device) for k, x in call.items()}
    call["x"].requires_grad_(grad)
    before = [call[name].clone() for name in ("conv_state", "scan_state")]
    got = layer_step(call, indices)
    # Half precision rounds between the projections: errors of several roundings, of sums that cancel.
    dtype = call["x"].dtype
    size = {torch.bfloat16: 0.06, torch.float16: 0.008}.get(dtype, 0)
    for name, g, w, like in zip(
        ("y", "conv_state", "scan_state"), got, want, (call["x"], *before), strict=True
    ):
        assert g.dtype is like.dtype and g.shape == w.shape
        w = w.to(g.device)
        if dtype in HALF:
            assert (g - w).norm() <= size * w.norm() + 1e-3, name
        else:
            close(g, w, grad=True, size=1, factor=4, name=name)
    for name, b in zip(("conv_state", "scan_state"), before, strict=True):
        assert torch.equal(call[name], b)
    call["x"].requires_grad_(False)
    in_place = layer_step(call, indices, in_place=True)
    for name, g, w in zip(
        ("y", "conv_state", "scan_state"),
        (in_place, call["conv_state"], call["scan_state"]),
        got,
        strict=True,
    ):
        if dtype in HALF:
            assert (g - w).double().norm() <= size * w.double().norm() + 1e-3, name
        else:
            close(g, wide(w.detach()), grad=True, size=1, name=name)


# ---- mistakes ----
DTYPES = (*REAL, torch.complex64, torch.complex128, torch.int32, torch.int64, torch.bool)
WORDS = st.one_of(
    st.sampled_from(("identity", "g", "silu", "relu", "")),
    st.text(string.printable.replace("\n", ""), max_size=8),
)


def allowed(case, name, call):
    """The dimensions and dtypes that an argument may have beside the others."""
    dtype, letters = call[case.names[0]].dtype, case.letters(name)
    if case in MATRICES:
        states = (case.state_dtype(dtype),)
        more = {"HP": (dtype, *case.also(name, dtype))} if letters == "H" and name == "D" else {}
        mine = states if name in case.states else (dtype, *case.also(name, dtype))
        return {letters: mine} | more
    if name == "initial_state" or case.name != "selective_scan" or name not in ("A", "B", "C"):
        states = case.state_dtype(dtype)
        if case.name == "selective_scan" and call["A"].is_complex():
            states = COMPLEX.get(dtype)
        return {letters: (states,) if name == "initial_state" else (dtype, *case.also(name, dtype))}
    if name == "A":
        return {"DN": (dtype, *case.also(name, dtype), COMPLEX.get(dtype))}
    complex_states = call["A"].is_complex()
    states = COMPLEX.get(dtype) if complex_states else case.state_dtype(dtype)
    now = (states if complex_states else dtype,)
    return {"BTN": now, "BTGN": now, "DN": (states,) if complex_states else (states, dtype)}


def valid_arguments(case, call, step, rows):
    """The rules of the interface, in one place: may the operator accept this call?"""
    first = call[case.names[0]]
    dims = case.letters(case.names[0]).replace("T", "" if step else "T")
    if first.dim() != len(dims) or first.dtype not in case.dtypes:
        return False
    sizes = dict(zip(dims, first.shape, strict=True))
    if case in MATRICES:  # heads, and what they hold, are those of the values
        values = call[case.carrier]
        if values.dim() != len(dims):
            return False
        sizes |= dict(zip(case.letters(case.carrier)[-2:], values.shape[-2:], strict=True))
        if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
            return False
    owners = {"selective_scan": ("A", "N"), "causal_conv1d": ("weight", "W")}
    if case.name in owners:  # of a size that others have too
        name, letter = owners[case.name]
        if call[name].dim() != 2 or call[name].shape[1] < 1:
            return False
        sizes[letter] = call[name].shape[1]
        sizes["V"] = sizes[letter] - 1
    for name in case.names[1:]:
        x = call[name]
        if x is None:
            continue
        for letters, dtypes in allowed(case, name, call).items():
            if step and letters == "DN" and name != "A":
                continue
            letters = letters.replace("T", "") if step else letters
            mine = sizes | ({"B": rows} if name in case.states else {})
            fits = x.dim() == len(letters) and all(
                mine.get(d, n) == n for d, n in zip(letters, x.shape, strict=True)
            )
            groups = x.shape[-2] if "G" in letters and fits and case not in MATRICES else 1
            if fits and x.dtype in dtypes and groups and sizes.get("D", 0) % groups == 0:
                break
        else:
            return False
    words = (*case.words, None) if case.name == "causal_conv1d" else case.words
    return "activation" not in call or call["activation"] in words


def is_valid(case, call):
    first, cu = call[case.names[0]], call["cu_seqlens"]
    rows = first.shape[0] if first.dim() else 0
    if cu is not None:
        if cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or len(cu) == 0 or rows != 1:
            return False
        steps = cu.tolist()
        if first.dim() < 2 or steps[0] != 0 or steps[-1] != first.shape[1]:
            return False
        if steps != sorted(steps):
            return False
        rows = len(steps) - 1
    return valid_arguments(case, call, 0, rows)


@st.composite
def changed(draw, name, x):
    """Something else in the place of an argument: mostly wrong, not always."""
    if name == "activation":
        return draw(WORDS)
    if name == "cu_seqlens" and draw(st.integers(0, 3)):
        steps = draw(st.lists(st.integers(-2, 12), max_size=5))
        dtype = draw(st.sampled_from((torch.int32, torch.int64, torch.int64, torch.float32)))
        return torch.tensor(steps, dtype=dtype)
    x = torch.zeros(1, 2) if x is None else x
    how = draw(st.sampled_from(("dtype", "size", "size", "drop", "add", "permute", "empty")))
    if how == "dtype":
        return x.to(draw(st.sampled_from(DTYPES)))
    if how == "add" or x.dim() == 0:
        return x.unsqueeze(draw(st.integers(0, x.dim())))
    d = draw(st.integers(0, x.dim() - 1))
    if how == "drop":
        return x.sum(d).to(x.dtype)
    if how == "permute":
        return x.transpose(0, d)
    sizes = list(x.shape)
    sizes[d] = 0 if how == "empty" else max(0, sizes[d] + draw(st.sampled_from((-1, 1, 1, 2))))
    return x.new_ones(sizes)


@st.composite
def doubtful_calls(draw):
    case, options = draw(st.sampled_from(VARIANTS))
    dtype = draw(st.sampled_from(case.dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 4), max_size=3)) if packed else []
    B, T = (1, sum(lengths)) if packed else (draw(st.integers(0, 3)), draw(st.integers(0, 4)))
    D = draw(st.integers(0, 4))
    x = case.leaves(B, T, D, dtype, generator, state=len(lengths) if packed else B)
    call = case.named(x)
    call["cu_seqlens"] = torch.tensor(bounds(lengths)) if packed else None
    call |= options
    targets = [*case.names, "cu_seqlens"]
    targets += [name for name in options if name == "activation"]
    for name in draw(st.lists(st.sampled_from(targets), min_size=1, max_size=2)):
        call[name] = draw(changed(name, call[name]))
    grad = draw(st.booleans())
    return Names(case=case.name, grad=grad, call=Names(**call)), case, call


@fuzz(1900)
@given(doubtful_calls())
def test_mistakes(device, names_case_call):
    """Accepted exactly if the interface allows it; refused in words, with one of three types."""
    names, case, call = names_case_call
    for name, x in call.items():
        if isinstance(x, torch.Tensor) and (name != "cu_seqlens"):
            call[name] = x.to(device)
            floating = x.is_floating_point() or x.is_complex()
            call[name].requires_grad_(names.grad and floating)
    if is_valid(case, call):
        outputs = case.function(**call)
        if names.grad:
            sum(y.abs().sum() for y in outputs).backward()
        return
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        case.function(**call)
    message = str(caught.value).split("\n")[0]
    assert message.startswith(f"{case.name}: "), message
    assert "expected" in message and any(name in message for name in call), message


@st.composite
def doubtful_steps(draw):
    case, options = draw(st.sampled_from(VARIANTS))
    dtype = draw(st.sampled_from(case.dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    B, D = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    x = case.at(case.leaves(B, 1, D, dtype, generator, state=B), 0)
    targets = [*case.names[: case.inputs], *step_states(case)]
    call = dict(zip(targets, x, strict=True)) | options
    call["state_indices"] = None
    if draw(st.booleans()):
        values = draw(st.lists(st.integers(-3, 4), min_size=B, max_size=B, unique=True))
        call["state_indices"] = torch.tensor(values, dtype=torch.int64)
    targets.append("state_indices")
    for name in draw(st.lists(st.sampled_from(targets), max_size=2)):
        call[name] = draw(changed(name, call[name]))
    return Names(case=case.name, in_place=draw(st.booleans()), call=Names(**call)), case, call


def is_valid_step(case, call):
    keys, indices = step_states(case), call["state_indices"]
    first, state = call[case.names[0]], call[keys[0]]
    rows = first.shape[0] if first.dim() else 0
    if indices is not None:
        if indices.dtype not in (torch.int32, torch.int64) or indices.shape != (rows,):
            return False
        rows = state.shape[0] if state.dim() else 0
        if any(i >= rows for i in indices.tolist()):
            return False
    states = {name: call[key] for name, key in zip(case.states, keys, strict=True)}
    return valid_arguments(case, call | states, 1, rows)


@fuzz(1000)
@given(doubtful_steps())
def test_step_mistakes(device, names_case_call):
    names, case, call = names_case_call
    call = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in call.items()}
    f = case.step_ if names.in_place else case.step
    if is_valid_step(case, call):
        f(**call)
        return
    before = [call[key].clone() for key in step_states(case)]
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)) as caught:
        f(**call)
    message = str(caught.value).split("\n")[0]
    assert message.startswith(f"{case.name}_step"), message
    assert any(name in message for name in call), message
    for key, was in zip(step_states(case), before, strict=True):
        assert torch.equal(call[key], was), "a refused step changed the state"


def test_labels_are_distinct():
    """What the ids of all suites are made of."""
    assert len({(case.name, label(options)) for case, options in VARIANTS}) == len(VARIANTS)
