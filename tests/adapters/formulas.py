"""The formulas of the kinds in 40 digits, written here from the papers and from the forwards of peft and LyCORIS."""
# ruff: noqa: N803, N806  (matrices have the papers' letters)

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import torch
from mpmath import mpf

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


def locon(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    core = {"t1": t["core"]} if "core" in t else {}
    return W + mpf(p.scale) * factor({"a1": t["up"], "b1": t["down"], **core}, 1), b


def decomposed(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    name = next(n for n in ("locon", "loha", "lokr") if getattr(p, n) is not None)
    own = {field.removeprefix(f"{name}."): tensor for field, tensor in t.items()}
    V, _ = {"locon": locon, "loha": loha, "lokr": lokr}[name](W, b, own, getattr(p, name))
    eps = mpf(2) ** -52
    if p.side == "out":
        return (t["m"] / (norm(V, 1) + eps))[:, None] * V, b
    V = V.reshape(len(V), len(t["m"]), -1)
    c = t["m"] / (sqrt((V * V).sum((0, 2))) + eps)
    return (V * c[None, :, None]).reshape(W.shape), b


def full(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W + t["weight"], b + t.get("bias", 0)


def glora_lycoris(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    A = t["a1"] @ t["a2"]
    V = W.reshape(len(W), len(A), -1)
    moved = np.stack([V[:, :, k] @ A for k in range(V.shape[2])], axis=2).reshape(W.shape)
    return W + mpf(p.scale) * (moved + t["b1"] @ t["b2"]), b


def ia3(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    if p.side == "output":
        return W * t["l"][:, None], b * t["l"]
    return W * np.repeat(t["l"], W.shape[1] // len(t["l"])), b


def ssf(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W * t["scale"][:, None], b * t["scale"] + t["shift"]


def beft(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    return W, b + t["v"]


def vera(W: Matrix, b: Matrix, t: dict[str, Matrix], p: Any) -> tuple[Matrix, Matrix]:
    out, inn = W.shape
    return W + (t["l_b"][:, None] * t["B"][:out]) @ (t["l_d"][:, None] * t["A"][:, :inn]), b


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
