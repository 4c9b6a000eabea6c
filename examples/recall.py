#!/usr/bin/env python3
"""Associative recall: pairs of a key and a value are shown, then keys alone, the values are asked.

    python recall.py                                   mLSTM and MinGRU
    python recall.py --layers mlstm min_gru nn.LSTM nn.GRU
    python recall.py --pairs 8 --steps 1000
    python recall.py --quick                           a look at a smaller task, in some seconds

With 3 pairs and the digits for keys and values a sequence is, a column for each step,

    key     7 0 4   0 7 4
    value   2 9 2   ? ? ?        to be answered with 9 2 2

Every sequence has new pairs, so the answers are in no weight: they must go into the state. That of
mLSTM is a matrix per head, and to add `value key^T` to it and to read it with a query is what its
operator does. MinGRU's state is a vector whose numbers are kept or replaced one by one: it gets to
know which values were shown, and hardly which key each of them came with.

The network is the same for all: embeddings, then blocks of the layer and a multilayer perceptron,
each behind a norm and beside a residual, then logits. The width of the other layers is chosen so
that every network has as many parameters as the first one. They learn from the same sequences, with
the same optimizer; the accuracy is that on sequences that nothing is trained on.

In the end the same networks are asked about fewer and about more pairs than they have learned with.
The output folder gets
  recall.png    accuracy over the steps of training, and over the number of pairs
  recall.json   settings, sizes, accuracies
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
    sys.exit(f"recall: {error}. It needs torch and torch_ext; the README says how to install them")

# All have nn.LSTM's constructor and give the sequence of outputs first.
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlstm": torch_ext.MLSTM,
    "min_gru": torch_ext.MinGRU,
    "min_lstm": torch_ext.MinLSTM,
    "nn.LSTM": nn.LSTM,
    "nn.GRU": nn.GRU,
}
HEADS = ("mlstm",)  # those that have several memories side by side
QUICK = {"pairs": 4, "keys": 16, "values": 16, "dim": 32, "hidden": 32, "blocks": 1, "steps": 160}
SOLVED = 0.95  # accuracy from which on the task counts as solved
TESTED = 256  # sequences


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
        y, _ = self.layer(self.norm(x))
        x = x + self.down(y)
        return x + self.mlp(x)


class Network(nn.Module):
    """keys (B, T) and values (B, T), where the value `values` asks -> logits (B, T, values)."""

    def __init__(self, name: str, hidden: int, args: argparse.Namespace):
        super().__init__()
        options = {"num_heads": args.heads} if name in HEADS else {}
        self.key = nn.Embedding(args.keys, args.dim)
        self.value = nn.Embedding(args.values + 1, args.dim)
        self.blocks = nn.Sequential(
            *(
                Block(LAYERS[name](args.dim, hidden, batch_first=True, **options), args.dim, hidden)
                for _ in range(args.blocks)
            )
        )
        self.norm = nn.LayerNorm(args.dim)
        self.head = nn.Linear(args.dim, args.values)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.key(keys) + self.value(values))))


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def state_size(network: Network, args: argparse.Namespace) -> int:
    """Numbers that the network carries from one step of a sequence to the next."""
    state = network.blocks[0].layer(torch.zeros(1, 1, args.dim))[1]
    tensors = [state] if isinstance(state, Tensor) else state
    return args.blocks * sum(part.numel() for part in tensors)


def as_large(name: str, wanted: int, args: argparse.Namespace) -> int:
    """The width at which a network comes nearest to a number of parameters."""

    def distance(hidden: int) -> int:
        with torch.device("meta"):
            return parameters(Network(name, hidden, args)) - wanted

    unit = args.heads if name in HEADS else 1
    low, high = 0, 1  # in units; a network grows with its width
    while distance(high * unit) < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if distance(middle * unit) < 0 else (low, middle)
    if low > 0 and -distance(low * unit) < distance(high * unit):
        high = low
    return high * unit


def draw_sequences(
    count: int, pairs: int, args: argparse.Namespace, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of every step, (count, 2 * pairs), and the answers, (count, pairs)."""
    keys = torch.rand(count, args.keys, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(args.values, (count, pairs), generator=generator)
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    asked = torch.full_like(values, args.values)
    steps = torch.cat([keys, keys.gather(1, order)], 1), torch.cat([values, asked], 1)
    return *steps, values.gather(1, order)


@torch.no_grad()
def accuracy(network: Network, pairs: int, args: argparse.Namespace) -> float:
    """Share of right answers, on the same sequences in every call."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    keys, values, answers = draw_sequences(TESTED, pairs, args, generator)
    guesses = network(keys, values)[:, pairs:].argmax(-1)
    return float((guesses == answers).float().mean())


def train(network: Network, name: str, args: argparse.Namespace) -> dict[int, float]:
    """The accuracy after some numbers of steps, the last one among them."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1
    )
    curve = {0: accuracy(network, args.pairs, args)}
    every = max(1, args.steps // 40)
    for step in range(1, args.steps + 1):
        keys, values, answers = draw_sequences(args.batch, args.pairs, args, generator)
        logits = network(keys, values)[:, args.pairs :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        if not math.isfinite(loss.item()):
            raise UserError("the loss is not finite any more; a smaller --lr may help")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == args.steps:
            curve[step] = accuracy(network, args.pairs, args)
        if step % (8 * every) == 0 or step == args.steps:
            right = 100 * curve[max(curve)]
            print(f"  {name}: step {step} of {args.steps}, {right:.1f} % right", flush=True)
    return curve


def draw(path: Path, results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5), sharey=True, layout="constrained")
    colours = ["#0b62b8", "#e08a00", "#1f9e77", "#b5489a", "#8a8a8a"]
    for (name, result), colour in zip(results.items(), colours, strict=False):
        sizes = f"{result['parameters']:,} parameters, state of {result['state']:,}"
        style = {"color": colour, "linewidth": 2.4, "label": f"{name}: {sizes}"}
        for axes, curve in ((left, result["curve"]), (right, result["by_pairs"])):
            xs, ys = list(curve), [100 * y for y in curve.values()]
            axes.plot(xs, ys, marker="o" if axes is right else None, **style)
    counts = list(result["by_pairs"])
    chance = {
        "color": "#8a8a8a",
        "linestyle": (0, (4, 3)),
        "label": "guessing one of the values shown",
    }
    left.axhline(100 / args.pairs, **chance)
    right.plot(counts, [100 / count for count in counts], **chance)
    left.set_title(f"while they learn, with {args.pairs} pairs", loc="left", fontsize=11)
    left.set_xlabel("step of training")
    left.set_ylabel("right answers, %")
    left.set_ylim(0, 103)
    right.set_title(f"afterwards, with 1 to {counts[-1]} pairs", loc="left", fontsize=11)
    right.set_xlabel("pairs in a sequence")
    for axes in (left, right):
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    entries = left.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower left", ncols=2, frameon=False)
    text = f"Associative recall: {args.keys} keys, {args.values} values"
    figure.suptitle(text, x=0.01, ha="left", fontsize=14, fontweight="bold")
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
    group.add_argument("--pairs", type=positive, default=16, help="shown in each sequence")
    group.add_argument("--keys", type=positive, default=64, help="different ones")
    group.add_argument("--values", type=positive, default=64, help="different ones")
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--layers",
        nargs="+",
        choices=list(LAYERS),
        default=["mlstm", "min_gru"],
        metavar="LAYER",
        help=f"those to compare, of {', '.join(LAYERS)}; the first has the width --hidden",
    )
    group.add_argument("--dim", type=positive, default=64, help="width of the blocks")
    group.add_argument("--hidden", type=positive, default=64, help="width of the first layer")
    group.add_argument("--heads", type=positive, default=2, help="of mLSTM")
    group.add_argument("--blocks", type=positive, default=2, help="how many of them")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, default=800, help="updates of the weights")
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
    if args.pairs > args.keys:
        parser.error(
            f"argument --pairs: {args.pairs} pairs need as many keys, --keys is {args.keys}"
        )
    if args.values < 2:
        parser.error("argument --values: with one value there is nothing to remember")
    for name in args.layers:
        if args.layers.count(name) > 1:
            parser.error(f"argument --layers: {name} is named twice")
    if args.layers[0] in HEADS and args.hidden % args.heads:
        parser.error(f"argument --hidden: {args.hidden} is not a multiple of --heads {args.heads}")
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

    print(
        f"{args.pairs} pairs of {args.keys} keys and {args.values} values; to answer with one of "
        f"the values shown is right in {100 / args.pairs:.1f} %."
    )
    numbers = {1 << k for k in range(20)} | {3 << k for k in range(20)} | {args.pairs}
    numbers = [count for count in sorted(numbers) if count <= min(2 * args.pairs, args.keys)]
    results: dict[str, dict[str, Any]] = {}
    for name in args.layers:
        hidden = args.hidden
        if results:
            hidden = as_large(name, results[args.layers[0]]["parameters"], args)
        torch.manual_seed(args.seed)
        network = Network(name, hidden, args)
        results[name] = {
            "hidden": hidden,
            "parameters": parameters(network),
            "state": state_size(network, args),
        }
        print(
            f"{name} of width {hidden}: {results[name]['parameters']:,} parameters, "
            f"{results[name]['state']:,} numbers of state"
        )
        results[name]["curve"] = train(network, name, args)
        results[name]["by_pairs"] = {count: accuracy(network, count, args) for count in numbers}

    print(f"\nRight answers in %, of {TESTED} sequences, by the number of pairs in them:\n")
    width = max(map(len, args.layers))
    print(" " * width + "".join(f"{count:7d}" for count in numbers))
    for name, result in results.items():
        cells = "".join(f"{100 * share:7.1f}" for share in result["by_pairs"].values())
        print(name.ljust(width) + cells)
    print()
    for name, result in results.items():
        verdict = "solves it" if result["curve"][args.steps] >= SOLVED else "DOES NOT SOLVE it"
        share = 100 * result["curve"][args.steps]
        print(f"{name} {verdict}: {share:.1f} % right with {args.pairs} pairs.")

    draw(args.out / "recall.png", results, args)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {"settings": settings, "solved_from": SOLVED, "results": results}
    (args.out / "recall.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{args.out / 'recall.png'}: the accuracies, drawn")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"recall: {error}")
    except KeyboardInterrupt:
        sys.exit("recall: stopped")
