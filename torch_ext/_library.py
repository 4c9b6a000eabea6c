"""Loads libtorch_ext, once, and only into the torch that it was built for."""

import re
from pathlib import Path

try:
    import torch
except ImportError as e:
    raise ImportError(
        f"torch_ext needs torch, which cannot be imported ({e}): pip install torch"
    ) from e

folder = Path(__file__).resolve().parent
cmake_prefix_path = str(folder / "share" / "cmake")
_REBUILD = (
    "In torch_ext's source folder: pip install --no-build-isolation --no-deps --force-reinstall ."
)

try:
    from . import _build_info as build_info
except ImportError:
    raise ImportError(
        f"torch_ext was imported from {folder}, where it has not been built. If this is the source "
        "tree, it hides the installed package: run Python from another folder. To install "
        f"it: pip install --no-build-isolation {folder.parent} (or, for developers, in place: "
        "python setup.py build_ext --inplace)"
    ) from None


def _loaded():
    """The files of that name in this process: a program may have loaded one before Python did."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return set()
    return {Path(p) for p in re.findall(r"\s(/\S.*/libtorch_ext\.so)$", maps, re.MULTILINE)}


def _check_torch():
    """A library built for another torch would fail with an unreadable message, or not at once."""
    built, running = (
        ".".join(v.split("+")[0].split(".")[:2]) for v in (build_info.torch, torch.__version__)
    )
    if built != running:
        raise ImportError(
            f"torch_ext was built for torch {build_info.torch}, but this is torch "
            f"{torch.__version__}. {_REBUILD}"
        )
    if bool(build_info.torch_cuda) != bool(torch.version.cuda):
        kind = ["without CUDA", "with CUDA"]
        raise ImportError(
            f"torch_ext was built for a torch {kind[bool(build_info.torch_cuda)]}, but this torch "
            f"{torch.__version__} is {kind[bool(torch.version.cuda)]}. {_REBUILD}"
        )


def _load():
    path = folder / "lib" / "libtorch_ext.so"
    if not path.exists():
        raise ImportError(f"torch_ext is not complete: {path} does not exist. {_REBUILD}")
    _check_torch()
    for other in _loaded():
        if not other.exists() or not other.samefile(path):
            raise ImportError(
                f"another copy of libtorch_ext is already loaded in this process, {other}, and its "
                f"operators can be registered only once; this package has {path}. Use only one."
            )
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        raise ImportError(
            f"libtorch_ext could not be loaded: {e.__cause__ or e}. {_REBUILD}"
        ) from e


_load()
