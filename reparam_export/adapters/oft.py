"""OFT: y = W R' x + b with R block-diagonal and orthogonal, so W' = W R' and b' = b; on the outputs of an embedding, W' = R' W.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023. ' is the transpose, as
rows are multiplied from the right in the authors' code and in peft. Each block is Cayley's transform of a skew-symmetric Q,
R = (I - Q) (I + Q)^-1, or k terms of a Neumann series for it, I + 2 Q + 2 Q^2 + ... with the last term counted once: that is what
peft computes unless it is told not to (Qiu et al., "Orthogonal Finetuning Made Scalable", 2025). One block may serve all. COFT keeps each Q
within a ball of radius eps / sqrt(blocks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.adapters._rotations import block_size, cayley, cayley_size, rotated, skew
from reparam_export.affine import Affine, Tensor
from reparam_export.errors import UsageError


@dataclass(frozen=True)
class Params:
    entries: Tensor  # (blocks, b (b - 1) / 2), or (1, ...) when all blocks are one
    terms: int  # of the Neumann series; 0: Cayley's transform itself
    eps: float = 0.0  # radius of COFT; 0: no constraint
    side: str = "input"  # or "output", for an embedding


def blocks(p: Params) -> Tensor:
    """R: (blocks, b, b)."""
    q = _constrained(p)
    return cayley(q) if p.terms == 0 else _neumann(q, p.terms)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    return base(rotated(x, blocks(p))) if p.side == "input" else rotated(base(x), blocks(p))


def fuse(base: Affine, p: Params) -> Affine:
    R = blocks(p)  # noqa: N806
    if p.side == "input":
        return Affine(rotated(base.weight, R.transpose(1, 2)), base.bias)
    return Affine(rotated(base.weight.T, R).T, None if base.bias is None else rotated(base.bias, R))


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    q = _constrained(p)
    size = cayley_size(q) if p.terms == 0 else _neumann(abs(q), p.terms)
    return base.size(rotated(abs(x), size)) if p.side == "input" else rotated(base.size(abs(x)), size)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    count, entries = (int(n) for n in p.entries.shape)
    block, size = block_size(entries), in_features if p.side == "input" else out_features
    if not block or size % block:
        return {"entries": ()}
    return {"entries": (count if count == 1 else size // block, entries)}


def initial(base: Affine, block: int) -> Params:
    """No rotation, by Cayley's transform itself. block: size of a block, a divisor of in."""
    if block < 2 or base.in_features % block:
        raise UsageError(f"block {block}: expected a divisor of {base.in_features} above 1")
    return Params(base.weight.new_zeros(base.in_features // block, block * (block - 1) // 2), 0)


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    side = "output" if seed % 5 == 4 else "input"
    size = base.in_features if side == "input" else base.out_features
    block = next((b for b in (3, 2, 4, 5, 7) if size % b == 0), 1)
    count = 1 if seed % 4 == 3 else size // block
    entries = draw.tensor(count, block * (block - 1) // 2) / 3
    return Params(entries, draw.integer(0, 7) if seed % 2 else 0, 0.5 if seed % 3 == 0 else 0.0, side)


def describe(p: Params) -> dict[str, Any]:
    series = "Cayley" if p.terms == 0 else f"Neumann, {p.terms} terms"
    return {"block": block_size(int(p.entries.shape[1])), "R": series} | ({"eps": p.eps} if p.eps else {})


def _constrained(p: Params) -> Tensor:
    """Q: (blocks, b, b), as COFT projects it."""
    q = skew(p.entries)
    if p.eps == 0:
        return q
    norm = q.flatten(1).norm(dim=1)
    radius = p.eps / len(q) ** 0.5
    return q * (radius / norm.clamp_min(radius))[:, None, None]


def _neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + 2 Q^(k - 2) + Q^(k - 1), with at least the first three for k = 3, as peft sums it."""
    import torch

    R = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q)  # noqa: N806
    if terms > 1:
        R = R + 2 * q  # noqa: N806
    if terms > 2:
        power = q
        for _ in range(max(1, terms - 3)):
            power = power @ q
            R = R + 2 * power  # noqa: N806
        R = R + power @ q  # noqa: N806
    return R
