"""PEFT LoRA folders: ``adapter_config.json`` with ``peft_type`` LORA and ``adapter_model.safetensors`` (or ``.bin``).

Scale alpha / r, or alpha / sqrt(r) with ``use_rslora``; ``alpha_pattern`` and ``rank_pattern`` per module; ``lora_bias``; DoRA; Linear,
Conv1D, Conv1d/2d/3d, Embedding, nn.MultiheadAttention and ``target_parameters``; trained biases (``bias="all"``), ``modules_to_save`` and
``trainable_token_indices``. PiSSA, OLoRA, KaSA and BD-LoRA go through peft's own layers, which change the base when they are
made. What has no weights that reproduce it, or no base that can be had again, is refused by name.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reparam_export.adapters import dora, lora
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Covers, Parts, Source, alike, as_matrix
from reparam_export.checkpoints._peft import (
    Layer,
    check_alpha,
    check_dilation,
    looked_for,
    of_type,
    other_settings,
    parts_of,
    scale_of,
)
from reparam_export.checkpoints._peft_layers import read_layers
from reparam_export.checkpoints._peft_names import PREFIX
from reparam_export.checkpoints._peft_parameters import read_parameters
from reparam_export.errors import FusionError, NotAffineError, TensorMismatchError

LOOKED_FOR = looked_for("LORA")
READ = ("alpha_pattern", "lora_alpha", "lora_bias", "r", "rank_pattern", "target_parameters", "use_dora", "use_rslora")
TRAINING = (  # of no effect on the forward of what was trained
    "corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core",
    "monteclora_config", "qalora_group_size", "velora_config",
)  # fmt: skip
BY_LAYERS = ("kasa_config", "use_bdlora")
REFUSED = {
    "alora_invocation_tokens": "aLoRA acts from the position of a token on, so the change depends on the input",
    "arrow_config": "Arrow routes each token to adapters of its own choice",
    "layer_replication": "layer_replication runs layers of the base several times; save the enlarged model as a base",
    "megatron_config": "megatron_config: the layers are those of Megatron",
    "use_qalora": "QA-LoRA is trained on a quantized base",
}
KEEPS_BASE = (True, False, None, "eva", "gaussian", "mica", "orthogonal")
CHANGES_BASE = ("olora", "pissa")  # by a decomposition that gives the same again
TWICE = "nn.MultiheadAttention: peft's forward adds the change of out_proj twice, in training too, and so does the folded weight"
PAIR = re.compile(r"(?P<module>.+)\.lora_(?:A|B|embedding_A|embedding_B)(?:\.weight|\.bias)?")
OF_TRAINING = re.compile(r"\.lora_(?:velora_embed|monteclora_sampler)(?:\.|\Z)")

accepts = of_type("LORA")


def read(source: Source) -> Parts:
    _check(source)
    check_alpha(source, "lora_alpha")
    init = source.config.get("init_lora_weights", True)
    if init in CHANGES_BASE or any(source.config.get(name) for name in BY_LAYERS):
        why = f": {init} takes a part out of the base when it begins" if init in CHANGES_BASE else ""
        return read_layers(source, f"peft's own LORA layers, probed one by one{why}", _rebuilding(source))
    claim = source.claim()
    claim.take_all(OF_TRAINING.search)
    modules = dict.fromkeys(m["module"] for name in claim.names() if (m := PAIR.fullmatch(name)))
    convolutions = any(len(t.shape) > 2 for name, t in source.tensors.items() if PAIR.fullmatch(name))
    check = check_dilation if convolutions else None
    if source.config.get("target_parameters"):
        return read_parameters(source, claim, list(modules), lambda layer: _adapter(layer, list(modules)), check)
    tied = _tied_to_embeddings(source, list(modules))
    adapters = [_adapter(Layer(source, claim, full), list(modules), full in tied) for full in modules]
    parts = parts_of(source, claim, adapters, check)
    parts = replace(parts, covers=_with_tied(parts.covers, [full.removeprefix(PREFIX) for full in tied]))
    return replace(parts, notes=(TWICE, *parts.notes)) if any(a.parameter for a in adapters) else parts


def _tied_to_embeddings(source: Source, modules: Sequence[str]) -> list[str]:
    """With ``ensure_weight_tying``, the layers that share their weight with an adapted embedding, and so its A and B, transposed.

    peft gives them to every layer that the base ties to its embedding, whether it is a target or not (``LoraModel._add_targets_to_tie``).
    """
    if not source.config.get("ensure_weight_tying"):
        return []
    found = []
    for full in modules:
        a, b = source.tensors.get(f"{full}.lora_A.weight"), source.tensors.get(f"{full}.lora_B.weight")
        for other in modules:
            down, up = (source.tensors.get(f"{other}.lora_embedding_{side}") for side in "AB")
            if (
                a is not None
                and b is not None
                and down is not None
                and up is not None
                and alike(a, up.T)
                and alike(b, down.T)
            ):
                found.append(full)
    return found


def _with_tied(covers: Covers | None, tied: Sequence[str]) -> Covers | None:
    """The modules that are covered, and these."""
    if covers is None or not tied:
        return covers
    return lambda names: list(dict.fromkeys([*covers(names), *(name for name in names if name in tied)]))


def _rebuilding(source: Source) -> str:
    """What of the settings decomposes the base while loading."""
    return (
        str(source.config["init_lora_weights"])
        if source.config.get("init_lora_weights") in CHANGES_BASE
        else ("kasa" if source.config.get("kasa_config") else "LORA")
    )


def _check(source: Source) -> None:
    """Raises FusionError for what cannot be folded, naming the setting, the reason and the modules."""
    config = source.config
    modules = tuple(m["module"].removeprefix(PREFIX) for name in source.tensors if (m := PAIR.fullmatch(name)))
    modules = tuple(dict.fromkeys(modules))
    where = f"({len(modules)} modules, first {modules[0]})" if modules else ""
    for name, reason in REFUSED.items():
        if config.get(name):
            raise NotAffineError(
                f"{source.path}: adapter_config.json sets {name}={str(config[name])[:80]}: {reason} {where}",
                modules=modules,
                reason=reason,
            )
    unknown = other_settings(config, (*READ, *TRAINING, *BY_LAYERS))
    if unknown:
        raise FusionError(
            f"{source.path}: adapter_config.json sets {unknown[0]}={str(config[unknown[0]])[:80]}, whose effect on the forward is not known"
        )
    init = config.get("init_lora_weights", True)
    if init not in (*KEEPS_BASE, *CHANGES_BASE):
        raise FusionError(
            f"{source.path}: init_lora_weights={init!r} changed the base weights when training began, by numbers that are not in this "
            f"folder {where}; folding into the unchanged base would give another model. Convert it in peft first "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


def _adapter(layer: Layer, modules: Sequence[str], tied: bool = False) -> Adapter:
    """The adapter on one module; on an nn.MultiheadAttention, that on its packed projections and that on its output one.

    tied: are its A and B those of an embedding?
    """
    module = re.sub(r"\.base_layer\.out_proj\Z", "", layer.full)
    if (
        module != layer.full
    ):  # peft's forward adds the change of the output projection twice: here, and as a layer of its own
        kind, params = _params(layer, replace(layer, full=module))
        return Adapter(f"{module.removeprefix(PREFIX)}.out_proj", kind, replace(params, scale=2 * params.scale))
    attention = f"{layer.full}.base_layer.out_proj" in modules
    return Adapter(layer.module, *_params(layer, layer, tied), parameter="in_proj_weight" if attention else None)


def _params(layer: Layer, of: Layer, tied: bool = False) -> tuple[str, Any]:
    """The kind and its Params. of: the module whose patterns hold; tied: its rank in the settings is that of its scale alone."""
    a = layer.take_if("lora_embedding_A")
    embedding = a is not None
    a, b = (a, layer.take("lora_embedding_B")) if a is not None else _pair(layer)
    bias = layer.take("lora_B.bias") if layer.source.config.get("lora_bias") and not embedding else None
    rank = int(a.shape[0])
    if tied:
        rank = int(of.own("rank_pattern", "r", rank))
    else:
        of.check_rank(rank)
    _check_pair(layer, a, b)
    pair, scale = Bottleneck(Affine(as_matrix(a)), Affine(as_matrix(b), bias)), scale_of(of, rank)
    if not layer.source.config.get("use_dora"):
        return "lora", lora.Params(pair, scale)
    magnitude = layer.take_if("lora_magnitude_vector")
    magnitude = layer.take("lora_magnitude_vector.weight") if magnitude is None else magnitude
    return "dora", dora.Params(pair, magnitude.reshape(-1), scale)


def _pair(layer: Layer) -> tuple[Tensor, Tensor]:
    a, b = layer.take("lora_A.weight"), layer.take("lora_B.weight")
    rank, per_group = int(a.shape[0]), int(b.shape[1]) if len(b.shape) > 2 else 0
    return (a, b) if not per_group or per_group >= rank or rank % per_group else _in_groups(layer, a, b)


def _in_groups(layer: Layer, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """LoRA on a convolution in groups, as peft trains it: lora_A (r, in, *kernel) reads every channel, lora_B (out, r / groups, 1, ...) is
    itself in groups. The same as a pair on the base's weight (out, in / groups, *kernel), where there is one.

    Raises FusionError where lora_A reads channels of other groups: what was trained is no convolution in groups.
    """
    rank, inn, *kernel = map(int, a.shape)
    out, per_group = int(b.shape[0]), int(b.shape[1])
    groups = rank // per_group
    blocks = a.reshape(groups, per_group, groups, -1) if inn % groups == 0 else None
    others = [] if blocks is None else [blocks[g, :, h] for g in range(groups) for h in range(groups) if g != h]
    if blocks is None or out % groups or any(bool((each != 0).any()) for each in others):
        raise FusionError(
            f"{layer.source.path}: {layer.module}: LoRA on a convolution in {groups} groups: its lora_A reads all {inn} channels, and each "
            f"output of the convolution only the {inn // groups} of its group, so no weight of it gives what was trained (nor does peft "
            "merge it). Train without the convolutions in groups among target_modules, or with LyCORIS, whose adapters have groups"
        )
    library: Any = sys.modules["torch" if hasattr(a, "new_zeros") else "numpy"]
    down = library.zeros((rank, inn // groups, math.prod(kernel)), dtype=a.dtype)
    up, rows = library.zeros((out, rank), dtype=b.dtype), out // groups
    for g in range(groups):
        own = slice(g * per_group, (g + 1) * per_group)
        down[own] = blocks[g, :, g].reshape(per_group, inn // groups, -1)
        up[g * rows : (g + 1) * rows, own] = b.reshape(out, per_group)[g * rows : (g + 1) * rows]
    return down.reshape(rank, inn // groups, *kernel), up


def _check_pair(layer: Layer, a: Tensor, b: Tensor) -> None:
    rank = int(a.shape[0])
    if tuple(b.shape[1:]) not in ((rank,), (rank, *[1] * (len(b.shape) - 2))):
        raise TensorMismatchError(
            f"{layer.source.path}: {layer.module}: lora_B has shape {tuple(b.shape)}, expected (out, {rank}) to match "
            f"lora_A {tuple(a.shape)}",
            module=layer.module,
            tensor="lora_B",
            expected=("out", rank),
            found=tuple(b.shape),
        )
