"""MiSS: y = W x + b + D' sum_j x_j with x cut into pieces x_j of r inputs, so every piece of W' is that of W plus D', and b' = b.

Kang and Yin, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing", 2024; Bone before. D is (r, out); the
last piece may be short. "mini": D is given for the first outputs only and repeated for the others. "bat": D is an (r, r) block for
every r outputs, and a block of W becomes W_ij + W_ij D_i + D_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    D: Tensor  # (r, out); mini: (r, out / n); bat: (out / r, r, r)
    variant: str  # "miss", "mini" or "bat"


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    import torch

    rank, inn = int(p.D.shape[-1 if p.variant == "bat" else 0]), base.in_features
    pieces = torch.nn.functional.pad(x, (0, -inn % rank)).reshape(*x.shape[:-1], -1, rank)
    if p.variant != "bat":
        return base(x) + pieces.sum(-2) @ _whole(base, p)
    turned = torch.einsum("iqk,...jk->...ijq", p.D, pieces)  # D_i x_j
    blocks = base.weight.reshape(len(p.D), rank, inn // rank, rank)
    y = torch.einsum("ipjq,...ijq->...ip", blocks, turned) + turned.sum(-2)
    return base(x) + y.reshape(*x.shape[:-1], -1)


def fuse(base: Affine, p: Params) -> Affine:
    out, inn = base.out_features, base.in_features
    if p.variant == "bat":
        rank = int(p.D.shape[-1])
        blocks = base.weight.reshape(len(p.D), rank, inn // rank, rank).transpose(1, 2)
        blocks = blocks + blocks @ p.D[:, None] + p.D[:, None]
        return Affine(blocks.transpose(1, 2).reshape(out, inn), base.bias)
    D = _whole(base, p).T  # noqa: N806
    return base.plus(Affine(D.repeat(1, -(-inn // D.shape[1]))[:, :inn]))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    rank = min(int(p.D.shape[-1 if p.variant == "bat" else 0]), in_features)
    if p.variant == "bat":
        fits = rank and out_features % rank == 0 and in_features % rank == 0
        return {"D": (out_features // rank, rank, rank) if fits else ()}
    given = int(p.D.shape[1])
    return {"D": (rank, given if p.variant == "mini" and given and out_features % given == 0 else out_features)}


def initial(base: Affine, rank: int) -> Params:
    """Zero."""
    return Params(base.weight.new_zeros(min(rank, base.in_features), base.out_features), "miss")


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out, inn = base.out_features, base.in_features
    variant = ("miss", "mini", "bat")[seed % 3]
    if variant == "bat":
        rank = next((r for r in (3, 2) if out % r == 0 and inn % r == 0), 1)
        return Params(draw.tensor(out // rank, rank, rank), variant)
    given = next((out // n for n in (2, 3, 5) if out % n == 0), out) if variant == "mini" else out
    return Params(draw.tensor(draw.integer(1, inn + 1), given), variant)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.D.shape[-1 if p.variant == "bat" else 0]), "variant": p.variant}


def _whole(base: Affine, p: Params) -> Tensor:
    """D for all outputs: (r, out)."""
    return p.D.repeat(1, base.out_features // p.D.shape[1])
