"""The stages as the commands run them: with progress, notes for the user, and the folder as the way from one to the next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.cli._options import batch_sizes
from reparam_export.errors import EquivalenceError, ReparamError

if TYPE_CHECKING:
    from reparam_export.checkpoints import Recipe
    from reparam_export.console import Console
    from reparam_export.exporters.artifact import Artifact
    from reparam_export.report import Report
    from reparam_export.verification import VerifiedModel

SHOWN = 5  # created biases named one by one


def fuse_stage(console: Console, recipe: Recipe, folder: Path) -> None:
    from reparam_export import fuse as fuse_weights
    from reparam_export.folder import save_fused
    from reparam_export.inspection import in_order

    with console.stage("fuse") as advance:
        checkpoint = recipe.read()
        for line in in_order(checkpoint.describe()["stack"]):
            console.line(line)
        for note in checkpoint.notes:
            console.line(f"note: {note}")
        weights = fuse_weights(checkpoint, recipe.dtype, advance)
        save_fused(folder, checkpoint, weights)
    console.line(f"fused {len(checkpoint.adapters)} adapters into {len(weights.changed)} tensors")
    for name in weights.created[:SHOWN]:
        console.line(f"added: {name}, a bias that the base does not have")
    if len(weights.created) > SHOWN:
        console.line(f"added: {len(weights.created) - SHOWN} more biases, listed in fused.json and the report")


def verify_stage(console: Console, folder: Path, inputs: Path | None, count: int, seed: int) -> VerifiedModel:
    from reparam_export import verify as prove
    from reparam_export.folder import load_fused, save_proof
    from reparam_export.verification.certificate import Certificate

    with console.stage("verify") as advance:
        checkpoint, weights = load_fused(folder)
        try:
            model = prove(checkpoint, weights, inputs, count=count, seed=seed, advance=advance)
        except EquivalenceError as error:
            if isinstance(error.evidence, Certificate):
                save_proof(folder, error.evidence, None)
            raise
        save_proof(folder, model.certificate, model)
    for name in model.certificate.unexercised:
        console.line(f"note: no output depends on {name}; it is proven by its weights alone")
    return model


def export_stage(
    console: Console,
    model: VerifiedModel,
    folder: Path,
    targets: tuple[str, ...],
    batch: str,
    gpu: str | None,
    **options: Any,
) -> list[Artifact]:
    from reparam_export import export as write
    from reparam_export.exporters.artifact import failed
    from reparam_export.folder import save_artifact

    artifacts = []
    gpus = tuple(filter(None, (gpu or "").split(",")))
    chosen = [
        t for t in dict.fromkeys(targets) if not (t == "onnx" and "trt" in targets)
    ]  # trt writes the ONNX file too
    for target in chosen:
        with console.stage(f"export {target}"):
            try:
                artifact = write(model, target, folder, batch=batch_sizes(batch), gpus=gpus, **options)
            except ReparamError as error:
                save_artifact(folder, failed(target, model.certificate.weights_sha256, str(error)))
                raise
        console.line(f"{folder / artifact.path}: {artifact.note}")
        if artifact.kept_fp32:
            console.line(f"kept in fp32: {len(artifact.kept_fp32)} weights and nodes, listed in the report")
        for name, reason in artifact.kept_fp32:
            if reason.startswith("holds "):  # a weight beyond the format
                console.line(f"kept in fp32: {name} {reason}")
        artifacts.append(artifact)
    return artifacts


def analyse_stage(console: Console, recipe: Recipe, folder: Path | None) -> list[Any]:
    """The branch analysis, shown, and with a folder in ``analysis.json`` and the report."""
    from dataclasses import asdict

    from reparam_export.analysis import analyse
    from reparam_export.folder import save_analysis
    from reparam_export.inspection import show_analysis

    with console.stage("analyse") as advance:
        checkpoint = recipe.read()
        branches = analyse(checkpoint, advance)
    show_analysis(console, branches)
    if folder is not None:
        save_analysis(folder, checkpoint, branches)
        report_stage(console, folder)
    return [asdict(branch) for branch in branches]


def check_export(options: dict[str, Any]) -> str | None:
    """Refuse a wrong option before any work is done; says which engine builder will be used."""
    batch_sizes(options["batch"])
    if "trt" in options["targets"]:
        from reparam_export.exporters import tensorrt

        return tensorrt.check(tuple(filter(None, (options["gpu"] or "").split(","))))
    return None


def report_stage(console: Console, folder: Path) -> Report:
    from reparam_export import write_report

    written = write_report(folder)
    console.line(written.headline)
    console.line(f"report: {written.html}")
    return written


def console_of(as_json: bool) -> Console:
    from reparam_export.console import Console

    return Console(as_json=as_json)


def read_record(path: Path) -> dict[str, Any]:
    from reparam_export.files import read_json

    return read_json(path)
