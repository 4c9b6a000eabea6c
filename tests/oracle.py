"""What the Python references are trusted for: tables small enough to check by hand, and a second
formula.

The order of trust: these tables -> torch_ext.NAME_reference -> the float64 kernel -> everything
else.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

LN2, LN3 = math.log(2), math.log(3)  # sigmoid(-ln 3) = 1/4, sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4
# silu(-ln 3), silu(0) and silu(ln 3) are -ln 3 / 4, 0 and 3/4 ln 3; its slopes there are
SLOPES = 1 / 4 * (1 - 3 / 4 * LN3), 1 / 2, 3 / 4 * (1 + LN3 / 4)


@dataclass
class Table:
    """One channel over three steps. The loss is sum(grad_h * h) + sum(grad_final * final_state).

    Of a parameter there is what a channel has of it: a number, or a list."""

    name: str
    operator: str
    inputs: list[list]
    state: list
    h: list
    final_state: list
    options: dict[str, Any] = field(default_factory=dict)
    grad_h: list = field(default_factory=lambda: [1, 1, 1])
    grad_final: list = field(default_factory=lambda: [2])
    grads: list[list] = field(default_factory=list)  # of the inputs, then of the state


TABLES = [
    Table(
        "scan",
        "linear_scan",
        [[2, 3, 1 / 2], [1, 2, 4]],
        [10],
        # 2*10 + 1 = 21,  3*21 + 2 = 65,  65/2 + 4 = 36.5
        [21, 65, 36.5],
        [36.5],
        # delta3 = 1 + 2 = 3,  delta2 = 1 + 3/2 = 2.5,  delta1 = 1 + 3*2.5 = 8.5
        # da = delta * h before = 8.5*10, 2.5*21, 3*65;  db = delta;  dstate = 2*8.5
        grads=[[85, 52.5, 195], [8.5, 2.5, 3], [17]],
    ),
    Table(
        "scan reverse",
        "linear_scan",
        [[2, 3, 1 / 2], [1, 2, 4]],
        [10],
        # from the right: 10/2 + 4 = 9,  3*9 + 2 = 29,  2*29 + 1 = 59
        [59, 29, 9],
        [59],
        {"reverse": True},
        # from the left: delta1 = 1 + 2 = 3,  delta2 = 1 + 2*3 = 7,  delta3 = 1 + 3*7 = 22
        # da = 3*29, 7*9, 22*10;  dstate = 22/2
        grads=[[87, 63, 220], [3, 7, 22], [11]],
    ),
    Table(
        "scan packed",
        "linear_scan",
        [[2, 3, 1 / 2], [1, 2, 4]],
        [10, 7, -2],
        # steps 1-2 from 10: 21, 65;  an empty sequence keeps its 7;  step 3 from -2: -1 + 4 = 3
        [21, 65, 3],
        [65, 7, 3],
        {"cu_seqlens": [0, 2, 2, 3]},
        grad_final=[2, 2, 2],
        # first: delta2 = 3, delta1 = 1 + 3*3 = 10, da = 100, 63, dstate = 20
        # empty: dstate = 2.  third: delta = 3, da = 3 * -2, dstate = 3/2
        grads=[[100, 63, -6], [10, 3, 3], [20, 2, 1.5]],
    ),
    Table(
        "scan complex",
        "linear_scan",
        [[1j, 1 + 1j, 2], [1, 0, -1j]],
        [1],
        # i + 1,  (1 + i)(1 + i) = 2i,  4i - i = 3i
        [1 + 1j, 2j, 3j],
        [3j],
        grad_h=[0, 0, 1],
        grad_final=[0],
        # delta3 = 1,  delta2 = conj(2) = 2,  delta1 = conj(1 + i) 2 = 2 - 2i
        # da = delta conj(h before) = 2 - 2i, 2 (1 - i), conj(2i);  dstate = conj(i) (2 - 2i)
        grads=[[2 - 2j, 2 - 2j, -2j], [2 - 2j, 2, 1], [-2 - 2j]],
    ),
    Table(
        "gru",
        "min_gru",
        [[0, -LN3, LN3], [2, -4, 8]],  # z = 1/2, 1/4, 3/4
        [1],
        # 1/2 + 2/2,  3/4 * 1.5 - 4/4,  0.125/4 + 3/4 * 8
        [1.5, 0.125, 6.03125],
        [6.03125],
        {"activation": "identity"},
        # delta3 = 1 + 2 = 3,  delta2 = 1 + 3/4,  delta1 = 1 + 3/4 * 1.75 = 2.3125;  dstate = delta1
        # / 2 dgate = z (1 - z) (candidate - h before) delta
        #       = 1/4 * (2 - 1) * 2.3125,  3/16 * (-4 - 1.5) * 1.75,  3/16 * (8 - 0.125) * 3
        # dcandidate = z delta
        grads=[[0.578125, -1.8046875, 4.4296875], [1.15625, 0.4375, 2.25], [1.15625]],
    ),
    Table(
        "gru reverse",
        "min_gru",
        [[0, -LN3, LN3], [2, -4, 8]],
        [1],
        # from the right: 1/4 + 3/4 * 8 = 6.25,  3/4 * 6.25 - 4/4 = 3.6875,  3.6875/2 + 2/2
        [2.84375, 3.6875, 6.25],
        [2.84375],
        {"reverse": True},
        # delta1 = 3,  delta2 = 1 + 3/2 = 2.5,  delta3 = 1 + 3/4 * 2.5 = 2.875;  dstate = 2.875/4
        # dgate = 1/4 * (2 - 3.6875) * 3,  3/16 * (-4 - 6.25) * 2.5,  3/16 * (8 - 1) * 2.875
        grads=[[-1.265625, -4.8046875, 3.7734375], [1.5, 0.625, 2.15625], [0.71875]],
    ),
    Table(
        "gru g",
        "min_gru",
        [[0, -LN3, LN3], [2, -LN3, 0]],  # g = 2 + 1/2, sigmoid(-ln 3) = 1/4, 0 + 1/2
        [1],
        # 1/2 + 2.5/2,  3/4 * 1.75 + 1/4 * 1/4,  1.375/4 + 3/4 * 1/2
        [1.75, 1.375, 0.71875],
        [0.71875],
        {"activation": "g"},
        # delta as in "gru".  g' = 1, 1/4 * 3/4, 1 (at 0 it is the right-hand one)
        # dgate = 1/4 * (2.5 - 1) * 2.3125,  3/16 * (0.25 - 1.75) * 1.75,  3/16 * (0.5 - 1.375) * 3
        # dcandidate = z g' delta
        grads=[[0.8671875, -0.4921875, -0.4921875], [1.15625, 0.08203125, 2.25], [1.15625]],
    ),
    Table(
        "lstm",
        "min_lstm",
        # f = 1/4, 1/2, 3/4;  i = 3/4, 1/4, 1/2;  so f' = 1/4, 2/3, 3/5 and i' = 3/4, 1/3, 2/5
        [[-LN3, 0, LN3], [LN3, -LN3, 0], [4, 3, -5]],
        [8],
        # 8/4 + 3/4 * 4,  2/3 * 5 + 3/3,  3/5 * 13/3 - 2/5 * 5
        [5, 13 / 3, 0.6],
        [0.6],
        # delta3 = 3,  delta2 = 1 + 3/5 * 3 = 2.8,  delta1 = 1 + 2/3 * 2.8 = 43/15;  dstate = delta1
        # / 4 dforget = f' i' (1 - f) (h before - candidate) delta
        #         = 3/16 * 3/4 * 4 * 43/15,  2/9 * 1/2 * 2 * 2.8,  6/25 * 1/4 * 28/3 * 3
        # dinput = -f' i' (1 - i) (h before - candidate) delta
        #        = -3/16 * 1/4 * 4 * 43/15,  -2/9 * 3/4 * 2 * 2.8,  -6/25 * 1/2 * 28/3 * 3
        # dcandidate = i' delta
        options={"activation": "identity", "normalize": True},
        grads=[
            [1.6125, 28 / 45, 1.68],
            [-0.5375, -14 / 15, -3.36],
            [2.15, 14 / 15, 1.2],
            [43 / 60],
        ],
    ),
    Table(
        "lstm raw gates",
        "min_lstm",
        [[-LN3, 0, LN3], [LN3, -LN3, 0], [4, 3, -5]],
        [8],
        # 8/4 + 3/4 * 4,  5/2 + 3/4,  3/4 * 3.25 - 5/2
        [5, 3.25, -0.0625],
        [-0.0625],
        {"activation": "identity", "normalize": False},
        # delta3 = 3,  delta2 = 1 + 3/4 * 3 = 3.25,  delta1 = 1 + 3.25/2 = 2.625;  dstate = delta1 /
        # 4 dforget = f (1 - f) h before delta = 3/16 * 8 * 2.625,  1/4 * 5 * 3.25,  3/16 * 3.25 * 3
        # dinput = i (1 - i) candidate delta = 3/16 * 4 * 2.625,  3/16 * 3 * 3.25,  1/4 * -5 * 3
        # dcandidate = i delta
        grads=[
            [3.9375, 4.0625, 1.828125],
            [1.96875, 1.828125, -3.75],
            [1.96875, 0.8125, 1.5],
            [0.65625],
        ],
    ),
    Table(
        "lstm g",
        "min_lstm",
        [[-LN3, 0, LN3], [LN3, -LN3, 0], [4, 0, -LN3]],  # g = 4.5, 1/2, 1/4
        [8],
        # 8/4 + 3/4 * 4.5,  2/3 * 5.375 + 1/3 * 1/2 = 3.75,  3/5 * 3.75 + 2/5 * 1/4
        [5.375, 3.75, 2.35],
        [2.35],
        {"activation": "g", "normalize": True},
        # delta as in "lstm";  dcandidate = i' g' delta with g' = 1, 1, 3/16
        # dforget = f' i' (1 - f) (h before - g) delta
        #         = 9/64 * (8 - 4.5) * 43/15,  1/9 * (5.375 - 0.5) * 2.8,  6/100 * (3.75 - 0.25) * 3
        # dinput = -3/64 * 3.5 * 43/15,  -1/6 * 4.875 * 2.8,  -12/100 * 3.5 * 3
        grads=[
            [9 / 64 * 3.5 * 43 / 15, 4.875 * 2.8 / 9, 0.63],
            [-3 / 64 * 3.5 * 43 / 15, -2.275, -1.26],
            [2.15, 14 / 15, 0.225],
            [43 / 60],
        ],
    ),
    Table(
        "convolution",
        "causal_conv1d",
        [[1, 2, 3], [1, 2, 4], 100],
        [[7, 8]],
        # 7 + 2*8 + 4*1,  8 + 2*1 + 4*2,  1 + 2*2 + 4*3
        [127, 118, 117],
        [[2, 3]],
        grad_final=[[2, 2]],
        # x1 meets taps 4, 2, 1;  x2 4 and 2, and it is in the final state;  x3 4, and it is too
        # the taps meet 7 + 8 + 1,  8 + 1 + 2,  1 + 2 + 3;  the state 1 and 2 + 1
        grads=[[7, 8, 6], [16, 11, 6], 3, [[1, 3]]],
    ),
    Table(
        "convolution silu",
        "causal_conv1d",
        [[LN3, -2 * LN3, 0], [1, 2], LN3],
        [[-2 * LN3]],
        # before silu: -2 + 2 + 1 = 1,  1 - 4 + 1 = -2,  -2 + 0 + 1 = -1, times ln 3
        [3 / 4 * LN3, -2 * LN3 / 10, -LN3 / 4],
        [[0]],
        {"activation": "silu"},
        grad_h=[1, 0, 1],
        grad_final=[[5]],
        # with the slopes s1, 0, s3: dx = 2 s1,  s3,  2 s3 + 5;  dstate = s1
        grads=[
            [2 * SLOPES[2], SLOPES[0], 2 * SLOPES[0] + 5],
            [-2 * LN3 * (SLOPES[2] + SLOPES[0]), LN3 * SLOPES[2]],
            SLOPES[2] + SLOPES[0],
            [[SLOPES[2]]],
        ],
    ),
    Table(
        "convolution packed",
        "causal_conv1d",
        [[1, 2, 5], [2, 3], 1],
        [[10], [7], [-2]],
        # 2*10 + 3*1,  2*1 + 3*2;  an empty sequence keeps its 7;  2*-2 + 3*5;  each + 1
        [24, 9, 12],
        [[2], [7], [5]],
        {"cu_seqlens": [0, 2, 2, 3]},
        grad_final=[[2], [2], [2]],
        # x1 meets 3 and 2;  x2 and x3 meet 3, and are final states;  taps: 10 + 1 - 2,  1 + 2 + 5
        grads=[[5, 5, 5], [9, 8], 3, [[2], [2], [2]]],
    ),
    Table(
        "selective scan",
        "selective_scan",
        # steps 1, 2, 1 with the bias; u; two states of which one fades by halves, one stays
        [
            [3, 1, 2],
            [1 / 2, 3 / 2, 1 / 2],
            [[1, 1], [2, 0], [1, -1]],
            [[1, 2], [1, 1], [2, 1]],
            [LN3, 0, -LN3],
            [-LN2, 0],
            10,
            1 / 2,
        ],
        [[4, 8]],
        # first state: 4/2 + 3,  5/4 + 2*2,  5.25/2 + 2;  second: 8 + 3,  11 + 0,  11 - 2
        # C h + D u: 5 + 2*11 + 30 = 57,  5.25 + 11 + 10 = 26.25,  2*4.625 + 9 + 20 = 38.25;  gate
        [57 * 3 / 4 * LN3, 0, -38.25 / 4 * LN3],
        [[4.625, 9]],
        grad_final=[[2, 2]],
        # g = 3/4 ln 3, 0, -ln 3 / 4 is the gradient before the gate.  With L = ln 3, delta of the
        # first state: 2 - 2 L/4,  half of it,  3/4 L + a quarter of that;
        # of the second: 2 - L/4,  the same,  2 * 3/4 L + the same
        # dstate = half of the first delta, and the second;  dC = g h;  dB = delta * step * u
        # into step * u, delta B summed: 2.25 + 1.9375 L,  2 - L/2,  -L/4;  du = step * it + D g
        # into step * A, e = delta * decay * h before:  first  0.5 + 1.375 L,  1.25 - 0.3125 L,
        #   5.25 - 1.3125 L;  second  16 + 10 L,  22 - 2.75 L,  22 - 2.75 L
        # ddelta = it * u - ln 2 * the first e;  dA = e * step
        grads=[
            [2.25 + 9.4375 * LN3, 4 - LN3, -2.75 * LN3],
            [
                3 * (2.25 + 1.9375 * LN3) - LN2 * (0.5 + 1.375 * LN3),
                2 - LN3 / 2 - LN2 * (1.25 - 0.3125 * LN3),
                -LN3 / 2 - LN2 * (5.25 - 1.3125 * LN3),
            ],
            [
                [3 * (0.25 + 0.6875 * LN3), 3 * (2 + 1.25 * LN3)],
                [2 * (1 - LN3 / 4), 2 * (2 - LN3 / 4)],
                [2 * (2 - LN3 / 2), 2 * (2 - LN3 / 4)],
            ],
            [[3.75 * LN3, 8.25 * LN3], [0, 0], [-4.625 / 4 * LN3, -9 / 4 * LN3]],
            [57 * SLOPES[2], 26.25 * SLOPES[1], 38.25 * SLOPES[0]],
            [8.25 - 0.5625 * LN3, 82 + 1.75 * LN3],
            1.75 * LN3,  # 3 * 3/4 - 2/4
            8.75 + 4.8125 * LN3 - LN2 * (7 - 0.25 * LN3),  # the sum of ddelta
            [[0.125 + 0.34375 * LN3, 2 + 1.25 * LN3]],
        ],
    ),
    Table(
        "selective scan softplus reverse",
        "selective_scan",
        # softplus gives ln 4, ln 2, ln 4/3, so that decays are 1/4, 1/2, 3/4, and step * u 3, 2, 1
        [
            [3 / (2 * LN2), 2 / LN2, 1 / (2 * LN2 - LN3)],
            [LN3, 0, -LN3],
            [[1], [1], [1]],
            [[1], [1], [1]],
            [LN3, LN3, LN3],
            [-1],
            0,
            0,
        ],
        [[8]],
        # from the right: 3/4 * 8 + 1 = 7,  7/2 + 2 = 5.5,  5.5/4 + 3 = 4.375;  the gate is 3/4 ln 3
        [4.375 * 0.75 * LN3, 5.5 * 0.75 * LN3, 7 * 0.75 * LN3],
        [[4.375]],
        {"delta_softplus": True, "reverse": True},
        grad_final=[[2]],
        # with g = 3/4 ln 3, from the left: delta1 = g + 2,  delta2 = g + delta1 / 4,
        # delta3 = g + delta2 / 2;  e = delta * decay * h before = delta * 5.5/4,  7/2,  3/4 * 8
        # ddelta = (delta u - e) * 3/4, 1/2, 1/4
        grads=[
            [
                (0.75 * LN3 + 2) * 2 * LN2,
                (0.9375 * LN3 + 0.5) * LN2,
                (1.21875 * LN3 + 0.25) * (2 * LN2 - LN3),
            ],
            [
                (0.75 * LN3 + 2) * (3 / (2 * LN2) - 1.375) * 3 / 4,
                (0.9375 * LN3 + 0.5) * (2 / LN2 - 3.5) / 2,
                (1.21875 * LN3 + 0.25) * (1 / (2 * LN2 - LN3) - 6) / 4,
            ],
            [[3 * (0.75 * LN3 + 2)], [2 * (0.9375 * LN3 + 0.5)], [1.21875 * LN3 + 0.25]],
            [[4.375 * 0.75 * LN3], [5.5 * 0.75 * LN3], [7 * 0.75 * LN3]],
            [4.375 * SLOPES[2], 5.5 * SLOPES[2], 7 * SLOPES[2]],
            [
                (0.75 * LN3 + 2) * 1.375 * 2 * LN2
                + (0.9375 * LN3 + 0.5) * 3.5 * LN2
                + (1.21875 * LN3 + 0.25) * 6 * (2 * LN2 - LN3)
            ],
            0.75 * LN3 * (3 / (2 * LN2) + 2 / LN2 + 1 / (2 * LN2 - LN3)),
            (0.75 * LN3 + 2) * (3 / (2 * LN2) - 1.375) * 3 / 4
            + (0.9375 * LN3 + 0.5) * (2 / LN2 - 3.5) / 2
            + (1.21875 * LN3 + 0.25) * (1 / (2 * LN2 - LN3) - 6) / 4,
            [[0.75 * (1.21875 * LN3 + 0.25)]],
        ],
    ),
]


def sigmoid(x):
    return np.where(
        x < 0, np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x))), 1 / (1 + np.exp(-np.abs(x)))
    )


def activate(x, activation):
    return {"identity": x, "g": np.maximum(x, 0) + np.where(x < 0, sigmoid(x), 0.5)}[activation]


def scan_terms(a, b):
    return a, b


def gru_terms(gate, candidate, activation="identity"):
    z = sigmoid(gate)
    return 1 - z, z * activate(candidate, activation)


def lstm_terms(forget_gate, input_gate, candidate, activation="identity", normalize=True):
    f, i = sigmoid(forget_gate), sigmoid(input_gate)
    total = f + i if normalize else 1
    return f / total, i / total * activate(candidate, activation)


def states_terms(u, delta, B, C, z, A, D, delta_bias, delta_softplus=False):
    d = delta + delta_bias
    d = np.where(d > 20, d, np.log1p(np.exp(np.minimum(d, 20)))) if delta_softplus else d
    # numpy's exp in float64 is low by 0.05 units on average, which 1e5 steps multiply up
    return np.exp((d[..., None] * A).astype(np.longdouble)).astype(d.dtype), (d * u)[..., None] * B[
        :, :, None
    ]


def read_states(h, u, delta, B, C, z, A, D, delta_bias, **options):
    return ((C[:, :, None] * h).sum(-1) + D * u) * z * sigmoid(z)


# The decay and the drive of every step, h = decay * h + drive, in numpy.
TERMS = {
    "linear_scan": scan_terms,
    "min_gru": gru_terms,
    "min_lstm": lstm_terms,
    "selective_scan": states_terms,
}
# And what is made of h, where that is not the output.
READ = {"selective_scan": read_states}


def convolution(x, weight, bias, state, cu_seqlens, reverse, activation=None):
    """All steps at once, tap by tap."""
    rows, finals = [], []
    for x_s, _, s in split((x, x), state, cu_seqlens, reverse):
        seen, T = np.concatenate([s.T, x_s]), len(x_s)
        v = bias + sum(w * seen[k : k + T] for k, w in enumerate(weight.T))
        rows.append(v * sigmoid(v) if activation == "silu" else v)
        finals.append(seen[T:].T)
    return join(rows, x, cu_seqlens, reverse), np.array(finals).reshape(np.shape(state))


FORMULAS = {*TERMS, "causal_conv1d"}


def split(terms, state, cu_seqlens, reverse):
    """Decay, drive and initial state of each sequence, in the order in which its time runs."""
    decay, drive = terms
    rows = []
    if cu_seqlens is None:
        rows = [(decay[r], drive[r]) for r in range(len(decay))]
    else:
        rows = [(decay[0, p:q], drive[0, p:q]) for p, q in pairwise(cu_seqlens)]
    order = -1 if reverse else 1
    return [(a[::order], b[::order], s) for (a, b), s in zip(rows, state, strict=True)]


def join(rows, like, cu_seqlens, reverse):
    order = -1 if reverse else 1
    rows = [h[::order] for h in rows]
    if cu_seqlens is not None:
        rows = [np.concatenate(rows)] if rows else []
    return np.stack(rows) if rows else np.zeros_like(like)


def read(name, h, inputs, options):
    return READ[name](h, *inputs, **options) if name in READ else h


def closed_form(name, inputs, state, cu_seqlens=None, reverse=False, **options):
    """Without a loop over the state: h[t] = prod(a[..t]) h0 + sum over s of prod(a[s+1..t])
    b[s]."""
    if name == "causal_conv1d":
        return convolution(*inputs, state, cu_seqlens, reverse, **options)
    terms = TERMS[name](*inputs, **options)
    rows, finals = [], []
    for a, b, s in split(terms, state, cu_seqlens, reverse):
        h = [
            a[: t + 1].prod(0) * s + sum(a[r + 1 : t + 1].prod(0) * b[r] for r in range(t + 1))
            for t in range(len(a))
        ]
        rows.append(np.array(h).reshape(a.shape))
        finals.append(h[-1] if h else s)
    h = join(rows, terms[1], cu_seqlens, reverse)
    return read(name, h, inputs, options), np.array(finals).reshape(np.shape(state))


def loop(name, inputs, state, cu_seqlens=None, reverse=False, **options):
    """The recurrence itself, fast enough for 1e5 steps."""
    if name == "causal_conv1d":
        return convolution(*inputs, state, cu_seqlens, reverse, **options)
    terms = TERMS[name](*inputs, **options)
    rows, finals = [], []
    for a, b, h in split(terms, state, cu_seqlens, reverse):
        out = np.empty_like(b)
        for t in range(len(a)):
            h = out[t] = a[t] * h + b[t]
        rows.append(out)
        finals.append(np.array(h))
    h = join(rows, terms[1], cu_seqlens, reverse)
    return read(name, h, inputs, options), np.array(finals).reshape(np.shape(state))


# ---- matrix memories, of long sequences ----
def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def mlstm_gates(q, k, v, i, f, C, n, m, input_gate="exp", normalize=True):
    """Decay and weight of every step and head, what divides without the normaliser, and m."""
    log_f = log_sigmoid(f)
    if input_gate == "sigmoid":
        return sigmoid(f), sigmoid(i), np.ones_like(i), [m]
    before, after, last = np.empty_like(i), np.empty_like(i), m
    for t in range(i.shape[1]):
        before[:, t] = last
        last = after[:, t] = np.maximum(log_f[:, t] + last, i[:, t])
    return np.exp(log_f + before - after), np.exp(i - after), np.exp(-after), [last]


def elu_features(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def memorise(decay, weight, q, k, v, state):
    """S = decay * S + weight * k v^T, step by step, and S^T q of each: decay and weight (B, T, H), q
    and k (B, T, H, K), v (B, T, H, V). Also the last S."""
    out, state = np.empty_like(v), state.copy()
    k, decay, q = (weight[..., None] * k)[..., None], decay[..., None, None], q[..., None, :]
    v = v[..., None, :]
    for t in range(len(out[0])):
        state *= decay[:, t]
        state += k[:, t] * v[:, t]
        out[:, t] = (q[:, t] @ state)[..., 0, :]
    return out, state


def with_normaliser(C, n):
    """A normaliser is one more column of the memory, of values that are 1."""
    return np.concatenate([C, n[..., None]], -1)


def matrix_loop(name, leaves, **options):
    """The recurrences step by step: h and the final states, of leaves by name."""
    x, eps, normalize = leaves, 1e-6, options.get("normalize", True)
    names = ("C", "B", "x") if name == "ssd" else ("q", "k", "v")
    q, k, v = (x[n] for n in names)
    heads = v.shape[:3]
    q, k = (np.broadcast_to(y, (*heads, y.shape[3])) for y in (q, k))
    if name == "ssd":
        dt = x["dt"] + x["dt_bias"]
        dt = np.logaddexp(0, dt) if options["dt_softplus"] else dt
        y, S = memorise(np.exp(dt * x["A"]), dt, q, k, v, x["initial_state"].swapaxes(2, 3))
        z = x["z"]
        return (y + x["D"][:, None] * v) * z * sigmoid(z), [S.swapaxes(2, 3)]
    one = np.ones((*heads, 1))
    q = elu_features(q) if name == "linear_attention" else q * q.shape[3] ** -0.5
    if name == "retention":
        h, S = memorise(one[..., 0] * x["decay"], one[..., 0], q, k, v, x["initial_state"])
        return h, [S]
    if name == "linear_attention":
        k, decay, weight, others = elu_features(k), one[..., 0], one[..., 0], []
        state = with_normaliser(x["S"], x["z"])
    else:
        decay, weight, least, others = mlstm_gates(**x, **options)
        state = with_normaliser(x["C"], x["n"])
    h, last = memorise(decay, weight, q, k, np.concatenate([v, one], -1), state)
    h, r, C, n = h[..., :-1], h[..., -1:], last[..., :-1], last[..., -1]
    if not normalize:
        return h, [C, x["z" if name == "linear_attention" else "n"], *others]
    d = r if name == "linear_attention" else np.maximum(np.abs(r), least[..., None])
    return h / (d + eps), [C, n, *others]
