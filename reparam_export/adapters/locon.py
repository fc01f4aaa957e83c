"""LoCon: y = W x + b + s D x with D_pck = sum_ij U_pi T_ijk L_jc, so W' = W + s D and b' = b.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2024: LoRA for convolutions. T is
the core for the kernel k, between 1x1 convolutions on the channels c; without it D = U L, L over whole patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    up: Tensor  # U (out, r)
    down: Tensor  # L (r, in), or (r, in / kernel) with a core
    scale: float
    core: Tensor | None = None  # T (r, r, kernel)


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    if p.core is None:
        return base(x) + p.scale * (x @ p.down.T) @ p.up.T
    patches = x.reshape(*x.shape[:-1], p.down.shape[1], p.core.shape[2])  # (..., channels, kernel)
    inner = p.down @ patches  # (..., r, kernel)
    mixed = (p.core * inner[..., None, :, :]).sum(dim=(-2, -1))
    return base(x) + p.scale * mixed @ p.up.T


def fuse(base: Affine, p: Params) -> Affine:
    if p.core is None:
        return base.plus(Affine(p.scale * (p.up @ p.down)))
    kernel = p.up @ p.core.permute(2, 0, 1) @ p.down  # (kernel, out, channels)
    return base.plus(Affine(p.scale * kernel.permute(1, 2, 0).reshape(len(p.up), -1)))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    if p.core is None:
        rank = int(p.down.shape[0])
        return {"up": (out_features, rank), "down": (rank, in_features)}
    upper, lower, kernel = (int(n) for n in p.core.shape)
    fits = kernel > 0 and in_features % kernel == 0
    down = (lower, in_features // kernel) if fits else ()
    return {"up": (out_features, upper), "down": down, "core": (upper, lower, kernel)}


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    kernel = next((k for k in (3, 2, 5) if seed % 3 and base.in_features % k == 0), 1)
    upper, lower = draw.integer(1, 5), draw.integer(1, 5)
    if seed % 3 == 0:
        return Params(draw.tensor(base.out_features, upper), draw.tensor(upper, base.in_features), 0.7)
    up, down = draw.tensor(base.out_features, upper), draw.tensor(lower, base.in_features // kernel)
    return Params(up, down, 0.7 + seed % 3, draw.tensor(upper, lower, kernel))


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.down.shape[0]), "scale": p.scale} | ({} if p.core is None else {"core": "tucker"})
