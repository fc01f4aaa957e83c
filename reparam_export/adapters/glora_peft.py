"""peft's GLORA: y = (W + W*A + B) x + b + b*D + E + W C, so W' = W + W*A + B and b' = b + b*D + E + W C; without b, b' is none.

``*`` is elementwise, W and b are the original ones everywhere. As the authors' form (see ``glora``) but for three things: one choice of
paths holds for all layers, a path is stored as what it is, and C, D and E are dropped on a layer without a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw
from reparam_export.affine import Affine, Tensor


@dataclass(frozen=True)
class Path:
    """A support as stored: the low-rank product ``d u``, or ``d`` itself: a column, a vector, or one number."""

    d: Tensor
    u: Tensor | None = None

    def value(self) -> Tensor:
        return self.d if self.u is None else self.d @ self.u


@dataclass(frozen=True)
class Params:
    A: Path | None  # (out, in), (out, 1) or (1,)
    B: Path | None
    C: Path | None  # (in, 1)
    D: Path | None  # (out,) or (1,)
    E: Path | None


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    W = base.weight  # noqa: N806
    y = base(x)
    if p.A is not None:
        y = y + Affine(W * p.A.value())(x)
    if p.B is not None:
        y = y + Affine(0 * W + p.B.value())(x)
    return y if base.bias is None else y + _moved(base, base.bias, p)


def fuse(base: Affine, p: Params) -> Affine:
    W, b = base.weight, base.bias  # noqa: N806
    weight = W if p.A is None else W + W * p.A.value()
    weight = weight if p.B is None else weight + p.B.value()
    return Affine(weight, None if b is None else b + _moved(base, b, p))


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in (
        ("A", out_features, in_features),
        ("B", out_features, in_features),
        ("C", in_features, 1),
    ):
        path: Path | None = getattr(p, name)
        if path is not None and path.u is not None:
            rank = int(path.u.shape[0])
            expected |= {f"{name}.d": (rows, rank), f"{name}.u": (rank, columns)}
        elif path is not None:
            expected[f"{name}.d"] = (1,) if name != "C" and len(path.d.shape) == 1 else (rows, 1)
    for name in ("D", "E"):
        path = getattr(p, name)
        if path is not None:
            expected[f"{name}.d"] = (1,) if tuple(path.d.shape) == (1,) else (out_features,)
    return expected


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    out, inn = base.out_features, base.in_features

    def path(rows: int, columns: int, choices: tuple[str, ...]) -> Path | None:
        choice, rank = draw.choice(choices), draw.integer(1, 5)
        if choice == "lora":
            return Path(draw.tensor(rows, rank), draw.tensor(rank, columns))
        vector = (rows, 1) if "lora" in choices else (rows,)
        return {"vector": Path(draw.tensor(*vector)), "constant": Path(draw.tensor(1)), "none": None}[choice]

    wide, narrow = ("lora", "vector", "constant", "none"), ("vector", "constant", "none")
    A, B = path(out, inn, wide), path(out, inn, wide)  # noqa: N806
    return Params(A, B, path(inn, 1, ("lora", "vector", "none")), path(out, 1, narrow), path(out, 1, narrow))


def describe(p: Params) -> dict[str, Any]:
    paths = {name: getattr(p, name) for name in "ABCDE"}
    ranks = [int(path.u.shape[0]) for path in paths.values() if path is not None and path.u is not None]
    return ({"rank": max(ranks)} if ranks else {}) | {"path": {name: _choice(path) for name, path in paths.items()}}


def _moved(base: Affine, bias: Tensor, p: Params) -> Tensor:
    """b*D + E + W C."""
    moved = 0 * bias
    if p.D is not None:
        moved = moved + bias * p.D.value()
    if p.E is not None:
        moved = moved + p.E.value()
    if p.C is not None:
        moved = moved + base.linear()(p.C.value().reshape(-1))
    return moved


def _choice(path: Path | None) -> str:
    if path is None:
        return "none"
    if path.u is not None:
        return f"LoRA_{int(path.u.shape[0])}"
    return "constant" if tuple(path.d.shape) == (1,) else "vector"
