"""AdaLoRA: y = W x + b + s P (e * (Q x)), so W' = W + s P diag(e) Q and b' = b.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, equation 3; e holds the singular
values that are left, which may be none. s is alpha / (r + 1e-5) in the authors' code and in peft, r the rank before any was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, drawn
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    P: Tensor  # (out, r)
    e: Tensor  # (r,)
    Q: Tensor  # (r, in)
    scale: float


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(x) + p.scale * ((x @ p.Q.T) * p.e) @ p.P.T


def fuse(base: Affine, p: Params) -> Affine:
    return base.plus(Affine(p.scale * (p.P * p.e) @ p.Q))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    rank = int(p.e.shape[0])
    return {"P": (out_features, rank), "e": (rank,), "Q": (rank, in_features)}


def initial(base: Affine, rank: int, *, scale: float = 1.0) -> Params:
    """As the authors' code: e zero, P and Q normal with deviation 0.02. Ranks are not pruned here."""
    like, out, inn = base.weight, base.out_features, base.in_features
    left, right = (drawn(like.new_empty(shape), "normal") for shape in ((out, rank), (rank, inn)))
    return Params(left, like.new_zeros(rank), right, float(scale))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    rank = draw.integer(0, 6)
    return Params(
        draw.tensor(base.out_features, rank), draw.tensor(rank), draw.tensor(rank, base.in_features), 0.6 + seed % 3
    )


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.e.shape[0]), "scale": p.scale}
