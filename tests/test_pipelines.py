"""Every pipeline runs from end to end on its real data; small here, at full size by ``make demo`` and ``make pipelines``."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reparam_export as rx
from reparam_export.training import Search

PIPELINES = Path(__file__).parents[1] / "pipelines"
SMALL: dict[str, dict[str, Any]] = {
    "demo": {"BASE_EPOCHS": 1, "EPOCHS": 1, "HELD_OUT": 96, "ALL": 224, "TO": ("--to", "onnx")},
    "hydra_vit": {"EPOCHS": 1, "HELD_OUT": 96, "TO": ("--to", "onnx")},
    "glora_vit": {
        "EPOCHS": 1,
        "HELD_OUT": 64,
        "CHOSEN_ON": 64,
        "CANDIDATES": 2,
        "SEARCH": Search(population=3, select=2, mutations=1, crossovers=1, epochs=2),
    },
    "hydra_bert": {"EACH": 20, "LENGTH": 16, "HELD_OUT": 12, "EPOCHS": 1},
    "glora_llama": {"LAYERS": 1, "LENGTH": 8, "HELD_OUT": 2, "STEPS": 2},
}
ADAPTED = {"demo": 8, "hydra_vit": 8, "glora_vit": 16, "hydra_bert": 6, "glora_llama": 7}
FOLDERS = {"demo": "demo/out", "glora_vit": "pipelines-out/glora_vit-1"}


@pytest.fixture(autouse=True)
def pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PIPELINES)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("flow", "real_data", "fashion_base", *SMALL):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SMALL)
def test_a_pipeline_ends_with_equal_answers_a_proof_and_a_report(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "vit" in name:
        base = importlib.import_module("fashion_base")
        monkeypatch.setattr(base, "EPOCHS", 1)
        monkeypatch.setattr(base, "IMAGES", 128)
    pipeline = importlib.import_module(name)
    for constant, value in SMALL[name].items():
        monkeypatch.setattr(pipeline, constant, value)
    assert pipeline.main() == 0
    printed = capsys.readouterr().out
    assert "adapted, fused and ONNX differ on 0 of" in printed
    out = tmp_path / FOLDERS.get(name, f"pipelines-out/{name}")
    assert (out / "report.html").stat().st_size > 0
    proof = json.loads((out / "verification.json").read_text())
    assert proof["verdict"] == "exact"
    assert len(proof["layers"]) == ADAPTED[name]
    assert all(output["differing"] == 0 for output in proof["outputs"])
    if name != "glora_vit":  # a supernet needs its candidate
        checkpoint = tmp_path / {"demo": "demo/ckpt.pt"}.get(name, f"pipelines-out/{name}.pt")
        assert sum(rx.read(checkpoint).describe()["kinds"].values()) == ADAPTED[name]  # no option


def test_a_changed_answer_is_counted_with_its_margin(capsys: pytest.CaptureFixture[str]) -> None:
    flow: Any = importlib.import_module("flow")
    adapted = torch.tensor([[0.50, 0.45, 0.0], [0.0, 1.0, 0.0]])
    near = torch.tensor([[0.47, 0.48, 0.0], [0.0, 1.0, 0.0]])  # off by 0.03, and the classes were 0.05 apart
    truth = torch.tensor([0, 1])
    models = {"base": 0 * adapted, "adapted": adapted, "fused": adapted}
    assert flow.compare({**models, "onnx": adapted}, truth, Path("out")) == 0
    assert flow.compare({**models, "onnx": near}, truth, Path("out")) == 1
    printed = capsys.readouterr().out
    assert "differ on 1 of 2" in printed
    assert "5.0e-02 apart" in printed


def test_real_data_is_the_same_each_time_and_has_every_class() -> None:
    data: Any = importlib.import_module("real_data")
    images, classes = data.digits(32)
    assert torch.equal(images, data.digits(32)[0])
    assert images.shape == (1797, 1, 32, 32)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert len(classes[:497].unique()) == 10
    clothes, kinds = data.fashion(train=False)
    assert clothes.shape == (10000, 1, 28, 28)
    assert (float(clothes.min()), float(clothes.max())) == (-1, 1)
    assert kinds.bincount().tolist() == [1000] * 10
    texts, packages = data.docstrings(("numpy", "timm"), 30)
    assert packages.bincount().tolist() == [30, 30]
    assert len(set(texts)) == 60
    assert len(data.manual()) > 300_000


@pytest.mark.parametrize("file", sorted(PIPELINES.glob("*.py")), ids=lambda file: str(file.name))
def test_a_pipeline_is_short_and_its_constants_are_on_top(file: Path) -> None:
    tree = ast.parse(file.read_text())
    first = next(n for n, node in enumerate(tree.body) if isinstance(node, ast.FunctionDef))
    assert not any(isinstance(node, ast.Assign | ast.AnnAssign) for node in tree.body[first:])
    if file.stem in SMALL:
        assert len(file.read_text().splitlines()) <= 70
