"""Our own format, ``reparam-export/1``: a torch file of plain data that says everything, so that converting it needs no option.

    {"format": "reparam-export/1",
     "base": "timm:..." or "hf:..." or None         a relative folder is beside the file, or in the working folder
     "base_state": {name: tensor} or None           the base's state, when it is not to be had elsewhere
     "base_digests": {name: (dtype, blake3)}        of the base's parameters, where its state is not in the file; may be missing
     "adapters": [{"module": "blocks.0.attn.proj", "kind": "hydra", "rows": None or [start, stop],
                   "params": {"parallel": {"down": {"weight": tensor, "bias": tensor or None}, "up": {...}}, ...}}],
     "replaced": {name: tensor},
     "notes": [str],
     "expected": None or {"inputs": {name: tensor}, "outputs": {name: tensor}, "dtype": "float32"}    what it answered; may be missing}

``params`` are the fields of the kind's ``Params``, nested as its dataclasses are. A GLoRA supernet has the path "unchosen" throughout: its
candidate is given with ``--config``, as for the authors' file. A ``py:`` base is never taken from a file: naming code to
run is for the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from reparam_export.adapters import glora, kind
from reparam_export.checkpoints import NATIVE, Adapter, Parts, Source, placed
from reparam_export.checkpoints.glora_vit import path_of
from reparam_export.errors import CheckpointError, ReparamError
from reparam_export.names.once import once

LOOKED_FOR = f'a torch file with "format": "{NATIVE}" (written by save())'
PRECISIONS = ("float64", "float32", "bfloat16", "float16")
BASES = ("timm:", "hf:", "open_clip:")


def accepts(source: Source) -> bool:
    return source.content.get("format") == NATIVE


def read(source: Source) -> Parts:
    content, path = source.content, source.path
    unknown = set(content) - {
        "format",
        "base",
        "base_state",
        "base_digests",
        "adapters",
        "replaced",
        "notes",
        "expected",
    }
    if unknown:
        raise CheckpointError(
            f"{path}: unknown entry {sorted(unknown)[0]!r} in a {NATIVE} file; it was written by a newer version"
        )
    base = content.get("base")
    if base is not None and not (isinstance(base, str) and base.startswith(BASES)):
        raise CheckpointError(f"{path}: base {base!r} is not one of {', '.join(BASES)}; pass the base with --base")
    adapters = content.get("adapters")
    if not isinstance(adapters, list):
        raise CheckpointError(f"{path}: 'adapters' must be a list, found {type(adapters).__name__}")
    return Parts(
        _with_paths(source, [_adapter(path, entry) for entry in adapters]),
        replaced=_tensors(path, content.get("replaced") or {}),
        base=None if base is None else placed(base, source.near),
        base_state=_tensors(path, content.get("base_state") or {}),
        base_digests=_digests(content.get("base_digests") or {}),
        notes=tuple(map(str, content.get("notes") or ())),
        expected=_expected(path, content.get("expected")),
        covers=lambda names: [],  # attach() adapts what it is told to
    )


def _with_paths(source: Source, adapters: list[Adapter]) -> tuple[Adapter, ...]:
    """Of a saved supernet, the layers on the path that the settings say."""

    def is_open(adapter: Adapter) -> bool:
        return adapter.kind == "glora" and adapter.params.path == glora.UNCHOSEN

    open_layers = [a for a in adapters if is_open(a)]
    if not open_layers:
        return tuple(adapters)
    names = [a.module for a in open_layers]
    paths = source.settings.layer_paths(names, found_in="the search's checkpoint-N.pth.tar")
    chosen = iter(
        path_of(source, a.module, path, int(a.params.Ad.shape[1])) for a, path in zip(open_layers, paths, strict=True)
    )  # in the order of the layers: one module may have several, each on rows of its own
    return tuple(replace(a, params=replace(a.params, path=next(chosen))) if is_open(a) else a for a in adapters)


def to_plain(params: Any) -> Any:
    """A kind's ``Params`` as nested dicts of tensors, numbers and strings, as the format stores them."""
    if is_dataclass(params) and not isinstance(params, type):
        return {f.name: to_plain(getattr(params, f.name)) for f in fields(params)}
    if isinstance(params, tuple):
        return list(params)
    return params.detach().clone().contiguous() if hasattr(params, "detach") else params


def _adapter(path: Path, entry: Any) -> Adapter:
    try:
        module, name, rows = entry["module"], entry["kind"], entry.get("rows")
        if name == "probed":
            raise ValueError("the kind probed is a live module, which no file can hold")
        params = _from_plain(kind(name).Params, entry["params"])
        if rows is not None and not (len(rows) == 2 and all(type(r) is int for r in rows) and 0 <= rows[0] < rows[1]):
            raise ValueError(f"rows {rows!r} are not [start, stop]")
        return Adapter(str(module), str(name), params, None if rows is None else (rows[0], rows[1]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ReparamError) as error:
        named = entry.get("module") if isinstance(entry, Mapping) else entry
        raise CheckpointError(f"{path}: adapter entry {named!r} cannot be read: {error}") from error


def _from_plain(target: Any, value: Any) -> Any:
    """Rebuild dataclass ``target`` from nested dicts; unknown and missing fields are errors."""
    options = [t for t in get_args(target) if t is not type(None)] or [target]
    if value is None or not is_dataclass(options[0]):
        if value is None and type(None) not in get_args(target) and target is not Any:
            raise ValueError("a field that must be there is None")
        if (
            not (value is None or isinstance(value, str | int | float | list) or hasattr(value, "shape"))
            or value is True
        ):
            raise ValueError(f"expected a tensor, a number or a text, found {type(value).__name__}")
        return tuple(value) if isinstance(value, list) else value
    hints = get_type_hints(options[0])
    names = {f.name for f in fields(options[0])}
    if not isinstance(value, Mapping) or set(value) != names:
        found = sorted(value) if isinstance(value, Mapping) else value
        raise CheckpointError(f"expected the fields {sorted(names)}, found {found}")
    return options[0](**{name: _from_plain(hints[name], value[name]) for name in names})  # type: ignore[operator]


def _digests(value: Any) -> dict[str, tuple[str, str]]:
    import torch

    found = {name: (dtype, content) for name, (dtype, content) in value.items()}
    for name, (dtype, content) in found.items():
        known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
        if not (known and isinstance(name, str) and isinstance(content, str)):
            raise ValueError(
                f"'base_digests' must map names to a dtype and a digest, found {name!r}: {(dtype, content)!r}"
            )
    return found


def _expected(path: Path, value: Any) -> dict[str, Any]:
    """A few inputs with the answers that the trained model gave, for the second witness."""
    if value is None:
        return {}
    if (
        not isinstance(value, Mapping)
        or set(value) != {"inputs", "outputs", "dtype"}
        or value["dtype"] not in PRECISIONS
    ):
        raise CheckpointError(
            f"{path}: 'expected' must hold inputs, outputs and their dtype, one of {', '.join(PRECISIONS)}"
        )
    inputs, outputs = _tensors(path, value["inputs"]), _tensors(path, value["outputs"])
    if not inputs or not outputs:
        raise CheckpointError(f"{path}: 'expected' holds no inputs or no outputs")
    return {"inputs": inputs, "outputs": outputs, "dtype": str(value["dtype"])}


def _tensors(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(hasattr(t, "shape") for t in value.values()):
        raise CheckpointError(f"{path}: 'replaced' and 'base_state' must map names to tensors")
    return once(((repr(name), str(name), tensor) for name, tensor in value.items()), path)
