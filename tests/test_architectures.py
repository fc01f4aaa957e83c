"""A slice of the sweep over architectures: those that were broken once; and the table is that of the kept rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import architectures as sweep
from benchmarks.architectures_tiny import architectures

pytest.importorskip("peft")
pytest.importorskip("diffusers")
KNOWN = architectures()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformers/mixtral", "linear"),  # experts
        ("transformers/clip", "conv"),  # outputs of images x texts
        ("transformers/nemotron", "linear"),  # a norm on the meta device
        ("timm/test_convnext", "conv"),  # norms with channels first
        ("transformers/gemma2", "linear"),  # a noise floor that was a lucky draw
        ("diffusers/sana", "conv"),  # a division kept from 0/0 by 1e-15; a timestep's phases in the reference
        ("diffusers/cogvideox", "conv"),  # frames before channels
    ],
)
def test_architectures_that_were_broken_are_right(name: str, part: str) -> None:
    found = sweep.row(KNOWN[name], part)
    assert found is not None
    assert found["result"] == "right", found
    assert found["error"] <= sweep.ALLOWED < found["effect"]


def test_a_sweep_is_wide_enough() -> None:
    assert sum(name.startswith("transformers/") for name in KNOWN) >= 60
    assert sum(name.startswith("timm/") for name in KNOWN) >= 30
    assert sum(name.startswith("diffusers/") for name in KNOWN) >= 10


def test_the_table_is_made_from_the_kept_rows_and_none_is_wrong_or_a_crash() -> None:
    kept = json.loads(sweep.RESULTS.read_text(encoding="utf-8"))
    assert {row["result"] for row in kept.values() if row} <= {"right", "not reached", "refused", "peft refuses"}
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert readme.split(sweep.BEGIN)[1].split(sweep.END)[0] == f"\n{sweep.table(kept)}"
