"""What a Hugging Face model folder says about its model, without building it: layouts, ties, the switches of its biases.

The plainest language models are known here by their ``model_type``, so that neither torch nor transformers has to be imported for them
(a test compares each with transformers' own class). Any other model is built on torch's meta device, which takes no memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.errors import CheckpointError, ExportError, TensorMismatchError
from reparam_export.models import Base, split_argument
from reparam_export.names import Own

if TYPE_CHECKING:
    from torch import nn

ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
KNOWN: dict[
    str, dict[str, tuple[str, ...]]
] = {  # model_type of XForCausalLM -> bias switch -> the modules it gives a bias
    "llama": {"attention_bias": ATTENTION, "mlp_bias": MLP},
    "granite": {"attention_bias": ATTENTION, "mlp_bias": MLP},
    "qwen3": {"attention_bias": ATTENTION},
    "olmo": {"attention_bias": ATTENTION},
    "olmo2": {"attention_bias": ATTENTION},
    "mistral": {},
    "qwen2": {},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS_SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "bias", "add_bias_linear")
CARRIED = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".md",
    ".tiktoken",
    ".vocab",
    ".merges",
)  # config, tokenizer; never code
NOT_CARRIED = (".index.json", "adapter_config.json")
WIDER = {  # a dtype -> those that hold every number of it; the narrowest of two first
    "bfloat16": ("bfloat16", "float32", "float64"),
    "float16": ("float16", "float32", "float64"),
    "float32": ("float32", "float64"),
    "float64": ("float64",),
}
DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Structure:
    """What the weights' file names do not say.

    ``transposed``: modules that store (in, out). ``ties``: a tensor's other name -> the name that holds it in the files. ``order``: modules
    with a weight, as the model has them; ``refused``: modules that cannot be folded, with the reason. ``shapes``: of every parameter, None
    where it is not known. ``wide``: as ``held_wide`` says. ``own``: the names of the model, and where its files have others.
    ``scaled``: embeddings that are multiplied by a number.
    """

    transposed: frozenset[str]
    embeddings: frozenset[str]
    ties: Mapping[str, str]
    order: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] | None = None
    wide: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own: Own = field(default_factory=lambda: Own((), {}))
    scaled: frozenset[str] = frozenset()


def folder_of(spec: str | None) -> Path | None:
    """The folder of an ``hf:`` base, a hub ID's out of the cache; None for a base of another scheme. Raises CheckpointError."""
    scheme, _, argument = str(spec).partition(":")
    if scheme != "hf":
        return None
    place = argument.partition("?")[0]
    if Path(place).is_dir():
        return Path(place)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(place, local_files_only=True))
    except Exception as error:  # no such ID, not fetched yet: many types, one meaning
        raise CheckpointError(
            f"base hf:{place}: expected a folder, or the ID of a model in the hub's cache; found neither ({type(error).__name__}); "
            "check the path, or fetch the model first"
        ) from error


def carried(source: Path) -> list[Path]:
    """config, generation and tokenizer files: what goes with the weights, but no code, and nothing that a link brings in from elsewhere."""
    hub_cache = source.parent.name == "snapshots"
    found = []
    for file in sorted(source.iterdir()):
        inside = source.resolve() in file.resolve().parents or not file.is_symlink() or hub_cache
        if file.is_file() and inside and file.suffix in CARRIED and not file.name.endswith(NOT_CARRIED):
            found.append(file)
    return found


def of_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config entry for a vocabulary of this size; none where the config says so already."""
    text = config.get("text_config")
    if "vocab_size" not in config and isinstance(text, dict) and "vocab_size" in text:
        return {} if text["vocab_size"] == rows else {"text_config": text | {"vocab_size": rows}}
    return {} if config.get("vocab_size", rows) == rows else {"vocab_size": rows}


def is_known(config: Mapping[str, Any]) -> bool:
    """Is it a model whose structure is written down here?"""
    architecture = next(iter(config.get("architectures") or ()), "")
    name = str(config.get("model_type"))
    return name in KNOWN and architecture.lower() == f"{name}forcausallm"


def structure_of(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base: Base, *, exact: bool
) -> Structure:
    """shapes: of the tensors in the files; exact: the order of the modules matters. Raises what the base's scheme raises when it builds."""
    names = shapes.keys()
    if exact or not is_known(config):
        return _built(_skeleton(base), names)
    heads = any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    if heads and HEAD not in names and config.get("tie_word_embeddings") is False:
        raise TensorMismatchError(
            f"{base.spec}: {HEAD} is missing: config.json says that it is not tied to the embedding, and no file holds it",
            module=HEAD.removesuffix(".weight"),
            tensor="weight",
            expected=HEAD,
            found=None,
        )
    tied = HEAD not in names or bool(config.get("tie_word_embeddings", False))
    modules = tuple(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    ties = {HEAD: EMBEDDING} if tied else {}
    own = Own(modules, {**shapes, **{alias: shapes[holder] for alias, holder in ties.items() if holder in shapes}})
    return Structure(frozenset(), frozenset({EMBEDDING.removesuffix(".weight")}), ties, modules, own=own)


def _skeleton(base: Base) -> nn.Module:
    from reparam_export.bases import hf

    return hf.skeleton(base)


def _built(module: nn.Module, names: Collection[str]) -> Structure:
    """The same out of a model on the meta device."""
    from reparam_export.errors import FusionError
    from reparam_export.layouts import layout_of
    from reparam_export.names.conversions import own_of
    from reparam_export.subclasses import scale_of

    transposed, embeddings, scaled, order, refused = set(), set(), set(), [], {}
    for name, part in module.named_modules():
        if "weight" not in part._parameters:
            continue
        order.append(name)
        try:
            layout = layout_of(name, part)
        except FusionError as error:
            refused[name] = str(error)
            continue
        if layout in ("transposed", "embedding"):
            transposed.add(name)
        if layout == "embedding":
            embeddings.add(name)
            if scale_of(part) is not None:
                scaled.add(name)
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    ties: dict[str, str] = {}
    for group in groups.values():
        holder = next((n for n in group if n in names), group[0])
        ties |= {n: holder for n in group if n != holder}
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    wide = held_wide(module)
    return Structure(
        frozenset(transposed),
        frozenset(embeddings),
        ties,
        tuple(order),
        refused,
        shapes,
        wide,
        own_of(module),
        frozenset(scaled),
    )


def held_wide(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each 16-bit dtype, patterns of the names that transformers' loader holds in float32 all the same (as routers)."""
    always = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return {"bfloat16": always, "float16": (*always, *(getattr(model, "_keep_in_fp32_modules", None) or ()))}


def retyped(
    config: Mapping[str, Any], stored: Mapping[str, str], wide: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config with the dtype that its tensors are stored in, and the entries that this changes, those of its parts with dots.

    Stock loaders cast every tensor to the one dtype that a config names; where it names none, to that of the first tensor. Of
    tensors in several dtypes it is the narrowest that holds all of their numbers, so that nothing is lost.
    stored: name -> dtype as torch names it, of all tensors; wide: as ``held_wide`` says.
    """
    floats = {name: dtype for name, dtype in stored.items() if dtype in WIDER}
    dtype = next((said for said in WIDER if not _cast(floats, said, wide)), None)
    named = any(config.get(key) for key in DTYPE_KEYS)
    if dtype is None or not floats or not (named or len(set(floats.values())) > 1):
        return dict(config), {}
    changed: dict[str, str] = {}
    made = _with_dtype(config, dtype, "", changed)
    if not named:
        made["dtype"] = changed["dtype"] = dtype
    return made, changed


def _cast(stored: Mapping[str, str], said: str, wide: Mapping[str, tuple[str, ...]]) -> bool:
    """Would a config that says this dtype lose digits of any tensor?"""
    held = re.compile("|".join(pattern.replace("*", ".*") for pattern in wide.get(said, ())) or r"\Z\A.")
    return any(
        said not in WIDER[dtype] and not (dtype == "float32" and held.search(name)) for name, dtype in stored.items()
    )


def _with_dtype(config: Mapping[str, Any], dtype: str, place: str, changed: dict[str, str]) -> dict[str, Any]:
    """A config, or a part of one, that says ``dtype`` wherever it names one; ``changed`` takes what it said otherwise."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        made[key] = value
        if isinstance(value, Mapping):
            made[key] = _with_dtype(value, dtype, f"{place}{key}.", changed)
        elif key in DTYPE_KEYS and isinstance(value, str) and value.removeprefix("torch.") in WIDER:
            made[key] = dtype
            if value.removeprefix("torch.") != dtype:
                changed[f"{place}{key}"] = dtype
    return made


def bias_switches(
    config: Mapping[str, Any], names: Collection[str], created: Collection[str]
) -> tuple[dict[str, bool], list[str]]:
    """The config entries that give the created biases a place, and the biases that these add elsewhere, to be zeros.

    names: of all tensors of the fused model. Raises ExportError when no combination of the config's own switches does.
    """
    if not created:
        return {}, []
    off = [name for name in _switches(config) if not config.get(name)]
    before = set(names) - set(created)
    for count in range(1, len(off) + 1):
        for chosen in combinations(off, count):
            added = _biases(config, chosen, before)
            if set(created) <= added:
                return dict.fromkeys(chosen, True), sorted(added - set(names))
    first = sorted(created)[0]
    raise ExportError(
        f"{config.get('model_type')}: folding created {len(created)} biases ({first}, ...), and no switch of its config "
        f"({', '.join(off) or 'it has none'}) gives them a place, so stock loaders would drop them; export to ONNX instead"
    )


def _biases(config: Mapping[str, Any], switches: tuple[str, ...], names: Collection[str]) -> set[str]:
    """All biases of the model with these switches on; empty when they would add anything else. names: of the base's own tensors."""
    if is_known(config):
        modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        ends = tuple(f".{end}" for switch in switches for end in KNOWN[config["model_type"]][switch])
        return {f"{module}.bias" for module in modules if module.endswith(ends)} | {
            n for n in names if n.endswith(".bias")
        }
    known = _parameters({**config, **dict.fromkeys(switches, True)})
    return {n for n in known if n.endswith(".bias")} if all(n.endswith(".bias") for n in known - set(names)) else set()


def _switches(config: Mapping[str, Any]) -> list[str]:
    """The bias switches that this model's config class knows."""
    if is_known(config):
        return list(KNOWN[config["model_type"]])
    from transformers import AutoConfig

    fields = {k: v for k, v in config.items() if k != "model_type"}
    known = AutoConfig.for_model(config["model_type"], **fields).to_dict()
    return [name for name in BIAS_SWITCHES if name in known]


def _parameters(config: Mapping[str, Any]) -> set[str]:
    """The parameter names of the model that this config builds, without memory for them."""
    import torch
    import transformers

    fields = {k: v for k, v in config.items() if k != "model_type"}
    built = transformers.AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        return {name for name, _ in getattr(transformers, config["architectures"][0])(built).named_parameters()}


def keywords_of(spec: str) -> dict[str, Any]:
    """The keywords of an ``hf:`` spec."""
    return split_argument(spec.partition(":")[2])[1]
