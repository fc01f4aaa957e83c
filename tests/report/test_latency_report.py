"""What the report says of a measurement: in the page, in the pull request and for a CI server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import WEIGHTS, artifact, audited, certificate, layer, measurement, output, write
from junitparser import JUnitXml

from reparam_export.errors import CheckpointError
from reparam_export.exporters.artifact import failed
from reparam_export.files import exported_sha256
from reparam_export.latency.measurement import Measurement
from reparam_export.report import write_report
from reparam_export.report.evidence import read_evidence
from reparam_export.report.latency import sentence, structure_rows, telling, throughputs
from reparam_export.report.latency_plots import ratios_plot, times_plot
from reparam_export.report.statement import failures


@pytest.fixture(scope="module")
def equal() -> Measurement:
    return measurement()


@pytest.fixture(scope="module")
def slower() -> Measurement:
    return measurement(fused=1.05)


def folder(place: Path, latency: Measurement | None) -> Path:
    return write(place, proof=certificate(), artifacts=[artifact()], latency=latency)


def junit(place: Path) -> dict[str, Any]:
    return {
        c.name: c
        for suite in JUnitXml.fromfile(str(write_report(place).junit))
        if suite.name == "latency"
        for c in suite
    }


def test_the_verdict_stands_on_top_with_the_interval_that_carries_it(tmp_path: Path, equal: Measurement) -> None:
    report = write_report(folder(tmp_path, equal))
    assert report.latency == "no added cost"
    case = telling(equal)
    said = sentence(read_evidence(tmp_path).latency)  # type: ignore[arg-type]
    assert said.startswith("Latency proven: no added cost; in the worst case, ")
    ratio = case.ratio("fused")
    assert f"({100 * (ratio.low - 1):+.2f} % to {100 * (ratio.high - 1):+.2f} %), margin 1 %" in said
    assert all(
        max(c.ratio("fused").high, 1 / c.ratio("fused").low) <= max(ratio.high, 1 / ratio.low) for c in equal.cases
    )
    for text in (report.html.read_text(), report.markdown.read_text()):
        assert "Latency proven: no added cost" in text


def test_without_a_measurement_the_page_says_how_to_make_one(tmp_path: Path) -> None:
    report = write_report(folder(tmp_path, None))
    assert report.latency == "not measured"
    assert f"reparam-export bench {tmp_path.name}" in report.html.read_text()
    assert "Latency" not in report.markdown.read_text()


def test_added_cost_fails_everywhere_but_not_the_proof(tmp_path: Path, slower: Measurement) -> None:
    report = write_report(folder(tmp_path, slower))
    assert (report.verdict, report.latency) == ("exact", "added cost")
    assert "adds +5." in report.html.read_text()
    assert len(list(failures(read_evidence(tmp_path)))) == 6
    assert all(not case.is_passed for case in junit(tmp_path).values())


def test_junit_has_a_case_for_every_runner_and_batch_size(tmp_path: Path, equal: Measurement) -> None:
    found = junit(folder(tmp_path, equal))
    assert list(found) == [f"{r}, batch {b}" for r in ("onnxruntime, CPU", "torch, eager") for b in (1, 4, 16)]
    assert all(case.is_passed for case in found.values())
    assert "adapted / base 1.1" in found["onnxruntime, CPU, batch 1"].system_out


@pytest.mark.parametrize(("options", "word"), [({"again": 1.04}, "withheld"), ({"rounds": 9}, "undecided")])
def test_no_verdict_is_no_success(tmp_path: Path, options: dict[str, float], word: str) -> None:
    report = write_report(folder(tmp_path, measurement(**options)))
    assert report.latency == word
    assert "Latency not decided" in report.html.read_text()
    assert not all(case.is_passed for case in junit(tmp_path).values())


def test_the_table_of_the_papers_compares_neighbours_in_time(equal: Measurement) -> None:
    models, rows = throughputs(equal)
    assert models == ("base", "adapted", "fused")
    assert [row.name for row in rows][:3] == [f"onnxruntime, CPU, batch {b}" for b in (1, 4, 16)]
    base, adapted, fused = rows[0].cells
    assert float(base) == pytest.approx(1000 / 28, rel=0.02)
    assert float(adapted.split("(")[1].split("%")[0]) == pytest.approx(100 * (1 / 1.12 - 1), abs=0.3)
    assert abs(float(fused.split("(")[1].split("%")[0])) <= 0.3


def test_the_structure_has_a_column_for_every_model(equal: Measurement) -> None:
    models, rows, operators = structure_rows(equal)
    assert models == ("base", "adapted", "fused")
    table = {row.name: row.cells for row in rows}
    assert table["Nodes in the ONNX file"] == ("455", "743", "455")
    assert table["Multiply-adds, batch 1"] == ("1,074,851,328",) * 3
    assert {row.name: row.cells for row in operators}["Mul"] == ("0", "48", "0")


def test_what_engines_consist_of_is_shown_with_its_source(tmp_path: Path, equal: Measurement) -> None:
    engines = tuple(
        {"model": m, "layers": {"MATRIX_MULTIPLY": n}, "plan_bytes": 9, "source": "network as parsed"}
        for m, n in (("base", 73), ("adapted", 169), ("fused", 73))
    )
    assert equal.structure is not None
    found = replace(equal, structure=replace(equal.structure, engines=engines), engine_sha256="e9" * 32)
    plan = audited(artifact(path="model.engine", target="trt", sha256="e9" * 32))
    place = write(tmp_path, proof=certificate(), artifacts=[artifact(), plan], latency=found)
    assert write_report(place).latency == "no added cost"
    text = write_report(place).html.read_text()
    assert "TensorRT layers" in text
    assert (
        '<th scope="row">MATRIX_MULTIPLY</th><td class="n">73</td><td class="n">169</td><td class="n">73</td>' in text
    )
    assert "network as parsed" in text


@pytest.mark.parametrize(
    ("change", "why"),
    [({"weights_sha256": "0" * 64}, "with other weights"), ({"artifact_sha256": "0" * 64}, "with another export")],
)
def test_a_measurement_of_other_files_is_no_verdict(
    tmp_path: Path, equal: Measurement, change: dict[str, str], why: str
) -> None:
    report = write_report(folder(tmp_path, replace(equal, **change)))  # type: ignore[arg-type]
    assert report.latency == "not known"
    assert why in report.html.read_text()
    assert why in report.markdown.read_text()
    assert [case.is_passed for case in junit(tmp_path).values()] == [False]


def assert_not_known(place: Path, why: str) -> None:
    """No view has a verdict on the latency; all of them say why."""
    report = write_report(place)
    assert report.latency == "not known"
    for text in (report.html.read_text(), report.markdown.read_text()):
        assert "Latency proven" not in text
        assert "Latency not known" in text
        assert why in text
        assert ">no added cost<" not in text
        assert "| no added cost |" not in text
    (case,) = junit(place).values()
    assert not case.is_passed
    assert why in case.system_out


@pytest.mark.parametrize(
    ("target", "path", "precision"),
    [("onnx", "model.onnx", "fp16"), ("onnx", "model.onnx", "fp32"), ("genai", "genai", "fp32")],
)
def test_a_file_written_for_the_measurement_vouches_for_no_exported_one(
    tmp_path: Path, equal: Measurement, target: str, path: str, precision: str
) -> None:
    place = folder(tmp_path, replace(equal, artifact_sha256=""))
    exported = artifact(target=target, path=path, precision=precision)
    write(place, proof=certificate(), artifacts=[exported])
    assert_not_known(
        place, f"the exported {path} ({precision}) was not timed, but a file that was written for the measurement"
    )


@pytest.mark.parametrize("exported", [None, "safetensors", "failed"])
def test_without_an_exported_program_the_reader_is_told_that_none_was_timed(
    tmp_path: Path, equal: Measurement, exported: str | None
) -> None:
    files = {"safetensors": artifact(target="safetensors", path="hf"), "failed": failed("onnx", WEIGHTS, "no opset")}
    proof, artifacts = certificate(), [files[exported]] if exported else None
    report = write_report(write(tmp_path, proof=proof, artifacts=artifacts, latency=replace(equal, artifact_sha256="")))  # type: ignore[arg-type]
    assert report.latency == "no added cost"
    for text in (report.html.read_text(), report.markdown.read_text(), report.junit.read_text()):
        assert "a file that was written for the measurement, not an exported one" in text


def test_the_file_that_was_timed_is_named_with_its_precision_and_digest(tmp_path: Path, equal: Measurement) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    digest = exported_sha256(tmp_path / "model.onnx")
    found = replace(equal, artifact_sha256=digest)
    report = write_report(write(tmp_path, proof=certificate(), artifacts=[artifact(sha256=digest)], latency=found))
    for text in (report.html.read_text(), report.markdown.read_text(), report.junit.read_text()):
        assert f"model.onnx (fp16, sha256 {digest[:12]})" in text
        assert "not in this folder any more" not in text


def test_a_timed_file_that_was_taken_away_is_still_named_by_its_digest(tmp_path: Path, equal: Measurement) -> None:
    report = write_report(folder(tmp_path, equal))
    assert (report.verdict, report.latency) == ("exact", "no added cost")
    for text in (report.html.read_text(), report.markdown.read_text(), report.junit.read_text()):
        assert "model.onnx (fp16, sha256 c0dec0dec0de), which is not in this folder any more" in text


def test_times_of_a_file_that_was_changed_are_of_nothing_that_is_proven(tmp_path: Path, equal: Measurement) -> None:
    (folder(tmp_path, equal) / "model.onnx").write_bytes(b"another graph")
    assert write_report(tmp_path).verdict == "unproven"
    assert_not_known(tmp_path, "model.onnx is not the file that was exported and compared")


def test_times_of_a_file_that_is_wrong_are_of_nothing_that_is_proven(tmp_path: Path, equal: Measurement) -> None:
    wrong = artifact(outputs=(output(error=1.0, passed=False),))
    assert write_report(write(tmp_path, proof=certificate(), artifacts=[wrong], latency=equal)).verdict == "wrong"
    assert_not_known(tmp_path, "model.onnx did not pass its own proof")


def test_times_beside_an_engine_that_was_changed_are_of_nothing_that_is_proven(
    tmp_path: Path, equal: Measurement
) -> None:
    row = {"model": "fused", "layers": {"MATRIX_MULTIPLY": 73}, "plan_bytes": 9, "source": "network as parsed"}
    assert equal.structure is not None
    found = replace(equal, structure=replace(equal.structure, engines=(row,)), engine_sha256="e9" * 32)
    engine, again = (audited(artifact(path="model.engine", target="trt", sha256=s * 32)) for s in ("e9", "a9"))
    write(tmp_path, proof=certificate(), artifacts=[artifact(), again], latency=found)
    assert_not_known(tmp_path, "it was measured with another engine")
    write(tmp_path, proof=certificate(), artifacts=[artifact(), engine], latency=found)
    assert write_report(tmp_path).latency == "no added cost"
    (tmp_path / "model.engine").write_bytes(b"another plan")
    assert_not_known(tmp_path, "model.engine is not the file that was exported and compared")


def test_times_of_weights_that_are_not_proven_any_more_are_no_verdict(tmp_path: Path, equal: Measurement) -> None:
    (folder(tmp_path, equal) / "fused.safetensors").write_bytes(b"no weights")
    assert_not_known(tmp_path, "what was timed is not proven any more: ")
    (tmp_path / "fused.safetensors").unlink()
    (tmp_path / "verification.json").unlink()
    assert_not_known(tmp_path, "what was timed is not proven any more: verification.json is missing")


@pytest.mark.parametrize("proof", ["a layer", "the statement"])
def test_times_of_weights_that_are_wrong_are_no_verdict(tmp_path: Path, equal: Measurement, proof: str) -> None:
    wrong = certificate(layers=(layer(verdict="wrong"),)).to_json()
    given = wrong if proof == "a layer" else {**certificate().to_json(), "verdict": "wrong"}
    write(tmp_path, proof=given, artifacts=[artifact()], latency=equal)
    assert_not_known(tmp_path, "what was timed is not proven any more: verification.json says wrong")


def test_a_damaged_measurement_says_what_to_run(tmp_path: Path) -> None:
    (folder(tmp_path, None) / "latency.json").write_text('{"verdict": "no added cost"}')
    with pytest.raises(CheckpointError, match=r"latency\.json is damaged: .* is missing.*reparam-export bench"):
        write_report(tmp_path)


def test_plots_take_their_colours_from_the_page_and_name_what_they_show(
    equal: Measurement, slower: Measurement
) -> None:
    import re

    for found in (equal, slower):
        for draw in (times_plot, ratios_plot):
            for narrow in (False, True):
                text = draw(found, narrow=narrow)
                drawing = ElementTree.fromstring(text)
                assert drawing.get("aria-label")
                assert not re.search(r"#[0-9a-f]{6}", text)
    wide = ratios_plot(equal, narrow=False)
    assert wide.count("onnxruntime, CPU, batch") == 3
    assert wide.count(">base again<") == 6
    assert "var(--wrong)" not in wide
    assert "var(--wrong)" in ratios_plot(slower, narrow=False)


def test_one_round_can_be_drawn(tmp_path: Path) -> None:
    text = write_report(folder(tmp_path, measurement(rounds=1))).html.read_text()
    assert "undecided" in text
    assert "one round, no interval" in text
    assert "inf %" not in text
    assert "inf" in json.dumps(json.loads((tmp_path / "latency.json").read_text())["cases"][0]["ratios"][0]).lower()


def test_hostile_words_stay_text(tmp_path: Path, equal: Measurement) -> None:
    evil = "<script>alert(1)</script>|`@you\u202e"
    bad = replace(equal, skipped={evil: evil}, notes=(evil,), machine={evil: evil, "versions": {evil: evil}})
    report = write_report(folder(tmp_path, bad))
    assert "<script" not in report.html.read_text()
    assert "<script" not in report.markdown.read_text()
    assert "\u202e" not in report.html.read_text() + report.markdown.read_text()
