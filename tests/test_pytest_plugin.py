"""The fixture ``assert_equivalent`` in somebody else's test run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CASES, Case

import reparam_export as rx
from reparam_export.errors import MissingSettingError


def test_a_checkpoint_that_folds_passes_and_its_exports_are_proven(
    assert_equivalent: Callable[..., Any], hydra: Case, tmp_path: Path
) -> None:
    path, given = hydra.arguments()
    model = assert_equivalent(path, inputs=hydra.inputs(), to=("onnx", "safetensors"), **given)
    assert isinstance(model, rx.VerifiedModel)
    assert model.certificate.verdict == "exact"
    assert (tmp_path / "reparam-export" / "model.onnx").is_file()
    assert assert_equivalent(hydra.read()).certificate.verdict == "exact"


def test_what_is_not_the_trained_model_fails_with_the_layer(
    assert_equivalent: Callable[..., Any], hydra: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rx.fuse

    def wrong(*given: Any) -> rx.FusedWeights:
        weights = real(*given)
        weights.tensors["blocks.1.mlp.fc2.weight"][0, 0] += 1
        return weights

    monkeypatch.setattr(rx, "fuse", wrong, raising=False)
    with pytest.raises(pytest.fail.Exception, match=r"blocks\.1\.mlp\.fc2.*rounding bound"):
        assert_equivalent(hydra.read())


def test_what_cannot_be_read_is_an_error_of_its_own(assert_equivalent: Callable[..., Any], hydra: Case) -> None:
    with pytest.raises(MissingSettingError):
        assert_equivalent(hydra.arguments()[0])


def test_pytest_finds_the_fixture_by_itself_and_starts_without_torch(tmp_path: Path) -> None:
    path, given = CASES["hydra_nlu"].arguments()
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n"
        "def test_it_is_light(request):\n"
        "    assert 'torch' not in sys.modules\n"
        "def test_the_adapter_folds(assert_equivalent):\n"
        f"    assert_equivalent({str(path)!r})\n"
        "def test_it_is_no_file(assert_equivalent):\n"
        "    assert_equivalent('nothing.pt')\n"
    )
    assert not given
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 2 passed" in done.stdout
    assert "CheckpointError: nothing.pt: no such file" in done.stdout
