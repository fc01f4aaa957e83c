"""Folding: every touched module's new weight and bias, computed in float64 and rounded once to the storage format.

Nothing is mutated, and the same input gives the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import fused, inserted
from reparam_export.affine import Affine
from reparam_export.assembly import base_of, opened, settled, stacks, tied_names
from reparam_export.checkpoints import Adapter, Checkpoint, by_site
from reparam_export.errors import FusionError, SharedWeightError
from reparam_export.fit import check_covered, check_shapes, touched_module
from reparam_export.layouts import site_of, touched
from reparam_export.names import Place
from reparam_export.names.conversions import spread
from reparam_export.rounding import round_once
from reparam_export.state import digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Advance = Callable[[int, int], None]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NARROWEST_FIRST = ("bf16", "fp16", "fp32")
LOST = 0.01  # share of the change below which nothing of it is left
ENOUGH = 0.99  # what --dtype auto asks of every layer


@dataclass(frozen=True)
class Kept:
    """What its storage keeps of one layer's change: the share, and |exact - base|^2, the layer's weight among the others."""

    share: float
    change: float


@dataclass(frozen=True)
class FusedWeights(Mapping[str, "Tensor"]):
    """The plain model's whole state under the base's own names, and what folding changed in it."""

    tensors: Mapping[str, Tensor]
    changed: tuple[str, ...]  # tensors that an adapter changed
    created: tuple[str, ...]  # biases that the base did not have
    replaced: tuple[str, ...]  # tensors taken whole from the checkpoint
    untied: tuple[str, ...] = ()  # names that were another name of a tensor and are tensors now
    aliases: Mapping[str, str] = field(default_factory=dict)  # tied names -> the name that holds the tensor
    seconds: float = 0.0
    dtype: str | None = None  # the storage of all; None: as the base's; "auto": each touched layer has its own
    kept: Mapping[str, Kept] = field(default_factory=dict)  # of each touched module
    notes: tuple[str, ...] = ()  # what the base made known of the checkpoint
    files: Mapping[str, Place | None] = field(default_factory=dict)  # names in files, where they are others

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def by_every_name(self) -> dict[str, Tensor]:
        """The tensors, tied ones under each of their names."""
        return {
            **self.tensors,
            **{alias: self.tensors[name] for alias, name in self.aliases.items() if name in self.tensors},
        }

    def storage(self) -> dict[str, int]:
        """dtype -> number of tensors stored in it."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            name = str(tensor.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + 1
        return counts

    def sha256(self) -> str:
        """Digest over every tensor's name, dtype, shape and bytes, as files hold them, in the order of the names."""
        return digest(self.in_files())

    def in_files(self) -> dict[str, Tensor]:
        """The tensors under the names that the base's own files have for them, and in their parts."""
        return spread(self.tensors, self.files) if self.files else dict(self.tensors)


def fuse(checkpoint: Checkpoint, dtype: str | None = None, advance: Advance | None = None) -> FusedWeights:
    """Fold every adapter of the checkpoint into its base.

    dtype: storage of all float tensors, "fp32", "fp16" or "bf16"; None keeps the dtype each has in the base; "auto" gives every touched
    layer the narrowest of the three that keeps 99 % of its change, and of a Hugging Face base all tensors the widest of these, since
    stock loaders cast a whole folder to one dtype.
    advance: called with (layers done, layers in all).
    Raises TensorMismatchError (base and checkpoint do not fit), SharedWeightError, NotAffineError, FusionError (not finite, no change).
    """
    import torch

    started = time.perf_counter()
    given = checkpoint.notes
    module, _, bound = opened(checkpoint)
    if dtype == "auto" and str(checkpoint.base).startswith("hf:"):
        return fuse(checkpoint, _widest(fuse_each(bound, module, dtype, None)[0]), advance)
    checkpoint = bound
    storage = getattr(torch, DTYPES[dtype]) if dtype in DTYPES else None
    state, aliases = own_state(module)
    _check_shared(module, checkpoint)
    names = [name for name, part in module.named_modules() if part._parameters]
    for member in checkpoint.members or (checkpoint,):
        check_covered(names, member)
    new, kept = fuse_each(checkpoint, module, dtype, advance)
    if not kept and not replaces(checkpoint):
        raise FusionError(
            f"{checkpoint.path}: the adapter changes nothing: every fused weight equals the base's. "
            "It was never trained, or the code that trained it never switched it on"
        )
    check_kept(checkpoint, survival_of(kept)["overall"])
    new = once(new, aliases)
    exact = checkpoint.replaced if storage else {}  # in ``state`` they have the base's own dtypes
    tensors = {
        name: _cast(name, exact.get(name, tensor), storage) for name, tensor in state.items() if name not in new
    } | new
    _check_finite(tensors)
    return FusedWeights(
        tensors={name: tensors[name] for name in sorted(tensors)},
        changed=tuple(sorted(new)),
        created=tuple(sorted(set(new) - set(state))),
        replaced=tuple(sorted(checkpoint.replaced)),
        untied=checkpoint.untied,
        aliases=aliases,
        seconds=time.perf_counter() - started,
        dtype=dtype,
        kept=kept,
        notes=tuple(note for note in checkpoint.notes if note not in given),
    )


def replaces(checkpoint: Checkpoint) -> bool:
    """Does a checkpoint without adapters bring tensors other than its base's?"""
    import torch

    if checkpoint.adapters:
        return False
    state = base_of(checkpoint).build()[0].state_dict()
    return any(
        name not in state or not torch.equal(state[name], tensor.to(state[name].dtype))
        for name, tensor in checkpoint.replaced.items()
    )


def fuse_each(
    checkpoint: Checkpoint, module: nn.Module, dtype: str | None, advance: Advance | None
) -> tuple[dict[str, Tensor], dict[str, Kept]]:
    """The new tensors of every touched module, and what their storage keeps of each; of none when nothing changed at all."""
    new: dict[str, Tensor] = {}
    kept: dict[str, Kept] = {}
    moved = False
    sites = by_site(checkpoint.adapters)
    for done, (name, adapters) in enumerate(sites.items(), 1):
        folded, differs, kept[name] = _folded(module, adapters, new, dtype)
        new |= folded
        moved = moved or differs
        if advance is not None:
            advance(done, len(sites))
    return new, kept if moved else {}


def _widest(new: Mapping[str, Tensor]) -> str:
    """The widest of the formats that were chosen."""
    found = {str(tensor.dtype).removeprefix("torch.") for tensor in new.values()}
    return max((name for name in NARROWEST_FIRST if DTYPES[name] in found), key=NARROWEST_FIRST.index)


def survival_of(kept: Mapping[str, Kept]) -> dict[str, Any]:
    """The share of the adapter's change that storage keeps: of all layers together, of the one that keeps least, and of each."""
    changed = math.fsum(of.change for of in kept.values())
    least = min((of.share for of in kept.values()), default=1.0)
    overall = math.fsum(of.share * of.change for of in kept.values()) / changed if changed > 0 else least
    return {"overall": overall, "least": least, "layers": {module: of.share for module, of in kept.items()}}


def _folded(
    module: nn.Module, adapters: list[Adapter], made: Mapping[str, Tensor], dtype: str | None
) -> tuple[dict[str, Tensor], bool, Kept]:
    """``fold_site``, with whatever a damaged adapter makes torch stumble over as one error."""
    try:
        return fold_site(module, adapters, made, dtype)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, OverflowError, KeyError) as error:
        raise FusionError(
            f"{adapters[0].site}: the adapter cannot be folded: {type(error).__name__}: {error}"
        ) from error


def check_kept(checkpoint: Checkpoint, overall: float) -> None:
    """Raises FusionError when the storage keeps next to nothing of the adapter: the model would be the base."""
    if overall < LOST:
        raise FusionError(
            f"{checkpoint.path}: the storage format keeps {100 * overall:.2g} % of the adapter's change: the fused model would be "
            "the base. Choose a wider one with --dtype fp32"
        )


def fold_site(
    module: nn.Module, adapters: list[Adapter], made: Mapping[str, Tensor], dtype: str | None
) -> tuple[dict[str, Tensor], bool, Kept]:
    """The new tensors of one site (its weight and bias), whether they differ from the old in float64, and what storage keeps.

    made: tensors that other sites have changed already, as other experts of the same stack.
    """
    import torch

    name = adapters[0].module
    target = touched_module(module, name)
    site = site_of(target, adapters[0])
    own = site.of(target)
    base = site.affine(own, torch.float64)
    whole = fold_affine(base, adapters)
    same_bias = torch.equal(*(b if b is not None else torch.zeros(0) for b in (base.bias, whole.bias)))
    zeros = (
        base.bias is None and whole.bias is not None and not bool(whole.bias.any())
    )  # a new bias that changes nothing
    moved = not ((same_bias or zeros) and torch.equal(base.weight, whole.weight))
    old = own[site.tensor]
    choice = None if dtype == "auto" and site.expert is not None else dtype  # one tensor holds all experts
    storage, kept = _storage(base.weight, whole.weight, old.dtype, choice)
    new = {site.tensor: site.put(whole, made.get(site.tensor, old), storage, fresh=site.tensor in made)}
    if whole.bias is not None and not same_bias:
        if site.bias is None:
            raise FusionError(f"{adapters[0].site}: the adapter adds a bias, and there is no place for one")
        before = own.get(site.bias)
        new[site.bias] = round_once(whole.bias, storage if before is None or dtype else before.dtype).contiguous()
    return new, moved, kept


def _storage(base: Tensor, whole: Tensor, own: torch.dtype, dtype: str | None) -> tuple[torch.dtype, Kept]:
    """The format that a fused matrix is stored in, and what it keeps of the change; for "auto" the narrowest that keeps enough."""
    import torch

    tried = (
        [getattr(torch, DTYPES[name]) for name in NARROWEST_FIRST]
        if dtype == "auto"
        else [getattr(torch, DTYPES[dtype]) if dtype else own]
    )
    change = whole - base
    size = float((change * change).sum())
    for storage in tried:
        found = round_once(whole, storage)
        if bool(found.isfinite().all()) or storage is tried[-1]:
            share = float((change * (found.double() - base)).sum()) / size if size > 0 else 1.0
            if share >= ENOUGH or storage is tried[-1]:
                break
    return storage, Kept(share, size)


def fold_affine(base: Affine, adapters: list[Adapter]) -> Affine:
    """One touched matrix in float64 torch tensors, every adapter folded in."""
    whole = base
    for adapter in adapters:
        check_shapes(adapter.site, base.rows(*adapter.rows) if adapter.rows else base, adapter)
    for rows, steps in stacks(adapters, base.weight.dtype):
        whole = inserted(whole, fused(base.rows(*rows) if rows else base, steps), rows)
    return whole


def own_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tied tensor once, and the other names of tied tensors."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    holders: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in holders:
            aliases[name] = holders[id(tensor)]
        else:
            holders[id(tensor)] = name
            state[name] = tensor.detach()
    return state, aliases


def _check_shared(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises SharedWeightError where an adapter or a replaced tensor would also change another module.

    A tensor whose owners all have an adapter, or are all replaced, is let through: they must then come out alike.
    """
    import torch

    for adapter in checkpoint.adapters:
        touched_module(module, adapter.module)
    tied = tied_names(module)
    adapted = [name for adapter in checkpoint.adapters for name in touched(adapter)]
    for names in (adapted, list(checkpoint.replaced)):
        for tensor in names:
            others = tuple(o for o in tied.get(tensor, ()) if o != tensor)
            if any(other not in names for other in others):
                raise _shared(tensor, others, tied)
    for tensor, value in checkpoint.replaced.items():
        others = tuple(o for o in tied.get(tensor, ()) if not torch.equal(checkpoint.replaced[o], value))
        if others:
            raise _shared(tensor, others, tied)


def _shared(tensor: str, others: tuple[str, ...], tied: Mapping[str, tuple[str, ...]]) -> SharedWeightError:
    return SharedWeightError(
        f"{tensor} is one tensor with {', '.join(others)}: changing it would change both. "
        "Untie them in the base first (for a Hugging Face folder: save it with tie_word_embeddings=False)",
        tensor=tensor,
        owners=tied[tensor],
    )


def once(new: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The folded tensors, each tied one under the one name that holds it. Raises SharedWeightError when its owners came out different."""
    import torch

    kept = {name: tensor for name, tensor in new.items() if name not in aliases}
    for alias, holder in aliases.items():
        if alias in new and not torch.equal(new[alias], new[holder]):
            raise _shared(alias, (holder,), {alias: (alias, holder)})
    return kept


def narrowed(checkpoint: Checkpoint, size_of: Callable[[str], int | None]) -> list[str]:
    """The tensors that the checkpoint brings whole, and that are stored in fewer bytes an entry than it has them in."""
    floats = {name: t for name, t in checkpoint.replaced.items() if "float" in str(t.dtype)}
    return [name for name, tensor in floats.items() if (size_of(name) or tensor.dtype.itemsize) < tensor.dtype.itemsize]


def _cast(name: str, tensor: Tensor, storage: torch.dtype | None) -> Tensor:
    return round_once(tensor, storage) if storage and tensor.is_floating_point() else tensor


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FusionError(
                f"{name}: not finite after rounding to {str(tensor.dtype).removeprefix('torch.')}; the values exceed the format. "
                "Choose a wider one with --dtype"
            )


def record(checkpoint: Checkpoint, weights: FusedWeights) -> dict[str, Any]:
    """What ``fused.json`` holds: where the weights come from, and what folding did."""
    from reparam_export.files import sha256

    base_weights = checkpoint.base_weights
    return {
        "checkpoint": {**checkpoint.describe(), "notes": [*checkpoint.notes, *weights.notes]},
        "base": {
            "spec": checkpoint.base,
            "weights": None if base_weights is None else str(base_weights),
            "weights_sha256": None if base_weights is None else sha256(base_weights),
            "inputs": list(checkpoint.inputs),
        },
        "compute": "float64",
        "storage": weights.storage(),
        "dtype": weights.dtype,
        "survival": survival_of(weights.kept),
        "weights_sha256": weights.sha256(),
        "changed": {name: list(weights[name].shape) for name in weights.changed},
        "created": list(weights.created),
        "replaced": list(weights.replaced),
        "narrowed": narrowed(
            settled(checkpoint), lambda name: weights[name].dtype.itemsize if name in weights else None
        ),
        "untied": list(weights.untied),
        "aliases": dict(weights.aliases),
        "bytes": sum(t.numel() * t.element_size() for t in weights.tensors.values()),
        "seconds": round(weights.seconds, 3),
    }
