"""DeLoRA: y = W x + b + l/r sum_i b_i (a_i (n * x)) / (|a_i| |b_i|), so W' = W + l/r B diag(1 / |a||b|) A diag(n) and b' = b.

Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", 2025. a_i are the rows of A, b_i the columns of B; l is
learned; n holds the norms of W's columns when training began, which the file brings. Norms below 1e-4 count as that, as in peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    strength: Tensor  # (1,)
    norms: Tensor  # (in,)


def weights(p: Params) -> Tensor:
    """l / (r |a_i| |b_i|): (r,)."""
    return p.strength / len(p.A) / (p.A.norm(dim=1).clamp_min(1e-4) * p.B.norm(dim=0).clamp_min(1e-4))


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) + (((x * p.norms) @ p.A.T) * weights(p)) @ p.B.T


def fuse(base: Affine, p: Params) -> Affine:
    return base.plus(Affine((p.B * weights(p)) @ (p.A * p.norms)))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    rank = int(p.A.shape[0])
    return {"A": (rank, in_features), "B": (out_features, rank), "strength": (1,), "norms": (in_features,)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    rank = draw.integer(1, 6)
    A, B = draw.tensor(rank, base.in_features), draw.tensor(base.out_features, rank)  # noqa: N806
    return Params(A, B, draw.tensor(1), abs(draw.tensor(base.in_features)))


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.A.shape[0]), "strength": float(p.strength[0])}
