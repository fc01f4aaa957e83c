"""What the orthogonal kinds share: skew-symmetric blocks, Cayley's transform of them, and how far rounding may take it."""

from __future__ import annotations

from reparam_export.affine import Tensor


def skew(entries: Tensor) -> Tensor:
    """(n, b (b - 1) / 2) entries above the diagonal, row by row -> (n, b, b) skew-symmetric blocks."""
    import torch

    block = block_size(int(entries.shape[1]))
    rows, columns = torch.triu_indices(block, block, 1)
    upper = entries.new_zeros(len(entries), block, block)
    upper[:, rows, columns] = entries
    return upper - upper.transpose(1, 2)


def block_size(entries: int) -> int:
    """b of b (b - 1) / 2 entries; 0 when there is no such b."""
    block = (1 + round((1 + 8 * entries) ** 0.5)) // 2
    return block if block * (block - 1) // 2 == entries else 0


def cayley(q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of (..., b, b) skew-symmetric blocks: orthogonal. Half precision is solved in float32: torch has no solver."""
    import torch

    wide = q.float() if q.dtype in (torch.float16, torch.bfloat16) else q
    one = torch.eye(q.shape[-1], dtype=wide.dtype)
    return torch.linalg.solve(one + wide, one - wide, left=False).to(q.dtype)


def cayley_size(q: Tensor) -> Tensor:
    """Bounds |R| and, times n u, the error of a backward stable solve: its condition number is at most 1 + |Q|."""
    import torch

    return torch.ones_like(q) * (1 + q.flatten(-2).norm(dim=-1))[..., None, None]


def rotated(x: Tensor, blocks: Tensor) -> Tensor:
    """Each block of b entries of x (..., n b), as a row, times its (b, b) block; one block serves all when n is 1."""
    import torch

    parts = x.reshape(*x.shape[:-1], -1, blocks.shape[-1])
    return torch.einsum("...nk,nkc->...nc", parts, blocks.expand(parts.shape[-2], -1, -1)).reshape(x.shape)
