"""PEFT LoRA folders: ``adapter_config.json`` with ``peft_type`` LORA and ``adapter_model.safetensors`` (or ``.bin``).

Scale alpha / r, or alpha / sqrt(r) with ``use_rslora``; ``alpha_pattern`` and ``rank_pattern`` per module; ``lora_bias``; DoRA; Linear,
Conv1D, Conv1d/2d/3d, Embedding, nn.MultiheadAttention and ``target_parameters``; trained biases (``bias="all"``), ``modules_to_save`` and
``trainable_token_indices``. PiSSA, OLoRA, KaSA and BD-LoRA go through peft's own layers, which change the base when they are
made. What has no weights that reproduce it, or no base that can be had again, is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import dora, lora
from reparam_export.affine import Affine, Bottleneck, Tensor
from reparam_export.checkpoints import Adapter, Claim, Parts, Source, as_matrix
from reparam_export.checkpoints._peft import (
    PREFIX,
    Layer,
    check_dilation,
    looked_for,
    named,
    of_type,
    on_base,
    other_settings,
    parts_of,
)
from reparam_export.checkpoints._peft_layers import read_layers
from reparam_export.errors import FusionError, NotAffineError, TensorMismatchError

if TYPE_CHECKING:
    from torch import nn

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
    init = source.config.get("init_lora_weights", True)
    if init in CHANGES_BASE or any(source.config.get(name) for name in BY_LAYERS):
        why = f": {init} takes a part out of the base when it begins" if init in CHANGES_BASE else ""
        return read_layers(source, f"peft's own LORA layers, probed one by one{why}")
    claim = source.claim()
    claim.take_all(OF_TRAINING.search)
    modules = dict.fromkeys(m["module"] for name in claim.names() if (m := PAIR.fullmatch(name)))
    if source.config.get("target_parameters"):
        return _of_parameters(source, claim, list(modules))
    adapters = [_adapter(Layer(source, claim, full), list(modules)) for full in modules]
    convolutions = any(len(t.shape) > 2 for name, t in source.tensors.items() if PAIR.fullmatch(name))
    parts = parts_of(source, claim, adapters, check_dilation if convolutions else None)
    return replace(parts, notes=(TWICE,)) if any(a.parameter for a in adapters) else parts


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


def _adapter(layer: Layer, modules: Sequence[str]) -> Adapter:
    """The adapter on one module; on an nn.MultiheadAttention, that on its packed projections and that on its output one."""
    module = re.sub(r"\.base_layer\.out_proj\Z", "", layer.full)
    if (
        module != layer.full
    ):  # peft's forward adds the change of the output projection twice: here, and as a layer of its own
        kind, params = _params(layer, replace(layer, full=module))
        return Adapter(f"{module.removeprefix(PREFIX)}.out_proj", kind, replace(params, scale=2 * params.scale))
    attention = f"{layer.full}.base_layer.out_proj" in modules
    return Adapter(layer.module, *_params(layer, layer), parameter="in_proj_weight" if attention else None)


def _params(layer: Layer, of: Layer) -> tuple[str, Any]:
    """The kind and its Params. of: the module whose patterns hold."""
    a = layer.take_if("lora_embedding_A")
    embedding = a is not None
    a, b = (a, layer.take("lora_embedding_B")) if a is not None else _pair(layer)
    bias = layer.take("lora_B.bias") if layer.source.config.get("lora_bias") and not embedding else None
    rank = int(a.shape[0])
    of.check_rank(rank)
    _check_pair(layer, a, b)
    pair, scale = Bottleneck(Affine(as_matrix(a)), Affine(as_matrix(b), bias)), scale_of(of, rank)
    if not layer.source.config.get("use_dora"):
        return "lora", lora.Params(pair, scale)
    magnitude = layer.take_if("lora_magnitude_vector")
    magnitude = layer.take("lora_magnitude_vector.weight") if magnitude is None else magnitude
    return "dora", dora.Params(pair, magnitude.reshape(-1), scale)


def _pair(layer: Layer) -> tuple[Tensor, Tensor]:
    return layer.take("lora_A.weight"), layer.take("lora_B.weight")


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


def scale_of(layer: Layer, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    alpha = float(layer.own("alpha_pattern", "lora_alpha"))
    return alpha / math.sqrt(rank) if layer.source.config.get("use_rslora") else alpha / rank


def _of_parameters(source: Source, claim: Claim, modules: Sequence[str]) -> Parts:
    """``target_parameters``: peft wraps a module once for each of its targeted parameters, in the module's own order.

    The innermost wrapper, whose name has the most ``base_layer``, holds the first of them. Which parameters a module has, and how a stack
    of matrices lies in memory, only the base knows.
    """
    pairs = {full: (*_pair(Layer(source, claim, full)), Layer(source, claim, full)) for full in modules}
    parameters = [str(name) for name in source.config["target_parameters"]]
    owner = {full: re.sub(r"(?:\.base_layer)+\Z", "", full).removeprefix(PREFIX) for full in modules}

    def bind(module: nn.Module) -> list[Adapter]:
        found: list[Adapter] = []
        for name in dict.fromkeys(owner.values()):
            target = module.get_submodule(name)
            own = [p for p, _ in target.named_parameters(recurse=False) if named(f"{name}.{p}", parameters)]
            wrappers = sorted(
                (full for full in modules if owner[full] == name), key=lambda full: -full.count(".base_layer")
            )
            if not own:
                found.append(_plain(source, name, *pairs[wrappers[0]]))
                continue
            if len(own) != len(wrappers):
                raise FusionError(
                    f"{source.path}: {name}: the file adapts {len(wrappers)} of its parameters, target_parameters names {', '.join(own)}"
                )
            for parameter, full in zip(own, wrappers, strict=True):
                found += _on_parameter(source, name, parameter, target.get_parameter(parameter), *pairs[full])
        return [*found, *on_base(None, parts.adapters[len(pairs) :], module)]

    waiting = [
        Adapter(
            owner[full],
            "lora",
            lora.Params(Bottleneck(Affine(a), Affine(b)), scale_of(layer, int(a.shape[0]))),
            parameter=full,
        )
        for full, (a, b, layer) in pairs.items()
    ]
    parts = parts_of(source, claim, waiting)
    return replace(parts, bind=bind, covers=lambda names: [], only=False)


def _plain(source: Source, name: str, a: Tensor, b: Tensor, layer: Layer) -> Adapter:
    """A module of ``target_modules`` beside the targeted parameters."""
    return Adapter(
        name,
        "lora",
        lora.Params(Bottleneck(Affine(as_matrix(a)), Affine(as_matrix(b))), scale_of(layer, int(a.shape[0]))),
    )


def _on_parameter(
    source: Source, name: str, parameter: str, tensor: Tensor, a: Tensor, b: Tensor, layer: Layer
) -> list[Adapter]:
    """One adapter for a matrix, one for each matrix of a stack: rows (expert, r) of A, columns (r, expert) of B."""
    experts = 1 if tensor.ndim == 2 else int(tensor.shape[0])
    rank, left = divmod(int(a.shape[0]), experts)
    if tensor.ndim not in (2, 3) or left:
        raise FusionError(
            f"{name}.{parameter}: a parameter of shape {tuple(tensor.shape)} and lora_A of {tuple(a.shape)} do not fit; expected 2 or 3 "
            "dimensions, and a rank for each matrix of a stack"
        )
    scale = scale_of(replace(layer, full=f"{PREFIX}{name}"), rank)
    downs, ups = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts)
    return [
        Adapter(
            name,
            "lora",
            lora.Params(Bottleneck(Affine(downs[e]), Affine(ups[..., e])), scale),
            parameter=parameter,
            expert=None if tensor.ndim == 2 else e,
        )
        for e in range(experts)
    ]
