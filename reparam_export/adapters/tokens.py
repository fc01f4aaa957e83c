"""Trainable tokens: the vectors of some tokens are replaced, so W' = W with column i replaced by v_i.

The base is an embedding: W is (dim, vocabulary), its input x one-hot. As ``peft``'s ``trainable_token_indices``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor
from reparam_export.errors import FusionError

RECOMPUTES = True  # as peft: the whole table is copied and patched at every call


@dataclass(frozen=True)
class Params:
    indices: tuple[int, ...]
    vectors: Tensor  # (len(indices), dim)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    chosen = x[..., list(p.indices)]
    kept = x + 0
    kept[..., list(p.indices)] = 0
    return base(kept) + chosen @ p.vectors


def fuse(base: Affine, p: Params) -> Affine:
    weight = base.weight + 0
    weight[:, list(p.indices)] = p.vectors.T
    return Affine(weight, base.bias)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    if max(p.indices, default=0) >= in_features:
        raise FusionError(f"token {max(p.indices)} is trained, the embedding has {in_features}")
    return {"vectors": (len(p.indices), out_features)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    indices = tuple(sorted({draw.integer(0, base.in_features) for _ in range(3)}))
    return Params(indices, draw.tensor(len(indices), base.out_features))


def describe(p: Params) -> dict[str, Any]:
    return {"tokens": len(p.indices)}
