"""LyCORIS' GLoRA: y = W (x + s A x) + s B x + b with A = A1 A2 and B = B1 B2, so W' = W + s (W A + B) and b' = b.

As in LyCORIS' ``glora``, which is not the GLoRA of Chavan et al. (see ``glora``): W A is a product of matrices here, and the bias stays.
In front of a convolution A acts on the channels, at every position alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    a1: Tensor  # (channels, r)
    a2: Tensor  # (r, channels)
    b1: Tensor  # (out, r)
    b2: Tensor  # (r, in)
    scale: float


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    patches = x.reshape(*x.shape[:-1], len(p.a1), -1)  # (..., channels, kernel)
    moved = (p.a1 @ (p.a2 @ patches)).reshape(x.shape)
    return base(x) + p.scale * (base.linear()(moved) + (x @ p.b2.T) @ p.b1.T)


def fuse(base: Affine, p: Params) -> Affine:
    kernels = base.weight.reshape(base.out_features, len(p.a1), -1)
    moved = (p.a1 @ p.a2).T @ kernels  # sum_i W_oik A_ij
    return base.plus(Affine(p.scale * (moved.reshape(base.weight.shape) + p.b1 @ p.b2)))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    channels, rank = int(p.a1.shape[0]), int(p.a2.shape[0])
    channels = channels if channels and in_features % channels == 0 else in_features
    inner = int(p.b2.shape[0])
    return {"a1": (channels, rank), "a2": (rank, channels), "b1": (out_features, inner), "b2": (inner, in_features)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    kernel = next((k for k in (3, 2) if seed % 3 and base.in_features % k == 0), 1)
    channels, rank, inner = base.in_features // kernel, draw.integer(1, 5), draw.integer(1, 5)
    a1, a2 = draw.tensor(channels, rank), draw.tensor(rank, channels)
    return Params(a1, a2, draw.tensor(base.out_features, inner), draw.tensor(inner, base.in_features), 0.4 + seed % 3)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.a2.shape[0]), "scale": p.scale}
