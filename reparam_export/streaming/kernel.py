"""The loops of folding bfloat16 (``kernel.ll``), compiled by LLVM for the processor at hand, at the first call or ``prepare``.

What is rounded where is as in ``rows.py``, but for the products, whose multiply-adds are rounded once, not twice.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np

from reparam_export.streaming.formats import Array

ROWS, COLUMNS = 16, 512  # of a tile: the change of its entries stays in cache
LANES = 32  # columns of the right factor that lie together
MORE = 3  # rows that the left factor has beyond its last: four are multiplied at a time
PROBES = 4


@dataclass(frozen=True)
class Pair:
    """left @ right in float32 as ``fold`` takes it: left (rows + MORE, k), right (columns / LANES, k, LANES), padded with zeros."""

    left: Array
    right: Array

    @classmethod
    def of(cls, left: Array, right: Array) -> Pair:
        """left: (rows, k); right: (k, columns)."""
        return cls(
            np.pad(left.astype(np.float32, order="C"), ((0, MORE), (0, 0))),
            _together(right.astype(np.float32), LANES),
        )

    def rows(self, start: int, stop: int) -> Array:
        """These rows of left, and MORE."""
        return self.left[start : stop + MORE]


def packed_probes(probes: Array) -> Array:
    """Probes (columns, PROBES) as ``fold`` takes them: float32 (columns / COLUMNS, PROBES, COLUMNS), padded with zeros."""
    return _together(probes.T.astype(np.float32), COLUMNS)


def _together(matrix: Array, lanes: int) -> Array:
    """(n, columns) as (columns / lanes, n, lanes): what is used together lies together."""
    n, columns = matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, -columns % lanes)))
    return np.ascontiguousarray(padded.reshape(n, -1, lanes).swapaxes(0, 1))


@dataclass(frozen=True)
class Seen:
    """What a fold found, d = exact - stored: the entries that are not decided, sum of y y, sum of y d, the largest |d|.

    found, gated: the products with the probes, (rows, PROBES) float64.
    """

    unsure: Array
    change: float
    lost: float
    error: float
    found: Array
    gated: Array


def fold(
    raw: Array, out: Array, start: int, added: Pair | None, gates: Pair | None, probes: Array, e: float, which: Array
) -> Seen:
    """out = b + y rounded to bfloat16, y = added + b * gates, and is each the rounding of the exact value, whose y is at most e off?

    raw, out: uint16 (rows, columns), contiguous; ``start``: which row of the factors is the first; probes: packed; which: int64, one
    longer than raw, where the indices of what is not decided are put.
    """
    rows, columns = raw.shape
    for array in (raw, out):
        if array.shape != (rows, columns) or not (array.flags.c_contiguous and array.flags.aligned) or not array.size:
            raise ValueError(f"{array.shape} of {array.dtype}: expected ({rows}, {columns}), contiguous and not empty")
    if which.size <= raw.size or probes.shape != (-(-columns // COLUMNS), PROBES, COLUMNS):
        raise ValueError(
            f"room for {which.size} indices, probes of {probes.shape}: {rows} x {columns} entries need more"
        )
    tiles = np.empty((2, ROWS, COLUMNS), np.float32)
    found, gated = np.zeros((2, rows, PROBES))
    sums, top = np.zeros(2), np.zeros(1, np.float32)
    unsure = _compiled().fold(
        raw.ctypes.data, out.ctypes.data, rows, columns, *_places(added, start, rows, columns), found.ctypes.data,
        *_places(gates, start, rows, columns), gated.ctypes.data, probes.ctypes.data, tiles[0].ctypes.data, tiles[1].ctypes.data, e,
        which.ctypes.data, sums.ctypes.data, top.ctypes.data,
    )  # fmt: skip
    return Seen(which[:unsure], float(sums[0]), float(sums[1]), float(top[0]), found, gated)


def multiplied(of: Pair, columns: int, row: int) -> Array:
    """One row of a product as ``fold`` has it, (columns,) float32."""
    places = _places(of, row, 1, columns)
    parts = []
    for column in range(0, columns, COLUMNS):
        tile = np.empty((ROWS, COLUMNS), np.float32)
        wide = min(COLUMNS, columns - column)
        _compiled().multiplied(*places, 0, 1, column, wide, tile.ctypes.data)
        parts.append(tile[0, :wide])
    return np.concatenate(parts)


def _places(of: Pair | None, start: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Addresses of left and right, and k; zeros for a product that is not there."""
    if of is None:
        return 0, 0, 0
    left, k = of.rows(start, start + rows), of.left.shape[1]
    if len(left) != rows + MORE or of.right.shape != (-(-columns // LANES), k, LANES) or not left.flags.c_contiguous:
        raise ValueError(
            f"factors of {of.left.shape} and {of.right.shape} for rows {start} to {start + rows} of {columns}"
        )
    return left.ctypes.data, of.right.ctypes.data, k


def widen(raw: Array, buffer: Array) -> Array:
    """bfloat16 (uint16, (rows, columns), rows contiguous) in float64, exactly: a view of the flat buffer."""
    rows, columns = raw.shape
    if raw.strides[1] != 2 or not raw.flags.aligned or buffer.size < raw.size:
        raise ValueError(f"strides {raw.strides} of {raw.shape}, aligned: {raw.flags.aligned}, into {buffer.size}")
    out = buffer[: raw.size].reshape(rows, columns)
    if raw.size:
        _compiled().widen(raw.ctypes.data, raw.strides[0] // 2, out.ctypes.data, rows, columns)
    return out


class _Library:
    """The compiled functions; called without the interpreter's lock. ``engine`` owns their code."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        at, n = ctypes.c_void_p, ctypes.c_int64
        product = (at, at, n)  # left, right, k

        def function(name: str, *types: Any) -> Any:
            return ctypes.CFUNCTYPE(*types)(engine.get_function_address(name))

        self.widen = function("widen", None, at, n, at, n, n)
        self.multiplied = function("multiplied", None, *product, n, n, n, n, at)
        self.fold = function(
            "fold", n, at, at, n, n, *product, at, *product, at, at, at, at, ctypes.c_float, at, at, at
        )


def source() -> str:
    """What is compiled."""
    return Path(__file__).with_suffix(".ll").read_text(encoding="utf-8")


def prepare() -> None:
    """Compile on another core meanwhile. Whatever fails will fail again, and be seen, at the first call."""

    def compiled() -> None:
        with suppress(Exception):
            _compiled()

    Thread(target=compiled, name="compile").start()


_LOCK = Lock()  # so that it is compiled once


def _compiled() -> _Library:
    with _LOCK:
        return _compile()


@cache
def _compile() -> _Library:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(source())
    module.verify()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return _Library(engine)
