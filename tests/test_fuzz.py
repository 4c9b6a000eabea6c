"""Thousands of drawn calls: each gives the reference's numbers, or, where the call is wrong, says
so.

Derandomised: the same calls in every run.
"""

import string

import pytest
import torch
from cases import (
    CASES,
    HALF,
    REAL,
    STATE_DTYPE,
    bounds,
    close,
    gradients,
    label,
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
VARIANTS = [(case, options) for case in CASES for options in case.variants]


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


@st.composite
def sequence_calls(draw):
    case, options = draw(st.sampled_from(VARIANTS))
    dtype = draw(st.sampled_from(case.dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    options = dict(options, reverse=draw(st.booleans()))
    D = draw(SIZES)
    cu = None
    if draw(st.booleans()):
        lengths = draw(st.lists(LENGTHS, max_size=5))
        B, T, rows = 1, sum(lengths), len(lengths)
        cu = torch.tensor(bounds(lengths), dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    else:
        B, T = draw(st.sampled_from((0, 1, 1, 2, 3, 5))), draw(LENGTHS)
        rows = B
    x = [draw(laid_out(case, a, (B, T, D), dtype, generator)) for a in case.arguments]
    if draw(st.booleans()):
        x.append(draw(laid_out(case, "state", (rows, D), state_dtype(dtype), generator)))
    return Names(case=case.name, options=options, cu=cu, x=x), case, generator


@fuzz(1000)
@given(sequence_calls(), st.data())
def test_sequences(device, call, data):
    """Values and gradients of any valid call."""
    names, case, generator = call
    cu = names.cu if names.cu is None else names.cu.to(device)
    f = case.bind(**names.options, cu_seqlens=cu)
    reference = case.bind(case.reference, **names.options, cu_seqlens=names.cu)
    x = [y.to(device).requires_grad_(data.draw(st.booleans(), label="grad")) for y in names.x]
    exact = [wide(y.cpu()) for y in x]
    got, want = f(*x), reference(*exact)
    assert got[0].dtype is x[0].dtype and got[1].dtype is state_dtype(x[0].dtype)
    for name, g, w in zip(("h", "final_state"), got, want, strict=True):
        assert g.is_contiguous()
        close(g, w, name=name, size=0.25)
    if not any(y.requires_grad for y in x):
        return
    through = data.draw(st.sampled_from(((0, 1), (0,), (1,))), label="through")
    weights = [
        data.draw(laid_out(case, "weight", tuple(o.shape), o.dtype, generator)).to(device)
        for o in (got[i] for i in through)
    ]
    want = gradients(reference, exact, through, [wide(g.cpu()) for g in weights], unused=True)
    # a half-precision gradient that exactly cancels, h == candidate, keeps the rounding of the
    # saved h
    size = 0.5 if x[0].dtype in HALF else 0.02
    for g, w in zip(gradients(f, x, through, weights), want, strict=True):
        close(g, w, grad=True, name="gradient", size=size)


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
    x = [draw(laid_out(case, a, (B, D), dtype, generator)) for a in case.arguments]
    state = draw(laid_out(case, "state", (rows, D), state_dtype(dtype), generator, expand=False))
    return Names(case=case.name, options=options, indices=indices, x=[*x, state]), case


@fuzz(400)
@given(step_calls())
def test_steps(device, call):
    """Functional and in place, with and without a pool."""
    names, case = call
    x = [y.to(device) for y in names.x]
    *inputs, state = [wide(y.cpu()) for y in x]
    reference = case.bind(case.reference, **names.options)
    if names.indices is None:
        h, want = reference(*[y[:, None] for y in inputs], state)
        h, indices = h[:, 0], None
    else:
        indices = names.indices.to(device)
        keep = [b for b, i in enumerate(names.indices.tolist()) if i >= 0]
        rows = names.indices[keep].long()
        part, new = reference(*[y[keep][:, None] for y in inputs], state[rows])
        h, want = torch.zeros_like(inputs[0]), state.clone()
        h[keep], want[rows] = part[:, 0], new
    before = x[-1].clone()
    got = case.step(*x, indices, **names.options)
    close(got[0], h, name="h", size=0.25)
    close(got[1], want, name="state", size=0.25)
    assert torch.equal(x[-1], before)
    in_place = case.step_(*x, indices, **names.options)
    assert torch.equal(in_place, got[0]) and torch.equal(x[-1], got[1])


# ---- mistakes ----
DTYPES = (*REAL, torch.complex64, torch.complex128, torch.int32, torch.int64, torch.bool)
WORDS = st.one_of(
    st.sampled_from(("identity", "g", "relu", "")), st.text(string.printable, max_size=8)
)


def is_valid(case, call):
    """The rules of the interface, in one place: may the operator accept this call?"""
    inputs = [call[name] for name in case.arguments]
    first, state, cu = inputs[0], call["initial_state"], call["cu_seqlens"]
    if first.dim() != 3 or first.dtype not in case.dtypes:
        return False
    if any(y.shape != first.shape or y.dtype != first.dtype for y in inputs):
        return False
    B, T, D = first.shape
    rows = B
    if cu is not None:
        if cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or len(cu) == 0 or B != 1:
            return False
        steps = cu.tolist()
        if steps[0] != 0 or steps[-1] != T or steps != sorted(steps):
            return False
        rows = len(steps) - 1
    if state is not None and (
        state.shape != (rows, D) or state.dtype is not STATE_DTYPE.get(first.dtype, first.dtype)
    ):
        return False
    return call.get("activation", "g") in ("identity", "g")


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
    call = dict(zip((*case.arguments, "initial_state"), x, strict=True))
    call["cu_seqlens"] = torch.tensor(bounds(lengths)) if packed else None
    call |= options
    targets = [*case.arguments, "initial_state", "cu_seqlens"]
    targets += [name for name in options if name == "activation"]
    for name in draw(st.lists(st.sampled_from(targets), min_size=1, max_size=2)):
        call[name] = draw(changed(name, call[name]))
    grad = draw(st.booleans())
    return Names(case=case.name, grad=grad, call=Names(**call)), case, call


@fuzz(1000)
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
    x = [y[:, 0] if y.dim() == 3 else y for y in case.leaves(B, 1, D, dtype, generator, state=B)]
    call = dict(zip((*case.arguments, "state"), x, strict=True)) | options
    call["state_indices"] = None
    if draw(st.booleans()):
        values = draw(st.lists(st.integers(-3, 4), min_size=B, max_size=B, unique=True))
        call["state_indices"] = torch.tensor(values, dtype=torch.int64)
    targets = [*case.arguments, "state", "state_indices"]
    for name in draw(st.lists(st.sampled_from(targets), max_size=2)):
        call[name] = draw(changed(name, call[name]))
    return Names(case=case.name, in_place=draw(st.booleans()), call=Names(**call)), case, call


def is_valid_step(case, call):
    inputs = [call[name] for name in case.arguments]
    first, state, indices = inputs[0], call["state"], call["state_indices"]
    if first.dim() != 2 or first.dtype not in case.dtypes:
        return False
    if any(y.shape != first.shape or y.dtype != first.dtype for y in inputs):
        return False
    if state.dim() != 2 or state.shape[1] != first.shape[1]:
        return False
    if state.dtype is not STATE_DTYPE.get(first.dtype, first.dtype):
        return False
    if indices is None:
        return state.shape[0] == first.shape[0]
    if indices.dtype not in (torch.int32, torch.int64) or indices.shape != first.shape[:1]:
        return False
    return all(i < state.shape[0] for i in indices.tolist())


@fuzz(500)
@given(doubtful_steps())
def test_step_mistakes(device, names_case_call):
    names, case, call = names_case_call
    call = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in call.items()}
    f = case.step_ if names.in_place else case.step
    if is_valid_step(case, call):
        f(**call)
        return
    before = call["state"].clone()
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)) as caught:
        f(**call)
    message = str(caught.value).split("\n")[0]
    assert message.startswith(f"{case.name}_step"), message
    assert any(name in message for name in call), message
    assert torch.equal(call["state"], before), "a refused step changed the state"


def test_labels_are_distinct():
    """What the ids of all suites are made of."""
    assert len({(case.name, label(options)) for case, options in VARIANTS}) == len(VARIANTS)
