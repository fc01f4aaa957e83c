"""The kinds of peft's types against their papers' formulas in 40 digits, written here from the papers and from peft's forwards."""
# ruff: noqa: N803, N806  (matrices have the papers' letters)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf

from reparam_export.adapters import kind
from reparam_export.affine import Affine, tensors_of, to_dtype

mpmath.mp.dps = 40
SIZES = [(6, 8), (8, 6), (6, 6), (12, 4), (4, 12)]
Matrix = Any  # numpy array of mpf
exact = np.vectorize(lambda v: mpf(float(v)), otypes=[object])
sqrt, cos, sin = (np.vectorize(f, otypes=[object]) for f in (mpmath.sqrt, mpmath.cos, mpmath.sin))


def numbers(tensor: torch.Tensor) -> Matrix:
    return exact(tensor.numpy()) if tensor.is_floating_point() else tensor.numpy()


def zeros(*shape: int) -> Matrix:
    return exact(np.zeros(shape))


def eye(size: int) -> Matrix:
    return exact(np.eye(size))


def norm(values: Matrix, axis: int | None = None) -> Matrix:
    return sqrt((values * values).sum(axis))


def inverse(matrix: Matrix) -> Matrix:
    return np.array((mpmath.matrix(matrix.tolist()) ** -1).tolist(), dtype=object)


def block_diagonal(blocks: Matrix) -> Matrix:
    count, size = len(blocks), blocks.shape[1]
    whole = zeros(count * size, count * size)
    for i, block in enumerate(blocks):
        whole[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return whole


def adalora(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W + mpf(p.scale) * sum(
        (np.outer(t["P"][:, i] * t["e"][i], t["Q"][i]) for i in range(len(t["e"]))), zeros(*W.shape)
    ), b


def dora(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    V = W + mpf(p.scale) * t["pair.up.weight"] @ t["pair.down.weight"]
    return (t["magnitude"] / norm(V, 1))[:, None] * V, b


def factor(t: dict[str, Matrix], n: int) -> Matrix:
    a, c = t[f"a{n}"], t[f"b{n}"]
    if f"t{n}" not in t:
        return a @ c
    core = t[f"t{n}"]
    whole = zeros(len(a), c.shape[1], core.shape[2])
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            whole = whole + a[:, i][:, None, None] * c[j][None, :, None] * core[i, j][None, None, :]
    return whole.reshape(len(a), -1)


def loha(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W + mpf(p.scale) * factor(t, 1) * factor(t, 2), b


def lokr(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    C = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    B = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"] if "t2" not in t else None
    if B is None:
        B = factor({"a1": t["w2_a"].T, "b1": t["w2_b"], "t1": t["t2"]}, 1)
    return W + mpf(p.scale) * np.block([[c * B for c in row] for row in C]), b


def ia3(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    if p.side == "output":
        return W * t["l"][:, None], b * t["l"]
    return W * np.repeat(t["l"], W.shape[1] // len(t["l"])), b


def ssf(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W * t["scale"][:, None], b * t["scale"] + t["shift"]


def beft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W, b + t["v"]


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


def vera(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    out, inn = W.shape
    return W + (t["l_b"][:, None] * t["B"][:out]) @ (t["l_d"][:, None] * t["A"][:, :inn]), b


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


def randlora(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    small, large = sorted(W.shape)
    rank, bases = t["l"].shape
    A = [t["l"][k, i] * t["A"][k, 0, :small] * t["g"][i] for k in range(rank) for i in range(bases)]
    B = [t["B"][:large, i, k] for i in range(bases) for k in range(rank)]
    change = sum(np.outer(up, down) for up, down in zip(B, A, strict=True))
    return W + mpf(p.scale) * (change if small == W.shape[1] else change.T), b


def miss(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    D, new = t["D"], W + 0
    out, inn = W.shape
    for o in range(out):
        for i in range(inn):
            if p.variant == "bat":
                r = D.shape[1]
                piece = W[o, i // r * r : i // r * r + r]
                new[o, i] += piece @ D[o // r][:, i % r] + D[o // r][o % r, i % r]
            else:
                new[o, i] += D[i % len(D), o % D.shape[1]]
    return new, b


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


def shira(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    new = W + 0
    for value, row, column in zip(t["values"], *t["indices"], strict=True):
        new[row, column] += value
    return new, b


def glora_peft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    A, B, C, D, E = (
        (t[f"{n}.d"] @ t[f"{n}.u"] if f"{n}.u" in t else t[f"{n}.d"]) if f"{n}.d" in t else np.array([mpf(0)])
        for n in "ABCDE"
    )
    shift = (W @ C).reshape(-1) if "C.d" in t else 0 * b
    return W + W * A + B, b + b * D + E + shift


def delora(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    A, B = t["A"] / norm(t["A"], 1)[:, None], t["B"] / norm(t["B"], 0)
    return W + t["strength"][0] / len(A) * (B @ A) * t["norms"], b


def hira(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W + W * (t["pair.up.weight"] @ t["pair.down.weight"]), b


def vblora(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    def pieces(side: str) -> Matrix:
        logits = t[f"{side}.logits"]
        made = zeros(*logits.shape[:2], t["bank"].shape[1])
        for i in range(logits.shape[0]):
            for j in range(logits.shape[1]):
                own, indices = logits[i, j], t.get(f"{side}.indices")
                best = (
                    sorted(range(len(own)), key=lambda n: -own[n])[: p.topk]
                    if indices is None
                    else list(range(len(own)))
                )
                share = [mpmath.exp(own[n]) for n in best]
                vectors = t["bank"][best if indices is None else indices[i, j]]
                made[i, j] = sum(s * v for s, v in zip(share, vectors, strict=True)) / sum(share)
        return made

    a, c = pieces("a"), pieces("b")
    A = a.reshape(len(a), -1)
    B = np.array(
        [[c[o // c.shape[2], r, o % c.shape[2]] for r in range(c.shape[1])] for o in range(len(W))], dtype=object
    )
    return W + B @ A, b


def deft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    if p.projection == "relu":
        Q, P = t["P"], np.vectorize(lambda v: max(v, mpf(0)), otypes=[object])(t["P"])
    else:  # the basis that LAPACK gives: columns of Gram-Schmidt, with the signs of its R's diagonal
        R = torch.linalg.qr(p.P)[1]
        columns: list[Matrix] = []
        for i, column in enumerate(t["P"].T):
            for other in columns:
                column = column - (other @ column) * other
            columns.append(column / norm(column) * (1 if R[i, i] > 0 else -1))
        Q = P = np.array(columns, dtype=object).T
    new = W - Q @ (P.T @ W)
    return (new if p.R is None else new + mpf(p.scale) * (Q @ t["R"])), b


def gralora(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    A, B = t["A"], t["B"]
    k, sub = len(A), A.shape[2] // len(A)
    change = np.block(
        [[(A[i][:, j * sub : (j + 1) * sub] @ B[j][i * sub : (i + 1) * sub]).T for i in range(k)] for j in range(k)]
    )
    if p.pair is not None:
        change = change + t["pair.up.weight"] @ t["pair.down.weight"]
    return W + mpf(p.scale) * change, b


def tokens(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    new = (W if p.side == "output" else W.T) + 0
    new[list(p.indices)] = t["vectors"]
    return new if p.side == "output" else new.T, b


FORMULAS: dict[str, Callable[..., tuple[Matrix, Matrix]]] = {
    f.__name__: f
    for f in (
        adalora, beft, boft, c3a, deft, delora, dora, fourierft, glora_peft, gralora, hira, hra, ia3, loha, lokr, miss, oft, randlora,
        road, shira, ssf, tokens, vblora, vera, waveft,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(6))
def test_fused_weights_are_the_formula_rounded_once(name: str, seed: int) -> None:
    out, inn = SIZES[seed % len(SIZES)]
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(out, generator=g).double() if seed % 2 and name != "tokens" else None
    layer = Affine(torch.randn(out, inn, generator=g).double(), bias)
    params = to_dtype(to_dtype(kind(name).example(seed, layer), torch.float32), torch.float64)
    t = {field: numbers(tensor) for field, tensor in tensors_of(params).items()}
    b = zeros(out) if bias is None else numbers(bias)
    weight, expected = FORMULAS[name](numbers(layer.weight), b, t, params)
    if name == "glora_peft" and bias is None:
        expected = b  # C, D and E need a bias
    fused = kind(name).fuse(layer, params)
    rounded = np.vectorize(lambda v: np.float32(float(v)))
    assert np.array_equal(fused.weight.float().numpy(), rounded(weight))
    found = torch.zeros(out) if fused.bias is None else fused.bias.float()
    assert np.array_equal(found.numpy(), rounded(expected))


@pytest.mark.parametrize("name", FORMULAS)
def test_the_uncertainty_bounds_the_error_of_float64(name: str) -> None:
    """The forward's own error against 40 digits, on entries where it cancels, is within what the proof allows it."""
    from reparam_export.adapters import Step
    from reparam_export.verification.weights import Exact

    worst = 0.0
    for seed in range(6):
        out, inn = SIZES[seed % len(SIZES)]
        layer = Affine(torch.randn(out, inn, generator=torch.Generator().manual_seed(seed)).double())
        params = kind(name).example(seed, layer)
        t = {field: numbers(tensor) for field, tensor in tensors_of(params).items()}
        weight, bias = FORMULAS[name](numbers(layer.weight), zeros(out), t, params)
        if name == "glora_peft":
            bias = zeros(out)
        exact_layer = Exact(layer, (Step(kind(name), params),))
        x = torch.randn(3, inn, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        error = np.abs(numbers(exact_layer(x)) - (numbers(x) @ weight.T + bias)).astype(float)
        worst = max(worst, float((error / exact_layer.uncertainty(x).numpy()).max()))
    assert worst < 1
    assert math.isfinite(worst)
