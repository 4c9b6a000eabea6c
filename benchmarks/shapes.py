"""The one table of what is timed: operators, what they must move, shapes, peers, goals."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """What a fused operator cannot avoid, counted per (batch, time, channel) element.

    Tensors are counted, not bytes, so that one entry serves every dtype. States are left out: they
    are one time step among thousands.
    """

    function: str
    inputs: tuple[str, ...]  # in the order of the function's arguments
    backward_tensors: int  # read: the inputs it needs, h, grad_h; written: one gradient per input
    exps: int  # exponentials per element, forward; the backward recomputes the gates, so the same
    options: tuple[tuple[str, str], ...] = ()

    @property
    def forward_tensors(self) -> int:
        return len(self.inputs) + 1

    def tensors_moved(self, mode: str) -> int:
        return {
            "forward": self.forward_tensors,
            "backward": self.backward_tensors,
            "forward+backward": self.forward_tensors + self.backward_tensors,
        }[mode]

    def tensors_alive(self, mode: str) -> int:
        """The working set: inputs and h, and with a backward grad_h and the inputs' gradients."""
        if mode == "forward":
            return self.forward_tensors
        return 2 * len(self.inputs) + 2

    def exps_needed(self, mode: str) -> int:
        return self.exps * (2 if mode == "forward+backward" else 1)


OPERATORS = {
    # The backward of linear_scan does not need b: a, h, grad_h in, two gradients out.
    "linear_scan": Operator("linear_scan", ("a", "b"), 5, 0),
    "min_gru": Operator("min_gru", ("gate", "candidate"), 6, 1),
    "min_gru[g]": Operator("min_gru", ("gate", "candidate"), 6, 2, (("activation", "g"),)),
    "min_lstm": Operator("min_lstm", ("forget_gate", "input_gate", "candidate"), 8, 2),
    "min_lstm[g]": Operator(
        "min_lstm", ("forget_gate", "input_gate", "candidate"), 8, 3, (("activation", "g"),)
    ),
}
DEFAULT_OPERATORS = ("linear_scan", "min_gru", "min_gru[g]", "min_lstm")
MODES = ("forward", "backward", "forward+backward")
DEFAULT_MODES = ("forward", "forward+backward")

# (B, T, D). "in-L2" has no fixed width: two rows per thread of 64 steps, and as many channels (a
# multiple of 64) as let everything the call touches fit into half of each core's L2.
SHAPES: dict[str, tuple[int, int, int] | None] = {
    "8x2048x1024": (8, 2048, 1024),
    "32x1024x1024": (32, 1024, 1024),
    "in-L2": None,
}
L2_ROWS_PER_THREAD = 2
L2_TIME = 64

# Smallest shares of triad bandwidth that we accept: data larger than L2, data in L2.
GOALS = {"streamed": 0.85, "in-L2": 0.75}


def resolve_shape(
    name: str, operator: Operator, mode: str, threads: int, itemsize: int, l2_bytes: int
) -> tuple[int, int, int]:
    """The shape behind a name of the table, or behind "BxTxD"."""
    if name == "in-L2":
        rows = L2_ROWS_PER_THREAD * L2_TIME
        per_channel = rows * itemsize * operator.tensors_alive(mode)
        return L2_ROWS_PER_THREAD * threads, L2_TIME, max(64, l2_bytes // 2 // per_channel & ~63)
    if name in SHAPES:
        return SHAPES[name]
    try:
        batch, time, dim = (int(size) for size in name.split("x"))
    except ValueError:
        raise SystemExit(
            f"run.py: unknown shape {name!r}: use one of {', '.join(SHAPES)}, "
            "or BxTxD such as 4x512x256"
        ) from None
    return batch, time, dim


# minGRU-pytorch: gates and scan alone, and the whole layer (dim = inner dim = D).
PEER_SHAPE = (8, 2048, 1024)
PEER_GOALS = {"gates and scan, forward+backward": 100.0, "layer, training step": 3.5}

# The speed-ups that the minRNN paper reports ("Were RNNs All We Needed?", arXiv 2410.01201, batch
# 64, one T4 GPU) over an LSTM and a GRU written as Python loops. It does not state the width.
PAPER_BATCH = 64
PAPER_RATIOS = {
    ("min_gru", 512): 175.0,
    ("min_lstm", 512): 235.0,
    ("min_gru", 4096): 1324.0,
    ("min_lstm", 4096): 1361.0,
}
PAPER_TIMES = (512, 4096)

# --quick: only to see that everything works.
QUICK_SHAPES = ("2x256x256", "in-L2")
QUICK_PEER_SHAPE = (2, 128, 64)
QUICK_PAPER_TIMES = (32, 64)
