"""Bad input: which argument, what came, what was expected. Never a crash, never silence."""

import pytest
import torch
from cases import ALL, CASES, DIRECT, HALF, MATRICES, OTHERS, over, refuses, short

B, T, D = 3, 5, 4


def arguments(case, dtype=torch.float32, rows=B, batch=B, device="cpu"):
    """A valid call, by name."""
    g = torch.Generator().manual_seed(0)
    return case.named(case.leaves(batch, T, D, dtype, g, device, state=rows))


def packed(case, cu=(0, 2, T), dtype=torch.int64, **options):
    call = arguments(case, rows=len(cu) - 1, batch=1, **options)
    return call | {"cu_seqlens": torch.tensor(cu, dtype=dtype)}


# Sizes that no other argument has: they are what they are.
FREE = {("A", "N"), ("weight", "W")}


def wrong_shapes(case, name, letters, right):
    """Of every kind, also such as could be broadcast to the right one; and what a message about
    them must say."""
    kinds = [(), (*right, 1), (1, *right)]
    for d, letter in enumerate(letters):
        kinds.append(right[:d] + right[d + 1 :])
        if (name, letter) in case.free:
            continue
        if (name, letter) in FREE and case in OTHERS:
            kinds.append((*right[:d], 0, *right[d + 1 :]))
        else:
            others = {right[d] + 1, 1, 0} - {right[d]}
            kinds += [(*right[:d], n, *right[d + 1 :]) for n in sorted(others)]
    for shape in kinds:
        pieces = [f" {name} has shape {shape}, expected "]
        if len(shape) == len(right):
            sizes = zip(letters.replace("V", ""), right, strict=False)
            if case in MATRICES:
                sizes = zip(letters, right, strict=True)
            pieces += [f"{x}={n}" for x, n in sizes if (name, x) not in FREE | case.free]
        yield shape, pieces


@pytest.fixture(params=["cpu", "meta"])
def where(request, device):
    """The same messages from the kernels and from the shapes alone, as torch.compile sees them."""
    return device if request.param == "cpu" else "meta"


def numbers(*sizes):
    return [str(n) for n in sizes]


def test_the_list_of_letters_is_right():
    for case in ALL:
        assert [x.dim() for x in arguments(case).values()] == [
            len(case.letters(name)) for name in case.names
        ]


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (3, 5, 4, 1)], ids=str)
def test_first_argument_dimensions(case, shape, where):
    call = arguments(case, device=where)
    first = case.arguments[0]
    if len(shape) == len(case.letters(first)):
        shape = (*shape, 1)
    call[first] = torch.ones(shape, device=where)
    pieces = [case.name, first, "expected", f"({', '.join(case.letters(first))})"]
    refuses(ValueError, pieces, case.function, **call)


@over(variants=False, cases=ALL)
def test_shapes(case, where):
    for name in case.names[1:]:
        letters = case.letters(name)
        for shape, pieces in wrong_shapes(case, name, letters, case.shape(name, B, T, D)):
            call = arguments(case, device=where) | {name: torch.ones(shape, device=where)}
            refuses(ValueError, [f"{case.name}:", *pieces], case.function, **call)


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=short)
def test_not_floating(case, dtype, where):
    for name in case.names:
        call = arguments(case, device=where)
        call[name] = call[name].to(dtype)
        pieces = [f"{case.name}: {name} has dtype {short(dtype)}, expected ", "float32"]
        refuses(TypeError, pieces, case.function, **call)
    every = {name: x.to(dtype) for name, x in arguments(case, device=where).items()}
    pieces[0] = f"{case.name}: {case.names[0]} has dtype {short(dtype)}, expected "
    refuses(TypeError, pieces, case.function, **every)


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.complex32], ids=str)
def test_dtype_not_supported(case, dtype, where):
    if dtype in case.dtypes:
        pytest.skip("supported")
    call = arguments(case, device=where)
    call |= {name: torch.empty_like(call[name], dtype=dtype) for name in case.arguments}
    # named as C++ names it: Float8_e4m3fn, ComplexHalf
    pieces = [
        f"{case.name}: {case.arguments[0]}",
        "dtype",
        "expected",
        "float32, float64, bfloat16",
    ]
    refuses(TypeError, pieces, case.function, **call)


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_mixed_dtypes(case, dtype, where):
    for name in case.names[1 : case.inputs]:
        call = arguments(case, device=where)
        call[name] = call[name].to(dtype)
        pieces = [f"{case.name}: {name} has dtype {short(dtype)}, expected float32"]
        refuses(TypeError, pieces, case.function, **call)


@over(dtypes=HALF, variants=False, cases=OTHERS + MATRICES)
def test_dtypes_of_parameters(case, dtype, where):
    """Beside half precision some may be float32, the others may not."""
    for name in case.names[1 : case.inputs]:
        also = case.also(name, dtype)
        for other in (torch.float64, torch.float32, *HALF, torch.complex64):
            call = arguments(case, dtype, device=where)
            call[name] = call[name].to(other)
            if other is dtype or other in also:
                case.function(**call)
                continue
            pieces = [f"{case.name}: {name} has dtype {short(other)}, expected "]
            pieces += map(short, (dtype, *also))
            refuses(TypeError, pieces, case.function, **call)


@over(dtypes="all", variants=False, cases=ALL)
def test_state_dtype(case, dtype, where):
    """The state's dtype follows from the inputs'; every other is refused, also, but of the
    convolution, the inputs' own where that is half precision."""
    expected = case.state_dtype(dtype)
    for other in (torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64):
        if other is expected:
            continue
        for name in case.states:
            call = arguments(case, dtype, device=where)
            call[name] = torch.ones_like(call[name], dtype=other)
            pieces = [f"{name} has dtype {short(other)}, expected {short(expected)}"]
            refuses(TypeError, [case.name, *pieces], case.function, **call)


@over(variants=False, cases=ALL)
def test_devices(case, device):
    for name in case.names[1:]:
        call = arguments(case, device=device)
        call[name] = call[name].to("meta")
        refuses(RuntimeError, [f"{case.name}: ", name, "meta", device], case.function, **call)
        call = {
            k: v if k == name else v.to("meta") for k, v in arguments(case, device=device).items()
        }
        refuses(RuntimeError, [f"{case.name}: ", name, "meta", device], case.function, **call)


@over(variants=False, cases=ALL)
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


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("cu, pieces", BAD_CU.values(), ids=BAD_CU)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_cu_seqlens_contents(case, cu, pieces, grad, device):
    call = packed(case, cu, device=device)
    for name in case.names[: case.inputs]:
        call[name].requires_grad_(grad)
    for on in {"cpu", device}:
        call["cu_seqlens"] = torch.tensor(cu, device=on)
        refuses(
            ValueError, [f"{case.name}: cu_seqlens", "expected", *pieces], case.function, **call
        )


@over(variants=False, cases=ALL)
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


@over(variants=False, cases=ALL)
def test_cu_seqlens_and_batch(case, where):
    """Packed sequences are one row, and have a state each."""
    call = arguments(case, rows=2, device=where)
    call["cu_seqlens"] = torch.tensor([0, 2, T])
    pieces = [case.name, "cu_seqlens", case.carrier, *numbers(B, T, D), "1"]
    refuses(ValueError, pieces, case.function, **call)
    for name in case.states:
        for rows in (1, 3):
            call, shape = packed(case, device=where), case.shape(name, rows, None, D)
            call[name] = call[name].new_zeros(shape)
            pieces = [f"{case.name}: {name} has shape {shape}, expected (num_sequences=2"]
            refuses(ValueError, pieces, case.function, **call)


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("word", ["relu", "", "Identity", "g ", "SiLU", "swish"])
def test_unknown_activation(case, word, where):
    if "activation" not in case.variants[0]:
        pytest.skip("has no activation")
    pieces = [f"{case.name}: activation", f"'{word}'", "expected", *case.words]
    refuses(ValueError, pieces, case.function, **arguments(case, device=where), activation=word)
    if where == "cpu":
        leaves = [x.detach() for x in arguments(case).values()]
        with pytest.raises(ValueError, match="activation"):
            case.reference(*leaves, activation=word)
    step = step_arguments(case, device=where)
    pieces = ["activation", "expected", *case.words]
    for f in (case.step, case.step_):
        refuses(ValueError, pieces, f, **step, activation=word)


@over(variants=False, cases=ALL)
def test_not_a_tensor(case):
    """Torch's own words, which name the argument."""
    for name in case.names[: case.inputs]:
        for bad in (1.0, [1.0], "x"):
            call = arguments(case) | {name: bad}
            with pytest.raises((TypeError, RuntimeError), match=rf"\b{name}\b"):
                case.function(**call)
    for name in (*case.states, "cu_seqlens"):
        with pytest.raises((TypeError, RuntimeError), match=rf"\b{name}\b"):
            case.function(**(arguments(case) | {name: "x"}))


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_none_for_a_tensor(case, grad):
    """The dispatcher takes None for an undefined tensor: it is for us to refuse it."""
    call = arguments(case)
    if grad:
        call = {name: x.requires_grad_() for name, x in call.items()}
    for name in case.names[: case.inputs]:
        if name not in case.optional:
            refuses(
                TypeError,
                [f"{case.name}: {name}", "expected"],
                case.function,
                **call | {name: None},
            )
    step = step_arguments(case)
    for name in step:
        if name not in case.optional:
            for f in (case.step, case.step_):
                refuses(TypeError, [case.name, name, "expected"], f, **step | {name: None})


NOT_STRIDED = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1:].flatten(0, 1)]),
}


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("kind", NOT_STRIDED)
def test_not_strided(case, kind):
    call = arguments(case)
    for name, x in call.items():
        if x.dim() > 1 or kind not in (
            "csr",
            "nested",
        ):  # of which there are none with one dimension
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                case.function(**call | {name: NOT_STRIDED[kind](x)})


@over(variants=False, cases=ALL)
def test_gradient_of_integers(case):
    """torch refuses requires_grad on integers; integers beside inputs that ask for gradients are
    refused."""
    with pytest.raises(RuntimeError, match="floating point"):
        torch.ones(B, T, D, dtype=torch.int64).requires_grad_()
    call = arguments(case)
    call[case.arguments[0]].requires_grad_()
    call[case.names[1]] = call[case.names[1]].long()
    refuses(TypeError, [case.names[1], "int64", "float32"], case.function, **call)


# ---- steps ----
def step_arguments(case, rows=B, device="cpu"):
    call = arguments(case, rows=rows, device=device)
    call = dict(zip(case.names, case.at(list(call.values()), 0), strict=True))
    if "initial_state" in call:
        call["state"] = call.pop("initial_state")
    return call


def step_states(case):
    return ["state" if name == "initial_state" else name for name in case.states]


STEPS = pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in_place"])


def step_of(case, in_place):
    return case.step_ if in_place else case.step


@over(variants=False, cases=ALL)
@STEPS
def test_step_shapes(case, in_place, where):
    f = step_of(case, in_place)
    first = case.arguments[0]
    letters = case.letters(first).replace("T", "")
    for shape in ((D,), (B, *(1,) * len(letters[1:]), D)):
        call = step_arguments(case, device=where)
        call[first] = torch.ones(shape, device=where)
        refuses(ValueError, [case.name, first, "expected", f"({', '.join(letters)})"], f, **call)
    call = step_arguments(case, device=where)
    for name in list(call)[1:]:
        letters = case.letters("initial_state" if name == "state" else name).replace("T", "")
        for shape, pieces in wrong_shapes(case, name, letters, tuple(call[name].shape)):
            wrong = call | {name: torch.ones(shape, device=where)}
            refuses(ValueError, [f"{case.name}_step", *pieces], f, **wrong)


@over(variants=False, cases=ALL)
@STEPS
def test_step_dtypes_and_devices(case, in_place, device):
    f, op = step_of(case, in_place), case.name + "_step"
    call = step_arguments(case, device=device)
    for name in list(call)[1:]:
        for other in (torch.float64, torch.int32):
            pieces = [op, f": {name} has dtype {short(other)}, expected float32"]
            refuses(TypeError, pieces, f, **call | {name: call[name].to(other)})
        pieces = [op, f": {name} is on meta, expected {device}"]
        refuses(RuntimeError, pieces, f, **call | {name: call[name].to("meta")})
    first = case.names[0]
    pieces = [op, f": {first} has dtype int64, expected float32, float64"]
    refuses(TypeError, pieces, f, **call | {first: call[first].long()})
    for dtype in HALF:
        wrong = next(t for t in (dtype, torch.float32) if t is not case.state_dtype(dtype))
        right = short(case.state_dtype(dtype))
        for name in step_states(case):
            half = {name: x.to(dtype) for name, x in call.items()}
            half |= {s: call[s].to(case.state_dtype(dtype)) for s in step_states(case)}
            half[name] = call[name].to(wrong)
            pieces = [op, f"{name} has dtype", short(wrong), "expected", right]
            refuses(TypeError, pieces, f, **half)


@over(variants=False, cases=ALL)
@STEPS
def test_state_indices(case, in_place, where):
    f, op = step_of(case, in_place), case.name + "_step"
    call = step_arguments(case, rows=7, device=where)
    good = torch.tensor([0, 5, -1], device=where)
    f(**call, state_indices=good)
    for bad in (good.float(), good.to(torch.int16), good > 0):
        pieces = [op, f": state_indices has dtype {short(bad.dtype)}, expected int32 or int64"]
        refuses(TypeError, pieces, f, **call, state_indices=bad)
    for bad in (good[:2], good[None], good[0], torch.tensor([0, 1, 2, 3], device=where)):
        pieces = [op, ": state_indices has shape", f"expected (B={B})"]
        refuses(ValueError, pieces, f, **call, state_indices=bad)
    if where != "meta":
        pieces = [op, "state_indices", "meta", where]
        refuses(RuntimeError, pieces, f, **call, state_indices=good.to("meta"))
    for at, name in enumerate(step_states(case)):
        letters, right = case.letters(case.states[at]), tuple(call[name].shape)
        for shape, pieces in wrong_shapes(case, name, letters, right):
            if shape[1:] == right[1:] and at == 0:
                continue  # any number of rows will do
            wrong = call | {name: torch.ones(shape, device=where)}
            pieces = [piece for piece in pieces if piece != f"B={right[0]}"]
            refuses(ValueError, [op, "num_rows", *pieces], f, **wrong, state_indices=good)


@over(variants=False, cases=ALL)
@STEPS
@pytest.mark.parametrize("bad", [7, 2**31, 2**40, "twice"], ids=str)
def test_contents_of_state_indices(case, in_place, bad, device):
    """No such row; a row for two: refused before anything is written."""
    call = step_arguments(case, rows=7, device=device)
    before = [call[name].clone() for name in step_states(case)]
    indices = torch.tensor([6, -1, 6 if bad == "twice" else bad])
    pieces = ["6 twice"] if bad == "twice" else [f"[2] is {bad}", "less than 7"]
    for on in {"cpu", device}:
        pieces = [f"{case.name}_step", ": state_indices", "expected", *pieces]
        refuses(ValueError, pieces, step_of(case, in_place), **call, state_indices=indices.to(on))
    for name, was in zip(step_states(case), before, strict=True):
        assert torch.equal(call[name], was)


@over(variants=False, cases=ALL)
def test_in_place_step_on_an_expanded_state(case, device):
    """One memory location for several rows, channels or whatever: there is no right answer."""
    call = step_arguments(case, device=device)
    for name in step_states(case):
        state = call[name]
        shared = [state.narrow(d, 0, 1).expand_as(state) for d in range(state.dim())]
        flat = torch.zeros(2 * state.numel(), device=device)
        shared.append(flat.as_strided(state.shape, (1,) * state.dim()))
        shared.append(flat.as_strided(state.shape, (state[0].numel() - 1, *state.stride()[1:])))
        for bad in shared:
            before = bad.clone()
            with pytest.raises((RuntimeError, ValueError), match=r"state|single memory location"):
                case.step_(**call | {name: bad})
            assert torch.equal(bad, before)


# ---- the backward operator, by hand ----
WRONG = {
    "grad_h_shape": (r"grad_[hy]", lambda h, f: (h[:, 1:], f, h)),
    "grad_final_state_shape": (r"grad_final_state", lambda h, f: (h, f[1:], h)),
    "h_shape": ("h", lambda h, f: (h, f, h[:, 1:])),
    "h_dtype": ("h", lambda h, f: (h, f, h.double())),
}


@over(variants=False, cases=DIRECT)
@pytest.mark.parametrize("name, wrong", WRONG.values(), ids=WRONG)
def test_backward_operator(case, name, wrong, device):
    if name == "h" and case in OTHERS:
        pytest.skip("its backward does not take h")
    leaves = list(arguments(case, device=device).values())
    call = wrong(*case.bind()(*leaves))
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b.*expected"):
        case.backward(*call[:2], leaves, call[2], case.variants[0])


@over(variants=False, cases=OTHERS)
def test_backward_operator_checks_its_inputs(case, device):
    """As the forward does."""
    leaves = list(arguments(case, device=device).values())
    h, final = case.bind()(*leaves)
    for i, name in enumerate(case.names[1:], 1):
        for bad in (leaves[i][..., None], leaves[i].long(), leaves[i].to("meta")):
            changed = [bad if i == j else x for j, x in enumerate(leaves)]
            with pytest.raises(
                (ValueError, TypeError, RuntimeError), match=rf"\b{name}\b.*expected"
            ):
                case.backward(h, final, changed, h, case.variants[0])


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
