"""The pipelines run from end to end; small here, at their full size in ``make demo``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import reparam_export as rx

PIPELINES = Path(__file__).parents[1] / "pipelines"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pipeline_{name}", PIPELINES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_ends_with_equal_answers_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = load("demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "BASE_EPOCHS", 1)
    monkeypatch.setattr(demo, "ADAPTER_EPOCHS", 1)
    monkeypatch.setattr(demo, "HELD_OUT", 96)
    images, labels = demo.digits()
    monkeypatch.setattr(demo, "digits", lambda: (images[:224], labels[:224]))
    monkeypatch.setattr(demo, "TO", ("--to", "onnx"))
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            demo.main()
    finally:
        torch.set_num_threads(threads)
    assert not ended.value.code
    assert "differ on 0 of 96" in capsys.readouterr().out
    assert (tmp_path / "demo" / "out" / "report.html").stat().st_size > 0
    assert rx.read(tmp_path / "demo" / "ckpt.pt").describe()["kinds"] == {"hydra": 8}


def test_the_demo_holds_samples_out_of_training() -> None:
    demo = load("demo")
    images, labels = demo.digits()
    again, _ = demo.digits()
    assert images.shape == (1797, 1, 32, 32)
    assert torch.equal(images, again)
    assert images.min() == -1
    assert images.max() == 1
    assert len(labels[: demo.HELD_OUT].unique()) == 10
