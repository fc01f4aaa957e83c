"""LoRA: y = W x + b + s U(D(x)), so W' = W + s U D and b' = b + s u, where u is U's bias if it has one.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3. s is alpha / r, or alpha / sqrt(r) (rsLoRA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, bottleneck_shapes, initial_pair
from reparam_export.affine import Affine, Bottleneck, LowRank, Tensor

DROPOUT = "before"


@dataclass(frozen=True)
class Params:
    pair: Bottleneck
    scale: float


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) + p.scale * p.pair(x)


def fuse(base: Affine, p: Params) -> Affine:
    return base.plus(p.pair.down.then(p.pair.up).times(p.scale))


def low_rank(base: Affine, p: Params) -> LowRank:
    return LowRank.of(base, (p.pair, p.scale))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return bottleneck_shapes("pair", p.pair, in_features, out_features)


def initial(base: Affine, rank: int, *, scale: float = 1.0, init: str = "kaiming") -> Params:
    """As the authors' loralib: down kaiming uniform, up zero."""
    return Params(initial_pair(base.weight, rank, base.in_features, base.out_features, init=init), float(scale))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    pair = draw.bottleneck(draw.integer(1, 6), base.in_features, base.out_features, bias=False)
    if seed % 2:
        pair = Bottleneck(pair.down, Affine(pair.up.weight, draw.tensor(base.out_features)))
    return Params(pair, 0.7 + seed % 3)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": p.pair.rank, "scale": p.scale}
