"""The plan of a streamed fusion: which tensor of which shard is folded, copied, cast or added, checked before a byte is written."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reparam_export.assembly import base_of
from reparam_export.checkpoints import Checkpoint, unnumbered
from reparam_export.errors import (
    CheckpointError,
    ExportError,
    FusionError,
    ReparamError,
    SharedWeightError,
    TensorMismatchError,
)
from reparam_export.files import read_json, weight_files
from reparam_export.fusion import check_covered
from reparam_export.hf_folder import EMBEDDING, Structure, bias_switches, folder_of, is_known, keywords_of, structure_of
from reparam_export.models import Base
from reparam_export.streaming.formats import BY_SHORT, FORMATS, Format
from reparam_export.streaming.forms import Touched, creates_bias, modules_of
from reparam_export.streaming.shards import Place, Stored, layout, of_tensor, open_shard

TASKS = {  # peft's task_type -> how a class for it is called
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
}
UNTIED = "tie_word_embeddings"


class NotStreamableError(ReparamError):
    """The checkpoint can be folded in memory only; the message says why."""


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

    checkpoint: Checkpoint
    source: Path
    config: dict[str, Any]  # as it will be written
    corrected: dict[str, Any]  # what of it was changed
    storage: Format | None  # of all float tensors; None: as each is in the base
    shards: tuple[Shard, ...]
    touched: Mapping[str, Touched]
    tensors: Mapping[str, Stored]  # what is not folded, by name; zeros have none
    base: Mapping[str, Stored]  # the files' own tensors
    created: tuple[str, ...]
    zeros: tuple[str, ...]
    untied: tuple[str, ...]  # names that were another name of a tensor and are tensors now
    ties: Mapping[str, str]  # those that stay

    @property
    def size(self) -> int:
        """Bytes to be written as weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def entries(self) -> int:
        """Entries of the weights that are folded."""
        return sum(math.prod(t.weight.shape) for t in self.touched.values())

    def digest(self) -> str:
        """Of everything that decides the bytes but the numbers of the base: what an interrupted run must have in common with this one."""
        said = [
            self.checkpoint.sha256, self.checkpoint.recipe.settings, self.checkpoint.recipe.candidate, self.checkpoint.recipe.config,
            str(self.source), self.config, [(s.name, s.size, s.header[8:].decode()) for s in self.shards],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def plan_of(checkpoint: Checkpoint, storage: str | None = None) -> Plan:
    """Check base and checkpoint against each other, and lay the output out.

    storage: of all float tensors, "fp32", "fp16" or "bf16"; None keeps the dtype each has in the base.
    Raises NotStreamableError for what only folding in memory can do, and CheckpointError, FusionError and their kin.
    """
    base = base_of(checkpoint)
    source, config = _source(checkpoint, base)
    files = _files(source)
    stored = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    structure = structure_of(config, stored, base, exact=checkpoint.positional)
    _check_names(structure, stored, config)
    structure, untied = _untied(structure, checkpoint, config, base)
    stored |= {name: replace(stored[holder], name=name) for name, holder in untied.items()}
    replaced = _replaced(checkpoint, stored)
    touched = _touched(checkpoint, stored | replaced, structure)
    check_covered([n for n in structure.order if f"{n}.weight" in stored], checkpoint)
    created = _created(touched, structure) + [name for name in replaced if name not in stored]
    names = set(stored) | set(created)
    try:
        switched, zeros = bias_switches(config, names, created)
    except ExportError as error:
        raise NotStreamableError(str(error)) from error
    target = BY_SHORT[storage] if storage else None
    corrected: dict[str, Any] = {**switched, **({UNTIED: False} if untied else {}), **_dtype_entry(config, target)}
    shards = _shards(files, untied, [*created, *zeros], touched, stored | replaced, target, checkpoint)
    fused = {f"{module}.{part}" for module in touched for part in ("weight", "bias")}
    return Plan(
        checkpoint=checkpoint,
        source=source,
        config={k: v for k, v in config.items() if k != "auto_map"} | corrected,
        corrected={k: v for k, v in corrected.items() if config.get(k) != v},
        storage=target,
        shards=shards,
        touched=touched,
        tensors={name: tensor for name, tensor in (stored | replaced).items() if name not in fused},
        base=stored,
        created=tuple(sorted(created)),
        zeros=tuple(zeros),
        untied=tuple(untied),
        ties=structure.ties,
    )


def _source(checkpoint: Checkpoint, base: Base) -> tuple[Path, dict[str, Any]]:
    """The base's folder and config. Raises NotStreamableError, CheckpointError."""
    source = folder_of(base.spec)
    if source is None:
        raise NotStreamableError(f"the base {base.spec} is no Hugging Face folder")
    if base.weights is not None or base.state is not None or base.ignored:
        raise NotStreamableError("the base's weights do not come from its own folder")
    config = read_json(source / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"base {base.spec!r}: expected plain weights; config.json says they are quantized (quantization_config); "
            "give the base before quantization"
        )
    keywords = keywords_of(base.spec)
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    task = keywords.pop("task", None)
    if keywords.pop("architecture", architecture) != architecture or not architecture:
        raise NotStreamableError("the model is of another class than the base's folder")
    if task is not None and not architecture.endswith(TASKS.get(str(task), ("\0",))):
        raise NotStreamableError(f"the checkpoint is for {task}, the base's folder holds a {architecture}")
    if keywords.pop(UNTIED, False) or keywords:
        raise NotStreamableError(f"the base's config is changed ({', '.join(keywords) or UNTIED})")
    probed = [a.module for a in checkpoint.adapters if a.kind == "probed"]
    if probed:
        raise NotStreamableError(f"{len(probed)} module(s) have an adapter without a closed form, first {probed[0]}")
    return source, config


def _files(source: Path) -> dict[Path, dict[str, Stored]]:
    """Each weight file and its tensors. Raises TensorMismatchError where index and files differ."""
    index = weight_files(source)
    opened = {path: open_shard(path) for path in dict.fromkeys(index.values())}
    if "" in index:
        return opened
    for name, path in index.items():
        if name not in opened[path]:
            raise _mismatch(name, f"in {path.name}, as the index says", "not in it")
    for path, tensors in opened.items():
        for name in tensors:
            if index.get(name) != path:
                raise _mismatch(name, "in the index" if name not in index else f"in {index[name]}", f"in {path.name}")
    return opened


def _mismatch(name: str, expected: object, found: object) -> TensorMismatchError:
    return TensorMismatchError(
        f"base: tensor {name}: expected {expected}; found {found}; the base's folder is incomplete or mixed up, fetch it again",
        module=name.rpartition(".")[0],
        tensor=name,
        expected=expected,
        found=found,
    )


def _check_names(structure: Structure, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> None:
    """The files hold the model's tensors. Raises TensorMismatchError, NotStreamableError."""
    from reparam_export.state import CONSTANTS

    if structure.shapes is not None:
        wanted = {n: s for n, s in structure.shapes.items() if n not in structure.ties}
        ends = tuple(end for end, _ in CONSTANTS)
        found = {
            n: t.shape for n, t in stored.items() if n in wanted or (n not in structure.ties and not n.endswith(ends))
        }
        if found != wanted:
            odd = sorted({n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)})
            raise NotStreamableError(
                f"{odd[0]} is {found.get(odd[0])} in the base's files and {wanted.get(odd[0])} in its model"
            )
        return
    layers = config.get("num_hidden_layers")
    kinds = {unnumbered(name) for name in stored}
    alike = {
        name: kind
        for kind in kinds
        if "#" in kind.split(".")
        for name in (kind.replace("#", str(i), 1) for i in range(int(layers or 0)))
    }
    missing = sorted(name for name in alike if name not in stored)
    if missing or EMBEDDING not in stored:
        raise _mismatch(missing[0] if missing else EMBEDDING, f"one for each of {layers} layers", None)


def _untied(
    structure: Structure, checkpoint: Checkpoint, config: Mapping[str, Any], base: Base
) -> tuple[Structure, dict[str, str]]:
    """Ties that the adapter would break, broken: structure without them, and new tensor -> the one with its numbers.

    Raises SharedWeightError.
    """
    changed = {f"{a.module}.weight" for a in checkpoint.adapters} | set(checkpoint.replaced)
    hit = {alias: holder for alias, holder in structure.ties.items() if alias in changed or holder in changed}
    if not hit:
        return structure, {}
    apart = structure.ties.keys() <= hit.keys()
    if not is_known(config):
        keyword = f"{base.spec}{'&' if '?' in base.spec else '?'}{UNTIED}=False"
        apart = (
            apart and UNTIED in config and not structure_of(config, (), replace(base, spec=keyword), exact=True).ties
        )
    if not apart:
        alias, holder = next(iter(hit.items()))
        raise SharedWeightError(
            f"{holder} is one tensor with {alias}: changing it would change both. Untie them in the base first",
            tensor=holder,
            owners=(holder, alias),
        )
    return replace(structure, ties={}), hit


def _replaced(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors that the checkpoint brings whole, in the base's own dtype. Raises NotStreamableError."""
    from reparam_export.streaming.formats import rounded
    from reparam_export.streaming.forms import array64

    found = {}
    for name, tensor in checkpoint.replaced.items():
        new = of_tensor(name, tensor)
        old = stored.get(name) or stored.get(f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else "")
        if old is None or (name in stored and stored[name].shape != new.shape):
            raise NotStreamableError(f"the checkpoint brings {name} in another shape than the base's")
        if new.is_float and old.is_float and new.code != old.code:
            values = rounded(array64(tensor), FORMATS[old.code])
            new = Stored(name, old.code, new.shape, values.reshape(-1).view("u1"))
        found[name] = new
    return found


def _touched(checkpoint: Checkpoint, stored: Mapping[str, Stored], structure: Structure) -> dict[str, Touched]:
    """Every adapted module with its weight. Raises TensorMismatchError, FusionError, NotStreamableError."""
    found = {}
    for module, adapters in modules_of(checkpoint.adapters).items():
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

    from reparam_export.affine import Affine, map_tensors
    from reparam_export.fusion import fold_affine
    from reparam_export.streaming.forms import array64

    adapters = [
        replace(a, params=map_tensors(a.params, lambda t: torch.from_numpy(array64(t)))) for a in touched.adapters
    ]
    return (
        fold_affine(touched.module, Affine(torch.zeros(touched.shape, dtype=torch.float64)), adapters).bias is not None
    )


def _dtype_entry(config: Mapping[str, Any], target: Format | None) -> dict[str, str]:
    """The config's own word for the dtype that the weights are stored in, when that was asked for."""
    if target is None:
        return {}
    return {"torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype": target.torch}


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
