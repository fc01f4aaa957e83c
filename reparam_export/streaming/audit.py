"""Are the shards in OUT/hf still the ones that were proven? Every tensor's digest, and where one differs, the entry that does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from reparam_export.checkpoints import Checkpoint
from reparam_export.errors import EquivalenceError, ReparamError
from reparam_export.streaming.formats import FORMATS, Array, wide
from reparam_export.streaming.layers import Buffers, fold_layer
from reparam_export.streaming.plan import Plan, plan_of
from reparam_export.streaming.shards import Stored, open_shard
from reparam_export.streaming.staging import WEIGHTS


def check_streamed(out: Path, record: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises EquivalenceError that names the first tensor, and its first entry, that is not what was written and proven."""
    proven: dict[str, str] = dict(record.get("tensors") or {})
    found: dict[str, Stored] = {}
    for file in sorted((out / WEIGHTS).glob("*.safetensors")):
        found |= open_shard(file)
    odd = sorted(found.keys() ^ proven.keys())
    if odd:
        raise EquivalenceError(
            f"{out / WEIGHTS}: tensor {odd[0]} is {'new' if odd[0] in found else 'missing'} since the weights were proven; run fuse again"
        )
    for name, tensor in found.items():
        if blake3(tensor.raw.data).hexdigest() != proven[name]:
            where = _where(checkpoint, record.get("dtype"), tensor)
            raise EquivalenceError(
                f"{out / WEIGHTS}: {name} is not the tensor that was proven{where}; run fuse again",
                layer=name.rpartition(".")[0],
            )


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
