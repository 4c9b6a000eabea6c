"""The references of the matrix memories against tables checked by hand, their parallel forms in
numpy, peers, and what has to hold of them.

Nothing here runs an operator: it is what the operators' own tests trust.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cases import close
from oracle import LN2, LN3, SLOPES, sigmoid

from torch_ext.linear_attention import linear_attention, linear_attention_reference
from torch_ext.mlstm import mlstm, mlstm_reference, mlstm_step
from torch_ext.retention import retention_reference
from torch_ext.ssd import ssd_reference

# ---- the operators ----
SIZES = {"B": 2, "T": 7, "H": 4, "G": 2, "K": 3, "V": 2}
MLSTM = {"q": "BTGK", "k": "BTGK", "v": "BTHV", "i": "BTH", "f": "BTH"}
MLSTM_STATE = {"C": "BHKV", "n": "BHK", "m": "BH"}
LINEAR = {"q": "BTGK", "k": "BTGK", "v": "BTHV"}
LINEAR_STATE = {"S": "BHKV", "z": "BHK"}
RETENTION = LINEAR | {"decay": "H"}
SSD = {"x": "BTHV", "dt": "BTH", "A": "H", "B": "BTGK", "C": "BTGK"}
SSD_ALL = SSD | {"D": "H", "z": "BTHV", "dt_bias": "H"}


@dataclass
class Memory:
    """A reference with one choice of its options and optional arguments. Of the leaves' dimensions
    a letter each: K and V are those of the state."""

    name: str
    reference: Callable
    parallel: Callable
    inputs: dict[str, str]
    states: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return self.name

    def shape(self, letters, **sizes):
        return tuple((SIZES | sizes)[d] for d in letters)

    def leaves(self, generator, dtype=torch.float64, rows=None, **sizes):
        """Inputs and states by name; the states have `rows` rows."""
        sizes = SIZES | sizes
        out = {}
        for name, letters in (self.inputs | self.states).items():
            state = name in self.states
            B = rows if state and rows is not None else sizes["B"]
            x = torch.randn(
                self.shape(letters, **sizes | {"B": B}), generator=generator, dtype=torch.float64
            )
            if name == "A":
                x = -torch.exp(x)
            elif name == "decay":
                x = torch.sigmoid(x + 2)
            elif name == "z" and state or self.positive and name in "qk":
                x = x.abs() + 0.1  # what is divided by stays away from 0
            elif name == "dt" and not self.options.get("dt_softplus"):
                x = x.abs()
            wide = dtype if dtype == torch.float64 else torch.float32
            out[name] = x.to(wide if state else dtype)
        return out

    @property
    def positive(self):
        return self.options.get("feature_map") == "identity" and self.options["normalize"]

    def __call__(self, leaves, **options):
        """h and the final states, by name. `leaves` may be without states."""
        given = {name: leaves[name] for name in self.inputs if leaves.get(name) is not None}
        states = tuple(leaves[name] for name in self.states if name in leaves)
        if states:
            given["initial_state"] = states if len(self.states) > 1 else states[0]
        h, final = self.reference(**given, **self.options | options)
        return h, dict(zip(self.states, final if len(self.states) > 1 else (final,), strict=True))

    def over_time(self):
        return [name for name, letters in self.inputs.items() if letters.startswith("BT")]


# ---- the parallel forms: every step from all those before it at once, in numpy ----
def attend(q, k, v, log_decay, weight, S):
    """What queries read of one head's memory, and what it holds in the end."""
    F, T = np.cumsum(log_decay), len(v)
    seen = np.tril(np.ones((T, T)))
    paths = np.exp(np.where(seen > 0, F[:, None] - F, 0)) * seen * weight
    left = F[-1] if T else 0.0
    h = (paths * (q @ k.T)) @ v + np.exp(F)[:, None] * (q @ S)
    return h, (k * (np.exp(left - F) * weight)[:, None]).T @ v + np.exp(left) * S


def parallel_mlstm(
    x, state, scale=None, eps=1e-6, input_gate="exp", normalize=True, divisors=None, **_
):
    """Without a stabiliser: m only says what the returned states are divided by. `divisors` are
    those to take instead of the head's own."""
    C0, n0, m0 = state
    T, H, _ = x["v"].shape
    h, C, n, m, used = np.zeros_like(x["v"]), C0.copy(), n0.copy(), m0.copy(), np.zeros((T, H))
    for head in range(H):
        group = head // (H // x["q"].shape[1])
        q, k, v = x["q"][:, group], x["k"][:, group], x["v"][:, head]
        q = q * (q.shape[1] ** -0.5 if scale is None else scale)
        i, log_f = x["i"][:, head], -np.logaddexp(0, -x["f"][:, head])
        unit, weight, m_t = 1.0, sigmoid(i), np.zeros(T)
        if input_gate == "exp":
            F = np.cumsum(log_f)
            unit, weight = np.exp(m0[head]), np.exp(i)
            m_t = np.array([max([F[t] + m0[head], *(F[t] - F + i)[: t + 1]]) for t in range(T)])
            m[head] = m_t[-1] if T else m0[head]
        numerator, C_T = attend(q, k, v, log_f, weight, unit * C0[head])
        end = np.exp(-m[head]) if input_gate == "exp" else 1.0
        C[head] = C_T * end
        if not normalize:
            h[:, head] = numerator
            continue
        r, n_T = attend(q, k, np.ones((T, 1)), log_f, weight, unit * n0[head][:, None])
        n[head] = n_T[:, 0] * end
        floor = eps * (np.exp(m_t) if input_gate == "exp" else 1.0)
        used[:, head] = np.maximum(np.abs(r[:, 0]), 1) + floor
        d = used[:, head] if divisors is None else divisors[:, head]
        h[:, head] = numerator / d[:, None]
    return h, (C, n, m), used


def parallel_linear_attention(
    x, state, scale=1.0, feature_map="elu", normalize=True, eps=1e-6, **_
):
    phi = {
        "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
        "relu": lambda x: np.maximum(x, 0),
        "identity": lambda x: x,
    }[feature_map]
    h, S, z = np.zeros_like(x["v"]), state[0].copy(), state[1].copy()
    T, H, _ = h.shape
    for head in range(H):
        group = head // (H // x["q"].shape[1])
        q, k, v = scale * phi(x["q"][:, group]), phi(x["k"][:, group]), x["v"][:, head]
        h[:, head], S[head] = attend(q, k, v, np.zeros(T), 1.0, S[head])
        if normalize:
            h[:, head] /= (q @ (z[head] + np.cumsum(k, 0))[:, :, None])[:, :, 0].diagonal()[
                :, None
            ] + eps
            z[head] += k.sum(0)
    return h, (S, z)


def parallel_retention(x, state, scale=None, **_):
    h, S = np.zeros_like(x["v"]), state[0].copy()
    T, H, _ = h.shape
    for head in range(H):
        group = head // (H // x["q"].shape[1])
        gamma = x["decay"][head] if "decay" in x else 1 - 2.0 ** (-5 - head)
        q = x["q"][:, group] * (x["q"].shape[2] ** -0.5 if scale is None else scale)
        log_decay = np.full(T, np.log(gamma))
        h[:, head], S[head] = attend(q, x["k"][:, group], x["v"][:, head], log_decay, 1.0, S[head])
    return h, (S,)


def parallel_ssd(x, state, dt_softplus=False, **_):
    y, S = np.zeros_like(x["x"]), state[0].copy()
    T, H, _ = y.shape
    for head in range(H):
        group = head // (H // x["B"].shape[1])
        dt = x["dt"][:, head] + (x["dt_bias"][head] if "dt_bias" in x else 0)
        dt = np.logaddexp(0, dt) if dt_softplus else dt
        y[:, head], final = attend(
            x["C"][:, group], x["B"][:, group], x["x"][:, head], dt * x["A"][head], dt, S[head].T
        )
        S[head] = final.T
        if "D" in x:
            y[:, head] += x["D"][head] * x["x"][:, head]
        if "z" in x:
            y[:, head] *= x["z"][:, head] * sigmoid(x["z"][:, head])
    return y, (S,)


def parallel(memory, leaves, cu_seqlens=None, reverse=False, **options):
    """The parallel form of every sequence: h, the final states by name, and what else it gives."""
    arrays = {name: x.detach().numpy() for name, x in leaves.items()}
    over_time, order = memory.over_time(), -1 if reverse else 1
    rows = arrays[over_time[0]].shape[0]
    bounds = [(r, slice(None)) for r in range(rows)]
    if cu_seqlens is not None:
        bounds = [(0, slice(p, q)) for p, q in pairwise(cu_seqlens)]
    found = []
    for s, (row, part) in enumerate(bounds):
        x = {n: arrays[n] for n in memory.inputs if n in arrays}
        x |= {n: arrays[n][row, part][::order] for n in over_time}
        state = tuple(arrays[n][s] for n in memory.states)
        h, *rest = memory.parallel(x, state, **memory.options | options)
        found.append((h[::order], *rest))
    hs = [f[0] for f in found]
    h = np.stack(hs) if cu_seqlens is None else np.concatenate(hs)[None]
    finals = [np.stack([f[1][j] for f in found]) for j in range(len(memory.states))]
    return h, dict(zip(memory.states, finals, strict=True)), [f[2:] for f in found]


def mlstm_(name, **options):
    return Memory(name, mlstm_reference, parallel_mlstm, MLSTM, MLSTM_STATE, options)


def linear_(name, **options):
    parts = linear_attention_reference, parallel_linear_attention
    return Memory(name, *parts, LINEAR, LINEAR_STATE, options)


def retention_(name, inputs=RETENTION, **options):
    return Memory(name, retention_reference, parallel_retention, inputs, {"S": "BHKV"}, options)


def ssd_(name, inputs, **options):
    return Memory(name, ssd_reference, parallel_ssd, inputs, {"state": "BHVK"}, options)


MEMORIES = [
    mlstm_("mlstm"),
    mlstm_("mlstm_eps_scale", eps=0.5, scale=1.5),
    mlstm_("mlstm_sigmoid", input_gate="sigmoid"),
    mlstm_("mlstm_sigmoid_plain", input_gate="sigmoid", normalize=False),
    linear_("linear_attention"),
    linear_("linear_attention_relu", feature_map="relu", eps=0.5, scale=2.0),
    linear_("linear_attention_identity", feature_map="identity", normalize=True, scale=0.5),
    linear_("linear_attention_plain", feature_map="identity", normalize=False),
    retention_("retention"),
    retention_("retention_default", LINEAR, scale=2.0),
    ssd_("ssd", SSD_ALL, dt_softplus=True),
    ssd_("ssd_plain", SSD),
    ssd_("ssd_D_per_channel", SSD | {"D": "HV"}),
]
over = pytest.mark.parametrize("memory", MEMORIES, ids=str)
FORMS = ["plain", "reverse", "packed", "packed_reverse"]
PACKED = [0, 0, 3, 4, 7, 7]


# ---- tables ----
@dataclass
class Table:
    """One sequence and one head, (T, ...) over time. The loss is sum(h) + sum(grad_final *
    final)."""

    name: str
    memory: Memory
    sizes: dict[str, int]
    inputs: dict[str, list]
    state: dict[str, list]
    h: list
    final: dict[str, list]
    grad_final: dict[str, list]
    grads: dict[str, list]


# f' = 1/2, 3/4, 1/4 and, where exponential, i' = 2, 3, 1/2, before they are divided by exp(m)
EXP_GATES = {
    "q": [2, 2, 1 / 2],
    "k": [1, -1, 2],
    "v": [3, 1, -2],
    "i": [LN2, LN3, -LN2],
    "f": [0, LN3, -LN3],
}
EXP_FORWARD = {
    # With c = exp(m) C and so on: c: 2/2 + 2*3 = 7,  3/4 * 7 - 3 = 9/4,  9/16 - 2 = -23/16
    # n: 1/2 + 2 = 5/2,  15/8 - 3 = -9/8,  -9/32 + 1 = 23/32
    # exp(m): max(1/2, 2) = 2,  max(3/2, 3) = 3,  max(3/4, 1/2) = 3/4
    # n q: 5, -9/4, 23/64;  divisor: 5 + 2/2,  9/4 + 3/2,  1 + 3/8
    "state": {"C": [2], "n": [1], "m": [0]},
    "h": [14 / 6, 4.5 / 3.75, -23 / 32 * 8 / 11],
    "final": {"C": [-23 / 12], "n": [23 / 24], "m": [np.log(3 / 4)]},
    "grad_final": {"C": [12], "n": [12], "m": [1]},
}
ONE = {"B": 1, "T": 3, "H": 1, "G": 1, "K": 1, "V": 1}
TABLES = [
    Table(
        "mlstm",
        mlstm_("mlstm", eps=0.5, scale=1.0),
        ONE,
        EXP_GATES,
        **EXP_FORWARD,
        # of the numerators u = 1 / divisor: 1/6, 4/15, 8/11
        # of n q: -sign h u: -7/18, 8/25, and 0 where 1 is larger
        # of exp(m) in the divisor: -h u / 2: -7/36, -4/25, 23/121
        # dq = u c + (of n q) n.  Of c, n and exp(m), the last first:
        #   c3: 1/2 * 8/11 + 12 * 4/3 = 180/11;  n3: 12 * 4/3 = 16
        #   M3: 23/121 + 4/3 + 16/9 * (12 * 23/16 - 12 * 23/32) = 23/121 + 50/3
        #   c2: 2 * 4/15 + 45/11 = 763/165;  n2: 16/25 + 4 = 116/25;  M2: -4/25 + 1/4 of M3
        #   c1: 1/3 + 3/4 * 763/165 = 2509/660;  n1: -7/9 + 87/25 = 608/225;  M1: -7/36
        # M3 comes from M2, by f'; M2 and M1 are the input gates
        # df' = (of c) c before + (of n) n before (+ 3 of M3);  df = f' (1 - f') df'
        # di' = (of c) k v + (of n) k (+ that of M);  di = i' di'
        grads={
            "q": [7 / 36, 6 / 25, -23 / 22],
            "k": [
                2 * (3 * 2509 / 660 + 608 / 225),
                3 * (763 / 165 + 116 / 25),
                1 / 2 * (-2 * 180 / 11 + 16),
            ],
            "v": [2 * 2509 / 660, -3 * 763 / 165, 180 / 11],
            "i": [
                2 * (3 * 2509 / 660 + 608 / 225 - 7 / 36),
                3 * (-763 / 165 - 116 / 25 - 4 / 25 + (23 / 121 + 50 / 3) / 4),
                1 / 2 * (-4 * 180 / 11 + 2 * 16),
            ],
            "f": [
                1 / 4 * (2 * 2509 / 660 + 608 / 225),
                3 / 16 * (7 * 763 / 165 + 5 / 2 * 116 / 25),
                3 / 16 * (9 / 4 * 180 / 11 - 9 / 8 * 16 + 3 * (23 / 121 + 50 / 3)),
            ],
            "C": [2509 / 1320],
            "n": [304 / 225],
            # a larger m is more of both
            "m": [2 * 2509 / 1320 + 304 / 225],
        },
    ),
    Table(
        "mlstm normalizer_grad=False",
        mlstm_("mlstm", eps=0.5, scale=1.0, normalizer_grad=False),
        ONE,
        EXP_GATES,
        **EXP_FORWARD,
        # as above without what goes through the divisor
        #   c3, c2, c1: the same;  n3, n2, n1: 16, 4, 3
        #   M3: 50/3;  M2: a quarter of that;  M1: 0
        grads={
            "q": [7 / 6, 3 / 5, -23 / 22],
            "k": [
                2 * (3 * 2509 / 660 + 3),
                3 * (763 / 165 + 4),
                1 / 2 * (-2 * 180 / 11 + 16),
            ],
            "v": [2 * 2509 / 660, -3 * 763 / 165, 180 / 11],
            "i": [
                2 * (3 * 2509 / 660 + 3),
                3 * (-763 / 165 - 4 + 50 / 12),
                1 / 2 * (-4 * 180 / 11 + 2 * 16),
            ],
            "f": [
                1 / 4 * (2 * 2509 / 660 + 3),
                3 / 16 * (7 * 763 / 165 + 5 / 2 * 4),
                3 / 16 * (9 / 4 * 180 / 11 - 9 / 8 * 16 + 50),
            ],
            "C": [2509 / 1320],
            "n": [3 / 2],
            "m": [2 * 2509 / 1320 + 3 / 2],
        },
    ),
    Table(
        "mlstm sigmoid",
        mlstm_("mlstm", eps=0.5, scale=1.0, input_gate="sigmoid"),
        ONE,
        # f' = 1/2, 3/4, 1/4;  i' = 1/2, 1/4, 3/4
        {
            "q": [2, 4, 1 / 2],
            "k": [2, -8, 2],
            "v": [3, 1, -2],
            "i": [0, -LN3, LN3],
            "f": [0, LN3, -LN3],
        },
        {"C": [2], "n": [1], "m": [0]},
        # C: 1 + 3 = 4,  3 - 2 = 1,  1/4 - 3 = -11/4;  n: 1/2 + 1,  9/8 - 2,  -7/32 + 3/2 = 41/32
        # n q: 3, -7/2, 41/64;  divisor: 7/2, 4, 3/2
        [16 / 7, 1, -11 / 12],
        {"C": [-11 / 4], "n": [41 / 32], "m": [0]},
        {"C": [4], "n": [4], "m": [0]},
        # u: 2/7, 1/4, 2/3;  of n q: -32/49, 1/4, 0.  Of C and n, the last first:
        #   C3: 1/3 + 4 = 13/3,  C2: 1 + 13/12 = 25/12,  C1: 4/7 + 25/16 = 239/112
        #   n3: 4,  n2: 1 + 1 = 2,  n1: -64/49 + 3/2 = 19/98
        # df = f' (1 - f') (C3 C before + n3 n before): 1/4 * 1749/392,  3/16 * 34/3,  3/16 * 5/6
        # di = i' (1 - i') k (C3 v + n3): 1/4 * 5171/392,  3/16 * -98/3,  3/16 * -28/3
        {
            "q": [8 / 49, 1 / 32, -11 / 6],
            "k": [5171 / 1568, 49 / 48, -7 / 2],
            "v": [239 / 112, -25 / 6, 13 / 2],
            "i": [5171 / 1568, -49 / 8, -7 / 4],
            "f": [1749 / 1568, 17 / 8, 5 / 32],
            "C": [239 / 224],
            "n": [19 / 196],
            "m": [0],
        },
    ),
    Table(
        "linear attention",
        linear_("linear_attention", scale=2.0, eps=5.0),
        {"B": 1, "T": 2, "H": 1, "G": 1, "K": 2, "V": 1},
        # features of q: (1, 2), (3, 1/2), and of k: (2, 1/2), (1/3, 1); slopes 1, or the feature
        # itself where it is below 1
        {"q": [0, 1, 2, -LN2], "k": [1, -LN2, -LN3, 0], "v": [4, 3]},
        {"S": [1, 2], "z": [1, 1]},
        # S: (9, 4), (10, 7);  z: (3, 3/2), (10/3, 5/2)
        # 2 * (9 + 8) / (2 * 6 + 5),  2 * (30 + 7/2) / (2 * (10 + 5/4) + 5)
        [2, 67 / 27.5],
        {"S": [10, 7], "z": [10 / 3, 5 / 2]},
        {"S": [1, 1], "z": [2, 2]},
        # u: 1/17, 2/55;  of the divisor -h u: -2/17, -268/3025
        # of S2: 2 * 2/55 (3, 1/2) + 1 = (67, 57)/55;  of z2: 2 - 536/3025 (3, 1/2)
        # of S1 and z1: 2/17 (1, 2) and -4/17 (1, 2) more
        {
            "q": [
                2 / 17 * (9 - 2 * 3),
                2 / 17 * (4 - 2 * 3 / 2),
                4 / 55 * (10 - 134 / 55 * 10 / 3),
                1 / 2 * 4 / 55 * (7 - 134 / 55 * 5 / 2),
            ],
            "k": [
                4 * (67 / 55 + 2 / 17) + 2 - 1608 / 3025 - 4 / 17,
                1 / 2 * (4 * (57 / 55 + 4 / 17) + 2 - 268 / 3025 - 8 / 17),
                1 / 3 * (3 * 67 / 55 + 2 - 1608 / 3025),
                3 * 57 / 55 + 2 - 268 / 3025,
            ],
            "v": [2 * (67 / 55 + 2 / 17) + 1 / 2 * (57 / 55 + 4 / 17), 67 / 165 + 57 / 55],
            "S": [67 / 55 + 2 / 17, 57 / 55 + 4 / 17],
            "z": [2 - 1608 / 3025 - 4 / 17, 2 - 268 / 3025 - 8 / 17],
        },
    ),
    Table(
        "retention",
        retention_("retention", scale=0.5),
        {"B": 1, "T": 3, "H": 1, "G": 1, "K": 2, "V": 1},
        {"q": [1, 1, 2, -1, 1, 3], "k": [1, 2, 0, 1, 2, -1], "v": [3, 2, 4], "decay": [1 / 2]},
        {"S": [2, 4]},
        # S: (1, 2) + (3, 6),  (2, 4) + (0, 2),  (1, 3) + (8, -4)
        [6, -1, 3],
        {"S": [9, -1]},
        {"S": [2, 2]},
        # of S, the last first: (1/2, 3/2) + 2,  (1, -1/2) + half of it,  (1/2, 1/2) + half of it
        # = (5/2, 7/2), (9/4, 5/4), (13/8, 9/8)
        # ddecay: each by S before: 13/4 + 9/2,  9 + 10,  5 + 21
        {
            "q": [2, 4, 1, 3, 9 / 2, -1 / 2],
            "k": [39 / 8, 27 / 8, 9 / 2, 5 / 2, 10, 14],
            "v": [31 / 8, 5 / 4, 3 / 2],
            "decay": [52.75],
            "S": [13 / 16, 9 / 16],
        },
    ),
    Table(
        "ssd",
        ssd_("ssd", SSD_ALL),
        {"B": 1, "T": 3, "H": 1, "G": 1, "K": 2, "V": 1},
        # steps 1, 2, 1 with the bias, so that decays are 1/2, 1/4, 1/2
        {
            "x": [2, 1, -2],
            "dt": [1 / 2, 3 / 2, 1 / 2],
            "A": [-LN2],
            "B": [1, 0, 2, 1, 0, 1],
            "C": [1, 1, 1, 2, 2, -1],
            "D": [3],
            "z": [LN3, 0, -LN3],
            "dt_bias": [1 / 2],
        },
        {"state": [4, 8]},
        # (2, 4) + 2 (1, 0),  (1, 1) + 2 (2, 1),  (5/2, 3/2) - 2 (0, 1)
        # C S + D x: 8 + 6,  11 + 3,  11/2 - 6;  the gate: 3/4 ln 3, 0, -ln 3 / 4
        [14 * 3 / 4 * LN3, 0, LN3 / 8],
        {"state": [5 / 2, -1 / 2]},
        {"state": [2, 2]},
        # With L = ln 3, of S, the last first: (2 - L/2, 2 + L/4),  (0, 0) + half of it,
        #   3/4 L (1, 1) + a quarter of that = (1/4 + 11/16 L, 1/4 + 25/32 L)
        # into step * x, that by B: 1/4 + 11/16 L,  3 - 3/8 L,  2 + L/4
        # into step * A, decay * S before by it: 3/2 + 9/2 L,  2 - L/8,  8 - 7/8 L
        {
            "x": [1 / 4 + 11 / 16 * LN3 + 9 / 4 * LN3, 6 - 3 / 4 * LN3, 2 + LN3 / 4 - 3 / 4 * LN3],
            "dt": [
                2 * (1 / 4 + 11 / 16 * LN3) - LN2 * (3 / 2 + 9 / 2 * LN3),
                3 - 3 / 8 * LN3 - LN2 * (2 - LN3 / 8),
                -2 * (2 + LN3 / 4) - LN2 * (8 - 7 / 8 * LN3),
            ],
            "A": [3 / 2 + 9 / 2 * LN3 + 2 * (2 - LN3 / 8) + 8 - 7 / 8 * LN3],
            "B": [
                *(2 * (1 / 4 + 11 / 16 * LN3), 2 * (1 / 4 + 25 / 32 * LN3)),
                *(2 * (1 - LN3 / 4), 2 * (1 + LN3 / 8)),
                *(-2 * (2 - LN3 / 2), -2 * (2 + LN3 / 4)),
            ],
            "C": [3 * LN3, 3 * LN3, 0, 0, -5 / 8 * LN3, LN3 / 8],
            "D": [2 * LN3],  # 2 * 3/4 + 2/4
            "z": [14 * SLOPES[2], 14 * SLOPES[1], -SLOPES[0] / 2],
            "dt_bias": [-1 / 2 + 1 / 2 * LN3 - LN2 * (23 / 2 + 7 / 2 * LN3)],  # the sum of ddt
            "state": [1 / 2 * (1 / 4 + 11 / 16 * LN3), 1 / 2 * (1 / 4 + 25 / 32 * LN3)],
        },
    ),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name.replace(" ", "_"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_table(table, dtype):
    memory = table.memory

    def lay(name, numbers, dtype=torch.float64):
        letters = (memory.inputs | memory.states)[name]
        return torch.tensor(numbers, dtype=dtype).reshape(memory.shape(letters, **table.sizes))

    leaves = {
        name: lay(name, x, dtype).requires_grad_()
        for name, x in (table.inputs | table.state).items()
    }
    h, final = memory(leaves)
    close(h.flatten(), torch.tensor(table.h, dtype=torch.float64), dtype, name="h")
    loss = h.sum()
    for name, x in final.items():
        close(x, lay(name, table.final[name]), dtype, name=f"final {name}")
        loss = loss + (lay(name, table.grad_final[name], dtype) * x).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    assert set(table.grads) == set(leaves)
    for name, got in zip(leaves, grads, strict=True):
        close(got, lay(name, table.grads[name]), dtype, grad=True, name=f"gradient of {name}")


# ---- the parallel form ----
@over
@pytest.mark.parametrize("form", FORMS)
def test_parallel_form(memory, form, generator):
    packed = PACKED if "packed" in form else None
    sizes = {"B": 1, "rows": len(PACKED) - 1} if packed else {}
    leaves = memory.leaves(generator, **sizes)
    cu = None if packed is None else torch.tensor(packed)
    h, final = memory(leaves, cu_seqlens=cu, reverse="reverse" in form)
    want_h, want, _ = parallel(memory, leaves, packed, "reverse" in form)
    assert np.isfinite(want_h).all()
    close(h, torch.from_numpy(want_h), name="h")
    for name, x in final.items():
        close(x, torch.from_numpy(want[name]), name=name)


@over
def test_gradients(memory, generator):
    sizes = {"B": 1, "T": 3, "H": 2, "G": 1, "K": 2, "V": 2}
    leaves = memory.leaves(generator, **sizes)
    names = list(leaves)

    def f(*tensors):
        h, final = memory(dict(zip(names, tensors, strict=True)))
        return h, *final.values()

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in leaves.values()])


def test_gradients_where_m_is_0(generator):
    """As it stays where nothing is forgotten and nothing large comes in: a kink that is none."""
    memory = mlstm_("mlstm", eps=0.5)
    leaves = memory.leaves(generator, B=1, T=2, H=2, G=1, K=2)
    leaves["i"] = -1 - leaves["i"].abs()
    leaves["f"] = torch.full_like(leaves["f"], 1e4)
    leaves["m"] = torch.zeros_like(leaves["m"])
    names = list(leaves)

    def f(*tensors):
        h, final = memory(dict(zip(names, tensors, strict=True)))
        return h, *final.values()

    assert not f(*leaves.values())[3].any()
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in leaves.values()])


@pytest.mark.parametrize("options", [{}, {"eps": 0.5}, {"input_gate": "sigmoid"}], ids=str)
def test_normalizer_grad(options, generator):
    """Without it, gradients are those of the parallel form over the divisors that it had."""
    memory = mlstm_("mlstm", **options)
    leaves = memory.leaves(generator, B=1)
    weight = torch.randn(
        memory.shape("BTHV", B=1), dtype=torch.float64, generator=generator
    ).numpy()
    *_, [(divisors,)] = parallel(memory, leaves)

    def loss(leaves):
        return float((weight * parallel(memory, leaves, divisors=divisors)[0]).sum())

    given = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    h, _ = memory(given, normalizer_grad=False)
    assert torch.equal(h, memory(given)[0])
    grads = torch.autograd.grad(
        (h * torch.from_numpy(weight)).sum(), list(given.values()), materialize_grads=True
    )
    for name, got in zip(given, grads, strict=True):
        want = torch.zeros_like(got)
        for place in np.ndindex(*got.shape):
            moved = []
            for step in (1e-5, -1e-5):
                x = leaves[name].clone()
                x[place] += step
                moved.append(loss(leaves | {name: x}))
            want[place] = (moved[0] - moved[1]) / 2e-5
        assert torch.allclose(got, want, rtol=1e-7, atol=1e-8), name


# ---- what has to hold ----
def agree(got, want, name="h"):
    close(got[0], want[0], name=name)
    for state in want[1]:
        close(got[1][state], want[1][state], name=f"final {state}")


def cut(memory, leaves, part):
    return {n: x[:, part] if n in memory.over_time() else x for n, x in leaves.items()}


@over
@pytest.mark.parametrize("length", [1, 3], ids=["steps", "chunks"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_pieces(memory, length, reverse, generator):
    leaves = memory.leaves(generator)
    parts = [slice(t, t + length) for t in range(0, SIZES["T"], length)]
    outputs, now = [], leaves
    for part in parts[::-1] if reverse else parts:
        h, final = memory(cut(memory, now, part), reverse=reverse)
        outputs.append(h)
        now = leaves | final
    got = torch.cat(outputs[::-1] if reverse else outputs, 1), final
    agree(got, memory(leaves, reverse=reverse))


@over
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed(memory, reverse, generator):
    """As the sequences one by one, which do not see each other."""
    leaves = memory.leaves(generator, B=1, rows=len(PACKED) - 1)
    cu = torch.tensor(PACKED, dtype=torch.int32)
    h, final = memory(leaves, cu_seqlens=cu, reverse=reverse)
    outputs, finals = [], []
    for s, (p, q) in enumerate(pairwise(PACKED)):
        own = cut(memory, leaves, slice(p, q))
        own |= {name: own[name][s : s + 1] for name in memory.states}
        one_h, one = memory(own, reverse=reverse)
        outputs.append(one_h)
        finals.append(one)
    want = {name: torch.cat([one[name] for one in finals]) for name in memory.states}
    agree((h, final), (torch.cat(outputs, 1), want))
    for name in memory.states:  # an empty sequence
        assert torch.equal(final[name][0], leaves[name][0])


@over
def test_reverse(memory, generator):
    leaves = memory.leaves(generator)
    turned = {n: x.flip(1) if n in memory.over_time() else x for n, x in leaves.items()}
    h, final = memory(turned)
    agree(memory(leaves, reverse=True), (h.flip(1), final))


@over
def test_no_state_is_zeros(memory, generator):
    leaves = memory.leaves(generator)
    for name in memory.states:
        leaves[name] = torch.zeros_like(leaves[name])
    given = {name: leaves[name] for name in memory.inputs}
    agree(memory(given), memory(leaves))
    cu = torch.tensor([0, 5, 5, 7])
    row = {n: x[:1] if n in memory.over_time() else x for n, x in given.items()}
    rows = {n: leaves[n][:1].repeat_interleave(3, 0) for n in memory.states}
    agree(memory(row, cu_seqlens=cu), memory(row | rows, cu_seqlens=cu))


@over
def test_nothing(memory, generator):
    """No step, no row, no sequence."""
    for sizes in ({"T": 0}, {"B": 0}):
        leaves = memory.leaves(generator, **sizes)
        h, final = memory(leaves)
        assert h.shape == memory.shape("BTHV", **sizes)
        for name in memory.states:
            assert torch.equal(final[name], leaves[name])
    leaves = memory.leaves(generator, B=1, T=0, rows=0)
    h, final = memory(leaves, cu_seqlens=torch.tensor([0]))
    assert h.numel() == 0 and all(len(x) == 0 for x in final.values())


@over
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(memory, dtype, generator):
    """Computed in float32: all that is lost is what the inputs and h are rounded to."""
    leaves = memory.leaves(generator, dtype)
    h, final = memory(leaves)
    want_h, want = memory({name: x.double() for name, x in leaves.items()})
    close(h, want_h, dtype, factor=1.1)  # and float32's own
    for name, x in final.items():
        assert x.dtype is torch.float32
        close(x, want[name])
    if "f" in memory.inputs:  # gates may stay in float32
        gates = {name: leaves[name].float() for name in "if"}
        agree(memory(leaves | gates), (h, final))


@over
def test_groups(memory, generator):
    """Heads share what a group has."""
    leaves = memory.leaves(generator)
    apart = dict(leaves)
    for name, letters in memory.inputs.items():
        if "G" in letters:
            apart[name] = leaves[name].repeat_interleave(SIZES["H"] // SIZES["G"], 2)
    agree(memory(apart), memory(leaves))


def finite(memory, leaves):
    for x in leaves.values():
        x.requires_grad_()
    h, final = memory(leaves)
    everything = [h, *final.values()]
    grads = torch.autograd.grad(
        sum(x.sum() for x in everything), list(leaves.values()), materialize_grads=True
    )
    names = ["h", *final, *(f"gradient of {name}" for name in leaves)]
    for name, x in zip(names, [*everything, *grads], strict=True):
        assert x.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_extremes(dtype, generator):
    """Decays of 0 and 1, features of 0: all is finite, backward as well."""
    ends = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, -1e4, 1e4], dtype=dtype)
    memory = ssd_("ssd", SSD_ALL, dt_softplus=True)
    leaves = memory.leaves(generator, dtype)
    for name in ("dt", "z"):
        leaves[name] = (
            ends.view(-1, *[1] * (leaves[name].dim() - 2)).expand_as(leaves[name]).clone()
        )
    finite(memory, leaves)
    memory = retention_("retention")
    leaves = memory.leaves(generator, dtype)
    leaves["decay"] = torch.tensor([1.0, 0.5, torch.finfo(dtype).tiny, 1e-3], dtype=dtype)
    finite(memory, leaves)
    for feature_map in ("elu", "relu"):
        memory = linear_("linear_attention", feature_map=feature_map)
        leaves = memory.leaves(generator, dtype)
        for name in "qk":
            leaves[name] = ends[:, None, None].expand_as(leaves[name]).clone()
        finite(memory, leaves)


# ---- mLSTM's own ----
EXTREMES = [-1e4, -100.0, 0.0, 100.0, 1e4]


@pytest.mark.parametrize("options", [{}, {"normalizer_grad": False}, {"input_gate": "sigmoid"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_extreme_gates(options, dtype, generator):
    """Every pair of such gates after every other: all is finite, backward as well."""
    memory = mlstm_("mlstm", **options)
    gates = torch.cartesian_prod(*[torch.tensor(EXTREMES)] * 4)
    leaves = memory.leaves(generator, dtype, B=len(gates), T=2, H=2, G=1)
    leaves["i"] = gates[:, :2, None].expand(-1, 2, 2).to(dtype, copy=True)
    leaves["f"] = gates[:, 2:, None].expand(-1, 2, 2).to(dtype, copy=True)
    finite(memory, leaves)


def test_gates_that_decide():
    """What is left of two steps where gates are all or nothing."""
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).reshape(1, 2, 1, 1)

    def h(i, f):
        i, f = (torch.tensor(x, dtype=torch.float64).reshape(1, 2, 1) for x in (i, f))
        return mlstm_reference(one, one, v, i, f, scale=1.0, eps=0.0)[0].flatten().tolist()

    assert h([1e4, 1e4], [1e4, 1e4]) == [4, 6]  # both stay
    assert h([1e4, 1e4], [1e4, -1e4]) == [4, 8]  # the first is forgotten
    assert h([1e4, -1e4], [1e4, 1e4]) == [4, 4]  # the second does not enter
    assert h([-1e4, -1e4], [-1e4, -1e4]) == [0, 0]  # far below the 1 that n is held against


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_stabiliser(eps, generator):
    """exp(m) C and exp(m) n are what is remembered: only eps sees how they are divided up."""
    memory = mlstm_("mlstm", eps=eps)
    leaves = memory.leaves(generator)
    shift = torch.tensor([3.0, -2.0, 40.0, -40.0], dtype=torch.float64).expand(2, 4)
    moved = leaves | {
        "C": leaves["C"] * torch.exp(-shift)[..., None, None],
        "n": leaves["n"] * torch.exp(-shift)[..., None],
        "m": leaves["m"] + shift,
    }
    h, final = memory(leaves)
    got, got_final = memory(moved)
    for name, x in final.items():
        if name != "m":
            tail = (...,) + (None,) * (x.dim() - 2)
            want = torch.exp(final["m"])[tail] * x
            close(torch.exp(got_final["m"])[tail] * got_final[name], want, name=name)
    if eps == 0:
        close(got, h)
    else:
        assert (got - h).abs().max() > 0.01


def test_sigmoid_leaves_m_alone(generator):
    memory = mlstm_("mlstm", input_gate="sigmoid")
    leaves = memory.leaves(generator)
    h, final = memory(leaves)
    assert torch.equal(final["m"], leaves["m"])
    assert torch.equal(memory(leaves | {"m": torch.zeros_like(leaves["m"])})[0], h)
    plain = mlstm_("mlstm", input_gate="sigmoid", normalize=False)
    assert torch.equal(plain(leaves)[1]["n"], leaves["n"])


def test_keys_may_be_scaled_instead(generator):
    """As in the package xlstm: h is the same, C and n are smaller by the scale."""
    memory = mlstm_("mlstm")
    leaves = memory.leaves(generator)
    s = SIZES["K"] ** -0.5
    theirs = leaves | {name: leaves[name] * s for name in ("k", "C", "n")}
    h, final = memory(leaves)
    agree(memory(theirs, scale=1.0), (h, final | {name: s * final[name] for name in "Cn"}))


def test_errors():
    one, gate = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match='mlstm: normalize is False, expected True with .* "exp"'):
        mlstm_reference(one, one, one, gate, gate, normalize=False)
    with pytest.raises(ValueError, match='input_gate is "tanh", expected "exp" or "sigmoid"'):
        mlstm_reference(one, one, one, gate, gate, input_gate="tanh")
    with pytest.raises(ValueError, match='feature_map is "exp", expected "elu", "relu" or "iden'):
        linear_attention_reference(one, one, one, feature_map="exp")
    expected = r"expected a tuple of 3 tensors, \(C, n, m\)"
    with pytest.raises(TypeError, match=f"mlstm: initial_state is Tensor, {expected}"):
        mlstm(one, one, one, gate, gate, torch.zeros(3, 1))
    with pytest.raises(TypeError, match=rf"mlstm_step: state is \(Tensor, float\), {expected}"):
        mlstm_step(one[0], one[0], one[0], gate[0], gate[0], (one, 1.0))
    with pytest.raises(TypeError, match=r"linear_attention: initial_state is \(Tensor\), expected"):
        linear_attention(one, one, one, (one,))


# ---- peers ----
def heads_first(x):
    return x.transpose(1, 2)


def same_gradients(ours, theirs, leaves, generator, missing=(), factor=1.0):
    """Of the same weighted sum of all outputs."""
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in ours]
    found = []
    for outputs in (ours, theirs):
        loss = sum((w.to(x.dtype) * x).sum() for w, x in zip(weights, outputs, strict=True))
        leaf = list(leaves.values())
        found.append(torch.autograd.grad(loss, leaf, materialize_grads=True))
    for name, got, want in zip(leaves, *found, strict=True):
        if name not in missing:
            close(got, want, grad=True, factor=factor, name=f"gradient of {name}")


def mlstm_leaves(generator, states=True):
    memory = mlstm_("mlstm")
    leaves = memory.leaves(generator, T=16, H=3, G=3, K=4, V=5)
    if not states:
        leaves = {name: leaves[name] for name in MLSTM}
    return memory, {name: x.requires_grad_() for name, x in leaves.items()}


PARALLEL = [
    ("native_autograd", {"eps": 0.0}),
    ("native_stablef_autograd", {"eps": 0.0}),
    ("native_custbw", {"eps": 0.0, "normalizer_grad": False}),
    ("native_siging_autograd", {"eps": 0.5, "input_gate": "sigmoid"}),
    ("native_siging_autograd", {"input_gate": "sigmoid", "normalize": False}),
    ("native_siging_custbw", {"eps": 0.5, "input_gate": "sigmoid", "normalizer_grad": False}),
]


@pytest.mark.parametrize("kernel, options", PARALLEL, ids=lambda x: x if type(x) is str else "")
def test_mlstm_kernels_parallel(kernel, options, generator):
    """Their parallel form has no m of 0 before the first step, so that its eps weighs something
    else: 0 for the exponential gate."""
    peer = pytest.importorskip("mlstm_kernels.torch")
    memory, leaves = mlstm_leaves(generator, states=False)
    kernel = peer.get_mlstm_kernel("parallel--" + kernel)
    known = {name: options[name] for name in ("eps", "normalize") if name in options}
    want = heads_first(kernel(*map(heads_first, leaves.values()), **known))
    h, _ = memory(leaves, **options)
    close(h, want)
    same_gradients([h], [want], leaves, generator)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("exact", [True, False], ids=["autograd", "custbw"])
def test_mlstm_kernels_chunkwise(eps, exact, generator):
    """From states to states. Of their training-time shortcut only what it is meant to be: not the
    0 that it has for the gradient of m, nor what it makes of gradients of the final states."""
    peer = pytest.importorskip("mlstm_kernels.torch")
    memory, leaves = mlstm_leaves(generator)
    kernel = peer.get_mlstm_kernel("chunkwise--native_" + ("autograd" if exact else "custbw"))
    want, last = kernel(
        *(heads_first(leaves[name]) for name in MLSTM),
        c_initial=leaves["C"],
        n_initial=leaves["n"],
        m_initial=leaves["m"][..., None],
        return_last_states=True,
        eps=eps,
        chunk_size=8,
    )
    want, last = heads_first(want), [last[0], last[1], last[2][..., 0]]
    h, final = memory(leaves, eps=eps, normalizer_grad=exact)
    close(h, want)
    for got, x in zip(final.values(), last, strict=True):
        close(got, x)
    if exact:
        same_gradients([h, *final.values()], [want, *last], leaves, generator)
    else:
        same_gradients([h], [want], leaves, generator, missing=("n", "m"))


def test_mlstm_kernels_step(generator):
    peer = pytest.importorskip("mlstm_kernels.torch")
    memory, leaves = mlstm_leaves(generator)
    step = peer.get_mlstm_step_kernel("native")
    q, k, v, i, f = (leaves[name][:, 0] for name in MLSTM)
    want, last = step(
        *(q, k, v, i[..., None], f[..., None]),
        *(leaves["C"], leaves["n"], leaves["m"][..., None]),
        dtype_state=torch.float64,
    )
    h, final = memory(cut(memory, leaves, slice(1)))
    close(h[:, 0], want)
    for got, x in zip(final.values(), last, strict=True):
        close(got, x.reshape(got.shape))


def test_xlstm_step(generator):
    """The package xlstm scales keys; states are its own then."""
    peer = pytest.importorskip("xlstm.blocks.mlstm.backends")
    memory = mlstm_("mlstm", eps=0.5)
    leaves = memory.leaves(generator, G=3, H=3, V=3)
    C, n, m = leaves["C"], leaves["n"][..., None], leaves["m"][..., None, None]
    outputs = []
    for t in range(SIZES["T"]):
        q, k, v = (leaves[name][:, t, :, None] for name in "qkv")
        i, f = (leaves[name][:, t, :, None, None] for name in "if")
        h, (C, n, m) = peer.recurrent_step_stabilized_simple(C, n, m, q, k, v, i, f, eps=0.5)
        outputs.append(h[:, :, 0])
    scaled = leaves | {"k": leaves["k"] * SIZES["K"] ** -0.5}
    want = {"C": C, "n": n[..., 0], "m": m[..., 0, 0]}
    agree(memory(scaled, scale=1.0), (torch.stack(outputs, 1), want))


@pytest.fixture
def mamba2():
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(module, "mamba2_chunk_scan"):
        pytest.skip("this transformers has no Mamba-2 scan to call")
    return module


def test_transformers_mamba2_scan(mamba2, generator):
    """It computes in float32 whatever comes."""
    memory = ssd_("ssd", SSD | {"D": "H", "dt_bias": "H"}, dt_softplus=True)
    leaves = memory.leaves(generator, torch.float32, T=11)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    wanted = mamba2.mamba2_chunk_scan(
        *(leaves[name] for name in ("x", "dt", "A", "B", "C")),
        chunk_size=4,
        D=leaves["D"],
        dt_bias=leaves["dt_bias"],
        initial_states=leaves["state"],
        dt_softplus=True,
        return_final_states=True,
    )
    h, final = memory(leaves)
    for got, want in zip((h, final["state"]), wanted, strict=True):
        close(got, want)
    same_gradients([h, final["state"]], wanted, leaves, generator)


def test_transformers_mamba2_step(mamba2, generator):
    memory = ssd_("ssd", SSD_ALL, dt_softplus=True)
    leaves = memory.leaves(generator, torch.float32, T=1)
    per_channel = {
        name: leaves[name][:, None].expand(-1, SIZES["V"]) for name in ("A", "D", "dt_bias")
    }
    state = leaves["state"].clone()
    y = mamba2.mamba2_selective_state_update(
        state,
        leaves["x"][:, 0],
        leaves["dt"][:, 0, :, None].expand(-1, -1, SIZES["V"]),
        per_channel["A"][..., None].expand(-1, -1, SIZES["K"]),
        leaves["B"][:, 0],
        leaves["C"][:, 0],
        D=per_channel["D"],
        dt_bias=per_channel["dt_bias"],
        dt_softplus=True,
        z=leaves["z"][:, 0],
    )
    agree(memory(leaves), (y[:, None], {"state": state}))
