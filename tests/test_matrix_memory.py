"""What is particular about matrix memories, beside what the shared suites ask of each: sizes of keys
and values, chunks, groups of heads, gates that are far out, and options that those leave alone."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import close, cotangents, refuses, state_dtype
from torch import Tensor

import torch_ext


def normal(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Member:
    name: str
    variants: tuple[dict, ...]
    over_time: ClassVar[dict]  # argument: dimensions
    parameters: ClassVar[dict] = {}
    states: ClassVar[dict] = {}
    optional: ClassVar[tuple] = ()

    def __str__(self):
        return self.name

    function = property(lambda self: getattr(torch_ext, self.name))
    reference = property(lambda self: getattr(torch_ext, self.name + "_reference"))
    step = property(lambda self: getattr(torch_ext, self.name + "_step"))
    step_ = property(lambda self: getattr(torch_ext, self.name + "_step_"))

    @property
    def names(self):
        return (*self.over_time, *self.parameters, *self.states)

    def draw(self, generator, dtype=torch.float64, grad=False, rows=None, **sizes):
        """Leaves by name: inputs over time, parameters, states."""
        sizes = dict(B=2, T=7, G=2, H=4, K=5, V=6) | sizes
        leaves = {}
        for kind in (self.over_time, self.parameters, self.states):
            for name, letters in kind.items():
                own = sizes | ({"B": rows} if rows is not None and kind is self.states else {})
                x = self.sample(name, normal([own[d] for d in letters], generator))
                wide = kind is self.states or name in self.parameters
                leaves[name] = x.to(state_dtype(dtype) if wide else dtype).requires_grad_(grad)
        return leaves

    def sample(self, name, x):
        return x

    def state(self, leaves):
        given = [leaves[name] for name in self.states]
        return given[0] if len(given) == 1 else tuple(given)

    def call(self, function, leaves, **options):
        """(output, *final states)."""
        inputs = {k: v for k, v in leaves.items() if k not in self.states}
        out, final = function(**inputs, initial_state=self.state(leaves), **options)
        return (out, *(final if isinstance(final, tuple) else (final,)))

    def call_step(self, function, leaves, **options):
        inputs = {k: v for k, v in leaves.items() if k not in self.states}
        got = function(**inputs, state=self.state(leaves), **options)
        if isinstance(got, Tensor):
            return got
        out, final = got
        return (out, *(final if isinstance(final, tuple) else (final,)))

    def at(self, leaves, time):
        return {k: v[:, time] if k in self.over_time else v for k, v in leaves.items()}

    def after(self, leaves, outputs):
        """The leaves of what comes next."""
        return leaves | dict(zip(self.states, outputs[1:], strict=True))


class MLSTM(Member):
    over_time: ClassVar = {"q": "BTGK", "k": "BTGK", "v": "BTHV", "i": "BTH", "f": "BTH"}
    states: ClassVar = {"C": "BHKV", "n": "BHK", "m": "BH"}

    def sample(self, name, x):
        return {"i": 2 * x, "f": 2 * x + 2}.get(name, x)


class LinearAttention(Member):
    over_time: ClassVar = {"q": "BTGK", "k": "BTGK", "v": "BTHV"}
    states: ClassVar = {"S": "BHKV", "z": "BHK"}

    def sample(self, name, x):  # a normaliser that stays away from 0
        return x.abs() + 0.1 if name in ("q", "k", "z") else x


class Retention(Member):
    over_time: ClassVar = {"q": "BTGK", "k": "BTGK", "v": "BTHV"}
    parameters: ClassVar = {"decay": "H"}
    states: ClassVar = {"state": "BHKV"}

    def sample(self, name, x):
        return torch.sigmoid(3 * x) if name == "decay" else x


class SSD(Member):
    over_time: ClassVar = {"x": "BTHV", "dt": "BTH", "B": "BTGK", "C": "BTGK", "z": "BTHV"}
    parameters: ClassVar = {"A": "H", "D": "H", "dt_bias": "H"}
    states: ClassVar = {"state": "BHVK"}

    def sample(self, name, x):
        return -x.exp() if name == "A" else x.abs() if name in ("dt", "dt_bias") else x


# Options that the shared suites do not have.
MEMBERS = (
    MLSTM("mlstm", ({"eps": 0.1, "scale": 0.3}, {"normalizer_grad": False})),
    LinearAttention(
        "linear_attention",
        (
            {"feature_map": "relu", "scale": 0.5, "eps": 0.1},
            {"feature_map": "identity", "normalize": False},
        ),
    ),
    Retention("retention", ({"scale": 1.0},)),
    SSD("ssd", ({},)),
)
WAYS = ("plain", "packed-reverse")
LENGTHS = (3, 0, 40, 27)


def way(name, T):
    """Options, and the rows of a state where they are not B."""
    options, rows = {"reverse": "reverse" in name}, None
    if "packed" in name:
        bounds = [0, min(3, T), min(3, T), min(43, T), T]
        options["cu_seqlens"], rows = torch.tensor(bounds), 4
    return options, rows


def over(*others, variants=True):
    rows = [
        pytest.param(m, v, id="-".join([m.name, *(f"{k}={x}" for k, x in v.items())]))
        for m in MEMBERS
        for v in (m.variants if variants else m.variants[:1])
    ]
    return pytest.mark.parametrize(("member", "options"), rows)


def gradients(outputs, leaves, weights):
    pairs = [(x, w) for x, w in zip(outputs, weights, strict=True) if x.requires_grad]
    wanted = [x for x in leaves.values() if x.requires_grad]
    got = torch.autograd.grad(
        [x for x, _ in pairs], wanted, [w for _, w in pairs], allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(got, wanted, strict=True)]


def wide(leaves):
    return {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in leaves.items()}


# What `close` allows a recurrence of up to 257 steps, for sums of K or T products that cancel.
FACTOR = 8


@over()
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("sizes", [(7, 5, 6), (70, 3, 17), (1, 16, 1), (130, 2, 2)])
def test_values_and_gradients(member, options, name, sizes, generator):
    T, K, V = sizes
    more, rows = way(name, T)
    B = 2 if rows is None else 1
    x = member.draw(generator, T=T, K=K, V=V, B=B, rows=rows, grad=True)
    got = member.call(member.function, x, **options, **more)
    want = member.call(member.reference, x, **options, **more)
    for g, w in zip(got, want, strict=True):
        close(g, w, factor=FACTOR)
    weights = cotangents(want, generator)
    pairs = zip(gradients(got, x, weights), gradients(want, x, weights), x, strict=True)
    for g, w, argument in pairs:
        size = float(w.abs().max()) if w.numel() else 0.0
        close(g, w, grad=True, factor=FACTOR, name=argument, size=size)


@over()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(member, options, dtype, generator):
    x = member.draw(generator, dtype, T=90, K=8, V=12, grad=True)
    got, want = member.call(member.function, x, **options), None
    y = wide(x)
    want = member.call(member.reference, y, **options)
    assert got[0].dtype is dtype
    assert all(s.dtype is state_dtype(dtype) for s in got[1:])
    for g, w in zip(got, want, strict=True):
        close(g, w, factor=4 * FACTOR)
    weights = cotangents(got, generator)
    pairs = zip(
        gradients(got, x, weights),
        gradients(want, y, [w.double() for w in weights]),
        x,
        strict=True,
    )
    for g, w, argument in pairs:
        assert g.dtype is x[argument].dtype
        close(g, w, grad=True, factor=4 * FACTOR, name=argument, size=float(w.abs().max()))


@over()
def test_pieces_and_steps(member, options, generator):
    """Whole == in pieces == step by step, in place too."""
    x = member.draw(generator, T=9)
    whole = member.call(member.function, x, **options)
    pieces, state = [], x
    for piece in (slice(0, 4), slice(4, 4), slice(4, 9)):
        out = member.call(member.function, member.at(state, piece), **options)
        pieces.append(out[0])
        state = member.after(state, out)
    close(torch.cat(pieces, 1), whole[0], factor=FACTOR)
    steps, state, placed = [], x, member.after(x, (None, *(x[s].clone() for s in member.states)))
    in_place = {k: v for k, v in options.items() if k != "normalizer_grad"}
    for t in range(9):
        out = member.call_step(member.step, member.at(state, t), **options)
        same = member.call_step(member.step_, member.at(placed, t), **in_place)
        close(same, out[0], factor=FACTOR)
        steps.append(out[0])
        state = member.after(state, out)
    close(torch.stack(steps, 1), whole[0], factor=FACTOR)
    for name, last in zip(member.states, whole[1:], strict=True):
        close(state[name], last, factor=FACTOR)
        close(placed[name], last, factor=FACTOR)


@over()
@pytest.mark.parametrize("name", WAYS)
def test_second_derivatives(member, options, name, generator):
    if "normalizer_grad" in options:
        pytest.skip("what is no gradient has no second one")
    more, rows = way(name, 5)
    x = member.draw(generator, T=5, K=2, V=3, B=1, G=1, H=2, rows=rows, grad=True)
    weights = None
    seconds = []
    for function in (member.function, member.reference):
        out = member.call(function, x, **options, **more)
        weights = weights or [cotangents(out, generator), {}]
        pairs = [(o, w) for o, w in zip(out, weights[0], strict=True) if o.requires_grad]
        firsts = torch.autograd.grad(
            [o for o, _ in pairs], list(x.values()), [w for _, w in pairs], create_graph=True,
            allow_unused=True,
        )  # fmt: skip
        total = 0.0
        for at, first in enumerate(firsts):
            if first is not None and first.requires_grad:
                w = weights[1].setdefault(at, torch.randn_like(first))
                total = total + (first * w).sum()
        seconds.append(torch.autograd.grad(total, list(x.values()), allow_unused=True))
    for got, want, argument in zip(*seconds, x, strict=True):
        if want is not None:
            got = torch.zeros_like(want) if got is None else got
            close(got, want, grad=True, factor=64, name=argument, size=float(want.abs().max()))


@over()
@pytest.mark.parametrize("name", WAYS)
def test_forward_mode(member, options, name, generator):
    more, rows = way(name, 5)
    x = member.draw(generator, T=5, B=1, rows=rows)
    tangents = {k: normal(v.shape, generator) for k, v in x.items()}

    def run(function):
        return torch.func.jvp(
            lambda leaves: member.call(function, leaves, **options, **more), (x,), (tangents,)
        )[1]

    for got, want in zip(run(member.function), run(member.reference), strict=True):
        close(got, want, grad=True, factor=FACTOR, size=float(want.abs().max()))


@over(variants=False)
def test_bits(member, options, threads, generator):
    """Whatever the number of threads, the layout and the run."""
    x = member.draw(generator, torch.float32, T=200, H=8, G=2, K=20, V=36, B=3, grad=True)
    weights = None

    def run(leaves):
        nonlocal weights
        out = member.call(member.function, leaves, **options)
        weights = weights or cotangents(out, generator)
        return [*out, *gradients(out, leaves, weights)]

    threads(1)
    first = run(x)
    threads(2)
    for a, b in zip(first, run(x), strict=True):
        assert torch.equal(a, b)
    if member.name == "ssd":  # its gate is torch's, whose last bit depends on the layout
        return
    turned = {
        k: v.detach().transpose(1, -2).contiguous().transpose(1, -2).requires_grad_()
        if v.dim() == 4
        else v
        for k, v in x.items()
    }
    for a, b in zip(first, run(turned), strict=True):
        assert torch.equal(a, b)


def same_divisor(want, got, options):
    """C and n of mlstm divided by e^m of `got`, whose m is rounded: where m is 1e4, by 5e-4."""
    if options.get("input_gate") != "exp":
        return want
    h, C, n, m = (x.detach() for x in want)
    by = torch.exp(m - got[3].detach().double())
    return h, C * by[..., None, None], n * by[..., None], m


# What may be far out, of each; a memory that grows is left out.
FAR = (
    ("mlstm", "i", {"input_gate": "exp"}), ("mlstm", "f", {"input_gate": "exp"}),
    ("mlstm", "i", {"input_gate": "sigmoid"}), ("mlstm", "f", {"input_gate": "sigmoid"}),
    ("linear_attention", "k", {}), ("linear_attention", "q", {}),
    ("ssd", "dt", {"dt_softplus": True}), ("ssd", "z", {}),
)  # fmt: skip


@pytest.mark.parametrize("heads", [1, 4], ids=["by_chunks", "by_steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("at", [1e4, -1e4])
@pytest.mark.parametrize(("name", "gate", "options"), FAR, ids=str)
def test_far_gates(name, gate, options, at, dtype, heads, generator):
    """Some gates far out, and what follows them as exact as ever.

    In double an exponent of 1e4 has an error of 2e-12, and e to it a relative one of as much: sums
    of log decays, of which a chunk is made, are no better than that."""
    factor = FACTOR * (4 if dtype is torch.float32 else 128)
    member = next(m for m in MEMBERS if m.name == name)
    x = member.draw(generator, dtype, T=150, B=2, G=1, H=heads, K=8, V=8)
    for positive in ("q", "k", "n"):  # or divisors are what rounding leaves of sums that cancel
        if positive in x:
            x[positive] = x[positive].abs()
    x[gate][:, torch.randint(150, (20,), generator=generator)] = at
    if name == "linear_attention":
        x["z"] += 1  # all features of a key may be 0
    for leaf in x.values():
        leaf.requires_grad_()
    y = wide(x)
    got = member.call(member.function, x, **options)
    want = member.call(member.reference, y, **options)
    for g, w in zip(got, same_divisor(want, got, options), strict=True):
        assert g.isfinite().all()
        close(g, w, factor=factor)
    weights = cotangents(got[:1], generator)
    for g, w, argument in zip(
        gradients(got[:1], x, weights),
        gradients(want[:1], y, [weights[0].double()]),
        x,
        strict=True,
    ):
        assert g.isfinite().all(), argument
        close(g, w, grad=True, factor=factor, name=argument, size=float(w.abs().max()))


@pytest.mark.parametrize("heads", [1, 4], ids=["by_chunks", "by_steps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keeps", [False, True], ids=["forgets", "keeps"])
def test_exact_decays(keeps, dtype, heads, generator):
    """A decay of exactly 0 forgets everything, of exactly 1 nothing: bitwise where sums are exact."""
    for member in MEMBERS:
        if member.name == "linear_attention" and not keeps:
            continue
        x = member.draw(generator, dtype, T=70, G=1, H=heads, K=4, V=4)
        for leaf in x.values():  # small whole numbers
            leaf.mul_(2).round_().clamp_(-2, 2)
        x |= {
            k: torch.full_like(x[k], v)
            for k, v in {"dt": 1, "dt_bias": 0, "z": 9}.items()
            if k in x
        }
        for name, value in (("A", 0 if keeps else -1e4), ("f", 1e4 if keeps else -1e4)):
            if name in x:
                x[name].fill_(value)
        if "decay" in x:
            x["decay"].fill_(1 if keeps else 0)
        options = {}
        if member.name == "mlstm":
            x["i"].fill_(1e4)  # lets in everything, and is no number that is rounded
            options = {"input_gate": "sigmoid", "normalize": False}
        elif member.name == "linear_attention":
            options = {"feature_map": "identity", "normalize": False}
        state = member.call(member.function, x, **options)[1]
        want = member.call(member.reference, wide(x), **options)[1]
        assert torch.equal(state.double(), want), member


@over()
def test_no_keys(member, options, generator):
    """K = 0: a memory without rows, of which nothing is read."""
    for T in (5, 40):
        x = member.draw(generator, T=T, K=0, V=3)
        got = member.call(member.function, x, **options)
        want = member.call(member.reference, x, **options)
        for g, w in zip(got, want, strict=True):
            close(g, w, factor=FACTOR)


def test_half_overflow_stays_in_the_output():
    """A state beyond float16's largest number is infinite in h, and only there."""
    one = torch.ones(1, 3, 1, 1, dtype=torch.float16)
    h, S = torch_ext.retention(one, one, 6e4 * one, torch.ones(1))
    assert h.flatten().isinf().tolist() == [False, True, True] and S.item() == 3 * float(
        6e4 * one[0, 0]
    )


def test_later_steps_do_not_reach_back(generator):
    """NaN and infinity in a step leave those before it alone."""
    for member in MEMBERS:
        x = member.draw(generator, torch.float32, T=50)
        clean = member.call(member.function, x)[0]
        for name in member.over_time:
            dirty = dict(x)
            dirty[name] = x[name].clone()
            dirty[name][:, 30] = float("nan")
            got = member.call(member.function, dirty)[0]
            assert torch.equal(got[:, :30], clean[:, :30]), f"{member.name}: {name}"


# ---- the operator that has all kernels ----
def inner(generator, normalizer, dtype, rows=2, **sizes):
    """A call of torch.ops.torch_ext.matrix_memory: q, k, v, gates, states."""
    B, T, G, H, K, V = (dict(B=2, T=5, G=1, H=2, K=3, V=2) | sizes).values()
    wide = state_dtype(dtype)

    def draw(*shape, dtype=wide):
        return normal(shape, generator).to(dtype)

    stabilized = normalizer == "stabilized"
    return [
        draw(B, T, G, K, dtype=dtype).abs(), draw(B, T, G, K, dtype=dtype).abs(),
        draw(B, T, H, V, dtype=dtype), -draw(B, T, H).abs(),
        draw(B, T, H) if stabilized else None, None if stabilized else draw(B, T, H).abs(),
        draw(rows, H, K, V), None if normalizer == "none" else draw(rows, H, K).abs(),
        draw(rows, H) if stabilized else None,
    ]  # fmt: skip


def leaves(x, grad=True):
    return [None if y is None else y.detach().clone().requires_grad_(grad) for y in x]


NORMALIZERS = pytest.mark.parametrize(
    "normalizer", ["none", "sum", "at_least_one", "stabilized"], ids=str
)


@pytest.mark.consumer("opcheck, forward and backward operator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@NORMALIZERS
def test_opcheck(normalizer, dtype, generator):
    x, options = inner(generator, normalizer, dtype), {"normalizer": normalizer, "eps": 0.1}
    opcheck, op = torch.library.opcheck, torch.ops.torch_ext.matrix_memory.default
    opcheck(op, tuple(x), options)
    opcheck(op, tuple(leaves(x)), options)
    opcheck(op, tuple(x), options | {"wide_h": True})  # of checkpoints some places are not written
    opcheck(op, tuple(leaves(x[:3])), options | {"reverse": True, "exact": False})
    turned = [y if y is None or y.dim() < 3 else y.mT.contiguous().mT for y in x]
    opcheck(op, tuple(leaves(turned)), options)
    backward = torch.ops.torch_ext.matrix_memory_backward.default
    *outputs, kept = op(*x, **options, checkpoints=True)
    tail = (None, 1.0, 0.1, normalizer, True, False, False)
    opcheck(backward, (*outputs, *x, kept, *tail))
    opcheck(backward, (None, outputs[1], None, None, *x, kept, *tail))
    opcheck(backward, (*leaves(outputs), *leaves(x), kept, *tail))
    opcheck(backward, (*outputs, *x, kept[:0], *tail))
    # packed
    x = inner(generator, normalizer, dtype, rows=3, B=1)
    cu = torch.tensor([0, 2, 2, 5])
    opcheck(op, (*leaves(x), cu), options)
    *outputs, kept = op(*x, cu, **options, checkpoints=True)
    opcheck(backward, (*leaves(outputs), *leaves(x), kept, cu, *tail[1:]))


@pytest.mark.consumer("opcheck, step and in-place step")
@NORMALIZERS
def test_opcheck_of_steps(normalizer, generator):
    options = {"normalizer": normalizer, "eps": 0.1}
    op = torch.ops.torch_ext.matrix_memory_step_.default
    for rows, indices in ((2, None), (4, torch.tensor([3, -1]))):
        x = inner(generator, normalizer, torch.float32, rows)
        x = [y if y is None else y[:, 0] for y in x[:6]] + x[6:]
        torch.library.opcheck(op, (*x, indices), options)


@pytest.mark.consumer("opcheck, forward and backward operator")
@over()
def test_opcheck_of_members(member, options, generator):
    """Which are made of other operators, with nothing that a compiler does not see."""
    x = member.draw(generator, torch.float32, T=5, G=1, H=2, K=3, V=2)
    ops, named = torch.ops.torch_ext, {"initial_state": "state"}
    names = [a.name for a in getattr(ops, member.name).default._schema.arguments]
    given = {name: x[named.get(name, name)] for name in names if named.get(name, name) in x}
    grad = {k: v.clone().requires_grad_() for k, v in given.items()}
    torch.library.opcheck(getattr(ops, member.name).default, (), grad | options)
    one = member.at(x, 0)
    for tail in ("_step", "_step_"):
        op = getattr(ops, member.name + tail).default
        names = [a.name for a in op._schema.arguments]
        given = {name: one[name] for name in names if name in one}
        mine = {k: v for k, v in options.items() if k in names}
        torch.library.opcheck(op, (), given | mine)


def test_errors(generator):
    m, x = MEMBERS[0], MEMBERS[0].draw(generator, torch.float32)

    def call(**changes):
        return lambda: m.call(torch_ext.mlstm, x | changes)

    refuses(ValueError, ["mlstm: k has shape", "(2, 7, 2, 4)", "K=5"], call(k=x["k"][..., :4]))
    refuses(ValueError, ["mlstm: v has shape", "T=7"], call(v=x["v"][:, :4]))
    refuses(TypeError, ["mlstm: v has dtype float64", "float32"], call(v=x["v"].double()))
    refuses(ValueError, ["mlstm: i has shape", "H=4"], call(i=x["i"][..., :3]))
    refuses(TypeError, ["mlstm: f has dtype int64"], call(f=x["f"].long()))
    refuses(ValueError, ["mlstm: C has shape", "V=6"], call(C=x["C"][..., :3]))
    refuses(TypeError, ["mlstm: m has dtype float64"], call(m=x["m"].double()))
    three = torch.cat([x["q"], x["q"][:, :, :1]], 2)
    refuses(ValueError, ["mlstm: q has shape", "G=3", "H=4"], call(q=three, k=three))
    refuses(ValueError, ["input_gate is 'relu'", "'exp' or 'sigmoid'"],
            lambda: m.call(torch_ext.mlstm, x, input_gate="relu"))  # fmt: skip
    refuses(ValueError, ["normalize is False"],
            lambda: m.call(torch_ext.mlstm, x, normalize=False))  # fmt: skip
    refuses(ValueError, ["cu_seqlens", "B=1"],
            lambda: m.call(torch_ext.mlstm, x, cu_seqlens=torch.tensor([0, 7])))  # fmt: skip
    s = MEMBERS[3].draw(generator, torch.float32)
    refuses(ValueError, ["ssd: B has shape", "N=5"],
            lambda: MEMBERS[3].call(torch_ext.ssd, s | {"B": s["B"][..., :2]}))  # fmt: skip
    refuses(ValueError, ["ssd: initial_state has shape", "P=6"],
            lambda: MEMBERS[3].call(torch_ext.ssd, s | {"state": s["state"][:, :, :2]}))  # fmt: skip
    r = MEMBERS[2].draw(generator, torch.float32)
    refuses(ValueError, ["retention: decay has shape", "H=4"],
            lambda: MEMBERS[2].call(torch_ext.retention, r | {"decay": r["decay"][:2]}))  # fmt: skip
    a = MEMBERS[1].draw(generator, torch.float32)
    refuses(ValueError, ["feature_map is 'x'"],
            lambda: MEMBERS[1].call(torch_ext.linear_attention, a, feature_map="x"))  # fmt: skip
    grad = m.at(x | {"q": x["q"].clone().requires_grad_()}, 0)
    refuses(RuntimeError, ["mlstm_step_", "requires grad"],
            lambda: m.call_step(torch_ext.mlstm_step_, grad))  # fmt: skip
