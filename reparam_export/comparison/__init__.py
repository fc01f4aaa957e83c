"""Two results against each other: what changed in weights, outputs, graph and latency.

A side is an output folder, an ONNX file or a TensorRT engine. ``compare`` measures; whether a change is good is the reader's to
say, but for latency, where the same test as in ``bench`` says whether B costs more than A.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.comparison.sides import Side, answers, refused, samples_for, side
from reparam_export.errors import UsageError
from reparam_export.files import read_json, sha256
from reparam_export.latency import BATCHES, check, measurement
from reparam_export.latency.measurement import Contest, Measurement
from reparam_export.latency.rounds import Models, Progress, Settings
from reparam_export.latency.runners import runner

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

TEXT = "OSU"  # numpy's kinds of arrays of strings, which have no differences


@dataclass(frozen=True)
class TensorChange:
    """One tensor that is not the same on both sides. ``a`` and ``b``: shape and dtype, "" where it is missing."""

    name: str
    a: str
    b: str
    entries: int = 0  # that differ, where both have the same shape
    share: float = 0.0  # of all of its entries
    largest: float = 0.0  # max |b - a|
    relative: float = 0.0  # |b - a| / |a|, Frobenius norms


@dataclass(frozen=True)
class OutputChange:
    """One output on the same inputs. ``a`` and ``b``: shape and dtype, "" on a side that does not have it.

    ``largest``: max |b - a|, None where that cannot be said: one side has no such output, or one of another shape.
    ``magnitude``: max |a|, or max |b| where only B has it. ``agree``: share of samples with the same argmax.
    """

    output: str
    samples: int
    magnitude: float
    largest: float | None
    agree: float | None
    a: str
    b: str


@dataclass(frozen=True)
class Comparison:
    """What changed from ``a`` to ``b``. ``notes``: what could not be compared here, and why."""

    a: str
    b: str
    tensors: int
    weights: tuple[TensorChange, ...]
    outputs: tuple[OutputChange, ...]
    graph: tuple[str, ...]
    nodes: tuple[int, int] | None
    latency: Measurement | None
    notes: tuple[str, ...]

    @property
    def changed(self) -> dict[str, bool]:
        """For every part that was compared: is anything different? Latency: does B cost more than A?"""
        found = {"weights": bool(self.weights)} if self.tensors else {}
        if self.outputs:
            found["outputs"] = any(o.largest != 0 for o in self.outputs)  # None and NaN are changes too
        if self.nodes:
            found["graph"] = bool(self.graph)
        if self.latency:
            found["latency"] = self.latency.verdict == "added cost"
        return found


def compare(
    a: str | Path,
    b: str | Path,
    *,
    inputs: Path | None = None,
    batches: Sequence[int] = BATCHES,
    runners: Sequence[str] = (),
    settings: Settings | None = None,
    latency: bool = True,
    progress: Progress | None = None,
    base: str | None = None,
) -> Comparison:
    """Compare two output folders, ONNX files or engines.

    inputs: .npz by input name, or .npy of the one input; None: the samples of A's proof, else random ones. latency: measure it too;
    batches, runners, settings, progress and base are those of ``bench``. Raises UsageError for what is neither, ExportError when a file
    cannot be read.
    """
    from reparam_export.exporters.onnx import differences
    from reparam_export.latency.contenders import file_facts

    left, right = side(Path(a)), side(Path(b))
    notes: list[str] = []
    tensors, weights = _weights(left, right, notes)
    graph: tuple[str, ...] = ()
    outputs: tuple[OutputChange, ...] = ()
    nodes = measured = None
    if left.onnx and right.onnx:
        graph, nodes = tuple(differences(left.onnx, right.onnx)), (file_facts(left.onnx)[0], file_facts(right.onnx)[0])
    engines = _engines(left, right, notes)
    if engines or (left.onnx and right.onnx):
        samples = samples_for(left, inputs)
        outputs = _outputs(left, right, samples, notes, engines=engines)
        if latency and outputs:
            modules = _modules(left, right, base, notes)
            measured = _latency(
                (left, right), samples, batches, runners, settings=settings or Settings(), progress=progress,
                modules=modules, code=base,
            )  # fmt: skip
    else:
        notes.append("outputs and latency need an ONNX file on both sides, or a GPU for two engines")
    return Comparison(str(a), str(b), tensors, weights, outputs, graph, nodes, measured, tuple(notes))


def _weights(left: Side, right: Side, notes: list[str]) -> tuple[int, tuple[TensorChange, ...]]:
    """How many tensors there are, and those that differ, the most changed first."""
    if left.tensors is None or right.tensors is None:
        notes.append("weights: an engine's tensors have no names; compare the folders or the ONNX files")
        return 0, ()
    if left.folder != right.folder:
        files = [s.onnx for s in (left, right)]
        if files[0] is None or files[1] is None:
            notes.append("weights: one side is an ONNX file and the other has none; run export --to onnx")
            return 0, ()
        left, right = side(files[0]), side(files[1])
    assert left.tensors is not None
    assert right.tensors is not None
    others = dict(right.tensors())
    found, count = [], len(others)
    for name, array in left.tensors():
        other = others.pop(name, None)
        count += other is None
        change = _change(name, array, other)
        found += [change] if change else []
    found += [TensorChange(name, "", _kind(array)) for name, array in others.items()]
    return count, tuple(sorted(found, key=lambda c: -c.relative))


def _change(name: str, a: Array, b: Array | None) -> TensorChange | None:
    import numpy as np

    if b is None:
        return TensorChange(name, _kind(a), "")
    if a.shape != b.shape:
        return TensorChange(name, _kind(a), _kind(b))
    if a.dtype.kind in TEXT or b.dtype.kind in TEXT:
        entries = int((a.astype(object) != b.astype(object)).sum())
        return TensorChange(name, _kind(a), _kind(b), entries, entries / a.size) if entries else None
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    differ = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    entries = int(differ.sum())
    if not entries and a.dtype == b.dtype:
        return None
    delta, size = np.linalg.norm(y - x), np.linalg.norm(x)
    largest = float(np.abs(y - x).max()) if x.size else 0.0
    relative = float(delta / size) if size else (float("inf") if entries else 0.0)
    return TensorChange(name, _kind(a), _kind(b), entries, entries / max(x.size, 1), largest, relative)


def _kind(array: Array) -> str:
    return f"{'x'.join(map(str, array.shape)) or 'scalar'} {array.dtype}"


def _outputs(
    left: Side, right: Side, samples: Mapping[str, Array], notes: list[str], *, engines: bool
) -> tuple[OutputChange, ...]:
    """Every output that either of them has, both on the same samples; none, and a note, where one of them does not take these."""
    for one in (left, right):
        why = refused(one, samples)
        if why:
            notes.append(f"outputs: {why}")
            return ()
    of_a, of_b = (answers(one, samples, engine=engines) for one in (left, right))
    return tuple(_output(name, of_a.get(name), of_b.get(name)) for name in dict.fromkeys((*of_a, *of_b)))


def _output(name: str, a: Array | None, b: Array | None) -> OutputChange:
    """One of the two may be missing."""
    import numpy as np

    there = a if a is not None else b
    assert there is not None
    samples, magnitude = len(np.atleast_1d(there)), _largest(there.astype(np.float64))
    kinds = ["" if array is None else _kind(array) for array in (a, b)]
    if a is None or b is None or a.shape != b.shape:
        return OutputChange(name, samples, magnitude, None, None, *kinds)
    x, y = a.astype(np.float64), b.astype(np.float64)
    classes = x.ndim >= 2 and x.shape[-1] > 1
    agree = float((x.argmax(-1) == y.argmax(-1)).mean()) if classes else None
    return OutputChange(name, samples, magnitude, _largest(y - x), agree, *kinds)


def _largest(array: Array) -> float:
    import numpy as np

    return float(np.abs(array).max(initial=0.0))


def _latency(
    both: tuple[Side, Side],
    samples: Mapping[str, Array],
    batches: Sequence[int],
    runners: Sequence[str],
    *,
    settings: Settings,
    progress: Progress | None,
    modules: dict[str, tuple[str, str]],
    code: str | None,
) -> Measurement:
    import numpy as np

    check(batches, runners, settings)
    contest = Contest("A", "A again", "B")
    sides = {"A": both[0], "A again": both[0], "B": both[1]}
    files = {m: s.onnx for m, s in sides.items() if s.onnx is not None}
    engines = {m: s.engine for m, s in sides.items() if s.engine is not None}
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs.npz"
        np.savez(inputs, **samples)  # type: ignore[arg-type]
        models = Models(contest, inputs, _of_all(files), modules, _of_all(engines), code=code)
        return measurement(models, batches, runners, settings, progress)


def _modules(left: Side, right: Side, base: str | None, notes: list[str]) -> dict[str, tuple[str, str]]:
    """What a torch runner builds from two folders; nothing, and a note, where they name code that the caller does not."""
    from reparam_export.folder import FUSED, check_code, recipe_of

    if not (left.folder and right.folder):
        return {}
    try:
        for each in (left, right):
            check_code(each.path, recipe_of(read_json(each.path / FUSED)), base)
    except UsageError as error:
        notes.append(f"torch is not timed: {error}")
        return {}
    places = {"A": left, "A again": left, "B": right}
    return {name: (str(each.path.resolve()), "fused") for name, each in places.items()}


def _of_all(files: dict[str, Path]) -> dict[str, Path]:
    """Nothing, unless all three have one."""
    return files if len(files) == 3 else {}


def _engines(left: Side, right: Side, notes: list[str]) -> bool:
    """Notes what two engines are to each other; can they be run here?"""
    from reparam_export.exporters.tensorrt import Runner

    if left.engine is None or right.engine is None:
        return False
    same = sha256(left.engine) == sha256(right.engine)
    sizes = left.engine.stat().st_size, right.engine.stat().st_size
    notes.append(
        "engines: the same bytes" if same else f"engines: {sizes[0]:,} against {sizes[1]:,} bytes, not the same"
    )
    why = runner("tensorrt").missing()
    if why:
        notes.append(f"engines: {why}")
        return False
    layers = []
    for engine in (left.engine, right.engine):
        with Runner(engine) as opened:
            layers.append(Counter(str(layer.get("LayerType", "layer")) for layer in opened.layers()))
    if layers[0] != layers[1]:
        notes.append(f"engines: layers {dict(layers[0])} against {dict(layers[1])}")
    return True
