"""What every PEFT folder shares: its keys and settings, which modules it means, whole tensors, and the place where it names its base.

A reader of one ``peft_type`` names the settings that its formula uses (``reads``) and makes Params of one module's tensors; a folder with
other settings, which peft knows and the formula does not, goes through peft's own layers instead (``_peft_layers``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from reparam_export.affine import Tensor
from reparam_export.checkpoints import Adapter, Claim, Parts, Source, alike
from reparam_export.checkpoints._peft_names import PREFIX, check_matched, of_pattern, part_of, targets, unused_targets
from reparam_export.checkpoints._peft_tokens import on_every_tie, trained_tokens
from reparam_export.errors import CheckpointError, FusionError, MissingSettingError, TensorMismatchError

if TYPE_CHECKING:
    from torch import nn

HARMLESS = frozenset(  # say how it was trained, loaded or saved; the forward of the saved tensors does not depend on them
    (
        "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type",
        "peft_version", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices",
    )
)  # fmt: skip
LORA_LAYER = re.compile(r"\.lora_(?:A(?:\.[^.]+)?\.weight|embedding_A)")
TABLES = ("embed_tokens", "lm_head", "embed_out", "output_projection", ".token_adapter")
WRAPPERS = re.compile(r"\.(?:modules_to_save(?:\.default)?|(?:token_adapter\.)?base_layer|ln_tuning_layers)(?=\.)")


def of_type(*names: str) -> Callable[[Source], bool]:
    """``accepts`` of the reader of these peft types."""
    return lambda source: source.config.get("peft_type") in names and not is_state(source) and not is_torchtune(source)


def is_torchtune(source: Source) -> bool:
    """Is it a file of torchtune, whose configuration has a ``peft_type`` too?"""
    return any(name.endswith(".lora_a.weight") for name in source.tensors)


def is_state(source: Source) -> bool:
    """Is it the state dict of a model with peft's layers in it, and not what peft saves of an adapter?"""
    names = source.tensors
    if is_torchtune(source):
        return False
    if "peft_type" not in source.config:
        return any(LORA_LAYER.search(name) for name in names)
    ours = tuner_prefix(source)
    outside = not any(name.startswith("base_model.") for name in names) and any(f".{ours}" in name for name in names)
    return outside or any(_below_adapter(name, names) for name in names)


def _below_adapter(name: str, names: Collection[str]) -> bool:
    """Is it the weight below an adapter? Of embeddings, trained tokens and output layers, a folder may bring it too."""
    owner = name.removesuffix(".base_layer.weight")
    embedded = any(f"{owner}.{kind}_embedding_A" in names for kind in ("lora", "hira"))
    return owner != name and not embedded and not owner.endswith(TABLES)


def looked_for(name: str) -> str:
    return f'a folder with adapter_config.json, "peft_type": "{name}" (peft)'


@dataclass(frozen=True)
class Layer:
    """One adapted module of a folder: its tensors, to be taken by their names below the module, and its settings."""

    source: Source
    claim: Claim
    full: str  # with the prefix of the file

    @property
    def module(self) -> str:
        return self.full.removeprefix(PREFIX)

    def take(self, name: str) -> Tensor:
        """Raises TensorMismatchError when it is not there."""
        return self.claim.take(f"{self.full}.{name}")

    def take_if(self, name: str) -> Tensor | None:
        return self.claim.take_if(f"{self.full}.{name}")

    def setting(self, name: str, otherwise: Any = None) -> Any:
        """A setting of the whole folder. Raises MissingSettingError when it is neither there nor has a usual value."""
        value = self.source.config.get(name)
        return self._found(name, otherwise if value is None else value)

    def own(self, pattern: str, name: str, otherwise: Any = None) -> Any:
        """A setting of this module: by the first pattern that the end of its name matches from a dot on, as peft matches."""
        for key, value in (self.source.config.get(pattern) or {}).items():
            if of_pattern(key, self.module):
                return value
        return self.setting(name, otherwise)

    def check_rank(self, found: int, pattern: str = "rank_pattern", name: str = "r") -> None:
        """Raises TensorMismatchError when the tensors have another rank than the settings say."""
        expected = int(self.own(pattern, name, found))
        if expected != found:
            raise TensorMismatchError(
                f"{self.source.path}: {self.module}: adapter_config.json says rank {expected}, the tensors have rank {found}",
                module=self.module,
                tensor=name,
                expected=expected,
                found=found,
            )

    def _found(self, name: str, value: Any) -> Any:
        if value is None:
            raise MissingSettingError(
                f'{self.source.path}: adapter_config.json has no {name}, which {self.module} needs; add "{name}": VALUE to it, as the '
                "training script had it, and run again. peft itself goes on with a default of its own, whatever it was trained with",
                setting=name,
                found_in="the training script",
                option=f'"{name}": VALUE in adapter_config.json',
            )
        return value


def scale_of(layer: Layer, rank: int) -> float:
    """LoRA's: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
    alpha = float(layer.own("alpha_pattern", "lora_alpha"))
    return alpha / math.sqrt(rank) if layer.source.config.get("use_rslora") else alpha / rank


def check_alpha(source: Source, name: str) -> None:
    """Raises CheckpointError where every scale is 0: as some mergers of sharded training write it that do not know it."""
    config = source.config
    patterns = config.get("alpha_pattern") or {}
    if config.get(name) is not None and not config[name] and not any(patterns.values()):
        raise CheckpointError(
            f"{source.path}: adapter_config.json says {name} {config[name]}, so that every change of it is multiplied with 0; put "
            f"the {name} in that it was trained with (verl's model_merger, for one, writes 0)"
        )


MakeParams = Callable[[Layer], "tuple[str, Any]"]  # the kind's name and its Params
Check = Callable[["nn.Module", Sequence[Adapter]], None]  # of the base with the adapters on it


def read_folder(
    source: Source,
    first: str | tuple[str, ...],
    make: MakeParams,
    reads: Sequence[str] = (),
    shared: Sequence[str] = (),
    check: Check | None = None,
) -> Parts:
    """A folder of a type that has a formula. first: the tensor that each adapted module has, or several of which it has one.

    reads: settings that ``make`` uses. shared: names of tensors that all modules share. check: raises FusionError for a base on which
    the formula does not hold. Raises CheckpointError and its kin.
    """
    if other_settings(source.config, reads):
        from reparam_export.checkpoints._peft_layers import read_layers

        return read_layers(source)
    claim = source.claim()
    adapters = []
    for full in modules_with(source, first):
        layer = Layer(source, claim, full)
        adapters.append(Adapter(layer.module, *make(layer)))
    for name in shared:
        claim.take_if(name)
    return parts_of(source, claim, adapters, check)


def parts_of(
    source: Source,
    claim: Claim,
    adapters: Sequence[Adapter],
    check: Check | None = None,
    names: Sequence[str] | None = None,
) -> Parts:
    """The folder's parts, once every adapter tensor is taken: trained tokens, whole tensors, and nothing left over.

    names: of the adapted modules, as patterns are matched against them; None: those of the adapters; empty: not known here.
    """
    found = (*adapters, *trained_tokens(source, claim))
    saved = [str(entry) for entry in source.config.get("modules_to_save") or []]
    replaced = whole_tensors(claim, source, {a.module for a in found}, saved)
    claim.finish()
    names = [a.module for a in adapters] if names is None else names
    check_matched(source.path, source.config, names, list(replaced))
    notes = unused_targets(source.config, [a.module for a in found], list(replaced))
    needs_base = check is not None or any(adapter.kind == "tokens" for adapter in found)
    bind = partial(on_base, check) if needs_base else None
    covers = targets(source.config)
    return Parts(
        found,
        replaced,
        base=base_spec(source),
        covers=covers,
        only=covers is not None,
        copies=frozenset(name for name in replaced if part_of(name, saved)),
        bind=bind,
        notes=notes,
        task=source.config.get("task_type"),
    )


def on_base(check: Check | None, module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters once the base has passed the check, trained tokens on every layer that shares their weight."""
    if check is not None:
        check(module, adapters)
    placed = [a for a in adapters if a.kind != "tokens"]
    tokens = {a.module: a for a in adapters if a.kind == "tokens"}
    for adapter in tokens.values():
        placed += [a for a in on_every_tie(module, adapter) if a.module == adapter.module or a.module not in tokens]
    return placed


def modules_with(source: Source, first: str | tuple[str, ...]) -> list[str]:
    """The modules, with the file's prefix, that have a tensor of that name (or of one of them), in file order."""
    ends = tuple(f".{name}" for name in ((first,) if isinstance(first, str) else first))
    found = {name.removesuffix(end): None for name in source.tensors for end in ends if name.endswith(end)}
    return list(found)


def other_settings(config: Mapping[str, Any], reads: Collection[str]) -> list[str]:
    """Names of settings that are set and on which the forward may depend in a way that the reader does not know."""
    return [
        name
        for name, value in config.items()
        if name not in HARMLESS
        and name not in reads
        and not name.endswith("_dropout")
        and value not in (None, False, {}, [], "none")
    ]


def base_spec(source: Source) -> str | None:
    """``hf:`` spec of ``base_model_name_or_path``: a folder beside the adapter's, one of the working folder, or a hub id."""
    name = source.config.get("base_model_name_or_path")
    if not name:
        return None
    if not isinstance(name, str) or len(name) > 1000 or any(c in "?&" or not c.isprintable() for c in name):
        raise CheckpointError(f"{source.path}: base_model_name_or_path is not a usable folder or hub id; pass --base")
    task = source.config.get("task_type")
    return f"hf:{source.near(name)}" + (f"?task={task}" if task else "")


def whole_tensors(claim: Claim, source: Source, adapted: Collection[str], saved: Sequence[str]) -> dict[str, Tensor]:
    """``modules_to_save`` and trained biases, under the base's own names. ``original_module`` is the unused copy."""
    claim.take_all(lambda name: ".original_module." in name)
    ours = tuner_prefix(source)
    found: dict[str, Tensor] = {}
    for name, tensor in claim.take_all(lambda name: name.startswith(PREFIX) and f".{ours}" not in name).items():
        own = WRAPPERS.sub("", name.removeprefix(PREFIX))
        if own == name.removeprefix(PREFIX) and not part_of(own, saved):
            _check_plain(source, own, adapted)
        if own in found and not alike(found[own], tensor):
            raise TensorMismatchError(
                f"{name} and another entry of the checkpoint both give {own}, with different values",
                module=own.rpartition(".")[0],
                tensor=own,
                expected="one value",
                found="two",
            )
        found[own] = tensor
    return found


def _check_plain(source: Source, own: str, adapted: Collection[str]) -> None:
    """Raises TensorMismatchError for a tensor of an adapted module under the base's plain name: peft's loader passes it over.

    What peft saves of such a module stands below ``base_layer`` or ``modules_to_save``; the biases of ``bias="all"`` stood under their
    plain names in older versions.
    """
    module, _, leaf = own.rpartition(".")
    if module in adapted and not (leaf == "bias" and source.config.get("bias") in ("all", "lora_only")):
        raise TensorMismatchError(
            f"{source.path}: {PREFIX}{own} is a tensor of {module}, which has an adapter, under the base's plain name; peft saves such "
            "tensors below base_layer, and its loader passes this one over, so it is not known whether the adapter was trained on it. "
            f"If it was, put it into the base; then leave it out here, with --drop '{PREFIX}{own}'",
            module=module,
            tensor=leaf,
            expected=f"{PREFIX}{module}.base_layer.{leaf}",
            found=f"{PREFIX}{own}",
        )


def tuner_prefix(source: Source) -> str:
    """What the names of this type's tensors begin with below their module."""
    name = str(source.config.get("peft_type", "")).lower()
    return {
        "lora": "lora_", "adalora": "lora_", "loha": "hada_", "ln_tuning": "no tensors of its own",
    }.get(name, f"{name}_")  # fmt: skip


def check_geometry(module: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Raises FusionError for convolutions that peft's forward of some types treats as other ones than the base's.

    It passes on the first of the strides and of the paddings only, no dilation, and takes the kernel for square.
    """
    for name in dict.fromkeys(adapter.module for adapter in adapters):
        layer: Any = module.get_submodule(name)
        if not hasattr(layer, "kernel_size"):
            continue
        padding = (layer.padding,) if isinstance(layer.padding, str) else tuple(layer.padding)
        plain = all(len(set(numbers)) == 1 for numbers in (layer.kernel_size, layer.stride, padding))
        if not plain or isinstance(layer.padding, str) or set(layer.dilation) != {1}:
            raise FusionError(
                f"{name}: peft's forward of this type takes a convolution to have a square kernel, one stride, one padding and no "
                f"dilation; this one has kernel {layer.kernel_size}, stride {layer.stride}, padding {layer.padding}, dilation "
                f"{layer.dilation}, so that what was trained is another layer, which no weight of this one reproduces"
            )


def check_dilation(module: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Raises FusionError for dilated convolutions, whose dilation the adapter's own convolution does not have."""
    for name in dict.fromkeys(adapter.module for adapter in adapters):
        layer: Any = module.get_submodule(name)
        if hasattr(layer, "kernel_size") and any(
            k > 1 < d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ):
            raise FusionError(
                f"{name}: a convolution with kernel {layer.kernel_size} and dilation {layer.dilation}; peft's LoRA on it is not dilated, "
                "so that no weight of this convolution reproduces what was trained"
            )
