"""The stages as the commands run them: with progress, notes for the user, and the folder as the way from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.cli._options import batch_sizes
from reparam_export.cli._witness import witness_lines
from reparam_export.errors import EquivalenceError, ExportError, ReparamError

if TYPE_CHECKING:
    from reparam_export.checkpoints import Checkpoint, Recipe
    from reparam_export.console import Console
    from reparam_export.exporters.artifact import Artifact
    from reparam_export.report import Report
    from reparam_export.streaming import Plan
    from reparam_export.verification import VerifiedModel

SHOWN = 5  # created biases named one by one


def fuse_stage(
    console: Console,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    witness: str = "auto",
    verifying: bool = False,
    targets: tuple[str, ...] = (),
    check: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> None:
    """Shard by shard when the base is a Hugging Face folder and every kind can be, else in memory. Says which, and why.

    witness: who reads the checkpoint a second time; what is folded in memory is witnessed when it is verified, and so is what is streamed
    where that follows (verifying) and the model fits. targets: what is to be exported; check: is called before anything is folded, where
    the model fits. Both refuse what the work would end in.
    """
    from reparam_export.inspection import in_order
    from reparam_export.streaming import NotStreamableError, kernel, plan_of
    from reparam_export.streaming.formats import torch_name

    kernel.prepare()
    checkpoint = recipe.read_lightly()
    check_targets(checkpoint, targets)
    for line in in_order(checkpoint.describe()["stack"]):
        console.line(line)
    show_notes(console, checkpoint.notes)
    plan = None
    if str(checkpoint.base).startswith("hf:"):
        try:
            plan = plan_of(checkpoint, None if recipe.dtype == "auto" else recipe.dtype)
        except NotStreamableError as reason:
            if isinstance(reason.__cause__, ExportError) and {"safetensors", "genai"} & set(targets):
                raise reason.__cause__ from None  # the folder that these write would be refused when all is done
            console.line(f"note: folded in memory, not shard by shard: {reason}")
            check_memory(checkpoint, str(reason))
    if plan is not None and recipe.dtype == "auto":
        from reparam_export.streaming.survey import one_for_all

        with console.stage("survey"):
            chosen, why = one_for_all(plan)
        console.line(
            f"dtype: {chosen or 'as the base'}, one for all, since stock loaders cast a whole folder to one: {why}"
        )
        plan = plan_of(checkpoint, chosen)
    if plan is not None:
        later = verifying and fits(
            plan.size, [torch_name(p.code) for s in plan.shards for _, ps in s.units for p in ps]
        )
        if later and not dry_run:
            check(checkpoint)
        stream_stage(
            console,
            plan,
            recipe,
            folder,
            checkpoint.notes,
            resume=resume,
            dry_run=dry_run,
            witness="later" if later else witness,
        )
    elif not dry_run:
        check(recipe.read())
        memory_stage(console, recipe, folder)
    else:
        console.line(
            f"plan: {len(checkpoint.adapters)} adapters, folded in memory into {folder / 'fused.safetensors'}; nothing was written"
        )


def check_targets(checkpoint: Checkpoint, targets: tuple[str, ...]) -> None:
    """Raises ExportError for a target that the base cannot be written as."""
    if "genai" in targets and checkpoint.base is not None and not checkpoint.base.startswith("hf:"):
        raise ExportError("the target genai needs a base that is a Hugging Face folder (hf:FOLDER)")


def stream_stage(
    console: Console,
    plan: Plan,
    recipe: Recipe,
    folder: Path,
    known: tuple[str, ...],
    *,
    resume: bool,
    dry_run: bool,
    witness: str = "auto",
) -> None:
    from reparam_export.report.numbers import size
    from reparam_export.streaming import expected, stream
    from reparam_export.verification.certificate import witness_from_json

    found = expected(plan, folder)
    console.line(
        f"plan: {len(plan.shards)} shards, {size(plan.size)} into {folder / 'hf'}; {found['touched']} weights are folded, "
        f"{found['entries'] / 1e9:.2f} G entries"
    )
    console.line(
        f"plan: about {found['seconds']:.0f} s of folding on {found['cores']} cores, at most {size(found['memory'])} of memory; "
        f"{size(found['free'])} of disk are free"
    )
    if found["whole"]:
        console.line(
            f"plan: {found['whole']} weights have adapters without factors and are folded as whole layers, which takes longer"
        )
    show_created(console, plan.created)
    for name in plan.untied:
        console.line(f"untied: {name}, which was one tensor with the embeddings, is written on its own")
    for name, value in plan.corrected.items():
        nested = isinstance(value, dict) and "vocab_size" in value  # of a model with a language model in it
        name, value = (f"{name}.vocab_size", value["vocab_size"]) if nested else (name, value)
        console.line(f"config.json: {name} = {str(value).lower()}")
    show_notes(console, plan.checkpoint.notes, known)
    if dry_run:
        console.result(found)
        return
    with console.stage("fuse") as advance:
        record = stream(plan, folder, dtype=recipe.dtype, resume=resume, advance=advance, witness=witness)
    console.line(
        f"fused {counted(plan.checkpoint, plan.model)} into {len(record['changed'])} tensors: every stored entry proven"
    )
    show_narrowed(console, record["narrowed"])
    console.line(kept_line(record["survival"]))
    if witness != "later":
        witness_lines(console, [witness_from_json(each) for each in record["witness"]])


def show_notes(console: Console, notes: tuple[str, ...], known: tuple[str, ...] = ()) -> None:
    """What was made of the checkpoint, but for what was said before."""
    for note in notes:
        if note not in known:
            console.line(f"note: {note}")


def counted(checkpoint: Checkpoint, model: Checkpoint | None = None) -> str:
    """How many adapters, and what is counted where a layer has more than one; model: under the names of the model, not of its files."""
    adapters = (*checkpoint.adapters, *(model.adapters if model else ()))
    each = any(a.expert is not None or a.rows is not None for a in adapters)
    return f"{len(checkpoint.adapters)} adapters{', one for each matrix or block of rows,' if each else ''}"


def show_created(console: Console, names: Sequence[str]) -> None:
    """The biases that folding adds: by name, and the rest of many as a number."""
    shown = names if len(names) <= SHOWN + 1 else names[:SHOWN]
    for name in shown:
        console.line(f"added: {name}, a bias that the base does not have")
    if len(names) > len(shown):
        console.line(f"added: {len(names) - len(shown)} more biases, listed in fused.json and the report")


def show_narrowed(console: Console, names: list[str]) -> None:
    """Say what storage rounds of tensors that were trained whole: no layer's share speaks of it."""
    if names:
        console.line(
            f"rounded: {len(names)} of the tensors taken whole, first {names[0]}, are stored in fewer bits than they were trained in; "
            "--dtype fp32 keeps them"
        )


def memory_stage(console: Console, recipe: Recipe, folder: Path) -> None:
    from reparam_export import fuse as fuse_weights
    from reparam_export.folder import save_fused
    from reparam_export.fusion import survival_of

    with console.stage("fuse") as advance:
        checkpoint = recipe.read()
        weights = fuse_weights(checkpoint, recipe.dtype, advance)
        record = save_fused(folder, checkpoint, weights, recipe.dtype)
    whole = f", {len(weights.replaced)} tensors taken whole" if weights.replaced else ""
    console.line(f"fused {counted(checkpoint)} into {len(weights.changed)} tensors{whole}")
    show_notes(console, weights.notes)
    show_narrowed(console, record["narrowed"])
    if recipe.dtype == "auto":
        console.line(
            f"dtype: {'each layer its own' if weights.dtype == 'auto' else f'{weights.dtype}, one for all'}: {weights.storage()}"
        )
    console.line(kept_line(survival_of(weights.kept)))
    show_created(console, weights.created)
    for name in weights.untied:
        console.line(f"untied: {name}, which was one tensor with another, has numbers of its own")


def kept_line(survival: dict[str, Any]) -> str:
    """Of the adapter's change, the share that the storage format keeps."""
    from reparam_export.report.numbers import percent

    return (
        f"kept: {percent(survival['overall'])} of the adapter's change by the storage format, "
        f"{percent(survival['least'])} in the layer that keeps least"
    )


def check_memory(checkpoint: Checkpoint, reason: str) -> None:
    """Raises FusionError when a model that cannot be streamed would not fit into memory either."""
    from reparam_export.errors import FusionError
    from reparam_export.files import weight_files
    from reparam_export.hf_folder import folder_of

    source = folder_of(checkpoint.base)
    files = set(weight_files(source).values()) if source is not None else set()
    needed = 3 * sum(file.stat().st_size for file in files)  # base, result, and a layer in float64 among them
    available = available_memory()
    if available is not None and needed > available:
        raise FusionError(
            f"{checkpoint.path}: cannot be folded shard by shard ({reason}), and folding in memory needs about {needed / 1e9:.0f} GB, "
            f"of which {available / 1e9:.0f} GB are free; nothing was written. Fold it on a machine with more memory"
        )


def check_model_fits(folder: Path) -> None:
    """Raises ExportError when the model of streamed weights is larger than what memory is left for the proof of its outputs."""
    record = read_record(folder / "fused.json") if (folder / "fused.json").is_file() else {}
    if "weights" in record and not fits(int(record.get("bytes", 0)), record.get("storage", {})):
        needed, available = _of_proof(int(record.get("bytes", 0)), record.get("storage", {})), available_memory() or 0
        raise ExportError(
            f"{folder}: the proof of the outputs builds the model, also in float64: about {needed / 1e9:.0f} GB, of which "
            f"{available / 1e9:.0f} GB are free. The weights are proven: they were while they were written, as reparam-export report "
            "says. Verify where the model fits"
        )


def fits(size: int, dtypes: Iterable[str]) -> bool:
    """Is there memory for the proof of the outputs of a model of so many bytes, stored in these dtypes?"""
    available = available_memory()
    return available is None or _of_proof(size, dtypes) <= available


def _of_proof(size: int, dtypes: Iterable[str]) -> float:
    """Bytes: the unfused model in float64, and base, adapted and fused model in storage precision."""
    sizes = {"float32": 4, "float64": 8}
    return 20 * size / min((sizes.get(dtype, 2) for dtype in dtypes), default=2)


def available_memory() -> int | None:
    """Bytes that may still be used, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def verify_stage(
    console: Console,
    folder: Path,
    inputs: Path | None,
    count: int,
    seed: int,
    witness: str = "auto",
    expected: Path | None = None,
    base: str | None = None,
) -> VerifiedModel:
    """Prove the folder's weights, and write the proof. base: of a folder that was made on a ``py:`` base, that base."""
    from reparam_export import verify as prove
    from reparam_export.folder import load_fused, save_proof
    from reparam_export.refuted import on_trial
    from reparam_export.report.statement import vacuity
    from reparam_export.verification.certificate import Certificate

    check_model_fits(folder)
    with console.stage("verify") as advance, on_trial(folder):
        checkpoint, weights = load_fused(folder, base=base)
        try:
            model = prove(
                checkpoint, weights, inputs, count=count, seed=seed, advance=advance, witness=witness, expected=expected
            )
        except EquivalenceError as error:
            if isinstance(error.evidence, Certificate):
                save_proof(folder, error.evidence, None)
            raise
        save_proof(folder, model.certificate, model)
    for name in model.certificate.vacuous:
        output = max((o for o in model.certificate.outputs if o.output == name), key=lambda o: o.moved or 0.0)
        console.line(
            f"note: output {name} proves nothing: {vacuity(output)}. Give samples that it reaches with --inputs"
        )
    for name in model.certificate.unexercised:
        console.line(f"note: no output depends on {name}; it is proven by its weights alone")
    witness_lines(console, model.certificate.witness)
    return model


def proven(folder: Path, base: str | None = None) -> VerifiedModel:
    """The verified model of a folder, its weights proven once more. Raises EquivalenceError, and sets aside what is not proven."""
    from reparam_export.folder import load_proof
    from reparam_export.refuted import check_none, on_trial

    check_none(folder)
    with on_trial(folder):
        return load_proof(folder, base=base)


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
    if "genai" in options["targets"]:
        from reparam_export.exporters import genai

        genai.check(options["precision"])
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
