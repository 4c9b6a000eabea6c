"""Other packages' functions and modules, by their own names and signatures, on our operators.

``torch_ext.compat.minGRU_pytorch`` stands for ``minGRU_pytorch``, and so on. Code that cannot be
changed finds ours after :func:`install`.
"""

import importlib.util
import sys
from types import ModuleType

from . import minGRU_pytorch

# Each package with the names under which it can be imported.
_PACKAGES: dict[str, tuple[ModuleType, list[str]]] = {
    "minGRU_pytorch": (
        minGRU_pytorch,
        ["minGRU_pytorch", "minGRU_pytorch.minGRU", "minGRU_pytorch.minLSTM"],
    ),
}

__all__ = ["install", "minGRU_pytorch"]


def install(*names: str) -> list[str]:
    """Makes ``import NAME`` find ours where the package itself is not installed.

    Args:
        names: packages, such as ``"minGRU_pytorch"``. All that we have if none is given.

    Returns:
        The packages for which ours are now found. Those that are installed are left alone.

    Raises:
        ValueError: we have nothing for a name.

    Example:
        >>> names = torch_ext.compat.install("minGRU_pytorch")
        >>> from minGRU_pytorch import minGRU
    """
    installed = []
    for name in names or _PACKAGES:
        if name not in _PACKAGES:
            raise ValueError(f'install: names has "{name}", expected some of {list(_PACKAGES)}')
        module, aliases = _PACKAGES[name]
        ours = sys.modules.get(name) is module
        if ours or (name not in sys.modules and importlib.util.find_spec(name) is None):
            sys.modules.update(dict.fromkeys(aliases, module))
            installed.append(name)
    return installed
