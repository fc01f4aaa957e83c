"""Tiny Hugging Face folders and adapters on them, made on the fly."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reparam_export.adapters import kind
from reparam_export.affine import Affine, map_tensors
from reparam_export.checkpoints import NATIVE
from reparam_export.checkpoints.native import to_plain

HIDDEN, INNER, HEADS, KV, VOCAB = 48, 80, 3, 1, 60
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KV, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_state(layers: int, dtype: torch.dtype, *, tied: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    state = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN)}
    for i in range(layers):
        state |= {f"model.layers.{i}.{name}.weight": draw(*shape) for name, shape in SHAPES.items()}
        state |= {
            f"model.layers.{i}.{name}.weight": (1 + draw(HIDDEN).float()).to(dtype)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    state["model.norm.weight"] = (1 + draw(HIDDEN).float()).to(dtype)
    return state if tied else state | {"lm_head.weight": draw(VOCAB, HIDDEN)}


def llama(
    folder: Path,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    tied: bool = False,
    pickled: bool = False,
) -> Path:
    """A LLaMA folder as save_pretrained writes it: one file, or shards with their index; ``pickled``: .bin files."""
    folder.mkdir(parents=True)
    state = llama_state(layers, dtype, tied=tied)
    config = CONFIG | {
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (folder / "modeling_own.py").write_text("raise SystemExit('code of a model must not travel')")
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = list(state)
    where = {n: f"{stem}-{1 + i * shards // len(names):05d}-of-{shards:05d}.{end}" for i, n in enumerate(names)}
    if shards == 1:
        where = dict.fromkeys(names, f"{stem}.{end}")
    else:
        total = sum(t.numel() * t.element_size() for t in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    for file in set(where.values()):
        tensors = {n: t for n, t in state.items() if where[n] == file}
        if pickled:
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, {"format": "pt"})
    return folder


def lora(folder: Path, base: Path, *, modules: Sequence[str] | None = None, rank: int = 4, **config: Any) -> Path:
    """A PEFT LoRA folder on every linear layer, or on some; scale 2.5, the changes about a tenth of the weights."""
    folder.mkdir(parents=True)
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    names = modules if modules is not None else [f"model.layers.{i}.{name}" for i in range(layers) for name in SHAPES]
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name in names:
        if name == "model.embed_tokens":
            tensors[f"base_model.model.{name}.lora_embedding_A"] = torch.randn(rank, VOCAB, generator=generator) * 0.1
            tensors[f"base_model.model.{name}.lora_embedding_B"] = torch.randn(HIDDEN, rank, generator=generator) * 0.02
            continue
        out, inn = (VOCAB, HIDDEN) if name == "lm_head" else SHAPES[name.split(".", 3)[3]]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inn, generator=generator) * inn**-0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2.5 * rank,
        "target_modules": sorted({n.rsplit(".", 1)[-1] for n in names}),
        "base_model_name_or_path": str(base),
        "bias": "none",
    }
    if modules is not None:  # these and no others: peft takes a text as a pattern of the whole name
        content["target_modules"] = "|".join(re.escape(name) for name in modules)
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return folder


def native(
    file: Path, base: Path, name: str, modules: Sequence[str], scale: float = 0.05, **replaced: torch.Tensor
) -> Path:
    """A checkpoint of our own format with one kind of adapter on some modules, small beside the weights."""
    adapters = []
    for seed, module in enumerate(modules):
        out, inn = SHAPES[module.split(".", 3)[3]]
        params = kind(name).example(seed, Affine(torch.zeros(out, inn, dtype=torch.float64)))
        params = map_tensors(params, lambda t: (t * scale).float())
        adapters.append({"module": module, "kind": name, "rows": None, "params": to_plain(params)})
    torch.save({"format": NATIVE, "base": f"hf:{base}", "adapters": adapters, "replaced": dict(replaced)}, file)
    return file
