"""GLoRA ViT: the ``.pt`` of ``utils.save`` (Arnav0400/ViT-Slim, GLoRA): ``X.Ad X.Au X.Bd X.Bu X.Cd X.Cu X.D X.E`` per Linear, and the head.

Which path each layer takes is not in it: the evolution checkpoint ``checkpoint-N.pth.tar`` holds the candidates, one choice per Linear in
the order of the model's modules, which is the order of this file. A state dict of the whole supernet has the same names beside those of
the base.
"""

from __future__ import annotations

from reparam_export.adapters import glora
from reparam_export.checkpoints import Adapter, Claim, Parts, Source
from reparam_export.checkpoints._carried import parts_with
from reparam_export.checkpoints._settings import Choice
from reparam_export.errors import CheckpointError

LOOKED_FOR = "blocks.N.attn.qkv.Ad, .Au, .Bd, ... (GLoRA, ViT-Slim)"
TENSORS = ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")


def accepts(source: Source) -> bool:
    return any(name.endswith(".Ad") for name in source.tensors)


def read(source: Source) -> Parts:
    claim = source.claim()
    adapters = supports(source, claim, mark=".", prefix="")
    return parts_with(source, adapters, claim)


def supports(source: Source, claim: Claim, *, mark: str, prefix: str) -> tuple[Adapter, ...]:
    """The GLoRA tensors of every layer, ``<prefix><layer><mark>Ad`` and so on, each with its path."""
    ends = tuple(f"{mark}{name}" for name in TENSORS)
    found = dict.fromkeys(name[: name.rindex(mark)] for name in source.tensors if name.endswith(ends))
    layers = [name.removeprefix(prefix) for name in found]
    paths = source.settings.layer_paths(
        layers, found_in="the search's checkpoint-N.pth.tar (ViT-Slim) or the eval_config set on each layer (peft fork)"
    )
    adapters = []
    for layer, path in zip(layers, paths, strict=True):
        tensors = [claim.take(f"{prefix}{layer}{mark}{name}") for name in TENSORS]
        adapters.append(
            Adapter(layer, "glora", glora.Params(path_of(source, layer, path, tensors[0].shape[1]), *tensors))
        )
    return tuple(adapters)


def path_of(source: Source, layer: str, choice: Choice | None, rank: int) -> glora.Path:
    """The choice of one layer, "unchosen" while inspecting a supernet. Raises CheckpointError."""
    if choice is None:
        return glora.UNCHOSEN
    path = glora.Path(**choice)
    problems = path.problems(rank)
    if problems:
        raise CheckpointError(f"{source.path}: layer {layer}: {problems[0]}")
    return path
