#!/usr/bin/env python3
"""Parity: is the number of ones so far odd? Who keeps track of a state, and who does not.

    python parity.py                                  sLSTM, LSTM, mLSTM, MinLSTM and Mamba
    python parity.py --layers slstm gru nn.LSTM
    python parity.py --length 20 --steps 200
    python parity.py --quick                          a look at a smaller task, in some seconds

    bits     0 1 1 0 1 0 0 1
    parity   0 1 0 0 1 1 1 0

A network that is told the last bit and the parity before it has two states to tell apart and one bit
to flip: a recurrence whose gates see the state through a matrix (sLSTM, LSTM, GRU) learns that, and
having learned it goes on for ever. One that is parallel over time multiplies its state by numbers that
do not depend on it and are not negative (mLSTM, MinLSTM, MinGRU, Mamba): it can forget, but not flip.
What it learns of the lengths that it has seen does not carry over to longer sequences.
(Merrill et al. 2024, "The Illusion of State in State-Space Models", arXiv:2404.08819; Grazzi et al.
2025, arXiv:2411.12537; Beck et al. 2024, arXiv:2405.04517, figure 4.)

The network is the same for all: an embedding, blocks of the layer and a multilayer perceptron, each
behind a norm and beside a residual, then logits at every step. The lengths of training are drawn from
1 to --length. In the end the parity of whole sequences is asked for, up to --times as long.
The output folder gets
  parity.png    right answers over the length of the sequence
  parity.json   settings, sizes, accuracies
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can mend; printed as one sentence."""


try:
    import torch
    from torch import Tensor, nn

    import torch_ext
except ImportError as error:
    sys.exit(f"parity: {error}. It needs torch and torch_ext; the README says how to install them")


def sequence_layer(kind: Callable[..., nn.Module], **options: Any) -> Callable[..., nn.Module]:
    return lambda dim, hidden: kind(dim, hidden, batch_first=True, **options)


class Mamba(nn.Module):
    """torch_ext.Mamba, whose width is that of the block, with the outputs of the others."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.mamba = torch_ext.Mamba(dim)
        self.out = nn.Identity() if hidden == dim else nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.out(self.mamba(x)), None


# (dim, hidden) -> a module that gives the sequence of outputs first.
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "slstm": sequence_layer(torch_ext.SLSTM),
    "lstm": sequence_layer(torch_ext.LSTM),
    "gru": sequence_layer(torch_ext.GRU),
    "rnn": sequence_layer(torch_ext.RNN),
    "nn.LSTM": sequence_layer(nn.LSTM),
    "mlstm": sequence_layer(torch_ext.MLSTM, num_heads=2),
    "min_lstm": sequence_layer(torch_ext.MinLSTM),
    "min_gru": sequence_layer(torch_ext.MinGRU),
    "mamba": Mamba,
}
QUICK = {"length": 20, "steps": 300, "layers": ["slstm", "lstm", "min_lstm"]}
SOLVED = 0.95  # share of right answers at the greatest length from which on parity counts as solved
TESTED = 512  # sequences of each length


class Block(nn.Module):
    """The layer, then a multilayer perceptron; a norm before each and a residual around it."""

    def __init__(self, layer: nn.Module, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layer = layer
        self.down = nn.Linear(hidden, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.layer(self.norm(x))[0])
        return x + self.mlp(x)


class Network(nn.Module):
    """bits (B, T) -> logits of even and odd after every one of them, (B, T, 2)."""

    def __init__(self, name: str, args: argparse.Namespace):
        super().__init__()
        dim, hidden = args.dim, args.hidden
        self.bit = nn.Embedding(2, dim)
        self.blocks = nn.Sequential(
            *(Block(LAYERS[name](dim, hidden), dim, hidden) for _ in range(args.blocks))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bit(bits))))


def draw_bits(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits, and the parity after each of them: (count, length)."""
    bits = torch.randint(2, (count, length), generator=generator)
    return bits, bits.cumsum(1) % 2


@torch.no_grad()
def accuracy(network: nn.Module, length: int, args: argparse.Namespace) -> float:
    """Share of sequences whose parity is right at the end, of the same ones in every call."""
    bits, parity = draw_bits(TESTED, length, torch.Generator().manual_seed(args.seed + length))
    return float((network(bits)[:, -1].argmax(-1) == parity[:, -1]).float().mean())


def train(network: nn.Module, name: str, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1
    )
    every = max(1, args.steps // 5)
    for step in range(1, args.steps + 1):
        length = int(torch.randint(1, args.length + 1, (), generator=generator))
        bits, parity = draw_bits(args.batch, length, generator)
        loss = nn.functional.cross_entropy(network(bits).flatten(0, 1), parity.flatten())
        if not math.isfinite(loss.item()):
            raise UserError("the loss is not finite any more; a smaller --lr may help")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == args.steps:
            right = 100 * accuracy(network, args.length, args)
            print(
                f"  {name}: step {step} of {args.steps}, {right:.1f} % right at length "
                f"{args.length}",
                flush=True,
            )


def lengths(args: argparse.Namespace) -> list[int]:
    """Tested ones: eighths of the longest that is trained on, then more by its quarter."""
    n = args.length
    shorter = {max(1, n * k // 8) for k in (1, 2, 4, 6, 8)}
    return sorted(shorter | {n + n * k // 4 for k in range(1, 4 * (args.times - 1) + 1)})


def draw(path: Path, results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.6, 5.8), layout="constrained")
    colours = [
        "#0b62b8",
        "#1f9e77",
        "#e08a00",
        "#b5489a",
        "#c0392b",
        "#6b7f2a",
        "#5b5bd6",
        "#444444",
    ]
    marks = "osD^vPX*"
    axes.axvspan(0, args.length, color="#f2f2f2", label="lengths trained on")
    for k, (name, result) in enumerate(results.items()):
        curve = result["by_length"]
        axes.plot(
            list(curve),
            [100 * y for y in curve.values()],
            color=colours[k % len(colours)],
            marker=marks[k % len(marks)],
            markersize=max(5, 9 - 2 * k),  # curves may lie on each other
            linewidth=max(2.2, 6 - 2 * k),
            label=f"{name}: {result['parameters']:,} parameters",
        )
    axes.axhline(50, color="#8a8a8a", linestyle=(0, (4, 3)), label="guessing")
    axes.set_xlabel("length of the sequence")
    axes.set_ylabel("right answers, %")
    axes.set_xlim(0, args.length * args.times * 1.02)
    axes.set_ylim(40, 103)
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=3, frameon=False)
    axes.set_title("Parity of a sequence of bits", loc="left", fontsize=14, fontweight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    group = parser.add_argument_group("task")
    group.add_argument("--length", type=positive, default=40, help="the longest that is trained on")
    group.add_argument(
        "--times", type=positive, default=4, help="as long are those that are tested"
    )
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--layers",
        nargs="+",
        choices=list(LAYERS),
        default=["slstm", "lstm", "mlstm", "min_lstm", "mamba"],
        metavar="LAYER",
        help=f"those to compare, of {', '.join(LAYERS)}",
    )
    group.add_argument("--dim", type=positive, default=32, help="width of the blocks")
    group.add_argument("--hidden", type=positive, default=32, help="width of the layers")
    group.add_argument("--blocks", type=positive, default=1, help="how many of them")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, default=600, help="updates of the weights")
    group.add_argument("--batch", type=positive, default=32, help="sequences for each of them")
    group.add_argument("--lr", type=float, default=0.01, help="largest learning rate")
    group.add_argument("--seed", type=int, default=0, help="of all random numbers")
    group.add_argument("--threads", type=positive, default=1, help="of torch")
    add("--quick", action="store_true", help="other defaults: a smaller task, in some seconds")
    add("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    args = parser.parse_args(arguments)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(arguments)
    if not args.lr > 0:
        parser.error(f"argument --lr: {args.lr} is not positive")
    if args.times < 2:
        parser.error("argument --times: 1 time is no longer than what is trained on")
    for name in args.layers:
        if args.layers.count(name) > 1:
            parser.error(f"argument --layers: {name} is named twice")
    if "mlstm" in args.layers and args.hidden % 2:
        parser.error(f"argument --hidden: {args.hidden} is odd, mlstm has 2 heads")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws the results, is missing: pip install matplotlib")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {args.out} cannot be made: {error.strerror}") from None
    torch.set_num_threads(args.threads)

    print(f"Trained on 1 to {args.length} bits; guessing is right in 50 %.")
    results: dict[str, dict[str, Any]] = {}
    for name in args.layers:
        torch.manual_seed(args.seed)
        network = Network(name, args)
        size = sum(p.numel() for p in network.parameters())
        print(f"{name}: {size:,} parameters")
        train(network, name, args)
        by_length = {length: accuracy(network, length, args) for length in lengths(args)}
        results[name] = {"parameters": size, "by_length": by_length}

    shown = [args.length * k for k in range(1, args.times + 1)]
    print(f"\nRight answers in %, of {TESTED} sequences, by their length:\n")
    width = max(map(len, args.layers))
    print(" " * width + "".join(f"{length:7d}" for length in shown))
    for name, result in results.items():
        cells = "".join(f"{100 * result['by_length'][length]:7.1f}" for length in shown)
        print(name.ljust(width) + cells)
    print()
    longest = args.length * args.times
    for name, result in results.items():
        share = result["by_length"][longest]
        verdict = "solves it" if share >= SOLVED else "DOES NOT SOLVE it"
        print(f"{name} {verdict}: {100 * share:.1f} % right at length {longest}.")

    draw(args.out / "parity.png", results, args)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {"settings": settings, "solved_from": SOLVED, "results": results}
    (args.out / "parity.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{args.out / 'parity.png'}: the accuracies, drawn")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"parity: {error}")
    except KeyboardInterrupt:
        sys.exit("parity: stopped")
