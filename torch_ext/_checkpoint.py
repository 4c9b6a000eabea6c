"""Checkpoints in local folders: ``config.json``, safetensors and ``pytorch_model.bin`` files.

The safetensors format: 8 bytes with the header's length, little-endian; the header, JSON, of name to
``dtype``, ``shape`` and ``data_offsets``, which count from its end; the numbers, row by row.
"""

import ctypes
import json
import math
import mmap
import pickle
import struct
import zipfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._yaml import read_yaml, write_yaml

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model")


# ---- reading ----
def read_config(
    name: str, folder: Path, files: tuple[str, ...] = ("config.json",)
) -> tuple[Path, dict[str, Any]]:
    """The first of ``files`` that is there, and what it says; ``name`` begins what errors say."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: folder is {str(folder)!r}, expected a local folder with {' or '.join(files)} "
            f"and {SAFETENSORS} or {PICKLE}; nothing is downloaded"
        )
    path = next((folder / file for file in files if (folder / file).exists()), folder / files[0])
    if path.suffix == ".json":
        config = _read_json(name, path)
    else:
        try:
            config = read_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name}: {path} is not YAML that is read here: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{name}: {path} holds no object in braces")
    return path, config


def _read_json(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {path} is not JSON: {error}") from None


def entry(place: str, config: dict[str, Any], key: str, kinds: Any, default: Any = None) -> Any:
    """``config[key]``, which has to be there if there is no default."""
    value = config.get(key, default)
    if value is None:
        raise ValueError(f"{place}: there is no {key}")
    allowed = (kinds,) if isinstance(kinds, type) else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(f"{place}: {key} is {value!r}, expected {expected}")
    return value


def open_weights(name: str, folder: Path, own_names: bool = False) -> Mapping[str, Tensor]:
    """The tensors by name, on the CPU. They are read when they are asked for, and may share memory
    with the file, which writing to them does not change.

    Args:
        name: begins what errors say.
        folder: has them.
        own_names: also take numbered parts ``model_0.safetensors``, ..., and, if there is just one
            such file, one of any name that ends in .safetensors, .pt, .pth, .bin or .ckpt.
    """
    for file in (SAFETENSORS, PICKLE):
        if (folder / file).exists():
            return _open(name, folder / file)
        index = folder / f"{file}.index.json"
        if index.exists():
            return _Shards(name, index)
    expected = f"{SAFETENSORS} or {PICKLE}, or one of them in parts with a file .index.json"
    if own_names:
        if (folder / "model_0.safetensors").exists():
            files = [folder / f"model_{k}.safetensors" for k in range(_count_parts(folder))]
            return ChainMap(*(_open(name, file) for file in files))
        files = [file for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES]
        if len(files) == 1:
            return _open(name, files[0])
        expected += f", or model_0.safetensors, ..., or one file with {', '.join(_SUFFIXES)}"
        if files:
            expected += f"; {', '.join(file.name for file in files)} are several"
    raise FileNotFoundError(f"{name}: {folder} has no weights, expected {expected}")


def _count_parts(folder: Path) -> int:
    count = 1
    while (folder / f"model_{count}.safetensors").exists():
        count += 1
    return count


def _open(name: str, path: Path) -> Mapping[str, Tensor]:
    return Safetensors(name, path) if path.suffix == ".safetensors" else _unpickle(name, path)


def _unpickle(name: str, path: Path) -> dict[str, Tensor]:
    # Files from before torch 1.6 are no zip archives, and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: {path} cannot be read as tensors: {first}") from error
    for key in _NESTED:  # a training's checkpoint, in which the model is one of several things
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{name}: {path} holds {type(content).__name__}, expected tensors by name")
    return content


class Safetensors(Mapping[str, Tensor]):
    """A safetensors file, mapped into memory."""

    def __init__(self, name: str, path: Path) -> None:
        self._where = f"{name}: {path}"
        size = path.stat().st_size
        if size < 8:
            raise ValueError(f"{self._where} has {size} bytes, expected a safetensors file")
        with path.open("rb") as file:
            # Private pages: a tensor that is written to gets its own, and the file stays.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack("<Q", self._memory[:8])
        self._begin = 8 + length
        if self._begin > size:
            raise ValueError(
                f"{self._where} has {size:,} bytes, and its header would end at {self._begin:,}: "
                "the file is cut off, or no safetensors file"
            )
        try:
            header = json.loads(self._memory[8 : self._begin].decode("utf-8"))
            header.pop("__metadata__", None)
            self._entries = {key: self._entry(key, value, size) for key, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if str(error).startswith(self._where):
                raise
            raise ValueError(
                f"{self._where} has a header that is not safetensors': {error!r}"
            ) from (error)

    def _entry(
        self, key: str, value: dict[str, Any], size: int
    ) -> tuple[torch.dtype, list[int], int]:
        code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        if code not in _DTYPES:
            raise ValueError(f"{self._where}: {key} has dtype {code}, expected one of {[*_DTYPES]}")
        dtype = _DTYPES[code]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{self._where}: {key} has shape {shape} at bytes {begin} to {end}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{self._where}: {key} has shape {shape} of {code} in {end - begin:,} bytes"
            )
        if self._begin + end > size:
            raise ValueError(
                f"{self._where} has {size:,} bytes, and {key} would end at "
                f"{self._begin + end:,}: the file is cut off"
            )
        return dtype, shape, begin

    def __getitem__(self, key: str) -> Tensor:
        dtype, shape, begin = self._entries[key]
        count = math.prod(shape) * dtype.itemsize
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        begin += self._begin
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=count, offset=begin)
        if begin % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _Shards(Mapping[str, Tensor]):
    """Several files and the index of which tensor is in which."""

    def __init__(self, name: str, index: Path) -> None:
        content = _read_json(name, index)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict):
            raise ValueError(f"{name}: {index} has no weight_map")
        for file in files.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{name}: {index} names {file!r}, expected a file beside it")
        self._files = files
        self._open: dict[str, Mapping[str, Tensor]] = {}
        for file in sorted(set(files.values())):
            if not (index.parent / file).exists():
                raise FileNotFoundError(
                    f"{name}: there is no file {index.parent / file}, which {index.name} names"
                )
            self._open[file] = _open(name, index.parent / file)
        for key, file in files.items():
            if key not in self._open[file]:
                raise ValueError(
                    f"{name}: {index.parent / file} has no {key}, expected by {index.name}"
                )

    def __getitem__(self, key: str) -> Tensor:
        return self._open[self._files[key]][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Renamed(Mapping[str, Tensor]):
    """``content`` under other names: ``names`` maps ours to those in it."""

    def __init__(self, content: Mapping[str, Tensor], names: dict[str, str]) -> None:
        self._content = content
        self._names = {key: key for key in content if key not in names.values()} | names

    def __getitem__(self, key: str) -> Tensor:
        return self._content[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Computed(Mapping[str, Tensor]):
    """Tensors that are made of others when they are asked for. The last one is kept: who asks for a
    tensor mostly does it more than once."""

    def __init__(self, makers: dict[str, Callable[[], Tensor]]) -> None:
        self._makers = makers
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Tensor:
        if self._last is None or self._last[0] != key:
            self._last = key, self._makers[key]()
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def load(
    name: str,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    tied: Mapping[str, str],
    device: torch.device | str | None,
) -> None:
    """Puts copies of ``weights`` on ``device`` in the place of ``model``'s parameters, in their
    dtypes. Those are on the meta device, so that no memory holds them twice.

    Args:
        name: begins what errors say.
        model: has parameters and no buffers.
        weights: see :func:`open_weights`.
        tied: parameters that are another one. They may be missing in ``weights``.
        device: torch's default one if None.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {key: value for key, value in parameters.items() if key not in tied}
    missing = [key for key in wanted if key not in weights]
    unexpected = [key for key in weights if key not in parameters]
    if missing or unexpected:
        parts = [("lacks", missing), ("has, unexpectedly,", unexpected)]
        raise ValueError(
            f"{name}: the checkpoint "
            + " and ".join(f"{verb} {_listed(keys)}" for verb, keys in parts if keys)
        )
    wrong = []
    for key, old in parameters.items():
        if key in weights and not weights[key].is_floating_point():
            wrong.append(f"{key} of {weights[key].dtype}, expected floating-point numbers")
        elif key in weights and weights[key].shape != old.shape:
            shapes = f"{tuple(weights[key].shape)}, expected {tuple(old.shape)}"
            wrong.append(f"{key} of shape {shapes}")
    if wrong:
        raise ValueError(f"{name}: the checkpoint has, by its config.json, {_listed(wrong)}")
    for key, other in tied.items():
        if key in weights and not torch.equal(weights[key], weights[other]):
            raise ValueError(
                f"{name}: the checkpoint has a {key} that is not {other}, expected the same by its "
                "config.json, which ties them"
            )
    place = torch.empty(0, device=device).device
    new: dict[str, nn.Parameter] = {}
    for key, old in wanted.items():
        value = weights[key].to(device=place, dtype=old.dtype, copy=True)
        new[key] = nn.Parameter(value, requires_grad=old.requires_grad)
        new[key].__dict__.update(old.__dict__)  # such as _no_weight_decay
    for key in parameters:
        module, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(module), leaf, new[tied.get(key, key)])


def _listed(what: list[str]) -> str:
    shown = ", ".join(what[:8])
    return shown if len(what) <= 8 else f"{shown} and {len(what) - 8} more"


# ---- writing ----
def save(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    safetensors: bool,
    config_file: str = "config.json",
) -> None:
    """``config.json`` or another file, and the weights as safetensors or ``pytorch_model.bin``."""
    folder.mkdir(parents=True, exist_ok=True)
    if safetensors:
        write_safetensors(folder / SAFETENSORS, tensors)
    else:
        torch.save(tensors, folder / PICKLE)
    text = json.dumps(config, indent=2) + "\n"
    if not config_file.endswith(".json"):
        text = write_yaml(config)
    (folder / config_file).write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the file beside ``path`` first: who reads ``path`` sees all of it or the old one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest first, so that each begins at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for key, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            # Not by way of NumPy, which torch can be without.
            file.write((ctypes.c_char * raw.numel()).from_address(raw.data_ptr()))
    part.replace(path)
