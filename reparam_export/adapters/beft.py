"""BEFT: y = W x + b + v, so W' = W and b' = b + v.

As peft's BEFT: a bias that is learned beside the layer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    v: Tensor  # (out,)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) + p.v


def fuse(base: Affine, p: Params) -> Affine:
    return Affine(base.weight, p.v if base.bias is None else base.bias + p.v)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"v": (out_features,)}


def initial(base: Affine) -> Params:
    """Zero."""
    return Params(base.weight.new_zeros(base.out_features))


def example(seed: int, base: Affine) -> Params:
    return Params(Draw(seed).tensor(base.out_features))


def describe(p: Params) -> dict[str, Any]:
    return {}
