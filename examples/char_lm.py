#!/usr/bin/env python3
"""Trains a language model of characters (torch_ext.MinRNNLM) on a text and lets it write.

    python char_lm.py                       an excerpt of Shakespeare, which comes with this script
    python char_lm.py my_book.txt --layer min_lstm --steps 2000
    python char_lm.py --steps 50            a quick look

The text is cut into a few long tracks, the model reads all of them at once and carries its state,
detached, from piece to piece (truncated backpropagation through time). The last tenth of the text
is never trained on: there the model's bits per character are compared with those of a 2-gram
model, which predicts each character from the two before it. In the end the model writes, one
character per `step`, with a state whose size does not grow with the text.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

TEXT = Path(__file__).resolve().parent / "data" / "shakespeare_excerpt.txt"


class UserError(Exception):
    """Something the user can mend; printed as one sentence."""


try:
    import torch
    from torch import Tensor, nn

    import torch_ext
except ImportError as error:
    sys.exit(f"char_lm: {error}. It needs torch and torch_ext; the README says how to install them")


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
def model_bits(model: torch_ext.MinRNNLM, ids: Tensor) -> float:
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


def train(model: torch_ext.MinRNNLM, ids: Tensor, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    # Matrices decay, biases and norms do not.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1
    )
    progress = Progress(args.steps)
    rows = min(args.batch, (len(ids) - 1) // args.length)
    at, length, state = 0, 0, None
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
        state = (state[0].detach(), state[1].detach())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, piece].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        at += args.length
        if not math.isfinite(loss.item()):
            raise UserError("the loss is not finite any more; a smaller --lr may help")
        progress.update(f"{loss.item() / math.log(2):.3f} bits per character")
    progress.close()


@torch.no_grad()
def write(
    model: torch_ext.MinRNNLM, prompt: list[int], count: int, temperature: float, seed: int
) -> list[int]:
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
    add("--layer", choices=["min_gru", "min_lstm"], default="min_gru", help="recurrent layer")
    add("--dim", type=positive, default=128, help="width of the model")
    add("--layers", type=positive, default=2, help="number of blocks")
    add("--dropout", type=float, default=0.1, help="in training")
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
    args = parser.parse_args(arguments)
    if not 0 <= args.dropout < 1:
        parser.error(f"argument --dropout: {args.dropout} is not in [0, 1)")
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
    if args.save and not args.save.absolute().parent.is_dir():
        raise UserError(f"--save: there is no folder {args.save.absolute().parent}")

    split = len(text) * 9 // 10
    ids = torch.tensor([number[character] for character in text])
    baseline = ngram_bits(text[:split], text[split:])
    torch.manual_seed(args.seed)
    model = torch_ext.MinRNNLM(
        len(characters), args.dim, args.layers, layer=args.layer, dropout=args.dropout
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.text.name}: {split:,} characters to learn from, {len(text) - split:,} to test on, "
        f"{len(characters)} different ones"
    )
    print(f"{args.layer}, {args.layers} blocks of width {args.dim}: {parameters:,} parameters")

    started = time.monotonic()
    train(model, ids[:split], args)
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
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"char_lm: {error}")
    except KeyboardInterrupt:
        sys.exit("char_lm: stopped")
