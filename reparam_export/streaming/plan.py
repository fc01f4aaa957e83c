"""The plan of a streamed fusion: which tensor of which shard is folded, copied, cast or added, checked before a byte is written."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reparam_export.assembly import base_of, bound, named_each
from reparam_export.checkpoints import Checkpoint
from reparam_export.errors import CheckpointError, ExportError, FusionError, TensorMismatchError
from reparam_export.files import fingerprint
from reparam_export.fit import check_covered, check_kind
from reparam_export.hf_folder import Structure, bias_switches, retyped, structure_of
from reparam_export.layouts import check_scaled
from reparam_export.models import Base
from reparam_export.streaming.formats import BY_SHORT, FORMATS, Format, torch_name, wide
from reparam_export.streaming.forms import Touched, creates_bias, modules_of
from reparam_export.streaming.shards import Place, Stored, layout, of_tensor
from reparam_export.streaming.source import UNTIED, NotStreamableError, check_names, files_of, source_of, untied
from reparam_export.streaming.stacks import in_files, matrices, onto_files, stacks_of
from reparam_export.streaming.tables import vocabulary, with_ties

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One output file. ``files``: what it is made from; ``units``: modules and tensors with the places that each fills in it."""

    name: str
    files: tuple[Path, ...]
    header: bytes
    size: int
    units: tuple[tuple[str, tuple[Place, ...]], ...]


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before folding starts."""

    checkpoint: Checkpoint  # under the names of the base's files
    model: Checkpoint  # under those of its model
    files: Mapping[str, str]  # modules of the model by the names that the files have, where these are others
    source: Path
    config: dict[str, Any]  # as it will be written
    corrected: dict[str, Any]  # what of it was changed
    storage: Format | None  # of all float tensors; None: as each is in the base
    shards: tuple[Shard, ...]
    touched: Mapping[str, Touched]
    stacks: Mapping[
        str, tuple[Touched | None, ...]
    ]  # each matrix of a stack that is one tensor; None: no adapter is on it
    renamed: bool  # the names of the base's files are not those of its model
    originals: Mapping[str, Stored]  # the stacks as the base has them
    tensors: Mapping[str, Stored]  # what is not folded, by name; zeros have none
    created: tuple[str, ...]
    zeros: tuple[str, ...]
    untied: tuple[str, ...]  # names that were another name of a tensor and are tensors now
    ties: Mapping[str, str]  # those that stay
    moved: tuple[str, ...]  # of a checkpoint without adapters, the tensors with other numbers than the base's

    @property
    def size(self) -> int:
        """Bytes to be written as weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def entries(self) -> int:
        """Entries of the weights that are folded."""
        return sum(math.prod(t.weight.shape) for t in self.folded)

    @property
    def folded(self) -> list[Touched]:
        """Every matrix that adapters are on."""
        return [*self.touched.values(), *(t for stack in self.stacks.values() for t in stack if t is not None)]

    def itemsize(self, name: str) -> int | None:
        """Bytes of an entry of a float tensor as it is written."""
        places = (place for shard in self.shards for _, filled in shard.units for place in filled if place.name == name)
        return next((FORMATS[place.code].size for place in places if place.code in FORMATS), None)

    def parameter(self, name: str) -> Tensor | None:
        """A float tensor of the base, mapped; None for what its files do not hold under this name."""
        module, _, part = name.rpartition(".")
        of = self.touched.get(module)
        folded = {"weight": of.weight, "bias": of.bias}.get(part) if of is not None else None
        stored = folded or self.tensors.get(name)
        return stored.tensor() if stored is not None and stored.is_float else None

    def digest(self) -> str:
        """Of everything that decides the bytes but the numbers of the base: what an interrupted run must have in common with this one."""
        recipe = self.checkpoint.recipe
        settings = [recipe.settings, recipe.candidate, [fingerprint(Path(file)) for file in recipe.config]]
        shards = [(s.name, s.size, s.header[8:].decode()) for s in self.shards]
        said = [self.checkpoint.sha256, settings, str(self.source), self.config, shards]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def plan_of(checkpoint: Checkpoint, storage: str | None = None) -> Plan:
    """Check base and checkpoint against each other, and lay the output out.

    storage: of all float tensors, "fp32", "fp16" or "bf16"; None keeps the dtype each has in the base.
    Raises NotStreamableError for what only folding in memory can do, and CheckpointError, FusionError and their kin.
    """
    _check_plain(checkpoint)
    base = base_of(checkpoint)
    source, config = source_of(checkpoint, base)
    files = files_of(source)
    stored = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    structure = structure_of(config, shapes, base, exact=checkpoint.positional)
    checkpoint = _bound(named_each(checkpoint, structure.own), base)
    model, own_files = checkpoint, structure.own.files
    if own_files or structure.own.routers:
        structure, checkpoint = _in_files(structure, checkpoint)
    check_names(structure, stored, config, checkpoint.replaced)
    structure, parted = _parted(structure, stored)
    structure, apart = untied(structure, checkpoint, config, base)
    stored |= {name: replace(stored[holder], name=name) for name, holder in apart.items()}
    target = BY_SHORT[storage] if storage else None
    replaced = _replaced(checkpoint, stored, structure, target)
    replaced = with_ties(replaced, stored, checkpoint, structure, apart)
    sized = vocabulary(stored, replaced, structure, config)
    single = replace(checkpoint, adapters=tuple(a for a in checkpoint.adapters if a.expert is None))
    touched = _touched(single, stored | replaced, structure)
    stacks = _stacks(checkpoint, stored, structure)
    check_covered([n for n in structure.order if f"{n}.weight" in stored], checkpoint)
    created = _created(touched, structure) + [name for name in replaced if name not in stored]
    names = set(stored) | set(created)
    try:
        switched, zeros = bias_switches(config, names, created)
    except ExportError as error:
        raise NotStreamableError(str(error)) from error
    corrected: dict[str, Any] = {**switched, **sized, **({UNTIED: False} if apart or parted else {})}
    shards = _shards(files, apart, [*created, *zeros], touched, stored | replaced, target, checkpoint)
    places = {place.name: torch_name(place.code) for shard in shards for _, filled in shard.units for place in filled}
    own, retyped_entries = retyped({k: v for k, v in config.items() if k != "auto_map"}, places, structure.wide)
    fused = {f"{module}.{part}" for module in touched for part in ("weight", "bias")} | stacks.keys()
    return Plan(
        checkpoint=checkpoint,
        model=model,
        files={p.module: n.rpartition(".")[0] for n, p in own_files.items() if p is not None and p.whole},
        source=source,
        config=own | corrected,
        corrected={k: v for k, v in corrected.items() if config.get(k) != v} | retyped_entries,
        storage=target,
        shards=shards,
        touched=touched,
        stacks=stacks,
        originals={name: stored[name] for name in stacks},
        renamed=bool(own_files),
        tensors={name: tensor for name, tensor in (stored | replaced).items() if name not in fused},
        created=tuple(sorted(created)),
        zeros=tuple(zeros),
        untied=tuple(apart),
        ties=structure.ties,
        moved=()
        if touched or stacks
        else tuple(name for name, new in replaced.items() if _differs(new, stored.get(name))),
    )


def _parted(structure: Structure, stored: Mapping[str, Stored]) -> tuple[Structure, tuple[str, ...]]:
    """The structure without the ties of tensors that the files hold both, with other numbers: transformers keeps these two, whatever its
    config says. And their names."""
    parted = tuple(
        alias
        for alias, holder in structure.ties.items()
        if alias in stored and holder in stored and _differs(stored[alias], stored[holder])
    )
    return replace(structure, ties={a: h for a, h in structure.ties.items() if a not in parted}), parted


def _differs(new: Stored, old: Stored | None) -> bool:
    """Does a tensor that the checkpoint brings whole hold other numbers than the base's?"""
    if old is None or not (new.is_float and old.is_float):
        return old is None or new.raw.tobytes() != old.raw.tobytes()
    return not np.array_equal(wide(new.values(), FORMATS[new.code]), wide(old.values(), FORMATS[old.code]))


def _check_plain(checkpoint: Checkpoint) -> None:
    """Raises NotStreamableError for what needs the model, or a matrix several times."""
    if checkpoint.members:
        raise NotStreamableError("several checkpoints act on one base")
    if checkpoint.bind is not None and not checkpoint.by_shapes:
        raise NotStreamableError(f"the adapters of a {checkpoint.format} checkpoint are made from the model itself")
    other = next((a for a in checkpoint.adapters if a.weight != 1), None)
    if other is not None:
        raise NotStreamableError(f"{other.site} is changed in part")


def _bound(checkpoint: Checkpoint, base: Base) -> Checkpoint:
    """The checkpoint with the adapters that the shapes of its base give."""
    if checkpoint.bind is None:
        return checkpoint
    skeleton = base.skeleton()
    if skeleton is None:
        raise NotStreamableError(f"the adapters of a {checkpoint.format} checkpoint are made from the model itself")
    return bound(checkpoint, skeleton)


def _in_files(structure: Structure, checkpoint: Checkpoint) -> tuple[Structure, Checkpoint]:
    """Both under the names of the base's files, once every module of the model that must have an adapter has one."""
    check_covered([n for n in structure.order if f"{n}.weight" in structure.own.tensors], checkpoint)
    whole = {p.tensor: name for name, p in structure.own.files.items() if p is not None and p.whole}
    placed = replace(
        checkpoint,
        adapters=onto_files(checkpoint.adapters, structure.own),
        replaced={whole.get(name, name): tensor for name, tensor in checkpoint.replaced.items()},
        copies=frozenset(whole.get(name, name) for name in checkpoint.copies),
        covers=lambda names: [],
        only=False,
    )
    return in_files(structure), placed


def _stacks(
    checkpoint: Checkpoint, stored: Mapping[str, Stored], structure: Structure
) -> dict[str, tuple[Touched | None, ...]]:
    """Every matrix of the stacks that files hold as one tensor, with its adapters. Raises TensorMismatchError, NotStreamableError."""
    found: dict[str, tuple[Touched | None, ...]] = {}
    for name, adapters in stacks_of(checkpoint.adapters).items():
        whole = stored.get(name)
        if whole is None or len(whole.shape) != 3 or not whole.is_float:
            raise NotStreamableError(f"{name} holds no stack of matrices in the base's files")
        experts = [tuple(replace(a, expert=None) for a in adapters if a.expert == e) for e in range(whole.shape[0])]
        if any(len(own) > 1 and any(a.rows is None for a in own) for own in experts):
            raise NotStreamableError(f"{name} has several adapters on the same outputs")
        transposed = name.rpartition(".")[0] in structure.own.transposed
        found[name] = tuple(
            Touched(f"{name}[{e}]", own, Stored(name, whole.code, whole.shape[1:], raw), None, transposed)
            if own
            else None
            for e, (own, raw) in enumerate(zip(experts, matrices(whole.shape, whole.raw), strict=True))
        )
        odd = next((t for t in found[name] if t is not None and (creates_bias(t) or creates_bias(t) is None)), None)
        if odd is not None:
            raise NotStreamableError(f"{odd.module} has an adapter that adds a bias, or none in factors")
    return found


def _replaced(
    checkpoint: Checkpoint, stored: Mapping[str, Stored], structure: Structure, target: Format | None
) -> dict[str, Stored]:
    """Tensors that the checkpoint brings whole; in the base's own dtype, unless all are stored in another. Raises NotStreamableError."""
    from reparam_export.streaming.formats import rounded
    from reparam_export.streaming.forms import array64

    found = {}
    for name, tensor in checkpoint.replaced.items():
        new = of_tensor(name, tensor)
        old = stored.get(name) or stored.get(f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else "")
        old = old or stored.get(structure.ties.get(name, ""))
        if old is None:
            raise NotStreamableError(f"the checkpoint brings {name}, which the base's files do not hold")
        check_kind(name, torch_name(old.code), torch_name(new.code))
        if target is None and new.is_float and old.is_float and new.code != old.code:
            values = rounded(array64(tensor), FORMATS[old.code])
            new = Stored(name, old.code, new.shape, values.reshape(-1).view("u1"))
        found[name] = new
    return found


def _touched(checkpoint: Checkpoint, stored: Mapping[str, Stored], structure: Structure) -> dict[str, Touched]:
    """Every adapted module with its weight. Raises TensorMismatchError, FusionError, NotStreamableError."""
    found = {}
    direct = next((a for a in checkpoint.adapters if a.parameter is not None), None)
    if direct is not None:
        raise NotStreamableError(f"{direct.site} is not the weight of a layer")
    for module, adapters in modules_of(checkpoint.adapters).items():
        if len(adapters) > 1 and any(a.rows is None for a in adapters):
            raise NotStreamableError(f"{module} has several adapters on the same outputs")
        weight = stored.get(f"{module}.weight")
        if weight is None:
            near = difflib.get_close_matches(module, [n.removesuffix(".weight") for n in stored], n=3, cutoff=0.5)
            raise TensorMismatchError(
                f"the checkpoint adapts {module}, which the base does not have (nearest: {', '.join(near) or 'none'}); "
                "is this the base that it was trained on?",
                module=module,
                tensor="weight",
                expected=module,
                found=near,
            )
        if module in structure.refused:
            raise FusionError(structure.refused[module])
        for adapter in adapters if module in structure.scaled else ():
            check_scaled(module, adapter.kind, scaled=True)
        if len(weight.shape) != 2 or not weight.is_float:
            raise NotStreamableError(f"{module} holds no plain matrix but {weight.code} {weight.shape}")
        transposed = module in structure.transposed | structure.embeddings
        found[module] = Touched(module, adapters, weight, stored.get(f"{module}.bias"), transposed)
    return found


def _created(touched: Mapping[str, Touched], structure: Structure) -> list[str]:
    """Biases that folding adds. Raises FusionError where there is no place for one."""
    created = []
    for module, each in touched.items():
        makes = creates_bias(each)
        if makes is None:
            makes = _whole_creates_bias(each)
        if makes and module in structure.embeddings:
            raise FusionError(f"{module}: the adapter adds a bias, and an embedding has no place for one")
        if makes:
            created.append(f"{module}.bias")
    return created


def _whole_creates_bias(touched: Touched) -> bool:
    """The same for a kind without factors: by folding it into zeros."""
    import torch

    from reparam_export.affine import Affine
    from reparam_export.fusion import fold_affine
    from reparam_export.streaming.whole import adapters64

    zeros = Affine(torch.zeros(touched.shape, dtype=torch.float64))
    return fold_affine(zeros, adapters64(touched)).bias is not None


def _shards(
    files: Mapping[Path, Mapping[str, Stored]], untied: Mapping[str, str], added: list[str], touched: Mapping[str, Touched],
    stored: Mapping[str, Stored], target: Format | None, checkpoint: Checkpoint,
) -> tuple[Shard, ...]:  # fmt: skip
    """The base's own sharding, in safetensors; a new bias beside its weight, an untied tensor beside the one it was."""
    metadata = {"format": "pt", "checkpoint_sha256": checkpoint.sha256, "base": str(checkpoint.base)}
    shards = []
    beside = {f"{name.removesuffix('.bias')}.weight": name for name in added}
    for path, tensors in files.items():
        names: list[str] = []
        for name in tensors:
            names += [
                name,
                *(n for n, holder in untied.items() if holder == name and not any(n in t for t in files.values())),
            ]
        names = [n for name in names for n in ((name, beside[name]) if name in beside else (name,))]
        entries = [(n, *_as_stored(n, stored, target, touched)) for n in names]
        entries.sort(
            key=lambda e: -FORMATS[e[1]].size if e[1] in FORMATS else 0
        )  # aligned, as the library itself orders them
        header, places, size = layout(entries, metadata)
        shards.append(Shard(_output_name(path), (path,), header, size, _units(places, touched)))
    return tuple(shards)


def _as_stored(
    name: str, stored: Mapping[str, Stored], target: Format | None, touched: Mapping[str, Touched]
) -> tuple[str, tuple[int, ...]]:
    """dtype code and shape of an output tensor; a new bias is like its weight."""
    of = stored.get(name)
    module = name.removesuffix(".bias")
    weight = stored.get(f"{module}.weight")
    if of is None and weight is not None:
        return (target.code if target else weight.code), (
            touched[module].shape[0] if module in touched else weight.shape[0],
        )
    if of is None:
        raise CheckpointError(f"{name}: there is no tensor of this name to write")
    return (target.code if target and of.is_float else of.code), of.shape


def _units(places: list[Place], touched: Mapping[str, Touched]) -> tuple[tuple[str, tuple[Place, ...]], ...]:
    """The places of one file by the module that fills them (folded together), or one by one."""
    units: dict[str, list[Place]] = {}
    for place in places:
        module, _, part = place.name.rpartition(".")
        folded = module in touched and part in ("weight", "bias")
        units.setdefault(module if folded else place.name, []).append(place)
    return tuple((name, tuple(filled)) for name, filled in units.items())


def _output_name(path: Path) -> str:
    return (
        path.name
        if path.suffix == ".safetensors"
        else path.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
    )
