"""Memory: whatever its strides, offset or lazy bits, a tensor means its elements."""

import os

import pytest
import torch
from cases import ALL, HALF, close, cotangents, gradients, over, wide

import torch_ext

# Each lays the same (B, T, D) or (B, T, H, K) values out in another way. None copies back to contiguous.
LAYOUTS = {
    # (B, D, T) memory, time contiguous; (B, H, T, K) memory, as other packages have theirs
    "channels_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed_dims": lambda x: turned(turned(x).contiguous()),
    "offset": lambda x: padded(x, 1)[..., 1:],  # misaligned by one element
    "wide_rows": lambda x: padded(x, 7)[..., 7:],
    "every_second_channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every_second_step": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "flipped_memory": lambda x: x.flip(1).flip(1),
    "chunk_of_a_projection": lambda x: torch.cat([x, x, x], -1).chunk(3, -1)[1],
}


def turned(x):
    return x.permute(*reversed(range(x.dim())))


def padded(x, n):
    filler = torch.full((*x.shape[:-1], n), torch.nan, dtype=x.dtype, device=x.device)
    return torch.cat([filler, x], -1)


def lay_out(x, layout):
    """States have no time: they are laid out as one step of it. Of one dimension there is one
    layout."""
    if x.dim() == 1:
        return x
    y = layout(x) if x.dim() > 2 else layout(x[:, None])[:, 0]
    assert torch.equal(y, x)
    return y


def same(case, got, want):
    """Equal but for the order of roundings, which a path of its own for a layout may choose."""
    factor = 1.1 / 8 if got.dtype in HALF else case.slack / 32
    close(got, wide(want), grad=True, factor=factor)


SOME = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def results(f, x, weights, requires_grad=True):
    x = [y.detach().requires_grad_(requires_grad) for y in x]
    return [*f(*x), *gradients(f, x, weights=weights)]


@over(dtypes="all", cases=ALL)
@SOME
def test_inputs(case, options, dtype, layout, generator, device):
    """Time-contiguous, channel-contiguous, neither: values and gradients."""
    for shape, reverse in (((2, 21, 19), False), ((1, 70, 33), True)):
        x = case.leaves(*shape, dtype, generator, device)
        f = case.bind(**options, reverse=reverse)
        weights = cotangents(f(*x), generator)
        want = results(f, x, weights)
        got = results(f, [lay_out(y, layout) for y in x], weights)
        assert got[0].is_contiguous()
        for g, w in zip(got, want, strict=True):
            same(case, g, w)


@over(dtypes="all", variants=False, cases=ALL)
@SOME
def test_one_input_at_a_time(case, dtype, layout, generator, device):
    x = case.leaves(2, 21, 19, dtype, generator, device)
    f = case.bind()
    weights = cotangents(f(*x), generator)
    want = results(f, x, weights)
    for i in range(len(x)):
        mixed = [lay_out(y, layout) if i == j else y for j, y in enumerate(x)]
        for g, w in zip(results(f, mixed, weights), want, strict=True):
            same(case, g, w)


@over(dtypes="all", variants=False, cases=ALL)
@SOME
def test_gradients_coming_in(case, dtype, layout, generator, device):
    x = case.leaves(2, 21, 19, dtype, generator, device)
    f = case.bind()
    weights = cotangents(f(*x), generator)
    want = results(f, x, weights)
    got = results(f, x, [lay_out(g, layout) for g in weights])
    for g, w in zip(got, want, strict=True):
        same(case, g, w)


EXPANDED = {
    "batch": "B",
    "time": "T",
    "channels": "DHG",
    "states": "NWVKP",
    "one_number": "BTDHGNWVKP",
}


@over(dtypes="all", variants=False, cases=ALL)
@pytest.mark.parametrize("letters", EXPANDED.values(), ids=EXPANDED)
def test_expanded(case, dtype, letters, generator, device):
    """Stride 0: one element stands for many, in inputs, parameters, states and gradients (sum()
    gives such)."""

    def one(x, dims):
        for d, letter in enumerate(dims):
            x = x.narrow(d, 0, 1) if letter in letters else x
        return x

    leaves = case.leaves(2, 21, 19, dtype, generator, device)
    small = [one(y, case.letters(name)) for name, y in zip(case.names, leaves, strict=True)]
    big = [y.expand_as(x) for x, y in zip(leaves, small, strict=True)]
    f = case.bind()
    outputs = f(*[y.contiguous() for y in big])
    weights = [
        one(g, dims).expand_as(g)
        for g, dims in zip(cotangents(outputs, generator), case.ends, strict=True)
    ]
    want = results(f, [y.contiguous() for y in big], [g.contiguous() for g in weights])
    for g, w in zip(results(f, big, weights), want, strict=True):
        same(case, g, w)
    sums = [y.sum() for y in f(*[y.requires_grad_() for y in big])]
    # expanded numbers arrive as gradients
    summed = torch.autograd.grad(sums, big, [torch.ones_like(y) for y in sums])
    ones = [torch.ones_like(y) for y in outputs]
    for g, w in zip(summed, results(f, big, ones)[len(outputs) :], strict=True):
        assert torch.equal(g, w)


@over(dtypes=(torch.float32,), variants=False, cases=ALL)
def test_overlapping_inputs(case, dtype, generator, device):
    """Windows that share memory, in every input that has two dimensions."""
    line = case.sample("delta", (400,), dtype, generator).to(device)  # below 0, states explode
    x = case.leaves(2, 21, 19, dtype, generator, device)
    for i, (name, y) in enumerate(case.named(x).items()):
        if y.dim() > 1 and name != "A":
            x[i] = line[i:].as_strided(y.shape, (7, 5, 2, 1)[-y.dim() :])
    for g, w in zip(case.bind()(*x), case.bind()(*[y.clone() for y in x]), strict=True):
        same(case, g, w)


@over(dtypes=(torch.float32, torch.complex64), variants=False, cases=ALL)
def test_lazy_bits(case, dtype, generator, device):
    """Conjugation and negation that torch has only noted, not done."""
    x = case.leaves(2, 21, 19, dtype, generator, device)
    lazy = [torch._neg_view(-y) for y in x]
    if dtype.is_complex:
        lazy = [y.conj() for y in lazy]
        assert all(y.is_conj() for y in lazy)
    assert all(y.is_neg() for y in lazy)
    exact = [y.resolve_conj().resolve_neg() for y in lazy]
    f = case.bind()
    weights = cotangents(f(*x), generator)
    lazy_weights = [torch._neg_view(-g) for g in weights]
    if dtype.is_complex:
        lazy_weights = [g.conj().resolve_conj().conj() for g in lazy_weights]
    want = results(f, exact, [g.resolve_conj().resolve_neg() for g in lazy_weights])
    for g, w in zip(results(f, lazy, lazy_weights), want, strict=True):
        assert torch.equal(g, w)


@over(dtypes=(torch.float32, torch.bfloat16), variants=False, cases=ALL)
def test_packed_with_strides(case, dtype, generator, device):
    x = case.leaves(1, 40, 19, dtype, generator, device, state=3)
    cu = torch.tensor([0, 11, 11, 40], device=device)
    f = case.bind(cu_seqlens=cu)
    weights = cotangents(f(*x), generator)
    want = results(f, x, weights)
    for layout in LAYOUTS.values():
        got = results(f, [lay_out(y, layout) for y in x], [lay_out(g, layout) for g in weights])
        for g, w in zip(got, want, strict=True):
            same(case, g, w)


@over(variants=False, cases=ALL)
@SOME
def test_step(case, layout, generator, device):
    x = case.at(case.leaves(4, 1, 19, torch.float32, generator, device), 0)
    want = case.step(*[y.contiguous() for y in x])
    laid = [lay_out(y, layout) for y in x]
    for g, w in zip(case.step(*laid), want, strict=True):
        same(case, g, w)
    same(case, case.step_(*laid), want[0])
    for g, w in zip(laid[case.inputs :], want[1:], strict=True):
        same(case, g, w)


# ---- more elements than 32 bits count ----
@over(variants=False, cases=ALL)
def test_more_elements_than_int32_on_meta(case):
    B, T, D = 3, 2**20, 1024
    x = [
        torch.empty(case.shape(name, B, T, D), device="meta", requires_grad=True)
        for name in case.names
    ]
    outputs = case.bind()(*x)
    assert outputs[0].shape == case.output_shape(B, T, D) and outputs[0].numel() > 2**31
    for name, final in zip(case.states, outputs[1:], strict=True):
        assert final.shape == case.shape(name, B, None, D)
    for g, y in zip(torch.autograd.grad(outputs, x, outputs), x, strict=True):
        assert g.shape == y.shape


def available_bytes():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.unpoisoned
@over(dtypes=(torch.bfloat16,), variants=False, cases=ALL)
@pytest.mark.parametrize("d", [0, 1, 2])
def test_strides_beyond_int32(case, dtype, d, generator, device):
    """Few elements, but far apart in one dimension. Of their memory next to nothing is touched."""
    if device == "cpu" and available_bytes() < 6e9:
        pytest.skip("may not get 5 GB of addresses")
    x = case.leaves(2, 3, 9, dtype, generator, device)
    memory = torch.empty(2**31 + 1000, dtype=dtype, device=device)
    f = case.bind()
    weights = cotangents(f(*x), generator)
    want = results(f, x, weights)
    for i, name in enumerate(case.names):
        if x[i].dtype is not dtype or d >= x[i].dim() or x[i].shape[d] == 1:
            continue
        far, strides = list(x), list(x[i].stride())
        strides[d] = 2**31 // (x[i].shape[d] - 1) + 1
        far[i] = memory.as_strided(x[i].shape, strides).copy_(x[i])
        assert torch.equal(far[i], x[i]), name
        for g, w in zip(results(f, far, weights), want, strict=True):
            same(case, g, w)
        if i < len(case.arguments):
            continue
        for g, w in zip(case.step(*case.at(far, 0)), case.step(*case.at(x, 0)), strict=True):
            same(case, g, w)


@pytest.mark.slow
@pytest.mark.unpoisoned
@over(variants=False)
def test_more_elements_than_int32(case, generator, device):
    """Offsets beyond 2^31: rows around and after it of a 4.3 GB output. The inputs are windows over
    a few megabytes, every row another; a later row must equal the same row of a short call from the
    state before."""
    D, T = 1024, 2**21 + 72
    need = 2 * 2 * T * D
    if device == "cpu" and available_bytes() < need:
        pytest.skip(f"needs {need / 1e9:.0f} GB of free memory")

    def windows(argument):
        line = case.sample(argument, (1, 1, T + D), torch.bfloat16, generator)
        if argument == "a":
            line.clamp_(-0.9, 0.9)
        return line.flatten().to(device).as_strided((1, T, D), (0, 1, 1))

    x = [windows(argument) for argument in case.arguments]
    h, final = case.function(*x)
    assert h.numel() > 2**31
    for start in (2**20, 2**21 - 32, 2**21, T - 64):
        part = case.function(*[y[:, start : start + 64] for y in x], h[:, start - 1].float())
        close(h[:, start : start + 64], wide(part[0]), factor=4)
    close(h[:, -1], wide(final), factor=2)


@pytest.mark.slow
@pytest.mark.unpoisoned
def test_more_elements_than_int32_of_a_matrix_memory(generator, device):
    """Likewise of retention, whose memory of the steps before is short: a later row must equal that of
    a short call which begins a little earlier."""
    H, V, T = 16, 64, 2**21 + 72
    need = 2 * 2 * T * H * V
    if device == "cpu" and available_bytes() < need:
        pytest.skip(f"needs {need / 1e9:.0f} GB of free memory")
    q, k, v = (torch.randn(T + H * V, generator=generator).bfloat16().to(device) for _ in "qkv")
    q, k = (x.as_strided((1, T, 1, 1), (0, 1, 1, 1)) for x in (q, k))
    v = v.as_strided((1, T, H, V), (0, 1, V, 1))
    decay = torch.full((H,), 0.9, device=device)
    h, final = torch_ext.retention(q, k, v, decay)
    assert h.numel() > 2**31
    for start in (2**20, 2**21 - 32, 2**21, T - 64):
        q_, k_, v_ = (x[:, start - 448 : start + 64] for x in (q, k, v))
        part, last = torch_ext.retention(q_, k_, v_, decay)
        close(h[:, start : start + 64], wide(part[:, 448:]), factor=4)
    close(final, wide(last), factor=8)
