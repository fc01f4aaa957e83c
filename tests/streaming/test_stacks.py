"""Bases whose files have other names than their model: streamed under the files' names, to the bytes of folding in memory."""

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
from reparam_export.folder import load_fused
from reparam_export.names.conversions import gathered, own_of, spread
from reparam_export.streaming import plan_of, stream

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 20, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2},  # its files hold the stacks, (in, out)
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},  # under other names
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def base_of(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    if name == "llava":
        text, vision = transformers.LlamaConfig(**SMALL), transformers.CLIPVisionConfig(**VISION)
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=63)
        model: Any = transformers.LlavaForConditionalGeneration(config)
    else:
        config = transformers.AutoConfig.for_model(name, **SMALL, **MODELS[name])
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def adapter_on(model: Any, base: Path, folder: Path, **settings: Any) -> None:
    """A folder of peft's with random numbers in all of it."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, r=2, lora_alpha=5, **settings))
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(folder)


def as_in_memory(adapter: Path, out: Path, dtype: str | None = None) -> rx.FusedWeights:
    """Stream, and hold every byte against folding in memory; the weights as a later stage reads them."""
    checkpoint = rx.read(adapter)
    record = stream(plan_of(checkpoint, dtype), out)
    assert record["witness"][0]["who"] == "peft"
    assert record["witness"][0]["settings"] > 0
    made = load_file(out / "hf" / "model.safetensors")
    expected = rx.fuse(checkpoint, dtype)
    skeleton = rx.assembly.base_of(checkpoint).skeleton()
    files = spread(expected.tensors, own_of(skeleton).files)
    assert files.keys() == made.keys()
    assert all(torch.equal(files[name], tensor) and files[name].dtype == tensor.dtype for name, tensor in made.items())
    return load_fused(out)[1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_on_stacks_of_experts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = base_of(name, tmp_path / "base", dtype)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapter_on(model, tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"], target_parameters=targets)
    weights = as_in_memory(tmp_path / "adapter", tmp_path / "out")
    memory = rx.fuse(rx.read(tmp_path / "adapter"))
    assert all(torch.equal(memory[n], t) for n, t in weights.items())
    assert set(weights.changed) == set(memory.changed)
    digest = json.loads((tmp_path / "out" / "fused.json").read_text())["weights_sha256"]
    assert weights.sha256() == digest


def test_a_streamed_mixture_is_verified_and_loads_stock(tmp_path: Path) -> None:
    model = base_of("qwen3_moe", tmp_path / "base")
    adapter_on(
        model, tmp_path / "base", tmp_path / "adapter", target_modules=["v_proj", "gate_proj", "up_proj", "down_proj"]
    )
    checkpoint = rx.read(tmp_path / "adapter")
    stream(plan_of(checkpoint), tmp_path / "out")
    checkpoint, weights = load_fused(tmp_path / "out")
    proven = rx.verify(checkpoint, weights, count=2)
    assert proven.certificate.verdict == "exact"
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for each in (theirs.get_base_model(), stock):
        each.set_experts_implementation("eager")
        with torch.no_grad():
            found.append(each.double().eval()(input_ids=ids).logits)
    assert float((found[0] - found[1]).abs().max()) < 1e-5 * float(found[0].abs().max())


def test_one_wrong_entry_of_an_expert_is_named(tmp_path: Path) -> None:
    model = base_of("mixtral", tmp_path / "base")
    adapter_on(
        model, tmp_path / "base", tmp_path / "adapter", target_modules=[], target_parameters=["experts.down_proj"]
    )
    stream(plan_of(rx.read(tmp_path / "adapter")), tmp_path / "out")
    file = tmp_path / "out" / "hf" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name][3, 4] += 1e-3
    save_file(tensors, file)
    with pytest.raises(rx.errors.EquivalenceError, match=r"experts\.2\.w2"):
        load_fused(tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_vision_language_model(dtype: str | None, tmp_path: Path) -> None:
    model = base_of("llava", tmp_path / "base")
    adapter_on(model, tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "fc1"])
    as_in_memory(tmp_path / "adapter", tmp_path / "out", dtype)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_of_a_language_model_goes_into_the_one_that_sees(task: str | None, tmp_path: Path) -> None:
    base_of("llava", tmp_path / "base")
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    adapter_on(text, tmp_path / "base", tmp_path / "adapter", target_modules=["v_proj", "down_proj"], task_type=task)
    weights = as_in_memory(tmp_path / "adapter", tmp_path / "out")
    assert all(name.startswith("model.language_model.layers.") for name in weights.changed)
    assert len(weights.changed) == 4


def test_parts_make_the_whole_again() -> None:
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model("mixtral", **SMALL, **MODELS["mixtral"])
        )
    files = own_of(skeleton).files
    state = {n: torch.randn(t.shape) for n, t in skeleton.state_dict().items()}
    again = gathered(spread(state, files), files)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], t) for n, t in state.items())
    for twice in (
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.down_proj",
    ):  # and under its name in files
        with pytest.raises(ValueError, match=r"both|whole"):
            gathered(spread(state, files) | {twice: state[twice]}, files)
    parts = spread(state, files)
    parts.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight")
    with pytest.raises(ValueError, match="do not make"):
        gathered(parts, files)
