"""torch_ext.compat.haste and .flashrnn: weights and states in the layouts that these packages
document, run by our operators, against formulas that read these layouts themselves."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from cases import close

import torch_ext
from torch_ext.compat import flashrnn, haste

B, T, I, H = 3, 7, 5, 4


# ---- haste ----
def draw(generator, **shapes):
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7
        for name, shape in shapes.items()
    }


def layer_norm(x, gain, bias=0.0):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, False, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * gain + bias


def haste_lstm(w, x):
    """Gates i, g, f, o, side by side in the columns of the kernels."""
    h, c, outputs = x.new_zeros(B, H), x.new_zeros(B, H), []
    for t in range(T):
        a, r = x[:, t] @ w["kernel"], h @ w["recurrent_kernel"]
        if "gamma" in w:
            a, r = layer_norm(a, w["gamma"][0]), layer_norm(r, w["gamma"][1])
        a = a + r + w["bias"]
        i, g, f, o = (a[:, k * H : (k + 1) * H] for k in range(4))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        seen = layer_norm(c, w["gamma_h"], w["beta_h"]) if "gamma" in w else c
        h = torch.sigmoid(o) * torch.tanh(seen)
        outputs.append(h)
    return torch.stack(outputs, 1), h, c


def haste_gru(w, x):
    """Gates z, r, h; the reset gate behind the product."""
    h, outputs = x.new_zeros(B, H), []
    for t in range(T):
        a, r = x[:, t] @ w["kernel"], h @ w["recurrent_kernel"]
        if "gamma" in w:
            a, r = layer_norm(a, w["gamma"][0]), layer_norm(r, w["gamma"][1])
        a, r = a + w["bias"], r + w["recurrent_bias"]
        z = torch.sigmoid(a[:, :H] + r[:, :H])
        reset = torch.sigmoid(a[:, H : 2 * H] + r[:, H : 2 * H])
        new = torch.tanh(a[:, 2 * H :] + reset * r[:, 2 * H :])
        h = z * h + (1 - z) * new
        outputs.append(h)
    return torch.stack(outputs, 1), h


LSTM = {"kernel": (I, 4 * H), "recurrent_kernel": (H, 4 * H), "bias": (4 * H,)}
LSTM_NORMS = {"gamma": (2, 4 * H), "gamma_h": (H,), "beta_h": (H,)}
GRU = {"kernel": (I, 3 * H), "recurrent_kernel": (H, 3 * H), "bias": (3 * H,)}
GRU |= {"recurrent_bias": (3 * H,)}
IND = {"kernel": (I, H), "recurrent_scale": (H,), "bias": (H,)}


@pytest.mark.parametrize("norms", [False, True])
def test_haste_lstm(norms, generator):
    theirs = draw(generator, **LSTM, **(LSTM_NORMS if norms else {}))
    for p in theirs.values():
        p.requires_grad_()
    x = torch.randn(B, T, I, generator=generator, dtype=torch.float64)
    weights = haste.lstm_weights(theirs)
    a = F.linear(x, weights.pop("weight"))
    if norms:
        a = F.layer_norm(a, [4 * H], weights.pop("input_norm_weight"))
    got, (h, c) = torch_ext.lstm(a.unflatten(-1, (4, 1, H)), **weights)
    want, want_h, want_c = haste_lstm(theirs, x)
    close(got.flatten(-2).detach(), want.detach(), factor=8)
    close(h.flatten(1).detach(), want_h.detach(), factor=8)
    close(c.flatten(1).detach(), want_c.detach(), factor=8)
    grads = torch.autograd.grad(got.sin().sum(), list(theirs.values()))
    wants = torch.autograd.grad(want.sin().sum(), list(theirs.values()))
    for name, g, w in zip(theirs, grads, wants, strict=True):
        close(g, w, grad=True, name=name, factor=16)


@pytest.mark.parametrize("norms", [False, True])
def test_haste_gru(norms, generator):
    theirs = draw(generator, **GRU, **({"gamma": (2, 3 * H)} if norms else {}))
    x = torch.randn(B, T, I, generator=generator, dtype=torch.float64)
    weights = haste.gru_weights(theirs)
    a = F.linear(x, weights.pop("weight"))
    if norms:
        a = F.layer_norm(a, [3 * H], weights.pop("input_norm_weight"))
    a = a + weights.pop("input_bias")
    got, h = torch_ext.gru(a.unflatten(-1, (3, 1, H)), **weights)
    want, want_h = haste_gru(theirs, x)
    close(got.flatten(-2), want, factor=8)
    close(h.flatten(1), want_h, factor=8)


def test_haste_to_torch(generator):
    x = torch.randn(B, T, I, generator=generator, dtype=torch.float64)
    lstm = torch.nn.LSTM(I, H, batch_first=True).double()
    theirs = draw(generator, **LSTM)
    lstm.load_state_dict(haste.torch_state_dict(theirs))
    close(lstm(x)[0].detach(), haste_lstm(theirs, x)[0], factor=8)
    gru = torch.nn.GRU(I, H, batch_first=True).double()
    theirs = draw(generator, **GRU)
    gru.load_state_dict(haste.torch_state_dict(theirs))
    close(gru(x)[0].detach(), haste_gru(theirs, x)[0], factor=8)


def test_haste_ind_rnn(generator):
    theirs = draw(generator, **IND)
    x = torch.randn(B, T, I, generator=generator, dtype=torch.float64)
    h, outputs = x.new_zeros(B, H), []
    for t in range(T):
        h = torch.tanh(x[:, t] @ theirs["kernel"] + theirs["recurrent_scale"] * h + theirs["bias"])
        outputs.append(h)
    weights = haste.ind_rnn_weights(theirs)
    a = F.linear(x, weights.pop("weight"))
    got, _ = torch_ext.ind_rnn(a, **weights, nonlinearity="tanh")
    close(got, torch.stack(outputs, 1), factor=8)


def test_haste_errors(generator):
    lstm, gru = draw(generator, **LSTM), draw(generator, **GRU)
    normed = draw(generator, **LSTM, **LSTM_NORMS)
    wrong = torch.ones(3, 3)
    for call, message in (
        (lambda: haste.lstm_weights(gru), "haste.lstm_weights: state_dict has recurrent_bias, exp"),
        (lambda: haste.gru_weights(lstm), "state_dict lacks recurrent_bias, expected bias, kernel"),
        (lambda: haste.lstm_weights(lstm | {"gamma": wrong}), "lacks beta_h, gamma_h, expected"),
        (
            lambda: haste.lstm_weights(lstm | {"recurrent_kernel": wrong}),
            r"recurrent_kernel has shape \(3, 3\), expected \(H=3, 4H=12\)",
        ),
        (
            lambda: haste.lstm_weights(lstm | {"kernel": wrong}),
            r"kernel has shape \(3, 3\), expected \(input_size, 4H=16\)",
        ),
        (lambda: haste.gru_weights(gru | {"bias": wrong}), r"bias has shape .* expected \(3H=12\)"),
        (
            lambda: haste.lstm_weights(normed | {"gamma": wrong}),
            r"gamma has shape \(3, 3\), expected \(both=2, 4H=16\)",
        ),
        (lambda: haste.lstm_weights(normed | {"beta_h": wrong}), r"beta_h has .* expected \(H=4\)"),
        (
            lambda: haste.torch_state_dict(normed),
            "torch_state_dict: state_dict has beta_h, gamma, g",
        ),
        (lambda: haste.ind_rnn_weights(lstm), "lacks recurrent_scale, expected"),
        (
            lambda: haste.ind_rnn_weights(draw(generator, **(IND | {"bias": (3,)}))),
            r"bias has shape \(3\), expected \(H=4\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- FlashRNN ----
N, D = 2, 3
COUNTS = {"slstm": (4, 4), "lstm": (4, 2), "elman": (1, 1)}


def problem(function, generator):
    G, S = COUNTS[function]
    Wx, R, b, states = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((B, T, G, N, D), (G, N, D, D), (G, N, D), (S, B, 1, N, D))
    )
    if function == "slstm":
        states[2] = torch.rand(B, 1, N, D, generator=generator, dtype=torch.float64) + 0.2
    return Wx, R, b, states


def flashrnn_formula(function, Wx, R, b, states):
    """``R[g, n, out, in]``; all states after the last step, ``(S, B, 1, N, D)``, and h of all."""
    state, outputs = [s[:, 0] for s in states], []
    for t in range(T):
        a = [
            torch.stack(
                [Wx[:, t, g, n] + state[0][:, n] @ R[g, n].T + b[g, n] for n in range(N)], 1
            )
            for g in range(R.shape[0])
        ]
        if function == "elman":
            state = [torch.tanh(a[0])]
        elif function == "lstm":
            i, f, z, o = a
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(z)
            state = [torch.sigmoid(o) * torch.tanh(c), c]
        else:
            (i, f, z, o), (_, c, n, m) = a, state
            kept = F.logsigmoid(f) + m
            m = torch.where(n == 0, i, torch.maximum(i, kept))  # at first nothing is remembered
            i, f = torch.exp(i - m), torch.exp(kept - m)
            c, n = f * c + i * torch.tanh(z), (f * n + i).clamp(min=1)
            state = [torch.sigmoid(o) * c / n, c, n, m]
        outputs.append(state[0])
    return torch.stack(outputs, 1), torch.stack(state)[:, :, None]


OPERATORS = {"slstm": torch_ext.slstm, "lstm": torch_ext.lstm, "elman": torch_ext.elman}


@pytest.mark.parametrize("layout", ["functional", "cuda", "cuda_fused"])
@pytest.mark.parametrize("function", OPERATORS)
def test_flashrnn(function, layout, generator):
    Wx, R, b, states = problem(function, generator)
    want, want_state = flashrnn_formula(function, Wx, R, b, states)
    if layout == "cuda":
        Wx, R, b = Wx.permute(1, 0, 3, 2, 4), R.permute(1, 3, 0, 2), b.permute(1, 0, 2)
        assert Wx.shape[:3] == (T, B, N) and R.shape[0] == N
    elif layout == "cuda_fused":
        Wx, R, b = Wx.permute(1, 0, 3, 4, 2), R.permute(1, 2, 0, 3), b.permute(1, 2, 0)
    Wx, R, b = Wx.contiguous(), R.contiguous(), b.contiguous()
    arguments = flashrnn.arguments(function, Wx, R, b, states, layout)
    got, state = OPERATORS[function](**arguments)
    close(got, want, factor=8)
    close(flashrnn.states(state), want_state, factor=8)
    arguments = flashrnn.arguments(function, Wx, R, layout=layout)  # no bias, no states
    got, state = OPERATORS[function](**arguments)
    zeros = torch.zeros_like(states)
    b = torch.zeros(arguments["R"].shape[:3], dtype=torch.float64)
    want, want_state = flashrnn_formula(function, arguments["x"], arguments["R"], b, zeros)
    close(got, want, factor=8)
    close(flashrnn.states(state), want_state, factor=8)


def test_flashrnn_errors(generator):
    Wx, R, b, states = problem("lstm", generator)
    convert = flashrnn.arguments
    for call, message in (
        (lambda: convert("gru", Wx, R, b), 'function is \'gru\', expected "slstm", "lstm" or "elm'),
        (
            lambda: convert("lstm", Wx, R, b, None, "triton"),
            "layout is 'triton', expected \"functio",
        ),
        (
            lambda: convert("lstm", Wx[0], R, b),
            r"Wx has shape \(7, 4, 2, 3\), expected \(B, T, G, N",
        ),
        (lambda: convert("elman", Wx, R, b), r"Wx has shape .* expected \(B, T, G=1, N, D\)"),
        (
            lambda: convert("lstm", Wx, R[:, :1], b),
            r"R has shape .* expected \(G=4, N=2, D=3, P=3\)",
        ),
        (lambda: convert("lstm", Wx, R, b[:3]), r"b has shape .* expected \(G=4, N=2, D=3\)"),
        (lambda: convert("lstm", Wx, R, b[0]), r"b has shape \(2, 3\), expected \(G, N, D\)"),
        (
            lambda: convert("lstm", Wx, R, b, states[:1]),
            r"states has .* expected \(S=2, B=3, one=1",
        ),
        (
            lambda: flashrnn.initial_state(states[0]),
            r"states has shape .* expected \(S, B, one=1, N",
        ),
        (lambda: flashrnn.states((b, b[:1])), r"state\[1\] has shape \(1, 2, 3\), expected \(B, N"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_examples():
    names = {"torch": torch, "torch_ext": torch_ext}
    for module in (haste, flashrnn):
        result = doctest.testmod(module, extraglobs=names)
        assert result.failed == 0 and result.attempted > 5
