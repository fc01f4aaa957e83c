"""SHiRA: y = (W + S) x + b with S sparse, so W' = W + S and b' = b.

Bhardwaj et al., "Sparse High Rank Adapters", 2024. S holds the learned values at the places of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor
from reparam_export.errors import FusionError


@dataclass(frozen=True)
class Params:
    values: Tensor  # (n,)
    indices: Tensor  # (2, n) integers: rows and columns


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    rows, columns = p.indices.long()
    y = base(x)
    return y.index_add(-1, rows, x[..., columns] * p.values)


def fuse(base: Affine, p: Params) -> Affine:
    rows, columns = p.indices.long()
    return Affine(base.weight.index_put((rows, columns), p.values, accumulate=True), base.bias)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    count = int(p.values.shape[0])
    for name, places, size in zip(("row", "column"), p.indices, (out_features, in_features), strict=True):
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < size:
            raise FusionError(
                f"a sparse entry is in {name} {int(places.max())} of a weight of {out_features} x {in_features}"
            )
    return {"values": (count,), "indices": (2, count)}


def example(seed: int, base: Affine) -> Params:
    import torch

    draw = Draw(seed)
    out, inn = base.out_features, base.in_features
    count = draw.integer(1, out * inn)
    flat = torch.randperm(out * inn - 1, generator=torch.Generator().manual_seed(seed))[:count] + 1
    flat = flat[(flat // inn > 0) & (flat % inn > 0)]  # no zero, as in any example
    return Params(draw.tensor(len(flat)), torch.stack((flat // inn, flat % inn)))


def describe(p: Params) -> dict[str, Any]:
    return {"entries": int(p.values.shape[0])}
