"""Are the shards in OUT/hf still the ones that were proven? Every tensor's digest, and where one differs, the entry that does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from reparam_export.checkpoints import Checkpoint
from reparam_export.errors import EquivalenceError, ReparamError
from reparam_export.files import sha256
from reparam_export.state import digest_of
from reparam_export.streaming.formats import FORMATS, Array, torch_name, wide
from reparam_export.streaming.layers import Buffers, fold_layer
from reparam_export.streaming.plan import Plan, plan_of
from reparam_export.streaming.shards import Stored, open_shard
from reparam_export.streaming.staging import WEIGHTS


def check_streamed(out: Path, record: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises EquivalenceError that names the first file or tensor, and its first entry, that is not what was written and proven."""
    changed = changed_since(out, record)
    if changed is None:
        return
    what, tensor = changed
    where = "" if tensor is None else _where(checkpoint, record.get("dtype"), tensor)
    layer = None if tensor is None else tensor.name.rpartition(".")[0]
    raise EquivalenceError(f"{out / WEIGHTS}: {what}{where}; run fuse again", layer=layer)


def changed_since(out: Path, record: Mapping[str, Any]) -> tuple[str, Stored | None] | None:
    """What is not as it was written and proven, and the tensor, if it is one; None when everything is."""
    folder = out / WEIGHTS
    proven, beside = (dict(record.get(key) or {}) for key in ("tensors", "beside"))
    shards = {file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")}
    others = {file.name for file in folder.iterdir() if file.name.endswith(".index.json") or file.name == "config.json"}
    for name in sorted((shards ^ set(record.get("shards") or ())) | (others - beside.keys())):
        return f"{name} is {'new' if (folder / name).exists() else 'missing'} since the weights were proven", None
    for name, digest in beside.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            return f"{name} is not the file that was written with the weights", None
    found: dict[str, Stored] = {}
    for name in sorted(shards):
        tensors = open_shard(folder / name)
        twice = next((n for n in tensors if n in found), None)
        if twice:
            return f"tensor {twice} stands in two files", None
        found |= tensors
    for name in sorted(found.keys() ^ proven.keys()):
        return f"tensor {name} is {'new' if name in found else 'missing'} since the weights were proven", None
    for name, tensor in found.items():
        if blake3(tensor.raw.data).hexdigest() != proven[name]:
            return f"{name} is not the tensor that was proven", tensor
    return None


def weights_digest(file: Path) -> str:
    """``state.digest`` of one file's tensors, without torch."""
    found = open_shard(file).items()
    return digest_of((n, f"torch.{torch_name(t.code)}", t.shape, blake3(t.raw.data).digest()) for n, t in found)


def _where(checkpoint: Checkpoint, storage: str | None, tensor: Stored) -> str:
    """`` : [row, column] is ..., the exact value rounded once is ...``; nothing where it cannot be made again."""
    try:
        expected = made_again(plan_of(checkpoint, storage), tensor)
    except ReparamError:
        return ""
    of = FORMATS.get(tensor.code)
    if of is None or expected is None or len(expected) != len(tensor.raw):
        return ""
    at = int(np.flatnonzero(expected.view(of.raw) != tensor.raw.view(of.raw))[0])
    index = [int(i) for i in np.unravel_index(at, tensor.shape)]
    here, true = (float(wide(raw.view(of.raw)[at : at + 1], of)[0]) for raw in (tensor.raw, expected))
    return f": {index} is {here!r}, the exact value rounded once is {true!r}"


def made_again(plan: Plan, tensor: Stored) -> Array | None:
    """The bytes of one output tensor as streaming makes them."""
    module = tensor.name.rpartition(".")[0]
    touched = plan.touched.get(module)
    if touched is None or tensor.code not in FORMATS:
        same = plan.tensors.get(tensor.name)
        return same.raw if same is not None and same.code == tensor.code else None
    parts: list[Array] = []
    fold_layer(
        touched,
        {tensor.name: FORMATS[tensor.code]},
        lambda _, __, raw: parts.append(raw.copy().reshape(-1).view(np.uint8)),
        Buffers(),
        0,
    )
    return np.concatenate(parts) if parts else None
