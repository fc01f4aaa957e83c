"""GLoRA's supernet: one set of tensors a layer, of which every training step uses one random path.

    net = supernet(model, rank=4, train="head", seed=0)
    ...                        train net.model as any other nn.Module: each forward draws a path for each layer
    net.fix(candidate)         for evaluation, for saving, or to train one path on

All paths share their weights: LoRA_k is the first k columns and rows of the tensors, vector their first column, constant their first
entry (Chavan et al., "One-for-All: Generalized LoRA", 2023, section 3.2; the authors' SuperScalableLinear).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reparam_export.adapters import glora
from reparam_export.checkpoints import check_finite, read
from reparam_export.errors import UsageError
from reparam_export.training.attach import Attached, attached_layer, attached_of, initial_of, put
from reparam_export.training.saving import attached_model
from reparam_export.training.space import Candidate, Space, choices_of
from reparam_export.training.targets import Targets, targeted, trained_modules

NOTHING = glora.Path(*["none"] * 5)


class Sampled(Attached):
    """A linear layer with all GLoRA paths: takes the one that was fixed, in training else the one that was drawn last."""

    fixed = drawn = glora.UNCHOSEN

    def params(self) -> glora.Params:
        """With the fixed path; without one, as a supernet's, which has no defined output."""
        return self._along(self.fixed)

    def forward(self, x: Tensor) -> Tensor:
        path = self.drawn if self.training and self.fixed == glora.UNCHOSEN else self.fixed
        if path == glora.UNCHOSEN:
            raise UsageError(
                "this supernet has no defined output: no candidate is fixed, and paths are drawn in training mode only, when "
                "the whole model is called; call fix(candidate), or model.train()"
            )
        y: Tensor = glora.apply(x, self.frozen(), self._along(path))
        return y

    def _along(self, path: glora.Path) -> glora.Params:
        params: glora.Params = super().params()
        return replace(params, path=path)


class Supernet:
    """A model whose GLoRA layers take a random path in each training forward, or the one that was fixed.

    model: the live nn.Module. space: all candidates. The paths are drawn when the model is called, all at once, so that they do
    not depend on the order of its layers and a forward that is computed again (checkpointing) takes the same ones.
    """

    def __init__(self, model: nn.Module, space: Space, seed: int = 0) -> None:
        self.model, self.space = model, space
        self.draw = random.Random(seed)  # its state is what a resumed training run needs to draw the same paths
        self.fixed: Candidate | None = None
        model.register_forward_pre_hook(self._before)

    def fix(self, candidate: Candidate) -> Supernet:
        """Take this path from now on, in training and evaluation. Raises UsageError when it is not in the space."""
        self.fixed = self.space.check(candidate)
        for layer, path in zip(self.layers(), candidate, strict=True):
            layer.fixed = path
        return self

    def free(self) -> Supernet:
        """Draw paths again."""
        self.fixed = None
        for layer in self.layers():
            layer.fixed = glora.UNCHOSEN
        return self

    def layers(self) -> list[Sampled]:
        """The layers, in the order of a candidate's paths."""
        return [self.model.get_submodule(name) for name in self.space.layers]  # type: ignore[misc]

    def _before(self, model: nn.Module, inputs: Any) -> None:
        if model.training and self.fixed is None:
            for layer, path in zip(self.layers(), self.space.drawn(self.draw), strict=True):
                layer.drawn = path


def supernet(
    model: nn.Module,
    targets: Targets = "glora",
    *,
    rank: int = 4,
    ranks: Sequence[int] = (),
    train: str | Sequence[str] = (),
    seed: int = 0,
    init: str = "xavier",
) -> Supernet:
    """Put all GLoRA paths on every targeted linear layer; changes ``model``.

    rank: of the shared tensors. ranks: those to choose from, none above ``rank``; default: ``rank`` alone, as in the paper.
    train: modules to train whole, by glob. seed: of the paths; the tensors are drawn from torch's global generator.
    Before training the model gives the base's outputs bit for bit, whatever the path.
    Raises UsageError, SharedWeightError.
    """
    if ranks and max(ranks) > rank:
        raise UsageError(f"ranks {list(ranks)}: the shared tensors have rank {rank}; choose a rank of {max(ranks)}")
    initial = initial_of("glora", {"rank": rank, "path": NOTHING, "init": init})
    trained = trained_modules(model, train)
    layers = targeted(model, targets)
    put(model, {name: attached_layer(model, name, "glora", initial, made=Sampled) for name in layers})
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    return as_supernet(model, ranks or (rank,), seed)


def load_supernet(
    path: str | Path, base: str | None = None, *, ranks: Sequence[int] = (), seed: int = 0, **options: Any
) -> Supernet:
    """The supernet in a file that ``save`` or the authors' code wrote (their ``.pt``, their fork's folder).

    base, options: as of ``reparam_export.read``. ranks: to choose from; default: that of the tensors.
    Raises CheckpointError and its kin, UsageError for a checkpoint of another kind.
    """
    checkpoint = read(path, base, inspecting=True, **options)  # no candidate is chosen yet
    found = {a.kind for a in checkpoint.adapters}
    if found != {"glora"}:
        raise UsageError(f"{path}: holds {', '.join(sorted(found))}; expected a GLoRA supernet")
    for missing in checkpoint.missing:
        if missing.setting != "paths":
            raise missing
    check_finite(checkpoint.path, checkpoint)
    stored = int(checkpoint.adapters[0].params.Ad.shape[1])
    adapters = tuple(replace(a, params=replace(a.params, path=NOTHING)) for a in checkpoint.adapters)
    return as_supernet(attached_model(replace(checkpoint, adapters=adapters), made=Sampled), ranks or (stored,), seed)


def as_supernet(model: nn.Module, ranks: Sequence[int], seed: int = 0) -> Supernet:
    """The supernet of a model that has its layers already."""
    layers = {name: layer for name, layer in attached_of(model) if isinstance(layer, Sampled)}
    shapes = tuple((layer.out_features, layer.in_features) for layer in layers.values())
    return Supernet(model, Space(tuple(layers), shapes, choices_of(ranks)), seed)
