"""The misreadings of ``witness_mutations.py`` that are no setting: adapters and whole tensors made otherwise than the file says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from benchmarks.witness_nets import Blocks
from reparam_export.adapters import lora as kind_lora
from reparam_export.affine import Affine, Bottleneck
from reparam_export.checkpoints import Adapter, Checkpoint

Plant = Callable[[Checkpoint], Checkpoint]
Config = Callable[[dict[str, Any]], dict[str, Any]]
Misread = Callable[[list[Adapter]], list[Adapter]]


RANDOM: dict[str, Any] = {"init_weights": False}


@dataclass(frozen=True)
class Mutation:
    """One misreading. configs: of the folders, one or a stack of them with ``weights``; sees: what the reader takes their config for.

    reads: writes and reads the file of another library, in place of configs.
    """

    family: str
    what: str
    configs: tuple[Callable[[], Any], ...]
    plant: Plant | None = None
    sees: Config | None = None
    net: type[nn.Module] = Blocks
    weights: tuple[float, ...] = (1.0,)
    reads: Callable[[Path], Checkpoint] | None = None

    @property
    def name(self) -> str:
        return f"{self.family}: {self.what}"


def lora(**more: Any) -> Callable[[], Any]:
    """Trains a LoRA on every projection of ``Blocks``, with scales that are not 1."""
    given = {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "k_proj", "v_proj", "qkv", "up", "down", "mix"],
        **more,
    }
    return lambda: peft.LoraConfig(**given)


def of(config: Any, **more: Any) -> Callable[[], Any]:
    """Any other type, on two square layers of each block."""
    return lambda: config(**{"target_modules": ["q_proj", "k_proj"], **more})


def setting(**values: Any) -> Config:
    """The configuration with other values."""
    return lambda config: config | values


def tokens(table: str = "embed") -> Callable[[], Any]:
    """Trained tokens of a table."""
    return lambda: peft.TrainableTokensConfig(target_modules=[table], token_indices=[2, 7, 20])


def later(params: Any) -> Any:
    """Trained tokens one place further on."""
    return replace(params, indices=tuple(i + 1 for i in params.indices))


def on_adapters(how: Misread) -> Plant:
    """The reader's adapters made otherwise, whether it makes them at once or when the base is there."""

    def plant(checkpoint: Checkpoint) -> Checkpoint:
        bind = checkpoint.bind
        return replace(
            checkpoint,
            adapters=checkpoint.adapters if bind else tuple(how(list(checkpoint.adapters))),
            bind=None if bind is None else lambda module, own: how(list(bind(module, own))),
            covers=lambda names: [],
            only=False,
        )

    return plant


def each(name: str, value: Callable[[Any], Any]) -> Plant:
    """Every adapter that has this field, with another value in it, made from its Params."""

    def changed(adapter: Adapter) -> Adapter:
        if not hasattr(adapter.params, name):
            return adapter
        return replace(adapter, params=replace(adapter.params, **{name: value(adapter.params)}))

    return on_adapters(lambda adapters: [changed(a) for a in adapters])


def by_params(kind: str, value: Callable[[Any], Any]) -> Plant:
    """Every adapter of a kind with other Params."""
    return on_adapters(lambda adapters: [replace(a, params=value(a.params)) if a.kind == kind else a for a in adapters])


def on_modules(end: str, plant: Plant) -> Plant:
    """The same on modules, or parameters, of this name only."""

    def only(checkpoint: Checkpoint) -> Checkpoint:
        def how(adapters: list[Adapter]) -> list[Adapter]:
            wrong = plant(replace(checkpoint, adapters=tuple(adapters), bind=None)).adapters
            return [w if (a.parameter or a.module).endswith(end) else a for a, w in zip(adapters, wrong, strict=True)]

        return on_adapters(how)(checkpoint)

    return only


def dropped(part: str) -> Plant:
    """Adapters on modules with this in their name are left out."""
    return on_adapters(lambda adapters: [a for a in adapters if part not in a.module])


def moved(names: Mapping[str, str]) -> Plant:
    """Adapters on other modules."""

    def name_of(module: str) -> str:
        return next((module.replace(old, new) for old, new in names.items() if old in module), module)

    return on_adapters(lambda adapters: [replace(a, module=name_of(a.module)) for a in adapters])


def with_pair(adapter: Adapter, down: Any, up: Any) -> Adapter:
    """The adapter with other matrices in its low-rank pair."""
    pair = Bottleneck(Affine(down), Affine(up, adapter.params.pair.up.bias))
    return replace(adapter, params=replace(adapter.params, pair=pair))


turned = on_adapters(
    lambda adapters: [
        with_pair(a, a.params.pair.up.weight.T.contiguous(), a.params.pair.down.weight.T.contiguous()) for a in adapters
    ]
)
as_lora = on_adapters(
    lambda adapters: [
        replace(a, kind="lora", params=kind_lora.Params(a.params.pair, getattr(a.params, "scale", 1.0)))
        for a in adapters
    ]
)


def _sliced(adapter: Adapter, rows: tuple[int, int], source: tuple[int, int]) -> Adapter:
    pair = adapter.params.pair
    return replace(with_pair(adapter, pair.down.weight, pair.up.weight[source[0] : source[1]]), rows=rows)


packed_slice_lost = on_adapters(
    lambda adapters: [_sliced(a, rows, rows) for a in adapters for rows in ((0, 12), (24, 36))]
)
others_slices = on_adapters(
    lambda adapters: [
        _sliced(a, rows, source)
        for a in adapters
        for rows, source in (((0, 12), (12, 24)), ((12, 24), (24, 36)), ((24, 36), (0, 12)))
    ]
)


def replaced_by(part: str, factor: float | None) -> Plant:
    """Whole tensors with this in their name, times a factor; None: left out."""

    def plant(checkpoint: Checkpoint) -> Checkpoint:
        kept = {n: t for n, t in checkpoint.replaced.items() if factor is not None or part not in n}
        scaled = {n: t * factor if factor is not None and part in n else t for n, t in kept.items()}
        return replace(checkpoint, replaced=scaled)

    return plant


def replaced_moved(names: Mapping[str, str]) -> Plant:
    """Whole tensors under other names."""
    return lambda checkpoint: replace(
        checkpoint, replaced={**checkpoint.replaced, **{new: checkpoint.replaced[old] for old, new in names.items()}}
    )


def experts_misread(what: str) -> Plant:
    """A stack of experts read in another order, or with the axes of A or of B the wrong way round."""

    def how(adapters: list[Adapter]) -> list[Adapter]:
        if what == "parameters":
            other = {"up": "down", "down": "up"}
            return [replace(a, parameter=other[str(a.parameter)]) for a in adapters]
        found = []
        for parameter in dict.fromkeys(a.parameter for a in adapters):
            found += _misread([a for a in adapters if a.parameter == parameter], what)
        return found

    return on_adapters(how)


def _misread(own: list[Adapter], what: str) -> list[Adapter]:
    experts = len(own)
    if what == "order":
        return [replace(a, expert=experts - 1 - n) for n, a in enumerate(own)]
    downs = torch.stack([a.params.pair.down.weight for a in own])  # (expert, r, in), rows of A in this order
    ups = torch.stack([a.params.pair.up.weight for a in own], -1)  # (out, r, expert), columns of B in this order
    rank = downs.shape[1]
    if what == "A":
        downs = downs.reshape(rank, experts, -1).transpose(0, 1).contiguous()
    if what == "B":
        ups = ups.reshape(len(ups), experts, rank).transpose(1, 2).contiguous()
    return [with_pair(a, downs[n], ups[..., n].contiguous()) for n, a in enumerate(own)]
