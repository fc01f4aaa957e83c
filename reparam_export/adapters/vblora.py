"""VB-LoRA: y = W x + b + B (A x), so W' = W + B A and b' = b, where A and B are made of vectors from a bank that all layers share.

Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024: each piece of v entries of a row of A (of a
column of B) is the mean of the k vectors with the largest logits, weighted by the softmax of these k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Choice:
    """Which vectors make a piece, and how much of each: the logits of all (..., bank), or ``indices`` and logits of the k best (..., k)."""

    logits: Tensor
    indices: Tensor | None = None  # integers

    def pieces(self, bank: Tensor, topk: int) -> Tensor:
        """(..., v)."""
        logits, indices = self.logits, self.indices
        if indices is None:
            logits, indices = logits.topk(topk, dim=-1)
        return (logits.softmax(-1)[..., None] * bank[indices.long()]).sum(-2)


@dataclass(frozen=True)
class Params:
    a: Choice  # (r, in / v, ...)
    b: Choice  # (out / v, r, ...)
    bank: Tensor  # (vectors, v)
    topk: int


def pair(p: Params, bank: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r)."""
    a, b = p.a.pieces(bank, p.topk), p.b.pieces(bank, p.topk)
    return a.reshape(len(a), -1), b.transpose(1, 2).reshape(-1, b.shape[1])


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    A, B = pair(p, p.bank)  # noqa: N806
    return base(x) + (x @ A.T) @ B.T


def fuse(base: Affine, p: Params) -> Affine:
    A, B = pair(p, p.bank)  # noqa: N806
    return base.plus(Affine(B @ A))


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    A, B = pair(p, abs(p.bank))  # noqa: N806
    return base.size(abs(x)) + (abs(x) @ A.T) @ B.T


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    vectors, length = (int(n) for n in p.bank.shape)
    rank = int(p.a.logits.shape[0])
    fits = in_features % length == 0 and out_features % length == 0
    sizes = {"a": (rank, in_features // length), "b": (out_features // length, rank)}
    expected: dict[str, tuple[int, ...]] = {"bank": (vectors, length) if fits else ()}
    for side, choice in (("a", p.a), ("b", p.b)):
        expected[f"{side}.logits"] = (*sizes[side], vectors if choice.indices is None else p.topk)
        if choice.indices is not None:
            expected[f"{side}.indices"] = (*sizes[side], p.topk)
    return expected


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out, inn = base.out_features, base.in_features
    length = next((n for n in (3, 2) if out % n == 0 and inn % n == 0), 1)
    rank, vectors, topk = draw.integer(1, 4), draw.integer(4, 7), draw.integer(2, 4)

    def choice(*size: int) -> Choice:
        if seed % 2:
            return Choice(draw.tensor(*size, vectors) * 3)
        return Choice(draw.tensor(*size, topk), (abs(draw.tensor(*size, topk)) * 10).long() % (vectors - 1) + 1)

    return Params(choice(rank, inn // length), choice(out // length, rank), draw.tensor(vectors, length), topk)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.a.logits.shape[0]), "vectors": int(p.bank.shape[0]), "topk": p.topk}
