"""peft on its own folders: its loader puts its own layers on a base of its own, and each is held against our adapters.

    settings   rank, scale, bias, decomposition, transposition, the parameter of every layer, and which modules have one
    numbers    each layer's answers, with the file's tensors loaded and the real base layer inside
    whole      the outputs of the whole unfused peft model, where our reference has any

Layers that we probe are peft's already (kind ``probed``): only the whole model, through peft's own loader, says something of them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Adapter, Checkpoint
from reparam_export.verification.certificate import WitnessEvidence
from reparam_export.verification.witness import Subject, UnableError
from reparam_export.verification.witness._layers import BOUND, answer, error, inputs_of, tensors_error, unfused
from reparam_export.verification.witness._peft_alone import adapter_alone, with_base
from reparam_export.verification.witness._peft_model import Read, below, loaded, of_name, tuner_layers
from reparam_export.verification.witness._peft_names import NOTE
from reparam_export.verification.witness._peft_settings import settings_parted
from reparam_export.verification.witness._whole import whole_parted

if TYPE_CHECKING:
    from torch import nn

LOOKS_AT = "folders that peft wrote (adapter_config.json), and state dicts of its models"


def accepts(checkpoint: Checkpoint) -> bool:
    """A folder of peft, a state dict of a model with its layers, or a stack of such."""
    parts = checkpoint.members or (checkpoint,)
    return all(part.format.startswith("peft_") for part in parts)


def testify(subject: Subject) -> WitnessEvidence:
    """Raises MissingBackendError without peft, UnableError for a folder that peft cannot load on this base."""
    checkpoint = subject.checkpoint
    if checkpoint.members or checkpoint.recipe.weight != 1:
        from reparam_export.verification.witness._peft_stack import testify_of_stack

        return testify_of_stack(subject)
    read = loaded(checkpoint, subject.fresh, skeleton=subject.numbers is not None)
    found = compare_layers(read, subject, checkpoint.adapters)
    return found.evidence(read, subject)


@dataclass
class Found:
    """What the comparison of layers gave."""

    settings: int = 0
    tried: int = 0
    layers: int = 0
    error: float = 0.0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def evidence(self, read: Read, subject: Subject) -> WitnessEvidence:
        """The same with the outputs of the whole model beside it."""
        whole = whole_parted(read.model, subject, read.said)
        return WitnessEvidence(
            who=read.who,
            version=read.version,
            settings=self.settings,
            layers=self.tried,
            of_layers=self.layers,
            seed=subject.seed,
            error=self.error,
            bound=BOUND,
            outputs=whole.outputs,
            output_error=whole.error,
            output_bound=whole.bound,
            differences=(*self.differences, *whole.differences),
            notes=tuple(self.notes),
        )


def compare_layers(read: Read, subject: Subject, adapters: Sequence[Adapter]) -> Found:
    """Every layer of peft's model against our adapters: the same modules, the same settings, the same answers."""
    found = Found(notes=[NOTE] if read.renamed else [])
    layers = tuner_layers(read.model)
    ours: dict[str, list[Adapter]] = {name: [a for a in adapters if below(a.module, name)] for name in layers}
    replaced = subject.checkpoint.replaced
    claimed = {id(a) for own in ours.values() for a in own}
    for adapter in adapters:
        if id(adapter) not in claimed:
            found.differences.append(f"{adapter.site}: we adapt it, {read.said} does not")
    for name, own in ours.items():
        if not own and not any(below(tensor, name) for tensor in replaced):
            found.differences.append(f"{name}: {read.said} adapts it ({type(layers[name]).__name__}), we do not")
    mine = {name: own for name, own in ours.items() if not any(a.kind == "probed" for a in own)}
    if len(mine) < len(ours):
        found.notes.append(
            f"{len(ours) - len(mine)} layers are peft's own, probed: only the whole model bears witness for them"
        )
    for name, own in mine.items():
        found.differences += settings_parted(name, layers[name], own, subject.layer(name), read.said)
    found.settings = found.layers = len(mine)
    _compare_numbers(found, read, subject, mine)
    _compare_whole_tensors(found, read, subject.checkpoint)
    return found


def _compare_numbers(found: Found, read: Read, subject: Subject, ours: Mapping[str, Sequence[Adapter]]) -> None:
    kept = chosen(subject, list(ours))
    for name in kept:
        parted = _number(name, read.model.get_submodule(name), read, subject, ours[name])
        found.tried += parted is not None
        _note_number(found, name, parted or 0.0, read.said)
    apart = [] if subject.numbers is None else [name for name in ours if name not in subject.numbers]
    alone = {name: adapter_alone(read.model.get_submodule(name), ours[name], subject.seed) for name in apart}
    for name, parted in alone.items():
        _note_number(found, name, parted or 0.0, read.said)
    said = sum(parted is not None for parted in alone.values())
    if said:
        found.notes.append(
            f"of {said} more layers the numbers were compared without the base layer, which a LoRA does not depend on"
        )


def _note_number(found: Found, name: str, parted: float, who: str) -> None:
    found.error = max(found.error, parted)
    if not parted <= BOUND:
        found.differences.append(
            f"{name}: the answers of {who}'s layer and ours differ by {parted:.2g} of what the adapter does there "
            f"(at most {BOUND:g} is rounding)"
        )


def chosen(subject: Subject, names: Sequence[str]) -> list[str]:
    """All layers where they have no more entries than the limit, else a seeded choice that has no more; at least one."""
    if subject.numbers is not None:
        return [name for name in names if name in subject.numbers]
    drawn = list(names)
    random.Random(subject.seed).shuffle(drawn)
    kept: list[str] = []
    entries = 0
    for name in drawn:
        entries += sum(p.numel() for p in subject.layer(name).parameters())
        if kept and entries > subject.limit:
            break
        kept.append(name)
    order = set(kept)
    return [name for name in names if name in order]


def _number(name: str, theirs: nn.Module, read: Read, subject: Subject, own: Sequence[Adapter]) -> float | None:
    """The relative difference of one layer; None for a module that is called in a way of its own and read by no parameter."""
    module = subject.layer(name)
    if subject.numbers is not None:
        theirs = with_base(theirs, module)
    base = copy.deepcopy(module).double()
    wrappers = of_name(theirs, "ParamWrapper")
    if wrappers:
        ours = unfused(name, module, own)
        their_tensors = {w.parameter_name: _adapted(w) for w in wrappers}
        our_tensors = {n: ours.get_parameter(n) for n in their_tensors}
        return tensors_error(their_tensors, our_tensors, {n: base.get_parameter(n) for n in their_tensors})
    inputs = inputs_of(module, subject.seed)
    if inputs is None:
        return None
    return error(answer(theirs, inputs), answer(unfused(name, module, own), inputs), answer(base, inputs))


def _adapted(wrapper: Any) -> Any:
    """The parameter that peft's forward uses."""
    return wrapper.get_param() + wrapper.get_delta_weight(wrapper.active_adapters[0])


def _compare_whole_tensors(found: Found, read: Read, checkpoint: Checkpoint) -> None:
    """Tensors that the checkpoint brings whole stand under the same names in peft's model, with the same numbers."""
    import torch

    theirs = read.own_tensors()
    for name, tensor in checkpoint.replaced.items():
        other = theirs.get(name)
        if other is None or (not other.is_meta and not torch.equal(other.double(), torch.as_tensor(tensor).double())):
            says = "has no such tensor" if other is None else "has other numbers there"
            found.differences.append(f"{name}: we take it whole from the file, {read.said} {says}")


__all__ = ["LOOKS_AT", "UnableError", "accepts", "testify"]
