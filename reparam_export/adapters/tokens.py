"""Trainable tokens: the vectors of some tokens are replaced, so W' = W with column i replaced by v_i.

The base is an embedding: W is (dim, vocabulary), its input x one-hot; or, on the side of the outputs, the layer that gives the
logits, whose rows are replaced. As ``peft``'s ``trainable_token_indices``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor
from reparam_export.errors import FusionError

RECOMPUTES = True  # as peft: the whole table is copied and patched at every call


@dataclass(frozen=True)
class Params:
    indices: tuple[int, ...]
    vectors: Tensor  # (len(indices), dim)
    side: str = "input"  # or "output"


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    import torch

    at = torch.tensor(p.indices)
    if p.side == "output":
        return base(x).index_copy(-1, at, x @ p.vectors.T)
    return base(x.index_fill(-1, at, 0)) + x[..., at] @ p.vectors


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    at = torch.tensor(p.indices)
    if p.side == "output":
        return Affine(base.weight.index_copy(0, at, p.vectors))
    return Affine(base.weight.index_copy(1, at, p.vectors.T), base.bias)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    vocabulary, dim = (in_features, out_features) if p.side == "input" else (out_features, in_features)
    if max(p.indices, default=0) >= vocabulary:
        raise FusionError(f"token {max(p.indices)} is trained, the layer has {vocabulary}")
    return {"vectors": (len(p.indices), dim)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    side = "output" if seed % 3 == 2 else "input"
    vocabulary, dim = base.weight.shape if side == "output" else base.weight.T.shape
    indices = tuple(sorted({draw.integer(0, int(vocabulary)) for _ in range(3)}))
    return Params(indices, draw.tensor(len(indices), int(dim)), side)


def describe(p: Params) -> dict[str, Any]:
    return {"tokens": len(p.indices)}
