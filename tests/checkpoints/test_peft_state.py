"""Plain state dicts of models with peft's layers in them, each written by peft's own model and held against its unfused forward."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from torch import nn

import reparam_export as rx
from reparam_export.errors import MissingSettingError, TensorMismatchError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SIZES = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SPEC = "timm:vit_tiny_patch16_224?" + "&".join(f"{n}={v}" for n, v in SIZES.items())
TARGETS = ["qkv", "fc1", "fc2"]


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SIZES)
    return model.eval()


def trained(config: peft.PeftConfig, *more: str) -> Any:
    """A peft model whose every trained tensor has numbers that are not 0."""
    model = peft.get_peft_model(vit(), config)
    for name in more:
        model.add_adapter(name, config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad or any(mark in name for mark in ("lora_", "modules_to_save")):
            p.data += torch.randn_like(p) * 0.1
    return model.eval()


def lora(**others: Any) -> peft.LoraConfig:
    given = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "init_lora_weights": False}
    return peft.LoraConfig(**(given | others))


def error(checkpoint: rx.Checkpoint, model: Any) -> float:
    """The largest difference of the outputs of fused weights from those of peft's model, in float64."""
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = vit()
    plain.load_state_dict(dict(rx.fuse(checkpoint)))
    with torch.no_grad():
        return float((plain.double()(image) - copy.deepcopy(model).double()(image)).abs().max())


def around(kind: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    if kind == "lightning":
        named = {f"model.{n}": t for n, t in state.items()}
        return {
            "state_dict": named,
            "hyper_parameters": {"lr": 1e-3},
            "optimizer_states": [],
            "epoch": 3,
            "callbacks": {},
        }
    if kind == "parallel":
        return {f"module.{n}": t for n, t in state.items()}
    if kind == "inside another":
        return {f"encoder.backbone.{n}": t for n, t in state.items()}
    if kind == "without peft's own names":  # inject_adapter_in_model
        return {n.removeprefix("base_model.model."): t for n, t in state.items()}
    return state


@pytest.mark.parametrize("kind", ["plain", "lightning", "parallel", "inside another", "without peft's own names"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_state_dict_is_read_as_peft_runs_it_with_and_without_its_base(kind: str, whole: bool, tmp_path: Path) -> None:
    model = trained(lora(modules_to_save=["head"]))
    state = model.state_dict()
    if not whole:
        state = {n: t for n, t in state.items() if "lora_" in n or "modules_to_save" in n}
        torch.save(vit().state_dict(), tmp_path / "base.pt")
    torch.save(around(kind, state), tmp_path / "last.ckpt")
    weights = {} if whole else {"base_weights": tmp_path / "base.pt"}
    with pytest.raises(MissingSettingError, match=r"--set lora_alpha=VALUE") as caught:
        rx.read(tmp_path / "last.ckpt", SPEC, **weights)
    assert caught.value.setting == "lora_alpha"
    found = rx.read(tmp_path / "last.ckpt", SPEC, settings={"lora_alpha": 12}, **weights)
    assert found.format == "peft_state"
    assert ("the file carries its own base" in found.notes) == whole
    assert error(found, model) < 3e-6
    assert error(rx.read(tmp_path / "last.ckpt", SPEC, settings={"lora_alpha": 6}, **weights), model) > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True, use_rslora=True),
        lora(lora_bias=True, bias="all"),
        lora(
            alpha_pattern={"fc1": 20},
            rank_pattern={"blocks.1.attn.qkv": 3},
            target_modules=[*TARGETS, "patch_embed.proj"],
        ),
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["fc1", "fc2"], init_ia3_weights=False),
        peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, init_weights=False),
        peft.VeraConfig(r=3, target_modules=["fc1"], init_weights=False),
    ],
    ids=["dora", "biases", "patterns", "ia3", "loha", "vera"],
)
@pytest.mark.parametrize("beside", [True, False])
def test_the_configuration_says_everything_beside_the_file_or_given(
    config: peft.PeftConfig, beside: bool, tmp_path: Path
) -> None:
    model = trained(config)
    model.save_pretrained(tmp_path / "folder")
    place = tmp_path / "folder" if beside else tmp_path
    torch.save(around("lightning", model.state_dict()), place / "whole.ckpt")
    given = {} if beside else {"config": tmp_path / "folder" / "adapter_config.json"}
    assert error(rx.read(place / "whole.ckpt", SPEC, **given), model) < 3e-6


def test_what_lightning_knows_is_taken_and_said(tmp_path: Path) -> None:
    model = trained(lora(use_rslora=True))
    content = around("lightning", model.state_dict())
    content["hyper_parameters"] = {"lora_alpha": 12, "use_rslora": True}
    torch.save(content, tmp_path / "last.ckpt")
    found = rx.read(tmp_path / "last.ckpt", SPEC)
    assert "lora_alpha 12 from the file's hyper_parameters" in found.notes
    assert error(found, model) < 3e-6
    given = rx.read(tmp_path / "last.ckpt", SPEC, settings={"lora_alpha": 7, "use_rslora": False})
    assert given.adapters[0].params.scale == 7 / 4


def test_a_scale_of_rslora_is_had_with_the_setting_that_the_note_names(tmp_path: Path) -> None:
    model = trained(lora(use_rslora=True))
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    plain = rx.read(tmp_path / "whole.pt", SPEC, settings={"lora_alpha": 12})
    assert any("lora_alpha / r on every module" in n and "--set use_rslora=true" in n for n in plain.notes)
    assert error(plain, model) > 1e-2
    for said in (True, "true"):  # as the command line has it
        found = rx.read(tmp_path / "whole.pt", SPEC, settings={"lora_alpha": 12, "use_rslora": said})
        assert "scale lora_alpha / sqrt(r) on every module" in found.notes
        assert error(found, model) < 3e-6


def test_of_several_adapters_one_is_chosen(tmp_path: Path) -> None:
    model = trained(lora(modules_to_save=["head"]), "other")
    torch.save(model.state_dict(), tmp_path / "two.pt")
    with pytest.raises(MissingSettingError, match=r"--set adapter=default\|other"):
        rx.read(tmp_path / "two.pt", SPEC, settings={"lora_alpha": 12})
    for name in ("default", "other"):
        model.set_adapter(name)
        found = rx.read(tmp_path / "two.pt", SPEC, settings={"lora_alpha": 12, "adapter": name})
        assert error(found, model) < 3e-6


def test_an_adapter_of_another_name_is_read_with_its_whole_tensors(tmp_path: Path) -> None:
    model = peft.get_peft_model(vit(), lora(modules_to_save=["head"]), adapter_name="mine")
    torch.nn.init.normal_(model.base_model.model.head.modules_to_save["mine"].weight)
    torch.save(model.eval().state_dict(), tmp_path / "mine.pt")
    assert error(rx.read(tmp_path / "mine.pt", SPEC, settings={"lora_alpha": 12}), model) < 3e-6


def test_a_base_of_other_numbers_than_the_files_own_is_refused(tmp_path: Path) -> None:
    model = trained(lora())
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    base = vit().state_dict()
    for shift, name in ((0.0, "same.pt"), (1e-4, "other.pt")):
        torch.save(base | {"blocks.0.mlp.fc1.weight": base["blocks.0.mlp.fc1.weight"] + shift}, tmp_path / name)
    given = {"settings": {"lora_alpha": 12}}
    assert error(rx.read(tmp_path / "whole.pt", SPEC, base_weights=tmp_path / "same.pt", **given), model) < 3e-6
    with pytest.raises(TensorMismatchError, match=r"first blocks\.0\.mlp\.fc1\.weight"):
        rx.fuse(rx.read(tmp_path / "whole.pt", SPEC, base_weights=tmp_path / "other.pt", **given))


def test_tied_tensors_of_a_whole_language_model_stay_tied(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    config = LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
    trained_on = LlamaForCausalLM(config)
    trained_on.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(trained_on, lora(target_modules=["q_proj", "v_proj"]))
    torch.save(model.state_dict(), tmp_path / "model_world_size_1_rank_0.pt")
    found = rx.read(tmp_path / "model_world_size_1_rank_0.pt", f"hf:{tmp_path / 'base'}", settings={"lora_alpha": 12})
    fused = rx.fuse(found)
    assert dict(fused.aliases) == {"lm_head.weight": "model.embed_tokens.weight"}
    merged = model.double().merge_and_unload().state_dict()
    assert all(torch.allclose(t.double(), merged[n], atol=1e-6) for n, t in fused.items())


def test_a_setting_that_is_no_answer_is_refused(tmp_path: Path) -> None:
    torch.save(trained(lora()).state_dict(), tmp_path / "whole.pt")
    with pytest.raises(UsageError, match="use_rslora: expected true or false"):
        rx.read(tmp_path / "whole.pt", SPEC, settings={"lora_alpha": 12, "use_rslora": "yes"})
    (tmp_path / "adapter.json").write_text(
        json.dumps({"peft_type": "LORA", "lora_alpha": 12, "target_modules": TARGETS})
    )
    found = rx.read(tmp_path / "whole.pt", SPEC, config=tmp_path / "adapter.json", settings={"lora_alpha": 8})
    assert found.settings["lora_alpha"] == 8
    assert found.adapters[0].params.scale == 8 / 4


def test_a_loss_beside_the_model_is_left_out_by_name_and_peft_still_bears_witness(tmp_path: Path) -> None:
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora(target_modules=["q_proj"]))
    state = {f"model.{n}": t for n, t in model.state_dict().items()} | {"criterion.weight": torch.ones(5)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    given: dict[str, Any] = {"base": f"hf:{tmp_path / 'base'}", "settings": {"lora_alpha": 12}}
    with pytest.raises(TensorMismatchError, match=r"--drop '.*criterion\.weight'"):
        rx.fuse(rx.read(tmp_path / "last.ckpt", **given))
    found = rx.read(tmp_path / "last.ckpt", drop=["criterion.weight"], **given)
    (heard,) = rx.verify(found, rx.fuse(found), count=2, witness="required").certificate.witness
    assert heard.who == "peft"
