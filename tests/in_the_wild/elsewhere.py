"""LoRA of libraries that do not run on every machine: laid out, and judged, as their code has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from test_llm_lora import HEAD, KV_HEADS, State, llama, mlx, nemo, tune

from .made import Made, Wild, answers

IDS = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(5))


def with_weights(folder: Path, state: State) -> torch.Tensor:
    """The answers of the base with the weights that the adapted layers multiply by."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").double()
    model.load_state_dict(state)
    return answers(model, input_ids=IDS)


def of(write: Callable[[Path, State], State], file: str, **settings: Any) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        spec, base = llama(folder)
        expected = with_weights(folder, write(folder, base))
        return Made(folder / file, {"input_ids": IDS}, expected, {"base": spec, "settings": settings})

    return make


def tuned(folder: Path, base: State) -> State:
    return tune(folder, base, turned=True, magnitude=False)


CODE = "its code, written out"
ROWS = {"lora_alpha": 12, "head_dim": HEAD}
ELSEWHERE = [
    Wild("`adapters.safetensors`", "mlx-lm", of(lambda f, b: mlx(f / "adapters", b, "lora"), "adapters"), "", CODE),
    Wild("DoRA", "mlx-lm", of(lambda f, b: mlx(f / "adapters", b, "dora"), "adapters"), "", CODE),
    Wild("`adapter_0.pt`", "torchtune", of(tuned, "adapter_0.pt", model_type="llama", **ROWS), "", CODE),
    Wild(
        "packed q, k and v",
        "NeMo, Megatron",
        of(lambda f, b: nemo(f, b, "new"), "model_weights.ckpt", num_query_groups=KV_HEADS, **ROWS),
        "",
        CODE,
    ),
]
