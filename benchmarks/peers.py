"""Peers, timed in turn with ours: minGRU-pytorch, and the minRNN paper's Python loops."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from measure import Effort, Samples, measure
from operators import Checker, WrongResult
from shapes import OPERATORS, PAPER_BATCH, PAPER_RATIOS, PEER_GOALS
from torch import nn
from torch.nn import functional as F

import torch_ext

# Accepted distance of two results, in relation to their norm. minGRU-pytorch works in log space:
# its float32 error grows with T and reaches 5e-3 in the gate's gradient at T = 2048, where ours
# stays at 2e-7. Norms, not largest values, because its gradient of a candidate that is exactly zero
# is 0 (it goes through relu), where g has the slope 1.
LOG_SPACE_TOLERANCE = 1e-2
LOOP_TOLERANCE = 1e-4


def has_mingru_pytorch() -> bool:
    return importlib.util.find_spec("minGRU_pytorch") is not None


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _agree(ours: Callable, theirs: Callable, tolerance: float, what: str) -> float:
    """Runs both once; the results (tensors in the same order) must agree before they are timed."""
    difference = 0.0
    for a, b in zip(ours(), theirs(), strict=True):
        one = _difference(a.detach(), b.detach())
        if not one <= tolerance:
            raise WrongResult(
                f"{what}: ours and the peer's result differ by {one:.1e} of the norm "
                f"(accepted: {tolerance:.0e})"
            )
        difference = max(difference, one)
    return difference


def _row(
    what: str,
    peer: str,
    ours: Samples,
    theirs: Samples,
    threads: int,
    difference: float | None,
    **more: object,
) -> dict:
    """Ratio of the best rounds; and its range, round by round."""
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return {
        "what": what,
        "peer": peer,
        "threads": threads,
        "ours": ours.summary(),
        "theirs": theirs.summary(),
        "ratio": theirs.best / ours.best,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "relative_difference": difference,
        **more,
    }


# -- minGRU-pytorch --------------------------------------------------------------------------------


class Projected:
    """Stands for the output of the peer's Linear: its forward asks it for a shape and two halves.

    With the Linear replaced by Identity the peer's own forward then does exactly its gates and its
    scan, on separate contiguous tensors, as ours does.
    """

    def __init__(self, candidate: torch.Tensor, gate: torch.Tensor):
        self.halves = (candidate, gate)
        self.shape = candidate.shape

    def chunk(self, chunks: int, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.halves


def against_mingru_pytorch(
    shape: tuple[int, int, int], threads: int, effort: Effort
) -> Iterator[dict]:
    from minGRU_pytorch.minGRU import minGRU as PeerMinGRU

    name = "min_gru[g]"
    Checker().check(name, OPERATORS[name], shape, torch.float32, ())

    peer_name = "minGRU-pytorch"
    batch, time, dim = shape
    torch.manual_seed(0)
    x = torch.randn(batch, time, dim)
    grad_h = torch.randn(batch, time, dim)

    # Gates and scan.
    peer = PeerMinGRU(dim)
    projections = peer.to_hidden_and_gate
    peer.to_hidden_and_gate = nn.Identity()
    with torch.no_grad():
        candidate, gate = (t.contiguous() for t in projections(x).chunk(2, dim=-1))
    leaves = [gate.clone().requires_grad_(), candidate.clone().requires_grad_()]

    def our_forward() -> tuple[torch.Tensor]:
        with torch.inference_mode():
            return (torch_ext.min_gru(gate, candidate, activation="g")[0],)

    def their_forward() -> tuple[torch.Tensor]:
        with torch.inference_mode():
            return (peer(Projected(candidate, gate)),)

    def our_training() -> tuple[torch.Tensor, ...]:
        h, _ = torch_ext.min_gru(leaves[0], leaves[1], activation="g")
        return torch.autograd.grad(h, leaves, grad_h)

    def their_training() -> tuple[torch.Tensor, ...]:
        h = peer(Projected(leaves[1], leaves[0]))
        return torch.autograd.grad(h, leaves, grad_h)

    for what, ours, theirs in (
        ("gates and scan, forward", our_forward, their_forward),
        ("gates and scan, forward+backward", our_training, their_training),
    ):
        difference = _agree(ours, theirs, LOG_SPACE_TOLERANCE, f"{peer_name}, {what}")
        times = measure({"ours": ours, "theirs": theirs}, effort)
        yield _row(
            f"min_gru: {what}",
            peer_name,
            times["ours"],
            times["theirs"],
            threads,
            difference,
            shape=list(shape),
            goal=PEER_GOALS.get(what),
        )

    # The whole layer, with the same weights: ours has the gate's rows first.
    peer.to_hidden_and_gate = projections
    layer = torch_ext.MinGRU(dim, dim, bias=False, batch_first=True, activation="g")
    with torch.no_grad():
        hidden_rows, gate_rows = projections.weight.chunk(2)
        layer.weight_ih_l0.copy_(torch.cat((gate_rows, hidden_rows)))
    x.requires_grad_()

    def our_step() -> tuple[torch.Tensor, ...]:
        out, _ = layer(x)
        grad_x, grad_weight = torch.autograd.grad(out, (x, layer.weight_ih_l0), grad_h)
        return out, grad_x, grad_weight

    def their_step() -> tuple[torch.Tensor, ...]:
        out = peer(x)
        grad_x, grad_weight = torch.autograd.grad(out, (x, projections.weight), grad_h)
        return out, grad_x, grad_weight

    def reordered() -> tuple[torch.Tensor, ...]:
        out, grad_x, grad_weight = their_step()
        return out, grad_x, torch.cat(grad_weight.chunk(2)[::-1])

    grad_projected = torch.randn(batch, time, 2 * dim)

    def projections_alone() -> object:
        return torch.autograd.grad(projections(x), (x, projections.weight), grad_projected)

    what = "layer, training step"
    difference = _agree(our_step, reordered, LOG_SPACE_TOLERANCE, f"{peer_name}, {what}")
    times = measure(
        {"ours": our_step, "theirs": their_step, "projections": projections_alone},
        effort,
    )
    yield _row(
        f"MinGRU: {what}",
        peer_name,
        times["ours"],
        times["theirs"],
        threads,
        difference,
        shape=list(shape),
        goal=PEER_GOALS[what],
        projections_alone=times["projections"].summary(),
    )


# -- the paper's table -----------------------------------------------------------------------------


class LoopGRU(nn.Module):
    """torch.nn.GRU's equations as a Python loop, (T, B, I) -> (T, B, H).

    Kind to the loop: one matrix product projects all inputs at once, and unbind's backward is one
    stack, where indexing x[t] would write a whole zero gradient at every step.
    """

    def __init__(self, twin: nn.GRU):
        super().__init__()
        self.twin = twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = self.twin
        h = x.new_zeros(x.shape[1], twin.hidden_size)
        outputs = []
        for projected in F.linear(x, twin.weight_ih_l0, twin.bias_ih_l0).unbind(0):
            recurrent = F.linear(h, twin.weight_hh_l0, twin.bias_hh_l0)
            reset_x, update_x, new_x = projected.chunk(3, 1)
            reset_h, update_h, new_h = recurrent.chunk(3, 1)
            reset = torch.sigmoid(reset_x + reset_h)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + reset * new_h)
            h = torch.lerp(new, h, update)
            outputs.append(h)
        return torch.stack(outputs)


class LoopLSTM(nn.Module):
    """torch.nn.LSTM's equations as a Python loop, (T, B, I) -> (T, B, H); see LoopGRU."""

    def __init__(self, twin: nn.LSTM):
        super().__init__()
        self.twin = twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = self.twin
        h = x.new_zeros(x.shape[1], twin.hidden_size)
        c = torch.zeros_like(h)
        bias = twin.bias_ih_l0 + twin.bias_hh_l0
        outputs = []
        for projected in F.linear(x, twin.weight_ih_l0, bias).unbind(0):
            gates = projected + F.linear(h, twin.weight_hh_l0)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs)


def _training(module: nn.Module, x: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        out = module(x)
        if isinstance(out, tuple):
            out = out[0]
        loss = out.square().mean()
        return (out, *torch.autograd.grad(loss, parameters))

    return step


def _check_layer(kind: str, layer: nn.Module, x: torch.Tensor) -> None:
    """Our layer's output for two rows against its equations in float64, written out here."""
    reference = {"GRU": torch_ext.min_gru_reference, "LSTM": torch_ext.min_lstm_reference}[kind]
    with torch.no_grad():
        out = layer(x)[0][:2].double()
        weight, bias = layer.weight_ih_l0.double(), layer.bias_ih_l0.double()
        blocks = F.linear(x[:2].double(), weight, bias).chunk(2 if kind == "GRU" else 3, dim=-1)
        difference = _difference(out, reference(*blocks, activation="g")[0])
    if not difference <= LOOP_TOLERANCE:
        raise WrongResult(
            f"Min{kind} layer is wrong by {difference:.1e} of its norm "
            f"(accepted: {LOOP_TOLERANCE:.0e})"
        )


def papers_table(
    times: tuple[int, ...], width: int, threads: int, effort: Effort
) -> Iterator[dict]:
    """Forward, loss and backward of one layer, batch 64: ours, the loops and torch.nn in turn."""
    for time in times:
        torch.manual_seed(0)
        x = torch.randn(PAPER_BATCH, time, width)
        x_time_major = x.transpose(0, 1).contiguous()
        builtin = {"GRU": nn.GRU(width, width), "LSTM": nn.LSTM(width, width)}
        loops = {"GRU": LoopGRU(builtin["GRU"]), "LSTM": LoopLSTM(builtin["LSTM"])}
        ours = {
            "GRU": torch_ext.MinGRU(width, width, batch_first=True, activation="g"),
            "LSTM": torch_ext.MinLSTM(width, width, batch_first=True, activation="g"),
        }
        for kind in ("GRU", "LSTM"):
            calls = {
                "ours": _training(ours[kind], x),
                "loop": _training(loops[kind], x_time_major),
                "torch.nn": _training(builtin[kind], x_time_major),
            }
            _check_layer(kind, ours[kind], x)
            _agree(calls["loop"], calls["torch.nn"], LOOP_TOLERANCE, f"{kind} loop, T={time}")
            samples = measure(calls, effort)
            name = f"min_{kind.lower()}"
            for peer, key in ((f"{kind} as a Python loop", "loop"), (f"nn.{kind}", "torch.nn")):
                yield _row(
                    f"Min{kind} layer, T={time}",
                    peer,
                    samples["ours"],
                    samples[key],
                    threads,
                    None,
                    shape=[PAPER_BATCH, time, width],
                    papers_ratio=PAPER_RATIOS.get((name, time)) if key == "loop" else None,
                )
