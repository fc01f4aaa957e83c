"""Full: y = W x + b + D x + d, so W' = W + D and b' = b + d.

A whole difference to the base, as LyCORIS stores fully trained layers and norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    weight: Tensor  # D (out, in)
    bias: Tensor | None = None  # d (out,)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) + Affine(p.weight, p.bias)(x)


def fuse(base: Affine, p: Params) -> Affine:
    return base.plus(Affine(p.weight, p.bias))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
    return expected if p.bias is None else expected | {"bias": (out_features,)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    weight = draw.tensor(base.out_features, base.in_features)
    return Params(weight, draw.tensor(base.out_features) if seed % 3 else None)


def describe(p: Params) -> dict[str, Any]:
    return {}
