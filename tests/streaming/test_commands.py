"""The commands on a Hugging Face base: the plan, the ways into memory and out of it, and the report before a proof of the outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reparam_export.cli import _stages, cli
from reparam_export.errors import ExportError, FusionError, UsageError
from streaming.models import llama, lora


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return lora(tmp_path / "adapter", llama(tmp_path / "base", shards=2))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    done = run("fuse", adapter, "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "2 shards" in done.output
    assert "14 weights are folded" in done.output
    assert not (tmp_path / "out").exists()
    plan = json.loads(run("fuse", adapter, "-o", tmp_path / "out", "--dry-run", "--json").output)
    assert sum(plan["shards"].values()) == plan["bytes"]
    assert plan["touched"] == 14
    assert 0 < plan["memory"] < 600_000_000
    assert plan["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_convert_goes_on_from_what_was_streamed(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", adapter, "-o", out, "--to", "safetensors")
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} >= {"hf", "fused.json", "verification.json", "artifact.json", "report.html"}
    assert not (out / "fused.safetensors").exists()
    artifact = json.loads((out / "artifact.json").read_text())["artifacts"][0]
    assert artifact["path"] == "hf"
    assert artifact["ran"]
    written = {p.name: p.stat().st_mtime_ns for p in (out / "hf").iterdir()}
    assert run("export", out, "--to", "safetensors").exit_code == 0
    assert {p.name: p.stat().st_mtime_ns for p in (out / "hf").iterdir()} == written
    assert isinstance(run("fuse", adapter, "-o", out).exception, UsageError)
    assert run("fuse", adapter, "-o", out, "--resume").exit_code == 0


def test_the_report_says_that_the_weights_alone_are_proven(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("fuse", adapter, "-o", out).exit_code == 0
    done = run("report", out)
    assert done.exit_code == 1  # not proven as a whole
    assert "its weights alone are, since they were written: 14 of 14 layers exact" in done.output
    page = (out / "report.html").read_text()
    assert "Weights as they were written" in page
    assert "<svg" in page
    assert "14 exact, of 14" in (out / "report.md").read_text()


def test_what_cannot_be_streamed_is_folded_in_memory_and_says_why(adapter: Path, tmp_path: Path) -> None:
    base = f"hf:{tmp_path / 'base'}?rms_norm_eps=1e-3"
    done = run("fuse", adapter, "--base", base, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "folded in memory, not shard by shard: the base's config is changed" in done.output
    assert (tmp_path / "out" / "fused.safetensors").is_file()


def test_what_fits_nowhere_is_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stages, "available_memory", lambda: 100_000)
    base = f"hf:{tmp_path / 'base'}?rms_norm_eps=1e-3"
    done = run("fuse", adapter, "--base", base, "-o", tmp_path / "out")
    assert isinstance(done.exception, FusionError)
    assert "cannot be folded shard by shard (the base's config is changed" in str(done.exception)
    assert not (tmp_path / "out").exists()
    assert run("fuse", adapter, "-o", tmp_path / "out").exit_code == 0  # streaming needs no room for the model
    done = run("verify", tmp_path / "out")
    assert isinstance(done.exception, ExportError)
    assert "The weights are proven" in str(done.exception)


def test_an_unfinished_folder_is_ours_to_overwrite_or_to_resume(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam_export.streaming.staging import Staging

    def interrupted(self: Any, record: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "commit", interrupted)
        run("fuse", adapter, "-o", out)
    assert [p.name for p in out.iterdir()] == [".fuse"]
    assert isinstance(run("fuse", adapter, "-o", out).exception, UsageError)
    assert run("fuse", adapter, "-o", out, "--resume").exit_code == 0
    assert sorted(p.name for p in out.iterdir()) == ["fused.json", "hf"]
