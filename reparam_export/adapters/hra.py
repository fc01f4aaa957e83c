"""HRA: y = W H x + b, H = H_1 ... H_r a product of Householder reflections H_i = I - 2 u_i u_i' / |u_i|^2, so W' = W H and b' = b.

Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", 2024.
With the u_i made orthonormal first (Gram-Schmidt), H = I - 2 sum_i u_i u_i'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    u: Tensor  # (in, r)
    vectors: str = "as given"  # or "orthonormal": by Gram-Schmidt


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    for u in reversed(unit_vectors(p)):
        x = x - 2 * (x @ u)[..., None] * u
    return base(x)


def fuse(base: Affine, p: Params) -> Affine:
    weight = base.weight
    for u in unit_vectors(p):
        weight = weight - 2 * (weight @ u)[:, None] * u
    return Affine(weight, base.bias)


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    """|x| + 2 |u| |u|'|x| a reflection, times what Gram-Schmidt loses to cancellation: |u_i| over what is left of it."""
    vectors = unit_vectors(p)
    lost = max((float(p.u[:, i].norm() / abs(p.u[:, i] @ u)) for i, u in enumerate(vectors)), default=1.0)
    size = abs(x)
    for u in reversed(vectors):
        size = size + 2 * (size @ abs(u))[..., None] * abs(u)
    return base.size(size) * lost


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"u": (in_features, int(p.u.shape[1]))}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    rank = draw.integer(1, min(4, base.in_features + 1))
    return Params(draw.tensor(base.in_features, rank), "orthonormal" if seed % 2 else "as given")


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.u.shape[1]), "vectors": p.vectors}


def unit_vectors(p: Params) -> list[Tensor]:
    """u_1 to u_r of length 1, orthogonal to one another where that is asked for."""
    found: list[Tensor] = []
    for i in range(p.u.shape[1]):
        u = p.u[:, i]
        for other in found if p.vectors == "orthonormal" else ():
            u = u - (other @ u) * other
        found.append(u / u.norm())
    return found
