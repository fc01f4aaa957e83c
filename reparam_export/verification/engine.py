"""What stands inside a TensorRT plan, found in its bytes: the fused weights do, the adapters do not.

A plan keeps most weights as they were given: contiguous, in the plan's precision, as stored or transposed. Every tensor
is reduced to an anchor, the 8 consecutive bytes of it that are most varied; one pass over the file, at every alignment,
finds all anchors at once; each hit is then compared whole. Nothing is executed and TensorRT is not needed.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CHUNK = 1 << 24  # bytes of the plan looked at in one go
MEANINGFUL = 32  # bytes; an adapter tensor below this, or with fewer than 4 different values, proves nothing
ROW = 256  # bytes; rows and columns of an adapter at least this long are looked for one by one,
ROWS = 64  # this many of them, evenly spread


@dataclass(frozen=True)
class EngineAudit:
    """What stands inside a TensorRT plan, found without running it."""

    fused_tensors: int  # tensors that folding changed
    bitwise: tuple[str, ...]  # found bit for bit, contiguous, in the plan (as stored or transposed)
    relaid: tuple[str, ...]  # not found as such: the builder re-laid them out
    adapter_tensors_found: tuple[str, ...]  # must be empty
    precisions: dict[str, int]  # dtype -> number of layer outputs in the network the builder took
    merged: tuple[
        str, ...
    ] = ()  # bit for bit too, but row by row: inside a matrix that the builder put together (q, k, v)
    adapter_tensors_skipped: tuple[str, ...] = ()  # too small or too uniform to prove anything


@dataclass(frozen=True)
class _Needle:
    """One way a tensor (or a row of it) may stand in the plan."""

    name: str
    data: Array  # uint8
    anchor: int  # where the 8 bytes stand in ``data``

    @property
    def word(self) -> int:
        return int.from_bytes(self.data[self.anchor : self.anchor + 8].tobytes(), "little")


def audit(
    plan: Path,
    fused: Mapping[str, Array],
    adapters: Mapping[str, Array],
    *,
    dtypes: Collection[str] = ("float32",),
    precisions: Mapping[str, int] | None = None,
) -> EngineAudit:
    """Look for every tensor of ``fused`` and ``adapters`` in the bytes of ``plan``.

    Arrays are in their stored dtype; each is looked for in that and in ``dtypes`` (the plan's: ``"float32"``,
    ``"float16"``, ``"bfloat16"``), as stored and transposed. A fused tensor counts when it is found whole; an adapter
    tensor is reported as soon as it, or one long row or column of it, is found. ``precisions`` is copied into the result.
    """
    skipped = tuple(name for name, array in adapters.items() if not any(_telling(row) for row in _rows(array, dtypes)))
    needles = [n for name, array in fused.items() for n in _whole(name, array, dtypes)]
    strays = [_needle(name, row) for name, array in adapters.items() for row in _rows(array, dtypes) if _telling(row)]
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        content = np.frombuffer(held, np.uint8)
        try:
            found = set(_search(content, [n for n in needles if _telling(n.data)]))
            found |= {
                n.name
                for n in needles
                if n.name not in found and not _telling(n.data) and held.find(n.data.tobytes()) >= 0
            }
            merged = _merged(content, {name: array for name, array in fused.items() if name not in found}, dtypes)
            intruders = set(_search(content, strays)) - _explained(needles, strays)
        finally:
            del content
    return EngineAudit(
        fused_tensors=len(fused),
        bitwise=tuple(name for name in fused if name in found),
        relaid=tuple(name for name in fused if name not in found and name not in merged),
        adapter_tensors_found=tuple(name for name in adapters if name in intruders),
        precisions=dict(precisions or {}),
        merged=tuple(name for name in fused if name in merged),
        adapter_tensors_skipped=skipped,
    )


def _explained(needles: Collection[_Needle], strays: list[_Needle]) -> set[str]:
    """Adapter tensors that are, by their formula, part of a fused one: GLoRA's E where the base has no bias, new tokens."""
    if not needles:
        return set()
    return set(_search(np.concatenate([needle.data for needle in needles]), strays))


def _layouts(array: Array, dtypes: Collection[str]) -> Iterator[Array]:
    """The array in every dtype asked for, as stored and (a matrix) transposed, contiguous."""
    import ml_dtypes

    half = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
    for dtype in dict.fromkeys((array.dtype, *(half.get(d) or np.dtype(d) for d in dtypes))):
        with np.errstate(
            over="ignore"
        ):  # a value out of range stays fp32 in the plan, so this layout is just not found
            cast = array.astype(dtype)
        yield np.ascontiguousarray(cast)
        if cast.ndim == 2 and 1 not in cast.shape:
            yield np.ascontiguousarray(cast.T)


def _whole(name: str, array: Array, dtypes: Collection[str]) -> Iterator[_Needle]:
    for layout in _layouts(array, dtypes):
        if layout.nbytes:
            yield _needle(name, layout.reshape(-1).view(np.uint8))


def _rows(array: Array, dtypes: Collection[str]) -> Iterator[Array]:
    """What an adapter tensor is looked for by, as bytes: the whole of each layout, and its long rows."""
    for layout in _layouts(array, dtypes):
        yield layout.reshape(-1).view(np.uint8)
        rows = layout.reshape(layout.shape[0], -1) if layout.ndim >= 2 else layout.reshape(1, -1)
        if len(rows) > 1 and rows[0].nbytes >= ROW:
            yield from rows.view(np.uint8)[:: -(-len(rows) // ROWS)]


def _telling(data: Array) -> bool:
    """Are these bytes so long and so varied that finding them is no accident?"""
    return (
        data.size >= MEANINGFUL and len({data[i : i + 2].tobytes() for i in range(0, min(data.size, 256) - 1, 2)}) >= 4
    )


def _needle(name: str, data: Array) -> _Needle:
    """Anchor at the most varied 8 bytes among 64 places, zeros counted as none."""
    places = np.unique(np.linspace(0, max(data.size - 8, 0), 64).astype(np.int64) // 4 * 4)
    best = max(places.tolist(), key=lambda at: len(set(data[at : at + 8].tolist()) - {0}))
    return _Needle(name, data, int(best))


def _merged(content: Array, tensors: Mapping[str, Array], dtypes: Collection[str]) -> set[str]:
    """Matrices whose rows (or columns) all stand in ``content``, one after the other at a constant distance."""
    layouts = {}
    for name, array in tensors.items():
        for number, layout in enumerate(_layouts(array, dtypes)):
            if layout.ndim == 2 and layout.shape[0] > 1:
                layouts[f"{number}:{name}"] = layout.view(np.uint8)
    starts = {k: v for k, v in layouts.items() if _telling(v[0]) and _telling(v[1])}
    found = _search(content, [_needle(f"{row}:{key}", v[row]) for key, v in starts.items() for row in (0, 1)])
    result = set()
    for key, rows in starts.items():
        for first in found.get(f"0:{key}", ()):
            for second in found.get(f"1:{key}", ()):
                step = second - first
                end = first + step * (len(rows) - 1) + rows.shape[1]
                if step < rows.shape[1] or end > content.size:
                    continue
                held = np.lib.stride_tricks.as_strided(content[first:], rows.shape, (step, 1), writeable=False)
                if np.array_equal(held, rows):
                    result.add(key.split(":", 1)[1])
    return result


def _search(content: Array, needles: Collection[_Needle]) -> dict[str, list[int]]:
    """Where the needles stand in ``content``, at any byte: name -> offsets (the first few)."""
    wanted: dict[int, list[_Needle]] = {}
    for needle in needles:
        if needle.data.size >= 8 and needle.data.size <= content.size:
            wanted.setdefault(needle.word, []).append(needle)
    if not wanted:
        return {}
    words = np.array(sorted(wanted), np.uint64)
    first = np.zeros(1 << 16, bool)
    first[(words & np.uint64(0xFFFF)).astype(np.int64)] = True
    found: dict[str, list[int]] = {}
    for at, word in _hits(content, words, first):
        for needle in wanted[word]:
            start = at - needle.anchor
            if start >= 0 and len(found.get(needle.name, ())) < 8 and _stands(content, start, needle.data):
                found.setdefault(needle.name, []).append(start)
    return found


def _hits(content: Array, words: Array, first: Array) -> Iterator[tuple[int, int]]:
    """Every (offset, word) where one of the sorted ``words`` stands; ``first`` tells by 16 bits which cannot."""
    for chunk in range(0, content.size, CHUNK):
        for shift in range(8):
            end = min(chunk + shift + CHUNK, content.size)
            count = (end - chunk - shift) // 8
            if count <= 0:
                continue
            view = content[chunk + shift : chunk + shift + 8 * count].view("<u8")
            near = np.flatnonzero(first[content[chunk + shift : chunk + shift + 8 * count].view("<u2")[::4]])
            place = np.searchsorted(words, view[near])
            place[place == words.size] = 0
            exact = words[place] == view[near]
            for at, which in zip(near[exact].tolist(), place[exact].tolist(), strict=True):
                yield chunk + shift + 8 * at, int(words[which])


def _stands(content: Array, start: int, data: Array) -> bool:
    part = content[start : start + data.size]
    return part.size == data.size and bool(np.array_equal(part[:64], data[:64])) and bool(np.array_equal(part, data))
