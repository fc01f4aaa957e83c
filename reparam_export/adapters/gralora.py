"""GraLoRA: y = W x + b + s G x, G in k x k blocks G_ji = B_ji A_ij of low rank, so W' = W + s G and b' = b; G may have a plain pair added.

Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", 2025. Piece i of the inputs has a way
down of r numbers, of which the j-th k-th goes to piece j of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, bottleneck_shapes, drawn, parts
from reparam_export.affine import Affine, Bottleneck, Tensor


@dataclass(frozen=True)
class Params:
    A: Tensor  # (k, in / k, r)
    B: Tensor  # (k, r, out / k)
    scale: float
    pair: Bottleneck | None = None  # of the hybrid form


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    import torch

    k, rank = int(p.A.shape[0]), int(p.A.shape[2])
    down = torch.einsum("...il,ilr->...ir", x.reshape(*x.shape[:-1], k, -1), p.A)
    crossed = down.reshape(*x.shape[:-1], k, k, rank // k).transpose(-3, -2).reshape(*x.shape[:-1], k, rank)
    y = torch.einsum("...jr,jro->...jo", crossed, p.B).reshape(*x.shape[:-1], -1)
    return base(x) + p.scale * (y if p.pair is None else y + p.pair(x))


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    k, rank = int(p.A.shape[0]), int(p.A.shape[2])
    A, B = p.A.reshape(k, -1, k, rank // k), p.B.reshape(k, k, rank // k, -1)  # noqa: N806
    G = torch.einsum("jiqo,iljq->joil", B, A).reshape(base.weight.shape)  # noqa: N806
    change = Affine(G) if p.pair is None else Affine(G).plus(p.pair.down.then(p.pair.up))
    return base.plus(change.times(p.scale))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    k, rank = int(p.A.shape[0]), int(p.A.shape[2])
    fits = k and out_features % k == 0 and in_features % k == 0 and rank % k == 0
    pair = {} if p.pair is None else bottleneck_shapes("pair", p.pair, in_features, out_features)
    return pair | {"A": (k, in_features // k, rank) if fits else (), "B": (k, rank, out_features // k) if fits else ()}


def initial(base: Affine, rank: int, *, blocks: int = 2, scale: float = 1.0, init: str = "kaiming") -> Params:
    """A random, B zero. blocks: a divisor of in, out and the rank."""
    inn, out = parts("blocks", base.in_features, blocks), parts("blocks", base.out_features, blocks)
    parts("blocks", rank, blocks)
    down = drawn(base.weight.new_empty(blocks, inn, rank), init)
    return Params(down, base.weight.new_zeros(blocks, rank, out), float(scale))


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out, inn = base.out_features, base.in_features
    k = next((n for n in (3, 2) if out % n == 0 and inn % n == 0), 1)
    rank = k * draw.integer(1, 3)
    pair = draw.bottleneck(draw.integer(1, 4), inn, out, bias=False) if seed % 2 else None
    return Params(draw.tensor(k, inn // k, rank), draw.tensor(k, rank, out // k), 0.5 + seed % 3, pair)


def describe(p: Params) -> dict[str, Any]:
    hybrid = {} if p.pair is None else {"hybrid": p.pair.rank}
    return {"rank": int(p.A.shape[2]), "blocks": int(p.A.shape[0]), "scale": p.scale} | hybrid
