"""What TensorRT makes of base, adapted and fused, side by side; and the engines that are timed where there is a GPU.

Without a GPU no plan can be opened, so what is compared there is the network that the builder was given, layer by type, and
the size of the plan that it made of it. With one, the inspector of the built engines is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.exporters import tensorrt
from reparam_export.latency.contenders import Lineup, exported

if TYPE_CHECKING:
    from reparam_export.models import Signature
    from reparam_export.verification import VerifiedModel


@dataclass(frozen=True)
class Engines:
    """``paths`` by model, of those that can run here; ``facts``: a row a model: layers by type, plan bytes, the source of it.

    ``sha256``: of the folder's own engine.
    """

    paths: dict[str, Path]
    facts: tuple[dict[str, Any], ...]
    builder: str | None
    sha256: str


def built(folder: Path, lineup: Lineup, model: VerifiedModel, scratch: Path) -> Engines | None:
    """Engines like the folder's own, which is the fused one, of the other models; None when the folder has none.

    The control is a second build of the base where it can be run: a builder chooses kernels anew each time.
    Raises MissingBackendError, ExportError, and CheckpointError when the folder's engine has changed.
    """
    entry = exported(folder, model.certificate.weights_sha256, "trt")
    if entry is None:
        return None
    details = entry["details"]
    paths, facts = {}, []
    for name, file in lineup.files.items():
        log, made = scratch / "engine.log", details
        if name == lineup.contest.control and details["ahead_of_time"]:
            continue
        paths[name] = folder / entry["path"]
        if name != lineup.contest.subject:
            paths[name] = scratch / f"{name.replace(' ', '-')}.engine"
            made = tensorrt.write(
                file, paths[name], log=log, precision=lineup.precision, **_options(details, model.signature)
            )
        layers, source = _layers(paths[name], file, log, made)
        facts.append({"model": name, "layers": layers, "plan_bytes": made["size"], "source": source})
    return Engines(paths if not details["ahead_of_time"] else {}, tuple(facts), details["builder"], entry["sha256"])


def _options(details: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    """What ``tensorrt.write`` was told when it built the folder's engine."""
    smallest, usual, largest = (int(shape[0]) for shape in next(iter(details["profile"].values())))
    return {
        "gpus": tuple(details["gpus"]) if details["ahead_of_time"] else None,
        "batch": (smallest, usual, largest),
        "axes": {axis: int(size) for given in signature.inputs for axis, size in (given.default or {}).items()},
    }


def _layers(engine: Path, file: Path, log: Path, made: Mapping[str, Any]) -> tuple[dict[str, int], str]:
    """Layers by type, and whether the engine's inspector or the network it was built from says so."""
    import torch

    builder = f"{made['builder']} {made['version']}"
    if torch.cuda.is_available() and not made["ahead_of_time"]:
        with tensorrt.Runner(engine, builder=made["builder"]) as runner:
            types = Counter(str(layer.get("LayerType", "layer")) for layer in runner.layers())
            return dict(sorted(types.items())), f"inspector of {builder}"
    return tensorrt.layers(file, log), f"network as parsed by {builder}; its engine cannot be opened without a GPU"
