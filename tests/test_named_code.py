"""A folder may come from anywhere: code that it names is not run unless the command line names it too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_cli import error_of, run

import reparam_export as rx
from reparam_export.errors import UsageError

NET = """
import pathlib
import torch
pathlib.Path({mark!r}).touch()
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).eval()
def another():
    return net()
"""


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, str, Path]:
    """A folder that was made on a base of the user's own, the base, and the file that the base's code writes to."""
    torch.manual_seed(1)
    sizes = {"0.lora_A": (2, 6), "0.lora_B": (8, 2), "2.lora_A": (2, 8), "2.lora_B": (4, 2)}
    torch.save({name: torch.randn(size) for name, size in sizes.items()}, tmp_path / "lora.pt")
    (tmp_path / "net.py").write_text(NET.format(mark=str(tmp_path / "mark")))
    torch.save(
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).state_dict(),
        tmp_path / "base.pt",
    )
    base = f"py:{tmp_path / 'net.py'}:net"
    given = ["--base", base, "--base-weights", tmp_path / "base.pt", "--input", "x=batch,6", "--set", "lora_alpha=3"]
    result = run("convert", tmp_path / "lora.pt", *given, "--to", "onnx", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    return tmp_path / "out", base, tmp_path / "mark"


@pytest.mark.parametrize(
    "command", [["verify"], ["export", "--to", "onnx"], ["bench", "--max-time", "1s"]], ids=lambda c: c[0]
)
def test_it_is_not_run(command: list[str], made: tuple[Path, str, Path]) -> None:
    folder, base, mark = made
    mark.unlink()
    result = run(command[0], folder, *command[1:])
    assert result.exit_code == 2
    assert f"say it again: --base {base}" in error_of(result)
    result = run(command[0], folder, *command[1:], "--base", base.replace(":net", ":another"))
    assert result.exit_code == 2
    assert "is another" in error_of(result)
    assert not mark.exists()


def test_it_is_run_where_the_command_line_names_it(
    made: tuple[Path, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base, mark = made
    mark.unlink()
    monkeypatch.chdir(folder.parent)
    assert run("verify", folder, "--base", "py:net.py:net").exit_code == 0
    assert run("export", folder, "--to", "onnx", "--base", base).exit_code == 0
    assert mark.exists()


def test_a_folder_that_is_changed_to_name_code_does_not_run_it(made: tuple[Path, str, Path], tmp_path: Path) -> None:
    folder, _, mark = made
    (tmp_path / "evil.py").write_text(NET.format(mark=str(tmp_path / "evil")))
    record = json.loads((folder / "fused.json").read_text())
    record["recipe"]["base"] = f"py:{tmp_path / 'evil.py'}:net"
    (folder / "fused.json").write_text(json.dumps(record))
    mark.unlink()
    for command in (["verify"], ["export", "--to", "onnx"], ["bench", "--max-time", "1s"]):
        assert run(command[0], folder, *command[1:]).exit_code == 2
    with pytest.raises(UsageError, match="does not name code"):
        rx.bench(folder)
    assert run("report", folder).exit_code in (0, 1, 3)
    assert not (tmp_path / "evil").exists()
    assert not mark.exists()


def test_two_such_folders_are_compared_without_their_code(made: tuple[Path, str, Path]) -> None:
    folder, _, mark = made
    mark.unlink()
    found = rx.compare(folder, folder, latency=False)
    assert not found.weights
    assert not mark.exists()
