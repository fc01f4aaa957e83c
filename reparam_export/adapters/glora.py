"""GLoRA: y = (W + W*A + B) x + b + b*D + E + W C, so W' = W + W*A + B and b' = b + b*D + E + W C.

``*`` is elementwise, W and b are the original ones everywhere; without b, b' = E + W C. Each of A to E is one of
LoRA_k, vector, constant or none, chosen per layer. Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient
Fine-tuning", 2023, equation 10 and section 3.2. (Not the same as today's peft GLORA, nor LyCORIS's.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reparam_export.adapters._bottleneck import Draw, drawn
from reparam_export.affine import Affine, Factors, LowRank, Tensor
from reparam_export.errors import FusionError, UsageError

CHOICES: dict[str, tuple[str, ...]] = {  # LoRA stands for LoRA_k with any k up to the stored rank
    "A": ("LoRA", "vector", "constant", "none"),
    "B": ("LoRA", "vector", "constant", "none"),
    "C": ("LoRA", "vector", "none"),
    "D": ("constant", "none", "vector"),
    "E": ("constant", "none", "vector"),
}
RECOMPUTES = True  # as the authors' code: W' is made anew at every call, then multiplied once


@dataclass(frozen=True)
class Path:
    """The choice for each support, e.g. ``A="LoRA_4", B="vector", C="none", D="constant", E="vector"``."""

    A: str
    B: str
    C: str
    D: str
    E: str

    def problems(self, rank: int) -> list[str]:
        """What is wrong with this choice for tensors of that stored rank; empty when nothing is."""
        found = []
        for support, choice in asdict(self).items():
            k = lora_rank(choice)
            if ("LoRA" if k is not None else choice) not in CHOICES[support]:
                found.append(f"{support}={choice!r} is not one of {', '.join(CHOICES[support])} (LoRA as LoRA_k)")
            elif k is not None and not 1 <= k <= rank:
                found.append(f"{support}={choice!r} but the stored rank is {rank}")
        return found


UNCHOSEN = Path(*["unchosen"] * 5)  # of a supernet, which holds all paths and has no defined output


@dataclass(frozen=True)
class Params:
    path: Path
    Ad: Tensor  # (out, r)
    Au: Tensor  # (r, in)
    Bd: Tensor  # (out, r)
    Bu: Tensor  # (r, in)
    Cd: Tensor  # (in, r)
    Cu: Tensor  # (r, 1)
    D: Tensor  # (out,)
    E: Tensor  # (out,)


def lora_rank(choice: str) -> int | None:
    """k of ``LoRA_k``, None for any other choice."""
    match = re.fullmatch(r"LoRA_([0-9]{1,6})", choice)
    return int(match[1]) if match else None


def support(choice: str, d: Tensor, u: Tensor) -> Tensor:
    """A, B or C as a tensor that broadcasts to its full shape; a number 0.0 for none."""
    k = lora_rank(choice)
    if k is not None:
        return d[:, :k] @ u[:k, :]
    return {"vector": d[:, :1], "constant": d[0, 0], "none": 0.0}[choice]


def bias_support(choice: str, v: Tensor) -> Tensor:
    """D or E: the vector, its first entry, or 0.0."""
    return {"vector": v, "constant": v[0], "none": 0.0}[choice]


def apply(x: Tensor, base: Affine, p: Params) -> Tensor:
    W, b, path = base.weight, base.bias, p.path  # noqa: N806
    y = base(x)
    if path.A != "none":
        y = y + _scaled(x, W, path.A, p)
    if path.B != "none":
        y = y + _added(x, path.B, p)
    if b is not None and path.D != "none":
        y = y + b * bias_support(path.D, p.D)
    if path.E != "none":
        y = y + bias_support(path.E, p.E)
    if path.C != "none":
        y = y + base.linear()(_column(W, support(path.C, p.Cd, p.Cu)))
    return y


def _scaled(x: Tensor, W: Tensor, choice: str, p: Params) -> Tensor:  # noqa: N803
    """(W*A) x: one number a of A for a row, or for all of W, scales that row's output: a (W x)."""
    A = support(choice, p.Ad, p.Au)  # noqa: N806
    if lora_rank(choice) is not None:
        return Affine(W * A)(x)
    return Affine(W)(x) * A.reshape(-1)


def _added(x: Tensor, choice: str, p: Params) -> Tensor:
    """B x: through the low-rank pair, or one number of B for a row, or for all of W, times the sum of x."""
    k = lora_rank(choice)
    if k is not None:
        return Affine(p.Bd[:, :k])(Affine(p.Bu[:k, :])(x))
    return x.sum(-1)[..., None] * support(choice, p.Bd, p.Bu).reshape(-1)


def fuse(base: Affine, p: Params) -> Affine:
    W, b, path = base.weight, base.bias, p.path  # noqa: N806
    weight = W + W * support(path.A, p.Ad, p.Au) + support(path.B, p.Bd, p.Bu)
    bias = None if b is None else b + b * bias_support(path.D, p.D)
    created = bias is None and (path.E != "none" or path.C != "none")
    if created:
        bias = 0 * W[:, 0]
    if bias is not None and path.E != "none":
        bias = bias + bias_support(path.E, p.E)
    if bias is not None and path.C != "none":
        bias = bias + W @ _column(W, support(path.C, p.Cd, p.Cu))
    return Affine(weight, bias)


def low_rank(base: Affine, p: Params) -> LowRank:
    W, b, path = base.weight, base.bias, p.path  # noqa: N806
    bias = None if b is None else b + b * bias_support(path.D, p.D)
    if path.E != "none":
        bias = (0 * p.E if bias is None else bias) + bias_support(path.E, p.E)
    if path.C != "none":
        bias = (0 * p.E if bias is None else bias) + W @ _column(W, support(path.C, p.Cd, p.Cu))
    return LowRank(factors(path.B, p.Bd, p.Bu), factors(path.A, p.Ad, p.Au), bias)


def factors(choice: str, d: Tensor, u: Tensor) -> tuple[Factors, ...]:
    """A or B as a product: ``support`` without its full shape. Empty for none."""
    k = lora_rank(choice)
    ones = 0 * u[:1] + 1
    if k is not None:
        return ((d[:, :k], u[:k, :]),)
    return {"vector": ((d[:, :1], ones),), "constant": ((0 * d[:, :1] + d[0, 0], ones),), "none": ()}[choice]


def shapes(out_features: int, in_features: int, p: Params) -> dict[str, tuple[int, ...]]:
    rank = int(p.Ad.shape[1])
    problems = p.path.problems(rank)
    if problems:
        raise FusionError(f"a GLoRA path cannot be followed: {problems[0]}")
    return {
        "Ad": (out_features, rank),
        "Au": (rank, in_features),
        "Bd": (out_features, rank),
        "Bu": (rank, in_features),
        "Cd": (in_features, rank),
        "Cu": (rank, 1),
        "D": (out_features,),
        "E": (out_features,),
    }


def initial(
    base: Affine, rank: int = 4, *, path: Path | Mapping[str, str] | None = None, init: str = "xavier"
) -> Params:
    """Ad, Bd, Cd, D, E zero, Au, Bu, Cu random: "xavier" as the authors' ViT code, "kaiming" as their fork of peft.

    path: the choice for every layer, {"A": "LoRA_4", ...}; a supernet, which tries all of them, is made by ``supernet()``.
    """
    if path is None:
        raise UsageError(
            'kind "glora": give the path, path={"A": "LoRA_4", "B": "vector", "C": "none", "D": "constant", "E": "vector"}, '
            "or make a supernet of all paths with supernet()"
        )
    chosen = path if isinstance(path, Path) else path_of(path)
    problems = chosen.problems(rank)
    if problems:
        raise UsageError(f"path: {problems[0]}")
    like, out, inn = base.weight, base.out_features, base.in_features
    zeros, random = like.new_zeros, like.new_empty
    return Params(
        chosen,
        zeros(out, rank),
        drawn(random(rank, inn), init),
        zeros(out, rank),
        drawn(random(rank, inn), init),
        zeros(inn, rank),
        drawn(random(rank, 1), init),
        zeros(out),
        zeros(out),
    )


def path_of(choices: Mapping[str, str]) -> Path:
    """The Path of a mapping of exactly A, B, C, D and E. Raises UsageError."""
    if set(choices) != set("ABCDE"):
        raise UsageError(f"path: expected a choice for each of A, B, C, D, E; found {', '.join(map(str, choices))}")
    return Path(**{name: str(choice) for name, choice in choices.items()})


def count(p: Params) -> int:
    out, inn = int(p.D.shape[0]), int(p.Au.shape[1])
    return path_parameters(p.path, out, inn)


def path_parameters(path: Path, out_features: int, in_features: int) -> int:
    """Trainable parameters of one path on one layer, as ``get_param`` of the authors' search counts them."""
    full = {"A": (out_features, in_features), "B": (out_features, in_features), "C": (in_features, 1)}
    total = 0
    for name, choice in asdict(path).items():
        rows, columns = full.get(name, (out_features, 0))
        k = lora_rank(choice)
        total += k * (rows + columns) if k is not None else {"vector": rows, "constant": 1, "none": 0}[choice]
    return total


def branches(base: Affine, p: Params) -> dict[str, Tensor]:
    W = base.weight  # noqa: N806
    return {
        "A": W * support(p.path.A, p.Ad, p.Au) + 0 * W,
        "B": 0 * W + support(p.path.B, p.Bd, p.Bu),
    }


def example(seed: int, base: Affine) -> Params:
    draw = Draw(seed)
    rank = draw.integer(1, 6)
    out, inn = base.out_features, base.in_features

    def pick(name: str) -> str:
        choice = draw.choice(CHOICES[name])
        return f"LoRA_{draw.integer(1, rank + 1)}" if choice == "LoRA" else choice

    tensors = (
        draw.tensor(*shape)
        for shape in ((out, rank), (rank, inn), (out, rank), (rank, inn), (inn, rank), (rank, 1), (out,), (out,))
    )
    return Params(Path(*(pick(name) for name in "ABCDE")), *tensors)


def describe(p: Params) -> dict[str, Any]:
    return {"rank": int(p.Ad.shape[1]), "path": asdict(p.path)}


def _column(like: Tensor, c: Tensor) -> Tensor:
    """C (in, 1) as a vector (in,) that W multiplies."""
    return c.reshape(like.shape[1])
