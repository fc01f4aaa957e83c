"""BOFT: y = s * (W R' x) + b with R a product of m butterfly factors, so W' = diag(s) W R' and b' = b.

Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2024: R = B_m ... B_1, each
B_i = P_i diag(blocks) P_i' with a permutation P_i of the inputs and Cayley blocks (I - Q) (I + Q)^-1, Q = (A - A') / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.adapters._rotations import cayley, cayley_size, rotated
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    A: Tensor  # (m, blocks, b, b)
    s: Tensor  # (out,)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    y = base.linear()(_through(x, p, cayley)) * p.s
    return y if base.bias is None else y + base.bias


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    R = _through(torch.eye(base.in_features, dtype=base.weight.dtype), p, cayley)  # noqa: N806
    return Affine(p.s[:, None] * (base.weight @ R.T), base.bias)


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    y = base.size.linear()(_through(abs(x), p, cayley_size)) * abs(p.s)
    return y if base.bias is None else y + base.size.bias


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    factors, blocks, block = (int(n) for n in p.A.shape[:3])
    fits = blocks * block == in_features and (factors == 1 or (block % 2 == 0 and blocks % 2 ** (factors - 1) == 0))
    return {"A": (factors, blocks, block, block) if fits else (), "s": (out_features,)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    inn = base.in_features
    factors, block = (2, 2) if inn % 4 == 0 else (1, next((b for b in (3, 2, 7) if inn % b == 0), 1))
    return Params(draw.tensor(factors, inn // block, block, block) / 2, draw.tensor(base.out_features))


def describe(p: Params) -> dict[str, Any]:
    return {"block": int(p.A.shape[2]), "factors": int(p.A.shape[0])}


def order(size: int, blocks: int, block: int, factor: int, factors: int) -> list[int]:
    """The permutation of factor number ``factor``: entry i goes to place order[i]. None with a single factor.

    Within runs of ``block * 2**factor`` inputs, pieces of ``block / 2`` are taken even ones first, then odd ones.
    """
    if factors == 1:
        return list(range(size))
    run, piece = size // int(blocks / 2**factor), block // 2
    steps = math.ceil(run / piece)
    pieces = [*range(0, steps, 2), *range(1, steps, 2)]
    within = [n * piece + k for n in pieces for k in range(piece)]
    return [start + k for start in range(0, size, run) for k in within]


def _through(x: Tensor, p: Params, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """x (..., in) as rows times B_m ... B_1, each block being the transform of its Q."""
    factors, blocks, block = (int(n) for n in p.A.shape[:3])
    q = (p.A - p.A.transpose(2, 3)) / 2
    for factor in reversed(range(factors)):
        to = order(int(x.shape[-1]), blocks, block, factor, factors)
        permuted = x.new_empty(x.shape)
        permuted[..., to] = x
        x = rotated(permuted, transform(q[factor]))[..., to]
    return x
