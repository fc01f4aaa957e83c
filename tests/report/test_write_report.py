from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from folders import FUSED, OTHER, artifact, audited, certificate, dump, graph, layer, output, write

from reparam_export.errors import CheckpointError
from reparam_export.report import write_report
from reparam_export.verification.certificate import CarriedEvidence, Certificate


def test_writes_three_files_and_nothing_else(tmp_path: Path) -> None:
    report = write_report(write(tmp_path, proof=certificate(), artifacts=[artifact()]))
    assert {path.name for path in tmp_path.iterdir()} == {
        "fused.json",
        "verification.json",
        "artifact.json",
        "report.html",
        "report.md",
        "junit.xml",
    }
    assert report.folder == tmp_path
    assert all(path.read_text(encoding="utf-8") for path in (report.html, report.markdown, report.junit))
    with pytest.raises(FrozenInstanceError):
        report.verdict = "wrong"  # type: ignore[misc]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, proof=certificate(), artifacts=[artifact()])
    first = write_report(tmp_path).html.read_bytes()
    assert write_report(tmp_path).html.read_bytes() == first


def test_exact_proof_says_its_numbers_in_one_sentence(tmp_path: Path) -> None:
    report = write_report(write(tmp_path, proof=certificate(outputs=(output(),))))
    assert report.verdict == "exact"
    assert report.headline == (
        "Proven: all 24 layers exact; fused output error 3.1e-7, bound 1.6e-6; "
        "graph identical to the base, 0 added nodes, 0 added bytes; no second witness"
    )


def test_rounded_proof_says_how_many_are_exact(tmp_path: Path) -> None:
    proof = certificate(layers=(layer("a"), layer("b", verdict="rounded")))
    report = write_report(write(tmp_path, proof=proof))
    assert report.verdict == "rounded"
    assert "2 layers within the rounding bound, 1 of them exact" in report.headline


def test_added_biases_are_in_the_headline(tmp_path: Path) -> None:
    proof = certificate(graph=graph(added=("fc.bias",), bytes_fused=graph().bytes_base + 3072))
    headline = write_report(write(tmp_path, proof=proof)).headline
    assert "identical to the base but for 1 addition, 0 added nodes, 3.1 kB added" in headline


def test_layers_that_no_output_depends_on_are_in_the_headline(tmp_path: Path) -> None:
    headline = write_report(write(tmp_path, proof=certificate(unexercised=("vision.0.fc", "vision.1.fc")))).headline
    assert headline.startswith("Proven: ")
    assert "no output depends on 2 adapted layers, first vision.0.fc: proven by their weights alone" in headline


def test_wrong_layer_is_named_first_with_its_worst_entry(tmp_path: Path) -> None:
    bad = layer(
        "blocks.3.fc2",
        verdict="wrong",
        max_error=2.1e-3,
        bound_ratio=412.0,
        worst={"tensor": "blocks.3.fc2.weight", "index": [12, 7], "expected": 0.03125, "found": 0.5},
    )
    report = write_report(write(tmp_path, proof=certificate(layers=(layer("blocks.0.fc2"), bad, bad))))
    assert report.verdict == "wrong"
    assert report.headline == "Failed: 2 of 3 layers wrong, first blocks.3.fc2, error 2.1e-3, 412 times its bound"
    worst = "blocks.3.fc2.weight[12, 7]: expected 0.03125, found 0.5"
    assert worst in report.html.read_text(encoding="utf-8")
    assert worst in report.junit.read_text(encoding="utf-8")


CARRIED = CarriedEvidence(compared=2, equal=1, replaced=(), different=("norm.weight",))


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        (certificate(outputs=(output(error=1e-3, passed=False),)), "output logits of fused at batch 1"),
        (certificate(outputs=(output(error=float("nan")),)), "error NaN"),
        (certificate(carried=CARRIED), "1 untouched tensor changed, first norm.weight"),
        (certificate(graph=graph(differences=("node 3: Add",))), "graph differs from the base: node 3: Add"),
        (certificate(layers=(layer("a.b", max_error=float("nan")),)), "first a.b, error NaN"),
        ({**certificate().to_json(), "verdict": "wrong"}, "verification.json says wrong"),
    ],
)
def test_every_part_can_fail_the_report(tmp_path: Path, proof: Certificate | dict[str, Any], said: str) -> None:
    report = write_report(write(tmp_path, proof=proof))
    assert report.verdict == "wrong"
    assert said in report.headline


def test_artefact_outside_its_bound_fails_the_report(tmp_path: Path) -> None:
    bad = artifact(outputs=(output(model="onnx fp16", error=0.5, passed=False),))
    report = write_report(write(tmp_path, proof=certificate(), artifacts=[bad]))
    assert report.verdict == "wrong"
    assert "model.onnx, output logits of onnx fp16" in report.headline


def test_engine_that_holds_adapter_tensors_fails_the_report(tmp_path: Path) -> None:
    engine = audited(artifact(path="model.engine", ran=False, outputs=()), adapter_tensors_found=["lora_A"])
    report = write_report(write(tmp_path, proof=certificate(), artifacts=[engine]))
    assert report.verdict == "wrong"
    assert "model.engine still holds 1 adapter tensor, first lora_A" in report.headline


def test_missing_proof_is_not_proven(tmp_path: Path) -> None:
    report = write_report(write(tmp_path, artifacts=[artifact()]))
    assert (report.verdict, report.headline) == ("unproven", "Not proven: verification.json is missing")


def test_proof_of_other_weights_is_not_proven(tmp_path: Path) -> None:
    report = write_report(write(tmp_path, proof=certificate(weights_sha256=OTHER)))
    assert report.verdict == "unproven"
    assert "about other weights" in report.headline
    assert "blocks.0.attn.proj</code>" not in report.html.read_text(encoding="utf-8")


def test_artefact_of_other_weights_is_not_proven(tmp_path: Path) -> None:
    stale = artifact(weights_sha256=OTHER)
    report = write_report(write(tmp_path, proof=certificate(), artifacts=[stale]))
    assert report.verdict == "unproven"
    assert "model.onnx was made from other weights" in report.headline


def test_proof_without_a_layer_is_not_proven(tmp_path: Path) -> None:
    report = write_report(write(tmp_path, proof=certificate(layers=())))
    assert report.verdict == "unproven"
    assert "holds no layer" in report.headline


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fused.json", "reparam-export fuse"),
        ("verification.json", "reparam-export verify"),
        ("artifact.json", "reparam-export export"),
    ],
)
@pytest.mark.parametrize("text", ["{", "[]", "{}", "\x00", '{"layers": 3, "artifacts": 3}', "[" * 100_000])
def test_damaged_file_names_itself_and_what_to_run(tmp_path: Path, name: str, command: str, text: str) -> None:
    write(tmp_path, proof=certificate(), artifacts=[artifact()])
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        write_report(tmp_path)
    assert name in str(caught.value)
    assert command in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_weights_name_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fused\.json is missing.*reparam-export fuse"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layers", 0, "verdict"), "fine"),
        (("layers", 0, "max_error"), "a lot"),
        (("layers", 0, "max_error"), True),
        (("layers", 0, "shape"), "768"),
        (("layers", 0, "shape"), ["768"]),
        (("layers", 0, "module"), None),
        (("outputs", 0, "batch"), 1.5),
        (("outputs", 0, "passed"), "yes"),
        (("graph", "nodes_base"), True),
        (("graph", "differences"), [3]),
        (("graph",), 3),
        (("verdict",), "proven"),
    ],
)
def test_field_of_the_wrong_type_is_damage(tmp_path: Path, path: tuple[str | int, ...], value: object) -> None:
    proof = json.loads(json.dumps(certificate().to_json()))
    inner = proof
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(CheckpointError, match=r"verification\.json is damaged"):
        write_report(write(tmp_path, proof=proof))


def test_fields_of_a_later_version_are_left_alone(tmp_path: Path) -> None:
    proof = {**certificate().to_json(), "later": 1}
    assert write_report(write(tmp_path, proof=proof)).verdict == "exact"


@pytest.mark.parametrize("nothing", [None, "NaN", float("nan"), "-Infinity"])
def test_what_is_not_a_number_is_shown_as_such(tmp_path: Path, nothing: object) -> None:
    proof = json.loads(json.dumps(certificate().to_json()))
    proof["layers"][0] |= {"bound_ratio": nothing, "survival": nothing, "max_error": nothing}
    proof["outputs"][0] |= {"error": nothing, "floor": nothing, "bound": nothing, "magnitude": nothing}
    proof["survival"] = nothing
    report = write_report(write(tmp_path, proof=proof))
    assert report.verdict == "wrong"
    shown = "inf" if "inf" in str(nothing).lower() else "NaN"
    assert f'<td class="n">{shown}</td>' in report.html.read_text(encoding="utf-8").replace("-inf", "inf")


def test_zero_bounds_and_errors_divide_nothing(tmp_path: Path) -> None:
    zero = output(error=0.0, floor=0.0, bound=0.0, magnitude=0.0)
    still = layer(max_error=0.0, bound_ratio=0.0, survival=0.0, entries=0, exact_entries=0)
    assert write_report(write(tmp_path, proof=certificate(layers=(still,), outputs=(zero,)))).verdict == "exact"


def test_nothing_changed_and_nothing_compared(tmp_path: Path) -> None:
    write(tmp_path, fused={**FUSED, "changed": {}}, proof=certificate(layers=(), outputs=()))
    assert "no layer was changed; no output was compared" in write_report(tmp_path).headline


def test_half_written_files_are_removed(tmp_path: Path) -> None:
    write(tmp_path, proof=certificate())
    (tmp_path / "junit.xml").mkdir()
    with pytest.raises(OSError, match=r"junit\.xml"):
        write_report(tmp_path)
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_fused_facts_may_be_few(tmp_path: Path) -> None:
    dump(tmp_path / "fused.json", {"weights_sha256": FUSED["weights_sha256"]})
    assert write_report(tmp_path).verdict == "unproven"


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_the_report_says_how_many_differ_and_how_near_they_are(tmp_path: Path, name: str) -> None:
    write(tmp_path, proof=certificate(outputs=(output(agree=0.998, differing=3, margin=2.1e-7),)))
    write_report(tmp_path)
    assert "99.80 %, 3 not: classes within 2.1e-7" in (tmp_path / name).read_text(encoding="utf-8")
