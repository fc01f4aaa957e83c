"""What a file that people have is here, and what the modules beside this one make theirs with."""

from __future__ import annotations

import inspect
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


@dataclass(frozen=True)
class Wild:
    """One kind of file. who: writes it. witness: the library that reads it a second time; judge: what gave the expected answers."""

    name: str
    who: str
    make: Callable[[Path], Made]
    witness: str = "peft"
    judge: str = "its own library"


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
    named = set(inputs) <= set(inspect.signature(inner.forward).parameters)
    found = model.double().eval()(**inputs) if named else model.double().eval()(*inputs.values())
    if isinstance(found, torch.Tensor):
        return found.detach()
    return (found.logits if hasattr(found, "logits") else found[0]).detach()


def renamed(folder: Path, to: Path, change: Callable[[str], str]) -> Path:
    """The adapter with other names in its file."""
    to.mkdir()
    (to / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file({change(name): tensor for name, tensor in load_file(folder / ADAPTER).items()}, to / ADAPTER)
    return to
