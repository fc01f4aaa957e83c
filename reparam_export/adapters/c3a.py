"""C3A: y = W x + b + 1/in sum_j circ(w_ij) x_j for each piece i of the outputs, so W'_ij = W_ij + circ(w_ij) / in and b' = b.

Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", 2025. Inputs and outputs are cut into pieces of the
block size; circ(w)_kl = w_(l - k), counted around. The division by the number of inputs is peft's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor
from reparam_export.errors import UsageError


@dataclass(frozen=True)
class Params:
    w: Tensor  # (out / block, in / block, block)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    """Shift by shift: output k of a piece takes input k + n times w_n."""
    import torch

    block = int(p.w.shape[2])
    pieces = x.reshape(*x.shape[:-1], -1, block)
    y = sum(torch.einsum("...jk,ij->...ik", pieces.roll(-n, -1), p.w[:, :, n]) for n in range(block))
    return base(x) + y.reshape(*x.shape[:-1], -1) / base.in_features  # type: ignore[union-attr]


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    k = torch.arange(p.w.shape[2])
    circ = p.w[:, :, (k[None, :] - k[:, None]) % len(k)]  # (i, j, k, l)
    return base.plus(Affine(circ.transpose(1, 2).reshape(base.weight.shape) / base.in_features))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    block = int(p.w.shape[2])
    fits = block and out_features % block == 0 and in_features % block == 0
    return {"w": (out_features // block, in_features // block, block) if fits else ()}


def initial(base: Affine, block: int) -> Params:
    """Zero. block: a divisor of in and out."""
    if block < 1 or base.out_features % block or base.in_features % block:
        raise UsageError(f"block {block}: expected a divisor of {base.out_features} and {base.in_features}")
    return Params(base.weight.new_zeros(base.out_features // block, base.in_features // block, block))


def example(seed: int, base: Affine) -> Params:
    out, inn = base.out_features, base.in_features
    block = next((b for b in (4, 3, 2) if out % b == 0 and inn % b == 0), 1)
    return Params(Draw(seed).tensor(out // block, inn // block, block))


def describe(p: Params) -> dict[str, Any]:
    return {"block": int(p.w.shape[2])}
