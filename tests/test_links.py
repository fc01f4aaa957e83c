"""An output folder may come from anywhere: links in it are not followed to files elsewhere, and bombs are not unpacked."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import Case
from safetensors.torch import save_file
from test_cli import error_of, run

import reparam_export as rx
from reparam_export.errors import CheckpointError, UsageError
from reparam_export.files import remove, replace_file
from reparam_export.streaming.staging import former, settle


def test_a_temporary_file_is_never_one_that_is_there(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    for name in (".x.json.partial", "x.json"):
        (tmp_path / "out" / name).symlink_to(victim)
    replace_file(tmp_path / "out" / "x.json", lambda path: path.write_text("new"))
    assert victim.read_text() == "mine"
    assert (tmp_path / "out" / "x.json").read_text() == "new"
    assert not (tmp_path / "out" / "x.json").is_symlink()
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out" / "x.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_of_a_write_that_fails_nothing_is_left(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        replace_file(tmp_path / "x.json", fails)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_goes_with_the_former_result(tmp_path: Path) -> None:
    (tmp_path / ".verification.json.abc.partial").write_text("half")
    assert [path.name for path in former(tmp_path)] == [".verification.json.abc.partial"]


def test_of_a_link_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    remove(tmp_path / "link")
    remove(tmp_path / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    remove(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inner", [False, True])
def test_a_place_of_work_that_is_a_link_is_refused(inner: bool, tmp_path: Path) -> None:
    (tmp_path / "mine" / "hf").mkdir(parents=True)
    (tmp_path / "mine" / "hf" / "thesis.txt").write_text("mine")
    (tmp_path / "mine" / "fused.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    if inner:
        (out / ".fuse").mkdir()
        (out / ".fuse" / "fused.json").write_text("{}")
        (out / ".fuse" / "hf").symlink_to(tmp_path / "mine" / "hf")
    else:
        (out / ".fuse").symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="is a link to"):
        settle(out)
    assert (tmp_path / "mine" / "hf" / "thesis.txt").read_text() == "mine"


def test_a_result_that_is_a_link_is_replaced(hydra: Case, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    assert run("fuse", *hydra.command(), "-o", out).exit_code == 0
    (out / "hf").symlink_to(tmp_path / "mine")
    assert run("fuse", *hydra.command(), "-o", out, "--overwrite").exit_code == 0
    assert not (out / "hf").is_symlink()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_an_archive_is_not_unpacked_to_pass_over_a_file(tmp_path: Path) -> None:
    size = 1 << 26
    with gzip.open(tmp_path / "bomb.nemo", "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("junk")
        entry.size = size
        archive.addfile(entry, io.BytesIO(bytes(size)))
    with pytest.raises(CheckpointError, match="far more than weights do"):
        rx.read(tmp_path / "bomb.nemo", inspecting=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_an_adapter_of_8_bits_is_one_error(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {f"base_model.model.fc.lora_{x}.weight": torch.ones(4, 4).to(dtype) for x in "AB"}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["fc"]}'
    )
    result = run("inspect", tmp_path)
    assert result.exit_code in (3, 4), result.output
    assert "Traceback" not in error_of(result)
