"""Where a tensor of transformers' files lies in the model: held against transformers' own loading, and folding against peft's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reparam_export as rx
from reparam_export.names.conversions import own_of

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 3, "moe_intermediate_size": 20, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 3, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 3}),
    "granitemoe": ("GraniteMoeForCausalLM", {"num_local_experts": 3}),
}


def model_of(name: str) -> Any:
    cls, more = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **more})
    model = getattr(transformers, cls)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_files_tensor_is_the_part_of_the_model_that_its_place_says(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    files, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    with torch.device("meta"):
        places = own_of(type(model)(model.config)).files
    assert set(places) == set(files) - set(state) if name != "gpt_oss" else not places
    for key, place in places.items():
        assert place is not None
        part = state[place.tensor] if place.expert is None else state[place.tensor][place.expert]
        part = part if place.rows is None else part[slice(*place.rows)]
        assert torch.equal(files[key], part.transpose(-1, -2) if place.transposed else part), key


def per_expert(folder: Path, name: str, base: Path) -> None:
    """An adapter as transformers 4 had its names: one pair for each linear layer of each expert, and one for the router."""
    tensors, found = {}, set()
    for number, (key, weight) in enumerate(load_file(base / "model.safetensors").items()):
        if "experts" not in key and "q_proj" not in key and not key.endswith("mlp.gate.weight"):
            continue
        generator = torch.Generator().manual_seed(number)
        module = f"base_model.model.{key.removesuffix('.weight')}"
        found.add(module.rpartition(".")[2])
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 0.3,
        "target_modules": sorted(found),
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_single_experts_fold_as_peft_loads_them(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path / "base")
    per_expert(tmp_path / "adapter", name, tmp_path / "base")
    weights = rx.fuse(rx.read(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").double().eval()
    theirs.get_base_model().set_experts_implementation("eager")
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, plain = theirs(input_ids=ids).logits, model_of(name).double().eval()
        plain.set_experts_implementation("eager")
        untouched = plain(input_ids=ids).logits
        plain.load_state_dict({n: t.double() for n, t in weights.by_every_name().items()})
        found = plain(input_ids=ids).logits
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((untouched - expected).abs().max()) > 1e-2 * float(expected.abs().max())


@pytest.mark.filterwarnings("ignore")
def test_an_expert_without_its_adapter_is_missed(tmp_path: Path) -> None:
    model_of("qwen3_moe").save_pretrained(tmp_path / "base")
    per_expert(tmp_path / "adapter", "qwen3_moe", tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.1.mlp.experts.2.up_proj" not in n}, file)
    with pytest.raises(rx.errors.TensorMismatchError, match=r"experts\.2\.up_proj"):
        rx.fuse(rx.read(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore")
def test_a_vision_transformer_of_transformers_4(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    names = [f"vit.encoder.layer.{i}.attention.attention.{part}" for i in range(2) for part in ("query", "value")]
    tensors = {f"base_model.model.{n}.lora_A.weight": torch.randn(4, 32) for n in names}
    tensors |= {f"base_model.model.{n}.lora_B.weight": torch.randn(32, 4) for n in names}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["query", "value"],
        "base_model_name_or_path": str(tmp_path / "base"),
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    weights = rx.fuse(rx.read(tmp_path / "adapter"))
    for name, (ours, part) in {n: (n.replace("encoder.layer", "layers"), n.rpartition(".")[2]) for n in names}.items():
        ours = f"{ours.rpartition('.attention.')[0]}.{part[0]}_proj.weight"
        change = (
            1.5 * tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        )
        assert torch.allclose(weights[ours], model.state_dict()[ours] + change, atol=1e-5)
