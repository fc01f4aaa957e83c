"""Names in a file that are not the base's own: what wrappers add, models inside models, older versions of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from .made import SMALL, Made, Wild, adapted, answers, ids, language_model, renamed, saved, scrambled


def wrapped(change: Callable[[str], str]) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        base = saved(language_model(), folder / "base")
        model = adapted(language_model(), base, folder / "plain", target_modules=["q_proj", "down_proj"])
        path = renamed(folder / "plain", folder / "adapter", change)
        return Made(path, {"input_ids": ids()}, answers(model, input_ids=ids()))

    return make


def inside(layer: int, wrapper: str) -> Callable[[Path], Made]:
    """One block of the model is wrapped."""
    return wrapped(lambda name: name.replace(f"layers.{layer}.", f"layers.{layer}.{wrapper}."))


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


NAMES = [
    Wild("peft folder, `module.` in front", "DataParallel, DDP", wrapped(lambda name: f"module.{name}")),
    Wild("peft folder, `_orig_mod.` inside", "torch.compile", inside(1, "_orig_mod")),
    Wild("peft folder, `_fsdp_wrapped_module.`", "FSDP", inside(0, "_fsdp_wrapped_module")),
    Wild("peft folder, `_checkpoint_wrapped_module.`", "checkpoint_wrapper", inside(0, "_checkpoint_wrapped_module")),
    Wild("peft folder, `.default.`", "state_dict()", wrapped(lambda name: name.replace(".weight", ".default.weight"))),
    Wild("peft folder of an AutoModel, on a causal LM", "peft", of_the_inner_model),
    Wild("peft folder of a causal LM, on an AutoModel", "peft", of_the_outer_model),
    Wild("vision-language model, names before 4.52", "peft on transformers 4", of_an_older_vision_language_model),
    Wild("LoRA of a language model, on a vision-language model", "peft", of_text_alone),
    Wild("ViT's `query` and `value`", "peft on transformers 4", of_an_older_vision_transformer),
]
