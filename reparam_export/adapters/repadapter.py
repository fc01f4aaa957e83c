"""RepAdapter: y = W x' + b on x' = x + s U(D(x)), so W' = W + s W U D and b' = b + W s (U d + u).

D and U are the authors' 1x1 convolutions conv_A and conv_B, here as matrices (a grouped convolution is block-diagonal).
Luo et al., "Towards Efficient Visual Adaption via Structural Re-parameterization", 2023, equations 5 to 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, bottleneck_shapes, initial_pair
from reparam_export.affine import Affine, Bottleneck, LowRank, Tensor

DROPOUT = "after"


@dataclass(frozen=True)
class Params:
    pair: Bottleneck  # in -> r -> in
    scale: float


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x + p.scale * p.pair(x))


def fuse(base: Affine, p: Params) -> Affine:
    return base.plus(p.pair.down.then(p.pair.up.then(base.linear())).times(p.scale))


def low_rank(base: Affine, p: Params) -> LowRank:
    return LowRank.of(base, (Bottleneck(p.pair.down, p.pair.up.then(base.linear())), p.scale))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return bottleneck_shapes("pair", p.pair, in_features, in_features)


def initial(base: Affine, rank: int, *, scale: float = 1.0, bias: bool = True, init: str = "xavier") -> Params:
    """As the authors' code with one group: down xavier uniform, up and biases zero."""
    inn = base.in_features
    return Params(initial_pair(base.weight, rank, inn, inn, init=init, bias=bias), float(scale))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    inn = base.in_features
    return Params(draw.bottleneck(draw.integer(1, 6), inn, inn, bias=seed % 3 != 0), 0.5 + seed % 4)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": p.pair.rank, "scale": p.scale}
