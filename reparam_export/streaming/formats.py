"""Storage formats in numpy: raw values to floats and back, without torch.

Values of 16 bits are handled as the ``uint16`` of their bits (numpy has no bfloat16). Widening is exact. Rounding is to nearest, ties to
even; float64 is never rounded by way of float32 (see ``reparam_export.rounding``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reparam_export.errors import FusionError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Format:
    """One float format. ``code``: its name in safetensors; ``digits``: of the significand; ``least``: exponent of the least normal."""

    code: str
    torch: str  # its name in torch
    short: str  # its name on the command line
    raw: type[np.generic]  # how its bits are held
    digits: int
    least: int

    @property
    def size(self) -> int:
        return int(np.dtype(self.raw).itemsize)


BF16 = Format("BF16", "bfloat16", "bf16", np.uint16, 8, -126)
F16 = Format("F16", "float16", "fp16", np.uint16, 11, -14)
F32 = Format("F32", "float32", "fp32", np.float32, 24, -126)
F64 = Format("F64", "float64", "fp64", np.float64, 53, -1022)
FORMATS = {f.code: f for f in (BF16, F16, F32, F64)}
BY_SHORT = {f.short: f for f in (BF16, F16, F32)}  # narrowest first: the order in which --dtype auto tries them
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8} | {
    f.code: f.size for f in FORMATS.values()
}


def torch_name(code: str) -> str:
    """The dtype that safetensors calls this, as torch names it."""
    if code in FORMATS:
        return FORMATS[code].torch
    names = {"I": "int", "U": "uint", "F": "float"}
    return "bool" if code == "BOOL" else names[code[0]] + code[1:]


def widen(raw: Array, of: Format, out: Array) -> None:
    """Exact values of ``raw`` into ``out``, float32 (16-bit formats, F32) or float64 (any)."""
    if of is BF16 and out.dtype == np.float32:
        bits = out.view(np.uint32)
        np.copyto(bits, raw)
        np.left_shift(bits, 16, out=bits)
    elif of is BF16:
        np.copyto(out, (raw.astype(np.uint32) << 16).view(np.float32))
    else:
        np.copyto(out, raw.view(np.float16) if of is F16 else raw)


def wide(raw: Array, of: Format) -> Array:
    """Exact values of ``raw`` as a new float64 array."""
    out = np.empty(raw.shape, np.float64)
    widen(raw, of, out)
    return out


def largest(raw: Array, of: Format) -> float:
    """The size of the largest entry; not a number where one is none, infinite where one is."""
    if of.size == 2:  # without their signs the bits have the order of the sizes
        return float(wide(np.bitwise_and(raw, 0x7FFF).max(keepdims=True), of).max())
    return float(max(-raw.min(), raw.max()))


def rounded(value: Array, to: Format) -> Array:
    """float64 or float32 values in raw form, each the nearest of the format. Raises nothing: overflow is infinity."""
    if to is not BF16:
        with np.errstate(over="ignore"):
            narrow = value.astype({F16: np.float16, F32: np.float32, F64: np.float64}[to])
        return narrow.view(np.uint16) if to is F16 else narrow
    with np.errstate(over="ignore"):
        single = value.astype(np.float32)
    bits = single.view(np.uint32)
    if value.dtype == np.float64:
        with np.errstate(invalid="ignore"):
            gap = value - single
        odd = (gap != 0) & np.isfinite(gap) & (bits & 1 == 0)  # to odd, so that only the next rounding counts
        side = np.where(gap > 0, np.float32(np.inf), np.float32(-np.inf))
        bits = np.where(odd, np.nextafter(single, side), single).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    nan = np.isnan(single)
    return np.where(nan, (bits >> 16) | 0x40, nearest).astype(np.uint16)


def half_ulp(value: Array, of: Format) -> Array:
    """Half the spacing of the format at each float64 value: the most that rounding to nearest can move it."""
    _, exponent = np.frexp(value)
    half: Array = np.ldexp(1.0, np.maximum(exponent - 1, of.least) - of.digits)
    return half


def finite(raw: Array, of: Format) -> bool:
    """Has it no NaN and no infinity?"""
    if of is BF16 or of is F16:
        return not raw.size or int(np.max(raw & 0x7FFF)) < (0x7F80 if of is BF16 else 0x7C00)
    return bool(np.isfinite(raw).all())


def refuse_overflow(name: str, of: Format) -> FusionError:
    """The error for values that a format cannot hold."""
    return FusionError(
        f"{name}: not finite after rounding to {of.torch}; the values exceed the format. Choose a wider one with --dtype"
    )
