"""``bench`` and ``compare`` from the command line, their exit codes as gates, and what they compare."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import CASES
from test_cli import error_of, run

import reparam_export as rx
from reparam_export.comparison import compare

Install = Callable[..., Any]
ONE = ("--batch", "1", "--runner", "onnxruntime_cpu")


@pytest.mark.parametrize(
    ("factors", "code", "said"),
    [
        ({}, 0, "no added cost (margin 1 %)"),
        ({"fused": 1.05}, 1, "added cost"),
        ({"base_again": 1.05}, 6, "no verdict on the latency"),
        ({"spread": 0.2}, 6, "more rounds"),
    ],
)
def test_bench_is_a_gate(
    exported: Path, once: None, synthetic: Install, factors: dict[str, float], code: int, said: str
) -> None:
    synthetic(**factors)
    result = run("bench", exported, *ONE, "--rounds", 60)
    assert result.exit_code == code
    assert said in (error_of(result) if code else result.stdout)
    assert json.loads((exported / "latency.json").read_text())["cases"]


def test_the_report_of_a_folder_fails_as_its_measurement_does(exported: Path, once: None, synthetic: Install) -> None:
    for factors, code, verdict in (
        ({}, 0, "no added cost"),
        ({"fused": 1.1}, 1, "added cost"),
        ({"base_again": 2}, 6, "withheld"),
    ):
        synthetic(**factors)
        run("bench", exported, *ONE)
        result = run("report", exported, "--json")
        assert result.exit_code == code
        assert json.JSONDecoder().raw_decode(result.stdout)[0]["latency"] == verdict
        assert ("<failure" in (exported / "junit.xml").read_text()) == bool(code)


def reported(folder: Path, code: int) -> tuple[str, str]:
    """The latency as JSON says it, and the text for the pull request."""
    result = run("report", folder, "--json")
    assert result.exit_code == code
    said = json.JSONDecoder().raw_decode(result.stdout)[0]["latency"]
    return said, (folder / "report.md").read_text()


def test_a_measurement_before_the_export_is_none_of_the_exported_file(tmp_path: Path, synthetic: Install) -> None:
    synthetic(adapted=1.2)
    out = tmp_path / "out"
    for words in (("fuse", *CASES["hydra_vtab"].command(), "-o", out), ("verify", out), ("bench", out, *ONE)):
        assert run(*words).exit_code == 0
    said, text = reported(out, 0)
    assert said == "no added cost"
    assert "a file that was written in fp32 for the measurement, not an exported one" in text
    assert run("export", out, "--to", "onnx", "--precision", "fp16").exit_code == 0
    said, text = reported(out, 6)
    assert said == "not known"
    assert "Latency proven" not in text
    assert "the exported model.onnx (fp16) was not timed" in text
    assert run("bench", out, *ONE).exit_code == 0
    said, text = reported(out, 0)
    assert said == "no added cost"
    assert "timed: model.onnx (fp16, sha256 " in text


@pytest.mark.parametrize("name", ["fused.safetensors", "model.onnx", "verification.json"])
def test_what_changed_after_the_measurement_has_no_latency(
    exported: Path, once: None, tmp_path: Path, synthetic: Install, name: str
) -> None:
    synthetic()
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    run("bench", out, *ONE)
    assert reported(out, 0)[0] == "no added cost"
    if name == "verification.json":
        (out / name).unlink()
    else:
        content = bytearray((out / name).read_bytes())
        content[-1] ^= 1
        (out / name).write_bytes(content)
    said, text = reported(out, 1)
    assert said == "not known"
    assert "Latency not known: what was timed is not proven any more" in text
    assert "Latency proven" not in text


def test_a_measurement_that_contradicts_itself_is_exit_code_3(
    exported: Path, once: None, tmp_path: Path, synthetic: Install
) -> None:
    synthetic()
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    run("bench", out, *ONE)
    whole = json.loads((out / "latency.json").read_text())
    slow = [[3 * t for t in runs] for runs in whole["cases"][0]["raw"]["fused"]]
    tripled = [{**case, "raw": {**case["raw"], "fused": slow}} for case in whole["cases"]]
    for damage in ({"cases": []}, {"verdict": "added cost"}, {"margin": -1}, {"margin": 10**400}, {"cases": tripled}):
        (out / "latency.json").write_text(json.dumps(whole | damage))
        result = run("report", out)
        assert result.exit_code == 3
        assert "latency.json is damaged" in error_of(result)


def test_bench_as_json_carries_everything(exported: Path, once: None, synthetic: Install) -> None:
    synthetic()
    result = run("bench", exported, *ONE, "--json", "--threads", 1, "--margin", "2 %", "--seed", 7)
    found = json.loads(result.stdout)
    assert found["margin"] == 0.02
    assert found["settings"]["seed"] == 7
    assert set(found["cases"][0]["raw"]) == {"base", "base again", "adapted", "fused"}
    assert found["structure"]["sizes"][0]["operators"]["MatMul"] > 0
    assert found["machine"]["versions"]["onnxruntime-gpu"]


@pytest.mark.parametrize(
    "words",
    [
        ("--batch", "1:2"),
        ("--batch", ""),
        ("--margin", "0.01"),
        ("--margin", "0%"),
        ("--max-time", "soon"),
        ("--runner", "abacus"),
    ],
)
def test_a_wrong_option_of_bench_is_one_line(exported: Path, words: tuple[str, ...]) -> None:
    result = run("bench", exported, *words)
    assert result.exit_code == 2
    assert words[1] in error_of(result) or "batch" in error_of(result) or "margin" in error_of(result)


def test_bench_of_a_runner_that_is_not_there_is_exit_code_5(exported: Path) -> None:
    result = run("bench", exported, "--runner", "tensorrt")
    assert result.exit_code == 5
    assert "GPU" in error_of(result)


def test_convert_measures_when_it_is_told_to(tmp_path: Path, synthetic: Install) -> None:
    synthetic(adapted=1.2)
    case = CASES["hydra_vtab"]
    result = run("convert", *case.command(), "--to", "onnx", "--bench", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["latency"] == "no added cost"
    assert "Latency proven: no added cost" in (tmp_path / "out" / "report.md").read_text()


# compare


def changed(exported: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Another folder whose ONNX file has other weights."""
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    from reparam_export.files import load_safetensors, save_safetensors

    tensors, metadata = load_safetensors(other / "fused.safetensors", numpy=False)
    change(tensors)
    save_safetensors(other / "fused.safetensors", tensors, metadata)
    model = onnx.load(other / "model.onnx")
    transposed = set(json.loads(next(p.value for p in model.metadata_props if p.key == "transposed")))
    for held in model.graph.initializer:
        if held.name in tensors:
            array = tensors[held.name].numpy()
            array = array.T if held.name in transposed else array
            held.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), held.name))
    onnx.save(model, other / "model.onnx")
    return other


def test_a_folder_is_the_same_as_itself(exported: Path, synthetic: Install) -> None:
    synthetic()
    found = compare(exported, exported, batches=(1,), runners=("onnxruntime_cpu",))
    assert found.changed == {"weights": False, "outputs": False, "graph": False, "latency": False}
    assert found.tensors == len(rx.fuse(CASES["hydra_vtab"].read()).tensors)
    assert found.latency is not None
    assert found.latency.contest.models == ("A", "A again", "B")


def test_one_changed_weight_is_named_with_how_much_and_what_it_does(exported: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.1.mlp.fc2.weight"][3, 5] += 0.5
        tensors["head.bias"] *= 1.001

    other = changed(exported, tmp_path, change)
    for a, b in ((exported, other), (exported / "model.onnx", other / "model.onnx"), (exported, other / "model.onnx")):
        found = compare(a, b, latency=False)
        assert [w.name for w in found.weights] == ["blocks.1.mlp.fc2.weight", "head.bias"]
        first = found.weights[0]
        assert (first.entries, first.largest) == (1, pytest.approx(0.5, rel=1e-6))
        assert 0 < first.relative < 1
        assert found.graph == ()
        assert found.outputs[0].largest > 1e-3
        assert found.outputs[0].samples == len(CASES["hydra_vtab"].inputs()["image"])
        assert found.changed == {"weights": True, "outputs": True, "graph": False}


def test_outputs_are_compared_by_onnxruntime_on_the_samples_of_the_proof(exported: Path, tmp_path: Path) -> None:
    import onnxruntime

    other = changed(exported, tmp_path, lambda tensors: tensors["head.weight"].mul_(2.0))
    images = CASES["hydra_vtab"].inputs()["image"].numpy()
    answers = [
        onnxruntime.InferenceSession(f / "model.onnx", providers=["CPUExecutionProvider"]).run(None, {"image": images})[
            0
        ]
        for f in (exported, other)
    ]
    found = compare(exported, other, latency=False).outputs[0]
    assert found.largest == pytest.approx(np.abs(answers[0] - answers[1]).max(), rel=1e-5)
    assert found.agree == (answers[0].argmax(-1) == answers[1].argmax(-1)).mean()


def test_tensors_and_nodes_that_only_one_side_has_are_named(exported: Path, tmp_path: Path) -> None:
    from reparam_export.exporters.onnx import write
    from reparam_export.models import Input, Signature

    signature = Signature((Input("x", ("batch", 4)),), ("output",))
    torch.manual_seed(0)
    for name, layers in (
        ("a", [torch.nn.Linear(4, 3)]),
        ("b", [torch.nn.Linear(4, 3), torch.nn.Linear(3, 3, bias=False)]),
    ):
        write(torch.nn.Sequential(*layers).eval(), signature, {"x": torch.randn(2, 4)}, tmp_path / f"{name}.onnx")
    found = compare(tmp_path / "a.onnx", tmp_path / "b.onnx", latency=False)
    assert {w.name: (w.a, w.b) for w in found.weights}["1.weight"][0] == ""
    assert found.graph
    assert found.nodes == (1, 2)
    assert found.outputs[0].samples == 16


def test_compare_gates_on_what_it_is_told_to(exported: Path, tmp_path: Path, synthetic: Install) -> None:
    synthetic(B=1.2)
    other = changed(exported, tmp_path, lambda tensors: tensors["head.bias"].add_(1.0))
    assert run("compare", exported, other, *ONE).exit_code == 0
    for part, code in (("weights", 1), ("outputs", 1), ("graph", 0), ("latency", 1)):
        assert run("compare", exported, other, *ONE, "--fail-on", part).exit_code == code, part
    synthetic(B=1.0, spread=0.3)
    assert run("compare", exported, other, *ONE, "--rounds", 10, "--fail-on", "latency").exit_code == 6
    result = run("compare", exported, other, "--no-latency", "--fail-on", "latency")
    assert result.exit_code == 2
    assert "cannot be judged" in error_of(result)


def test_compare_shows_and_prints_json(exported: Path, tmp_path: Path, synthetic: Install) -> None:
    synthetic()
    other = changed(exported, tmp_path, lambda tensors: tensors["head.bias"].add_(1.0))
    text = run("compare", exported, other, *ONE).stdout
    assert "weights: 1 of 44 tensors differ" in text
    assert "head.bias" in text
    assert "the same program" in text
    assert "B / A" in text
    found = json.loads(run("compare", exported, other, *ONE, "--json").stdout)
    assert found["changed"] == {"weights": True, "outputs": True, "graph": False, "latency": False}
    assert found["latency"]["cases"][0]["verdict"] == "no added cost"


def test_two_engines_are_compared_as_far_as_a_machine_without_a_gpu_can(tmp_path: Path) -> None:
    for name, content in (("a", b"plan"), ("b", b"plan"), ("c", b"another plan")):
        (tmp_path / f"{name}.engine").write_bytes(content)
    same, other = (compare(tmp_path / "a.engine", tmp_path / f"{name}.engine") for name in "bc")
    assert "engines: the same bytes" in same.notes
    assert "engines: 4 against 12 bytes, not the same" in other.notes
    assert any("no GPU" in note for note in other.notes)
    assert other.changed == {}


@pytest.mark.parametrize("name", ["nothing", "notes.txt", "empty"])
def test_what_is_no_side_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    result = run("compare", exported, tmp_path / name)
    assert result.exit_code == 2
    assert name in error_of(result)


def test_samples_of_another_model_are_refused(exported: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixels=np.zeros((1, 3, 32, 32), np.float32))
    result = run("compare", exported, exported, "--inputs", tmp_path / "x.npz", "--no-latency")
    assert result.exit_code == 2
    assert "takes image; the samples are pixels" in error_of(result)


@pytest.mark.parametrize("command", ["compare", "verify"])
def test_an_archive_of_other_things_is_no_file_of_inputs(exported: Path, tmp_path: Path, command: str) -> None:
    """numpy opens any zip archive as an .npz, and gives bytes for what is no array in it."""
    with zipfile.ZipFile(tmp_path / "inputs.npz", "w") as archive:
        archive.writestr("image", b"no array")
    torch.save({"a": torch.ones(2)}, tmp_path / "ckpt.pt")
    words = [command, exported, exported, "--no-latency"] if command == "compare" else [command, exported]
    for name in ("inputs.npz", "ckpt.pt"):
        result = run(*words, "--inputs", tmp_path / name)
        assert result.exit_code == 2
        assert "expected a .npy or .npz file of arrays; found" in error_of(result)
