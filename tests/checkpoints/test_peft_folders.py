"""PEFT folders on transformers' models as people have them, against peft's own unfused forward in float64."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft_types import quiet, shake
from torch import nn

import reparam_export as rx

IDS = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(5))


def qwen3_moe() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def made(model: transformers.PreTrainedModel, config: Any, folder: Path) -> tuple[Path, nn.Module]:
    """The base and the adapter, away from where training begins, as peft saves them; and peft's own model."""
    with quiet():
        model.save_pretrained(folder / "base")
        adapted = peft.get_peft_model(model, config)
        shake(adapted)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / "adapter")
    return folder / "adapter", adapted


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """In float64; experts one by one."""
    model = copy.deepcopy(model).double().eval()
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(own, "set_experts_implementation"):
        own.set_experts_implementation("eager")
    with torch.no_grad(), quiet():
        return model(input_ids=ids).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_patterns_that_peft_writes_for_experts_are_matched_with_the_parameter(tmp_path: Path) -> None:
    model = qwen3_moe()
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapter, adapted = made(model, config, tmp_path)
    assert re.search(r"gate_up_proj.*: 6", (adapter / "adapter_config.json").read_text())
    fused = rx.fuse(rx.read(adapter))
    plain = qwen3_moe().double()
    plain.load_state_dict({name: t.double() for name, t in fused.tensors.items()}, strict=False)
    expected = logits(adapted)
    assert distance(logits(plain), expected) < 1e-6 < 1e-2 < distance(logits(qwen3_moe()), expected)
