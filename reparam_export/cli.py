"""The command line. No logic in it: each command is one stage; ``convert`` is all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reparam_export.errors import EquivalenceError, ReparamError, UsageError

if TYPE_CHECKING:
    from reparam_export.checkpoints import Recipe
    from reparam_export.console import Console
    from reparam_export.exporters.artifact import Artifact
    from reparam_export.report import Report
    from reparam_export.verification import VerifiedModel

TARGETS = ("onnx", "trt", "safetensors")
EXIT_CODES = """Exit codes: 0 proven and written; 1 not equivalent; 2 wrong call; 3 checkpoint or base not understood; 4 cannot be fused;
5 the target refused, or the disk did; 70 a fault of reparam-export itself."""
Command = Callable[..., Any]


def stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, shown in the given order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
CHECKPOINT = stack(
    click.argument("checkpoint", type=click.Path(path_type=Path)),
    click.option(
        "--base", metavar="SPEC", help="timm:NAME?kw=value, hf:FOLDER, open_clip:NAME or py:FILE.py:FUNCTION."
    ),
    click.option(
        "--base-weights",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="The base's state: .npz .pt .safetensors.",
    ),
    click.option(
        "--config",
        metavar="FILE",
        multiple=True,
        type=click.Path(path_type=Path),
        help="YAML/JSON settings or GLoRA paths.",
    ),
    click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="One setting, such as scale=0.5."),
    click.option(
        "--candidate", metavar="K", default=0, help="K-th best candidate of an evolution checkpoint; 0 is the best."
    ),
    click.option(
        "--input",
        "input_specs",
        metavar="SPEC",
        multiple=True,
        help="Input of a py: base: image=batch,3,64,64:float32.",
    ),
)
DTYPE = click.option(
    "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Storage of the fused weights; default: as the base's."
)
SAMPLES = stack(
    click.option(
        "--inputs", metavar="FILE", type=click.Path(path_type=Path), help="Real samples for the proof: .npy or .npz."
    ),
    click.option(
        "--samples", "count", default=8, type=click.IntRange(1, 4096), help="Random samples when no --inputs.  [8]"
    ),
    click.option("--seed", default=0, help="Seed of random samples and probes.  [0]"),
)
EXPORT = stack(
    click.option(
        "--to", "targets", type=click.Choice(TARGETS), multiple=True, required=True, help="Target; may be repeated."
    ),
    click.option(
        "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", help="Of ONNX and TensorRT.  [fp32]"
    ),
    click.option("--opset", type=click.IntRange(18, 25), help="ONNX opset; default: torch's."),
    click.option(
        "--batch", metavar="MIN:OPT:MAX", default="1:8:64", help="Batch sizes of the engine's profile.  [1:8:64]"
    ),
    click.option(
        "--gpu",
        metavar="LIST",
        help="Compute capabilities for TensorRT, such as sm80,sm89; default: all it supports here.",
    ),
)
OUT = click.option(
    "-o", "--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Output folder; default: CHECKPOINT-fused."
)
AGAIN = stack(
    click.option("--resume", is_flag=True, help="Continue a folder made from the same checkpoint and settings."),
    click.option("--overwrite", is_flag=True, help="Start anew in a folder that reparam-export made."),
)
FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
@click.version_option(package_name="reparam-export")
def cli() -> None:
    """Fold trained adapters into their base weights, prove that nothing changed, and export.

    \b
    reparam-export convert ckpt.pt --to trt
    reparam-export convert cifar.pt --base timm:vit_base_patch16_224 --base-weights ViT-B_16.npz \\
        --config cifar.yaml --to onnx --to trt -o out/
    """


@cli.command()
@CHECKPOINT
@JSON
def inspect(as_json: bool, **given: Any) -> None:
    """Say what a checkpoint holds, what is missing, and whether it can be folded."""
    from reparam_export.inspection import inspect_checkpoint, show

    console = _console(as_json)
    found = inspect_checkpoint(_recipe(**given))
    show(console, found)
    console.result(found)


@cli.command()
@CHECKPOINT
@DTYPE
@OUT
@AGAIN
@JSON
def fuse(out: Path | None, resume: bool, overwrite: bool, as_json: bool, dtype: str | None, **given: Any) -> None:
    """Fold every adapter: writes fused.safetensors and fused.json."""
    from reparam_export.folder import prepare

    console, recipe = _console(as_json), _recipe(dtype=dtype, **given)
    folder = _out(out, recipe)
    if "fused" not in prepare(folder, recipe, resume=resume, overwrite=overwrite):
        _fuse(console, recipe, folder)
    console.line(f"{folder / 'fused.safetensors'}")
    console.result({"folder": str(folder), **_read(folder / "fused.json")})


@cli.command()
@FOLDER
@SAMPLES
@JSON
def verify(folder: Path, inputs: Path | None, count: int, seed: int, as_json: bool) -> None:
    """Prove that the fused weights in FOLDER are the trained model: writes verification.json."""
    console = _console(as_json)
    try:
        _verify(console, folder, inputs, count, seed)
    finally:
        if (folder / "verification.json").is_file():
            console.result({"folder": str(folder), **_read(folder / "verification.json")})


@cli.command()
@FOLDER
@EXPORT
@JSON
def export(folder: Path, as_json: bool, **options: Any) -> None:
    """Write proven weights as ONNX, a TensorRT engine or safetensors, and prove the file."""
    from reparam_export.folder import load_proof

    console = _console(as_json)
    builder = _check_export(options)
    if builder:
        console.line(f"engine: {builder}")
    artifacts = _export(console, load_proof(folder), folder, **options)
    console.result({"folder": str(folder), "artifacts": artifacts})


@cli.command()
@FOLDER
@JSON
def report(folder: Path, as_json: bool) -> None:
    """Write report.html, report.md and junit.xml from what the other commands left in FOLDER."""
    console = _console(as_json)
    written = _report(console, folder)
    console.result({"folder": str(folder), "verdict": written.verdict, "report": str(written.html)})
    if written.verdict in ("wrong", "unproven"):
        raise EquivalenceError(written.headline)


@cli.command()
@CHECKPOINT
@DTYPE
@SAMPLES
@EXPORT
@OUT
@AGAIN
@JSON
def convert(
    out: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    dtype: str | None,
    inputs: Path | None,
    count: int,
    seed: int,
    **given: Any,
) -> None:
    """Fuse, verify, export and report in one go."""
    from reparam_export.folder import load_proof, prepare, same_samples

    console = _console(as_json)
    options = {name: given.pop(name) for name in ("targets", "precision", "opset", "batch", "gpu")}
    builder = _check_export(options)
    if builder:
        console.line(f"engine: {builder}")
    recipe = _recipe(dtype=dtype, **given)
    folder = _out(out, recipe)
    done = prepare(folder, recipe, resume=resume, overwrite=overwrite)
    if "fused" not in done:
        _fuse(console, recipe, folder)
    try:
        known = "proof" in done and same_samples(folder, inputs, count, seed)
        model = load_proof(folder) if known else _verify(console, folder, inputs, count, seed)
        artifacts = _export(console, model, folder, **options)
    finally:
        if (folder / "fused.json").is_file():
            written = _report(console, folder)
    console.result(
        {"folder": str(folder), "verdict": written.verdict, "report": str(written.html), "artifacts": artifacts}
    )


def main() -> None:
    """Entry point: runs the command; turns errors into one message and the documented exit code."""
    as_json = "--json" in sys.argv[1:]
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("Aborted", "interrupted", 130, as_json)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\n{context.get_usage()}" if context is not None and not as_json else ""
        _fail("UsageError", error.format_message() + hint, error.exit_code, as_json)
    except ReparamError as error:
        _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except MemoryError:
        _fail("MemoryError", "out of memory", 5, as_json)
    except OSError as error:
        _fail("OSError", f"{error.filename or 'output'}: {error.strerror or error}", 5, as_json)
    except Exception as error:  # a fault of ours must not look like a verdict
        import traceback

        traceback.print_exc()
        _fail(type(error).__name__, f"internal error, please report it: {type(error).__name__}: {error}", 70, as_json)


def _fail(kind: str, message: str, code: int, as_json: bool) -> None:
    from reparam_export.console import clean

    if as_json:
        import json

        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}, indent=1))
    click.echo("\n".join(clean(line) for line in f"error: {message}".splitlines()), err=True)
    sys.exit(code)


def _recipe(
    checkpoint: Path,
    base: str | None,
    base_weights: Path | None,
    config: tuple[Path, ...],
    settings: tuple[str, ...],
    candidate: int,
    input_specs: tuple[str, ...],
    dtype: str | None = None,
) -> Recipe:
    from reparam_export.checkpoints import Recipe

    if base is not None:
        base = _absolute_base(base)
    return Recipe(
        checkpoint=str(checkpoint.absolute()),
        base=base,
        base_weights=None if base_weights is None else str(base_weights.absolute()),
        config=tuple(str(c.absolute()) for c in config),
        settings=dict(_setting(text) for text in settings),
        candidate=candidate,
        inputs=input_specs,
        dtype=dtype,
    )


def _absolute_base(base: str) -> str:
    """A base spec whose folder or file does not depend on where the command is run."""
    scheme, _, argument = base.partition(":")
    path, mark, rest = argument.rpartition(":") if scheme == "py" else argument.partition("?")
    if scheme in ("hf", "py") and Path(path).exists():
        return f"{scheme}:{Path(path).absolute()}{mark}{rest}"
    return base


def _setting(text: str) -> tuple[str, Any]:
    import ast

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {text!r}: expected NAME=VALUE, such as scale=0.5")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _out(out: Path | None, recipe: Recipe) -> Path:
    return out or Path(f"{Path(recipe.checkpoint).name.split('.')[0]}-fused")


def _fuse(console: Console, recipe: Recipe, folder: Path) -> None:
    from reparam_export import fuse as fuse_weights
    from reparam_export.folder import save_fused

    with console.stage("fuse") as advance:
        checkpoint = recipe.read()
        for note in checkpoint.notes:
            console.line(f"note: {note}")
        weights = fuse_weights(checkpoint, recipe.dtype, advance)
        save_fused(folder, checkpoint, weights)
    console.line(f"fused {len(checkpoint.adapters)} adapters into {len(weights.changed)} tensors")
    for name in weights.created:
        console.line(f"added: {name}, a bias that the base does not have")


def _verify(console: Console, folder: Path, inputs: Path | None, count: int, seed: int) -> VerifiedModel:
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


def _export(
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
                artifact = write(model, target, folder, batch=_batch(batch), gpus=gpus, **options)
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


def _check_export(options: dict[str, Any]) -> str | None:
    """Refuse a wrong option before any work is done; says which engine builder will be used."""
    _batch(options["batch"])
    if "trt" in options["targets"]:
        from reparam_export.exporters import tensorrt

        return tensorrt.check(tuple(filter(None, (options["gpu"] or "").split(","))))
    return None


def _batch(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) == 3 and all(p.isdecimal() for p in parts):
        low, best, high = map(int, parts)
        if 1 <= low <= best <= high:
            return low, best, high
    raise UsageError(f"--batch {text!r}: expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, such as 1:8:64")


def _report(console: Console, folder: Path) -> Report:
    from reparam_export import write_report

    written = write_report(folder)
    console.line(written.headline)
    console.line(f"report: {written.html}")
    return written


def _console(as_json: bool) -> Console:
    from reparam_export.console import Console

    return Console(as_json=as_json)


def _read(path: Path) -> dict[str, Any]:
    from reparam_export.files import read_json

    return read_json(path)
