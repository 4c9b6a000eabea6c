"""Modules under another package's names, found by Python's own import."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


@dataclass
class Package:
    """What stands in for a package.

    Attributes:
        source: has everything.
        version: in ``__version__`` and in the metadata.
        modules: the names of each module, such as ``{"mamba_ssm.ops": []}``; a mapping where the
            source has them under others.
    """

    source: ModuleType
    version: str
    modules: Mapping[str, list[str] | Mapping[str, str]]

    def install(self) -> None:
        if self not in _finder.packages:
            _finder.packages.append(self)
        if _finder not in sys.meta_path:
            sys.meta_path.append(_finder)  # last: what is installed is found before
        for name in self.modules:
            importlib.import_module(name)

    def is_ours(self, name: str) -> bool:
        """Whether an import of that name gives ours already."""
        spec = importlib.util.find_spec(name)
        return spec is not None and isinstance(spec.loader, _Loader)


class _Loader(Loader):
    def __init__(self, package: Package) -> None:
        self.package = package

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # an ordinary one

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = self.package.source.__doc__
        module.__file__ = self.package.source.__file__
        module.__version__ = self.package.version
        names = self.package.modules[module.__name__]
        module.__all__ = list(names)
        for name in names:
            ours = names[name] if isinstance(names, Mapping) else name
            setattr(module, name, getattr(self.package.source, ours))


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, name: str, version: str) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            "Summary: stand-in by torch_ext.compat\n",
            "top_level.txt": name + "\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    def __init__(self) -> None:
        self.packages: list[Package] = []

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        for package in self.packages:
            if name in package.modules:
                is_package = any(other.startswith(name + ".") for other in package.modules)
                return ModuleSpec(
                    name, _Loader(package), origin=package.source.__file__, is_package=is_package
                )
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        wanted = None if context is None else context.name
        for package in self.packages:
            name = next(iter(package.modules))
            if wanted is None or re.sub(r"[-_.]+", "_", wanted).lower() == name:
                yield _Distribution(name, package.version)


_finder = _Finder()
