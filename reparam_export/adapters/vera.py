"""VeRA: y = W x + b + l_b * (B (l_d * (A x))), so W' = W + diag(l_b) B diag(l_d) A and b' = b.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2024, equation 2. A and B are random, frozen and shared by all
layers, so they may be larger than this one: its first ``in`` columns and first ``out`` rows are used. PVeRA's mean is the same form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    A: Tensor  # (r, at least in)
    B: Tensor  # (at least out, r)
    l_d: Tensor  # (r,)
    l_b: Tensor  # (out,)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    A, B = p.A[:, : base.in_features], p.B[: base.out_features]  # noqa: N806
    return base(x) + p.l_b * ((p.l_d * (x @ A.T)) @ B.T)


def fuse(base: Affine, p: Params) -> Affine:
    A, B = p.A[:, : base.in_features], p.B[: base.out_features]  # noqa: N806
    return base.plus(Affine((p.l_b[:, None] * B) @ (p.l_d[:, None] * A)))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    rank = int(p.l_d.shape[0])
    wide, high = max(in_features, int(p.A.shape[1])), max(out_features, int(p.B.shape[0]))
    return {"A": (rank, wide), "B": (high, rank), "l_d": (rank,), "l_b": (out_features,)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    rank, more = draw.integer(1, 6), draw.integer(0, 3)
    A, B = draw.tensor(rank, base.in_features + more), draw.tensor(base.out_features + more, rank)  # noqa: N806
    return Params(A, B, draw.tensor(rank), draw.tensor(base.out_features))


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.l_d.shape[0])}
