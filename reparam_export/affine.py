"""Affine maps ``y = W x + b`` and their algebra; the only thing an adapter kind has to know about a layer.

A layer's weight is handled as the matrix ``W`` of shape (out, in) that acts on the last axis of its input.
How a module stores that matrix, and what its input rows are, is its *layout*:

    linear       nn.Linear                weight (out, in)
    transposed   transformers' Conv1D     weight (in, out)
    embedding    nn.Embedding             weight (in, out); the input is one-hot
    conv         nn.Conv1d/2d/3d          weight (out, in/groups, *kernel); the input rows are patches
    norm         nn.LayerNorm and its kin weight (out,); y = w * x^ + b is out maps of one number each, so in is 1

Only operators and methods that ``torch`` and ``numpy`` share are used, so a checkpoint can be read without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, cast

T = TypeVar("T")
Tensor = Any  # torch.Tensor, or numpy.ndarray when only inspecting
CHUNK = 256  # unit vectors that are pushed through at a time


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

    @property
    def size(self) -> Affine:
        """The sizes of the terms that make it up: its absolute values."""
        return Affine(abs(self.weight), None if self.bias is None else abs(self.bias))


class Computed(Affine):
    """An affine map given by a function; its matrix is read out, by pushing unit vectors through, only when it is asked for.

    call: (..., in) -> (..., out) in the dtype of ``base``. base: a map of the same size, with a bias if this one must have one.
    magnitude: bounds the sum of the sizes of the terms of ``call``; the absolute values of the matrix when not given.
    """

    _call: Callable[[Tensor], Tensor]
    _base: Affine
    _matrix: Callable[[], Affine] | None
    _magnitude: Callable[[], Affine] | None

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        base: Affine,
        matrix: Callable[[], Affine] | None = None,
        magnitude: Callable[[], Affine] | None = None,
    ) -> None:
        self.__dict__ |= {"_call": call, "_base": base, "_matrix": matrix, "_magnitude": magnitude}

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)

    @cached_property
    def _read(self) -> Affine:
        if self._matrix is not None:
            return self._matrix()
        return read_out(self._call, self._base.in_features, self._base.weight.dtype)

    @cached_property
    def weight(self) -> Tensor:
        return self._read.weight

    @cached_property
    def bias(self) -> Tensor | None:
        bias: Any = self._read.bias
        return None if bias is None or (self._base.bias is None and not bool((bias != 0).any())) else bias

    @property
    def in_features(self) -> int:
        return self._base.in_features

    @property
    def out_features(self) -> int:
        return self._base.out_features

    @cached_property
    def size(self) -> Affine:
        return super().size if self._magnitude is None else self._magnitude()

    def linear(self) -> Affine:
        return Computed(
            lambda x: self(x) if self.bias is None else self(x) - self.bias,
            self._base.linear(),
            lambda: Affine(self.weight),
            lambda: Affine(self.size.weight),
        )

    def rows(self, start: int, stop: int) -> Affine:
        return Computed(
            lambda x: self(x)[..., start:stop],
            self._base.rows(start, stop),
            lambda: Affine(self.weight, self.bias).rows(start, stop),
            lambda: self.size.rows(start, stop),
        )


def read_out(call: Callable[[Tensor], Tensor], in_features: int, dtype: Any) -> Affine:
    """The matrix of an affine function (..., in) -> (..., out): b = f(0), column j = f(e_j) - b."""
    import torch

    bias = call(torch.zeros(1, in_features, dtype=dtype))[0]
    columns = []
    for start in range(0, in_features, CHUNK):
        stop = min(start + CHUNK, in_features)
        columns.append(call(units(start, stop, in_features, dtype)) - bias)
    return Affine(torch.cat(columns).T.contiguous(), bias)


def units(start: int, stop: int, size: int, dtype: Any) -> Tensor:
    """The unit vectors ``start:stop`` of that size, as rows."""
    import torch

    rows = torch.zeros(stop - start, size, dtype=dtype)
    rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
    return rows


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
    if isinstance(value, dict):
        return cast(T, {name: map_tensors(item, change, number) for name, item in value.items()})
    if _is_tensor(value):
        return cast(T, change(value))
    if number is not None and isinstance(value, float | int) and not isinstance(value, bool):
        return cast(T, number(value))
    return value


def to_dtype(value: T, dtype: Any) -> T:
    """The same with every floating point torch tensor in that dtype; indices stay integers."""
    return map_tensors(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


def tensors_of(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a (nested) frozen dataclass by its dotted field name."""
    if is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Tensor] = {}
        for field in fields(value):
            found |= tensors_of(getattr(value, field.name), f"{prefix}{field.name}.")
        return found
    if isinstance(value, dict):
        return {n: t for name, item in value.items() for n, t in tensors_of(item, f"{prefix}{name}.").items()}
    return {prefix[:-1]: value} if _is_tensor(value) else {}


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b
