"""safetensors: the fused weights under the base's own names; a Hugging Face folder when the base is one.

    model.safetensors              every other base
    hf/                            config.json, tokenizer files, shards and index as in the base's folder

Where folding created biases, the config's own switches for them (``attention_bias``, ``mlp_bias``, ...) are set, and the biases that such a
switch also adds elsewhere are written as zeros, so that stock loaders take the folder. It is loaded back and compared bit for bit.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.bases._vocabulary import token_layers
from reparam_export.errors import ExportError, MissingBackendError
from reparam_export.exporters.artifact import Artifact
from reparam_export.files import plain_shard_name, read_json, remove, save_safetensors, sha256
from reparam_export.hf_folder import DTYPE_KEYS, bias_switches, folder_of, held_wide, of_vocabulary, retyped
from reparam_export.names.conversions import own_of, spread
from reparam_export.refuted import set_aside
from reparam_export.tokenizer import beside_weights, of_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reparam_export.fusion import FusedWeights
    from reparam_export.verification import VerifiedModel

INDEX = "model.safetensors.index.json"


def export_folder(model: VerifiedModel, folder: Path) -> Artifact:
    """Write the fused weights below ``folder`` and read them back. Raises ExportError."""
    started = time.perf_counter()
    if is_streamed(folder):
        return _in_place(model, folder)
    source = folder_of(model.checkpoint.base)
    name = "model.safetensors" if source is None else "hf"
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        made = Path(scratch) / name
        tensors = dict(model.weights.tensors)
        details: dict[str, Any] = {}
        if source is None:
            _save(made, tensors, model)
        else:
            made.mkdir()
            details = write_hugging_face(source, made, tensors, model)
        reloaded = read_back(made)
        _same(reloaded, tensors, name)
        target = folder / name
        remove(target)
        made.replace(target)
    return _artifact(target, model, {**details, "tensors": len(reloaded)}, started)


STOCK = "loaded by stock transformers: tensors and outputs equal the proven model's bit for bit"


def _artifact(target: Path, model: VerifiedModel, details: dict[str, Any], started: float) -> Artifact:
    files = [target] if target.is_file() else sorted(p for p in target.iterdir() if p.is_file())
    return Artifact(
        target="safetensors",
        path=target.name,
        precision="as stored",
        size=sum(f.stat().st_size for f in files),
        sha256=sha256(target),
        weights_sha256=model.certificate.weights_sha256,
        ran=target.is_dir(),
        note=STOCK + _said(details) if target.is_dir() else "read back bit for bit",
        details={**details, "seconds": round(time.perf_counter() - started, 2)},
    )


def _said(details: Mapping[str, Any]) -> str:
    """What config.json says otherwise than the base's of the dtype, and whose the tokenizer is."""
    changed = details.get("config_changed") or {}
    dtype = next((value for key, value in changed.items() if key in DTYPE_KEYS), None)
    own = details.get("tokenizer")
    return (f" (config.json says {dtype} now, as they are stored)" if dtype else "") + (
        f"; with the tokenizer of the adapter's folder, which is not the base's ({', '.join(own)})" if own else ""
    )


def is_streamed(folder: Path) -> bool:
    """Does ``fuse`` itself have written the Hugging Face folder below ``folder``?"""
    return (folder / "fused.json").is_file() and read_json(folder / "fused.json").get("weights") == "hf"


def _in_place(model: VerifiedModel, folder: Path) -> Artifact:
    """The folder that ``fuse`` streamed is the artefact: it is loaded by transformers and compared, and not written again."""
    started = time.perf_counter()
    record = read_json(folder / "fused.json")
    tensors = read_back(folder / "hf")
    apart = set(record.get("apart", ()))
    own = {name: tensor for name, tensor in tensors.items() if name not in apart}
    proven = model.weights.in_files()
    _same(own, proven, "hf")
    if record.get("weights_sha256") != model.certificate.weights_sha256 or own.keys() != proven.keys():
        raise ExportError(f"{folder / 'hf'}: holds other weights than the proven ones; run fuse and verify again")
    try:
        _load_with_transformers(folder / "hf", model.weights.tensors, model)
    except MissingBackendError:
        raise
    except ExportError as error:  # it stands where users look for it, and would load as something else
        raise ExportError(f"{error}; set aside: {', '.join(set_aside(folder, ('hf',)))}") from error
    details = {
        "config_changed": record.get("config_changed", {}),
        **of_tokenizer(model.checkpoint),
        "shards": len(record.get("shards", {})),
        "tensors": len(tensors),
    }
    return _artifact(folder / "hf", model, details, started)


def write_hugging_face(source: Path, made: Path, tensors: dict[str, Tensor], model: VerifiedModel) -> dict[str, Any]:
    """config, tokenizer and shards. Returns details.

    Makes ``tensors`` what the files hold: zero biases where a config switch needs them, and the names of the base's own files.
    """
    import torch

    for file in beside_weights(source, model.checkpoint):
        shutil.copyfile(file, made / file.name)
    config = read_json(made / "config.json")
    switched, zeros = bias_switches({**config, **class_of(config, model)}, tensors, model.weights.created)
    for name in zeros:
        weight = tensors[f"{name.removesuffix('.bias')}.weight"]
        tensors[name] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    own = dict(tensors)
    stored = spread(own, own_of(model.module()).files)
    tensors.clear()
    tensors.update(stored)
    changed = class_of(config, model) | switched
    config.pop("auto_map", None)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    config, dtype = retyped(config | changed, dtypes, held_wide(model.module()))
    changed |= dtype
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards = shard_of(source, tensors)
    names = sorted(set(shards.values()))
    for shard in names:
        _save(made / shard, {n: t for n, t in tensors.items() if shards[n] == shard}, model)
    if len(names) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.items()))}
        (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _load_with_transformers(made, own, model)
    return {"config_changed": changed, "shards": len(names), **of_tokenizer(model.checkpoint)}


def class_of(config: Mapping[str, Any], model: VerifiedModel) -> dict[str, Any]:
    """Config entries for the class and the labels of the proven model, where they are not the base folder's."""
    from reparam_export.models import split_argument

    module = model.module()
    own = module.config.to_dict()  # type: ignore[operator, union-attr]
    keywords = split_argument(str(model.checkpoint.base).partition(":")[2])[1]
    names = [
        "architectures",
        *(["id2label", "label2id"] if len(own["id2label"]) != len(config.get("id2label", "ab")) else []),
    ]
    names += [
        name
        for name in keywords
        if name not in ("architecture", "task", "attn_implementation", "experts_implementation", "num_labels")
    ]
    own["architectures"] = [type(module).__name__]
    found = {name: own[name] for name in names if own[name] != config.get(name)}
    return found | tables_of(config, module, model.weights)


def tables_of(config: Mapping[str, Any], module: Any, weights: FusedWeights) -> dict[str, Any]:
    """Config entries for the embedding and the output layer, where the checkpoint changed their size, or untied them."""
    layers = [layer for layer in token_layers(module) if hasattr(layer, "weight")]
    named = [f"{name}.weight" for name, part in module.named_modules() if any(part is each for each in layers)]
    found: dict[str, Any] = {}
    if any(name in weights.replaced for name in named):
        found |= of_vocabulary(config, int(layers[0].weight.shape[0]))
    tied = config.get("tie_word_embeddings", getattr(module.config, "tie_word_embeddings", False))
    if tied and len(named) == 2 and all(name in weights.tensors for name in named):
        found["tie_word_embeddings"] = False
    return found


def shard_of(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which file each tensor goes to: the base's own sharding; a created bias beside its weight."""
    if (source / "model.safetensors").is_file() or not (source / INDEX).is_file():
        return dict.fromkeys(tensors, "model.safetensors")
    index: dict[str, str] = read_json(source / INDEX)["weight_map"]
    for shard in index.values():
        plain_shard_name(shard, source / INDEX)
    first = next(iter(index.values()))
    return {name: index.get(name) or index.get(f"{name.rpartition('.')[0]}.weight", first) for name in tensors}


def read_back(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file or of a folder's shards."""
    from reparam_export.files import load_safetensors

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_safetensors(file, numpy=False)[0].items()}


def _load_with_transformers(folder: Path, tensors: Mapping[str, Tensor], model: VerifiedModel) -> None:
    """Raises ExportError unless stock transformers loads the folder, told nothing but its name, with these tensors, and answers as the
    proven model does."""
    import torch

    from reparam_export.bases.hf import stock
    from reparam_export.errors import ReparamError
    from reparam_export.verification.outputs import run

    try:
        module = stock(folder)
    except MissingBackendError:
        raise
    except ReparamError as error:
        raise ExportError(f"transformers does not take the fused folder: {error}") from error
    state, what = module.state_dict(), "the folder as transformers loads it"
    for name, tensor in tensors.items():
        if name in state and not _holds(state[name], tensor):
            raise ExportError(
                f"{what}: tensor {name} was written as {tensor.dtype} and is loaded as {state[name].dtype} with other numbers"
            )
    proven = model.module()
    _run_alike(module, proven)
    dtype = getattr(torch, model.reference.dtype)
    few = {name: tensor[:2] for name, tensor in model.reference.inputs.items()}
    pairs = zip(*(run(m.to(dtype), model.signature, few, dtype) for m in (module, proven)), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ExportError("the fused folder, as transformers loads it, answers otherwise than the proven model")


def _holds(found: Tensor, written: Tensor) -> bool:
    """The very numbers, in a dtype as wide or wider."""
    import torch

    if found.dtype == written.dtype:
        return torch.equal(found, written)
    both = found.is_floating_point() and written.is_floating_point() and found.shape == written.shape
    return both and torch.equal(found.double(), written.double())


def _run_alike(module: nn.Module, proven: nn.Module) -> None:
    """Give the loaded model the proven one's implementations of attention and experts, which differ in rounding alone."""
    for part in ("attn", "experts"):
        wanted = getattr(proven.config, f"_{part}_implementation", None)
        choose = getattr(module, f"set_{part}_implementation", None)
        if (
            wanted is not None
            and choose is not None
            and getattr(module.config, f"_{part}_implementation", None) != wanted
        ):
            choose(wanted)


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    import torch

    for name, tensor in expected.items():
        if name not in found or found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor):
            raise ExportError(f"{what}: tensor {name} is not the one that was written")


def _save(path: Path, tensors: Mapping[str, Tensor], model: VerifiedModel) -> None:
    from reparam_export.exporters import provenance

    metadata = {"format": "pt", **provenance(model)}
    save_safetensors(path, tensors, metadata)
