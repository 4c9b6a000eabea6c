"""The references of the gated recurrences against torch.nn, tables checked by hand, a second formula in
numpy, a peer, and what has to hold of them.

Nothing here runs an operator: it is what the operators' own tests trust.
"""

from dataclasses import dataclass
from fractions import Fraction as Q
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from cases import GATED, close, cotangents
from oracle import LN2, LN3, sigmoid
from torch import nn

from torch_ext.elman import elman_reference
from torch_ext.gru import gru_reference
from torch_ext.ind_rnn import ind_rnn_reference
from torch_ext.lstm import lstm_reference
from torch_ext.slstm import slstm_reference

# ---- the operators, and what they may be called with ----
# Of each feature: what it adds to the leaves, a letter for each dimension (J is 3, or 2 with "coupled").
PARAMETERS = {
    "norm": {"norm_weight": "GHK"},
    "peephole": {"peephole": "JHK"},
    "projection": {"projection": "HPK"},
    "cell_norm": {"cell_norm_weight": "HK"},
    "cell_norm_bias": {"cell_norm_weight": "HK", "cell_norm_bias": "HK"},
}
WORDS = {
    "exp": {"forget_gate": "exp"},
    "at_least_one": {"normalizer": "at_least_one"},
    "coupled": {"coupled": True},
    "reset_before": {"reset_after": False},
    "relu": {"nonlinearity": "relu"},
    "tanh": {"nonlinearity": "tanh"},
    "reverse": {"reverse": True},
}
# No gradient goes to these. S are the sequences.
MASKS = {"recurrent_mask": "SHP", "h_update": "BTHP", "c_update": "BTHK", "reset": "BT"}
COMMON = ("no_bias", "no_state", "packed", "reverse", "reset", "recurrent_mask", "h_update")
SIZES = {"B": 2, "T": 7, "H": 2, "K": 3, "P": 2}
LENGTHS = (3, 0, 1, 3)  # of packed sequences, where there are 7 steps


@dataclass(frozen=True)
class Recurrence:
    name: str
    reference: object
    gates: int
    states: tuple[str, ...]
    features: tuple[str, ...]
    apart: tuple[tuple[str, str], ...] = ()  # features that do not go together

    def __str__(self):
        return self.name

    @property
    def dense(self):
        """Without heads: u is in the place of R, and D in that of H and K."""
        return self.name == "ind_rnn"

    def letters(self, name):
        letters = {"x": "BTGHK", "R": "GHKP", "u": "GHK", "bias": "GHK", "h": "SHP"}
        letters = letters.get(name, "SHK")
        for extra in PARAMETERS.values():
            letters = extra.get(name, letters)
        letters = MASKS.get(name, letters)
        if self.dense:
            letters = letters.translate({ord("G"): "", ord("K"): "", ord("P"): "", ord("H"): "D"})
        return letters

    def sizes(self, features, **sizes):
        sizes = SIZES | sizes
        sizes["D"] = sizes["H"] * sizes["K"]
        sizes["G"] = self.gates - ("coupled" in features)
        sizes["J"] = sizes["G"] - 1
        if "projection" not in features:
            sizes["P"] = sizes["K"]
        sizes["S"] = sizes["B"]
        if "packed" in features:
            sizes |= {"B": 1, "S": len(LENGTHS)}
        return sizes

    def names(self, features):
        """Of the leaves."""
        names = ["x", "u" if self.dense else "R", *([] if "no_bias" in features else ["bias"])]
        for feature in features:
            names += [n for n in PARAMETERS.get(feature, {}) if n not in names]
        return names + ([] if "no_state" in features else list(self.states))

    def draw(self, features, generator, dtype=torch.float64, grad=False, device="cpu", **sizes):
        """Leaves, and the options that go with them."""
        sizes = self.sizes(features, **sizes)
        wide = torch.float64 if dtype is torch.float64 else torch.float32

        def normal(name):
            shape = [sizes[d] for d in self.letters(name)]
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        leaves = {}
        for name in self.names(features):
            # small enough for memories that fade: two runs that differ by a bit stay together
            y = sample(name, normal(name))
            kind = wide if name in self.states else dtype
            leaves[name] = y.to(device, kind).requires_grad_(grad)
        options = {}
        for feature in features:
            options |= WORDS.get(feature, {})
            if feature in MASKS:
                y = normal(feature)
                if feature == "reset":
                    options[feature] = (y > 0.8).to(device)
                elif feature == "recurrent_mask":
                    options[feature] = ((y > -0.5) * 1.25).to(device, wide)
                else:  # of a mask and of its mean
                    y = torch.where(y > 1, 0.9, (y > -0.5).double())
                    options[feature] = y.to(device, wide)
        if "packed" in features:
            lengths = list(LENGTHS)
            lengths[-1] += sizes["T"] - sum(LENGTHS)
            bounds = np.cumsum([0, *lengths]).tolist()
            options["cu_seqlens"] = torch.tensor(bounds, device=device)
        return leaves, options

    def call(self, function, leaves, **options):
        """(h, *final states)."""
        given = {k: y for k, y in leaves.items() if k not in self.states}
        states = tuple(leaves[k] for k in self.states if k in leaves)
        if states:
            given["initial_state"] = states if len(self.states) > 1 else states[0]
        h, final = function(**given, **options)
        return (h, *(final if isinstance(final, tuple) else (final,)))

    def sets(self, size=2):
        """All sets of so many features, and smaller ones."""
        for n in range(size + 1):
            for chosen in combinations((*self.features, *COMMON), n):
                if not any(a in chosen and b in chosen for a, b in self.apart):
                    yield chosen


def sample(name, y):
    if name == "u":
        return torch.tanh(y)
    if name == "R":
        return y * 0.5 / max(1, y.shape[-1]) ** 0.5
    if name == "projection":
        return y / max(1, y.shape[-1]) ** 0.5
    if name.endswith("norm_weight"):
        return 1 + y / 4
    return y.abs() + 0.1 if name == "n" else y


RECURRENCES = (
    Recurrence("slstm", slstm_reference, 4, ("h", "c", "n", "m"), ("exp", "at_least_one", "norm")),
    Recurrence(
        "lstm",
        lstm_reference,
        4,
        ("h", "c"),
        ("coupled", "peephole", "projection", "norm", "cell_norm", "cell_norm_bias", "c_update"),
        (("cell_norm", "cell_norm_bias"),),
    ),
    Recurrence(
        "gru", gru_reference, 3, ("h",), ("reset_before", "norm"), (("reset_before", "norm"),)
    ),
    Recurrence("elman", elman_reference, 1, ("h",), ("relu", "norm")),
    Recurrence("ind_rnn", ind_rnn_reference, 1, ("h",), ("tanh",)),
)
BY_NAME = {r.name: r for r in RECURRENCES}
over = pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)


def label(chosen):
    return "+".join(chosen) or "plain"


def over_sets(size=2):
    rows = [
        pytest.param(r, chosen, id=f"{r}-{label(chosen)}")
        for r in RECURRENCES
        for chosen in r.sets(size)
    ]
    return pytest.mark.parametrize(("recurrence", "chosen"), rows)


# ---- the second formula: numpy, one row, heads as one block-diagonal matrix, no stabiliser ----
def blocks(R):
    """(H, K, P) as a matrix (H K, H P)."""
    H, K, P = R.shape
    out = np.zeros((H * K, H * P))
    for head in range(H):
        out[head * K : (head + 1) * K, head * P : (head + 1) * P] = R[head]
    return out


def normed(y, eps):
    """Of (groups, numbers): each group has mean 0 and variance 1, but for eps."""
    return (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + eps)


def one_row(name, given, state, steps, masks, options):
    """``given``: arrays by name, x with time alone in front. ``state``: (H K,) each."""
    o = {
        "forget_gate": "sigmoid",
        "normalizer": "sum",
        "coupled": False,
        "reset_after": True,
    } | options
    x, dense = given["x"], name == "ind_rnn"
    T = len(x)
    x = x.reshape(T, -1, x.shape[-2] * x.shape[-1] if not dense else x.shape[-1])
    G, N = x.shape[1:]
    if dense:
        H, K, R = N, 1, np.diag(given["u"])[None]
    else:
        H, K = given["R"].shape[1:3]
        R = np.stack([blocks(r) for r in given["R"]])

    def flat(key, shape):
        return None if given.get(key) is None else given[key].reshape(shape)

    bias = flat("bias", (G, N))
    bias = np.zeros((G, N)) if bias is None else bias
    weight, peephole = flat("norm_weight", (G, N)), flat("peephole", (-1, N))
    eps = o.get("norm_eps", 1e-5)
    activate = (
        np.tanh
        if o.get("nonlinearity", "relu" if dense else "tanh") == "tanh"
        else lambda y: y * (y > 0)
    )
    state = [np.array(s).reshape(-1) for s in state]
    hs = np.zeros((T, R.shape[2]))
    for t in steps:
        if masks.get("reset") is not None and masks["reset"][t]:
            state = [np.zeros_like(s) for s in state]
        before = state
        h = before[0] * masks["recurrent_mask"] if "recurrent_mask" in masks else before[0]
        a = R @ h
        if weight is not None:
            heads = a.reshape(G, H, K).transpose(1, 0, 2).reshape(H, -1)
            a = normed(heads, eps).reshape(H, G, K).transpose(1, 0, 2).reshape(G, N) * weight
        a = a + bias
        if name == "slstm":
            _, c, n, m = before
            i, f, z, out = x[t] + a
            log_f = -np.logaddexp(0, -f) if o["forget_gate"] == "sigmoid" else f
            # in units of exp(m), where there is nothing yet m says nothing
            old = np.where(n == 0, 0, np.exp(log_f + np.where(n == 0, 0, m)))
            C, total = old * c + np.exp(i) * np.tanh(z), old * n + np.exp(i)
            m = np.where(n == 0, i, np.maximum(i, log_f + np.where(n == 0, 0, m)))
            n, c = total * np.exp(-m), C * np.exp(-m)
            if o["normalizer"] == "at_least_one":
                n = np.maximum(n, 1)
            state = [sigmoid(out) * c / n, c, n, m]
        elif name == "lstm":
            c = before[1]
            *inner, g, out = x[t] + a
            if peephole is not None:
                inner = [y + p * c for y, p in zip(inner, peephole, strict=False)]
            f = sigmoid(inner[-1])
            i = sigmoid(-inner[-1]) if o["coupled"] else sigmoid(inner[0])
            c = f * c + i * np.tanh(g)
            out = out if peephole is None else out + peephole[-1] * c
            seen = c
            if given.get("cell_norm_weight") is not None:
                seen = normed(c.reshape(H, K), eps).reshape(-1) * flat("cell_norm_weight", N)
                seen = seen + (flat("cell_norm_bias", N) if "cell_norm_bias" in given else 0)
            y = sigmoid(out) * np.tanh(seen)
            state = [y if given.get("projection") is None else blocks(given["projection"]) @ y, c]
        elif name == "gru":
            r, z = sigmoid(x[t, 0] + a[0]), sigmoid(x[t, 1] + a[1])
            n = x[t, 2] + (r * a[2] if o["reset_after"] else R[2] @ (r * h) + bias[2])
            state = [before[0] + (1 - z) * (np.tanh(n) - before[0])]
        else:
            state = [activate(x[t, 0] + a[0])]
        for k, key in enumerate(("h_update", "c_update")[: len(state)]):
            if key in masks:
                share = masks[key][t].reshape(-1)
                state[k] = before[k] + share * (state[k] - before[k])
        hs[t] = state[0]
    return hs, state


def second_formula(recurrence, leaves, options):
    """(h, *final states), of float64 tensors."""
    given = {k: y.detach().numpy() for k, y in leaves.items()}
    options = dict(options)
    masks = {k: options.pop(k).numpy() for k in MASKS if k in options}
    cu, reverse = options.pop("cu_seqlens", None), options.pop("reverse", False)
    B, T = given["x"].shape[:2]
    rows = [(b, 0, T) for b in range(B)] if cu is None else [(0, *p) for p in pairwise(cu.tolist())]
    parameters = {k: y for k, y in given.items() if k != "x" and k not in recurrence.states}
    if recurrence.dense:
        widths = [[given["x"].shape[2]]]
    else:
        H, K, P = given["R"].shape[1:]
        widths = [[H, P], *[[H, K]] * 3][: len(recurrence.states)]
    h, finals = np.zeros([B, T, *widths[0]]), [np.zeros([len(rows), *w]) for w in widths]
    for s, (b, start, stop) in enumerate(rows):
        state = [
            given[name][s] if name in given else np.zeros(w)
            for name, w in zip(recurrence.states, widths, strict=True)
        ]
        mine = {k: y[s].reshape(-1) if k == "recurrent_mask" else y[b] for k, y in masks.items()}
        steps = range(start, stop)
        hs, last = one_row(
            recurrence.name, parameters | {"x": given["x"][b]}, state,
            reversed(steps) if reverse else steps, mine, options,
        )  # fmt: skip
        h[b, start:stop] = hs[start:stop].reshape(-1, *widths[0])
        for final, y, w in zip(finals, last, widths, strict=True):
            final[s] = y.reshape(w)
    return [torch.from_numpy(y) for y in (h, *finals)]


@over_sets(2)
def test_second_formula(recurrence, chosen, generator):
    leaves, options = recurrence.draw(chosen, generator)
    got = recurrence.call(recurrence.reference, leaves, **options)
    want = second_formula(recurrence, leaves, options)
    for name, g, w in zip(("output", *recurrence.states), got, want, strict=True):
        assert w.isfinite().all()
        # a norm of few numbers divides what they differ by, which may be little
        close(g, w, name=name, size=0.1, factor=64 if "norm" in label(chosen) else 1)


@over
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norm_eps(recurrence, eps, generator):
    if "norm" not in recurrence.features:
        pytest.skip("has no norm")
    chosen = ("norm", "cell_norm_bias")[: 1 + (recurrence.name == "lstm")]
    leaves, options = recurrence.draw(chosen, generator, K=4)
    got = recurrence.call(recurrence.reference, leaves, norm_eps=eps)
    want = second_formula(recurrence, leaves, {"norm_eps": eps})
    for g, w in zip(got, want, strict=True):
        close(g, w, size=0.1, factor=64)


# ---- finite differences ----
@over_sets(1)
def test_gradcheck(recurrence, chosen, generator):
    leaves, options = recurrence.draw(chosen, generator, grad=True, K=2)
    names = list(leaves)

    def f(*y):
        return recurrence.call(recurrence.reference, dict(zip(names, y, strict=True)), **options)

    torch.autograd.gradcheck(f, tuple(leaves.values()), fast_mode=bool(chosen))


@pytest.mark.parametrize("normalizer", ["sum", "at_least_one"])
@pytest.mark.parametrize("through", ["h", "states"])
def test_gradients_of_a_small_normaliser(normalizer, through, generator):
    """n between 0 and 1 in the state that comes in."""
    r = BY_NAME["slstm"]
    leaves, _ = r.draw((), generator)
    leaves["n"] = torch.rand(leaves["n"].shape, generator=generator).double() * 0.9 + 0.05
    leaves["m"] = leaves["m"] + 2  # more than most input gates: f' is 1 and n stays below 1
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    names = list(leaves)

    def f(*y):
        out = r.call(r.reference, dict(zip(names, y, strict=True)), normalizer=normalizer)
        return out[0] if through == "h" else out[1:]

    torch.autograd.gradcheck(f, tuple(leaves.values()))
    n = f(*leaves.values())[2] if through == "states" else None
    assert n is None or normalizer == "sum" or n.min() >= 1


def test_stabiliser_is_a_constant_for_h(generator):
    """h does not depend on m: its gradient is the one that passes m by."""
    r = BY_NAME["slstm"]
    leaves, _ = r.draw(("no_state",), generator, grad=True)
    want = torch.autograd.grad(slstm_reference(**leaves)[0].sin().sum(), list(leaves.values()))
    shifted = dict(leaves)  # i and m by as much: the same h
    by = torch.randn(2, 1, 2, 3, generator=generator).double()
    out = slstm_reference(**leaves, initial_state=r_state(2, 0.5))[0]
    shifted["x"] = leaves["x"].clone()
    shifted["x"][:, :, 0] = shifted["x"][:, :, 0] + by
    close(slstm_reference(**shifted, initial_state=r_state(2, 0.5, by[:, 0]))[0], out)

    def without_m(x, R, bias):
        h, c, n = (torch.zeros(2, 2, 3, dtype=torch.float64) for _ in range(3))
        out = []
        for t in range(x.shape[1]):
            i, f, z, o = (x[:, t] + torch.einsum("ghkp,bhp->bghk", R, h) + bias).unbind(1)
            c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
            n = torch.sigmoid(f) * n + torch.exp(i)
            h = torch.sigmoid(o) * c / n
            out.append(h)
        return torch.stack(out, 1)

    plain = torch.autograd.grad(without_m(**leaves).sin().sum(), list(leaves.values()))
    for name, g, w in zip(leaves, plain, want, strict=True):
        close(g, w, grad=True, name=name)


def r_state(B, n, m=0.0):
    """h, c, n, m of (B, 2, 3)."""
    zero = torch.zeros(B, 2, 3, dtype=torch.float64)
    return zero + 0.3, zero - 0.7, zero + n, zero + m


# ---- torch.nn ----
NN = {
    "lstm": (nn.LSTM, {}, ()),
    "lstm_projection": (nn.LSTM, {"proj_size": 3}, ("projection",)),
    "lstm_no_bias": (nn.LSTM, {"bias": False}, ("no_bias",)),
    "gru": (nn.GRU, {}, ()),
    "gru_no_bias": (nn.GRU, {"bias": False}, ("no_bias",)),
    "elman": (nn.RNN, {}, ()),
    "elman_relu": (nn.RNN, {"nonlinearity": "relu"}, ("relu",)),
}


def from_nn(module, suffix="_l0"):
    """x of an input, and the other arguments, of one layer and direction of torch.nn."""
    w = dict(module.named_parameters())
    K = module.hidden_size
    given = {"R": w["weight_hh" + suffix].unflatten(0, (-1, 1, K))}
    if "bias_hh" + suffix in w:
        given["bias"] = w["bias_hh" + suffix].unflatten(0, (-1, 1, K))
    if "weight_hr" + suffix in w:
        given["projection"] = w["weight_hr" + suffix][None]

    def project(data):
        y = nn.functional.linear(data, w["weight_ih" + suffix], w.get("bias_ih" + suffix))
        return y.unflatten(-1, (-1, 1, K))

    return project, given


def nn_case(name, generator, rows=3, directions=1, dtype=torch.float64, K=5):
    kind, options, chosen = NN[name]
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    module = kind(4, K, batch_first=True, bidirectional=directions == 2, dtype=dtype, **options)
    P = options.get("proj_size", K)

    def state(width):
        return torch.randn(directions, rows, width, generator=generator).to(dtype).requires_grad_()

    states = (state(P), state(K)) if kind is nn.LSTM else (state(P),)
    words = {k: v for f in chosen for k, v in WORDS.get(f, {}).items()}
    return BY_NAME[name.split("_")[0]], module, states, words


def nn_gradients(outputs, module, data, states, weights):
    return torch.autograd.grad(outputs, [data, *states, *module.parameters()], weights)


@pytest.mark.parametrize("name", NN)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_torch_nn(name, reverse, generator):
    """Values and gradients; the other way round as the second direction of a bidirectional layer."""
    check_torch_nn(name, reverse, generator)


def check_torch_nn(
    name, reverse, generator, function=None, factor=1.0, dtype=torch.float64, **sizes
):
    r, module, states, words = nn_case(
        name, generator, directions=1 + reverse, dtype=dtype, **sizes
    )
    data = torch.randn(3, 9, 4, generator=generator).to(dtype).requires_grad_()
    at = int(reverse)
    y, final = module(data, states if len(states) > 1 else states[0])
    final = final if isinstance(final, tuple) else (final,)
    want = [y.chunk(1 + at, -1)[at], *[s[at] for s in final]]
    project, given = from_nn(module, "_l0_reverse" if reverse else "_l0")
    given |= dict(zip(r.states, [s[at][:, None] for s in states], strict=True))
    got = r.call(function or r.reference, given | {"x": project(data)}, reverse=reverse, **words)
    got = [g.squeeze(-2) for g in got]
    for g, w in zip(got, want, strict=True):
        close(g, w.double(), dtype, factor=factor)
    weights = cotangents(want, generator)
    mine, theirs = (
        torch.autograd.grad(out, [data, *states, *module.parameters()], weights, allow_unused=True,
                            retain_graph=True)
        for out in (got, want)
    )  # fmt: skip
    for g, w in zip(mine, theirs, strict=True):
        if g is None:  # of the other direction
            assert w is None or not w.any()
        else:
            close(g, w.double(), dtype, grad=True, factor=factor)


@pytest.mark.parametrize("name", NN)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_torch_nn_packed(name, reverse, generator):
    """A PackedSequence's sequences, end to end."""
    check_torch_nn_packed(name, reverse, generator)


def check_torch_nn_packed(name, reverse, generator, function=None, factor=1.0):
    lengths, at = [4, 1, 6], int(reverse)
    r, module, states, words = nn_case(name, generator, directions=1 + reverse)
    rows = [torch.randn(n, 4, generator=generator).double() for n in lengths]
    packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    y, final = module(packed, states if len(states) > 1 else states[0])
    y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    y = torch.cat([row[:n] for row, n in zip(y, lengths, strict=True)]).chunk(1 + at, -1)[at]
    final = final if isinstance(final, tuple) else (final,)
    project, given = from_nn(module, "_l0_reverse" if reverse else "_l0")
    given |= dict(zip(r.states, [s[at][:, None] for s in states], strict=True))
    cu = torch.tensor(np.cumsum([0, *lengths]))
    x = project(torch.cat(rows)[None])
    got = r.call(function or r.reference, given | {"x": x}, reverse=reverse, cu_seqlens=cu, **words)
    for g, w in zip(got, [y[None], *[s[at] for s in final]], strict=True):
        close(g.squeeze(-2), w, factor=factor)


@pytest.mark.parametrize("name", ["lstm", "gru", "elman", "elman_relu"])
def test_torch_nn_cells(name, generator):
    kinds = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "elman": nn.RNNCell}
    r = BY_NAME[name.split("_")[0]]
    words = {"nonlinearity": "relu"} if name == "elman_relu" else {}
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    cell = kinds[r.name](4, 5, dtype=torch.float64, **words)
    project, given = from_nn(cell, "")
    data = torch.randn(3, 6, 4, generator=generator).double()
    states = [torch.randn(3, 5, generator=generator).double() for _ in r.states]
    given |= dict(zip(r.states, [s[:, None] for s in states], strict=True))
    got = r.call(r.reference, given | {"x": project(data)}, **words)
    for t in range(6):
        after = cell(data[:, t], tuple(states) if len(states) > 1 else states[0])
        states = list(after) if len(states) > 1 else [after]
        close(got[0][:, t, 0], states[0])
    for g, w in zip(got[1:], states, strict=True):
        close(g[:, 0], w)


# ---- tables worked out by hand: one unit, the loss is sum(h) + sum(weight * final state) ----
HALF = LN3 / 2  # tanh of it is 1/2; sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
# ln(i'), what sigmoid and tanh have to see; the gates' weights R
SLSTM = {"i": [LN2, -LN2], "f": [0, LN3], "z": [HALF, -HALF], "o": [0, LN3]}
SLSTM_R, SLSTM_STATE, SLSTM_WEIGHTS = (1, 2, -1, 3), (1, 2, 1, 0), (1, 3, 6, 3)


def slstm_table():
    """With C = exp(m) c and so on. Step 1: f = 1/2, i = 2; step 2: f = 3/4, i = 1/2.

    C: 2/2 + 2/2 = 2,  3/4 * 2 - 1/4 = 5/4;  N: 1/2 + 2 = 5/2,  15/8 + 1/2 = 19/8
    exp(m): max(1/2, 2) = 2,  max(3/2, 1/2) = 3/2;  h: 1/2 * 2 / (5/2),  3/4 * (5/4) / (19/8)
    """
    h = [Q(2, 5), Q(15, 38)]
    final = [h[1], Q(5, 6), Q(19, 12), np.log(1.5)]
    r = dict(zip("ifzo", SLSTM_R, strict=True))
    # The last step: h has 1 from the sum and 1 from the final state.
    g = Q(2)
    dC, dN = g * Q(3, 4) * Q(8, 19) + 3 * Q(2, 3), -g * h[1] * Q(8, 19) + 6 * Q(2, 3)
    dM = (
        -3 * final[1] * Q(2, 3) - 6 * final[2] * Q(2, 3) + 3 * Q(2, 3)
    )  # of exp(m) = f exp(m before)
    two = {
        "i": Q(1, 2) * (-dC / 2 + dN),
        "f": Q(3, 16) * (2 * dC + Q(5, 2) * dN + 2 * dM),
        "z": Q(3, 4) * Q(1, 2) * dC,
        "o": g * h[1] / 4,
    }
    # The first: h is seen by the four gates of the second.
    g = 1 + sum(r[k] * two[k] for k in r)
    dC = Q(3, 4) * dC + g * Q(1, 2) * Q(2, 5)
    dN = Q(3, 4) * dN - g * h[0] * Q(2, 5)
    dM = Q(3, 4) * dM  # of exp(m) = i
    one = {
        "i": 2 * (dC / 2 + dN + dM),
        "f": Q(1, 4) * (2 * dC + dN),
        "z": Q(3, 4) * 2 * dC,
        "o": g * h[0] / 2,
    }
    before = sum(r[k] * one[k] for k in r)
    # m before is in C0 = exp(m) c and N0 = exp(m) n
    grads = [before, dC / 2, dN / 2, (2 * dC + dN) / 2]
    return h, final, one, two, grads


def test_slstm_table():
    h, final, one, two, of_states = slstm_table()
    seen = [SLSTM_STATE[0], h[0]]
    x = [
        [SLSTM[k][t] - r * float(seen[t]) for k, r in zip("ifzo", SLSTM_R, strict=True)]
        for t in (0, 1)
    ]
    leaves = {
        "x": torch.tensor(x, dtype=torch.float64).reshape(1, 2, 4, 1, 1),
        "R": torch.tensor(SLSTM_R).double().reshape(4, 1, 1, 1),
        "bias": torch.zeros(4, 1, 1).double(),
    }
    leaves |= {k: torch.tensor([[[s]]]).double() for k, s in zip("hcnm", SLSTM_STATE, strict=True)}
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    out = BY_NAME["slstm"].call(slstm_reference, leaves)
    check_table(out, h, final, leaves, SLSTM_WEIGHTS, {
        "x": [[one[k] for k in "ifzo"], [two[k] for k in "ifzo"]],
        "R": [one[k] * seen[0] + two[k] * seen[1] for k in "ifzo"],
        "bias": [one[k] + two[k] for k in "ifzo"],
        **dict(zip("hcnm", of_states, strict=True)),
    })  # fmt: skip


def check_table(out, h, final, leaves, weights, grads):
    wanted = [[float(y) for y in h], *[[float(y)] for y in final]]
    for g, w in zip(out, wanted, strict=True):
        close(g.flatten(), torch.tensor(w, dtype=torch.float64))
    total = out[0].sum() + sum(w * y.sum() for w, y in zip(weights, out[1:], strict=True))
    for (name, leaf), g in zip(
        leaves.items(), torch.autograd.grad(total, list(leaves.values())), strict=True
    ):
        want = np.array(grads[name], dtype=object).astype(float).reshape(leaf.shape)
        close(g, torch.from_numpy(want), grad=True, name=name)


def test_lstm_table():
    """Two steps from h = 1, c = 1 with gates (i, f, tanh g, o) of (1/2, 1/4, 1/2, 3/4), then (1/4, 1/2,
    -1/2, 1/2): c = 1/4 + 1/4 = 1/2, then 1/4 - 1/8 = 1/8. Loss: sum(h) + h_T + 2 c_T."""
    R = dict(zip("ifgo", (1, -2, 3, 2), strict=True))
    pre = {"i": [0, -LN3], "f": [-LN3, 0], "g": [HALF, -HALF], "o": [LN3, 0]}
    tanh = np.tanh([1 / 2, 1 / 8])
    h = [3 / 4 * tanh[0], 1 / 2 * tanh[1]]
    dc = 2 * 1 / 2 * (1 - tanh[1] ** 2) + 2
    two = {
        "i": dc * -1 / 2 * 3 / 16,
        "f": dc * 1 / 2 * 1 / 4,
        "g": dc * 1 / 4 * 3 / 4,
        "o": 2 * tanh[1] * 1 / 4,
    }
    dh = 1 + sum(R[k] * two[k] for k in R)
    dc = 1 / 2 * dc + dh * 3 / 4 * (1 - tanh[0] ** 2)
    one = {
        "i": dc * 1 / 2 * 1 / 4,
        "f": dc * 1 * 3 / 16,
        "g": dc * 1 / 2 * 3 / 4,
        "o": dh * tanh[0] * 3 / 16,
    }
    seen = [1, h[0]]
    x = [[pre[k][t] - R[k] * seen[t] for k in "ifgo"] for t in (0, 1)]
    leaves = {
        "x": torch.tensor(x, dtype=torch.float64).reshape(1, 2, 4, 1, 1),
        "R": torch.tensor([*R.values()]).double().reshape(4, 1, 1, 1),
        "h": torch.ones(1, 1, 1).double(),
        "c": torch.ones(1, 1, 1).double(),
    }
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    out = BY_NAME["lstm"].call(lstm_reference, leaves)
    check_table(out, h, [h[1], 1 / 8], leaves, (1, 2), {
        "x": [[one[k] for k in "ifgo"], [two[k] for k in "ifgo"]],
        "R": [one[k] * seen[0] + two[k] * seen[1] for k in "ifgo"],
        "h": sum(R[k] * one[k] for k in R),
        "c": dc / 4,
    })  # fmt: skip


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_table(reset_after):
    """Two steps from h = 1 with (r, z, n) of (1/2, 1/4, 1/2), then (3/4, 1/2, -1/2): h = 3/8 + 1/4 = 5/8,
    then -1/4 + 5/16 = 1/16. Loss: sum(h) + h_T. With one unit the reset gate may be on either side
    of R, but not of the bias b = 1 of n."""
    R = dict(zip("rzn", (2, -1, 3), strict=True))
    h, gates = [Q(5, 8), Q(1, 16)], [(Q(1, 2), Q(1, 4), Q(1, 2)), (Q(3, 4), Q(1, 2), Q(-1, 2))]
    pre = [(0.0, -LN3, HALF), (LN3, 0.0, -HALF)]
    seen, x, das, dh, dx = [Q(1), h[0]], [], [None, None], Q(0), [None, None]
    for t in (0, 1):
        r, inner = gates[t][0], R["n"] * seen[t]
        a = r * (inner + 1) if reset_after else r * inner + 1
        x.append(
            [
                pre[t][0] - float(R["r"] * seen[t]),
                pre[t][1] - float(R["z"] * seen[t]),
                pre[t][2] - float(a),
            ]
        )
    dh = Q(1)
    for t in (1, 0):
        (r, z, n), old = gates[t], seen[t]
        dh = dh + 1
        dn, dz = dh * (1 - z) * (1 - n * n), dh * (old - n) * z * (1 - z)
        dr = dn * (R["n"] * old + (1 if reset_after else 0)) * r * (1 - r)
        dx[t], das[t] = [dr, dz, dn], [dr, dz, dn * r]
        dh = dh * z + R["r"] * dr + R["z"] * dz + R["n"] * dn * r
    leaves = {
        "x": torch.tensor(x, dtype=torch.float64).reshape(1, 2, 3, 1, 1),
        "R": torch.tensor([*R.values()]).double().reshape(3, 1, 1, 1),
        "bias": torch.tensor([0, 0, 1]).double().reshape(3, 1, 1),
        "h": torch.ones(1, 1, 1).double(),
    }
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    out = BY_NAME["gru"].call(gru_reference, leaves, reset_after=reset_after)
    of_bias = [
        y[:2] + [y[2] * g[0] if reset_after else y[2]] for y, g in zip(dx, gates, strict=True)
    ]
    check_table(out, h, [h[1]], leaves, (1,), {
        "x": dx,
        "R": [das[0][k] * seen[0] + das[1][k] * seen[1] for k in range(3)],
        "bias": [of_bias[0][k] + of_bias[1][k] for k in range(3)],
        "h": dh,
    })  # fmt: skip


@pytest.mark.parametrize("name", ["elman", "ind_rnn"])
def test_relu_table(name):
    """h = 2; 1 + 2/2 = 2, relu(-3 + 2/2) = 0, 4 + 0 = 4. Loss: sum(h) + 2 h_T. Step 3 has 3, step 2 none,
    as it is at 0, and step 1 its own 1."""
    r = BY_NAME[name]
    shape = {"x": (1, 3, 1, 1, 1), "R": (1, 1, 1, 1), "h": (1, 1, 1)}
    shape = {"x": (1, 3, 1), "u": (1,), "h": (1, 1)} if r.dense else shape
    numbers = {"x": [1, -3, 4], "R": [0.5], "u": [0.5], "h": [2]}
    leaves = {
        k: torch.tensor(numbers[k]).double().reshape(s).requires_grad_() for k, s in shape.items()
    }
    out = r.call(r.reference, leaves, nonlinearity="relu")
    grads = {"x": [1, 0, 3], "R": 2 * 1 + 0 * 3, "u": 2, "h": 0.5}
    check_table(out, [2, 0, 4], [4], leaves, (2,), grads)


def test_every_operator_is_here():
    """With its table and its second formula."""
    assert set(BY_NAME) == {case.name for case in GATED}


# ---- a peer ----
@pytest.mark.parametrize("with_state", [False, True])
def test_slstm_of_xlstm(with_state, generator):
    """The package's own plain cell. (A state of which some n are 0 it takes for one of which none is.)"""
    pytest.importorskip("xlstm")
    from xlstm.blocks.slstm.src.vanilla.slstm import slstm_forward_pointwise

    r = BY_NAME["slstm"]
    leaves, _ = r.draw(() if with_state else ("no_state",), generator, H=2, K=3)
    x, R, bias = leaves["x"], leaves["R"], leaves["bias"]
    zeros = torch.zeros(2, 2, 3).double()
    states = torch.stack([leaves.get(k, zeros).flatten(1) for k in r.states])
    out = []
    for t in range(x.shape[1]):
        u = states[0].unflatten(-1, (2, 3))
        product = torch.einsum("ghkp,bhp->bghk", R, u).flatten(1)
        states, _ = slstm_forward_pointwise(
            x[:, t].flatten(1), product, bias.flatten()[None], states, {}
        )
        out.append(states[0])
    got = r.call(r.reference, leaves)
    close(got[0].flatten(2), torch.stack(out, 1))
    for g, w in zip(got[1:], states, strict=True):
        close(g.flatten(1), w)


# ---- what has to hold ----
@pytest.mark.parametrize("m", [-torch.inf, 0.0, 1e4])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_slstm_without_a_past(m, forget_gate, generator):
    """Where n is 0, m is not looked at, unit by unit."""
    r = BY_NAME["slstm"]
    leaves, _ = r.draw((), generator)
    empty = torch.rand(leaves["n"].shape, generator=generator) < 0.5
    for name in ("c", "n", "m"):
        leaves[name] = torch.where(empty, 0.0, leaves[name])
    want = r.call(r.reference, leaves, forget_gate=forget_gate)
    other = leaves | {"m": torch.where(empty, m, leaves["m"])}
    other = {k: y.clone().requires_grad_() for k, y in other.items()}
    got = r.call(r.reference, other, forget_gate=forget_gate)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    grads = torch.autograd.grad(sum(y.sum() for y in got), list(other.values()))
    for name, g in zip(other, grads, strict=True):
        assert g.isfinite().all(), name
    assert not grads[list(other).index("m")][empty].any()


@over
@pytest.mark.parametrize("size", [1e4, -1e4, "mixed"])
def test_far_gates(recurrence, size, generator):
    """Nothing overflows, forwards or backwards."""
    for words in ({}, {"forget_gate": "exp", "normalizer": "at_least_one"}):
        if words and recurrence.name != "slstm":
            continue
        leaves, _ = recurrence.draw((), generator)
        far = torch.rand(leaves["x"].shape, generator=generator) < 0.3
        sign = 1 if size != "mixed" else torch.randint(-1, 2, far.shape, generator=generator)
        leaves["x"] = torch.where(far, (1e4 if size == "mixed" else size) * sign, leaves["x"])
        leaves = {k: y.requires_grad_() for k, y in leaves.items()}
        out = recurrence.call(recurrence.reference, leaves, **words)
        for y in (*out, *torch.autograd.grad(sum(y.sum() for y in out), list(leaves.values()))):
            assert y.isfinite().all()


@over
def test_reset_is_a_new_sequence(recurrence, generator):
    """A reset before a step is the end of one sequence and the beginning of another, from zeros."""
    leaves, _ = recurrence.draw((), generator, B=1)
    leaves = {k: y.requires_grad_() for k, y in leaves.items()}
    reset = torch.zeros(1, 7, dtype=torch.bool)
    reset[:, 3] = True
    whole = recurrence.call(recurrence.reference, leaves, reset=reset)
    first = {k: y[:, :3] if k == "x" else y for k, y in leaves.items()}
    second = {
        k: y[:, 3:] if k == "x" else y for k, y in leaves.items() if k not in recurrence.states
    }
    one = recurrence.call(recurrence.reference, first)
    two = recurrence.call(recurrence.reference, second)
    close(whole[0], torch.cat([one[0], two[0]], 1))
    for g, w in zip(whole[1:], two[1:], strict=True):
        close(g, w)
    states = [leaves[k] for k in recurrence.states]
    grads = torch.autograd.grad(whole[0][:, 3:].sum() + sum(y.sum() for y in whole[1:]), states)
    assert not any(g.any() for g in grads), "a gradient passes a reset"


@over
def test_gradient_clip(recurrence, generator):
    """None is infinity; 0 leaves what does not go through R; between, every element is bounded."""
    leaves, _ = recurrence.draw((), generator, grad=True)

    def grads(**options):
        out = recurrence.call(recurrence.reference, leaves, **options)
        return torch.autograd.grad(100 * out[0].sum(), list(leaves.values()), allow_unused=True)

    free, bound, cut = grads(), grads(gradient_clip=1e-3), grads(gradient_clip=0.0)
    for g, w in zip(grads(gradient_clip=torch.inf), free, strict=True):
        assert (g is None and w is None) or torch.equal(g, w)
    h = list(leaves).index("h")
    assert not torch.equal(bound[0], free[0]) and not torch.equal(bound[0], cut[0])
    if recurrence.name == "gru":  # h goes on past R, too
        assert cut[h].any()
    else:
        assert not cut[h].any() and bound[h].abs().max() == 1e-3
    for bad in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="gradient_clip is .*, expected at least 0"):
            grads(gradient_clip=bad)


def test_gradient_clip_by_hand():
    """h1 = relu(x1), h2 = relu(x2 + 3 h1) and the loss 2 h2 + h1: through R come 6, of which 4 are
    let by."""
    x = torch.tensor([1.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1, 1).requires_grad_()
    R = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64, requires_grad=True)
    h, _ = elman_reference(x, R, nonlinearity="relu", gradient_clip=4.0)
    grads = torch.autograd.grad((h.flatten() * torch.tensor([1.0, 2.0])).sum(), (x, R))
    assert grads[0].flatten().tolist() == [5.0, 2.0] and grads[1].item() == 2.0


@over
def test_zoneout(recurrence, generator):
    """1 updates, 0 keeps, and the mask has no gradient."""
    leaves, _ = recurrence.draw((), generator)
    shape = leaves["h"].shape
    keep = torch.zeros(shape[0], 7, *shape[1:], dtype=torch.float64, requires_grad=True)
    out = recurrence.call(recurrence.reference, leaves, h_update=keep)
    assert torch.equal(out[0], leaves["h"][:, None].expand_as(out[0]))
    assert not out[0].requires_grad
    whole = recurrence.call(recurrence.reference, leaves, h_update=torch.ones_like(keep))
    for g, w in zip(whole, recurrence.call(recurrence.reference, leaves), strict=True):
        assert torch.equal(g, w)


@over
def test_nothing(recurrence, generator):
    """No steps, no rows, no sequences."""
    for sizes in ({"T": 0}, {"B": 0}, {"H": 0}):
        leaves, _ = recurrence.draw((), generator, **sizes)
        out = recurrence.call(recurrence.reference, leaves)
        assert out[0].shape[:2] == leaves["x"].shape[:2]
        for y, name in zip(out[1:], recurrence.states, strict=True):
            assert y.shape == leaves[name].shape
            assert sizes.get("T", 1) or torch.equal(y, leaves[name])
    leaves, _ = recurrence.draw(("no_state",), generator, B=1, T=0)
    out = recurrence.call(recurrence.reference, leaves, cu_seqlens=torch.tensor([0]))
    assert out[1].shape[0] == 0


WRONG = [
    ("slstm", {"forget_gate": "relu"}, "slstm: forget_gate is 'relu', expected 'sigmoid' or 'exp'"),
    (
        "slstm",
        {"normalizer": "max"},
        "slstm: normalizer is 'max', expected 'sum' or 'at_least_one'",
    ),
    ("elman", {"nonlinearity": "x"}, "elman: nonlinearity is 'x', expected 'tanh' or 'relu'"),
    ("ind_rnn", {"nonlinearity": "x"}, "ind_rnn: nonlinearity is 'x', expected 'tanh' or 'relu'"),
]


@pytest.mark.parametrize("name, options, text", WRONG)
def test_words(name, options, text, generator):
    r = BY_NAME[name]
    leaves, _ = r.draw((), generator)
    with pytest.raises(ValueError) as caught:
        r.call(r.reference, leaves, **options)
    assert str(caught.value) == text


def test_what_does_not_go_together(generator):
    leaves, _ = BY_NAME["gru"].draw(("norm",), generator)
    with pytest.raises(ValueError, match="gru: norm_weight .* reset_after"):
        BY_NAME["gru"].call(gru_reference, leaves, reset_after=False)
    leaves, _ = BY_NAME["lstm"].draw(("cell_norm_bias",), generator)
    del leaves["cell_norm_weight"]
    with pytest.raises(ValueError, match="lstm: cell_norm_bias .* cell_norm_weight"):
        BY_NAME["lstm"].call(lstm_reference, leaves)
