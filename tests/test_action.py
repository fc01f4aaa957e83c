"""The GitHub Action without GitHub: its own steps, run by bash as a runner would, with files for outputs and summary."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CASES, Case
from junitparser import JUnitXml

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "reparam-export.yml").read_text())
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail")  # as GitHub's ``shell: bash``


class Runner:
    """What a runner keeps between steps. Expressions are the few that the action uses; any other is an error."""

    def __init__(self, workspace: Path, **given: str) -> None:
        self.workspace = workspace
        known = ACTION["inputs"]
        assert set(given) <= {name.replace("-", "_") for name in known}
        self.inputs = {n: given.get(n.replace("-", "_"), str(i.get("default", ""))) for n, i in known.items()}
        self.steps: dict[str, dict[str, str]] = {}
        self.summary, self.used, self.codes, self.log = workspace / "summary.md", [], [], ""  # type: ignore[var-annotated]

    def value(self, expression: str) -> str:
        """``inputs.x``, ``steps.y.outputs.z`` or ``github.action_path``; a missing output is empty."""
        parts = expression.strip().split(".")
        if parts[0] == "inputs":
            return self.inputs[parts[1]]
        if parts[0] == "steps":
            return self.steps.get(parts[1], {}).get(parts[3], "")
        assert expression.strip() == "github.action_path"
        return str(ROOT)

    def text(self, template: Any) -> str:
        return re.sub(r"\$\{\{(.*?)\}\}", lambda found: self.value(found[1]), str(template))

    def wanted(self, condition: str) -> bool:
        """``always()`` and comparisons with a word, all of which must hold."""
        if any(self.codes) and "always()" not in condition:
            return False
        for term in filter(None, (t.strip() for t in condition.split("&&"))):
            if term != "always()":
                left, right = term.split("!=")
                if self.value(left) == right.strip().strip("'"):
                    return False
        return True

    def run(self) -> None:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for number, step in enumerate(ACTION["runs"]["steps"]):
            if not self.wanted(step.get("if", "")):
                continue
            if "uses" in step:
                self.used.append((step["uses"], {k: self.text(v) for k, v in step.get("with", {}).items()}))
                continue
            outputs = self.workspace / f"outputs-{number}"
            outputs.touch()
            own = {name: self.text(value) for name, value in step.get("env", {}).items()}
            files = {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(self.summary)}
            done = subprocess.run(
                [*BASH, "-c", step["run"]],
                cwd=self.workspace,
                env={**environment, **own, **files},
                capture_output=True,
                text=True,
                check=False,
            )
            self.log += done.stdout + done.stderr
            self.codes.append(done.returncode)
            self.steps[step.get("id", str(number))] = dict(
                line.split("=", 1) for line in outputs.read_text().splitlines()
            )

    @property
    def outputs(self) -> dict[str, str]:
        return {name: self.text(output["value"]) for name, output in ACTION["outputs"].items()}


def quoted(words: list[str]) -> str:
    return " ".join(f"'{word}'" for word in words)


def act(workspace: Path, case: Case, **given: str) -> Runner:
    path, *options = case.command()
    runner = Runner(workspace, checkpoint=path, args=quoted(options), install="", **given)
    runner.run()
    return runner


def test_a_checkpoint_that_folds_is_green_with_summary_outputs_and_artefact(tmp_path: Path) -> None:
    done = act(tmp_path, CASES["hydra_nlu"], to="onnx safetensors", out="my out")
    assert done.codes == [0, 0], done.log
    assert done.outputs == {"exit-code": "0", "verdict": "exact", "latency": "not measured", "folder": "my out"}
    assert done.summary.read_text().startswith("### ✅ Proven: ")
    assert (tmp_path / "my out" / "model.onnx").is_file()
    assert JUnitXml.fromfile(str(tmp_path / "my out" / "junit.xml")).failures == 0
    assert [name for name, _ in done.used] == ["actions/setup-python@v5", "actions/upload-artifact@v4"]
    assert done.used[1][1]["path"] == "my out"


def test_without_targets_it_fuses_and_verifies(tmp_path: Path) -> None:
    inputs = CASES["hydra_vtab"].folder / "inputs.npy"
    done = act(tmp_path, CASES["hydra_vtab"], to="", verify_args=f"--inputs '{inputs}' --seed 3")
    assert done.codes == [0, 0], done.log
    assert done.outputs["verdict"] == "exact"
    assert str(inputs) in done.summary.read_text().replace("&#46;", ".")
    assert not list((tmp_path / "reparam-export-out").glob("model*"))


def test_what_cannot_be_read_is_red_with_its_own_exit_code_and_words(tmp_path: Path) -> None:
    path = CASES["hydra_vtab"].arguments()[0]
    done = Runner(tmp_path, checkpoint=str(path), args="--base timm:vit_tiny_patch16_224", install="", artifact="")
    done.run()
    assert done.codes == [0, 3]
    assert done.outputs["exit-code"] == "3"
    assert done.outputs["verdict"] == ""
    assert "error: " in done.summary.read_text()
    assert [name for name, _ in done.used] == ["actions/setup-python@v5"]


def test_a_measurement_without_a_verdict_is_red_and_stands_in_the_summary(tmp_path: Path) -> None:
    measured = "--batch 1 --rounds 1 --runner onnxruntime_cpu --no-memory"
    done = act(tmp_path, CASES["hydra_vtab"], bench="true", bench_args=measured)
    assert done.codes == [0, 6], done.log
    assert done.outputs | {"folder": ""} == {
        "exit-code": "6",
        "verdict": "exact",
        "latency": "undecided",
        "folder": "",
    }
    assert "Latency not decided" in done.summary.read_text()
    assert "no verdict on the latency" in done.summary.read_text()


def test_nothing_in_the_inputs_is_run_by_the_shell(tmp_path: Path) -> None:
    done = Runner(
        tmp_path,
        checkpoint='x"; touch pwned; "',
        to="onnx; touch pwned",
        args="$(touch pwned) `touch pwned` --set 'a=1; touch pwned' ; touch pwned",
        bench="true; touch pwned",
        install="",
    )
    done.run()
    assert done.codes[-1] != 0
    assert not (tmp_path / "pwned").exists()


def test_the_install_step_takes_the_version_of_the_action_and_its_extras(tmp_path: Path) -> None:
    called = tmp_path / "bin"
    called.mkdir()
    (called / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > called\n')
    (called / "python").chmod(0o755)
    step = next(s for s in ACTION["runs"]["steps"] if s.get("name") == "Install")
    for given, words in (
        ({}, str(ROOT)),
        ({"extras": "hf,trt"}, f"{ROOT}[hf,trt]"),
        ({"install": "reparam-export"}, "reparam-export"),
    ):
        runner = Runner(tmp_path, checkpoint="x", **given)
        own = {name: runner.text(value) for name, value in step["env"].items()}
        path = f"{called}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([*BASH, "-c", step["run"]], cwd=tmp_path, env={**os.environ, **own, "PATH": path}, check=True)
        assert (tmp_path / "called").read_text().split()[-1] == words


@pytest.mark.parametrize(
    ("kind", "file"), [("github-actions", "action.yml"), ("github-workflows", ".github/workflows/reparam-export.yml")]
)
def test_the_files_are_what_github_expects(kind: str, file: str) -> None:
    tool = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    assert tool is not None
    subprocess.run([tool, "--builtin-schema", f"vendor.{kind}", file], cwd=ROOT, check=True, capture_output=True)


def test_the_workflow_uses_the_action_on_the_demo_with_inputs_that_it_has() -> None:
    steps = WORKFLOW["jobs"]["demo"]["steps"]
    step = next(s for s in steps if s.get("uses") == "./")
    assert set(step["with"]) <= set(ACTION["inputs"])
    demo, flow = ((ROOT / "pipelines" / name).read_text() for name in ("demo.py", "flow.py"))
    assert step["with"]["checkpoint"] == "demo/ckpt.pt"
    assert 'convert(FOLDER / "ckpt.pt"' in demo
    assert step["with"]["args"] == "--inputs demo/ckpt.npz"
    assert 'checkpoint.with_suffix(".npz")' in flow
    assert {found for s in steps for found in re.findall(r"outputs\.([\w-]+)", str(s.get("env", "")))} <= set(
        ACTION["outputs"]
    )


def test_every_input_of_the_action_is_used_and_documented() -> None:
    text = (ROOT / "action.yml").read_text()
    for name, given in ACTION["inputs"].items():
        assert given["description"]
        assert f"inputs.{name} " in text or f"inputs.{name}}}" in text, name


@pytest.mark.parametrize("given", [{"to": "onnx 'trt"}, {"args": "--inputs 'x.npy"}])
def test_quotes_that_do_not_match_are_red_and_nothing_is_run(tmp_path: Path, given: dict[str, str]) -> None:
    path, *options = CASES["hydra_vtab"].command()
    done = Runner(tmp_path, **{"checkpoint": path, "args": quoted(options), "install": "", **given})
    done.run()
    assert done.codes[0] != 0
    assert "quotes do not match" in done.log
    assert not (tmp_path / "reparam-export-out").exists()


def test_arguments_that_convert_nothing_are_red(tmp_path: Path) -> None:
    done = Runner(tmp_path, checkpoint=str(CASES["hydra_vtab"].arguments()[0]), args="--help", install="")
    done.run()
    assert done.codes[-1] != 0
    assert "nothing was proven" in done.log
