"""Values: every operator, option, dtype and shape against the float64 reference."""

import pytest
import torch
from cases import ALL, SHAPES, close, over, wide

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@over(dtypes="all", cases=ALL)
@shapes
def test_forward(case, options, dtype, shape, generator, device):
    B, T, D = shape
    T = min(T, case.longest)
    for reverse in (False, True):
        for state in (False, True):
            x = case.leaves(B, T, D, dtype, generator, device, state=state)
            before = [y.clone() for y in x]
            h, *finals = case.bind(**options, reverse=reverse)(*x)
            want = case.bind(case.reference, **options, reverse=reverse)(
                *[wide(y.cpu()) for y in x]
            )
            assert h.dtype is dtype and h.shape == case.output_shape(B, T, D)
            assert h.is_contiguous() and h.device.type == device
            close(h, want[0], name="h", size=0.25, factor=case.slack)
            for name, final, w in zip(case.states, finals, want[1:], strict=True):
                assert final.dtype is case.state_dtype(dtype) and final.is_contiguous()
                assert final.device.type == device
                # not rounded to the inputs' dtype
                kept = case.promised(final, x[0])
                close(final, w, kept, name=name, size=0.25, factor=case.slack)
            assert all(torch.equal(p, q) for p, q in zip(x, before, strict=True)), (
                "an input changed"
            )
            mine = {y.data_ptr() for y in (h, *finals) if y.numel()}
            assert not mine & {y.data_ptr() for y in x}


@over(dtypes="all", variants=False, cases=ALL)
def test_no_state_is_zeros(case, dtype, generator, device):
    x = case.leaves(2, 9, 17, dtype, generator, device)
    for y in x[case.inputs :]:
        y.zero_()
    for got, want in zip(case.bind()(*x[: case.inputs]), case.bind()(*x), strict=True):
        assert torch.equal(got, want)


@over(dtypes="all", variants=False, cases=ALL)
def test_no_steps_hand_the_state_through(case, dtype, generator, device):
    x = case.leaves(2, 0, 17, dtype, generator, device)
    h, *finals = case.bind()(*x)
    assert h.shape == case.output_shape(2, 0, 17)
    fresh = case.bind()(*x[: case.inputs])[1:]
    for given, final, zeros in zip(x[case.inputs :], finals, fresh, strict=True):
        assert torch.equal(final, given) and final.data_ptr() != given.data_ptr()
        assert torch.equal(zeros, torch.zeros_like(given))


@over(variants=False, cases=ALL)
def test_defaults_are_the_first_variant(case, generator, device):
    x = case.leaves(2, 9, 17, torch.float32, generator, device)
    for got, want in zip(case.function(*x), case.bind(**case.variants[0])(*x), strict=True):
        assert torch.equal(got, want)


@over(dtypes="all", variants=False, cases=ALL)
def test_meta(case, dtype, generator):
    """Shapes, dtypes and strides without values, whatever the layout of the inputs."""
    for B, T, D in ((2, 5, 3), (0, 5, 3), (2, 0, 3), (2, 5, 0)):
        for permuted in (False, True):
            x = case.leaves(B, T, D, dtype, generator)
            if permuted:
                x = [y.mT.contiguous().mT if y.dim() > 1 else y for y in x]
            want = case.bind()(*x)
            for got, w in zip(case.bind()(*[y.to("meta") for y in x]), want, strict=True):
                assert got.device.type == "meta" and got.dtype is w.dtype
                assert got.shape == w.shape and got.stride() == w.stride()


def test_poison(device):
    """The fixture does what the suites rely on."""
    assert torch.empty(100, device=device).isnan().all()


@over(dtypes=(torch.float16,), variants=False)
def test_half_overflow_stays_in_the_output(case, dtype, device):
    """A state beyond float16's largest number is infinite in h, and only there."""
    if case.name != "linear_scan":
        pytest.skip("a gated average never exceeds its float16 candidates")
    b = torch.full((1, 3, 16), 6e4, dtype=dtype, device=device)
    h, final = case.function(torch.ones_like(b), b)
    assert torch.equal(h[0, :, 0].isinf().cpu(), torch.tensor([False, True, True]))
    assert torch.allclose(final, 3 * b[:, 0].float())
