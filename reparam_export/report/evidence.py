"""What one output folder holds, read from its JSON files and checked for shape, nothing computed.

Names and paths come from a checkpoint somebody else made: control characters, lone surrogates and invisible marks are
made visible here, once, so that no page, table or XML file has to cope with them.
"""

from __future__ import annotations

import json
import math
import shlex
import unicodedata
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from reparam_export.analysis import BranchAnalysis
from reparam_export.errors import CheckpointError
from reparam_export.exporters.artifact import Artifact
from reparam_export.files import exported_sha256
from reparam_export.latency.measurement import Measurement
from reparam_export.latency.measurement import from_json as measurement_from_json
from reparam_export.report.measured import Measured, measured
from reparam_export.verification.certificate import (
    CarriedEvidence,
    Certificate,
    GraphEvidence,
    LayerEvidence,
    OutputEvidence,
    Verdict,
    WitnessEvidence,
)

T = TypeVar("T")
REMEDIES = {  # FOLDER stands for the folder
    "fused.json": "`reparam-export fuse` into that folder",
    "verification.json": "`reparam-export verify FOLDER`",
    "artifact.json": "`reparam-export export FOLDER`",
    "latency.json": "`reparam-export bench FOLDER`",
    "analysis.json": "`reparam-export inspect CHECKPOINT --analyse -o FOLDER`",
}
UNPRINTABLE = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}  # controls, invisible marks, surrogates, non-characters, line ends
FUSED_KEYS = {"checkpoint": dict, "base": dict, "storage": dict, "changed": dict, "created": list, "narrowed": list}


@dataclass(frozen=True)
class Exported:
    """One artefact as it was written down. ``audit`` stays a mapping: its keys belong to the audit of that target."""

    artifact: Artifact
    audit: dict[str, Any] | None
    stale: str  # why it is not what was proven: other weights, another file; "" when it is

    @property
    def tensors_found(self) -> tuple[str, ...]:
        """Adapter tensors that are still inside; there must be none."""
        return tuple(map(str, (self.audit or {}).get("adapter_tensors_found") or ()))

    @property
    def passed(self) -> bool:
        clean = not (self.stale or self.tensors_found or self.artifact.failure)
        return clean and all(output.passed for output in self.artifact.outputs)


@dataclass(frozen=True)
class Evidence:
    """Everything a report may show. ``certificate`` is missing when nothing proves these weights: ``why_unproven``.

    ``written``: the proof of each layer that was made while streaming wrote it; it says nothing of outputs and graph.
    """

    folder: Path
    fused: dict[str, Any]
    certificate: Certificate | None
    stated: str  # the verdict written in verification.json
    why_unproven: str
    exported: tuple[Exported, ...]
    analysis: tuple[BranchAnalysis, ...] = ()  # where it was asked for
    written: tuple[LayerEvidence, ...] = ()
    latency: Measured | None = None
    witness_of_weights: tuple[WitnessEvidence, ...] = ()  # of weights that were proven while they were written

    @property
    def outputs(self) -> tuple[OutputEvidence, ...]:
        """Of the fused model first, then of every artefact."""
        own = self.certificate.outputs if self.certificate else ()
        return (*own, *(output for each in self.exported for output in each.artifact.outputs))


def read_evidence(folder: Path) -> Evidence:
    """Read the folder; a missing ``fused.json`` or a damaged file is a ``CheckpointError`` that says what to run."""
    fused = _load(folder, "fused.json")
    if fused is None:
        raise CheckpointError(
            f"{folder / 'fused.json'} is missing: {folder} holds no fused weights to report on. "
            f"Run `reparam-export fuse` into that folder first."
        )
    _check_fused(folder, fused)
    raw = _load(folder, "verification.json")
    certificate = _certificate(folder, raw) if raw is not None else None
    why = _why_unproven(fused, certificate)
    if not why and certificate is not None and certificate.verdict != "wrong":
        why = _changed(folder, fused)
    stated = str((raw or {}).get("verdict", ""))
    exported, latency = _exported(folder, fused["weights_sha256"]), _latency(folder)
    wrong = "verification.json says wrong" if certificate and "wrong" in (stated, certificate.verdict) else ""
    return Evidence(
        folder=folder,
        fused=fused,
        certificate=None if why else certificate,
        stated=stated,
        why_unproven=why,
        exported=exported,
        analysis=_analysis(folder, fused["checkpoint"].get("sha256")),
        written=_written(folder, fused),
        witness_of_weights=_witness(folder, "fused.json", fused),
        latency=measured(latency, folder, fused["weights_sha256"], why or wrong, exported) if latency else None,
    )


def float_from_json(value: object) -> float:
    """NaN and infinities arrive as JSON numbers, as strings or as null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"a number was expected, found {value!r}")
    return float(value)


def visible(value: Any) -> Any:
    """The same JSON value with every character that prints nothing, or reorders others, spelt out."""
    if isinstance(value, str):
        return "".join(_spell(char) if unicodedata.category(char) in UNPRINTABLE else char for char in value)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list) else value


def _spell(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _why_unproven(fused: dict[str, Any], certificate: Certificate | None) -> str:
    if certificate is None:
        return "verification.json is missing"
    if certificate.verdict != "wrong" and certificate.weights_sha256 != fused["weights_sha256"]:
        proven, here = certificate.weights_sha256[:12], fused["weights_sha256"][:12]
        return f"verification.json is about other weights (sha256 {proven}) than these ({here})"
    if fused["changed"] and not certificate.layers:
        return "verification.json holds no layer, although fusion changed tensors"
    return ""


def _changed(folder: Path, fused: dict[str, Any]) -> str:
    """What is no longer as it was proven: the weights themselves, against their digests. Weights that were taken away say nothing."""
    from reparam_export.folder import WEIGHTS
    from reparam_export.refuted import aside
    from reparam_export.streaming.audit import changed_since, weights_digest

    if aside(folder):
        return f"{aside(folder)[0].name} was set aside: it is not what was proven"
    try:
        if "weights" in fused and (folder / str(fused["weights"])).is_dir():
            found = changed_since(folder, fused)
            return f"{fused['weights']}: {found[0]}" if found else ""
        if (folder / WEIGHTS).is_file() and weights_digest(folder / WEIGHTS) != fused["weights_sha256"]:
            return f"{WEIGHTS} does not hold the weights that were proven"
    except CheckpointError as error:
        return str(error)
    return ""


def _load(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / name
    if not path.is_file():
        return None
    try:
        data = visible(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, name, str(error)) from error
    if not isinstance(data, dict):
        raise _damaged(folder, name, f"an object was expected, found {type(data).__name__}")
    return data


def _damaged(folder: Path, name: str, reason: str) -> CheckpointError:
    again = REMEDIES[name].replace("FOLDER", shlex.quote(str(folder)))
    return CheckpointError(f"{folder / name} is damaged: {reason}. Run {again} again.")


def _check_fused(folder: Path, fused: dict[str, Any]) -> None:
    if not isinstance(fused.get("weights_sha256"), str):
        raise _damaged(folder, "fused.json", "weights_sha256 is missing")
    for key, kind in FUSED_KEYS.items():
        if not isinstance(fused.setdefault(key, kind()), kind):
            raise _damaged(folder, "fused.json", f"{key} is not a {kind.__name__}")


def _certificate(folder: Path, raw: dict[str, Any]) -> Certificate:
    try:
        if raw.get("verdict") not in get_args(Verdict):
            raise ValueError(f"unknown verdict {raw.get('verdict')!r}")
        parts: dict[str, Any] = {
            "layers": tuple(_layer(each) for each in raw["layers"]),
            "carried": _typed(CarriedEvidence, raw["carried"]),
            "outputs": tuple(_output(each) for each in raw["outputs"]),
            "graph": _typed(GraphEvidence, raw["graph"]),
        }
        if "witness" in raw:
            parts["witness"] = tuple(_typed(WitnessEvidence, each) for each in raw["witness"])
        return _typed(Certificate, raw, parts)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, "verification.json", _reason(error)) from error


def _witness(folder: Path, name: str, raw: dict[str, Any]) -> tuple[WitnessEvidence, ...]:
    try:
        return tuple(_typed(WitnessEvidence, each) for each in raw.get("witness") or ())
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, name, _reason(error)) from error


def _written(folder: Path, fused: dict[str, Any]) -> tuple[LayerEvidence, ...]:
    try:
        return tuple(_layer(each) for each in fused.get("layers") or ())
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, "fused.json", _reason(error)) from error


def _exported(folder: Path, weights_sha256: str) -> tuple[Exported, ...]:
    raw = _load(folder, "artifact.json")
    if raw is None:
        return ()
    try:
        return tuple(_one_exported(folder, each, weights_sha256) for each in raw["artifacts"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, "artifact.json", _reason(error)) from error


def _latency(folder: Path) -> Measurement | None:
    raw = _load(folder, "latency.json")
    try:
        return None if raw is None else measurement_from_json(raw)
    except ValueError as error:
        raise _damaged(folder, "latency.json", str(error)) from error


def _one_exported(folder: Path, raw: dict[str, Any], weights_sha256: str) -> Exported:
    outputs = tuple(_output(each) for each in raw.get("outputs", ()))
    kept = tuple((str(name), str(reason)) for name, reason in raw.get("kept_fp32", ()))
    artifact = _typed(Artifact, raw, {"outputs": outputs, "audit": None, "kept_fp32": kept})
    audit = raw.get("audit")
    if audit is not None and not isinstance(audit, dict):
        raise ValueError("audit is not an object")
    stale = ""
    if artifact.weights_sha256 != weights_sha256:
        stale = f"was made from other weights (sha256 {artifact.weights_sha256[:12]}) than those in this folder"
    elif (
        artifact.path
        and (folder / artifact.path).exists()
        and exported_sha256(folder / artifact.path) != artifact.sha256
    ):
        stale = "is not the file that was exported and compared"
    return Exported(artifact=artifact, audit=audit, stale=stale)


def _analysis(folder: Path, checkpoint_sha256: object) -> tuple[BranchAnalysis, ...]:
    """The branch analysis, if it is of the checkpoint that these weights came from."""
    raw = _load(folder, "analysis.json")
    if raw is None or raw.get("checkpoint_sha256") != checkpoint_sha256:
        return ()
    try:
        return tuple(_typed(BranchAnalysis, each) for each in raw["branches"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, "analysis.json", _reason(error)) from error


def _layer(raw: dict[str, Any]) -> LayerEvidence:
    layer = _typed(LayerEvidence, raw)
    if layer.verdict not in get_args(Verdict):
        raise ValueError(f"unknown verdict {layer.verdict!r} of {layer.module}")
    return layer if math.isfinite(layer.max_error) else replace(layer, verdict="wrong")  # a NaN never passes


def _output(raw: dict[str, Any]) -> OutputEvidence:
    output = _typed(OutputEvidence, raw)
    return replace(output, passed=output.passed and math.isfinite(output.error))


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _typed(cls: type[T], raw: dict[str, Any], built: dict[str, Any] | None = None) -> T:
    """The dataclass from a JSON object. Keys it does not know are left for a later version of this package."""
    if not isinstance(raw, dict):
        raise ValueError(f"{cls.__name__}: an object was expected, found {type(raw).__name__}")
    values = dict(built or {})
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            continue
        if field.name in raw:
            values[field.name] = _converted(f"{cls.__name__}.{field.name}", str(field.type), raw[field.name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise KeyError(field.name)
    return cls(**values)


def _converted(where: str, annotation: str, value: Any) -> Any:
    if value is None and annotation.endswith("| None"):
        return None
    if annotation.startswith("float"):
        return float_from_json(value)
    expected: Any = {"tuple": list, "dict": dict, "bool": bool, "int": int, "str": str}.get(_head(annotation), str)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{where} should be {annotation}, found {value!r:.80}")
    if expected is not list:
        return value
    item_type = int if "int" in annotation else str
    wrong = [item for item in value if not isinstance(item, item_type)]
    if wrong:
        raise ValueError(f"{where} should be {annotation}, found {wrong[0]!r:.80}")
    return tuple(value)


def _head(annotation: str) -> str:
    return annotation.split("[")[0].split(" ")[0]
