"""DoRA: y = c (W x + s U D x) + b with c = m / |W + s U D|, the norm of each row, so W' = c (W + s U D) and b' = b.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5; m is learned, one number for each output. Rows of a
convolution are its flattened kernels; those of an embedding are its dimensions, over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, bottleneck_shapes
from reparam_export.affine import Affine, Bottleneck, Tensor


@dataclass(frozen=True)
class Params:
    pair: Bottleneck
    magnitude: Tensor  # (out,)
    scale: float


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    V = base.weight + p.scale * (p.pair.up.weight @ p.pair.down.weight)  # noqa: N806
    y = p.magnitude / V.norm(dim=1) * (base.linear()(x) + p.scale * p.pair(x))
    return y if base.bias is None else y + base.bias


def fuse(base: Affine, p: Params) -> Affine:
    V = base.linear().plus(p.pair.down.then(p.pair.up).times(p.scale)).weight  # noqa: N806
    return Affine((p.magnitude / V.norm(dim=1))[:, None] * V, base.bias)


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    """c (|W| + |s| |U| |D|) |x|, once for the product and once, by the relative error of the norm, for c."""
    up, down = p.pair.up.weight, p.pair.down.weight
    V = base.weight + p.scale * (up @ down)  # noqa: N806
    terms = base.size.weight + abs(p.scale) * (abs(up) @ abs(down))
    norm = V.norm(dim=1)
    y = abs(p.magnitude) / norm * (1 + terms.norm(dim=1) / norm) * Affine(terms)(abs(x))
    return y if base.bias is None else y + base.size.bias


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return bottleneck_shapes("pair", p.pair, in_features, out_features) | {"magnitude": (out_features,)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    pair = draw.bottleneck(draw.integer(1, 6), base.in_features, base.out_features, bias=False)
    return Params(pair, draw.tensor(base.out_features), 0.7 + seed % 3)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": p.pair.rank, "scale": p.scale}
