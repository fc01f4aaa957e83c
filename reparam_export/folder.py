"""One output folder: what each stage leaves there, and how the next one picks it up.

    fused.safetensors  fused.json          fuse
    hf/                fused.json          fuse, of a base that is a Hugging Face folder: streamed, shard by shard
    verification.json  reference.npz       verify
    model.onnx  model.engine  artifact.json    export
    analysis.json                          inspect --analyse
    latency.json                           bench
    report.html  report.md  junit.xml      report
    *.refuted                              what a proof failed of: see refuted.py

Every file is written under a temporary name and renamed. ``fused.json`` holds the recipe (checkpoint, base, settings, with digests), so
that a later stage reads the same checkpoint again, or says that it has changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Checkpoint, Recipe, recipe_from_json
from reparam_export.errors import CheckpointError, EquivalenceError, UsageError
from reparam_export.files import (
    fingerprint,
    load_safetensors,
    read_json,
    remove,
    replace_file,
    save_safetensors,
    sha256,
)
from reparam_export.names import Place
from reparam_export.refuted import check_none

if TYPE_CHECKING:
    from reparam_export.analysis import BranchAnalysis
    from reparam_export.exporters.artifact import Artifact
    from reparam_export.fusion import FusedWeights
    from reparam_export.verification import VerifiedModel
    from reparam_export.verification.certificate import Certificate

FUSED, PROOF, ARTIFACTS, REFERENCE = "fused.json", "verification.json", "artifact.json", "reference.npz"
WEIGHTS, ANALYSIS, LATENCY = "fused.safetensors", "analysis.json", "latency.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, then rename. NaN and infinity become strings, which JSON can hold."""
    replace_file(
        path, lambda temporary: temporary.write_text(json.dumps(plain_json(content), indent=1) + "\n", encoding="utf-8")
    )


def save_fused(folder: Path, checkpoint: Checkpoint, weights: FusedWeights, dtype: str | None = None) -> dict[str, Any]:
    """Write ``fused.safetensors`` and ``fused.json``, which is returned; what later stages had left for other weights is removed.

    dtype: the storage that was asked for, where the weights' own is what was chosen for it.
    """
    from reparam_export.fusion import record
    from reparam_export.streaming.staging import former

    folder.mkdir(parents=True, exist_ok=True)
    for path in former(folder):
        if path.name not in (WEIGHTS, FUSED):  # these are replaced, by renaming
            remove(path)
    metadata = {"format": "pt", "checkpoint_sha256": checkpoint.sha256, "weights_sha256": weights.sha256()}
    replace_file(folder / WEIGHTS, lambda path: save_safetensors(path, weights.tensors, metadata))
    recipe = replace(checkpoint.recipe, dtype=dtype or weights.dtype)
    digests = replace(recipe, base=checkpoint.base).digests()
    found = record(checkpoint, weights) | {"recipe": asdict(recipe), "digests": digests}
    write_json(folder / FUSED, found)
    return found


def load_fused(folder: Path, *, base: str | None = None) -> tuple[Checkpoint, FusedWeights]:
    """Read the checkpoint again and the fused weights as they are on disk.

    base: of a folder that was made on a ``py:`` base that base, from whoever calls: a folder may come from anywhere and names no code.
    Raises CheckpointError when the folder holds none, or when the checkpoint or its base changed since; EquivalenceError when streamed
    weights are not the ones that were proven when they were written, or were refuted since; UsageError for code that only it names.
    """
    from reparam_export.fusion import FusedWeights
    from reparam_export.names.conversions import gathered
    from reparam_export.streaming.audit import check_streamed
    from reparam_export.streaming.staging import settle

    settle(folder)
    check_none(folder)
    if not (folder / FUSED).is_file():
        raise CheckpointError(f"{folder}: holds no {FUSED}; run `reparam-export fuse CHECKPOINT -o {folder}` first")
    content = read_json(folder / FUSED)
    recipe = recipe_of(content)
    check_code(folder, recipe, base)
    digests = content.get("digests")
    if not isinstance(digests, dict):
        raise CheckpointError(f"{folder / FUSED}: damaged (no digests); run fuse again")
    for name, digest in digests.items():
        if not Path(name).exists():
            raise CheckpointError(f"{name}: no such file; {folder} was made from it")
        if fingerprint(Path(name)) != digest:
            raise CheckpointError(f"{name}: changed since {folder} was made from it; run fuse again")
    checkpoint = recipe.read()
    if "weights" in content:
        check_streamed(folder, content, checkpoint)
    tensors = _weights(folder, content)
    files = _files_names(checkpoint, content)

    def own_name(name: str) -> str:
        return (files.get(name) or Place(name)).tensor

    def own(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(own_name, names)))

    try:
        return checkpoint, FusedWeights(
            tensors=gathered(tensors, files) if files else tensors,
            changed=own(content["changed"]),
            created=own(content["created"]),
            replaced=own(content["replaced"]),
            untied=own(content.get("untied", ())),
            aliases={own_name(alias): own_name(holder) for alias, holder in content["aliases"].items()},
            files=files,
            seconds=float(content["seconds"]),
            dtype=content.get("dtype", recipe.dtype),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / FUSED}: damaged ({error!r}); run fuse again") from error


def _weights(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own tensors, from one file or from the shards of a streamed fusion; mapped, not copied."""
    apart = set(content.get("apart", ()))
    files = _weight_files(folder, content)
    return {n: t for file in files for n, t in load_safetensors(file, numpy=False)[0].items() if n not in apart}


def _files_names(checkpoint: Checkpoint, content: Mapping[str, Any]) -> dict[str, Place | None]:
    """For weights under the names of the base's files, where these lie in its model."""
    if content.get("names") != "files":
        return {}
    from reparam_export.assembly import base_of
    from reparam_export.names.conversions import own_of

    skeleton = base_of(checkpoint).skeleton()
    return {} if skeleton is None else dict(own_of(skeleton).files)


def weights_at(folder: Path) -> list[Path]:
    """The files that hold the fused weights of an output folder: one, or the shards of a streamed fusion.

    Raises CheckpointError; EquivalenceError when they were refuted.
    """
    check_none(folder)
    return _weight_files(folder, read_json(folder / FUSED))


def _weight_files(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    place = folder / str(content.get("weights", WEIGHTS))
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{place}: no such weights; run fuse again")
    return files


def recipe_of(content: Mapping[str, Any]) -> Recipe:
    """The recipe in ``fused.json``. Raises CheckpointError."""
    try:
        return recipe_from_json(content["recipe"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{FUSED}: damaged ({error!r}); run fuse again") from error


def check_code(folder: Path, recipe: Recipe, base: str | None) -> None:
    """Raises UsageError where the folder was made on a base that is code, and the caller does not name the same."""
    for own in (recipe, *recipe.others):
        if isinstance(own.base, str) and own.base.startswith("py:") and not (base and same_code(base, own.base)):
            given = f"--base {base} is another" if base else "a folder does not name code to run"
            raise UsageError(
                f"{folder}: was made on {own.base}, which is code, and {given}; if it is yours, say it again: --base {own.base}"
            )


def same_code(one: str, other: str) -> bool:
    """Do two ``py:`` specs name one function of one file?"""
    places = [spec.removeprefix("py:").rpartition(":") for spec in (one, other)]
    return one.startswith("py:") and len({(Path(file).resolve(), function) for file, _, function in places}) == 1


def save_proof(folder: Path, certificate: Certificate, model: VerifiedModel | None) -> None:
    """Write ``verification.json``, and the reference outputs that artefacts are compared with."""
    extra: dict[str, Any] = {}
    if model is not None:
        import numpy as np

        arrays = {f"input:{k}": v.numpy() for k, v in model.reference.inputs.items()}
        arrays |= {f"output:{k}": v.numpy() for k, v in model.reference.outputs.items()}

        def write(path: Path) -> None:
            with path.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]

        replace_file(folder / REFERENCE, write)
        extra = {
            "reference": {
                "sha256": sha256(folder / REFERENCE),
                "floors": dict(model.reference.floors),
                "dtype": model.reference.dtype,
                "moved": dict(model.reference.moved),
            }
        }
    write_json(folder / PROOF, certificate.to_json() | extra)


def save_evidence(folder: Path, model: VerifiedModel) -> None:
    """Write what fuse and verify leave in a folder, unless it is there for these very weights."""
    try:
        known = read_json(folder / PROOF).get("weights_sha256") if (folder / FUSED).is_file() else None
    except CheckpointError:
        known = None
    if known != model.certificate.weights_sha256:
        save_fused(folder, model.checkpoint, model.weights)
        save_proof(folder, model.certificate, model)


def load_proof(folder: Path, *, again: bool = True, base: str | None = None) -> VerifiedModel:
    """The verified model of an output folder. Raises EquivalenceError when the proof failed or belongs to other weights.

    base: see ``load_fused``.
    again: prove the weights once more, since files may change; needed before anything is made that claims to be proven.
    """
    import numpy as np
    import torch

    from reparam_export.assembly import base_of, settled
    from reparam_export.verification import VerifiedModel, prove_again
    from reparam_export.verification.certificate import from_json
    from reparam_export.verification.outputs import Reference

    checkpoint, weights = load_fused(folder, base=base)
    if not (folder / PROOF).is_file():
        raise CheckpointError(f"{folder}: holds no {PROOF}; run `reparam-export verify {folder}` first")
    content = read_json(folder / PROOF)
    certificate = from_json(content)
    if certificate.verdict == "wrong":
        raise EquivalenceError(f"{folder}: the proof failed; nothing can be exported from it", evidence=certificate)
    found = weights.sha256()
    if again:
        prove_again(checkpoint, weights, certificate)
    if found != certificate.weights_sha256:
        raise EquivalenceError(
            f"{folder / WEIGHTS}: these weights ({found[:12]}) are not the ones that were proven "
            f"({certificate.weights_sha256[:12]}); run `reparam-export verify {folder}` again"
        )
    saved = content.get("reference") or {}
    if not (folder / REFERENCE).is_file() or sha256(folder / REFERENCE) != saved.get("sha256"):
        raise CheckpointError(
            f"{folder / REFERENCE}: missing or changed since the proof; run `reparam-export verify {folder}` again"
        )
    with np.load(folder / REFERENCE) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    signature = base_of(settled(checkpoint)).build()[1]
    reference = Reference(
        inputs={k.removeprefix("input:"): v for k, v in tensors.items() if k.startswith("input:")},
        outputs={k.removeprefix("output:"): v for k, v in tensors.items() if k.startswith("output:")},
        floors=saved["floors"],
        dtype=saved["dtype"],
        axes=signature.axes,
        moved={name: float(value) for name, value in saved.get("moved", {}).items()},
    )
    return VerifiedModel(checkpoint, weights, signature, reference, certificate)


def same_samples(folder: Path, inputs: Path | None, count: int, seed: int) -> bool:
    """Was the proof in this folder made with these samples and this seed?"""
    content = read_json(folder / PROOF)
    source = "random" if inputs is None else str(inputs)
    known = content.get("samples") or {}
    return (
        known.get("source") == source
        and content.get("seed") == seed
        and (inputs is not None or known.get("count") == count)
    )


def witnessed(folder: Path, wanted: str, expected: Path | None = None) -> bool:
    """Does the proof in this folder say of a second witness what is wanted now?"""
    if wanted.startswith("py:") or expected is not None:
        return False  # the user's own code and answers are asked each time
    heard = read_json(folder / PROOF).get("witness") or []
    return bool(heard) and (wanted != "required" or any(each.get("who") for each in heard))


def made_from(folder: Path, recipe: Recipe, *, asked: bool) -> bool:
    """Was the folder made from this checkpoint? Raises UsageError when it was not and the user asked for it."""
    made = folder / FUSED
    known = made.is_file() and read_json(made).get("checkpoint", {}).get("sha256") == sha256(Path(recipe.checkpoint))
    if asked and not known:
        what = "was made from another checkpoint" if made.is_file() else f"holds no {FUSED}"
        raise UsageError(
            f"{folder}: {what}; give the folder that `convert` or `fuse` made of {Path(recipe.checkpoint).name}"
        )
    return known


def save_analysis(folder: Path, checkpoint: Checkpoint, branches: Sequence[BranchAnalysis]) -> None:
    """Write ``analysis.json``, for the report."""
    content = {"checkpoint_sha256": checkpoint.sha256, "branches": [asdict(branch) for branch in branches]}
    write_json(folder / ANALYSIS, content)


def save_artifact(folder: Path, artifact: Artifact) -> None:
    """Add one artefact to ``artifact.json``; one of the same path is replaced."""
    path = folder / ARTIFACTS
    others = read_json(path).get("artifacts", []) if path.is_file() else []
    kept = [
        o
        for o in others
        if o.get("path") != artifact.path and not (o.get("failure") and o.get("target") == artifact.target)
    ]
    write_json(path, {"artifacts": [*kept, asdict(artifact)]})


def prepare(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> set[str]:
    """Check an output folder before anything is written; the stages that are done there for this very recipe ("begun": some shards are).

    Raises UsageError when it exists with something in it and neither option was given, or when it is not ours to overwrite.
    """
    from reparam_export.streaming.staging import in_progress, settle

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; expected a folder to write to")
    settle(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return set()
    ours, begun = (folder / FUSED).is_file(), in_progress(folder)
    if overwrite and not (ours or begun):
        raise UsageError(f"{folder}: was not made by reparam-export (it holds no {FUSED}), so it is not overwritten")
    if overwrite:
        return set()
    if not resume:
        raise UsageError(
            f"{folder}: exists and is not empty; pass --resume to continue it, --overwrite to start anew, or another -o"
        )
    if begun:
        return {"begun"}
    if not ours:
        return set()
    content = read_json(folder / FUSED)
    digests = recipe.digests()
    if recipe_of(content) != recipe or any(content.get("digests", {}).get(name) != d for name, d in digests.items()):
        raise UsageError(
            f"{folder}: was made from another checkpoint, base or settings; pass --overwrite or another -o"
        )
    return {"fused"} | ({"proof"} if (folder / PROOF).is_file() else set())


def plain_json(value: Any) -> Any:
    """JSON types only; infinity and NaN as strings, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain_json(asdict(value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    return value
