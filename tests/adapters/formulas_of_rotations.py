"""The formulas of the kinds that rotate or transform, in 40 digits, written here from the papers and from peft's forwards."""
# ruff: noqa: N803, N806  (matrices have the papers' letters)

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import torch
from formulas import Matrix, block_diagonal, exact, eye, inverse, norm, zeros
from mpmath import mpf


def oft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    size = W.shape[1] if p.side == "input" else W.shape[0]
    block = next(k for k in range(1, size + 1) if k * (k - 1) // 2 == t["entries"].shape[1])
    blocks = []
    for entries in t["entries"]:
        Q = zeros(block, block)
        Q[np.triu_indices(block, 1)] = entries
        Q = Q - Q.T
        radius = mpf(p.eps) / mpmath.sqrt(len(t["entries"]))
        if p.eps and norm(Q) > radius:
            Q = Q * radius / norm(Q)
        if p.terms == 0:
            blocks.append((eye(block) - Q) @ inverse(eye(block) + Q))
            continue
        powers = [eye(block)]
        for _ in range(7):
            powers.append(powers[-1] @ Q)
        twice, last = {1: (0, 0), 2: (1, 0), 3: (2, 3), 4: (2, 3)}.get(p.terms, (p.terms - 2, p.terms - 1))
        R = powers[0] + 2 * sum(powers[1 : twice + 1], zeros(block, block))
        blocks.append(R + powers[last] if last else R)
    R = block_diagonal(np.array(blocks if len(blocks) > 1 else blocks * (size // block), dtype=object))
    return (W @ R.T, b) if p.side == "input" else (R.T @ W, R.T @ b)


def boft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    from peft.tuners.boft.layer import BOFTLayer

    inn, (factors, count, size, _) = W.shape[1], t["A"].shape
    R = eye(inn)
    for n in range(factors):
        blocks = []
        for A in t["A"][n]:
            Q = (A - A.T) / 2
            blocks.append((eye(size) - Q) @ inverse(eye(size) + Q))
        order = BOFTLayer.block_butterfly_perm(None, inn, int(count / 2**n), size // 2, factors - 1)
        P = exact(BOFTLayer.perm2mat(None, order).numpy())
        R = P @ block_diagonal(np.array(blocks, dtype=object)) @ P.T @ R
    return t["s"][:, None] * (W @ R.T), b


def hra(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    vectors: list[Matrix] = []
    for u in t["u"].T:
        for other in vectors if p.vectors == "orthonormal" else ():
            u = u - (other @ u) * other
        vectors.append(u / norm(u))
    if p.vectors == "orthonormal":
        return W @ (eye(W.shape[1]) - 2 * sum(np.outer(u, u) for u in vectors)), b
    for u in vectors:
        W = W @ (eye(W.shape[1]) - 2 * np.outer(u, u))
    return W, b


def places(W: Matrix, p: Any) -> tuple[np.ndarray, np.ndarray]:
    out, inn = W.shape
    flat = torch.randperm(out * inn, generator=torch.Generator().manual_seed(p.seed))[: len(p.spectrum)].numpy()
    return flat // inn, flat % inn


def fourierft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    out, inn = W.shape
    change = zeros(out, inn)
    for f, u, v in zip(t["spectrum"], *places(W, p), strict=True):
        for j in range(out):
            for k in range(inn):
                change[j, k] += f * mpmath.cos(2 * mpmath.pi * (mpf(int(u * j)) / out + mpf(int(v * k)) / inn))
    return W + mpf(p.scale) * change / (out * inn), b


def waveft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    out, inn = W.shape
    change = zeros(out + out % 2, inn + inn % 2)
    half = (len(change) // 2, change.shape[1] // 2)
    for f, i, j in zip(t["spectrum"], *places(W, p), strict=True):
        if p.wavelet == "none":
            change[i, j] += f
            continue
        right, low = j >= half[1], i >= half[0]  # horizontal and vertical detail
        for r in range(2):
            for c in range(2):
                sign = (-1 if right and r else 1) * (-1 if low and c else 1)
                change[2 * (i % half[0]) + r, 2 * (j % half[1]) + c] += sign * f / 2
    return W + mpf(p.scale) * change[:out, :inn], b


def road(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    out, half = len(W), p.group // 2
    R = zeros(out, out)
    for o in range(out):
        group, place = divmod(o, p.group)
        second, k = divmod(place, half)
        partner = o + (-half if second else half)
        if p.variant == "road_1":
            cosine = sine = group * half + k
        elif p.variant == "road_2":
            cosine = sine = o
        else:
            cosine, sine = 2 * group * p.group + place, (2 * group + 1) * p.group + place
        R[o, o] = t["alpha"][cosine] * mpmath.cos(t["theta"][cosine])
        R[o, partner] = (1 if second else -1) * t["alpha"][sine] * mpmath.sin(t["theta"][sine])
    return R @ W, R @ b


def c3a(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    block, new = t["w"].shape[2], W + 0
    for o in range(len(W)):
        for i in range(W.shape[1]):
            new[o, i] += t["w"][o // block, i // block, (i - o) % block] / W.shape[1]
    return new, b
