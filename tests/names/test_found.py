"""A name of a file is one of the base's, in one way, or it is named with the ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from reparam_export.errors import TensorMismatchError, UsageError
from reparam_export.names import Own, Place
from reparam_export.names.found import read_names, renamed
from reparam_export.names.underscored import read_underscored

FILE = Path("adapter.pt")


def own(*names: str, **files: Place) -> Own:
    return Own(tuple(n.removesuffix(".weight") for n in names), dict.fromkeys(names, (2, 2)), files)


def read(names: list[str], base: Own) -> list[str]:
    return [place.tensor for place in read_names(names, base, FILE).places.values()]


LANGUAGE = [f"model.layers.{i}.q.weight" for i in range(2)]
NESTED = [f"model.language_model.layers.{i}.q.weight" for i in range(2)]
VISION = [f"model.vision_tower.layers.{i}.q.weight" for i in range(2)]
BARE = [f"layers.{i}.q.weight" for i in range(2)]


@pytest.mark.parametrize(
    ("given", "base"),
    [
        (LANGUAGE, LANGUAGE),
        (BARE, LANGUAGE),
        (LANGUAGE, BARE),
        (LANGUAGE, NESTED),
        (NESTED, LANGUAGE),
        (BARE, NESTED),
        (["blocks.0.fc.weight", "head.weight"], ["net.blocks.0.fc.weight", "net.head.weight"]),
        (["model.blocks.0.fc.weight", "model.head.weight"], ["blocks.0.fc.weight", "head.weight"]),
    ],
)
def test_parts_more_or_less_at_one_place(given: list[str], base: list[str]) -> None:
    assert read(given, own(*base, "other.bias")) == base


def test_the_bases_own_names_go_first() -> None:
    base = own(*LANGUAGE, *(f"model.{name}" for name in LANGUAGE))
    reading = read_names(LANGUAGE, base, FILE)
    assert [p.tensor for p in reading.places.values()] == LANGUAGE
    assert reading.said == ""


def test_what_could_be_two_modules_is_refused_with_both() -> None:
    with pytest.raises(
        TensorMismatchError, match=r"could be each of .*language_model.*vision_tower.*--rename"
    ) as error:
        read(BARE, own(*NESTED, *VISION))
    assert set(error.value.found) == {NESTED[0], VISION[0]}  # type: ignore[arg-type]


def test_a_rename_decides(tmp_path: Path) -> None:
    now = renamed(BARE, ["layers=model.vision_tower.layers"], FILE)
    assert read(list(now.values()), own(*NESTED, *VISION)) == VISION


@pytest.mark.parametrize(
    ("names", "base"),
    [
        (["encoder.head.weight"], ["decoder.head.weight"]),  # another module, not the same one elsewhere
        (["layers.0.q.weight", "layers.9.q.weight"], LANGUAGE),  # one of them is not there
        (["q.weight"], ["q.bias"]),
    ],
)
def test_other_names_are_refused(names: list[str], base: list[str]) -> None:
    with pytest.raises(TensorMismatchError, match="does not have"):
        read(names, own(*base))


@pytest.mark.parametrize("text", ["", "=", "a", "nothing=b", "a b=c", "q=../x y"])
def test_renames_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError, match="--rename"):
        renamed(BARE, [text], FILE)


def test_two_models_of_one_file_are_not_one_model_of_the_base() -> None:
    one = own("layers.0.q.weight", "layers.1.q.weight")
    with pytest.raises(TensorMismatchError, match="--set part="):
        read_underscored(["lora_te1_layers_0_q", "lora_te2_layers_1_q"], one, FILE)
    both = own("te.layers.0.q.weight", "te2.layers.1.q.weight")
    assert read_underscored(["lora_te1_layers_0_q", "lora_te2_layers_1_q"], both, FILE).places.keys()


def test_a_rename_to_the_same_name_says_that_it_is_meant_so() -> None:
    assert list(renamed(BARE, ["layers=layers"], FILE).values()) == BARE


def test_renames_take_whole_parts_in_order() -> None:
    names = ["layers.1.q.weight", "layers.10.q.weight"]
    assert list(renamed(names, ["layers.1=blocks.1"], FILE).values()) == ["blocks.1.q.weight", "layers.10.q.weight"]
    assert list(renamed(names, ["=net", "net.layers="], FILE).values()) == ["1.q.weight", "10.q.weight"]


def test_a_model_inside_the_base_by_names_with_underscores() -> None:
    modules = ["net.down.0.attn.to_q", "net.down.0.attn.to_v"]
    base = own(*(f"{module}.weight" for module in modules), "other.fc.weight")
    stems = [f"lora_unet_{module.removeprefix('net.').replace('.', '_')}" for module in modules]
    assert [p.module for p in read_underscored(stems, base, FILE).places.values()] == modules
    with pytest.raises(TensorMismatchError, match="names no module"):
        read_underscored([*stems, "lora_unet_up_0"], base, FILE)
