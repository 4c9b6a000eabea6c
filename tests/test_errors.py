"""Bad input: which argument, what came, what was expected. Never a crash, never silence."""

import pytest
import torch
from cases import CASES, over

B, T, D = 3, 5, 4


def arguments(case, dtype=torch.float32, rows=B, batch=B, device="cpu"):
    """A valid call, by name."""
    g = torch.Generator().manual_seed(0)
    x = case.leaves(batch, T, D, dtype, g, device, state=rows)
    return dict(zip((*case.arguments, "initial_state"), x, strict=True))


def packed(case, cu=(0, 2, T), dtype=torch.int64, **options):
    call = arguments(case, rows=len(cu) - 1, batch=1, **options)
    return call | {"cu_seqlens": torch.tensor(cu, dtype=dtype)}


def refuses(error, pieces, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert caught.type is error, f"{caught.type.__name__}, expected {error.__name__}"
    message = str(caught.value)
    for piece in pieces:
        assert str(piece) in message, f"{piece!r} is not in {message!r}"
    assert "Exception raised from" not in message.split("\n")[0]


@pytest.fixture(params=["cpu", "meta"])
def where(request, device):
    """The same messages from the kernels and from the shapes alone, as torch.compile sees them."""
    return device if request.param == "cpu" else "meta"


def numbers(*sizes):
    return [str(n) for n in sizes]


@over(variants=False)
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (3, 5, 4, 1)], ids=str)
def test_first_argument_dimensions(case, shape, where):
    call = arguments(case, device=where)
    first = case.arguments[0]
    call[first] = torch.ones(shape, device=where)
    pieces = [case.name, first, "expected", "(B, T, D)"]
    refuses(ValueError, pieces, case.function, **call)


@over(variants=False)
@pytest.mark.parametrize(
    "shape",
    [
        (B, T),
        (B + 1, T, D),
        (B, T - 1, D),
        (B, T, D + 1),
        (1, T, D),
        (B, 1, D),
        (B, T, 1),
        (B, T, D, 1),
    ],
    ids=str,
)
def test_shapes_differ(case, shape, where):
    """Also where one could be broadcast to the other."""
    for name in case.arguments[1:]:
        call = arguments(case, device=where) | {name: torch.ones(shape, device=where)}
        came = "(" + ", ".join(numbers(*shape)) + ")"
        pieces = [f"{case.name}: ", name, "shape", came, "expected", *numbers(B, T, D)]
        refuses(ValueError, pieces, case.function, **call)


@over(variants=False)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_not_floating(case, dtype, where):
    n = len(case.arguments)
    x = [torch.ones(B, T, D, dtype=dtype, device=where)] * n
    pieces = [f"{case.name}: ", case.arguments[0], str(dtype).removeprefix("torch."), "expected"]
    refuses(TypeError, pieces, case.function, *x)
    for name in case.arguments[1:]:  # one of several
        call = arguments(case, device=where) | {name: x[0]}
        pieces[1] = name
        refuses(TypeError, [*pieces, "float32"], case.function, **call)


@over(variants=False)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.complex32], ids=str)
def test_dtype_not_supported(case, dtype, where):
    if dtype in case.dtypes:
        pytest.skip("supported")
    x = torch.empty(B, T, D, dtype=dtype, device=where)
    # named as C++ names it: Float8_e4m3fn, ComplexHalf
    pieces = [
        f"{case.name}: {case.arguments[0]}",
        "dtype",
        "expected",
        "float32, float64, bfloat16",
    ]
    refuses(TypeError, pieces, case.function, *[x] * len(case.arguments))


@over(variants=False)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(case, dtype, where):
    for name in case.arguments[1:]:
        call = arguments(case, device=where)
        call[name] = call[name].to(dtype)
        pieces = [f"{case.name}: ", name, str(dtype).removeprefix("torch."), "expected", "float32"]
        refuses(TypeError, pieces, case.function, **call)


@over(variants=False)
@pytest.mark.parametrize(
    "shape",
    [(), (D,), (B, D + 1), (B + 1, D), (1, D), (B, 1), (B, 1, D), (1, B, D), (0, D)],
    ids=str,
)
def test_state_shape(case, shape, where):
    call = arguments(case, device=where) | {"initial_state": torch.ones(shape, device=where)}
    came = "(" + ", ".join(numbers(*shape)) + ("," if len(shape) == 1 else "") + ")"
    pieces = [f"{case.name}: initial_state", "shape", "expected", *numbers(B, D)]
    with pytest.raises(ValueError) as caught:
        case.function(**call)
    message = str(caught.value)
    assert all(p in message for p in pieces), message
    assert came in message or came.replace(",)", ")") in message, message


@over(dtypes="all", variants=False)
def test_state_dtype(case, dtype, where):
    """The state's dtype follows from the inputs'; every other is refused, also the inputs' own
    where that is half precision."""
    expected = arguments(case, dtype)["initial_state"].dtype
    for other in (torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64):
        if other is expected:
            continue
        call = arguments(case, dtype, device=where)
        call["initial_state"] = torch.ones(B, D, dtype=other, device=where)
        names = (str(t).removeprefix("torch.") for t in (other, expected))
        refuses(
            TypeError, [f"{case.name}: initial_state", *names, "expected"], case.function, **call
        )


@over(variants=False)
def test_devices(case, device):
    for name in (*case.arguments[1:], "initial_state"):
        call = arguments(case, device=device)
        call[name] = call[name].to("meta")
        refuses(RuntimeError, [f"{case.name}: ", name, "meta", device], case.function, **call)
        call = {
            k: v if k == name else v.to("meta") for k, v in arguments(case, device=device).items()
        }
        refuses(RuntimeError, [f"{case.name}: ", name, "meta", device], case.function, **call)


@over(variants=False)
def test_cu_seqlens_on_a_third_device(case, device):
    call = packed(case, device=device)
    call["cu_seqlens"] = call["cu_seqlens"].to("meta")
    refuses(RuntimeError, [f"{case.name}: cu_seqlens", "meta", "cpu"], case.function, **call)


BAD_CU = {
    "does_not_start_at_0": ((1, 2, T), ["1", "0"]),
    "starts_below_0": ((-1, 2, T), ["-1", "0"]),
    "descends": ((0, 4, 2, T), ["4", "2"]),
    "ends_early": ((0, 2, T - 1), [T - 1, T]),
    "ends_late": ((0, 2, T + 1), [T + 1, T]),
    "overshoots_inside": ((0, T + 3, T), [T + 3, T]),
    "one_number_not_T": ((0,), ["0", T]),
    "huge": ((0, 2**40, T), [2**40]),
}


@over(variants=False)
@pytest.mark.parametrize("cu, pieces", BAD_CU.values(), ids=BAD_CU)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_cu_seqlens_contents(case, cu, pieces, grad, device):
    call = packed(case, cu, device=device)
    for name in case.arguments:
        call[name].requires_grad_(grad)
    for on in {"cpu", device}:
        call["cu_seqlens"] = torch.tensor(cu, device=on)
        refuses(
            ValueError, [f"{case.name}: cu_seqlens", "expected", *pieces], case.function, **call
        )


@over(variants=False)
def test_cu_seqlens_form(case, where):
    call = packed(case, device=where)
    for bad, came in (
        (torch.zeros(0), "is empty"),
        (torch.zeros(1, 3), "shape (1, 3)"),
        (torch.tensor(0), "shape ()"),
    ):
        call["cu_seqlens"] = bad.long().to(where)
        pieces = [f"{case.name}: cu_seqlens", came, "expected", "num_sequences + 1"]
        refuses(ValueError, pieces, case.function, **call)
    for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
        call = packed(case, device=where)
        call["cu_seqlens"] = call["cu_seqlens"].to(dtype).to(where)
        name = str(dtype).removeprefix("torch.")
        pieces = [f"{case.name}: cu_seqlens", name, "expected", "int32", "int64"]
        refuses(TypeError, pieces, case.function, **call)


@over(variants=False)
def test_cu_seqlens_and_batch(case, where):
    """Packed sequences are one row, and have a state each."""
    call = arguments(case, rows=2, device=where)
    call["cu_seqlens"] = torch.tensor([0, 2, T])
    pieces = [case.name, "cu_seqlens", case.arguments[0], *numbers(B, T, D), "1"]
    refuses(ValueError, pieces, case.function, **call)
    call = packed(case, device=where)
    for rows in (1, 3):
        call["initial_state"] = torch.zeros(rows, D, device=where)
        pieces = [f"{case.name}: initial_state", f"({rows}, {D})", "expected", "2", "sequences"]
        refuses(ValueError, pieces, case.function, **call)


@over(variants=False)
@pytest.mark.parametrize("word", ["relu", "", "Identity", "g "])
def test_unknown_activation(case, word, where):
    if "activation" not in case.variants[0]:
        pytest.skip("has no activation")
    pieces = [f"{case.name}: activation", f"'{word}'", "expected", "identity", "g"]
    refuses(ValueError, pieces, case.function, **arguments(case, device=where), activation=word)
    x = list(arguments(case, device=where).values())
    step = [y[:, 0] for y in x[:-1]] + x[-1:]
    for f in (case.step, case.step_):
        refuses(ValueError, ["activation", "expected", "identity"], f, *step, activation=word)


@over(variants=False)
def test_not_a_tensor(case):
    """Torch's own words, which name the argument."""
    for name in case.arguments:
        for bad in (None, 1.0, [1.0], "x"):
            call = arguments(case) | {name: bad}
            with pytest.raises((TypeError, RuntimeError), match=name):
                case.function(**call)
    for name in ("initial_state", "cu_seqlens"):
        with pytest.raises((TypeError, RuntimeError), match=name):
            case.function(**(arguments(case) | {name: "x"}))


@over(variants=False)
@pytest.mark.parametrize("kind", ["sparse", "csr", "quantized", "mkldnn", "nested"])
def test_not_strided(case, kind):
    x = torch.ones(B, T, D)
    y = {
        "sparse": lambda: x.to_sparse(),
        "csr": lambda: x.to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
        "mkldnn": lambda: x.to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2, D), torch.ones(3, D)]),
    }[kind]()
    for i in range(len(case.arguments)):
        args = [y if i == j else x for j in range(len(case.arguments))]
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            case.function(*args)


@over(variants=False)
def test_gradient_of_integers(case):
    """torch refuses requires_grad on integers; integers beside inputs that ask for gradients are
    refused."""
    with pytest.raises(RuntimeError, match="floating point"):
        torch.ones(B, T, D, dtype=torch.int64).requires_grad_()
    call = arguments(case)
    call[case.arguments[0]].requires_grad_()
    call[case.arguments[1]] = torch.ones(B, T, D, dtype=torch.int64)
    refuses(TypeError, [case.arguments[1], "int64", "float32"], case.function, **call)


# ---- steps ----
def step_arguments(case, rows=B, device="cpu"):
    call = arguments(case, rows=rows, device=device)
    call = {name: x[:, 0] if x.dim() == 3 else x for name, x in call.items()}
    call["state"] = call.pop("initial_state")
    return call


STEPS = pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])


def step_of(case, in_place):
    return case.step_ if in_place else case.step


@over(variants=False)
@STEPS
def test_step_shapes(case, in_place, where):
    f = step_of(case, in_place)
    for shape in ((D,), (B, 1, D)):
        call = step_arguments(case, device=where)
        call[case.arguments[0]] = torch.ones(shape, device=where)
        refuses(ValueError, [case.name, case.arguments[0], "expected", "(B, D)"], f, **call)
    for name in (*case.arguments[1:], "state"):
        for shape in ((D,), (1, D), (B, 1), (B + 1, D), (B, D + 1), (B, D, 1)):
            call = step_arguments(case, device=where) | {name: torch.ones(shape, device=where)}
            pieces = [case.name + "_step", name, "shape", "expected", *numbers(B, D)]
            refuses(ValueError, pieces, f, **call)


@over(variants=False)
@STEPS
def test_step_dtypes_and_devices(case, in_place, device):
    f = step_of(case, in_place)
    for name in (*case.arguments[1:], "state"):
        call = step_arguments(case, device=device)
        call[name] = call[name].double()
        refuses(TypeError, [case.name + "_step", name, "float64", "float32"], f, **call)
        call = step_arguments(case, device=device)
        call[name] = call[name].to("meta")
        refuses(RuntimeError, [case.name + "_step", name, "meta", device], f, **call)
    call = step_arguments(case, device=device)
    call = {n: x.bfloat16() for n, x in call.items()}
    refuses(TypeError, [case.name + "_step", "state", "bfloat16", "float32"], f, **call)


@over(variants=False)
@STEPS
def test_state_indices(case, in_place, device):
    f = step_of(case, in_place)
    call = step_arguments(case, rows=7, device=device)
    good = torch.tensor([0, 5, -1], device=device)
    f(**call, state_indices=good)
    for bad in (good.float(), good.to(torch.int16), good > 0):
        pieces = [
            "state_indices",
            str(bad.dtype).removeprefix("torch."),
            "expected",
            "int32",
            "int64",
        ]
        refuses(TypeError, [case.name + "_step", *pieces], f, **call, state_indices=bad)
    for bad in (good[:2], good[None], good[0], torch.tensor([0, 1, 2, 3], device=device)):
        pieces = ["state_indices", "shape", "expected", str(B)]
        refuses(ValueError, [case.name + "_step", *pieces], f, **call, state_indices=bad)
    refuses(
        RuntimeError, ["state_indices", "meta", device], f, **call, state_indices=good.to("meta")
    )
    call["state"] = torch.ones(7, D + 1, device=device)
    refuses(ValueError, ["state", "expected", str(D)], f, **call, state_indices=good)


@over(variants=False)
def test_in_place_step_on_an_expanded_state(case, device):
    """One memory location for several rows: there is no right answer."""
    call = step_arguments(case, device=device)
    call["state"] = torch.zeros(1, D, device=device).expand(B, D)
    with pytest.raises((RuntimeError, ValueError), match=r"state|single memory location"):
        case.step_(**call)
    call["state"] = torch.zeros(B + D, device=device).as_strided((B, D), (1, 1))
    with pytest.raises((RuntimeError, ValueError), match=r"state|single memory location"):
        case.step_(**call)


# ---- the backward operator, by hand ----
WRONG = {
    "grad_h_shape": ("grad_h", lambda h, f: (h[:, 1:], f, h)),
    "grad_final_state_shape": ("grad_final_state", lambda h, f: (h, f[1:], h)),
    "h_shape": ("h", lambda h, f: (h, f, h[:, 1:])),
    "h_dtype": ("h", lambda h, f: (h, f, h.double())),
}


@over(variants=False)
@pytest.mark.parametrize("name, wrong", WRONG.values(), ids=WRONG)
def test_backward_operator(case, name, wrong, device):
    call = arguments(case, device=device)
    x = [call[name] for name in case.arguments]
    gh, gs, h = wrong(*case.function(*x, call["initial_state"]))
    tail = (call["initial_state"], None, *case.variants[0].values(), False)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b.*expected"):
        case.backward_op(gh, gs, *x, h, *tail)


def test_no_exception_from_cpp_is_opaque():
    """One look at a whole message: name of the operator, argument, what came, what was expected,
    why."""
    case = next(c for c in CASES if c.name == "min_gru")
    call = arguments(case)
    call["candidate"] = torch.ones(B, T, D + 1)
    with pytest.raises(ValueError) as caught:
        case.function(**call)
    first = str(caught.value).split("\n")[0]
    assert first == (
        f"min_gru: candidate has shape ({B}, {T}, {D + 1}), expected (B={B}, T={T}, D={D}), "
        "the shape of gate"
    )
