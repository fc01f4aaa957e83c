"""What lies in a folder of peft's: shards, checkpoints by number, trained tokens, another vocabulary, tied tables, a value head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from .made import ADAPTER, Made, Wild, adapted, answers, ids, language_model, saved


def with_settings(name: str = "llama", more: dict[str, Any] | None = None, **settings: Any) -> Callable[[Path], Made]:
    """A LoRA of these settings; more: of the base's configuration."""

    def make(folder: Path) -> Made:
        base = saved(language_model(name, **(more or {})), folder / "base")
        model = adapted(language_model(name, **(more or {})), base, folder / "adapter", **settings)
        return Made(folder / "adapter", {"input_ids": ids()}, answers(model, input_ids=ids()))

    return make


def in_shards(folder: Path) -> Made:
    made = with_settings(target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "norm"])(folder)
    file = folder / "adapter" / ADAPTER
    tensors = load_file(file)
    file.unlink()
    names, places = list(tensors), {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        shard = f"adapter_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "adapter" / shard)
        places |= dict.fromkeys(part, shard)
    index = json.dumps({"metadata": {}, "weight_map": places})
    file.with_name(f"{ADAPTER}.index.json").write_text(index)
    return made


def by_number(folder: Path) -> Made:
    """A trainer's folder: the state of its optimizer lies beside the adapter."""
    made = with_settings(target_modules=["k_proj", "up_proj"])(folder)
    run = folder / "run" / "checkpoint-20"
    run.parent.mkdir()
    (folder / "adapter").rename(run)
    torch.save({"state": {}, "param_groups": []}, run / "optimizer.pt")
    (run / "trainer_state.json").write_text("{}")
    return Made(run, made.inputs, made.expected)


def tokens_added(tied: bool) -> Callable[[Path], Made]:
    """Trained on 101 tokens, both tables saved, folded into the folder with 96."""

    def make(folder: Path) -> Made:
        base = saved(language_model(tie_word_embeddings=tied), folder / "base")
        model = language_model(tie_word_embeddings=tied)
        model.resize_token_embeddings(101, mean_resizing=False)
        whole = ["embed_tokens", "lm_head"]
        made = adapted(model, base, folder / "adapter", target_modules=["q_proj", "down_proj"], modules_to_save=whole)
        return Made(folder / "adapter", {"input_ids": ids(101)}, answers(made, input_ids=ids(101)))

    return make


def with_a_value_head(folder: Path) -> Made:
    """What TRL's PPO leaves: a head that the model is wanted without."""
    made = with_settings(target_modules=["q_proj"])(folder)
    file = folder / "adapter" / ADAPTER
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file(load_file(file) | head, file)
    return Made(made.path, made.inputs, made.expected, {"drop": ["v_head.*"]})


def of_another_type(config: peft.PeftConfig) -> Callable[[Path], Made]:
    """Another type of peft's, its random numbers drawn here."""

    def make(folder: Path) -> Made:
        base = saved(language_model(), folder / "base")
        model = peft.get_peft_model(language_model(), config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder / "adapter")
        again = peft.PeftModel.from_pretrained(
            language_model(), folder / "adapter"
        )  # as it is loaded, not as it was left
        return Made(folder / "adapter", {"input_ids": ids()}, answers(again, input_ids=ids()))

    return make


TABLES: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
TIED = {"tie_word_embeddings": True}
EXPERTS: dict[str, Any] = {
    "target_modules": ["embed_tokens", "v_proj"],
    "target_parameters": ["experts.gate_up_proj"],
}
QWEN = {"num_experts": 3, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
PATTERNS: dict[str, Any] = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 4}, "use_rslora": True}
FOLDERS = [
    Wild("adapter in shards with an index", "peft", in_shards),
    Wild("`checkpoint-N` of a trainer", "transformers", by_number),
    Wild("ranks and alphas by pattern, rsLoRA", "peft", with_settings(target_modules=["q_proj", "k_proj"], **PATTERNS)),
    Wild("DoRA with biases", "peft", with_settings(target_modules="all-linear", use_dora=True, bias="lora_only")),
    Wild(
        "trained tokens, tied",
        "peft",
        with_settings(more=TIED, target_modules=["q_proj"], trainable_token_indices=[4, 90]),
    ),
    Wild("tokens added, both tables saved, tied", "peft", tokens_added(tied=True)),
    Wild("tokens added, both tables saved", "peft", tokens_added(tied=False)),
    Wild("`ensure_weight_tying`", "peft", with_settings(more=TIED, ensure_weight_tying=True, **TABLES)),
    Wild("embedding and head untied by the adapter", "peft", with_settings(more=TIED, **TABLES)),
    Wild("LoRA on the embedding", "peft", with_settings(target_modules=["embed_tokens", "o_proj"])),
    Wild("LoRA on the embedding beside `target_parameters`", "peft", with_settings("qwen3_moe", QWEN, **EXPERTS)),
    Wild("value head beside a LoRA (`--drop`)", "TRL", with_a_value_head),
    Wild(
        "HiRA with a `rank_pattern`",
        "peft",
        of_another_type(peft.HiraConfig(r=3, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"])),
    ),
    Wild(
        "VB-LoRA, `save_only_topk_weights`",
        "peft",
        of_another_type(
            peft.VBLoRAConfig(
                r=2, num_vectors=9, vector_length=4, topk=2, save_only_topk_weights=True, target_modules=["q_proj"]
            )
        ),
    ),
]
