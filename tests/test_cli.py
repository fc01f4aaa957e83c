"""The command line as a user meets it: every command, every misuse with one clear line and its exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import CASES, Case, own_model
from safetensors.torch import load_file, save_file

from reparam_export import cli
from reparam_export.refuted import put_back, set_aside


def run(*words: object) -> Result:
    """The entry point itself, so that errors become messages and exit codes."""
    runner = CliRunner()

    def entry(args: list[str]) -> None:
        sys.argv = ["reparam-export", *args]
        cli.main()

    import click

    @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    def shell(args: tuple[str, ...]) -> None:
        entry(list(args))

    return runner.invoke(shell, [str(w) for w in words])


def error_of(result: Result) -> str:
    """The one line on stderr."""
    lines = result.stderr.strip().splitlines()
    assert lines, result.output
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after fuse and verify."""
    folder = tmp_path_factory.mktemp("proven") / "out"
    assert run("fuse", *CASES["hydra_vtab"].command(), "-o", folder).exit_code == 0
    assert run("verify", folder, "--inputs", CASES["hydra_vtab"].folder / "inputs.npy").exit_code == 0
    return folder


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, reparam_export.cli as c\n"
        "try: c.cli.main(['--help'], standalone_mode=False)\n"
        "finally: print(sorted({'torch','numpy','onnx','timm','transformers','rich','matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_reader_that_closes_the_output_is_no_verdict() -> None:
    words = [sys.executable, "-m", "reparam_export", "inspect", str(CASES["peft_lora"].folder), "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == ""
    assert process.returncode == 141


def test_a_terminated_command_cleans_up_and_is_no_verdict(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, tempfile, time\n"
        "from reparam_export import cli\n"
        "from reparam_export.cli import inspect\n"
        "def work(**_):\n"
        "    with tempfile.TemporaryDirectory(dir='.'):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "inspect.command.callback = work\n"
        "sys.argv = ['reparam-export', 'inspect', '.']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "error: interrupted")
    assert not list(tmp_path.iterdir())


def test_inspect_reads_a_peft_folder_without_torch() -> None:
    folder = CASES["peft_lora"].folder
    code = (
        "import sys; sys.argv = ['reparam-export', 'inspect', sys.argv[1], '--json']\n"
        "import reparam_export.cli as c; c.main()\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["foldable"] is True
    assert found["kinds"] == {"lora": 14}
    assert found["adapters"][0]["settings"] == {"rank": 4, "scale": 3.0}


def test_inspect_says_what_is_missing_and_how_to_pass_it(hydra: Case) -> None:
    result = run("inspect", hydra.folder / "ckpt.pt", "--json")
    found = json.loads(result.stdout)
    assert [m["setting"] for m in found["missing"]] == ["scale", "base"]
    assert found["missing"][0]["option"] == "--set scale=VALUE"
    assert found["foldable"] is False
    assert result.exit_code == 0


def test_inspect_lists_zero_and_non_finite_tensors(hydra: Case, tmp_path: Path) -> None:
    tensors = torch.load(hydra.folder / "ckpt.pt", weights_only=True)
    tensors["blocks.0.attn.hydra_proj_par.up_proj.weight"].zero_()
    tensors["blocks.2.attn.hydra_proj_par.up_proj.bias"][1] = float("nan")
    torch.save(tensors, tmp_path / "ckpt.pt")
    found = json.loads(run("inspect", tmp_path / "ckpt.pt", "--set", "scale=3", "--json").stdout)
    assert found["zero"] == ["blocks.0.attn.proj: parallel.up.weight"]
    assert found["non_finite"] == ["blocks.2.attn.proj: parallel.up.bias"]


def test_analyse_prints_the_branches_and_adds_them_to_the_report(hydra: Case, proven: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(proven, folder)
    given = ("inspect", *hydra.command(), "--analyse")
    printed = run(*given)
    assert printed.exit_code == 0
    assert "blocks.2.mlp.fc2\tsequential\t" in printed.stdout
    found = json.loads(run(*given, "-o", folder, "--json").stdout)
    assert len(found["branches"]) == 12
    page = (folder / "report.html").read_text()
    assert page.count('<td class="w">sequential</td>') == 6
    assert 'class="branches-wide"' in page
    assert "Branches against" in (folder / "report.md").read_text()
    run("fuse", *hydra.command(), "-o", folder, "--overwrite")
    assert not (folder / "analysis.json").exists()


def test_analyse_refuses_a_folder_of_another_checkpoint(glora: Case, proven: Path, tmp_path: Path) -> None:
    for folder, says in ((proven, "another checkpoint"), (tmp_path, "fused.json")):
        refused = run("inspect", *glora.command(), "--analyse", "-o", folder)
        assert refused.exit_code == 2
        assert says in error_of(refused)
    assert run("inspect", *glora.command(), "-o", proven).exit_code == 2
    assert not (proven / "analysis.json").exists()


def test_an_analysis_of_another_checkpoint_is_not_shown(proven: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(proven, folder)
    (folder / "analysis.json").write_text(json.dumps({"checkpoint_sha256": "0" * 64, "branches": [{"wrong": 1}]}))
    assert run("report", folder).exit_code == 0
    assert "Branches against" not in (folder / "report.html").read_text()
    sha = json.loads((folder / "fused.json").read_text())["checkpoint"]["sha256"]
    (folder / "analysis.json").write_text(json.dumps({"checkpoint_sha256": sha, "branches": [{"wrong": 1}]}))
    damaged = run("report", folder)
    assert damaged.exit_code == 3
    assert "inspect CHECKPOINT --analyse" in error_of(damaged)


def test_stage_by_stage_is_convert(hydra: Case, proven: Path, tmp_path: Path) -> None:
    inputs = ("--inputs", hydra.folder / "inputs.npy")
    whole = run(
        "convert",
        *hydra.command(),
        *inputs,
        "--to",
        "onnx",
        "--to",
        "safetensors",
        "-o",
        tmp_path / "out",
        "--batch",
        "1:2:4",
    )
    assert whole.exit_code == 0, whole.output
    assert run("export", proven, "--to", "onnx", "--to", "safetensors", "--batch", "1:2:4").exit_code == 0
    assert run("report", proven).exit_code == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in proven.iterdir()}
    assert names == {
        "fused.safetensors", "fused.json", "verification.json", "reference.npz", "artifact.json", "model.onnx",
        "model.safetensors", "report.html", "report.md", "junit.xml",
    }  # fmt: skip
    for name in ("fused.safetensors", "model.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (proven / name).read_bytes(), f"{name} is not reproducible"


def test_json_is_one_object_on_stdout(hydra: Case, tmp_path: Path) -> None:
    result = run("convert", *hydra.command(), "--to", "safetensors", "-o", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert found["verdict"] == "exact"
    assert found["artifacts"][0]["target"] == "safetensors"
    failed = run("fuse", tmp_path / "nothing.pt", "--json")
    assert json.loads(failed.stdout)["error"]["exit_code"] == failed.exit_code == 3


def test_plain_lines_in_a_pipe(proven: Path) -> None:
    result = run("report", proven)
    assert "\x1b" not in result.output
    assert result.output.splitlines()[0].startswith("Proven: all 6 layers exact")


# --- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["convert"], 2, "CHECKPOINT"),
        (["convert", "x.pt"], 2, "--to"),
        (["convert", "x.pt", "--to", "tflite"], 2, "tflite"),
        (["convert", "x.pt", "--to", "onnx", "--precision", "int8"], 2, "int8"),
        (["convert", "x.pt", "--to", "onnx", "--batch", "8:1:64"], 2, "MIN:OPT:MAX"),
        (["convert", "x.pt", "--to", "onnx", "--batch", "1"], 2, "MIN:OPT:MAX"),
        (["convert", "x.pt", "--to", "onnx", "--opset", "7"], 2, "opset"),
        (["convert", "x.pt", "--to", "trt", "--gpu", "sm12"], 2, "sm12"),
        (["convert", "nowhere.pt", "--to", "onnx"], 3, "nowhere.pt"),
        (["fuse", "nowhere.pt"], 3, "nowhere.pt"),
        (["verify", "nowhere"], 3, "fuse"),
        (["export", "nowhere", "--to", "onnx"], 3, "fuse"),
        (["report", "nowhere"], 3, "nowhere"),
        (["frobnicate"], 2, "frobnicate"),
        (["fuse", "x.pt", "--set", "scale"], 2, "NAME=VALUE"),
    ],
)
def test_a_wrong_call(words: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == code, result.output
    error_of(result)
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"--base": None}, 3, "--base"),
        ({"--config": None}, 3, "scale"),
        ({"--base-weights": None}, 3, "--base-weights"),
        ({"--base-weights": "nowhere.pt"}, 3, "nowhere.pt"),
        ({"--base": "timm:no_such_model"}, 2, "no_such_model"),
        ({"--base": "torch:resnet"}, 2, "torch"),
        ({"--base": "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=192&depth=3&num_heads=3"}, 3, ""),
        ({"--config": "nowhere.yaml"}, 3, "nowhere.yaml"),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else None,
)
def test_a_wrong_base_or_a_missing_setting(
    hydra: Case, tmp_path: Path, change: dict[str, str | None], code: int, says: str
) -> None:
    words = hydra.command()
    for option, value in change.items():
        at = words.index(option)
        words[at : at + 2] = [] if value is None else [option, value]
    result = run("convert", *words, "--to", "onnx", "-o", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert says in error_of(result)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_not_touched(hydra: Case, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        result = run("fuse", *hydra.command(), "-o", tmp_path, *extra)
        assert result.exit_code == 2
        error_of(result)
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]
    assert run("fuse", *hydra.command(), "-o", tmp_path / "keep.txt").exit_code == 2


def test_resume_continues_the_same_and_refuses_another(hydra: Case, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("fuse", *hydra.command(), "-o", folder).exit_code == 0
    made = (folder / "fused.safetensors").stat().st_mtime_ns
    assert run("fuse", *hydra.command(), "-o", folder).exit_code == 2
    assert run("convert", *hydra.command(), "-o", folder, "--to", "safetensors", "--resume").exit_code == 0
    assert (folder / "fused.safetensors").stat().st_mtime_ns == made
    other = [w if w != "3" else "2" for w in hydra.command()] + ["--set", "scale=2"]
    result = run("convert", *other, "-o", folder, "--to", "safetensors", "--resume")
    assert result.exit_code == 2
    assert "another checkpoint, base or settings" in error_of(result)


def test_tampered_weights_are_refused_by_every_later_stage(hydra: Case, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run("fuse", *hydra.command(), "-o", folder)
    run("verify", folder)
    tensors = load_file(folder / "fused.safetensors")
    tensors["blocks.1.mlp.fc2.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "fused.safetensors")
    result = run("export", folder, "--to", "onnx")
    assert result.exit_code == 1
    assert "blocks.1.mlp.fc2" in error_of(result)
    assert not (folder / "model.onnx").exists()
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "blocks.1.mlp.fc2" in error_of(result)
    assert json.loads((folder / "verification.json").read_text())["verdict"] == "wrong"
    assert run("export", folder, "--to", "onnx").exit_code == 1
    result = run("report", folder)
    assert result.exit_code == 1
    assert "blocks.1.mlp.fc2" in (folder / "report.md").read_text()


def test_a_checkpoint_that_changed_since_is_noticed(hydra: Case, tmp_path: Path) -> None:
    copy = tmp_path / "ckpt.pt"
    copy.write_bytes((hydra.folder / "ckpt.pt").read_bytes())
    words = [str(copy), *hydra.command()[1:]]
    assert run("fuse", *words, "-o", tmp_path / "out").exit_code == 0
    copy.write_bytes(copy.read_bytes() + b"\0")
    result = run("verify", tmp_path / "out")
    assert result.exit_code == 3
    assert "changed since" in error_of(result)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 3, 32, 32), np.float32),
        np.zeros((2, 3, 16, 16), np.float32),
        np.full((2, 3, 32, 32), np.nan, np.float32),
        np.zeros((2, 3, 32, 32), np.int64),
    ],
    ids=["empty", "shape", "nan", "dtype"],
)
def test_unusable_samples(hydra: Case, tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    result = run("convert", *hydra.command(), "--to", "onnx", "-o", tmp_path / "out", "--inputs", tmp_path / "x.npy")
    assert result.exit_code == 2
    assert "x.npy" in error_of(result)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    hydra: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(tensors: object, path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    result = run("fuse", *hydra.command(), "-o", tmp_path / "out")
    assert result.exit_code == 5
    assert "No space left on device" in error_of(result)
    assert list((tmp_path / "out").iterdir()) == []


def test_control_characters_of_a_checkpoint_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "blocks.0.\x1b[31mattn.hydra_proj_par"
    tensors = {f"{evil}.{part}_proj.{end}": torch.ones(2, 2) for part in ("down", "up") for end in ("weight", "bias")}
    torch.save(tensors, tmp_path / "ckpt.pt")
    assert "\x1b" not in run("inspect", tmp_path / "ckpt.pt", "--set", "scale=1").output
    assert "\x1b" not in run("fuse", tmp_path / "ckpt.pt", "--set", "scale=1", "--base", "timm:\x1b[31m").output


def test_overwrite_leaves_nothing_of_the_former_weights(hydra: Case, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("convert", *hydra.command(), "--to", "safetensors", "-o", folder).exit_code == 0
    (folder / "model.engine").write_bytes(b"an engine of the former weights")
    assert run("fuse", *hydra.command(), "-o", folder, "--overwrite").exit_code == 0
    assert {p.name for p in folder.iterdir()} == {"fused.json", "fused.safetensors"}


def test_a_target_that_failed_is_in_the_report_and_in_junit(
    hydra: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam_export.errors import ExportError
    from reparam_export.exporters import onnx

    def refuse(*args: object, **kwargs: object) -> None:
        raise ExportError("torch.onnx refuses it")

    monkeypatch.setattr(onnx, "write", refuse)
    folder = tmp_path / "out"
    result = run("convert", *hydra.command(), "--to", "onnx", "--to", "safetensors", "-o", folder)
    assert result.exit_code == 5
    assert "torch.onnx refuses it" in (folder / "report.md").read_text()
    assert "<failure" in (folder / "junit.xml").read_text()
    assert run("report", folder).exit_code == 1
    monkeypatch.undo()
    assert run("export", folder, "--to", "onnx", "--batch", "1:1:2").exit_code == 0
    assert run("report", folder).exit_code == 0
    assert "<failure" not in (folder / "junit.xml").read_text()


def test_a_fault_of_ours_is_no_verdict(hydra: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import reparam_export.fusion

    monkeypatch.setattr(reparam_export.fusion, "own_state", None)
    result = run("fuse", *hydra.command(), "-o", tmp_path / "out")
    assert result.exit_code == 70
    assert "internal error" in result.stderr


def test_a_report_does_not_vouch_for_files_that_were_changed(hydra: Case, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("convert", *hydra.command(), "--to", "onnx", "-o", folder).exit_code == 0
    assert run("report", folder).exit_code == 0
    model = folder / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = run("report", folder)
    assert result.exit_code == 1
    assert "model.onnx is not the file that was exported" in (folder / "report.md").read_text().replace("&#46;", ".")
    model.write_bytes(whole)
    tensors = load_file(folder / "fused.safetensors")
    tensors["head.bias"][0] += 1
    save_file(tensors, folder / "fused.safetensors")
    assert run("report", folder).exit_code == 1
    assert "does not hold the weights that were proven" in (folder / "report.md").read_text()


def loads_in_no_library(folder: Path) -> bool:
    """No file in the folder, however deep, has a name that transformers, safetensors, onnxruntime or TensorRT is given."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any(file.name.endswith(".refuted") for file in files)
    return not any(
        file.suffix in (".safetensors", ".onnx", ".engine", ".bin") or file.name == "config.json" for file in files
    )


DIGITS = "1" * 4000


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_what_a_file_says_cannot_fill_the_terminal(flag: list[str], tmp_path: Path) -> None:
    pair = {"x.lora_a": torch.ones(6, 2), "x.lora_b": torch.ones(2, 8)}
    for number, model in enumerate(("m" * 100_000, "m " * 50_000, "m\n" * 50_000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(pair, folder / "adapters.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": 2}, "model": model}))
        result = run("fuse", folder, "-o", tmp_path / "out", *flag)
        assert result.exit_code == 3
        assert "no usable folder or hub id" in result.stderr
        assert len(result.output) < 3000
    name = f"layers.{DIGITS}.attn.q_proj"
    save_file(
        {f"{name}.lora_a.weight": torch.ones(2, 6), f"{name}.lora_b.weight": torch.ones(8, 2)},
        tmp_path / "x.safetensors",
    )
    base = own_model(tmp_path, "self.fc = Linear(6, 8)", "self.fc(x)")
    more = ["--set", "lora_alpha=4", "--set", "model_type=qwen", "--base", base, "--input", "x=batch,6:float32"]
    for words in (
        ["fuse", tmp_path / "x.safetensors", *more, "-o", tmp_path / "out"],
        ["inspect", tmp_path / "x.safetensors", *more[:4]],
    ):
        result = run(*words, *flag)
        assert result.exit_code == (3 if words[0] == "fuse" else 0)
        shown = result.output if words[0] == "fuse" or not flag else ""  # as JSON, for a program, it is there whole
        assert len(shown) < 4000
        assert DIGITS[:150] in result.output
        if words[0] == "fuse":
            assert "more than" not in result.stderr
            assert "characters more" in result.stderr


def test_links_among_refuted_files_are_moved_and_not_followed(tmp_path: Path) -> None:
    """Somebody's own folder stands behind ``hf``: nothing of it is renamed or removed."""
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    out.mkdir()
    for name in ("model.safetensors", "notes.refuted"):
        (real / name).write_text(name)
    (out / "hf").symlink_to(real)
    assert set_aside(out) == ["hf.refuted"]
    assert put_back(out)
    assert (out / "hf").is_symlink()
    set_aside(out)
    (out / "hf").mkdir()  # made anew
    (out / "hf" / "new").write_text("new")
    assert put_back(out)
    assert (out / "hf" / "new").is_file()
    assert not (out / "hf.refuted").is_symlink()
    shutil.rmtree(out / "hf")
    (out / "hf.refuted").mkdir()
    (out / "hf").symlink_to(tmp_path / "gone")  # a link to what is not there yet keeps its place, too
    assert put_back(out)
    assert (out / "hf").is_symlink()
    assert not (out / "hf.refuted").exists()
    assert sorted(p.name for p in real.iterdir()) == ["model.safetensors", "notes.refuted"]


def test_a_refuted_model_is_set_aside_until_it_is_proven(hydra: Case, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("convert", *hydra.command(), "--to", "onnx", "-o", folder, "--batch", "1:1:2").exit_code == 0
    whole = load_file(folder / "fused.safetensors")
    save_file(whole | {"head.bias": whole["head.bias"] + 1}, folder / "fused.safetensors")
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "set aside: fused.safetensors.refuted" in error_of(result)
    assert loads_in_no_library(folder)
    assert json.loads((folder / "verification.json").read_text())["verdict"] == "wrong"
    assert run("export", folder, "--to", "safetensors").exit_code == 1
    assert run("compare", folder, folder).exit_code == 1
    assert run("verify", folder, "--inputs", tmp_path / "none.npy").exit_code == 2
    assert loads_in_no_library(folder)  # nothing was decided
    save_file(whole, folder / "fused.safetensors.refuted")
    assert run("verify", folder).exit_code == 0
    assert (folder / "model.onnx").is_file()
    assert not list(folder.glob("*.refuted"))
    assert run("report", folder).exit_code == 0


def test_a_streamed_folder_that_is_refuted_is_none_that_transformers_loads(tmp_path: Path) -> None:
    from streaming.models import llama, lora
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base")
    words = ("convert", lora(tmp_path / "adapter", base), "--to", "safetensors", "-o", tmp_path / "out")
    assert run(*words).exit_code == 0
    file = tmp_path / "out" / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, file, {"format": "pt"})
    result = run("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert "up_proj.weight is not the tensor that was proven: [3, 5]" in error_of(result)
    assert loads_in_no_library(tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf.refuted")
    assert run("report", tmp_path / "out").exit_code == 1
    assert "hf.refuted was set aside" in (tmp_path / "out" / "report.md").read_text().replace("&#46;", ".")
    assert run(*words, "--overwrite").exit_code == 0
    assert not list((tmp_path / "out").glob("*.refuted"))


def test_a_model_that_convert_refutes_leaves_the_evidence_and_nothing_to_load(
    hydra: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam_export import fusion

    true = fusion.fold_site

    def off(*given: Any) -> Any:
        new, moved, kept = true(*given)
        return {name: tensor * (1 + 1e-3) for name, tensor in new.items()}, moved, kept

    monkeypatch.setattr(fusion, "fold_site", off)
    result = run("convert", *hydra.command(), "--to", "onnx", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert loads_in_no_library(tmp_path / "out")
    assert {"fused.json", "verification.json", "report.html", "report.md"} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    assert "is out" not in result.stdout
    assert "the result is" not in result.stdout


def test_no_result_is_named_before_there_is_one(tmp_path: Path) -> None:
    from streaming.models import llama, lora

    base = llama(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", base)
    result = run("fuse", adapter, "--adapter", adapter, "-o", tmp_path / "out")
    lines = result.stdout.splitlines()
    said = [number for number, line in enumerate(lines) if "fused.safetensors" in line]
    assert "folded in memory" in result.stdout
    assert said == [len(lines) - 1]
