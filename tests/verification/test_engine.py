"""Plans made of bytes: what is in them is known exactly. Real engines: tests/exporters/test_tensorrt.py."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from reparam_export.verification.engine import CHUNK, audit

RNG = np.random.default_rng(7)


def matrix(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def plan(folder: Path, *parts: np.ndarray | bytes) -> Path:
    path = folder / "model.engine"
    path.write_bytes(b"".join(p if isinstance(p, bytes) else p.tobytes() for p in parts))
    return path


@pytest.mark.parametrize("padding", [0, 1, 3, 4, 7, 13])
def test_weights_are_found_at_any_byte_as_stored_or_transposed(tmp_path: Path, padding: int) -> None:
    a, b, bias = matrix(16, 24), matrix(24, 16), matrix(16)
    path = plan(tmp_path, bytes(padding), a, b"middle", np.ascontiguousarray(b.T), bias)
    assert audit(path, {"a": a, "b": b, "bias": bias}, {}).bitwise == ("a", "b", "bias")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_are_found_in_the_precision_of_the_plan(tmp_path: Path, dtype: type) -> None:
    low, norm = matrix(16, 24), matrix(64)
    path = plan(tmp_path, low.astype(dtype), norm)
    found = audit(path, {"low": low, "norm": norm}, {}, dtypes=(np.dtype(dtype).name,))
    assert found.bitwise == ("low", "norm")
    assert audit(path, {"low": low, "norm": norm}, {}).relaid == ("low",)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    weight = matrix(32, 32)
    path = plan(tmp_path, bytes(100), weight, bytes(100))
    assert audit(path, {"weight": weight}, {}).bitwise == ("weight",)
    content = bytearray(path.read_bytes())
    content[100 + weight.nbytes // 2] ^= 1
    path.write_bytes(content)
    assert audit(path, {"weight": weight}, {}).relaid == ("weight",)


def test_matrices_put_side_by_side_are_merged_and_must_be_whole(tmp_path: Path) -> None:
    q, k, v = matrix(16, 32), matrix(16, 32), matrix(16, 32)
    together = np.concatenate([q.T, k.T, v.T], axis=1)
    found = audit(plan(tmp_path, bytes(5), together), {"q": q, "k": k, "v": v}, {})
    assert (found.merged, found.bitwise, found.relaid) == (("q", "k", "v"), (), ())
    together[20, 20] += 1
    found = audit(plan(tmp_path, bytes(5), together), {"q": q, "k": k, "v": v}, {})
    assert (found.merged, found.relaid) == (("q", "v"), ("k",))


def test_constant_weights_are_found_too(tmp_path: Path) -> None:
    zeros, ones = np.zeros(48, np.float32), np.ones(32, np.float32)
    path = plan(tmp_path, matrix(9), ones, matrix(9))
    found = audit(path, {"ones": ones, "zeros": zeros}, {})
    assert (found.bitwise, found.relaid) == (("ones",), ("zeros",))


def test_an_adapter_is_caught_whole_by_a_row_by_a_column_and_in_low_precision(tmp_path: Path) -> None:
    down, up, scale, low = matrix(8, 64), matrix(64, 8), matrix(64), matrix(8, 64)
    path = plan(
        tmp_path, matrix(3), down[5], b"x", np.ascontiguousarray(up[:, 2]), scale, low.astype(np.float16), bytes(64)
    )
    adapters = {"down": down, "up": up, "scale": scale, "low": low, "absent": matrix(8, 64)}
    found = audit(path, {}, adapters, dtypes=("float16",))
    assert found.adapter_tensors_found == ("down", "up", "scale", "low")


def test_adapter_tensors_that_prove_nothing_are_listed(tmp_path: Path) -> None:
    path = plan(tmp_path, np.ones(500, np.float32), bytes(500))
    adapters = {
        "zeros": np.zeros((8, 64), np.float32),
        "ones": np.ones(64, np.float32),
        "scalar": np.float32(0.3).reshape(()),
    }
    found = audit(path, {}, adapters)
    assert found.adapter_tensors_found == ()
    assert found.adapter_tensors_skipped == ("zeros", "ones", "scalar")


def test_a_weight_across_the_border_of_two_chunks_is_found(tmp_path: Path) -> None:
    weight = matrix(4)
    for shift in (-17, -9, -6, -1, 0, 1):
        path = plan(tmp_path, bytes(CHUNK + shift), weight, b"end")
        assert audit(path, {"weight": weight}, {}).bitwise == ("weight",), shift


def test_a_large_plan_takes_seconds(tmp_path: Path) -> None:
    weights = {f"w{number}": matrix(512, 1024) for number in range(8)}
    path = plan(tmp_path, *weights.values())
    adapters = {f"a{number}": matrix(8, 1024) for number in range(24)}
    started = time.perf_counter()
    found = audit(path, weights, adapters, dtypes=("float16",))
    assert len(found.bitwise) == 8
    assert time.perf_counter() - started < 20


def test_the_module_needs_no_tensorrt() -> None:
    code = "import sys, reparam_export.verification.engine; sys.exit(any('tensorrt' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
