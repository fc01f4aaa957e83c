"""FourierFT: y = W x + b + s Re(ifft2(F)) x, so W' = W + s Re(ifft2(F)) and b' = b.

Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024, equations 2 to 4. F (out, in) is 0 but for n learned
entries, whose places are drawn from a seed: the first n of a permutation of all of them, by torch's CPU generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    spectrum: Tensor  # (n,)
    scale: float
    seed: int


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    """As a sum of cosines: Re(ifft2(F))_jk = sum_n F_n cos(2 pi (u_n j / out + v_n k / in)) / (out in)."""
    out, inn = base.out_features, base.in_features
    u, v = places(out, inn, len(p.spectrum), p.seed)
    rows, columns = _turns(u, out), _turns(v, inn)  # (out, n), (in, n)
    waves = ((x @ _like(x, columns.cos())) * p.spectrum) @ _like(x, rows.cos()).T
    waves = waves - ((x @ _like(x, columns.sin())) * p.spectrum) @ _like(x, rows.sin()).T
    return base(x) + p.scale / (out * inn) * waves


def fuse(base: Affine, p: Params) -> Affine:
    import torch

    F = torch.zeros(base.weight.shape, dtype=p.spectrum.dtype)  # noqa: N806
    F[places(base.out_features, base.in_features, len(p.spectrum), p.seed)] = p.spectrum
    return base.plus(Affine(p.scale * torch.fft.ifft2(F).real))


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    terms = abs(p.scale) * abs(p.spectrum).sum() / (base.out_features * base.in_features)
    return base.size(abs(x)) + 2 * terms * abs(x).sum(-1, keepdim=True)


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"spectrum": (min(int(p.spectrum.shape[0]), out_features * in_features),)}


def initial(base: Affine, frequencies: int = 1000, *, scale: float = 150.0, seed: int = 777) -> Params:
    """Zero. scale and seed are peft's defaults."""
    count = min(frequencies, base.out_features * base.in_features)
    return Params(base.weight.new_zeros(count), float(scale), seed)


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    count = draw.integer(1, base.out_features * base.in_features + 1)
    return Params(draw.tensor(count), 3.0 + seed, seed)


def describe(p: Params) -> dict[str, Any]:
    return {"frequencies": int(p.spectrum.shape[0]), "scale": p.scale, "seed": p.seed}


@lru_cache(maxsize=8)
def places(out: int, inn: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the learned entries, as peft draws them."""
    import torch

    flat = torch.randperm(out * inn, generator=torch.Generator().manual_seed(seed))[:count]
    return flat // inn, flat % inn


def _turns(frequency: Tensor, size: int) -> Tensor:
    """2 pi f j / size for every place j, reduced to one turn before it is rounded; (size, n) float64."""
    import torch

    turns = torch.arange(size)[:, None] * frequency % size
    return turns.double() * (2 * math.pi / size)


def _like(x: Tensor, table: Tensor) -> Tensor:
    """A float64 table rounded once to the dtype of x."""
    return x.new_empty(table.shape).copy_(table)
