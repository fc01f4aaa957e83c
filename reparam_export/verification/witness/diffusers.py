"""diffusers on the LoRA files of diffusers: its own loader puts peft's layers on a base of its own, and each is held against our adapters.

    a UNet, a transformer, a ControlNet    the model's ``load_lora_adapter``
    a text encoder                         ``load_lora_into_text_encoder`` of its pipelines

A header with peft's configuration says all; alphas in the file, or the one that the user gave, are handed over as ``network_alphas``,
without any diffusers takes alpha = rank, which is the user's ``lora_alpha=rank``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.bases import diffusers as of_diffusers
from reparam_export.bases import hf
from reparam_export.checkpoints import Checkpoint
from reparam_export.checkpoints._folder import weights_file
from reparam_export.checkpoints.diffusers import METADATA, PART
from reparam_export.errors import MissingBackendError
from reparam_export.files import load_safetensors
from reparam_export.models import first_line
from reparam_export.state import load_state
from reparam_export.verification.certificate import WitnessEvidence
from reparam_export.verification.witness import Subject, UnableError
from reparam_export.verification.witness._peft_model import Read, offline, quiet
from reparam_export.verification.witness.peft import compare_layers

if TYPE_CHECKING:
    from torch import nn

LOOKS_AT = "LoRA files of diffusers"
TEXT = "text_encoder"
UNNAMED = "unet"  # stands in front of a model's own names where alphas are given: diffusers takes none without a name


@dataclass(frozen=True)
class File:
    """What diffusers is given: names with the part's in front, alphas by ``PART.MODULE``; configured: the header says them."""

    path: Path
    part: str
    tensors: dict[str, Any]
    alphas: dict[str, float]
    configured: bool


def accepts(checkpoint: Checkpoint) -> bool:
    """One such file, put on alone and whole."""
    return checkpoint.format == "diffusers" and not checkpoint.members and checkpoint.recipe.weight == 1


def testify(subject: Subject) -> WitnessEvidence:
    """Raises MissingBackendError without diffusers, UnableError for a file that it cannot load on this base."""
    package = _import()
    if subject.numbers is not None:
        raise UnableError(
            "diffusers' loader needs the numbers of the base; it bears witness when the whole model is verified"
        )
    file = _opened(subject.checkpoint)
    model = subject.fresh().double()
    load = _on_text if file.part.startswith(TEXT) else _on_denoiser
    try:
        with quiet(), offline(), of_diffusers.quiet(), hf.quiet():
            load(model, file)
    except UnableError:
        raise
    except Exception as error:  # of another library on a damaged or foreign file: many types, one meaning
        raise UnableError(
            f"diffusers {package.__version__} cannot load {file.path} on this base: {first_line(error)}"
        ) from error
    model.eval().requires_grad_(False)
    read = Read(model.double(), str(package.__version__), who="diffusers")
    return compare_layers(read, subject, subject.checkpoint.adapters).evidence(read, subject)


def _import() -> Any:
    try:
        import diffusers
        import peft  # noqa: F401  (diffusers' loader puts its layers in)
    except ImportError as error:
        name = (error.name or "diffusers").partition(".")[0]
        raise MissingBackendError(
            f"the package {name} is not installed; pip install 'reparam-export[{name}]'", package=name, extra=name
        ) from error
    return diffusers


def _opened(checkpoint: Checkpoint) -> File:
    """The file, and the part of it that is this base's model. Raises UnableError for settings that diffusers cannot be told."""
    if checkpoint.dropped:
        raise UnableError(f"diffusers' loader takes the file as it is, and {checkpoint.dropped[0]} was dropped by name")
    path = weights_file(checkpoint.path)
    tensors = load_state(path)
    parts = dict.fromkeys(match["part"] for name in tensors if (match := PART.fullmatch(name)))
    chosen = str(checkpoint.settings.get("part", next(iter(parts), "")))
    if not all(PART.fullmatch(name) for name in tensors):
        chosen = ""
    header = load_safetensors(path, numpy=True)[1] if path.suffix == ".safetensors" else {}
    named = {name if chosen else f"{UNNAMED}.{name}": tensor for name, tensor in tensors.items()}
    part = chosen or UNNAMED
    own = {n: t for n, t in named.items() if n.startswith(f"{part}.")}
    alphas = {n.removesuffix(".alpha"): float(t) for n, t in own.items() if n.endswith(".alpha")}
    given = checkpoint.settings.get("lora_alpha", "rank")
    if checkpoint.settings.get("use_rslora"):
        raise UnableError(
            "diffusers' loader knows of rsLoRA by the configuration in the file's header alone, and here it was set"
        )
    if not alphas and given != "rank":
        alphas = dict.fromkeys(_modules(own), float(given))
    own = {n: t for n, t in own.items() if not n.endswith(".alpha")}
    return File(path, part, own, alphas, METADATA in header and _says(header[METADATA], chosen))


def _says(text: str, part: str) -> bool:
    """Is there anything of this part in the header?"""
    return not part or f'"{part}.' in text


def _modules(names: Any) -> list[str]:
    """The modules of these LoRA tensors, ``PART.MODULE``, by diffusers' own renaming of older files."""
    from diffusers.utils import state_dict_utils

    today = dict.fromkeys(names)
    if not any(".lora_A." in name for name in today):
        renaming: Any = state_dict_utils
        text = any(name.startswith(TEXT) for name in today)
        convert = renaming.convert_state_dict_to_peft if text else renaming.convert_unet_state_dict_to_peft
        today = convert(today)
    return list(dict.fromkeys(name.partition(".lora_")[0].replace(".processor", "") for name in today))


def _on_denoiser(model: nn.Module, file: File) -> None:
    from diffusers import loaders

    own: Any = loaders  # without the types of all that it exports
    inner: Any = _only(model, own.PeftAdapterMixin, file.part)
    kept: dict[str, Any] = {}
    if file.configured:
        named = any(PART.fullmatch(name) for name in load_state(file.path))
        where = {"weight_name": file.path.name, "prefix": file.part if named else None}
        inner.load_lora_adapter(str(file.path.parent), **where)
        return
    if file.alphas:
        kept["network_alphas"] = {f"{module}.alpha": alpha for module, alpha in file.alphas.items()}
    tensors = {name.replace(".processor.", "."): tensor for name, tensor in file.tensors.items()}
    inner.load_lora_adapter(tensors, prefix=file.part, **kept)


def _on_text(model: nn.Module, file: File) -> None:
    from diffusers import loaders
    from transformers import PreTrainedModel

    own: Any = loaders
    pipeline = own.StableDiffusionLoraLoaderMixin
    inner: Any = _only(model, PreTrainedModel, file.part)
    kept: dict[str, Any] = {}
    if file.configured:
        _, _, kept["metadata"] = pipeline.lora_state_dict(
            str(file.path.parent), weight_name=file.path.name, return_lora_metadata=True
        )
    alphas = {f"{module}.lora_linear_layer.down.weight.alpha": alpha for module, alpha in file.alphas.items()}
    pipeline.load_lora_into_text_encoder(file.tensors, alphas or None, inner, prefix=file.part, **kept)


def _only(model: nn.Module, kind: type[Any], part: str) -> Any:
    """The model that the part is for: the base itself, or what alone in it is of that kind and not inside another. Raises UnableError."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, kind) and not any(not outer or name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    named = [module for name, module in found if name.rpartition(".")[2] == part]
    if len(found) == 1 or len(named) == 1:
        return named[0] if len(named) == 1 else found[0][1]
    raise UnableError(f"of this base, {len(found) or 'no'} models can load {part} by diffusers' loader")
