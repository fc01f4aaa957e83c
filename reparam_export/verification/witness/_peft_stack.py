"""Several peft folders on one base: peft's layers of each are made on the model that those before it made, in the order of the call.

Between two of them the model is plain again: each layer's map, read out of peft's own layer, with the weight that the user gave.

    y = b(x) + weight (peft's layer(x) - b(x)),  b the layer before it
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import fused, inserted
from reparam_export.adapters.probed import exactly
from reparam_export.affine import Affine
from reparam_export.assembly import place, steps_of
from reparam_export.checkpoints import Checkpoint
from reparam_export.checkpoints._peft_layers import _adapter as probed
from reparam_export.errors import ReparamError
from reparam_export.layouts import site_of
from reparam_export.verification.certificate import WitnessEvidence
from reparam_export.verification.witness import Subject, UnableError
from reparam_export.verification.witness._peft_model import Read, loaded, of_name, tuner_layers
from reparam_export.verification.witness.peft import Found, compare_layers

if TYPE_CHECKING:
    from torch import Tensor, nn


def testify_of_stack(subject: Subject) -> WitnessEvidence:
    """As ``testify``, member by member, and of the whole that they make. The recipe says in which order and with which weights."""
    model, found, version = subject.fresh().double(), Found(), ""
    for member, weight in in_order(subject.checkpoint):
        before = model
        read = loaded(member, lambda before=before: copy.deepcopy(before))  # type: ignore[misc]
        alone = [replace(adapter, weight=1.0) for adapter in member.adapters]
        _add(found, compare_layers(read, replace(subject, checkpoint=member, layer=_layers(before, member)), alone))
        version, model = read.version, plain(read, before, weight)
    return found.evidence(Read(model, version), subject)


def in_order(checkpoint: Checkpoint) -> list[tuple[Checkpoint, float]]:
    """The members as the user gave them, which the recipe says, with their weights. Raises UnableError where one is not among ours."""
    left = list(checkpoint.members or (checkpoint,))
    found = []
    for recipe in (checkpoint.recipe, *checkpoint.recipe.others):
        member = next((m for m in left if m.recipe.checkpoint == recipe.checkpoint), None)
        if member is None:
            raise UnableError(f"{recipe.checkpoint} is not among the checkpoints of this stack")
        left.remove(member)
        found.append((member, recipe.weight))
    return found


def _layers(before: nn.Module, member: Checkpoint) -> Any:
    """Our side of one member alone: the model before it, with the whole tensors that it brings."""
    base = place(
        copy.deepcopy(before), {n: t.double() if t.is_floating_point() else t for n, t in member.replaced.items()}
    )
    return base.get_submodule


def _add(found: Found, more: Found) -> None:
    found.settings += more.settings
    found.tried += more.tried
    found.layers += more.layers
    found.error = max(found.error, more.error)
    found.differences += more.differences
    found.notes += more.notes


def plain(read: Read, before: nn.Module, weight: float) -> nn.Module:
    """The model that one member makes of the one before it, without peft's layers. Raises UnableError for layers that have no one map."""
    own = read.own_tensors()
    model = place(copy.deepcopy(before), {n: own[n].double() for n, _ in before.named_parameters() if n in own})
    for name, layer in tuner_layers(read.model).items():
        wrappers = of_name(layer, "ParamWrapper")
        new = (
            _parameters(name, wrappers, weight) if wrappers else _matrix(name, layer, model.get_submodule(name), weight)
        )
        place(model, new)
    return model


def _parameters(name: str, wrappers: Sequence[Any], weight: float) -> dict[str, Tensor]:
    found = {}
    for wrapper in wrappers:
        delta = wrapper.get_delta_weight(wrapper.active_adapters[0]).double()
        found[f"{name}.{wrapper.parameter_name}"] = (wrapper.get_param().double() + weight * delta).detach()
    return found


def _matrix(name: str, layer: Any, module: nn.Module, weight: float) -> dict[str, Tensor]:
    """Weight and bias that one of peft's layers is, put in by ``weight``."""
    import torch

    if hasattr(layer, "ln_tuning_layers"):
        return {}  # its tensors stand in the model already
    try:
        adapter = replace(probed(name, layer, module), weight=weight)
        site = site_of(module, adapter)
        with exactly(torch.float64):
            base = site.affine(site.of(module), torch.float64)
            made = inserted(base, fused(base, steps_of([adapter], torch.float64)), None)
    except ReparamError as error:
        raise UnableError(f"{name}: {error}") from error
    return _tensors(site, made, site.of(module)[site.tensor])


def _tensors(site: Any, made: Affine, old: Tensor) -> dict[str, Tensor]:
    import torch

    new: dict[str, Tensor] = {site.tensor: site.put(made, old, torch.float64)}
    return new | {site.bias: made.bias} if made.bias is not None and site.bias else new
