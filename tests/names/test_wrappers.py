"""What wrappers put into names goes, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from reparam_export.errors import CheckpointError
from reparam_export.names.wrappers import plain_names, several, unwrapped

OWN = ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.bias", "cls_token"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: f"_orig_mod.module.{n}",
        lambda n: n.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_wrapped_names_are_the_models_own(wrap) -> None:  # type: ignore[no-untyped-def]
    assert plain_names([wrap(name) for name in OWN]) == OWN


@pytest.mark.parametrize("front", ["", "module.", "_orig_mod.", "base_model.model.module."])
def test_names_of_a_peft_model(front: str) -> None:
    inner = "base_model.model." if front != "base_model.model.module." else ""
    names = [f"{front}{inner}layers.0.q_proj.lora_{part}.default.weight" for part in "AB"]
    assert plain_names(names) == [f"base_model.model.layers.0.q_proj.lora_{part}.weight" for part in "AB"]


def test_a_module_called_module_stays_where_others_have_none() -> None:
    names = ["module.fc.weight", "head.weight"]
    assert plain_names(names) == names


def test_adapters_of_any_one_name() -> None:
    names = ["l.q.lora_A.mine.weight", "l.q.lora_B.mine.weight", "l.q.lora_B.mine.bias", "e.lora_embedding_A.mine"]
    plain = ["l.q.lora_A.weight", "l.q.lora_B.weight", "l.q.lora_B.bias", "e.lora_embedding_A"]
    assert plain_names(names) == plain_names(plain) == plain
    two = [*names, "l.q.lora_A.other.weight"]
    assert plain_names(two) == two
    assert several(two) == ["mine", "other"]


def test_two_names_that_become_one_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"are both a\.weight"):
        unwrapped({"a.weight": 1, "_orig_mod.a.weight": 2}, Path("x.pt"))
