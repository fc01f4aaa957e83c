"""RandLoRA: y = W x + b + s sum_i B_i (l_i * (g_i * A)) x, so W' = W + s B~ A~ and b' = b.

Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", 2025. B~ and A~ hold the N random bases side
by side, scaled by the learned l (r, N) and g (N, min(out, in)). The bases are shared by all layers and cut to size. As peft lays them
out, column (i, k) of B~ meets row (k, i) of A~ counted through, and the roles are swapped, all transposed, where out < in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    A: Tensor  # (r, 1, at least min(out, in))
    B: Tensor  # (at least max(out, in), at least N, r)
    l: Tensor  # noqa: E741  (r, N)
    g: Tensor  # (N, min(out, in))
    scale: float


def pair(base: Affine, p: Params) -> tuple[Tensor, Tensor]:
    """The way down (r N, in) and the way up (out, r N)."""
    out, inn = base.out_features, base.in_features
    small, large, bases = min(out, inn), max(out, inn), int(p.l.shape[1])
    A = (p.l[:, :, None] * p.A[:, :, :small] * p.g).reshape(-1, small)  # noqa: N806
    B = p.B[:large, :bases].reshape(large, -1)  # noqa: N806
    return (A, B) if small == inn else (B.T, A.T)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    down, up = pair(base, p)
    return base(x) + p.scale * (x @ down.T) @ up.T


def fuse(base: Affine, p: Params) -> Affine:
    down, up = pair(base, p)
    return base.plus(Affine(p.scale * up @ down))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    rank, bases = (int(n) for n in p.l.shape)
    small, large = sorted((out_features, in_features))
    return {
        "A": (rank, 1, max(small, int(p.A.shape[-1]))),
        "B": (max(large, int(p.B.shape[0])), max(bases, int(p.B.shape[1])), rank),
        "l": (rank, bases),
        "g": (bases, small),
    }


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    small, large = sorted((base.out_features, base.in_features))
    rank, more = draw.integer(1, 4), draw.integer(0, 2)
    bases = -(-small // rank)
    return Params(
        draw.tensor(rank, 1, small + more),
        draw.tensor(large + more, bases + more, rank),
        draw.tensor(rank, bases),
        draw.tensor(bases, small),
        0.5 + seed % 3,
    )


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.l.shape[0]), "bases": int(p.l.shape[1]), "scale": p.scale}
