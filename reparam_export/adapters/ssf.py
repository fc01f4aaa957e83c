"""SSF: y = g * (W x + b) + t, so W' = diag(g) W and b' = g * b + t.

Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022; after linear
layers, convolutions and norms alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    scale: Tensor  # (out,)
    shift: Tensor  # (out,)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) * p.scale + p.shift


def fuse(base: Affine, p: Params) -> Affine:
    return Affine(base.weight * p.scale[:, None], p.shift if base.bias is None else base.bias * p.scale + p.shift)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"scale": (out_features,), "shift": (out_features,)}


def initial(base: Affine) -> Params:
    """Scale 1, shift 0; the authors draw both with deviation 0.02 around these."""
    return Params(base.weight.new_ones(base.out_features), base.weight.new_zeros(base.out_features))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    return Params(draw.tensor(base.out_features), draw.tensor(base.out_features))


def describe(p: Params) -> dict[str, Any]:
    return {}
