"""Affine maps ``y = W x + b`` and their algebra; the only thing an adapter kind has to know about a layer.

A layer's weight is handled as the matrix ``W`` of shape (out, in) that acts on the last axis of its input.
How a module stores that matrix, and what its input rows are, is its *layout*:

    linear       nn.Linear                weight (out, in)
    transposed   transformers' Conv1D     weight (in, out)
    embedding    nn.Embedding             weight (in, out); the input is one-hot
    conv         nn.Conv1d/2d/3d          weight (out, in/groups, *kernel); the input rows are patches

Only operators and methods that ``torch`` and ``numpy`` share are used, so a checkpoint can be read without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

T = TypeVar("T")
Tensor = Any  # torch.Tensor, or numpy.ndarray when only inspecting


@dataclass(frozen=True)
class Affine:
    """``y = W x + b`` on the last axis of x. ``weight`` (out, in), ``bias`` (out,) or None; any float dtype."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def then(self, after: Affine) -> Affine:
        """The composition ``after(self(x))``: V (W x + b) + c = (V W) x + (V b + c)."""
        carried = None if self.bias is None else after.weight @ self.bias
        return Affine(after.weight @ self.weight, _sum(carried, after.bias))

    def plus(self, other: Affine) -> Affine:
        """The sum ``self(x) + other(x)``."""
        return Affine(self.weight + other.weight, _sum(self.bias, other.bias))

    def times(self, scale: Any) -> Affine:
        """The multiple ``scale * self(x)``; scale is a number or a tensor with one entry."""
        return Affine(self.weight * scale, None if self.bias is None else self.bias * scale)

    def linear(self) -> Affine:
        """The same map without its bias."""
        return Affine(self.weight)

    def rows(self, start: int, stop: int) -> Affine:
        """Outputs ``start:stop`` only, as for one of q, k, v in a packed projection."""
        return Affine(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])


@dataclass(frozen=True)
class Bottleneck:
    """``y = up(down(x))``, the low-rank pair that most adapters are made of."""

    down: Affine
    up: Affine

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def shift(self) -> Tensor | None:
        """What it adds to every output: up(down's bias), the bias of the pair as one map; (out,) or None."""
        return self.up.bias if self.down.bias is None else self.up(self.down.bias)


Factors = tuple[Tensor, Tensor]  # (out, k) and (k, in): the matrix that is their product


@dataclass(frozen=True)
class LowRank:
    """A fused layer by its factors: W' = W + sum of added + W * (sum of gates), elementwise, with ``bias`` as its whole bias.

    Row i of W' needs row i of W and of the left factors, and nothing else, so a layer can be folded a few rows at a time.
    """

    added: tuple[Factors, ...]
    gates: tuple[Factors, ...] = ()
    bias: Tensor | None = None

    @classmethod
    def of(cls, base: Affine, *pairs: tuple[Bottleneck, Any]) -> LowRank:
        """``base`` plus each low-rank pair times its scale."""
        bias = base.bias
        for pair, scale in pairs:
            bias = _sum(bias, None if pair.shift is None else pair.shift * scale)
        return cls(tuple((pair.up.weight * scale, pair.down.weight) for pair, scale in pairs), bias=bias)

    def fold(self, base: Affine) -> Affine:
        """The whole fused layer; base: the one that the factors were made from."""
        weight = base.weight
        for left, right in self.gates:
            weight = weight + base.weight * (left @ right)
        for left, right in self.added:
            weight = weight + left @ right
        return Affine(weight, self.bias)


def map_tensors(value: T, change: Callable[[Tensor], Tensor], number: Callable[[float], float] | None = None) -> T:
    """A copy of a (nested) frozen dataclass with ``change`` applied to every tensor in it, ``number`` to every float."""
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), change, number) for f in fields(value)}
        return cast(T, replace(value, **changed))
    if _is_tensor(value):
        return cast(T, change(value))
    if number is not None and isinstance(value, float | int) and not isinstance(value, bool):
        return cast(T, number(value))
    return value


def tensors_of(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a (nested) frozen dataclass by its dotted field name."""
    if is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Tensor] = {}
        for field in fields(value):
            found |= tensors_of(getattr(value, field.name), f"{prefix}{field.name}.")
        return found
    return {prefix[:-1]: value} if _is_tensor(value) else {}


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b
