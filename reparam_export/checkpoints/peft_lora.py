"""PEFT LoRA folders: ``adapter_config.json`` with ``peft_type`` LORA and ``adapter_model.safetensors`` (or ``.bin``).

Scale alpha / r, or alpha / sqrt(r) with ``use_rslora``; ``alpha_pattern`` and ``rank_pattern`` per module; ``lora_bias``; Linear, Conv1D,
Conv1d/2d/3d and Embedding; trained biases (``bias="all"``), ``modules_to_save`` and ``trainable_token_indices``. Settings that change the
forward in another way (DoRA, PiSSA, aLoRA ...) are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from reparam_export.adapters import lora, tokens
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Claim, Covers, Parts, Source
from reparam_export.checkpoints._peft import PREFIX, base_spec
from reparam_export.errors import CheckpointError, FusionError, TensorMismatchError

LOOKED_FOR = 'a folder with adapter_config.json, "peft_type": "LORA" (peft)'
READ = frozenset(
    (
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "base_model_name_or_path",
        "target_modules",
    )
)
HARMLESS = frozenset(  # say how it was trained or saved; the forward of the saved tensors does not depend on them
    (
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "revision",
        "task_type",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ephemeral_gpu_offload",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
        "ensure_weight_tying",
    )
)
KEEPS_BASE = (True, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base weights as they are
PAIR = re.compile(r"(?P<module>.+)\.lora_(?:A|B|embedding_A|embedding_B)(?:\.weight|\.bias)?")


def accepts(source: Source) -> bool:
    return source.config.get("peft_type") == "LORA"


def read(source: Source) -> Parts:
    check_config(source)
    claim = source.claim()
    modules = dict.fromkeys(m["module"] for name in source.tensors if (m := PAIR.fullmatch(name)))
    adapters = [_adapter(source, claim, full) for full in modules]
    adapters += _tokens(source, claim)
    replaced = _whole_tensors(claim)
    claim.finish()
    covers = targets(source.config)
    return Parts(tuple(adapters), replaced, base=base_spec(source), covers=covers)


def check_config(source: Source) -> None:
    """Raises FusionError for a setting whose effect on the forward this reader does not know."""
    config = source.config
    init = config.get("init_lora_weights", True)
    if init not in (*KEEPS_BASE, False, None):
        raise FusionError(
            f"{source.path}: init_lora_weights={init!r} changes the base weights when peft loads the adapter; "
            "folding into the unchanged base would give another model. Convert it in peft first "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for name, value in config.items():
        if name in READ or name in HARMLESS or name == "init_lora_weights" or value in (None, False, {}, [], "none"):
            continue
        raise FusionError(
            f"{source.path}: adapter_config.json sets {name}={value!r}, which cannot be folded as plain LoRA"
        )


def _adapter(source: Source, claim: Claim, full: str) -> Adapter:
    embedding = f"{full}.lora_embedding_A" in claim.names()
    if embedding:
        a, b, bias = claim.take(f"{full}.lora_embedding_A"), claim.take(f"{full}.lora_embedding_B"), None
    else:
        a, b = claim.take(f"{full}.lora_A.weight"), claim.take(f"{full}.lora_B.weight")
        bias = claim.take(f"{full}.lora_B.bias") if source.config.get("lora_bias") else None
    module = full.removeprefix(PREFIX)
    rank = int(a.shape[0])
    if tuple(b.shape[1:]) not in ((rank,), (rank, *[1] * (len(b.shape) - 2))):
        raise TensorMismatchError(
            f"{source.path}: {module}: lora_B has shape {tuple(b.shape)}, expected (out, {rank}) to match lora_A {tuple(a.shape)}",
            module=module,
            tensor="lora_B",
            expected=("out", rank),
            found=tuple(b.shape),
        )
    pair = Bottleneck(Affine(_matrix(a)), Affine(_matrix(b), bias))
    return Adapter(module, "lora", lora.Params(pair, _scale(source, module, rank)))


def _matrix(tensor: Tensor) -> Tensor:
    """A convolution's weight (r, in, *kernel) as the matrix over its patches."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def _scale(source: Source, module: str, rank: int) -> float:
    config = source.config
    expected = int(_pattern(config.get("rank_pattern") or {}, module, config.get("r", rank)))
    if expected != rank:
        raise TensorMismatchError(
            f"{source.path}: {module}: adapter_config.json says rank {expected}, lora_A has {rank} rows",
            module=module,
            tensor="lora_A",
            expected=expected,
            found=rank,
        )
    alpha = float(_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha")))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """As peft matches: the first pattern that the end of the module's name matches, from a dot on."""
    for pattern, value in patterns.items():
        if matches(rf"(.*\.)?({pattern})$", module):
            return value
    if otherwise is None:
        raise CheckpointError(f"adapter_config.json has no lora_alpha, so the scale of {module} is unknown")
    return otherwise


def matches(pattern: str, name: str) -> bool:
    """``re.match`` for a pattern out of a file: one that takes longer than a second, or is none, is refused."""
    import regex

    try:
        return regex.match(pattern, name, timeout=1) is not None
    except (regex.error, TimeoutError) as error:
        raise CheckpointError(f"adapter_config.json: the pattern {pattern[:80]!r} cannot be used: {error}") from error


def targets(config: Mapping[str, Any]) -> Covers | None:
    """The modules that peft adapts for this configuration, as it matches names; None where the list does not say."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    layers, saved = config.get("layers_to_transform"), config.get("modules_to_save") or []
    if not wanted or wanted == "all-linear":
        return None

    def named(name: str, given: str | list[str]) -> bool:
        if isinstance(given, str):
            return matches(rf"(?:{given})\Z", name)
        return any(name == end or name.endswith(f".{end}") for end in given)

    def of_layer(name: str) -> bool:
        if layers is None:
            return True
        chosen = [layers] if isinstance(layers, int) else layers
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next((m for p in patterns if (m := re.match(rf".*\.{p}\.(\d+)\.", name))), None)
        return found is not None and int(found[1]) in chosen

    def covers(names: Sequence[str]) -> list[str]:
        kept = [n for n in names if named(n, wanted) and not (excluded and named(n, excluded)) and of_layer(n)]
        return [n for n in kept if not any(part in n.split(".") for part in saved)]

    return covers


def _tokens(source: Source, claim: Claim) -> list[Adapter]:
    """Trainable tokens: ``X.token_adapter.trainable_tokens_delta`` holds the new vectors of the configured indices."""
    end = ".token_adapter.trainable_tokens_delta"
    indices = source.config.get("trainable_token_indices") or {}
    found: list[Adapter] = []
    if indices and not any(n.endswith(end) for n in claim.names()):
        raise CheckpointError(f"{source.path}: trainable_token_indices is set, but the file holds no trained tokens")
    for name, vectors in claim.take_all(lambda n: n.endswith(end)).items():
        module = name.removeprefix(PREFIX).removesuffix(end)
        chosen = (
            indices if isinstance(indices, list) else next((v for k, v in indices.items() if _ends(module, k)), None)
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


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _whole_tensors(claim: Claim) -> dict[str, Tensor]:
    """``modules_to_save`` and trained biases, under the base's own names. ``original_module`` is the unused copy."""
    claim.take_all(lambda name: ".original_module." in name)
    found: dict[str, Tensor] = {}
    for name, tensor in claim.take_all(lambda name: ".lora_" not in name and name.startswith(PREFIX)).items():
        own = re.sub(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.", ".", name.removeprefix(PREFIX))
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
