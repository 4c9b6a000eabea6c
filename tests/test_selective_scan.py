"""What is special to selective_scan: its forms of B and C, complex states, its parameters' dtypes.
The rest it shares with the other operators' suites."""

import itertools

import pytest
import torch
from cases import close, cotangents

import torch_ext

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
FORMS = ("token", "groups", "constant")


def draw(
    generator,
    B=2,
    T=17,
    D=6,
    N=3,
    form_b="token",
    form_c="token",
    complex_states=False,
    optional=True,
    dtype=torch.float64,
    sequences=None,
):
    """A dictionary of the tensors that selective_scan takes."""
    state_dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    if complex_states:
        state_dtype = {torch.float64: torch.complex128, torch.float32: torch.complex64}[dtype]

    def normal(*shape, dtype=torch.float64):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)

    def coefficient(form):
        if form == "constant":
            return normal(D, N, dtype=state_dtype)
        shape = (B, T, N) if form == "token" else (B, T, 2, N)
        return normal(*shape, dtype=state_dtype if complex_states else dtype)

    A = -torch.rand(D, N, generator=generator, dtype=torch.float64) * 2
    if complex_states:
        A = torch.complex(A, 3 * torch.randn(D, N, generator=generator, dtype=torch.float64))
    x = {
        "u": normal(B, T, D, dtype=dtype),
        "delta": normal(B, T, D, dtype=dtype).abs(),  # below 0 and without softplus states explode
        "A": A.to(state_dtype),
        "B": coefficient(form_b),
        "C": coefficient(form_c),
    }
    if optional:
        x["D"] = normal(D, dtype=dtype)
        x["z"] = normal(B, T, D, dtype=dtype)
        x["delta_bias"] = normal(D, dtype=dtype).abs()
        x["initial_state"] = normal(sequences or B, D, N, dtype=state_dtype)
    return x


def grads(f, x, weights, **options):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in x.items()}
    outputs = f(**leaves, **options)
    pairs = [(y, w) for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    g = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [w for _, w in pairs], allow_unused=True
    )
    return outputs, {
        k: torch.zeros_like(v) if one is None else one
        for (k, v), one in zip(leaves.items(), g, strict=True)
    }


def check_against_reference(x, generator, **options):
    wants = torch_ext.selective_scan_reference(**x, **options)
    weights = cotangents(wants, generator)
    wants, want = grads(torch_ext.selective_scan_reference, x, weights, **options)
    gots, got = grads(torch_ext.selective_scan, x, weights, **options)
    # A phase of several turns is rounded before its sine is taken, alike in both.
    factor = 16 if x["A"].is_complex() else 1
    for name, one, other in zip(("y", "final_state"), gots, wants, strict=True):
        close(one.detach(), other.detach(), factor=factor, name=name)
    for name in x:
        close(got[name], want[name], grad=True, factor=factor, name=f"gradient of {name}")


@pytest.mark.parametrize("softplus", [False, True], ids=["raw", "softplus"])
@pytest.mark.parametrize("complex_states", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("form_c", FORMS)
@pytest.mark.parametrize("form_b", FORMS)
def test_forms(form_b, form_c, complex_states, softplus, generator):
    x = draw(generator, form_b=form_b, form_c=form_c, complex_states=complex_states)
    check_against_reference(x, generator, delta_softplus=softplus)
    check_against_reference(x, generator, delta_softplus=softplus, reverse=True)


@pytest.mark.parametrize("left_out", [*itertools.combinations(NAMES[5:], 1), NAMES[5:]])
def test_optional_arguments(left_out, generator):
    x = draw(generator)
    x = {k: v for k, v in x.items() if k not in left_out}
    check_against_reference(x, generator, delta_softplus=True)


@pytest.mark.parametrize("form", FORMS)
def test_packed(form, generator):
    lengths = [3, 0, 7, 1, 6]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    x = draw(generator, B=1, form_b=form, form_c=form, sequences=len(lengths))
    for reverse in (False, True):
        check_against_reference(x, generator, cu_seqlens=offsets, reverse=reverse)


@pytest.mark.parametrize("N", [1, 2, 5, 16, 17, 64, 256])
def test_numbers_of_states(N, generator):
    check_against_reference(draw(generator, T=21, D=5, N=N), generator, delta_softplus=True)


def test_time_contiguous(generator):
    """(B, D, T) and (B, N, T) in memory, as mamba_ssm has them."""
    x = draw(generator)
    turned = dict(x)
    for name in ("u", "delta", "z", "B", "C"):
        turned[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)
    for one, other in zip(
        torch_ext.selective_scan(**turned), torch_ext.selective_scan(**x), strict=True
    ):
        close(one, other)
    check_against_reference(turned, generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_float32(dtype, generator):
    """Beside half-precision activations; and parameters in half precision, too."""
    x = draw(generator, dtype=dtype)
    for name in ("A", "D", "delta_bias"):
        x[name] = torch.randn(x[name].shape, generator=generator)
    x["A"] = -x["A"].abs()
    check_against_reference(x, generator, delta_softplus=True)
    x |= {name: x[name].to(dtype) for name in ("A", "D", "delta_bias")}
    check_against_reference(x, generator, delta_softplus=True)


@pytest.mark.parametrize("complex_states", [False, True], ids=["real", "complex"])
def test_second_derivatives(complex_states, generator):
    x = draw(generator, B=1, T=3, D=2, N=2, complex_states=complex_states)
    names, leaves = zip(*((k, v.requires_grad_()) for k, v in x.items()), strict=True)

    def f(*leaves):
        return torch_ext.selective_scan(
            **dict(zip(names, leaves, strict=True)), delta_softplus=True
        )

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    assert torch.autograd.gradcheck(
        f, leaves, check_forward_ad=True, check_backward_ad=False, check_batched_grad=False
    )


def test_step_by_step_with_constant_coefficients(generator):
    x = draw(generator, form_b="constant", form_c="groups")
    want, want_final = torch_ext.selective_scan(**x)
    state, outputs = x["initial_state"], []
    for t in range(want.shape[1]):
        y, state = torch_ext.selective_scan_step(
            x["u"][:, t],
            x["delta"][:, t],
            x["A"],
            x["B"].expand(2, 6, 3),
            x["C"][:, t],
            x["D"],
            x["z"][:, t],
            x["delta_bias"],
            state,
        )
        outputs.append(y)
    close(torch.stack(outputs, 1), want)
    close(state, want_final)


def test_threads_and_lazy_bits_of_complex_states(generator, threads):
    x = draw(generator, B=3, T=90, D=40, form_c="groups", complex_states=True, dtype=torch.float32)
    weights = cotangents(torch_ext.selective_scan(**x), generator)
    want = None
    for n in (1, 2, 3, 2):
        threads(n)
        outputs, got = grads(torch_ext.selective_scan, x, weights, delta_softplus=True)
        got = [*outputs, *got.values()]
        want = want or got
        assert all(map(torch.equal, got, want))
    lazy = {k: v.conj().resolve_conj().conj() if v.is_complex() else v for k, v in x.items()}
    assert lazy["A"].is_conj() and lazy["initial_state"].is_conj()
    outputs, got = grads(torch_ext.selective_scan, lazy, weights, delta_softplus=True)
    assert all(map(torch.equal, (*outputs, *got.values()), want))
    one = [lazy.get(name) for name in NAMES]
    one = [y[:, 0] if i in (0, 1, 3, 4, 6) else y for i, y in enumerate(one)]
    y, after = torch_ext.selective_scan_step(*one)
    exact = [y.resolve_conj() for y in one]
    assert all(map(torch.equal, (y, after), torch_ext.selective_scan_step(*exact)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_of_functions(generator):
    x = [draw(generator, dtype=torch.float32)[name] for name in NAMES]
    script, one = (
        torch.jit.script,
        [y[:, 0] if i in (0, 1, 3, 4, 6) else y for i, y in enumerate(x)],
    )
    for f, given in ((torch_ext.selective_scan, x), (torch_ext.selective_scan_step, one)):
        assert all(map(torch.equal, script(f)(*given), f(*given)))
    y, after = torch_ext.selective_scan_step(*one)
    assert torch.equal(script(torch_ext.selective_scan_step_)(*one), y)
    assert torch.equal(one[-1], after)


def test_export_step(generator):
    class Step(torch.nn.Module):
        def forward(self, *x):
            return torch_ext.selective_scan_step(*x, None, True)

    x = [draw(generator, dtype=torch.float32)[name] for name in NAMES]
    now = (0, 1, 3, 4, 6)
    x = [y[:, 0].clone() if i in now else y for i, y in enumerate(x)]
    B = torch.export.Dim("B", min=2, max=64)
    dynamic = tuple({0: B} if i in (*now, 8) else None for i in range(9))
    program = torch.export.export(Step(), tuple(x), dynamic_shapes=(dynamic,))
    x = [torch.cat([y, y]) if i in (*now, 8) else y for i, y in enumerate(x)]
    assert all(map(torch.equal, program.module()(*x), Step()(*x)))


@pytest.mark.parametrize("batched", [*NAMES, "all"])
def test_vmap(batched, generator):
    x = draw(generator, T=5, form_c="groups")
    many = draw(generator, T=5, form_c="groups"), draw(generator, T=5, form_c="groups")
    chosen = NAMES if batched == "all" else (batched,)
    stacked = {k: torch.stack([m[k] for m in many]) if k in chosen else x[k] for k in x}
    dims = {k: 0 if k in chosen else None for k in x}

    def loss(x):
        y, final_state = torch_ext.selective_scan(**x, delta_softplus=True)
        return y.sin().sum() + final_state.cos().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(dims,))(stacked)
    for i in range(2):
        one = {k: many[i][k] if k in chosen else x[k] for k in x}
        want = torch.func.grad(loss)(one)
        for name in x:
            close(got[name][i], want[name], grad=True, name=name)


def test_the_backward_needs_no_checkpoints(generator):
    """Called without those that the forward keeps, it makes them itself."""
    x = draw(generator)
    arguments = [x.get(name) for name in NAMES]
    y, final_state, kept = torch.ops.torch_ext.selective_scan(*arguments, None, True, False, True)
    assert kept.numel() == 2 * 2 * 6 * 3  # 17 tokens: two intervals
    weights = cotangents((y, final_state), generator)
    with_kept, without = (
        torch.ops.torch_ext.selective_scan_backward(*weights, *arguments, one, None, True, False)
        for one in (kept, kept.new_empty(0))
    )
    assert all(torch.equal(a, b) for a, b in zip(with_kept, without, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"B": (2, 17, 4, 3)},
            ValueError,
            r"B has shape \(2, 17, 4, 3\), expected a number of groups, G=4",
        ),
        ({"C": (2,)}, ValueError, r"C has shape \(2,\), expected \(B, T, N\), \(B, T, G, N\)"),
        ({"A": torch.float16}, TypeError, r"A has dtype float16, expected float64 or complex128"),
        ({"A": torch.complex128}, TypeError, r"B has dtype float64, expected complex128"),
    ],
    ids=str,
)
def test_errors(change, error, message, generator):
    """Of these forms alone; the rest: test_errors.py."""
    x = draw(generator)
    for name, to in change.items():
        x[name] = x[name].to(to) if isinstance(to, torch.dtype) else torch.zeros(to).double()
    with pytest.raises(error, match="selective_scan: " + message):
        torch_ext.selective_scan(**x)


@pytest.mark.parametrize("complex_states", [False, True], ids=["real", "complex"])
def test_opcheck(complex_states, generator):
    ops = torch.ops.torch_ext
    dtype = torch.float32
    x = draw(generator, B=2, T=5, D=4, N=2, complex_states=complex_states, dtype=dtype)
    arguments = [x[name] for name in NAMES]

    def leaves(tensors):
        return tuple(t.clone().requires_grad_() for t in tensors)

    torch.library.opcheck(ops.selective_scan.default, leaves(arguments), {"delta_softplus": True})
    few = {k: v for k, v in x.items() if k not in NAMES[5:]}
    torch.library.opcheck(ops.selective_scan.default, leaves(few.values()), {"reverse": True})
    y, final_state, kept = ops.selective_scan(*arguments, None, True, False, True)
    backward = ops.selective_scan_backward.default
    tail = (kept, None, True, False)
    torch.library.opcheck(backward, (y, final_state, *arguments, *tail))
    torch.library.opcheck(backward, (*leaves((y, final_state)), *leaves(arguments), *tail))
    torch.library.opcheck(backward, (None, final_state, *arguments[:5], *(None,) * 4, *tail))
    at_once = [t[:, 0] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(arguments)]
    torch.library.opcheck(ops.selective_scan_step_.default, tuple(at_once))
    torch.library.opcheck(ops.selective_scan_step.default, leaves(at_once))
    slots = torch.tensor([1, -1])
    torch.library.opcheck(ops.selective_scan_step_.default, (*at_once, slots))

    lengths = torch.tensor([0, 3, 5])
    x = draw(generator, B=1, T=5, D=4, N=2, complex_states=complex_states, dtype=dtype, sequences=2)
    arguments = [x[name] for name in NAMES]
    torch.library.opcheck(ops.selective_scan.default, (*leaves(arguments), lengths))


def test_kept_states_of_another_call_are_an_error(generator):
    x = draw(generator)
    arguments = [x.get(name) for name in NAMES]
    y, final_state = torch_ext.selective_scan(**x)
    with pytest.raises(ValueError, match=r"kept has 5 elements, expected 72"):
        torch.ops.torch_ext.selective_scan_backward(
            y, final_state, *arguments, final_state.new_zeros(5), None, False, False
        )


def test_no_gpu_kernel_yet():
    """The dispatcher has an entry for CUDA: the one that says so."""
    for name in ("selective_scan", "selective_scan_backward", "selective_scan_step_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_ext::{name}", "CUDA")
