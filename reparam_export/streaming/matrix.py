"""A base weight on disk as the matrix W (out, in) that a kind's ``low_rank`` multiplies, in float64, some rows at a time.

It knows ``@`` from either side, ``.T``, slices of its rows and its shape, and nothing else: whoever needs single entries gets a TypeError
and is folded as a whole layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from reparam_export.streaming.formats import Array, Format, wide

CHUNK = 1 << 17  # entries widened to float64 at a time: they stay in cache


class Mapped:
    """``values``: raw, as stored (rows, columns); ``transposed``: W is its transpose. ``passes``: how often it was read whole."""

    __array_ufunc__ = None  # numpy leaves ``array @ mapped`` to us

    def __init__(self, values: Array, of: Format, transposed: bool) -> None:
        self.values, self.of, self.transposed = values, of, transposed
        self.passes = 0

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def T(self) -> Mapped:  # noqa: N802
        return Mapped(self.values, self.of, not self.transposed)

    def __getitem__(self, rows: slice) -> Mapped:
        if not isinstance(rows, slice):
            raise TypeError("a weight on disk has no single entries")
        part = self.values[:, rows] if self.transposed else self.values[rows]
        return Mapped(part, self.of, self.transposed)

    def __matmul__(self, right: Array) -> Array:
        self.passes += 1
        return self._from_right(right) if self.transposed else self._from_left(right)

    def __rmatmul__(self, left: Array) -> Array:
        self.passes += 1
        return self.T._from_right_of(left)

    def _from_left(self, right: Array) -> Array:
        """values @ right, rows of values at a time."""
        out = np.empty((len(self.values), *right.shape[1:]))
        for start, block in self.blocks():
            out[start : start + len(block)] = block @ right
        return out

    def _from_right(self, right: Array) -> Array:
        """values.T @ right, summed over rows of values."""
        out = np.zeros((self.values.shape[1], *right.shape[1:]))
        for start, block in self.blocks():
            out += block.T @ right[start : start + len(block)]
        return out

    def _from_right_of(self, left: Array) -> Array:
        """left @ W, called on W.T: the same two ways with everything transposed."""
        flat = np.ascontiguousarray(left.reshape(-1, left.shape[-1]).T)
        made = self._from_right(flat) if self.transposed else self._from_left(flat)
        return cast(Array, made.T.reshape(*left.shape[:-1], -1))

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Stored rows in float64, a block at a time, with the number of the first."""
        step = max(1, CHUNK // max(1, self.values.shape[1]))
        for start in range(0, len(self.values), step):
            yield start, wide(self.values[start : start + step], self.of)

    def largest(self) -> float:
        """The size of the largest entry."""
        if not self.values.size:
            return 0.0
        if self.of.size == 2:
            top = max(
                int((block & 0x7FFF).max())
                for block in np.array_split(self.values, -(-self.values.size // CHUNK))
                if block.size
            )
            return float(wide(np.array([top], np.uint16), self.of)[0])
        return float(max(-self.values.min(), self.values.max()))

    def rows(self, which: Array) -> Array:
        """Some rows of W in float64."""
        return wide(self.values[:, which].T if self.transposed else self.values[which], self.of)


class Nothing:
    """A matrix of zeros that takes no memory: what a kind gives on it shows which tensors it makes, and what does not depend on W."""

    __array_ufunc__ = None

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    @property
    def T(self) -> Nothing:  # noqa: N802
        return Nothing((self.shape[1], self.shape[0]))

    def __getitem__(self, rows: slice) -> Nothing:
        return Nothing((len(range(*rows.indices(self.shape[0]))), self.shape[1]))

    def __matmul__(self, right: Any) -> Array:
        return np.zeros((self.shape[0], *right.shape[1:]))

    def __rmatmul__(self, left: Any) -> Array:
        return np.zeros((*left.shape[:-1], self.shape[1]))
