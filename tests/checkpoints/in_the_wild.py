"""Files that people have, rebuilt small: each made by the library that writes it, with the answers of its own unfused forward in float64.

Public reports on other projects' trackers are their pattern (wrappers' names, other versions' names, experts, models inside models,
trained tokens, shards); ``test_in_the_wild.py`` folds each, and ``python -m benchmarks.in_the_wild`` makes a table of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SCALE = {"r": 3, "lora_alpha": 5}  # no whole number, and not 1
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Made:
    """A file, how it is read, and what its own library answers to the inputs, in float64."""

    path: Path
    inputs: dict[str, torch.Tensor]
    expected: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)  # of rx.read
    model: Callable[[], Any] | None = None  # the plain model that the fused weights go into


@dataclass(frozen=True)
class Wild:
    """One kind of file. who: writes it."""

    name: str
    who: str
    make: Callable[[Path], Made]


def ids(vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(3, vocabulary, (3, 7), generator=torch.Generator().manual_seed(5))


def scrambled(model: Any, seed: int = 0, std: float = 0.2) -> Any:
    """The model with random numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)
    return model


def language_model(name: str = "llama", **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **more})
    return scrambled(transformers.AutoModelForCausalLM.from_config(config))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def adapted(model: Any, base: Path, folder: Path, **settings: Any) -> Any:
    """A LoRA of peft's on the model, random numbers in all of it, saved; the peft model in float64."""
    made = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **{**SCALE, **settings}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(folder)
    return made


@torch.no_grad()
def answers(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "set_experts_implementation"):
        inner.set_experts_implementation("eager")
    found = model.double().eval()(**inputs)
    return (found.logits if hasattr(found, "logits") else found[0]).detach()


def renamed(folder: Path, to: Path, change: Callable[[str], str]) -> Path:
    """The adapter with other names in its file."""
    to.mkdir()
    (to / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file({change(name): tensor for name, tensor in load_file(folder / ADAPTER).items()}, to / ADAPTER)
    return to


def wrapped(change: Callable[[str], str]) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        base = saved(language_model(), folder / "base")
        model = adapted(language_model(), base, folder / "plain", target_modules=["q_proj", "down_proj"])
        path = renamed(folder / "plain", folder / "adapter", change)
        return Made(path, {"input_ids": ids()}, answers(model, input_ids=ids()))

    return make


def of_the_inner_model(folder: Path) -> Made:
    """Trained on AutoModel, folded into the causal language model."""
    base, model = saved(language_model(), folder / "base"), language_model()
    adapted(model.model, base, folder / "adapter", target_modules=["q_proj", "up_proj"])
    return Made(folder / "adapter", {"input_ids": ids()}, answers(model, input_ids=ids()))


def of_the_outer_model(folder: Path) -> Made:
    """Trained on the causal language model, folded into the folder of the AutoModel."""
    whole = language_model()
    base = saved(whole.model, folder / "base")
    made = adapted(whole, base, folder / "adapter", target_modules=["q_proj", "up_proj"])
    return Made(folder / "adapter", {"input_ids": ids()}, answers(made.get_base_model().model, input_ids=ids()))


def experts(name: str, **more: Any) -> Callable[[Path], Made]:
    """Names of transformers 4: a pair for each layer of each expert."""

    def make(folder: Path) -> Made:
        base, tensors, found = saved(language_model(name, **more), folder / "base"), {}, set()
        for number, (key, weight) in enumerate(load_file(base / "model.safetensors").items()):
            if "experts" not in key and "o_proj" not in key:
                continue
            generator = torch.Generator().manual_seed(number)
            module = f"base_model.model.{key.removesuffix('.weight')}"
            found.add(module.rpartition(".")[2])
            tensors[f"{module}.lora_A.weight"] = torch.randn(3, weight.shape[1], generator=generator) * 0.3
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 3, generator=generator) * 0.3
        folder.joinpath("adapter").mkdir()
        save_file(tensors, folder / "adapter" / ADAPTER)
        config = {**SCALE, "peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": sorted(found)}
        text = json.dumps(config | {"base_model_name_or_path": str(base)})
        (folder / "adapter" / "adapter_config.json").write_text(text)
        model = peft.PeftModel.from_pretrained(language_model(name, **more), folder / "adapter")
        return Made(folder / "adapter", {"input_ids": ids()}, answers(model, input_ids=ids()))

    return make


def stacks(name: str, more: dict[str, Any], **settings: Any) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        base = saved(language_model(name, **more), folder / "base")
        model = adapted(language_model(name, **more), base, folder / "adapter", task_type="CAUSAL_LM", **settings)
        return Made(folder / "adapter", {"input_ids": ids()}, answers(model, input_ids=ids()))

    return make


def seeing() -> Any:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
    }
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(**vision, patch_size=8),
        image_token_id=1,
    )
    return scrambled(transformers.LlavaForConditionalGeneration(config))


def of_an_older_vision_language_model(folder: Path) -> Made:
    """Names of transformers before 4.52: ``language_model.model.layers``, not ``model.language_model.layers``."""
    base = saved(seeing(), folder / "base")
    model = adapted(seeing(), base, folder / "plain", target_modules=["q_proj", "down_proj"])
    inner = ("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    tower = ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model.")
    path = renamed(folder / "plain", folder / "adapter", lambda n: n.replace(*inner).replace(*tower))
    return Made(path, {"input_ids": ids()}, answers(model, input_ids=ids()))


def of_text_alone(folder: Path) -> Made:
    """Trained on the language model, folded into the vision-language model that holds it."""
    base, model = saved(seeing(), folder / "base"), seeing()
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    text.model, text.lm_head = model.model.language_model, model.lm_head
    adapted(text, base, folder / "adapter", target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    return Made(folder / "adapter", {"input_ids": ids()}, answers(model, input_ids=ids()))


def of_an_older_vision_transformer(folder: Path) -> Made:
    """``attention.attention.query`` of transformers 4, ``attention.q_proj`` today; the answers are those of peft on today's names."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    base = saved(scrambled(transformers.ViTForImageClassification(config)), folder / "base")
    model = scrambled(transformers.ViTForImageClassification(config))
    made = adapted(model, base, folder / "plain", target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])

    def older(name: str) -> str:
        name = name.replace("vit.layers.", "vit.encoder.layer.")
        return name.replace(".attention.q_proj.", ".attention.attention.query.").replace(
            ".attention.v_proj.", ".attention.attention.value."
        )

    path = renamed(folder / "plain", folder / "adapter", older)
    settings = json.loads((path / "adapter_config.json").read_text()) | {"target_modules": ["query", "value"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return Made(path, {"pixel_values": images}, answers(made, pixel_values=images.double()))


def of_a_model_with_wide_norms(folder: Path) -> Made:
    """Nemotron: norms of 1 + weight, and a partial rotary embedding."""
    base = saved(language_model("nemotron"), folder / "base")
    model = adapted(language_model("nemotron"), base, folder / "adapter", target_modules="all-linear")
    return Made(folder / "adapter", {"input_ids": ids()}, answers(model, input_ids=ids()))


def inside(layer: int, wrapper: str) -> Callable[[Path], Made]:
    """One block of the model is wrapped."""
    return wrapped(lambda name: name.replace(f"layers.{layer}.", f"layers.{layer}.{wrapper}."))


MIXTRAL, QWEN = {"num_local_experts": 3}, {"num_experts": 3, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
GPT_OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
STACKS: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
PATTERNS = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r".*\.experts.gate_up_proj": 11}}
GATED = {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]}
WILD = [
    Wild("peft folder, `module.` in front", "DataParallel, DDP", wrapped(lambda name: f"module.{name}")),
    Wild("peft folder, `_orig_mod.` inside", "torch.compile", inside(1, "_orig_mod")),
    Wild("peft folder, `_fsdp_wrapped_module.`", "FSDP", inside(0, "_fsdp_wrapped_module")),
    Wild("peft folder, `_checkpoint_wrapped_module.`", "checkpoint_wrapper", inside(0, "_checkpoint_wrapped_module")),
    Wild("peft folder, `.default.`", "state_dict()", wrapped(lambda name: name.replace(".weight", ".default.weight"))),
    Wild("peft folder of an AutoModel, on a causal LM", "peft", of_the_inner_model),
    Wild("peft folder of a causal LM, on an AutoModel", "peft", of_the_outer_model),
    Wild("LoRA on single experts, Mixtral", "peft on transformers 4", experts("mixtral", **MIXTRAL)),
    Wild("LoRA on single experts, Qwen3-MoE", "peft on transformers 4", experts("qwen3_moe", **QWEN)),
    Wild("LoRA on gate, up and down of experts", "peft on transformers 5", stacks("qwen3_moe", QWEN, **GATED)),
    Wild("`target_parameters` with patterns", "peft", stacks("qwen3_moe", QWEN, **STACKS, **PATTERNS)),
    Wild(
        "LoRA on attention, mixture of experts", "peft", stacks("mixtral", MIXTRAL, target_modules=["q_proj", "k_proj"])
    ),
    Wild("`target_parameters` of gpt-oss", "peft", stacks("gpt_oss", GPT_OSS, **STACKS)),
    Wild("vision-language model, names before 4.52", "peft on transformers 4", of_an_older_vision_language_model),
    Wild("LoRA of a language model, on a vision-language model", "peft", of_text_alone),
    Wild("ViT's `query` and `value`", "peft on transformers 4", of_an_older_vision_transformer),
    Wild("Nemotron, all linear layers", "peft", of_a_model_with_wide_norms),
]
