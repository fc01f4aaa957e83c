from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from folders import FUSED, WEIGHTS, artifact, audited, certificate, graph, layer, output, write
from junitparser import JUnitXml

from reparam_export.report import write_report
from reparam_export.report.evidence import visible
from reparam_export.report.markdown import code, prose
from reparam_export.report.numbers import number, percent, plural, quantity, signed, size


def cases(folder: Path) -> dict[str, Any]:
    suites = JUnitXml.fromfile(str(write_report(folder).junit))
    return {f"{suite.name}/{case.name}": case for suite in suites for case in suite}


def test_junit_has_a_case_for_every_part(tmp_path: Path) -> None:
    engine = audited(artifact(path="model.engine", target="trt", ran=False, outputs=()))
    found = cases(write(tmp_path, proof=certificate(), artifacts=[artifact(), engine]))
    assert sum(name.startswith("layers/") for name in found) == 24
    assert [name for name in found if not name.startswith("layers/")] == [
        "proof/verdict",
        "carried tensors/untouched tensors",
        "graph/graph of the base",
        "second witness/second witness",
        "outputs/fused: logits, batch 1",
        "outputs/fused: logits, batch 8",
        "outputs/onnx fp16: logits, batch 1",
        "artefacts/model.onnx (onnx, fp16)",
        "artefacts/model.engine (trt, fp16)",
    ]
    assert all(case.is_passed for case in found.values())
    assert "Audited only" in found["artefacts/model.engine (trt, fp16)"].system_out


def test_junit_failures_carry_the_numbers(tmp_path: Path) -> None:
    bad = layer("a\x1b<b>", verdict="wrong", max_error=2.1e-3, bound_ratio=412.0)
    proof = certificate(
        layers=(bad,), outputs=(output(error=1e-3, passed=False),), graph=graph(differences=("node 3", "node 4"))
    )
    found = cases(write(tmp_path, proof=proof))
    messages = {name: case.result[0].message for name, case in found.items() if not case.is_passed}
    assert messages == {
        "layers/a\\x1b<b>": "layer a\\x1b<b>, error 2.1e-3, 412 times its bound".removeprefix("layer "),
        "graph/graph of the base": "graph differs from the base in 2 places, 0 added nodes, 0 added bytes",
        "outputs/fused: logits, batch 1": (
            "output logits of fused at batch 1: error 1.0e-3, bound 1.6e-6, noise floor 4.2e-7"
        ),
    }
    assert "node 4" in found["graph/graph of the base"].result[0].text


def test_junit_is_not_green_without_a_proof(tmp_path: Path) -> None:
    suites = JUnitXml.fromfile(str(write_report(write(tmp_path)).junit))
    assert (suites.tests, suites.failures) == (1, 1)


def test_markdown_starts_with_the_verdict_and_folds_the_rest(tmp_path: Path) -> None:
    text = write_report(write(tmp_path, proof=certificate(), artifacts=[artifact()])).markdown.read_text("utf-8")
    assert text.startswith("### ✅ Proven: all 24 layers exact")
    assert text.count("<details>") == text.count("</details>") == 3
    assert "| `fused` | `logits` | 1 | 3.1e-7 | 4.2e-7 | 1.6e-6 | – | 100 % | passed |" in text
    assert "Run here against the reference" in text
    assert WEIGHTS in text
    assert "all 24 are in `report.html`" in text


def test_markdown_rows_keep_their_columns_whatever_the_names(tmp_path: Path) -> None:
    names = ("a|b", "`x`", "<script>", "@someone", "**bold**", "[l](x)", "a\nb", "", "#12")
    layers = tuple(layer(name, verdict="wrong") for name in names)
    text = write_report(write(tmp_path, proof=certificate(layers=layers))).markdown.read_text("utf-8")
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.endswith("| **wrong** |")]
    assert len(rows) == len(names)
    assert {row.count("|") for row in rows} == {9}


def test_markdown_of_a_failure_lists_what_failed(tmp_path: Path) -> None:
    layers = tuple(layer(f"blocks.{index}", verdict="wrong") for index in range(30))
    text = write_report(write(tmp_path, proof=certificate(layers=layers))).markdown.read_text("utf-8")
    assert text.startswith("### ❌ Failed: 30 of 30 layers wrong, first blocks.0")
    assert "- and 10 more" in text


@pytest.mark.parametrize("name", ["model.layers.0.self_attn", "runs/pets/hydra.pt"])
def test_plain_names_are_code_spans(name: str) -> None:
    assert code(name) == f"`{name}`"


def test_names_with_markup_become_references() -> None:
    assert code("a|`b`") == "<code>a&#124;&#96;b&#96;</code>"
    assert re.fullmatch(r"&#64;&#8203;you &#42;&lt;b&gt; https&#58;//x", prose("@you *<b> https://x"))


def test_what_prints_nothing_is_spelt_out() -> None:
    assert visible({"a\u202eb": ["\x00", "\ud800", "\ufffe", 1, None]}) == {
        "a\\u202eb": ["\\x00", "\\ud800", "\\ufffe", 1, None]
    }
    assert visible("blöcke.层") == "blöcke.层"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.14e-7, "3.1e-7"),
        (0.0, "0"),
        (0.5, "0.50"),
        (9.99, "10"),
        (12.4, "12"),
        (412.3, "412"),
        (412345.0, "4.1e5"),
        (-0.02, "-0.020"),
        (float("nan"), "NaN"),
        (float("-inf"), "-inf"),
        (None, "–"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_are_never_rounded_up_to_all() -> None:
    assert [percent(share) for share in (1.0, 0.999999, 0.48, float("nan"), None)] == [
        "100 %",
        "99.99 %",
        "48 %",
        "NaN",
        "–",
    ]


def test_sizes_step_by_a_thousand() -> None:
    assert [size(value) for value in (0, 999, 1_234_567, 999_999, -3072, None)] == [
        "0 B",
        "999 B",
        "1.2 MB",
        "1.0 MB",
        "-3.1 kB",
        "–",
    ]
    assert [quantity(17_563_830_000), quantity(0), plural(1, "node"), plural(0, "node")] == [
        "17.6 G",
        "0",
        "1 node",
        "0 nodes",
    ]
    assert [signed(text) for text in ("0", "0 B", "12", "-3.1 kB", "–")] == ["0", "0 B", "+12", "-3.1 kB", "–"]


def test_tensors_stored_in_fewer_bits_than_they_were_trained_in_are_named(tmp_path: Path) -> None:
    said = "aken whole, in fewer bits than trained"
    assert said not in write_report(write(tmp_path, proof=certificate())).markdown.read_text()
    report = write_report(write(tmp_path, fused={**FUSED, "narrowed": ["norm.scale"]}, proof=certificate()))
    assert f"T{said} | 1 |" in report.markdown.read_text()
    page = report.html.read_text()
    assert f"t{said}" in page
    assert "norm.scale" in page
