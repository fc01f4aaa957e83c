"""The whole model in one file: adapters beside the base's own tensors, in what training scripts put around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, Case

import reparam_export as rx
from reparam_export.errors import MissingSettingError, TensorMismatchError, UsageError

State = dict[str, torch.Tensor]
NAMES = ("hydra_vtab", "hydra_clip", "glora_vit", "repadapter_vit", "repadapter_linear")


def whole(name: str) -> State:
    """The authors' model with its base, as its own ``state_dict()`` gives it."""
    case = CASES[name]
    base, trained = (
        torch.load(case.folder / file, weights_only=True) for file in (case.options["base_weights"], case.path)
    )
    if name == "hydra_clip":
        base = {n.replace(".c_proj.", ".ad_lin.linear."): t for n, t in base.items()}
    return {n: t.detach() for n, t in {**base, **trained}.items()}


def read(path: Path, case: Case, **others: Any) -> rx.Checkpoint:
    """With what the case is read with, but the weights of its base."""
    given = case.arguments()[1] | others
    return rx.read(path, **{n: v for n, v in given.items() if n != "base_weights" or n in others})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("around", ["nothing", "lightning", "training"])
def test_a_whole_model_is_its_own_base_and_gives_what_adapter_and_base_apart_give(
    name: str, around: str, tmp_path: Path
) -> None:
    case, state = CASES[name], whole(name)
    content: dict[str, Any] = state
    if around == "lightning" and name != "hydra_clip":  # open_clip builds from the names themselves
        content = {
            "state_dict": {f"model.{n}": t for n, t in state.items()},
            "hyper_parameters": {"lr": 1e-3},
            "epoch": 3,
        }
    if around == "training":
        content = {"model": {f"module.{n}": t for n, t in state.items()}, "optimizer": {"state": {}}, "args": None}
    torch.save(content, tmp_path / "whole.ckpt")
    found = read(tmp_path / "whole.ckpt", case)
    expected = rx.fuse(case.read())
    assert any("carries its own base" in note for note in found.notes)
    fused = rx.fuse(found)
    assert set(fused) == set(expected)
    assert all(torch.equal(fused[n], expected[n]) for n in expected)


def test_another_base_than_the_one_in_the_file_is_refused(tmp_path: Path, hydra: Case) -> None:
    torch.save(whole("hydra_vtab"), tmp_path / "whole.pt")
    base = torch.load(hydra.folder / "base.pt", weights_only=True)
    torch.save(base, tmp_path / "same.pt")
    given = read(tmp_path / "whole.pt", hydra, base_weights=tmp_path / "same.pt")
    assert rx.fuse(given).sha256() == rx.fuse(hydra.read()).sha256()
    torch.save(base | {"blocks.1.mlp.fc2.weight": base["blocks.1.mlp.fc2.weight"] + 1e-3}, tmp_path / "other.pt")
    with pytest.raises(TensorMismatchError, match=r"other numbers .* first blocks\.1\.mlp\.fc2\.weight"):
        rx.fuse(read(tmp_path / "whole.pt", hydra, base_weights=tmp_path / "other.pt"))


@pytest.mark.parametrize("average", ["state_dict_ema", "ema"])
def test_a_moving_average_beside_the_weights_is_chosen_by_name_in_every_format(
    average: str, tmp_path: Path, hydra: Case
) -> None:
    trained = torch.load(hydra.folder / hydra.path, weights_only=True)
    other = {n: 2 * t for n, t in trained.items()}
    torch.save({"state_dict": trained, average: other, "epoch": 3}, tmp_path / "both.pth.tar")
    _, given = hydra.arguments()
    with pytest.raises(MissingSettingError, match=rf"--set weights={average}\|state_dict") as caught:
        rx.read(tmp_path / "both.pth.tar", **given)
    assert caught.value.setting == "weights"
    with pytest.raises(UsageError, match="setting weights: expected"):
        rx.read(tmp_path / "both.pth.tar", **given, settings={"weights": "model"})
    torch.save(other, tmp_path / "average.pt")
    alone = {"state_dict": hydra.folder / hydra.path, average: tmp_path / "average.pt"}
    for name, file in alone.items():
        found = rx.read(tmp_path / "both.pth.tar", **given, settings={"weights": name})
        assert found.settings["weights"] == name
        assert rx.fuse(found).sha256() == rx.fuse(rx.read(file, **given)).sha256()


@pytest.mark.parametrize("around", ["lightning", "average"])
def test_the_weights_of_a_base_are_found_in_what_a_training_script_saved(
    around: str, tmp_path: Path, hydra: Case
) -> None:
    base = torch.load(hydra.folder / "base.pt", weights_only=True)
    content: dict[str, Any] = {
        "state_dict": {f"model.{n}": t for n, t in base.items()},
        "hyper_parameters": {"lr": 0.1},
    }
    if around == "average":
        content = {
            "state_dict": base,
            "optimizer": {"state": {}},
            "state_dict_ema": {n: t + 1 for n, t in base.items()},
        }
    torch.save(content, tmp_path / "base.ckpt")
    path, given = hydra.arguments()
    given["base_weights"] = tmp_path / "base.ckpt"
    if around == "average":
        with pytest.raises(MissingSettingError, match=r"--set base_weights=state_dict_ema\|state_dict"):
            rx.fuse(rx.read(path, **given))
        given["settings"] = {"base_weights": "state_dict"}
    assert rx.fuse(rx.read(path, **given)).sha256() == rx.fuse(hydra.read()).sha256()
