"""mlstm_kernels' functions by their own names: against the reference, and against the package."""

import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch
from cases import close

import torch_ext
from torch_ext.compat import mlstm_kernels as ours

B, NH, S, K, V = 2, 3, 11, 4, 5
EVERY = ours.get_available_mlstm_kernels()
FUNCTIONS = {
    **{name: ours.get_mlstm_kernel(name) for name in EVERY},
    **{name: ours.get_mlstm_sequence_kernel(name) for name in
       ours.get_available_mlstm_sequence_kernels()},
}  # fmt: skip
NAMES = "qkvif"


def arguments(generator, dtype=torch.float64, steps=S):
    """By the peer's names, heads before time."""
    shapes = {"q": (K,), "k": (K,), "v": (V,), "i": (), "f": ()}
    tensors = {name: (B, NH, steps, *last) for name, last in shapes.items()}
    tensors |= {"c_initial": (B, NH, K, V), "n_initial": (B, NH, K), "m_initial": (B, NH, 1)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for name, shape in tensors.items()
    }


def reference(given, sigmoid, **options):
    """torch_ext's reference, time before heads, from and to the peer's layouts."""
    over_time = [given[name].transpose(1, 2) for name in NAMES]
    state = [given[name + "_initial"] for name in "cnm"]
    state = (*state[:2], state[2].squeeze(2) * (0 if sigmoid else 1))
    gate = "sigmoid" if sigmoid else "exp"
    h, (C, n, m) = torch_ext.mlstm_reference(*over_time, state, input_gate=gate, **options)
    return [h.transpose(1, 2), C, n, *([] if sigmoid else [m.unsqueeze(2)])]


def gradients(outputs, leaves, generator_seed=3):
    generator = torch.Generator().manual_seed(generator_seed)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs
    )
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kernel(name, generator):
    """Values, states and all gradients, of a length that is no multiple of anything."""
    kernel, given, sigmoid = FUNCTIONS[name], arguments(generator), "siging" in name
    for options in [{"eps": 0.5}, {"normalizer_grad": False}] + [{"normalize": False}] * sigmoid:
        h, states = kernel(**given, return_last_states=True, **options)
        got, want = [h, *states], reference(given, sigmoid, **options)
        assert [x.shape for x in got] == [x.shape for x in want]
        for g, w in zip(got, want, strict=True):
            close(g.detach(), w.detach())
        want_gradients = gradients(want, given)
        for key, g in gradients(got, given).items():
            close(g, want_gradients[key], grad=True, name=key)
        assert torch.equal(kernel(**given, **options), h)
    positional = kernel(*given.values(), False, 1e-6)
    close(positional.detach(), kernel(**given).detach())
    own = {key: given[key] for key in NAMES}
    zeros = own | {k: torch.zeros_like(v) for k, v in given.items() if k not in own}
    close(kernel(**own).detach(), kernel(**zeros).detach())
    some = own | {"c_initial": given["c_initial"]}
    close(kernel(**some).detach(), kernel(**(zeros | some)).detach())


@pytest.mark.parametrize("name", ours.get_available_mlstm_step_kernels())
def test_steps(name, generator):
    """From the sequence's state to its next state, with gradients."""
    step, given = ours.get_mlstm_step_kernel(name), arguments(generator)
    state, outputs = [given[s + "_initial"] for s in "cnm"], []
    for t in range(S):
        q, k, v = (given[x][:, :, t] for x in "qkv")
        i, f = (given[x][:, :, t : t + 1] for x in "if")
        h, state = step(q, k, v, i, f, *state, eps=0.5)
        outputs.append(h)
    got, want = [torch.stack(outputs, 2), *state], reference(given, False, eps=0.5)
    for g, w in zip(got, want, strict=True):
        close(g.detach(), w.detach())
    want_gradients = gradients(want, given)
    for key, g in gradients(got, given).items():
        close(g, want_gradients[key], grad=True, name=key)
    flat = step(q, k, v, i[..., 0], f[..., 0], *state)[0]
    assert torch.equal(flat, step(q, k, v, i, f, *state)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_of_states(dtype, generator):
    given = arguments(generator, dtype)
    h, states = ours.mlstm_chunkwise__xl_chunk(**given, return_last_states=True)
    assert h.dtype == dtype and {s.dtype for s in states} == {torch.float32}
    h, states = ours.mlstm_recurrent_sequence__native_fw(
        **given, return_last_states=True, dtype_state=torch.bfloat16
    )
    assert h.dtype == dtype and {s.dtype for s in states} == {torch.bfloat16}
    q, k, v = (given[x][:, :, 0] for x in "qkv")
    gates = [given[x][:, :, :1].float() for x in "if"]  # may be wider than the rest
    h, again = ours.mlstm_recurrent_step__native(q, k, v, *gates, *states)
    assert h.dtype == dtype and {s.dtype for s in again} == {torch.float32}
    assert [s.shape for s in again] == [s.shape for s in states]


# ---- the module and the wrappers ----


@pytest.mark.parametrize(
    "kernel", ["chunkwise--triton_xl_chunk", "chunkwise--triton_xl_chunk_siging"]
)
def test_backend(kernel, generator):
    given, sigmoid = arguments(generator), "siging" in kernel
    options = {"chunkwise_kernel": kernel, "eps": 0.5}
    h, *states = reference(given, sigmoid, eps=0.5)
    backend = ours.mLSTMBackend(ours.mLSTMBackendConfig(**options))
    got, last = backend(**given)
    close(got.detach(), h.detach())
    for g, w in zip(last, states, strict=True):
        close(g.detach(), w.detach())
    for mode in ("train", "train_with_padding"):
        only = backend(**given, return_last_states=False, mode=mode)
        assert torch.equal(only, got)
    pieces, state = [], [given[s + "_initial"] for s in "cnm"]
    serving = ours.mLSTMBackend(
        ours.mLSTMBackendConfig(mode="inference", return_last_states=False, **options)
    )
    for cut in (slice(0, 5), slice(5, 6), slice(6, S)):
        part = {name: given[name][:, :, cut] for name in NAMES}
        piece, state = serving(**part, **dict(zip(["c_initial", "n_initial", "m_initial"], state,
                                                  strict=False)))  # fmt: skip
        pieces.append(piece)
    close(torch.cat(pieces, 2).detach(), h.detach())
    half = ours.mLSTMBackendConfig(mode="inference", inference_state_dtype="bfloat16")
    _, state = ours.mLSTMBackend(half)(**{k: v.float() for k, v in given.items()})
    assert {s.dtype for s in state} == {torch.bfloat16}
    assert kernel in repr(backend)


def test_backend_gradients(generator):
    """Exact ones unless the config asks for the shortcut."""
    given = arguments(generator)
    for exact in (True, False):
        config = ours.mLSTMBackendConfig(normalizer_grad=exact, return_last_states=False)
        got = gradients([ours.mLSTMBackend(config)(**given)], given)
        want = gradients(reference(given, False, normalizer_grad=exact)[:1], given)
        for key, g in got.items():
            close(g, want[key], grad=True, name=key)


def test_wrappers_take_f_before_i(generator):
    given = arguments(generator)
    q, k, v, i, f = (given[name] for name in NAMES)
    want = reference(given, False)
    kernels = (
        ours.mlstm_chunkwise__native_autograd,
        ours.mlstm_recurrent_sequence__native_fw,
        ours.mlstm_recurrent_step__native,
    )
    states = [given[s + "_initial"] for s in "cnm"]
    for wrap, used in [
        (ours.wrap_chunkwise__arbitrary_sequence_length, kernels),
        (ours.wrap_chunkwise__arbitrary_sequence_length_with_padding, kernels),
        (ours.wrap_chunkwise__pad_zeros, kernels[:1]),
    ]:
        h, last = wrap(*used, q, k, v, f, i, *states, return_last_states=True)
        for g, w in zip([h, *last], want, strict=True):
            close(g.detach(), w.detach())
        assert torch.equal(wrap(*used, q, k, v, f, i, *states, return_last_states=False), h)
        named = {"q": q, "k": k, "v": v, "i": i, "f": f, "return_last_states": False}
        names = ["mlstm_chunkwise_kernel", "mlstm_sequence_kernel", "mlstm_step_kernel"]
        h = wrap(**dict(zip(names, used, strict=False)), **named)
        close(h.detach(), kernels[0](q, k, v, i, f).detach())


def bad_calls():
    x = {name: torch.zeros(B, NH, S, 4) for name in "qkv"}
    x |= {name: torch.zeros(B, NH, S) for name in "if"}
    kernel, step = ours.mlstm_chunkwise__native_autograd, ours.mlstm_recurrent_step__native
    one = {k: v[:, :, 0] for k, v in x.items()}
    state = {"c": torch.zeros(B, NH, 4, 4), "n": torch.zeros(B, NH, 4), "m": torch.zeros(B, NH, 1)}
    yield lambda: kernel(**x | {"q": x["q"][:1]}), r"q has shape \(1, .*expected \(B=2, NH=3, S=11"
    yield lambda: kernel(**x | {"k": x["k"][..., 1:]}), r"k has shape .*expected .*DHQK=4\)"
    yield lambda: kernel(**x | {"i": x["i"][..., 1:]}), r"i has shape .*expected .*S=11\)"
    yield (
        lambda: kernel(**x, m_initial=torch.zeros(B, NH, 2)),
        r"m_initial has shape \(2, 3, 2\), expected \(B=2, NH=3, one=1\)",
    )
    yield lambda: step(**one, **state | {"c": state["c"][:1]}), "step__native: c has shape"
    yield lambda: step(**one | {"v": x["v"]}, **state), "v has shape .*expected .B, NH, DHHV"
    yield lambda: ours.get_mlstm_kernel("nothing"), "get_mlstm_kernel: name is 'nothing', expected"
    yield lambda: ours.get_mlstm_step_kernel("x"), "get_mlstm_step_kernel: name is 'x', expected"
    yield lambda: ours.mLSTMBackendConfig(mode="serve"), "Config: mode is 'serve', expected one of"
    yield (
        lambda: ours.mLSTMBackend(ours.mLSTMBackendConfig())(**x, mode="serve"),
        "mLSTMBackend: mode is 'serve', expected one of",
    )


@pytest.mark.parametrize("call, text", list(bad_calls()), ids=lambda v: str(v)[:40])
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# ---- the package itself ----


@pytest.fixture
def peer():
    return pytest.importorskip("mlstm_kernels.torch")


def test_the_packages_signatures(peer):
    """Ours have one keyword more."""
    wrappers = importlib.import_module("mlstm_kernels.torch.kernel_wrappers")
    pairs = [(peer.get_mlstm_kernel(name), ours.get_mlstm_kernel(name)) for name in EVERY]
    assert sorted(peer.get_available_mlstm_kernels()) == sorted(EVERY)
    for kind in ("sequence", "step"):
        names = getattr(peer, f"get_available_mlstm_{kind}_kernels")()
        assert names == getattr(ours, f"get_available_mlstm_{kind}_kernels")()
        get = f"get_mlstm_{kind}_kernel"
        pairs += [(getattr(peer, get)(name), getattr(ours, get)(name)) for name in names]
    for name in ours.__all__:
        if name.startswith("wrap"):
            pairs.append((getattr(wrappers, name), getattr(ours, name)))
    backend = importlib.import_module("mlstm_kernels.torch.backend_module")
    for name in ("mLSTMBackendConfig", "mLSTMBackend"):
        pairs.append((getattr(backend, name), getattr(ours, name)))
    pairs.append((backend.mLSTMBackend.forward, ours.mLSTMBackend.forward))
    for theirs, mine in pairs:
        theirs, mine = (
            [(p.name, p.default, p.kind) for p in inspect.signature(x).parameters.values()]
            for x in (theirs, mine)
        )
        assert [p for p in mine if p[0] != "normalizer_grad"] == theirs


@pytest.mark.parametrize(
    "name",
    ["chunkwise--native_autograd", "native_sequence__native", "parallel--native_siging_autograd"],
)
def test_the_packages_results(name, peer, generator):
    given = arguments(generator, steps=16)
    options, want_states = {}, True
    if name.startswith("chunkwise"):
        kernel, options = peer.get_mlstm_kernel(name), {"chunk_size": 8}
    elif name.startswith("parallel"):
        kernel, want_states = peer.get_mlstm_kernel(name), False
        given = {key: given[key] for key in NAMES}
    else:
        kernel, options = peer.get_mlstm_sequence_kernel(name), {"dtype_state": torch.float64}
    results = []
    for call in (FUNCTIONS[name], kernel):
        out = call(**given, eps=0.5, return_last_states=want_states, **options)
        results.append([out[0], *out[1]] if want_states else [out])
    for g, w in zip(*results, strict=True):
        close(g.detach(), w.detach())
    got, want = (gradients(x, given) for x in results)
    for key, g in got.items():
        close(g, want[key], grad=True, name=key)


def test_states_pass_between_the_packages_steps_and_ours(peer, generator):
    given = arguments(generator)
    state, outputs = [given[s + "_initial"] for s in "cnm"], []
    steps = [ours.mlstm_recurrent_step__native, peer.get_mlstm_step_kernel("native")]
    for t in range(S):
        q, k, v = (given[x][:, :, t] for x in "qkv")
        i, f = (given[x][:, :, t : t + 1] for x in "if")
        h, state = steps[t % 2](q, k, v, i, f, *state, dtype_state=torch.float64)
        outputs.append(h)
    for g, w in zip([torch.stack(outputs, 2), *state], reference(given, False), strict=True):
        close(g.detach(), w.detach())


# ---- install ----


def test_stand_in(child_environment, tmp_path):
    if importlib.util.find_spec("mlstm_kernels") is not None:
        pytest.skip("mlstm_kernels itself is installed")
    program = """
from torch_ext import compat
assert compat.install("mlstm_kernels") == ["mlstm_kernels"]
import importlib, importlib.metadata
import mlstm_kernels.torch
from mlstm_kernels.torch import get_mlstm_kernel
from mlstm_kernels.torch.backend_module import mLSTMBackend, mLSTMBackendConfig
from mlstm_kernels.torch.chunkwise import mlstm_chunkwise__xl_chunk, mlstm_siging_chunkwise__xl_chunk
from mlstm_kernels.torch.recurrent import mlstm_recurrent_step__native
from mlstm_kernels.torch.kernel_wrappers import wrap_chunkwise__pad_zeros
ours = compat.mlstm_kernels
assert mLSTMBackend is ours.mLSTMBackend and get_mlstm_kernel is ours.get_mlstm_kernel
assert importlib.metadata.version("mlstm_kernels") == mlstm_kernels.__version__
found = set()
for name, names in compat._PACKAGES["mlstm_kernels"].modules.items():
    module = importlib.import_module(name)
    found.update(n for n in names if getattr(module, n) is getattr(ours, n))
assert found == set(ours.__all__), found ^ set(ours.__all__)
"""
    subprocess.run(
        [sys.executable, "-c", program], env=child_environment, check=True, timeout=300,
        cwd=tmp_path,
    )  # fmt: skip
