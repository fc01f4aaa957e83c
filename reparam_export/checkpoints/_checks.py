"""What must hold for the tensors of any checkpoint: no two adapters on one output, all numbers finite."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_export.affine import Tensor, map_tensors, tensors_of
from reparam_export.errors import CheckpointError

if TYPE_CHECKING:
    from reparam_export.checkpoints import Adapter, Checkpoint, Parts


def check(path: Path, parts: Parts) -> None:
    """At least one adapter or whole tensor, and no two adapters on the same outputs of one module."""
    if not parts.adapters and not parts.replaced:
        raise CheckpointError(f"{path}: holds no adapter")
    check_disjoint(path, parts.adapters)


def check_disjoint(path: Path, adapters: Sequence[Adapter]) -> None:
    """Raises CheckpointError when two adapters of one checkpoint act on the same outputs of one module."""
    for site, group in by_site(adapters).items():
        if len(components(group)) < len(group):
            raise CheckpointError(f"{path}: two adapters act on the same outputs of {site}")


def by_site(adapters: Sequence[Adapter]) -> dict[str, list[Adapter]]:
    """The adapters of each matrix, in order."""
    grouped: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        grouped.setdefault(adapter.site, []).append(adapter)
    return grouped


def components(adapters: Sequence[Adapter]) -> list[list[Adapter]]:
    """The adapters of one matrix, those whose outputs overlap together and in order: each list is one stack."""
    found: list[list[int]] = []
    for number, adapter in enumerate(adapters):
        touching = [any(_overlap(adapter, adapters[other]) for other in stack) for stack in found]
        joined = [n for stack, touches in zip(found, touching, strict=True) if touches for n in stack]
        found = [stack for stack, touches in zip(found, touching, strict=True) if not touches]
        found.append(sorted([*joined, number]))
    return [[adapters[n] for n in stack] for stack in found]


def _overlap(one: Adapter, other: Adapter) -> bool:
    (start, stop), (other_start, other_stop) = (a.rows or (0, sys.maxsize) for a in (one, other))
    return start < other_stop and other_start < stop


def check_plain(path: Path, parts: Parts | Checkpoint) -> None:
    """Every tensor is dense and of a usable dtype. Raises CheckpointError."""
    for name, tensor in _named(parts):
        real = any(str(tensor.dtype).endswith(kind) for kind in ("float16", "float32", "float64"))  # bfloat16 too
        integers = name in parts.replaced or name.endswith("indices") or ": tensors." in name
        if not real and not (integers and "int" in str(tensor.dtype)):
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; expected 16, 32 or 64 bit floating point numbers")
        if hasattr(tensor, "is_meta") and not _plain(tensor):
            raise CheckpointError(f"{path}: {name} is not a plain dense tensor that holds all of its entries")


def check_finite(path: Path, parts: Parts | Checkpoint) -> None:
    """Every number is finite. Raises CheckpointError."""
    for adapter in parts.adapters:
        where = f"{path}: {adapter.module}"
        map_tensors(adapter.params, lambda t: t, partial(_finite_number, where))
    bad = non_finite(parts)
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} tensor(s) hold NaN or infinity, first {bad[0]}; this training run diverged"
        )


def _plain(tensor: Tensor) -> bool:
    """Is it dense, with as many numbers in memory as it has entries? One that was expanded can have any size."""
    if tensor.is_meta or str(tensor.layout) != "torch.strided" or tensor.is_quantized:
        return False
    return bool(tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def non_finite(parts: Parts | Checkpoint) -> list[str]:
    """Names of tensors with a NaN or an infinity."""
    return [name for name, tensor in _named(parts) if not _finite(tensor)]


def zeros(parts: Parts | Checkpoint) -> list[str]:
    """Names of adapter tensors that are zero throughout."""
    return [
        name
        for name, t in _named(parts)
        if name not in parts.replaced and 0 not in t.shape and not bool((t != 0).any())
    ]


def _named(parts: Parts | Checkpoint) -> list[tuple[str, Tensor]]:
    adapters = [(f"{a.module}: {name}", t) for a in parts.adapters for name, t in tensors_of(a.params).items()]
    return [*adapters, *parts.replaced.items()]


def _finite_number(where: str, number: float) -> float:
    if number != number or abs(number) > sys.float_info.max:
        raise CheckpointError(f"{where}: {number} is no usable scale")
    return number


def _finite(tensor: Tensor) -> bool:
    return bool((tensor == tensor).all()) and bool((abs(tensor) != float("inf")).all())
