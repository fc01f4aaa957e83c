"""Greedy text of the unfused torch model, and what float64 thinks of the first token that another runtime chooses differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reparam_export.verification.outputs import run

if TYPE_CHECKING:
    from torch import nn

    from reparam_export.verification import VerifiedModel

NEW_TOKENS = 24
PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "In the morning I like to", "The three primary colours are",
    "A good book should", "To make bread, first", "The largest planet in the solar system is", "She opened the door and",
    "Two plus two equals", "The opposite of hot is", "Once upon a time there was", "My favourite season is", "Computers are useful because",
    "The doctor told him to", "Birds can fly because", "The recipe calls for", "On the way to school", "Plants need sunlight to",
    "The train arrived", "A triangle has",
)  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """The first token that differs. ``margin``: by how much float64 prefers one of the two; ``bound``: what rounding explains."""

    prompt: str
    position: int
    expected: int
    found: int
    margin: float
    bound: float

    @property
    def explained(self) -> bool:
        return self.margin <= self.bound

    def __str__(self) -> str:
        return (
            f"{self.prompt!r}, new token {self.position}: {self.found} instead of {self.expected}, which float64 prefers by "
            f"{self.margin:.1e} where rounding explains {self.bound:.1e}"
        )


def greedy(model: nn.Module, ids: Sequence[int], count: int, ends: set[int]) -> list[int]:
    """The next tokens of a transformers decoder, each the most likely one, by its own ``generate``; it stops after an end."""
    import torch
    from transformers import GenerationConfig

    given = torch.tensor([list(ids)])
    stop = sorted(ends) or None
    end = stop[0] if stop else None
    settings: Any = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=stop, pad_token_id=end)  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        answer = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)  # type: ignore[operator]
    return [int(token) for token in answer[0, len(ids) :]]


def ended(tokens: list[int], count: int, ends: set[int]) -> list[int]:
    """Tokens up to and with the end; genai leaves the end token out, which is put back."""
    whole = tokens if len(tokens) == count or not ends or (tokens and tokens[-1] in ends) else [*tokens, min(ends)]
    return [min(ends) if token in ends else token for token in whole]


def divergence(
    model: VerifiedModel, prompt: str, ids: Sequence[int], pair: tuple[list[int], list[int]], bound: float
) -> Divergence:
    """Where two continuations part, and what the unfused model in float64 thinks of the two tokens there."""
    import torch

    expected, found = pair
    same = next(i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
    prefix = torch.tensor([[*ids, *expected[:same]]])
    inputs = {"input_ids": prefix, "attention_mask": torch.ones_like(prefix)}
    signature = model.signature
    logits = run(model.unfused(torch.float64), signature, inputs, torch.float64)[signature.outputs.index("logits")][
        0, -1
    ]
    margin = float(logits[expected[same]] - logits[found[same]])
    return Divergence(prompt, same, expected[same], found[same], abs(margin), bound)


def end_tokens(model: nn.Module) -> set[int]:
    """The tokens that end a text."""
    configs: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    ends = [getattr(config, "eos_token_id", None) for config in configs]
    return {int(e) for end in ends if end is not None for e in (end if isinstance(end, list) else [end])}
