"""Who is timed: the base with the checkpoint's own head, the same once more, the unfused model, and the fused one.

All are written by the exporter that wrote the artefact, in its precision and opset; the fused one is the artefact itself
where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.assembly import fused, opened
from reparam_export.errors import CheckpointError, ExportError, FusionError
from reparam_export.exporters import Options, lower, write_fp32
from reparam_export.exporters._differences import functions_of, loaded
from reparam_export.exporters.onnx import differences
from reparam_export.files import exported_sha256, read_json
from reparam_export.folder import ARTIFACTS
from reparam_export.fusion import DTYPES
from reparam_export.latency.measurement import Contest, Size, Structure
from reparam_export.latency.rounds import Models
from reparam_export.latency.unfused import recomputes, unfused
from reparam_export.verification import untied
from reparam_export.verification.graph import multiply_adds, parameters, stored_bytes

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from reparam_export.checkpoints import Checkpoint
    from reparam_export.exporters._differences import Operator
    from reparam_export.fusion import FusedWeights
    from reparam_export.latency.engines import Engines
    from reparam_export.verification import VerifiedModel

AGAIN = "base again"
SHOWN = 12  # differences kept


@dataclass(frozen=True)
class Lineup:
    """Everything a run needs. ``files`` are ONNX files by model; ``modules`` say how a torch runner gets its own."""

    contest: Contest
    files: dict[str, Path]
    modules: dict[str, tuple[str, str]]
    precision: str
    structure: Structure
    notes: tuple[str, ...]
    artifact_sha256: str  # of the exported file, "" when the fused model had to be written for this
    code: str | None  # the ``py:`` base of the modules, which whoever asked for this named

    def models(self, inputs: Path, engines: Engines | None) -> Models:
        """The same for the timing processes."""
        paths, builder = (engines.paths, engines.builder) if engines else ({}, None)
        dtype = DTYPES[self.precision]
        return Models(self.contest, inputs, self.files, self.modules, paths, dtype, builder, self.code)


def lineup(folder: Path, model: VerifiedModel, precision: str | None, scratch: Path) -> Lineup:
    """Write what is not there yet into ``scratch``. ``precision``: None takes that of the artefact, fp32 without one.

    Raises CheckpointError when the artefact is not the file that was exported from these weights.
    """
    artifact = exported(folder, model.certificate.weights_sha256, "onnx")
    chosen = precision or (artifact["precision"] if artifact else "fp32")
    shipped = folder / artifact["path"] if artifact and artifact["precision"] == chosen else None
    opset = artifact["details"].get("opset", {}).get("ai.onnx") if artifact else None
    options = Options(precision=chosen, opset=opset)
    notes = _notes(model, chosen)
    files: dict[str, Path] = {}
    sizes = []
    for which in ("base", "adapted", "fused"):
        try:
            module = module_of(model.checkpoint, model.weights, which)
            stored = parameters(module), stored_bytes(module)  # before it is made fp32 to be written
            given = which == "fused" and shipped
            files[which] = given or _written(module, model, scratch / which, options)
        except (FusionError, ExportError) as error:
            if which != "adapted":
                raise
            notes.append(f"the unfused model is not timed: {error}")
            continue
        sizes.append(Size(which, *file_facts(files[which]), *stored, _multiply_adds(module, model)))
    added = (*model.weights.created, *untied(opened(model.checkpoint)[0], model.weights))
    structure = Structure(tuple(sizes), tuple(differences(files["base"], files["fused"])[:SHOWN]), added)
    others = tuple(which for which in files if which == "adapted")
    contest = Contest("base", AGAIN, "fused", others)
    of = {which: "base" if which == AGAIN else which for which in contest.models}
    return Lineup(
        contest,
        {which: files[of[which]] for which in contest.models},
        {which: (str(folder.resolve()), of[which]) for which in contest.models},
        chosen,
        structure,
        tuple(notes),
        artifact["sha256"] if artifact and shipped else "",
        model.checkpoint.recipe.base,
    )


def exported(folder: Path, weights_sha256: str, target: str) -> dict[str, Any] | None:
    """The entry of that target in ``artifact.json``, None when there is none of these weights.

    Raises CheckpointError when the file is no longer the one that was exported.
    """
    path = folder / ARTIFACTS
    entries = read_json(path).get("artifacts", []) if path.is_file() else []
    for entry in entries:
        if entry.get("target") == target and not entry.get("failure") and entry.get("weights_sha256") == weights_sha256:
            file = folder / entry["path"]
            if not file.is_file() or exported_sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{file}: missing or changed since it was exported; run export again")
            found: dict[str, Any] = entry
            return found
    return None


def module_of(checkpoint: Checkpoint, weights: FusedWeights, which: str) -> nn.Module:
    """The "base", "adapted" or "fused" module, in its storage dtypes. Raises FusionError for one that nobody could ship."""
    module, _, checkpoint = opened(checkpoint)
    if which == "adapted":
        return unfused(module, checkpoint.adapters)
    return fused(module, weights.tensors) if which == "fused" else module


def _written(module: nn.Module, model: VerifiedModel, place: Path, options: Options) -> Path:
    """The module as an ONNX file in the precision of the options."""
    path = place / "model.onnx"
    place.mkdir(parents=True)
    write_fp32(module, model, path, options)
    if options.precision == "fp32":
        return path
    lowered = place / "lowered" / "model.onnx"
    lowered.parent.mkdir()
    lower(path, lowered, model.reference, options)
    return lowered


def _multiply_adds(module: nn.Module, model: VerifiedModel) -> int:
    example = tuple(model.reference.inputs[i.name][:1] for i in model.signature.inputs)
    return multiply_adds(module.float(), model.signature, example)


def file_facts(file: Path) -> tuple[int, dict[str, int], int, int]:
    """Nodes, operators by type, initializers and bytes (external data included) of an ONNX file. Raises ExportError.

    Nodes are those that a runtime is given to run: a call of a local function counts as the nodes of the function's body, at
    every call, and not as one itself; an If, a Loop or a Scan counts as itself and every node of its subgraphs once.
    Initializers are those of the graph, of all subgraphs and of the functions' subgraphs.
    """
    model = loaded(file)
    try:
        operators = _operators(model.graph, functions_of(model), {})
    except RecursionError as error:
        raise ExportError(f"{file}: is not ONNX: {error}") from error
    graphs = [*model.graphs(), *(graph for f in model.functions.values() for graph in f.subgraphs())]
    size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))
    return operators.total(), dict(sorted(operators.items())), sum(len(g.initializers) for g in graphs), size


def _operators(
    body: ir.Graph | ir.Function,
    functions: Mapping[Operator, ir.Function],
    known: dict[Operator, Counter[str] | None],
) -> Counter[str]:
    """How often each operator stands in a graph, functions put in place of their calls. ``known``: functions counted so far.

    Raises RecursionError for a function that calls itself, which ONNX does not allow.
    """
    from onnx_ir.traversal import RecursiveGraphIterator

    found: Counter[str] = Counter()
    for node in RecursiveGraphIterator(body):
        called = node.op_identifier()
        if called not in functions:
            found[node.op_type] += 1
            continue
        if called not in known:
            known[called] = None  # until it is counted
            known[called] = _operators(functions[called], functions, known)
        inside = known[called]
        if inside is None:
            raise RecursionError(f"local function {node.op_type!r} calls itself")
        found += inside
    return found


def _notes(model: VerifiedModel, precision: str) -> list[str]:
    """What a reader must know to read the numbers right."""
    import torch

    from reparam_export.adapters import kind

    notes = [
        f"unfused, {name} makes its whole weight anew at every call, as its authors' code does; in an ONNX file that is "
        "arithmetic on constants, which onnxruntime folds while it loads the file"
        for name in sorted({a.kind for a in model.checkpoint.adapters if recomputes(kind(a.kind))})
    ]
    if precision != "fp32" and not torch.cuda.is_available():
        notes.append(
            f"a CPU has little {precision} arithmetic: these times are of its emulation and say nothing of a GPU"
        )
    return notes


def saved_inputs(model: VerifiedModel, largest: int, path: Path) -> Path:
    """The samples of the proof, as many as a batch needs, for the timing processes."""
    import numpy as np

    arrays: Mapping[str, Any] = {n: t[:largest].numpy() for n, t in model.reference.inputs.items()}
    with path.open("wb") as stream:
        np.savez(stream, **arrays)
    return path
