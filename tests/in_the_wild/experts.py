"""Mixtures of experts: on single experts as transformers 4 named them, and on the stacks of today."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from .made import ADAPTER, SCALE, Made, Wild, adapted, answers, ids, language_model, saved


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


MIXTRAL, QWEN = {"num_local_experts": 3}, {"num_experts": 3, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
GPT_OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
STACKS: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
PATTERNS = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r".*\.experts.gate_up_proj": 11}}
GATED = {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]}
EXPERTS = [
    Wild("LoRA on single experts, Mixtral", "peft on transformers 4", experts("mixtral", **MIXTRAL)),
    Wild("LoRA on single experts, Qwen3-MoE", "peft on transformers 4", experts("qwen3_moe", **QWEN)),
    Wild("LoRA on gate, up and down of experts", "peft on transformers 5", stacks("qwen3_moe", QWEN, **GATED)),
    Wild("`target_parameters` with patterns", "peft", stacks("qwen3_moe", QWEN, **STACKS, **PATTERNS)),
    Wild("`target_parameters` of gpt-oss", "peft", stacks("gpt_oss", GPT_OSS, **STACKS)),
    Wild(
        "LoRA on attention, mixture of experts", "peft", stacks("mixtral", MIXTRAL, target_modules=["q_proj", "k_proj"])
    ),
]
