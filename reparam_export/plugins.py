"""A folder is a registry: every module in it is a plugin, found by its file name, and no list has to be edited.

Third parties add theirs through entry points of the group ``reparam_export.<folder>``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from functools import cache
from types import ModuleType

from reparam_export.errors import UsageError


@cache
def names(folder: str) -> tuple[str, ...]:
    """The plugins of ``reparam_export/<folder>``, sorted, third parties' last."""
    package = importlib.import_module(f"reparam_export.{folder}")
    own = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    others = sorted(p.name for p in _entry_points(folder) if p.name not in own)
    return (*own, *others)


@cache
def load(folder: str, name: str) -> ModuleType:
    """The plugin's module. Raises UsageError that lists what there is."""
    if name not in names(folder):
        raise UsageError(f"unknown {folder} plugin {name!r}; there are: {', '.join(names(folder))}")
    for point in _entry_points(folder):
        if point.name == name:
            module: ModuleType = point.load()
            return module
    return importlib.import_module(f"reparam_export.{folder}.{name}")


@cache
def _entry_points(folder: str) -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=f"reparam_export.{folder}")
