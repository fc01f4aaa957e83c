"""Every file that people have folds into the model that its own library runs unfused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_the_wild import WILD
from in_the_wild.folders import tokens_added
from in_the_wild.made import ADAPTER, Wild, adapted, answers, language_model, saved
from in_the_wild.names import seeing
from in_the_wild.refused import REFUSED, Refused
from safetensors.torch import load_file, save_file

import reparam_export as rx
from reparam_export.assembly import base_of, settled

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("wild", WILD, ids=[f"{wild.name} ({wild.who})" for wild in WILD])
def test_it_is_the_model_that_its_own_library_runs(wild: Wild, tmp_path: Path) -> None:
    made = wild.make(tmp_path)
    checkpoint = rx.read(made.path, **made.options)
    proven = rx.verify(checkpoint, rx.fuse(checkpoint), count=2)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in made.inputs.items()}
    largest = float(made.expected.abs().max())
    assert float((answers(proven.module(), **inputs) - made.expected).abs().max()) < 1e-5 * largest
    without = answers(base_of(settled(checkpoint)).build()[0], **inputs)
    assert float((without - made.expected).abs().max()) > 1e-2 * largest  # the adapter matters
    (heard,) = proven.certificate.witness
    if wild.witness:
        assert heard.who == wild.witness
        assert heard.of_layers >= heard.layers > 0
        assert not heard.differences
    else:
        assert heard.absent


@pytest.mark.parametrize("refused", REFUSED, ids=[f"{refused.name} ({refused.who})" for refused in REFUSED])
def test_what_cannot_be_folded_is_said_to_be_that(refused: Refused, tmp_path: Path) -> None:
    path, options = refused.make(tmp_path)
    with pytest.raises(refused.error, match=refused.says):
        rx.fuse(rx.read(path, **options))


def test_a_state_dict_that_was_saved_merged_is_told_from_its_base(tmp_path: Path) -> None:
    base = saved(language_model(), tmp_path / "base")
    model = adapted(language_model(), base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    model.merge_adapter()
    torch.save(model.state_dict(), tmp_path / "merged.pt")
    given = {"base": f"hf:{base}", "config": tmp_path / "adapter" / "adapter_config.json"}
    assert rx.fuse(rx.read(tmp_path / "plain.pt", **given)).changed
    with pytest.raises(rx.errors.TensorMismatchError, match=r"4 of 4 parameters differ.*merged"):
        rx.fuse(rx.read(tmp_path / "merged.pt", **given))


def test_peft_bears_witness_for_a_table_with_added_tokens(tmp_path: Path) -> None:
    base, model = saved(language_model(), tmp_path / "base"), language_model()
    model.resize_token_embeddings(101, mean_resizing=False)
    adapted(model, base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    checkpoint = rx.read(tmp_path / "adapter")
    (heard,) = rx.verify(checkpoint, rx.fuse(checkpoint), count=2, witness="required").certificate.witness
    assert heard.outputs > 0


def test_one_module_under_its_old_and_its_new_name_is_two_adapters(tmp_path: Path) -> None:
    base = saved(seeing(), tmp_path / "base")
    adapted(seeing(), base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / ADAPTER
    tensors = load_file(file)
    inner = ("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    save_file(tensors | {name.replace(*inner): 2 * tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(rx.errors.TensorMismatchError, match="are both model"):
        rx.fuse(rx.read(tmp_path / "adapter"))


class Twins(torch.nn.Module):
    """Has modules of the names that a wrapper would give, and of those without."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = torch.nn.Linear(6, 6)
        self.module = torch.nn.ModuleDict({"enc": torch.nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module["enc"](self.enc(x))  # type: ignore[no-any-return]


def twins() -> Twins:
    torch.manual_seed(2)
    return Twins()


def test_a_base_with_modules_as_wrappers_name_them_is_asked_about(tmp_path: Path) -> None:
    torch.save({"module.enc.lora_A": torch.randn(2, 6), "module.enc.lora_B": torch.randn(6, 2)}, tmp_path / "lora.pt")
    given: dict[str, Any] = {
        "base": f"py:{__file__}:twins",
        "inputs": ["x=batch,6"],
        "settings": {"lora_alpha": 3},
    }
    with pytest.raises(rx.errors.TensorMismatchError, match="--rename =module"):
        rx.fuse(rx.read(tmp_path / "lora.pt", **given))
    assert rx.fuse(rx.read(tmp_path / "lora.pt", renames=["=module"], **given)).changed == ("module.enc.weight",)
    assert rx.fuse(rx.read(tmp_path / "lora.pt", renames=["enc=enc"], **given)).changed == ("enc.weight",)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_added_tokens_and_a_head_of_its_own_is_exported(tied: bool, tmp_path: Path) -> None:
    made = tokens_added(tied)(tmp_path)
    checkpoint = rx.read(made.path)
    model = rx.verify(checkpoint, rx.fuse(checkpoint), count=2)
    assert rx.export(model, "onnx", tmp_path / "out", batch=(1, 2, 2)).ran


def test_a_weight_below_an_adapter_under_its_plain_name_is_refused(tmp_path: Path) -> None:
    """peft's loader passes it over: its own model is that of the base's weight."""
    base = saved(language_model(), tmp_path / "base")
    adapted(language_model(), base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / ADAPTER
    name = "base_model.model.model.layers.0.self_attn.q_proj.weight"
    save_file(load_file(file) | {name: torch.randn(32, 32)}, file)
    with pytest.raises(rx.errors.TensorMismatchError, match="its loader passes this one over"):
        rx.read(tmp_path / "adapter")
    assert rx.fuse(rx.read(tmp_path / "adapter", drop=[name])).changed
