#!/usr/bin/env python3
"""Continues a prompt with a Mamba language model from a local folder, token by token.

    python mamba_generate.py mamba-130m-hf "Mamba is"
    python mamba_generate.py mamba-130m-hf "Mamba is" --temperature 0 --max-new-tokens 200
    python mamba_generate.py mamba-130m "Mamba is" --tokenizer gpt-neox-20b --dtype bfloat16

The folder is one that mamba_ssm or transformers saved: config.json and the weights. Tokenizer files in
it (or in another folder, --tokenizer) are read by transformers, if that is installed; without them
each byte of the prompt is a token. Memory does not grow with what has been read and written.
"""

from __future__ import annotations

import argparse
import codecs
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Any of them is enough for transformers.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class UserError(Exception):
    """Something the user can mend; printed as one sentence."""


try:
    import torch

    import torch_ext
except ImportError as error:
    sys.exit(
        f"mamba_generate: {error}. It needs torch and torch_ext; the README says how to install them"
    )


class Bytes:
    """A token for each byte. Those from 256 on stand for nothing."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decoder(self) -> Callable[[int], str]:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda token: decode(bytes([token])) if token < 256 else f"<{token}>"


class FromFiles:
    """A tokenizer of transformers."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError(
                f"{folder} has a tokenizer, which the package transformers reads: "
                "pip install transformers, or --tokenizer bytes for a token per byte"
            ) from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # of many kinds
            first = str(error).strip().split("\n")[0]
            raise UserError(f"the tokenizer in {folder} cannot be read: {first}") from error
        self.eos_token_id = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decoder(self) -> Callable[[int], str]:
        tokens: list[int] = []
        told = ""

        def add(token: int) -> str:
            nonlocal tokens, told
            tokens.append(token)
            text = self._tokenizer.decode(tokens)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                return ""
            new, told = text[len(told) :], text
            if len(tokens) > 64 and new:  # one token of context shows whether a space comes first
                tokens = tokens[-1:]
                told = self._tokenizer.decode(tokens)
            return new

        return add


def choose_tokenizer(folder: Path, name: str | None, vocab_size: int) -> Bytes | FromFiles:
    if name == "bytes":
        return Bytes()
    place = folder if name is None else Path(name)
    if any((place / file).exists() for file in TOKENIZER_FILES):
        return FromFiles(place)
    if name is not None:
        raise UserError(f"--tokenizer: {name} has none of {', '.join(TOKENIZER_FILES)}")
    if vocab_size > 1024:
        raise UserError(
            f"{folder} has no tokenizer, and its {vocab_size:,} tokens are not bytes: name the "
            "folder of one with --tokenizer (state-spaces/mamba-* were trained with that of "
            "EleutherAI/gpt-neox-20b), or --tokenizer bytes to go on"
        )
    return Bytes()


def eos_of(folder: Path, tokenizer: Bytes | FromFiles, vocab_size: int) -> list[int]:
    """What ends a text: the tokenizer's token, and those of config.json."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    tokens = found if isinstance(found, list) else [found]
    tokens = [*tokens, tokenizer.eos_token_id]
    return sorted({t for t in tokens if isinstance(t, int) and 0 <= t < vocab_size})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="of the checkpoint")
    add("prompt", metavar="PROMPT", help="what the text begins with")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="to write at most")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens only")
    add("--top-p", type=float, metavar="P", help="draw from the most likely, of probability P")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="if not the checkpoint's")
    add("--tokenizer", metavar="FOLDER", help='of the tokenizer, or "bytes"')
    add("--prefill-chunk", type=int, default=4096, metavar="N", help="tokens to read at once")
    add("--threads", type=int, help="of torch; its own choice if not given")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        model = torch_ext.MambaLM.from_pretrained(args.folder, dtype=dtype)
    except (ValueError, OSError) as error:
        raise UserError(str(error).partition(": ")[2] or str(error)) from error
    model.eval()
    tokenizer = choose_tokenizer(args.folder, args.tokenizer, model.vocab_size)
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise UserError("the prompt has nothing in it")
    if max(prompt) >= model.vocab_size:
        raise UserError(
            f"the prompt has token {max(prompt)}, and the model has {model.vocab_size} tokens: the "
            "tokenizer is another model's"
        )
    try:
        stream = model.stream(
            torch.tensor([prompt]),
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            args.top_p,
            eos_token_id=eos_of(args.folder, tokenizer, model.vocab_size),
            prefill_chunk=args.prefill_chunk,
            generator=torch.Generator().manual_seed(args.seed),
        )
    except ValueError as error:
        raise UserError(str(error).partition(": ")[2]) from error

    decode = tokenizer.decoder()
    for token in prompt:
        print(decode(token), end="")
    started, count = time.monotonic(), 0
    for token in stream:
        if count == 0:
            read, started = time.monotonic() - started, time.monotonic()
        count += 1
        print(decode(int(token)), end="", flush=True)
    print(flush=True)
    if count > 1:
        each = 1e3 * (time.monotonic() - started) / (count - 1)
        state = sum(s.nbytes for pair in model.init_state(1) for s in pair)
        print(
            f"\n{len(prompt)} tokens read in {read:.2f} s, {count} written, {each:.1f} ms each; the "
            f"state takes {state / 2**20:.2f} MiB at any length",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"mamba_generate: {error}")
    except KeyboardInterrupt:
        sys.exit("mamba_generate: stopped")
