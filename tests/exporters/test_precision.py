from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx as onnx_format
import pytest
import torch
from torch import nn

from reparam_export.errors import ExportError, UsageError
from reparam_export.exporters import onnx, precision
from reparam_export.models import Input, Signature

Precision = Literal["fp16", "bf16"]
KINDS: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
ROWS = Signature((Input("x", ("batch", 4, 8)),), ("y",))


def initializers(path: Path) -> dict[str, Any]:
    return {t.name: onnx_format.numpy_helper.to_array(t) for t in onnx_format.load(path).graph.initializer}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(self.one(x))
        return result


def exported(model: nn.Module, folder: Path) -> Path:
    onnx.write(model.eval(), ROWS, {"x": torch.zeros(2, 4, 8)}, folder / "full.onnx")
    return folder / "full.onnx"


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_each_weight_is_rounded_once_under_its_own_name(vit_file: Path, tmp_path: Path, kind: Precision) -> None:
    path = tmp_path / "low.onnx"
    kept = precision.lower(vit_file, path, kind)
    full, low = initializers(vit_file), initializers(path)
    assert set(low) == set(full)
    assert {name for name, array in low.items() if array.dtype == np.float32} >= {"blocks.0.norm1.weight", "norm.bias"}
    lowered = [name for name, array in low.items() if array.dtype == KINDS[kind]]
    assert {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "pos_embed", "head.weight"} <= set(lowered)
    for name in lowered:
        assert low[name].tobytes() == full[name].astype(KINDS[kind]).tobytes(), name
    assert sum(reason.startswith("Softmax") for _, reason in kept) == 2
    assert sum(reason.startswith("LayerNormalization") for _, reason in kept) == 5


def test_tiny_weights_round_to_nearest_even_and_not_away_from_zero(tmp_path: Path) -> None:
    model = Two()
    with torch.no_grad():
        model.one.weight.zero_()
        model.one.weight[0, :4] = torch.tensor([1e-9, 2.9e-8, 2.0**-25, 1.0 + 2.0**-11])
    precision.lower(exported(model, tmp_path), tmp_path / "low.onnx", "fp16")
    assert initializers(tmp_path / "low.onnx")["one.weight"].T[0, :4].tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(("kind", "unit"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_the_lowered_vit_runs_here_and_is_near(
    vit_file: Path, images: dict[str, Any], tmp_path: Path, kind: Precision, unit: float
) -> None:
    path = tmp_path / "low.onnx"
    precision.lower(vit_file, path, kind, samples=[images])
    with onnx.Runner(vit_file) as full, onnx.Runner(path) as low:
        exact, found = full.run(images)["logits"], low.run(images)["logits"]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 8 * unit * np.abs(exact).max()
    products, stored = precision.precisions(path), precision.weight_bytes(path)
    name = np.dtype(KINDS[kind]).name
    assert products[name] >= 12
    assert stored[name] > 3 * stored["float32"]
    assert precision.precisions(vit_file) == {"float32": sum(products.values())}


def test_the_emulation_rounds_after_every_operator(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, path = Two(), tmp_path / "low.onnx"
    precision.lower(exported(model, tmp_path), path, "bf16")
    x = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)

    def half(array: Any) -> Any:
        return array.astype(ml_dtypes.bfloat16).astype(np.float32)

    y = half(x)
    for layer in (model.one, model.two):
        y = half(half(y @ half(layer.weight.detach().numpy()).T) + half(layer.bias.detach().numpy()))
    with onnx.Runner(path) as runner:
        found = runner.run({"x": x})["y"]
    assert np.array_equal(found, half(found)), "the result is not rounded to bf16"
    assert (found == y).mean() > 0.95  # sums in another order may fall on the other side of a tie
    assert np.abs(found - y).max() <= 2.0**-7 * np.abs(y).max()


def test_a_weight_that_overflows_is_named_and_stays_fp32(tmp_path: Path) -> None:
    model = Two()
    with torch.no_grad():
        model.two.weight[1, 2] = 70000.0
    source, path = exported(model, tmp_path), tmp_path / "low.onnx"
    kept = dict(precision.lower(source, path, "fp16"))
    assert "70000" in kept["two.weight"]
    low = initializers(path)
    assert low["two.weight"].dtype == np.float32
    assert low["two.weight"].tobytes() == initializers(source)["two.weight"].tobytes()
    assert low["one.weight"].dtype == np.float16
    assert "two.weight" not in dict(precision.lower(source, path, "bf16"))


def test_a_measured_activation_that_overflows_keeps_its_node_fp32(tmp_path: Path) -> None:
    model = Two()
    with torch.no_grad():
        model.one.weight.fill_(200.0)
        model.two.weight.fill_(1e-4)
    source, path, sample = exported(model, tmp_path), tmp_path / "low.onnx", {"x": np.full((1, 4, 8), 100, np.float32)}
    assert not precision.lower(source, path, "fp16")
    with onnx.Runner(path) as runner:
        assert not np.isfinite(runner.run(sample)["y"]).all()
    kept = precision.lower(source, path, "fp16", samples=[sample])
    assert any("out of range" in reason for _, reason in kept)
    with onnx.Runner(path) as low, onnx.Runner(source) as full:
        np.testing.assert_allclose(low.run(sample)["y"], full.run(sample)["y"], rtol=2e-3)


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, tie_word_embeddings=False, **shape)).eval()
    tokens = Signature((Input("ids", ("batch", "sequence"), "int64", 50),), ("logits",), {"use_cache": False})
    path = tmp_path_factory.mktemp("llama") / "full.onnx"
    onnx.write(model, tokens, {"ids": torch.zeros(1, 4, dtype=torch.int64)}, path)
    return path


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_language_model_keeps_norms_positions_and_the_mask(llama_file: Path, tmp_path: Path, kind: Precision) -> None:
    path = tmp_path / "low.onnx"
    kept = precision.lower(llama_file, path, kind)
    reasons = [reason for _, reason in kept]
    assert reasons.count("part of a norm") >= 3 * 3
    assert any(reason == "position arithmetic" for reason in reasons)
    low = initializers(path)
    assert low["model.norm.weight"].dtype == np.float32
    assert low["model.layers.0.mlp.up_proj.weight"].dtype == KINDS[kind]
    ids = {"ids": np.arange(600).reshape(2, 300) % 50}  # positions above 256, where bf16 stops counting
    with onnx.Runner(llama_file) as full, onnx.Runner(path) as runner:
        exact, found = full.run(ids)["logits"], runner.run(ids)["logits"]
    assert np.abs(found - exact).max() < (0.005 if kind == "fp16" else 0.03) * np.abs(exact).max()


def test_external_data_is_lowered_into_external_data(tmp_path: Path) -> None:
    model = Two().eval()
    onnx.write(model, ROWS, {"x": torch.zeros(2, 4, 8)}, tmp_path / "full.onnx", external=1)
    path = tmp_path / "low" / "model.onnx"
    precision.lower(tmp_path / "full.onnx", path, "bf16", external=1)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (path.parent / "model.onnx.data").stat().st_size == 2 * 8 * 24 * 2
    with onnx.Runner(path) as runner:
        assert runner.run({"x": np.ones((2, 4, 8), np.float32)})["y"].shape == (2, 4, 8)
    assert "one.weight" in json.loads({p.key: p.value for p in onnx_format.load(path).metadata_props}["transposed"])


def test_what_is_not_fp32_and_unknown_precisions_are_refused(tmp_path: Path) -> None:
    source, path = exported(Two(), tmp_path), tmp_path / "low.onnx"
    with pytest.raises(UsageError, match="fp16, bf16"):
        precision.lower(source, path, "int8")  # type: ignore[arg-type]
    precision.lower(source, path, "fp16")
    with pytest.raises(ExportError, match="not fp32"):
        precision.lower(path, tmp_path / "again.onnx", "fp16")
