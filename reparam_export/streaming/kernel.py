"""The inner loops of folding bfloat16 (``kernel.ll``), compiled by LLVM for the processor at hand at the first call.

The arithmetic is that of ``rows.py``, operation by operation.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from reparam_export.streaming.formats import Array


@dataclass(frozen=True)
class Seen:
    """What a check found, d = exact - stored: ``unsure`` entries that are not decided, sum of y y, sum of y d, the largest |d|."""

    unsure: int
    change: float
    lost: float
    error: float


def widen(raw: Array) -> Array:
    """bfloat16 (uint16, any shape) as a new float64 array, exactly."""
    out = np.empty(raw.shape, np.float64)
    raw = np.require(raw, requirements=["C", "A"])
    if raw.size:
        _compiled().widen(raw.ctypes.data, out.ctypes.data, raw.size)
    return out


def gated(raw: Array, y: Array, gate: Array) -> None:
    """y += gate * b. Here and below raw, out are uint16, y, gate float32; all arrays flat, contiguous and of one length."""
    _check(raw, y, gate)
    _compiled().gated(raw.ctypes.data, y.ctypes.data, gate.ctypes.data, len(raw))


def narrow(raw: Array, y: Array, out: Array) -> None:
    """b + y rounded to bfloat16 into ``out``."""
    _check(raw, y, out)
    _compiled().narrow(raw.ctypes.data, y.ctypes.data, out.ctypes.data, len(raw))


def check(raw: Array, y: Array, e: float, out: Array, which: Array) -> Seen:
    """Is what stands in ``out`` the rounding of the exact value, whose y is at most e off?

    which: int64, one longer; its first entries are set to the indices of what that does not decide.
    """
    _check(raw, y, out)
    if len(which) <= len(raw):
        raise ValueError("which is too short")
    sums, top = np.zeros(2), np.zeros(1, np.float32)
    places = (array.ctypes.data for array in (out, which, sums, top))
    unsure = _compiled().check(raw.ctypes.data, y.ctypes.data, e, *places, len(raw))
    return Seen(unsure, float(sums[0]), float(sums[1]), float(top[0]))


def _check(raw: Array, *others: Array) -> None:
    for array in (raw, *others):
        flags = array.flags
        if array.shape != (len(raw),) or not len(raw) or not (flags.c_contiguous and flags.aligned):
            raise ValueError(f"an array of {array.shape}, contiguous: {flags.c_contiguous}, aligned: {flags.aligned}")


class _Library:
    """The compiled functions; called without the interpreter's lock. ``engine`` owns their code."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        place, size = ctypes.c_void_p, ctypes.c_int64
        self.widen = ctypes.CFUNCTYPE(None, place, place, size)(engine.get_function_address("widen"))
        self.narrow = ctypes.CFUNCTYPE(None, place, place, place, size)(engine.get_function_address("narrow"))
        self.gated = ctypes.CFUNCTYPE(None, place, place, place, size)(engine.get_function_address("gated"))
        self.check = ctypes.CFUNCTYPE(size, place, place, ctypes.c_float, place, place, place, place, size)(
            engine.get_function_address("check")
        )


@cache
def _compiled() -> _Library:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(Path(__file__).with_suffix(".ll").read_text(encoding="utf-8"))
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
