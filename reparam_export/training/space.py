"""GLoRA's search space: a candidate is one path for each layer, and its size the parameters of all its paths.

Candidates are drawn, mutated and crossed as ``EvolutionSearcher`` of the authors' ViT code does it (Chavan et al., 2023, section 3.3).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reparam_export.adapters.glora import CHOICES, Path, path_of, path_parameters
from reparam_export.errors import UsageError

Candidate = tuple[Path, ...]  # in the order of the model's layers


def choices_of(ranks: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """The paper's choices for each support, with ``LoRA`` at these ranks. Raises UsageError without a rank."""
    if not ranks or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise UsageError(f"ranks {list(ranks)!r}: expected whole numbers of at least 1")
    low_rank = tuple(f"LoRA_{rank}" for rank in dict.fromkeys(ranks))
    return {
        support: tuple(choice for name in names for choice in (low_rank if name == "LoRA" else (name,)))
        for support, names in CHOICES.items()
    }


@dataclass(frozen=True)
class Space:
    """All candidates: any of ``choices`` for each support of each layer."""

    layers: tuple[str, ...]  # names, in the order of the model's modules
    shapes: tuple[tuple[int, int], ...]  # (out, in) of each
    choices: Mapping[str, tuple[str, ...]]

    @property
    def size(self) -> int:
        """The number of candidates."""
        of_layer = 1
        for names in self.choices.values():
            of_layer *= len(names)
        return int(of_layer ** len(self.layers))

    def parameters(self, candidate: Candidate) -> int:
        """Trainable parameters of all paths together, as the authors count them: without the head."""
        return sum(path_parameters(p, *shape) for p, shape in zip(candidate, self.shapes, strict=True))

    def drawn(self, draw: random.Random) -> Candidate:
        """Every choice drawn uniformly."""
        return tuple(Path(**{s: draw.choice(names) for s, names in self.choices.items()}) for _ in self.layers)

    def mutated(self, parent: Candidate, probability: float, draw: random.Random) -> Candidate:
        """Each choice is drawn anew with this probability."""
        return tuple(
            Path(
                **{
                    support: draw.choice(names) if draw.random() < probability else getattr(path, support)
                    for support, names in self.choices.items()
                }
            )
            for path in parent
        )

    def crossed(self, one: Candidate, two: Candidate, draw: random.Random) -> Candidate:
        """Each choice from either parent."""
        return tuple(
            Path(**{support: draw.choice((getattr(a, support), getattr(b, support))) for support in self.choices})
            for a, b in zip(one, two, strict=True)
        )

    def check(self, candidate: Candidate) -> Candidate:
        """The candidate. Raises UsageError when it is not one of this space."""
        if len(candidate) != len(self.layers):
            raise UsageError(f"a candidate for {len(candidate)} layers; the supernet has {len(self.layers)}")
        for layer, path in zip(self.layers, candidate, strict=True):
            for support, choice in asdict(path).items():
                if choice not in self.choices[support]:
                    raise UsageError(
                        f"{layer}: {support}={choice!r} is not one of the supernet's choices {', '.join(self.choices[support])}"
                    )
        return candidate

    def named(self, candidate: Candidate) -> dict[str, dict[str, str]]:
        """The candidate by layer name, as ``--config`` takes it."""
        return {layer: asdict(path) for layer, path in zip(self.layers, candidate, strict=True)}


def to_dicts(candidate: Candidate) -> tuple[dict[str, str], ...]:
    """A candidate as the authors' code holds it; its ``str`` is the key of their ``vis_dict``."""
    return tuple(asdict(path) for path in candidate)


def from_dicts(dicts: Sequence[Mapping[str, Any]]) -> Candidate:
    """A candidate of the authors' code. Raises UsageError."""
    return tuple(path_of(choices) for choices in dicts)
