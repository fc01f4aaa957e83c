"""Export: a verified model to one target, run or audited before it counts as an artefact. Never sees an adapter's formula.

A target is a module with ``write()``, and a ``Runner`` where its files can be run.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.calls import foreign
from reparam_export.errors import EquivalenceError, ExportError, UsageError
from reparam_export.exporters.artifact import Artifact
from reparam_export.files import exported_sha256
from reparam_export.fusion import DTYPES
from reparam_export.verification.certificate import OutputEvidence
from reparam_export.verification.outputs import Reference, compare

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from reparam_export.verification import VerifiedModel

TARGETS = ("onnx", "trt", "safetensors", "genai")
BATCH = (1, 8, 64)


@dataclass(frozen=True)
class Options:
    """What an export can be told. batch: min, opt and max of the engine's profile; the largest is also what ONNX is run at."""

    precision: str = "fp32"
    opset: int | None = None
    batch: tuple[int, int, int] = BATCH
    gpus: tuple[str, ...] = ()
    external: int | None = None  # bytes of weights from which they go to a file of their own


def export(
    model: VerifiedModel,
    target: str,
    folder: str | Path,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    batch: tuple[int, int, int] = BATCH,
    gpus: Sequence[str] = (),
) -> Artifact:
    """Write a verified model to ``folder`` as ``target`` ("onnx", "trt", "safetensors" or "genai") and prove the file.

    precision: "fp32", "fp16" or "bf16" (norms, softmax and what overflows stay fp32). gpus: compute capabilities such as "sm89".
    Raises EquivalenceError (the file's outputs are outside the bound; the file is removed), ExportError, UsageError.
    """
    from reparam_export.folder import save_artifact, save_evidence

    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}; there are: {', '.join(TARGETS)}")
    if precision not in DTYPES:
        raise UsageError(f"unknown precision {precision!r}; there are: {', '.join(DTYPES)}")
    options = Options(precision, opset, batch, tuple(gpus))
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    model.check()
    save_evidence(place, model)
    if target == "safetensors":
        from reparam_export.exporters.safetensors import export_folder

        artifact = export_folder(model, place)
    elif target == "genai":
        from reparam_export.exporters.genai import export_genai

        artifact = export_genai(model, place, precision)
    else:
        artifact = to_onnx(model, place, options)
        if target == "trt":
            save_artifact(place, artifact)
            artifact = to_engine(model, place, options, artifact)
    save_artifact(place, artifact)
    return artifact


def to_onnx(model: VerifiedModel, folder: Path, options: Options) -> Artifact:
    """``model.onnx``, run by onnxruntime at batch 1, 2 and the largest against the reference."""
    from reparam_export.exporters import onnx

    started = time.perf_counter()
    path = folder / "model.onnx"
    fused = model.module()
    largest = max(options.batch[2], 2)
    with _Scratch(folder) as scratch:
        full = scratch / "model.onnx"
        write_fp32(fused, model, full, options)
        base_differences = graph_differences(model, full, scratch, options)
        kept: tuple[tuple[str, str], ...] = ()
        floors: dict[str, float] = dict(model.reference.floors)
        made = full
        if options.precision != "fp32":
            made = scratch / "lowered" / "model.onnx"
            made.parent.mkdir()
            kept = lower(full, made, model.reference, options)
            floors = lowered_floors(model, scratch, options, floors)
        evidence = run_onnx(made, model, floors, options.precision, dict.fromkeys((1, 2, largest)))
        if options.precision == "fp32" and not all(o.passed for o in evidence):
            evidence = run_onnx(made, model, model.drawn_floors(), options.precision, dict.fromkeys((1, 2, largest)))
        if options.precision == "fp32" and model.reference.dtype != "float32":
            own = replace(model, reference=stored_reference(model))
            evidence += run_onnx(
                made, own, own.reference.floors, "fp32 against the stored weights", dict.fromkeys((1, largest))
            )
        _refuse(path.name, evidence, base_differences)
        for stale in folder.glob("model.onnx*"):
            stale.unlink()
        for file in made.parent.glob("model.onnx*"):
            file.replace(folder / file.name)
    with onnx.Runner(path):
        pass  # it loads from its final place, external data included
    graph = summary(path)
    renamed = model.signature.renamed
    return Artifact(
        target="onnx",
        path=path.name,
        precision=options.precision,
        size=sum(f.stat().st_size for f in folder.glob("model.onnx*")),
        sha256=exported_sha256(path),
        weights_sha256=model.certificate.weights_sha256,
        ran=True,
        note=f"run by onnxruntime on the {graph.pop('device')} at batch {', '.join(map(str, dict.fromkeys((1, 2, largest))))}: "
        + worst_of(evidence)
        + "".join(
            f"; output {own} is called {new}, since {own} is an input or a weight" for new, own in renamed.items()
        ),
        outputs=evidence,
        kept_fp32=kept,
        details={
            **graph,
            "graph": _identical(model),
            "renamed_outputs": dict(renamed),
            "seconds": round(time.perf_counter() - started, 2),
        },
    )


def _identical(model: VerifiedModel) -> str:
    """What an exported graph without a difference is said to be."""
    added = len(model.certificate.graph.added)
    return f"identical to the base's{f', but for {added} added tensors that the report lists' if added else ''}"


def write_fp32(module: nn.Module, model: VerifiedModel, path: Path, options: Options) -> None:
    """The module in fp32 (widening 16-bit storage is exact) with its provenance in the metadata."""
    from reparam_export.exporters import onnx

    extra: dict[str, Any] = {} if options.external is None else {"external": options.external}
    onnx.write(
        module.float(),
        model.signature,
        {k: v[:2] for k, v in model.reference.inputs.items()},
        path,
        opset=options.opset,
        metadata=provenance(model),
        **extra,
    )


def provenance(model: VerifiedModel) -> dict[str, str]:
    """What a file says about where it comes from."""
    from reparam_export.verification import versions

    certificate = model.certificate
    return {
        "reparam_export": versions().get("reparam-export", ""),
        "checkpoint_sha256": certificate.checkpoint["sha256"],
        "base": str(certificate.base["spec"]),
        "kinds": json.dumps(certificate.checkpoint["kinds"]),
        "weights_sha256": certificate.weights_sha256,
        "verdict": certificate.verdict,
    }


def graph_differences(model: VerifiedModel, fused: Path, scratch: Path, options: Options) -> list[str]:
    """Differences of the exported graph from that of the exported base, with what folding had to add: zeros for a created bias, and
    tensors of their own for those that it untied."""
    import torch

    from reparam_export.assembly import fused as assembled
    from reparam_export.assembly import opened
    from reparam_export.exporters.onnx import differences
    from reparam_export.verification import state_for, untied

    base = opened(model.checkpoint)[0]
    added = {name: torch.zeros_like(model.weights[name]) for name in model.weights.created}
    state = state_for(base, model.weights)
    for pair in untied(base, model.weights).items():
        added |= {name: state[name].clone() for name in pair if name in state}  # a resized table's other is not known
    path = scratch / "base" / "model.onnx"
    path.parent.mkdir()
    write_fp32(assembled(base, added), model, path, options)
    return differences(path, fused)


def lower(source: Path, path: Path, reference: Reference, options: Options) -> tuple[tuple[str, str], ...]:
    """The file in 16-bit precision, with the activations of the reference's own inputs deciding what overflows."""
    from reparam_export.exporters import precision

    sample = {name: _numpy(tensor[:2]) for name, tensor in reference.inputs.items()}
    with foreign(source.name, f"lowered to {options.precision}", ExportError):
        return precision.lower(source, path, options.precision, samples=[sample], external=options.external)  # type: ignore[arg-type]


def lowered_floors(
    model: VerifiedModel, scratch: Path, options: Options, floors: Mapping[str, float]
) -> dict[str, float]:
    """The unfused model on the same road: exported, lowered, run. Its error is the floor of this precision."""
    import torch

    place = scratch / "unfused"
    (place / "lowered").mkdir(parents=True)
    write_fp32(model.unfused(torch.float32), model, place / "model.onnx", options)
    lower(place / "model.onnx", place / "lowered" / "model.onnx", model.reference, options)
    found = run_onnx(
        place / "lowered" / "model.onnx", model, floors, options.precision, {min(8, model.reference.samples): None}
    )
    return {o.output: max(o.error, floors[o.output]) for o in found}


def stored_reference(model: VerifiedModel) -> Reference:
    """The fused 16-bit weights themselves, in float64: what an fp32 file of them must answer to fp32's own floor.

    The unfused model's floor in 16 bits is so wide that a fault of the exporter could hide below it.
    """
    import torch

    from reparam_export.verification.outputs import measure_floors, run

    inputs, names = model.reference.inputs, model.signature.outputs
    exact = run(copy.deepcopy(model.module()).double(), model.signature, inputs, torch.float64)
    truth = dict(zip(names, exact, strict=True))
    single = run(copy.deepcopy(model.module()).float(), model.signature, inputs, torch.float32)
    floors = measure_floors(truth, single)
    return Reference(inputs, truth, floors, "float32", model.signature.axes, model.reference.moved)


def run_onnx(
    path: Path, model: VerifiedModel, floors: Mapping[str, float], precision: str, batches: Mapping[int, None]
) -> tuple[OutputEvidence, ...]:
    """onnxruntime's outputs against the reference at each batch size."""
    import torch

    from reparam_export.exporters import onnx

    dtype = model.reference.dtype if precision.startswith("fp32") else DTYPES[precision]
    evidence: list[OutputEvidence] = []
    with onnx.Runner(path) as runner:

        def run_batch(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            found = runner.run({name: _numpy(tensor) for name, tensor in inputs.items()})
            return [torch.from_numpy(found[name]) for name in model.reference.outputs]

        for batch in batches:
            evidence += compare(f"onnx {precision}", run_batch, model.reference, batch, floors=floors, dtype=dtype)
    return tuple(evidence)


def to_engine(model: VerifiedModel, folder: Path, options: Options, source: Artifact) -> Artifact:
    """``model.engine`` from the proven ``model.onnx``; run where there is a GPU, else audited."""
    import torch

    from reparam_export.exporters import tensorrt
    from reparam_export.verification.engine import audit

    path = folder / "model.engine"
    axes = {a: int(n) for i in model.signature.inputs for a, n in (i.default or {}).items()}
    with _Scratch(folder) as scratch:
        made = scratch / path.name
        details = tensorrt.write(
            folder / source.path,
            made,
            batch=options.batch,
            axes=axes,
            log=folder / "engine.log",
            gpus=options.gpus or None,
            precision=options.precision,
        )
        ran = torch.cuda.is_available() and not details["ahead_of_time"]
        evidence = run_engine(made, model, source, options) if ran else ()
        _refuse(path.name, evidence, [])
        fused, adapters = audited(model, source)
        dtypes = ("float32",) if options.precision == "fp32" else ("float32", DTYPES[options.precision])
        found = audit(made, fused, adapters, dtypes=dtypes, precisions=details["precisions"])
        if found.adapter_tensors_found:
            names = ", ".join(found.adapter_tensors_found[:3])
            raise EquivalenceError(f"{path.name}: holds adapter tensors ({names}); it was not fused and was not kept")
        made.replace(path)
    whole = len(found.bitwise) + len(found.merged)
    inside = f"{whole} of {found.fused_tensors} fused tensors stand in it bit for bit, no adapter tensor does"
    run = f"run on this GPU against the reference: {worst_of(evidence)}" if ran else "not run: no GPU here to run it on"
    return Artifact(
        target="trt",
        path=path.name,
        precision=options.precision,
        size=path.stat().st_size,
        sha256=exported_sha256(path),
        weights_sha256=model.certificate.weights_sha256,
        ran=ran,
        note=f"built from {source.path} by {details['builder']}; audited: {inside}; {run}",
        outputs=evidence,
        audit=found,
        kept_fp32=source.kept_fp32,
        details=details,
    )


def worst_of(evidence: Sequence[OutputEvidence]) -> str:
    """The largest error in units of its bound, in words."""
    if all(o.vacuous for o in evidence):
        return "its outputs prove nothing of the adapter, as those of the fused model"
    worst = max(evidence, key=lambda o: o.error / o.bound if o.bound else 0.0)
    return f"error {worst.error:.1e}, bound {worst.bound:.1e}"


def run_engine(path: Path, model: VerifiedModel, source: Artifact, options: Options) -> tuple[OutputEvidence, ...]:
    """The engine's outputs on this machine's GPU at the corners of its profile."""
    import torch

    from reparam_export.exporters import tensorrt

    floors = {o.output: o.floor for o in source.outputs}
    evidence: list[OutputEvidence] = []
    with tensorrt.Runner(path) as runner:

        def run_batch(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            found = runner.run({name: _numpy(tensor) for name, tensor in inputs.items()})
            return [torch.from_numpy(found[name]) for name in model.reference.outputs]

        for batch in dict.fromkeys(options.batch):
            evidence += compare(f"engine {options.precision}", run_batch, model.reference, batch, floors=floors)
    return tuple(evidence)


def audited(model: VerifiedModel, source: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """The changed tensors that the exported graph reads, which the engine should hold, and the adapters', which it must not."""
    from reparam_export.affine import tensors_of

    unread = set(source.details["unused"])
    fused = {name: _numpy(model.weights[name].float()) for name in model.weights.changed if name not in unread}
    adapters = {
        f"{a.module}:{name}": _numpy(tensor.float())
        for a in model.checkpoint.adapters
        for name, tensor in tensors_of(a.params).items()
    }
    return fused, adapters


def summary(path: Path) -> dict[str, Any]:
    """Opset, node and initializer counts of an ONNX file, and the device it is run on."""
    import onnx
    import torch

    content = onnx.load(str(path), load_external_data=False)
    metadata = {entry.key: entry.value for entry in content.metadata_props}
    return {
        "unused": json.loads(metadata["unused"]),  # tensors of the model that its forward never reads
        "opset": {o.domain or "ai.onnx": o.version for o in content.opset_import},
        "nodes": len(content.graph.node),
        "initializers": len(content.graph.initializer),
        "device": "GPU" if torch.cuda.is_available() else "CPU",
    }


class _Scratch:
    """A folder for files in the making beside the results; it goes away whatever happens."""

    def __init__(self, folder: Path) -> None:
        import tempfile

        self._temporary = tempfile.TemporaryDirectory(prefix=".export-", dir=folder)

    def __enter__(self) -> Path:
        return Path(self._temporary.name)

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()


def _refuse(name: str, evidence: Sequence[OutputEvidence], differences: Sequence[str]) -> None:
    bad = next((o for o in evidence if not o.passed), None)
    if bad is not None:
        raise EquivalenceError(
            f"{name}: output {bad.output} of {bad.model} at batch {bad.batch} is off by {bad.error:.3g}, bound {bad.bound:.3g} "
            f"(noise floor {bad.floor:.3g}); the file was not kept",
            evidence=[asdict(o) for o in evidence],
        )
    if differences:
        raise EquivalenceError(
            f"{name}: the exported graph differs from the base's: {differences[0]}; the file was not kept"
        )


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = tensor.detach().contiguous().numpy()
    return result
