"""DEFT: y = W x + b - Q P' W x + s Q R x, so W' = W - Q P' W + s Q R and b' = b.

Kumar et al., "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", 2025: what W maps into the span of the
learned P (out, r) is taken out and a learned map R into it put in its place. "qr": Q and P are both an orthonormal basis of the
span; "relu": Q is P as it is, and P' is cut at 0. PaRa is the case without R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    P: Tensor  # (out, r)
    R: Tensor | None  # (r, in)
    scale: float
    projection: str  # "qr" or "relu"


def bases(p: Params) -> tuple[Tensor, Tensor]:
    """Q and P of the formula, (out, r) each."""
    import torch

    if p.projection == "relu":
        return p.P, p.P.relu()
    wide = p.P.float() if p.P.dtype in (torch.float16, torch.bfloat16) else p.P
    Q = torch.linalg.qr(wide)[0].to(p.P.dtype)  # noqa: N806
    return Q, Q


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    Q, P = bases(p)  # noqa: N806
    y = base(x) - (base.linear()(x) @ P) @ Q.T
    return y if p.R is None else y + p.scale * (x @ p.R.T) @ Q.T


def fuse(base: Affine, p: Params) -> Affine:
    Q, P = bases(p)  # noqa: N806
    inside = -(P.T @ base.weight) if p.R is None else p.scale * p.R - P.T @ base.weight
    return Affine(base.weight + Q @ inside, base.bias)


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    """The sizes of the terms, times the condition of P where its basis is computed: that is how far rounding takes the basis."""
    import torch

    Q, P = bases(p)  # noqa: N806
    singular = torch.linalg.svdvals(p.P.double())
    condition = float(singular.max() / singular.min()) if p.projection == "qr" and len(singular) else 1.0
    y = (base.size.linear()(abs(x)) @ abs(P)) @ abs(Q).T
    if p.R is not None:
        y = y + abs(p.scale) * (abs(x) @ abs(p.R).T) @ abs(Q).T
    return base.size(abs(x)) + condition * y


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    rank = min(int(p.P.shape[1]), out_features)
    expected: dict[str, tuple[int, ...]] = {"P": (out_features, rank)}
    return expected if p.R is None else expected | {"R": (rank, in_features)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    rank = draw.integer(1, min(4, base.out_features + 1))
    R = None if seed % 4 == 3 else draw.tensor(rank, base.in_features)  # noqa: N806
    return Params(draw.tensor(base.out_features, rank), R, 0.5 + seed % 3, "qr" if seed % 2 else "relu")


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.P.shape[1]), "scale": p.scale, "projection": p.projection}
