"""What the README says of measurements is what the kept results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reparam_export as rx
from benchmarks import adapters, checkpoints, latency
from reparam_export.latency.measurement import from_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEPT = sorted(RESULTS.glob("latency-*.json"))


def test_the_latency_table_is_made_from_the_kept_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.split(latency.BEGIN)[1].split(latency.END)[0] == f"\n{latency.table()}"


def test_every_model_and_kind_was_measured() -> None:
    assert {path.stem for path in KEPT} == {f"latency-{m}-{k}" for m in checkpoints.MODELS for k in checkpoints.KINDS}


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_results_are_whole_and_their_verdicts_follow_from_their_raw_times(path: Path) -> None:
    from reparam_export.latency.measurement import ratios_of, verdict_of

    found = from_json(json.loads(path.read_text(encoding="utf-8")))
    assert {case.batch for case in found.cases} == {1, 4, 16}
    for case in found.cases:
        again = ratios_of(found.contest, case.raw, found.margin)
        assert verdict_of(again[0], again[-1]) == (case.verdict, case.said)
        assert [ratio.look for ratio in again] == [ratio.look for ratio in case.ratios]


def test_identical_models_were_never_called_different_and_more_work_always() -> None:
    kept = json.loads((RESULTS / "false_alarms.json").read_text(encoding="utf-8"))
    same, more = ([r for r in kept["runs"] if r["subject"] == subject] for subject in ("same", "more"))
    assert len(same) == len(more) == 50
    assert kept["multiply_adds"] < 1.0501
    assert {r["verdict"] for r in same} == {"no added cost"}
    assert {r["verdict"] for r in more} == {"added cost"}


@pytest.mark.parametrize(("kind", "adapters"), [("hydra", 24), ("glora", 48), ("lora", 24)])
def test_a_checkpoint_of_the_papers_sizes_is_read_back(kind: str, adapters: int, tmp_path: Path) -> None:
    assert checkpoints.checkpoint("vit_tiny", kind, tmp_path / "ckpt.pt") is None
    found = rx.read(tmp_path / "ckpt.pt").describe()
    assert found["kinds"] == {kind: adapters}
    assert found["rank"] == [{"hydra": 2, "glora": 4, "lora": 8}[kind]]


def test_the_table_of_adapters_is_made_from_the_kept_results() -> None:
    found = json.loads((RESULTS / "adapters.json").read_text(encoding="utf-8"))["tasks"]
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- adapters:")[1].split("<!-- /adapters -->")[0]
    for name, row in found.items():
        assert f"| {name} | {' | '.join(adapters.cell(runs) for runs in row.values())} |\n" in table
