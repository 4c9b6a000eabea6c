#!/usr/bin/env python3
"""Trains a language model of characters (MinRNNLM, MambaLM, xLSTMLM) on a text; it then writes.

    python char_lm.py                       an excerpt of Shakespeare, which comes with this script
    python char_lm.py my_book.txt --layer min_lstm --steps 2000
    python char_lm.py --layer mlstm --steps 300
    python char_lm.py --layer mamba --steps 200 --compare-reference curves.png
    python char_lm.py --steps 50            a quick look

The text is cut into a few long tracks, the model reads all of them at once and carries its state,
detached, from piece to piece (truncated backpropagation through time). The last tenth of the text
is never trained on: there the model's bits per character are compared with those of a 2-gram
model, which predicts each character from the two before it. In the end the model writes, one
character per `step`, with a state whose size does not grow with the text.

The layers mlstm, retention and linear_attention stand in MinRNNLM's blocks in the place of MinGRU,
mamba and mamba2 are MambaLM's, and xlstm is the paper's language model of mLSTM blocks.

With --compare-reference the same model learns twice more: once on the operators' references, plain
PyTorch loops over time, which must give the same curve but for rounding; and once from another
seed, which shows what chance does.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
import unittest.mock
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parent / "data" / "shakespeare_excerpt.txt"


class UserError(Exception):
    """Something the user can mend; printed as one sentence."""


try:
    import torch
    from torch import Tensor, nn

    import torch_ext
except ImportError as error:
    sys.exit(f"char_lm: {error}. It needs torch and torch_ext; the README says how to install them")

Model = torch_ext.MinRNNLM | torch_ext.MambaLM | torch_ext.xLSTMLM


# The operators that each layer calls, which is in the module of torch_ext of the same name.
OPERATORS = {
    "min_gru": ["min_gru"],
    "min_lstm": ["min_lstm"],
    "mlstm": ["mlstm"],
    "retention": ["retention"],
    "linear_attention": ["linear_attention"],
    "xlstm": ["causal_conv1d", "mlstm"],
    "mamba": ["causal_conv1d", "selective_scan"],
    "mamba2": ["causal_conv1d", "ssd"],
}


def on_references(layer: str) -> Any:
    """A context in which a layer runs on plain PyTorch loops over time, much slower."""
    references = {name: getattr(torch_ext, name + "_reference") for name in OPERATORS[layer]}
    return unittest.mock.patch.multiple(sys.modules[f"torch_ext.{layer}"], **references)


class Mixer(nn.Module):
    """A layer with two states in the clothes of MinGRU: they travel as one, (1, B, numbers)."""

    def __init__(self, layer: nn.Module, shapes: list[list[int]]):
        super().__init__()
        self.layer = layer
        self.shapes = shapes  # of the states, without B
        self.sizes = [math.prod(shape) for shape in shapes]

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer.prefill(x, self.apart(state))
        return y, self.together(after)

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        return self.together(self.layer.init_state(batch_size))

    @torch.jit.export
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer.step(x, self.apart(state))
        return y, self.together(after)

    def together(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([part.flatten(1) for part in state], 1).unsqueeze(0)

    def apart(self, state: Tensor) -> tuple[Tensor, Tensor]:
        first, second = state[0].split(self.sizes, 1)
        return first.unflatten(1, self.shapes[0]), second.unflatten(1, self.shapes[1])


class LinearAttention(Mixer):
    """It is a mean over all that came before, so its input, the last few steps, goes beside it."""

    def __init__(self, dim: int, heads: int):
        layer = torch_ext.LinearAttention(dim, heads)
        super().__init__(layer, [list(part.shape[1:]) for part in layer.init_state(1)])

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer.prefill(x, self.apart(state))
        return x + y, self.together(after)

    @torch.jit.export
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer.step(x, self.apart(state))
        return x + y, self.together(after)


class Retention(Mixer):
    """It has one state."""

    def __init__(self, dim: int, heads: int):
        layer = torch_ext.Retention(dim, heads)
        super().__init__(layer, [list(layer.init_state(1).shape[1:])])

    def together(self, state: Tensor) -> Tensor:
        return state.flatten(1).unsqueeze(0)

    def apart(self, state: Tensor) -> Tensor:
        return state[0].unflatten(1, self.shapes[0])


class MLSTM(Mixer):
    """It has three, (1, B, ...), and nn.LSTM's way to be called."""

    def __init__(self, dim: int, heads: int):
        layer = torch_ext.MLSTM(dim, 2 * dim, batch_first=True, num_heads=heads, qk_size=dim)
        super().__init__(layer, [list(part.shape[2:]) for part in layer.init_state(1)])

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer(x, self.apart(state))
        return y, self.together(after)

    def together(self, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.cat([part.flatten(2) for part in state], 2)

    def apart(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        C, n, m = state.split(self.sizes, 2)
        C, n = C.unflatten(2, self.shapes[0]), n.unflatten(2, self.shapes[1])
        return C, n, m.unflatten(2, self.shapes[2])


# Layers in MinGRU's place, and whether their own last projection leads back to the block's width.
MIXERS = {"mlstm": (MLSTM, False), "retention": (Retention, True)}
MIXERS["linear_attention"] = (LinearAttention, True)


def make_model(characters: int, args: argparse.Namespace, seed: int) -> Model:
    torch.manual_seed(seed)
    size = (characters, args.dim, args.layers)
    if args.layer == "xlstm":
        return torch_ext.xLSTMLM(*size, num_heads=args.heads, dropout=args.dropout)
    if args.layer == "mamba":
        return torch_ext.MambaLM(*size, pad_vocab_size_multiple=1)
    if args.layer == "mamba2":
        options = {"layer": "Mamba2", "d_state": 64, "headdim": 2 * args.dim // args.heads}
        return torch_ext.MambaLM(*size, pad_vocab_size_multiple=1, ssm_cfg=options)
    if args.layer not in MIXERS:
        return torch_ext.MinRNNLM(*size, layer=args.layer, dropout=args.dropout)
    model = torch_ext.MinRNNLM(*size, dropout=args.dropout)
    make, projects = MIXERS[args.layer]
    for block in model.layers:
        block.rnn = make(args.dim, args.heads)
        if projects:
            block.down = nn.Identity()
    return model


def detached(state: Any) -> Any:
    """A model's state, tensors in tuples and lists, without its history."""
    if isinstance(state, Tensor):
        return state.detach()
    return type(state)(detached(part) for part in state)


def read(path: Path, length: int) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: {error.reason}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    needed = 20 * (length + 1)  # so that a tenth of it holds two windows
    if len(text) < needed:
        raise UserError(
            f"{path} has {len(text):,} characters and at least {needed:,} are needed for windows "
            f"of {length} (--length)"
        )
    return text


def ngram_bits(train: str, validation: str, order: int = 2) -> float:
    """Bits per character of a model that sees the last `order` characters.

    Every context's counts are mixed with the prediction of the next shorter context, which counts
    as much as five characters; the shortest context is none, mixed with equal probabilities.
    """
    counts = [Counter[str]() for _ in range(order + 1)]  # of contexts and the character after
    totals = [Counter[str]() for _ in range(order + 1)]  # of contexts
    for k in range(order + 1):
        for i in range(k, len(train)):
            counts[k][train[i - k : i + 1]] += 1
            totals[k][train[i - k : i]] += 1
    size = len(set(train) | set(validation))
    bits = 0.0
    for i in range(order, len(validation)):
        p = 1 / size
        for k in range(order + 1):
            context = validation[i - k : i]
            p = (counts[k][validation[i - k : i + 1]] + 5 * p) / (totals[k][context] + 5)
        bits -= math.log2(p)
    return bits / (len(validation) - order)


@torch.no_grad()
def model_bits(model: Model, ids: Tensor) -> float:
    """Bits per character over a whole text, the state carried through it."""
    model.eval()
    state = model.init_state(1)
    nats = 0.0
    for start in range(0, len(ids) - 1, 4096):
        wanted = ids[start + 1 : start + 4097]
        logits, state = model.prefill(ids[None, start : start + len(wanted)], state)
        nats += float(nn.functional.cross_entropy(logits[0], wanted, reduction="sum"))
    model.train()
    return nats / (len(ids) - 1) / math.log(2)


class Progress:
    """tqdm where it is installed and someone is watching, a line now and then otherwise."""

    def __init__(self, total: int):
        self.total, self.done, self.told, self.bar = total, 0, -math.inf, None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=total, desc="training", unit="step", leave=False)
            except ImportError:
                pass

    def update(self, text: str) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif time.monotonic() - self.told > 5 or self.done == self.total:
            self.told = time.monotonic()
            print(f"  step {self.done} of {self.total}, {text}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def train(model: Model, ids: Tensor, args: argparse.Namespace, seed: int) -> list[float]:
    """The bits per character of every step, on the piece that it learns from."""
    generator = torch.Generator().manual_seed(seed)
    # Matrices decay; biases, norms and Mamba's A_log and D do not.
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": 0.1},
    ]
    for p in model.parameters():
        groups[p.dim() > 1 and not hasattr(p, "_no_weight_decay")]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1
    )
    progress = Progress(args.steps)
    rows = min(args.batch, (len(ids) - 1) // args.length)
    at, length, state = 0, 0, None
    bits: list[float] = []
    inputs = wanted = torch.empty(0)
    for _ in range(args.steps):
        if at >= length:  # another epoch: the tracks begin elsewhere, with an empty state
            shift = int(torch.randint(args.length, (), generator=generator))
            shift = min(shift, (len(ids) - 1) % (rows * args.length))
            length = (len(ids) - 1 - shift) // rows
            inputs = ids[shift : shift + rows * length].view(rows, length)
            wanted = ids[shift + 1 : shift + 1 + rows * length].view(rows, length)
            at, state = 0, model.init_state(rows)
        piece = slice(at, at + args.length)
        logits, state = model.prefill(inputs[:, piece], state)
        state = detached(state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, piece].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        at += args.length
        if not math.isfinite(loss.item()):
            raise UserError("the loss is not finite any more; a smaller --lr may help")
        bits.append(loss.item() / math.log(2))
        progress.update(f"{bits[-1]:.3f} bits per character")
    progress.close()
    return bits


def compare(
    bits: list[float], characters: int, ids: Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """The learning curves of the same model on the references, and from another seed."""
    print("\nThe same from another seed, and on the references, which takes longer:")
    other = train(make_model(characters, args, args.seed + 1), ids, args, args.seed + 1)
    with on_references(args.layer):
        reference = train(make_model(characters, args, args.seed), ids, args, args.seed)
    names = ("fused operators", "plain PyTorch reference", "fused operators, another seed")
    curves = dict(zip(names, (bits, reference, other), strict=True))
    last = max(1, args.steps // 10)
    print(f"\nBits per character in training, mean of the last {last} steps:")
    for name, curve in curves.items():
        print(f"  {name:30s}  {sum(curve[-last:]) / last:.4f}")
    for name in names[1:]:
        apart = sum(abs(a - b) for a, b in zip(bits, curves[name], strict=True)) / args.steps
        print(f"Mean distance of the curves of {names[0]} and {name}: {apart:.1e}")
    return curves


def draw(path: Path, curves: dict[str, list[float]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, low) = plt.subplots(
        2, sharex=True, figsize=(10, 7.5), height_ratios=[3, 1], layout="constrained"
    )
    styles = ({"color": "#0b62b8", "linewidth": 3.5, "alpha": 0.55}, {"color": "#222222"})
    styles += ({"color": "#e08a00", "linewidth": 0.9},)
    (_, ours), *others = curves.items()
    for (name, curve), style in zip(curves.items(), styles, strict=True):
        top.plot(range(1, len(curve) + 1), curve, label=name, **style)
    for (name, curve), style in zip(others, styles[1:], strict=True):
        apart = [max(abs(a - b), 1e-9) for a, b in zip(ours, curve, strict=True)]
        low.plot(range(1, len(curve) + 1), apart, label=name, **style)
    top.set_title(title, loc="left", fontweight="bold")
    top.set_ylabel("bits per character, in training")
    top.legend(frameon=False)
    low.set_title("distance from the fused operators, 0 drawn as 1e-9", loc="left", fontsize=10)
    low.set_yscale("log")
    low.set_xlabel("step")
    for axes in (top, low):
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def write(model: Model, prompt: list[int], count: int, temperature: float, seed: int) -> list[int]:
    """Goes on after the prompt, one `step` per character."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    state = model.init_state(1)
    written = list(prompt)
    logits = torch.empty(0)
    for token in prompt:
        logits, state = model.step(torch.tensor([token]), state)
    for _ in range(count):
        probabilities = torch.softmax(logits[0] / temperature, -1)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        written.append(token)
        logits, state = model.step(torch.tensor([token]), state)
    return written


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("text", nargs="?", type=Path, default=TEXT, metavar="TEXTFILE", help="text to learn from")
    add("--layer", choices=list(OPERATORS), default="min_gru", help="recurrent layer")
    add("--dim", type=positive, default=128, help="width of the model")
    add("--layers", type=positive, default=2, help="number of blocks")
    add("--heads", type=positive, default=4, help="of layers whose state is a matrix per head")
    add("--dropout", type=float, help="in training; 0.1 if not given, and none in Mamba")
    add("--steps", type=positive, default=800, help="updates of the weights")
    add("--batch", type=positive, default=8, help="tracks read at once")
    add("--length", type=positive, default=128, help="characters between two updates")
    add("--lr", type=above_zero, default=6e-3, help="largest learning rate")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--threads", type=positive, help="of torch; its own choice if not given")
    add("--sample", type=int, default=400, metavar="N", help="characters to write in the end")
    add("--temperature", type=above_zero, default=0.7, help="low is careful, high is inventive")
    add("--prompt", default="\n", help="what the written text begins with")
    add("--save", type=Path, metavar="FILE", help="save the model as TorchScript")
    add(
        "--compare-reference",
        type=Path,
        metavar="PICTURE",
        help="train on the operators' references as well, and draw the learning curves",
    )
    args = parser.parse_args(arguments)
    mamba = args.layer in ("mamba", "mamba2")
    if args.dropout is None:
        args.dropout = 0.0 if mamba else 0.1
    if not 0 <= args.dropout < 1:
        parser.error(f"argument --dropout: {args.dropout} is not in [0, 1)")
    if args.dropout and mamba:
        parser.error("argument --dropout: Mamba has none")
    headless = args.layer in ("min_gru", "min_lstm", "mamba")
    if not headless and args.dim % (2 * args.heads):
        parser.error(
            f"argument --dim: {args.dim} is not a multiple of {2 * args.heads}, twice --heads"
        )
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    text = read(args.text, args.length)
    characters = sorted(set(text))
    number = {character: k for k, character in enumerate(characters)}
    unknown = sorted(set(args.prompt) - set(characters))
    if unknown or not args.prompt:
        what = f"characters that the text does not have: {unknown}" if unknown else "nothing in it"
        raise UserError(f"the prompt has {what}; give another with --prompt")
    for option, file in (("--save", args.save), ("--compare-reference", args.compare_reference)):
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"{option}: there is no folder {file.absolute().parent}")
    if args.compare_reference and importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws the curves, is missing: pip install matplotlib")

    split = len(text) * 9 // 10
    ids = torch.tensor([number[character] for character in text])
    baseline = ngram_bits(text[:split], text[split:])
    model = make_model(len(characters), args, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.text.name}: {split:,} characters to learn from, {len(text) - split:,} to test on, "
        f"{len(characters)} different ones"
    )
    print(f"{args.layer}, {args.layers} blocks of width {args.dim}: {parameters:,} parameters")

    started = time.monotonic()
    bits = train(model, ids[:split], args, args.seed)
    print(f"{args.steps} steps took {time.monotonic() - started:.0f} s\n")

    ours = model_bits(model, ids[split:])
    print("Bits per character on the last tenth of the text, which was not trained on:")
    print(f"  equal probabilities  {math.log2(len(characters)):.3f}")
    print(f"  2-gram model         {baseline:.3f}")
    print(f"  {args.layer:19s}  {ours:.3f}")
    print(f"{args.layer} {'beats' if ours < baseline else 'DOES NOT BEAT'} the 2-gram model.\n")

    if args.sample > 0:
        prompt = [number[character] for character in args.prompt]
        started = time.monotonic()
        written = write(model, prompt, args.sample, args.temperature, args.seed)
        seconds = time.monotonic() - started
        print(f"It writes, {1e3 * seconds / args.sample:.1f} ms per character:\n")
        print("".join(characters[token] for token in written))
    if args.save:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch call TorchScript deprecated
            scripted = torch.jit.script(model.eval())
            extra = {"characters.txt": "".join(characters).encode()}
            torch.jit.save(scripted, str(args.save), _extra_files=extra)
        print(f"\nThe model is in {args.save}.")
    if args.compare_reference:
        curves = compare(bits, len(characters), ids[:split], args)
        title = f"{args.layer}, {args.layers} blocks of width {args.dim}, seed {args.seed}"
        draw(args.compare_reference, curves, title)
        print(f"The learning curves are drawn in {args.compare_reference}.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"char_lm: {error}")
    except KeyboardInterrupt:
        sys.exit("char_lm: stopped")
