"""HiRA: y = W x + b + (W * U D) x, so W' = W + W * U D, ``*`` elementwise, and b' = b.

Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, bottleneck_shapes, initial_pair
from reparam_export.affine import Affine, Bottleneck, Tensor


@dataclass(frozen=True)
class Params:
    pair: Bottleneck


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) + Affine(base.weight * (p.pair.up.weight @ p.pair.down.weight))(x)


def fuse(base: Affine, p: Params) -> Affine:
    return Affine(base.weight + base.weight * p.pair.down.then(p.pair.up).weight, base.bias)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return bottleneck_shapes("pair", p.pair, in_features, out_features)


def initial(base: Affine, rank: int, *, init: str = "kaiming") -> Params:
    """As LoRA: down random, up zero."""
    return Params(initial_pair(base.weight, rank, base.in_features, base.out_features, init=init))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    return Params(draw.bottleneck(draw.integer(1, 6), base.in_features, base.out_features, bias=False))


def describe(p: Params) -> dict[str, Any]:
    return {"rank": p.pair.rank}
