"""What every PEFT folder shares: its keys and settings, which modules it means, whole tensors, and the place where it names its base.

A reader of one ``peft_type`` names the settings that its formula uses (``reads``) and makes Params of one module's tensors; a folder with
other settings, which peft knows and the formula does not, goes through peft's own layers instead (``_peft_layers``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import tokens
from reparam_export.affine import Tensor
from reparam_export.checkpoints import Adapter, Claim, Covers, Parts, Source
from reparam_export.errors import CheckpointError, FusionError, TensorMismatchError

if TYPE_CHECKING:
    from torch import nn

PREFIX = "base_model.model."
HARMLESS = frozenset(  # say how it was trained, loaded or saved; the forward of the saved tensors does not depend on them
    (
        "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type",
        "peft_version", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices",
    )
)  # fmt: skip
WRAPPERS = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer|ln_tuning_layers)(?=\.)")


def of_type(*names: str) -> Callable[[Source], bool]:
    """``accepts`` of the reader of these peft types."""
    return lambda source: source.config.get("peft_type") in names


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
        """A setting of the whole folder. Raises CheckpointError when it is neither there nor has a usual value."""
        value = self.source.config.get(name)
        return self._found(name, otherwise if value is None else value)

    def own(self, pattern: str, name: str, otherwise: Any = None) -> Any:
        """A setting of this module: by the first pattern that the end of its name matches from a dot on, as peft matches."""
        for key, value in (self.source.config.get(pattern) or {}).items():
            if matches(rf"(.*\.)?({key})$", self.module):
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
            raise CheckpointError(f"{self.source.path}: adapter_config.json has no {name}, which {self.module} needs")
        return value


def scale_of(layer: Layer, rank: int) -> float:
    """LoRA's: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
    alpha = float(layer.own("alpha_pattern", "lora_alpha"))
    return alpha / math.sqrt(rank) if layer.source.config.get("use_rslora") else alpha / rank


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


def parts_of(source: Source, claim: Claim, adapters: Sequence[Adapter], check: Check | None = None) -> Parts:
    """The folder's parts, once every adapter tensor is taken: trained tokens, whole tensors, and nothing left over."""
    found = (*adapters, *trained_tokens(source, claim))
    replaced = whole_tensors(claim, source)
    claim.finish()
    needs_base = check is not None or any(adapter.kind == "tokens" for adapter in found)
    bind = partial(on_base, check, found) if needs_base else None
    covers = targets(source.config)
    return Parts(found, replaced, base=base_spec(source), covers=covers, only=covers is not None, bind=bind)


def on_base(check: Check | None, adapters: Sequence[Adapter], module: nn.Module) -> list[Adapter]:
    """The adapters once the base has passed the check, trained tokens on every layer that shares their weight."""
    if check is not None:
        check(module, adapters)
    placed = [a for a in adapters if a.kind != "tokens"]
    tokens = {a.module: a for a in adapters if a.kind == "tokens"}
    for adapter in tokens.values():
        placed += [a for a in on_every_tie(module, adapter) if a.module == adapter.module or a.module not in tokens]
    return placed


def on_every_tie(module: nn.Module, adapter: Adapter) -> list[Adapter]:
    """Trained tokens on their embedding and, as peft has it, on the layers that share its weight, on the side of their outputs."""
    from torch import nn as torch_nn

    shared = module.get_submodule(adapter.module).get_parameter("weight")
    owners = [name for name, part in module.named_modules() if part._parameters.get("weight") is shared]
    found = []
    for name in owners:
        layer = module.get_submodule(name)
        side = "output" if isinstance(layer, torch_nn.Linear) else "input"
        if side == "output" and layer.bias is not None:
            raise FusionError(
                f"{name}: peft's forward of trained tokens on a linear layer leaves its bias out; no such layer can be kept"
            )
        if name == adapter.module or side == "output":
            found.append(replace(adapter, module=name, params=replace(adapter.params, side=side)))
    return found


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


def matches(pattern: str, name: str) -> bool:
    """``re.match`` for a pattern out of a file: one that takes longer than a second, or is none, is refused."""
    import regex

    try:
        return regex.match(pattern, name, timeout=1) is not None
    except (regex.error, TimeoutError) as error:
        raise CheckpointError(f"adapter_config.json: the pattern {pattern[:80]!r} cannot be used: {error}") from error


def named(name: str, given: str | Sequence[str]) -> bool:
    """Does a module's name match a pattern as a whole, or end, from a dot on, with one of several names?"""
    if isinstance(given, str):
        return matches(rf"(?:{given})\Z", name)
    return any(name == end or name.endswith(f".{end}") for end in given)


def targets(config: Mapping[str, Any]) -> Covers | None:
    """The modules that peft adapts for this configuration, as it matches names; None where the list does not say."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    layers, saved = config.get("layers_to_transform"), config.get("modules_to_save") or []
    if not wanted or wanted == "all-linear":
        return None

    def of_layer(name: str) -> bool:
        if isinstance(wanted, str) or name in wanted or layers is None or layers == []:
            return True
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next((m for p in patterns if (m := first_number(p, name)) is not None), None)
        return found is not None and found in ([layers] if isinstance(layers, int) else layers)

    def covers(names: Sequence[str]) -> list[str]:
        kept = [n for n in names if named(n, wanted) and not (excluded and named(n, excluded)) and of_layer(n)]
        return [n for n in kept if not any(part in n.split(".") for part in saved)]

    return covers


def first_number(pattern: str, name: str) -> int | None:
    """The number after the first part of the name that matches the pattern: a layer's."""
    import regex

    try:
        found = regex.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", name, timeout=1)
    except (regex.error, TimeoutError) as error:
        raise CheckpointError(f"adapter_config.json: the pattern {pattern[:80]!r} cannot be used: {error}") from error
    return None if found is None else int(found["number"])


def trained_tokens(source: Source, claim: Claim) -> list[Adapter]:
    """Trainable tokens: ``X.token_adapter.trainable_tokens_delta`` holds the new vectors of the configured indices."""
    end = re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta\Z")
    indices = source.config.get("trainable_token_indices") or source.config.get("token_indices") or {}
    found: list[Adapter] = []
    if indices and not any(end.search(n) for n in claim.names()):
        raise CheckpointError(f"{source.path}: trainable tokens are configured, but the file holds none")
    for name, vectors in claim.take_all(end.search).items():
        module = end.sub("", name.removeprefix(PREFIX))
        chosen = (
            indices if isinstance(indices, list) else next((v for k, v in indices.items() if named(module, [k])), None)
        )
        if chosen is None:
            raise CheckpointError(
                f"{source.path}: {module} has trained tokens, but trainable_token_indices does not list it"
            )
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in chosen)
        if not whole or len(set(chosen)) != len(chosen) or len(chosen) != len(vectors):
            raise CheckpointError(
                f"{source.path}: {module}: {len(vectors)} trained tokens do not fit the indices {str(chosen)[:80]}"
            )
        found.append(Adapter(module, "tokens", tokens.Params(tuple(chosen), vectors)))
    return found


def whole_tensors(claim: Claim, source: Source) -> dict[str, Tensor]:
    """``modules_to_save`` and trained biases, under the base's own names. ``original_module`` is the unused copy."""
    claim.take_all(lambda name: ".original_module." in name)
    ours = tuner_prefix(source)
    found: dict[str, Tensor] = {}
    for name, tensor in claim.take_all(lambda name: name.startswith(PREFIX) and f".{ours}" not in name).items():
        own = WRAPPERS.sub("", name.removeprefix(PREFIX))
        if own in found and not bool((found[own] == tensor).all()):
            raise TensorMismatchError(
                f"{name} and another entry of the checkpoint both give {own}, with different values",
                module=own.rpartition(".")[0],
                tensor=own,
                expected="one value",
                found="two",
            )
        found[own] = tensor
    return found


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
