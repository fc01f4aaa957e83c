"""A base weight on disk as the matrix W (out, in) that a kind's ``low_rank`` multiplies, in float64, some rows at a time.

It knows ``@`` from either side, ``.T``, slices of its rows and its shape, and nothing else: whoever needs single entries gets a TypeError
and is folded as a whole layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from reparam_export.streaming import kernel
from reparam_export.streaming.formats import BF16, Array, Format, largest, wide

TILE = 128, 1024  # rows and columns widened to float64 at a time: they stay in cache
CHUNK = 1 << 17  # entries searched at a time


@dataclass
class Watch:
    """Rows x (n, in) whose product x W^T is wanted too: it is made along with the first pass over W, and found again for the same x."""

    x: Array
    product: Array | None = None


class Mapped:
    """``values``: raw, as stored (rows, columns); ``transposed``: W is its transpose. ``passes``: how often it was read whole."""

    __array_ufunc__ = None  # numpy leaves ``array @ mapped`` to us

    def __init__(self, values: Array, of: Format, transposed: bool) -> None:
        self.values, self.of, self.transposed = values, of, transposed
        self.passes = 0
        self.watch: Watch | None = None
        self.of_watch = False  # is this the W^T that ``x @ W.T`` asks for?

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def T(self) -> Mapped:  # noqa: N802
        turned = Mapped(self.values, self.of, not self.transposed)
        turned.watch, turned.of_watch = self.watch, not self.of_watch
        return turned

    def __getitem__(self, rows: slice) -> Mapped:
        if not isinstance(rows, slice):
            raise TypeError("a weight on disk has no single entries")
        part = self.values[:, rows] if self.transposed else self.values[rows]
        return Mapped(part, self.of, self.transposed)

    def __matmul__(self, right: Array) -> Array:
        self.passes += 1
        made = self._product(right.reshape(len(right), -1), by_columns=self.transposed)
        return made.reshape(-1, *right.shape[1:])

    def __rmatmul__(self, left: Array) -> Array:
        if self.of_watch and self.watch is not None and left is self.watch.x and self.watch.product is not None:
            return self.watch.product
        self.passes += 1
        made = self._product(left.reshape(-1, left.shape[-1]).T, by_columns=not self.transposed)
        return cast(Array, made.T.reshape(*left.shape[:-1], -1))

    def _product(self, right: Array, *, by_columns: bool) -> Array:
        """values @ right, or values.T @ right when by columns; a tile of values at a time."""
        rows, columns = self.values.shape
        out = np.zeros((right.shape[1], columns) if by_columns else (rows, right.shape[1]))
        for down, across, tile in self.tiles():
            if by_columns:
                out[:, across] += right[down].T @ tile
            else:
                out[down] += tile @ right[across]
        return out.T if by_columns else out

    def tiles(self) -> Iterator[tuple[slice, slice, Array]]:
        """Stored values in float64, a tile at a time, which holds until the next, with its rows and columns."""
        rows, columns = self.values.shape
        watch = self.watch if self.watch is not None and self.watch.product is None else None
        inputs = self.transposed != self.of_watch  # rows of values are W's inputs
        seen = None if watch is None else np.zeros((len(watch.x), columns if inputs else rows))
        buffer = np.empty(TILE[0] * TILE[1])
        for row in range(0, rows, TILE[0]):
            for column in range(0, columns, TILE[1]):
                down, across = slice(row, min(row + TILE[0], rows)), slice(column, min(column + TILE[1], columns))
                values = self.values[down, across]
                tile = kernel.widen(values, buffer) if self.of is BF16 else wide(values, self.of)
                if watch is not None and seen is not None:
                    if inputs:
                        seen[:, across] += watch.x[:, down] @ tile
                    else:
                        seen[:, down] += watch.x[:, across] @ tile.T
                yield down, across, tile
        if watch is not None:
            watch.product = seen

    def largest(self) -> float:
        """The size of the largest entry."""
        if not self.values.size:
            return 0.0
        blocks = np.array_split(self.values, -(-self.values.size // CHUNK))
        return float(np.max([largest(block, self.of) for block in blocks if block.size]))

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
