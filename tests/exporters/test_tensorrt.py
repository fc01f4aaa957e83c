from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_format
import pytest
import torch
from torch import nn

from reparam_export.errors import ExportError, MissingBackendError, UsageError
from reparam_export.exporters import _files, onnx, precision, tensorrt
from reparam_export.models import Input, Signature
from reparam_export.verification.engine import audit

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def built(vit_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("engine") / "model.engine"
    return path, tensorrt.write(vit_file, path, log=path.with_suffix(".log"), gpus=("sm89", "SM120"), batch=(1, 4, 16))


def stored(path: Path) -> dict[str, Any]:
    return {t.name: onnx_format.numpy_helper.to_array(t) for t in onnx_format.load(path).graph.initializer}


def test_an_engine_is_built_for_the_gpus_that_were_named(built: tuple[Path, dict[str, Any]]) -> None:
    path, details = built
    assert details["gpus"] == ["sm89", "SM120"]
    assert details["ahead_of_time"]
    assert details["builder"] == "tensorrt_rtx"
    assert details["profile"] == {"image": [[1, 3, 32, 32], [4, 3, 32, 32], [16, 3, 32, 32]]}
    assert details["size"] == path.stat().st_size > 400_000
    assert set(details["products"]) == {"float32"}
    assert json.loads(json.dumps(details)) == details
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".engine", ".log"]


def test_the_weights_stand_in_the_engine_and_a_stranger_does_not(
    built: tuple[Path, dict[str, Any]], vit: nn.Module
) -> None:
    weights = {name: t.numpy() for name, t in vit.state_dict().items()}
    stranger = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    found = audit(built[0], weights, {"adapter": stranger, "scale": np.ones(1, np.float32)})
    assert found.fused_tensors == len(weights)
    assert set(found.relaid) <= {"patch_embed.proj.weight"}
    assert "blocks.1.mlp.fc2.weight" in found.bitwise
    assert found.adapter_tensors_found == ()
    assert found.adapter_tensors_skipped == ("scale",)


@pytest.mark.parametrize(("kind", "name"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_lowered_graph_gives_a_lowered_engine(
    vit_file: Path, vit: nn.Module, tmp_path: Path, kind: Any, name: str
) -> None:
    low, path = tmp_path / "low.onnx", tmp_path / "model.engine"
    precision.lower(vit_file, low, kind)
    details = tensorrt.write(low, path, log=tmp_path / "log", gpus=("sm89",))
    assert details["products"][name] >= 12
    weights = {k: t.numpy() for k, t in vit.state_dict().items()}
    found = audit(path, weights, {}, dtypes=(name,), precisions=details["precisions"])
    assert found.precisions[name] > 50
    assert set(found.relaid) <= {"patch_embed.proj.weight"}


def test_fp16_that_is_not_in_the_graph_is_refused(vit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="float32"):
        tensorrt.write(vit_file, tmp_path / "model.engine", log=tmp_path / "log", gpus=("sm89",), precision="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(("gpu", "says"), [("sm42", "sm75, sm80"), ("sm90", "full 'tensorrt'")])
def test_unknown_gpus_are_usage_errors(vit_file: Path, tmp_path: Path, gpu: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tensorrt.write(vit_file, tmp_path / "model.engine", log=tmp_path / "log", gpus=("sm89", gpu))
    assert list(tmp_path.iterdir()) == []


def test_what_the_builder_refuses_is_said_in_its_own_words(vit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="sm75"):
        tensorrt.write(vit_file, tmp_path / "model.engine", log=tmp_path / "log", gpus=("sm75",))
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="cannot parse"):
        tensorrt.write(tmp_path / "bad.onnx", tmp_path / "model.engine", log=tmp_path / "log", gpus=("sm89",))
    assert not (tmp_path / "model.engine").exists()
    assert "ERROR" in (tmp_path / "log").read_text()


def test_other_dynamic_axes_need_their_sizes_and_external_weights_are_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32)).eval()
    tokens = Signature((Input("ids", ("batch", "sequence"), "int64", 50),), ("y",))
    source, path = tmp_path / "model.onnx", tmp_path / "model.engine"
    onnx.write(model, tokens, {"ids": torch.zeros(2, 4, dtype=torch.int64)}, source, external=1)
    with pytest.raises(UsageError, match="sequence"):
        tensorrt.write(source, path, log=tmp_path / "log", gpus=("sm89",))
    details = tensorrt.write(source, path, log=tmp_path / "log", gpus=("sm89",), axes={"sequence": (16, 128)})
    assert details["profile"]["ids"] == [[1, 1], [8, 16], [64, 128]]
    found = audit(path, {"1.weight": stored(source)["1.weight"]}, {})
    assert found.bitwise == ("1.weight",)


def test_a_full_disk_leaves_no_engine(vit_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.Path, "write_bytes", full)
    with pytest.raises(ExportError, match="No space left"):
        tensorrt.write(vit_file, tmp_path / "model.engine", log=tmp_path / "log", gpus=("sm89",))
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_no_builder_names_the_extra(vit_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingBackendError) as caught:
        tensorrt.write(vit_file, tmp_path / "model.engine", log=tmp_path / "log")
    assert caught.value.extra == "trt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_running_without_a_gpu_is_a_missing_backend(built: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(MissingBackendError), tensorrt.Runner(built[0]):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_engine_answers_like_the_onnx_file(vit_file: Path, tmp_path: Path, images: dict[str, Any]) -> None:
    path = tmp_path / "model.engine"
    tensorrt.write(
        vit_file, path, log=tmp_path / "log", gpus=(f"sm{''.join(map(str, torch.cuda.get_device_capability()))}",)
    )
    with tensorrt.Runner(path, builder="tensorrt_rtx") as engine, onnx.Runner(vit_file) as reference:
        np.testing.assert_allclose(engine.run(images)["logits"], reference.run(images)["logits"], atol=1e-4)
