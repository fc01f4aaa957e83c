"""A slice of the benchmark's misreadings, and its kept table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.witness_mutations import BEGIN, END, RESULTS, Mutation, mutations, run

ALL = mutations()


@pytest.mark.parametrize("mutation", ALL[::7], ids=lambda m: m.name)
def test_a_misreading_that_our_own_proof_certifies_is_found_out(mutation: Mutation) -> None:
    outcome = run(mutation)
    assert outcome.alone == "exact"
    assert outcome.caught


def test_the_kept_table_has_every_misreading_and_none_was_missed() -> None:
    rows = [line.split(" | ") for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert [(row[0].removeprefix("| "), row[1]) for row in rows] == [(m.family, m.what) for m in ALL]
    assert len(rows) >= 40
    assert all(row[2] == "exact" and "nothing" not in row[3] for row in rows)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split(BEGIN)[1].split(END)[0]
    assert f"| all | {len(rows)} | {len(rows)} | {len(rows)} |" in table
