"""What a proof consists of: verdicts, and the numbers behind them. Everything here is written to ``verification.json``.

``exact``    every stored entry is the exact value rounded once to the storage format
``rounded``  every stored entry is within the rounding bound of the exact value
``wrong``    some entry is not; the evidence names it
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from reparam_export.errors import CheckpointError

Verdict = Literal["exact", "rounded", "wrong"]


@dataclass(frozen=True)
class LayerEvidence:
    """The weight proof of one touched module. Errors are absolute, in the units of the weights.

    ``bound_ratio`` is the worst error divided by the bound of that entry (of that row's output, when probed): <= 1 passes.
    """

    module: str
    kind: str
    tensors: tuple[str, ...]
    shape: tuple[int, int]  # (out, in) of the matrix
    dtype: str
    method: Literal["exhaustive", "probes"]
    entries: int
    exact_entries: int  # bit for bit the rounded exact value (exhaustive only)
    max_error: float
    bound_ratio: float
    survival: float  # share of the adapter's change that the storage dtype keeps, 1.0 = all of it
    verdict: Verdict
    probes: int = 0
    detectable: float = 0.0  # a row whose relative error is above this is missed with chance <= 1e-6
    worst: dict[str, Any] | None = None  # tensor, index, expected, found of the worst entry
    change: float = 0.0  # |exact - base|^2, the weight of this layer's survival among the others'

    @property
    def passed(self) -> bool:
        return self.verdict != "wrong"


@dataclass(frozen=True)
class CarriedEvidence:
    """Tensors that no adapter touches: each must equal the base's (or the checkpoint's, where it replaces one), rounded once."""

    compared: int
    equal: int
    replaced: tuple[str, ...]  # taken from the checkpoint, such as a classifier head
    different: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.different


@dataclass(frozen=True)
class OutputEvidence:
    """One output of one model at one batch size against the unfused adapted model in float64. Errors are max |a - b|."""

    model: str  # "fused", "onnx fp32", ...
    output: str
    batch: int
    samples: int
    dtype: str
    magnitude: float  # max |reference|
    error: float
    floor: float  # error of the unfused model in the same precision on the same road
    bound: float
    agree: float | None = (
        None  # share of predictions (argmax of the last axis) that are the same, where it is a class axis
    )
    differing: int = 0  # predictions that are not
    margin: float | None = None  # of those: how far apart the two classes are in the reference, at most
    passed: bool = False
    moved: float | None = None  # max |reference - plain base|: what the adapter does to this output; None: not measured

    @property
    def vacuous(self) -> bool:
        """Would the plain base pass as well? Then this output tells nothing of the adapter, which does not reach it on these samples."""
        return self.passed and self.moved is not None and self.moved <= self.bound


@dataclass(frozen=True)
class GraphEvidence:
    """The fused graph against the base's: operators, attributes, edges and shapes."""

    nodes_base: int
    nodes_fused: int
    operators: dict[str, int]
    differences: tuple[str, ...]  # first differences found, empty when identical
    added: tuple[str, ...]  # what folding had to add, such as a bias on a bias-free layer
    parameters_base: int
    parameters_fused: int
    bytes_base: int
    bytes_fused: int
    macs_base: int | None = None  # multiply-adds at batch 1
    macs_fused: int | None = None

    @property
    def passed(self) -> bool:
        return not self.differences


@dataclass(frozen=True)
class WitnessEvidence:
    """A second reading of the adapter, by somebody else's code, held against ours. Errors are relative, see ``verification/witness``.

    ``who`` is empty, and ``absent`` says why and what to do, where there is none.
    """

    who: str = ""
    version: str = ""
    settings: int = 0  # layers whose settings were compared, without their numbers
    layers: int = 0  # layers compared in numbers, on the same inputs in float64
    of_layers: int = 0
    seed: int | None = None  # of those inputs; and of the choice, where layers < of_layers
    error: float = 0.0  # of a layer's answers, relative to what the adapter does there
    bound: float = 0.0
    outputs: int = 0  # outputs of the whole model that were compared
    output_error: float = 0.0  # relative to the largest answer
    output_bound: float = 0.0
    differences: tuple[str, ...] = ()  # what is read in two ways: module, setting, ours and theirs
    absent: str = ""
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.differences


UNWITNESSED = WitnessEvidence(absent="written before there were witnesses; run verify again")


@dataclass(frozen=True)
class Certificate:
    """All of the evidence, tied to the weights by their sha256."""

    weights_sha256: str
    checkpoint: dict[str, Any]
    base: dict[str, Any]
    storage: dict[str, int]  # dtype -> number of tensors
    layers: tuple[LayerEvidence, ...]
    carried: CarriedEvidence
    outputs: tuple[OutputEvidence, ...]
    graph: GraphEvidence
    survival: float  # of all layers together
    seed: int
    samples: dict[str, Any]  # {"source": "random" | file, "count": n}
    unexercised: tuple[str, ...]  # touched modules that no output depends on: proven by their weights alone
    versions: dict[str, str]
    witness: tuple[WitnessEvidence, ...] = (UNWITNESSED,)

    @property
    def verdict(self) -> Verdict:
        parts: tuple[Any, ...] = (*self.layers, self.carried, *self.outputs, self.graph, *self.witness)
        if not all(part.passed for part in parts):
            return "wrong"
        return "exact" if all(layer.verdict == "exact" for layer in self.layers) else "rounded"

    @property
    def vacuous(self) -> tuple[str, ...]:
        """Outputs that prove nothing, since the plain base would pass as well."""
        names = dict.fromkeys(o.output for o in self.outputs)
        return tuple(name for name in names if all(o.vacuous for o in self.outputs if o.output == name))

    @property
    def outputs_prove(self) -> bool:
        """Does any output tell the adapted model from the plain base? Where none does, the weights alone are proven."""
        return not self.outputs or len(self.vacuous) < len({o.output for o in self.outputs})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; what ``verification.json`` holds."""
        proven = {"outputs_prove": self.outputs_prove, "vacuous": list(self.vacuous)}
        return {"verdict": self.verdict, **proven, **asdict(self)}


def from_json(content: dict[str, Any]) -> Certificate:
    """The certificate in ``verification.json``. Raises CheckpointError when it is damaged."""
    try:
        content = {"witness": [asdict(UNWITNESSED)], **content}
        given = {f.name: content[f.name] for f in fields(Certificate)}
        given["layers"] = tuple(_build(LayerEvidence, entry) for entry in content["layers"])
        given["outputs"] = tuple(_build(OutputEvidence, entry) for entry in content["outputs"])
        given["witness"] = tuple(_build(WitnessEvidence, entry) for entry in content["witness"])
        given["unexercised"] = tuple(content["unexercised"])
        given["carried"] = _build(CarriedEvidence, content["carried"])
        given["graph"] = _build(GraphEvidence, content["graph"])
        return Certificate(**given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"verification.json: damaged ({error!r}); run verify again") from error


def from_entry(entry: dict[str, Any]) -> LayerEvidence:
    """The evidence of one layer from its JSON. Raises CheckpointError when it is damaged."""
    try:
        return LayerEvidence(**_values(entry))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the proof of a layer is damaged ({error!r}); run fuse again") from error


def witness_from_json(entry: dict[str, Any]) -> WitnessEvidence:
    """One witness from its JSON. Raises CheckpointError when it is damaged."""
    try:
        return WitnessEvidence(**_values(entry))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"what the second witness said is damaged ({error!r}); run fuse again") from error


def _build(target: Any, entry: dict[str, Any]) -> Any:
    return target(**_values(entry))


def _values(entry: dict[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass from JSON: lists become tuples, and numbers that JSON cannot hold come back from strings."""
    numbers = {"inf", "-inf", "nan"}
    values = {k: float(v) if isinstance(v, str) and v in numbers else v for k, v in entry.items()}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
