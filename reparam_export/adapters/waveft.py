"""WaveFT: y = W x + b + s D x, so W' = W + s D and b' = b, D the inverse wavelet transform of a sparse matrix.

Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", 2025. One level of Haar's wavelet (db1), or
no transform at all. The learned coefficients' places are drawn from a seed as FourierFT's are. As peft puts them, the four quarters of
the coefficient matrix are approximation, horizontal, vertical and diagonal detail; odd sizes are padded by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.adapters.fourierft import places
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Params:
    spectrum: Tensor  # (n,)
    scale: float
    seed: int
    wavelet: str  # "db1" or "none"


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    """Coefficient by coefficient: each is the outer product of a wave over the outputs and one over the inputs."""
    rows, columns = _waves(base, p, x.dtype)
    return base(x) + p.scale * ((x @ columns) * p.spectrum) @ rows.T


def fuse(base: Affine, p: Params) -> Affine:
    out, inn = base.out_features, base.in_features
    D = p.spectrum.new_zeros(out + out % 2, inn + inn % 2)  # noqa: N806
    D[places(out, inn, len(p.spectrum), p.seed)] = p.spectrum
    if p.wavelet == "db1":
        a, h, v, d = (q for half in D.chunk(2) for q in half.chunk(2, dim=1))
        D = D.new_empty(D.shape)  # noqa: N806
        D[0::2, 0::2], D[0::2, 1::2] = (a + h + v + d) / 2, (a + h - v - d) / 2
        D[1::2, 0::2], D[1::2, 1::2] = (a - h + v - d) / 2, (a - h - v + d) / 2
    return base.plus(Affine(p.scale * D[:out, :inn]))


def magnitude(x: Tensor, base: Affine, p: Params) -> Tensor:
    rows, columns = _waves(base, p, x.dtype)
    return base.size(abs(x)) + abs(p.scale) * ((abs(x) @ abs(columns)) * abs(p.spectrum)) @ abs(rows).T


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    return {"spectrum": (min(int(p.spectrum.shape[0]), out_features * in_features),)}


def initial(
    base: Affine, coefficients: int = 2592, *, scale: float = 25.0, seed: int = 777, wavelet: str = "db1"
) -> Params:
    """Zero. scale and seed are peft's defaults."""
    count = min(coefficients, base.out_features * base.in_features)
    return Params(base.weight.new_zeros(count), float(scale), seed, wavelet)


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    count = draw.integer(1, base.out_features * base.in_features + 1)
    return Params(draw.tensor(count), 0.5 + seed % 3, seed, draw.choice(("db1", "db1", "none")))


def describe(p: Params) -> dict[str, Any]:
    return {"coefficients": int(p.spectrum.shape[0]), "scale": p.scale, "seed": p.seed, "wavelet": p.wavelet}


def _waves(base: Affine, p: Params, dtype: Any) -> tuple[Tensor, Tensor]:
    """(out, n) and (in, n): the two factors of each coefficient's wave; detail alternates in sign, horizontal detail over the rows."""
    import torch

    out, inn = base.out_features, base.in_features
    i, j = places(out, inn, len(p.spectrum), p.seed)
    if p.wavelet == "none":
        return torch.eye(out, dtype=dtype)[:, i], torch.eye(inn, dtype=dtype)[:, j]
    half_out, half_in = (out + 1) // 2, (inn + 1) // 2
    low, right = (
        i >= half_out,
        j >= half_in,
    )  # in the lower half, in the right half: vertical, horizontal, or both diagonal
    rows, columns = _wave(i % half_out, right, half_out, dtype), _wave(j % half_in, low, half_in, dtype)
    return rows[:out], columns[:inn] / 2


def _wave(place: Tensor, detail: Tensor, half: int, dtype: Any) -> Tensor:
    """(2 half, n): 1 and 1, or 1 and -1 where it is detail, at places 2 i and 2 i + 1."""
    import torch

    wave = torch.zeros(2 * half, len(place), dtype=dtype)
    number = torch.arange(len(place))
    wave[2 * place, number] = 1
    wave[2 * place + 1, number] = 1 - 2 * detail.to(dtype)
    return wave
