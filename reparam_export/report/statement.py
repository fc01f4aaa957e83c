"""The one sentence on top, and one sentence for each thing that failed. Every view of the report says the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from reparam_export.report import latency, witness
from reparam_export.report.evidence import Evidence, Exported
from reparam_export.report.numbers import number, percent, plural, size
from reparam_export.verification.certificate import Certificate, GraphEvidence, LayerEvidence, OutputEvidence
from reparam_export.verification.survival import overall

LITTLE = 0.9  # below this share of the change kept, the reader is told
ReportVerdict = Literal["exact", "rounded", "wrong", "unproven"]


def verdict(evidence: Evidence) -> ReportVerdict:
    """Of weights, outputs, graph and every artefact together."""
    if evidence.certificate is None:
        return "unproven"
    if evidence.stated == "wrong" or evidence.certificate.verdict == "wrong":
        return "wrong"
    if any(not each.passed and not each.stale for each in evidence.exported):
        return "wrong"
    if any(each.stale for each in evidence.exported):
        return "unproven"
    return evidence.certificate.verdict


def headline(evidence: Evidence) -> str:
    """The verdict in one sentence, with the numbers that carry it."""
    said = verdict(evidence)
    certificate = evidence.certificate
    if said == "wrong":
        return f"Failed: {_first_failure(evidence)}"
    if certificate is None:
        return f"Not proven: {evidence.why_unproven}{_written_sentence(evidence)}"
    if said == "unproven":
        return f"Not proven: {_first_failure(evidence)}"
    parts = [
        _layers_sentence(certificate, evidence.fused.get("replaced")),
        _output_sentence(certificate),
        _idle_sentence(certificate),
        graph_sentence(certificate.graph),
        _dropped_sentence(certificate),
        _rebuilt_sentence(certificate),
        _kept_sentence(certificate),
        witness.sentence(certificate.witness),
    ]
    start = "Proven" if certificate.outputs_prove else "Proven by its weights alone"
    return f"{start}: {'; '.join(part for part in parts if part)}"


def _idle_sentence(certificate: Certificate) -> str:
    """Said on top when the outputs say nothing of some layers: a vision tower, where the inputs are text alone."""
    idle = certificate.unexercised
    if not idle or not certificate.outputs_prove:
        return ""
    which = f"{plural(len(idle), 'adapted layer')}, first {idle[0]}"
    return f"no output depends on {which}: proven by their weights alone, unless --input reaches them"


def _rebuilt_sentence(certificate: Certificate) -> str:
    """Of an adapter that is made from a decomposition of its base, on which machines do not agree."""
    rebuilt = certificate.checkpoint.get("rebuilt")
    return f"the model as this machine rebuilds it: {rebuilt} decomposes the base while loading" if rebuilt else ""


def _dropped_sentence(certificate: Certificate) -> str:
    """Said on top when the user left tensors of the checkpoint out: the model is the trained one without them."""
    dropped = certificate.checkpoint.get("dropped")
    if not isinstance(dropped, list) or not dropped:
        return ""
    return f"without {plural(len(dropped), 'tensor')} of the checkpoint, dropped by name, first {dropped[0]}"


def _kept_sentence(certificate: Certificate) -> str:
    """Said on top when the storage format loses much of the adapter: the fused model is exact, and less than what was trained."""
    kept = overall(certificate.layers)
    return f"but the storage format keeps only {percent(kept)} of the adapter's change" if kept < LITTLE else ""


def checkpoint_facts(evidence: Evidence) -> dict[str, object]:
    """What the record says of the checkpoint; those of a stack one by one, in the order they act."""
    facts = dict(evidence.fused["checkpoint"])
    stack = facts.pop("stack", None)
    members = [each for each in stack if isinstance(each, dict)] if isinstance(stack, list) else []
    for place, member in enumerate(members, 1):
        facts[f"{place} of the stack"] = (
            f"{member.get('path')} ({member.get('format')}), weight {member.get('weight')}, sha256 {member.get('sha256')}"
        )
    return facts


def _written_sentence(evidence: Evidence) -> str:
    """What is known all the same of weights that were proven while they were written."""
    layers = evidence.written
    if not layers or not all(layer.passed for layer in layers):
        return ""
    exact = sum(layer.verdict == "exact" for layer in layers)
    said = witness.sentence(evidence.witness_of_weights)
    return f"; its weights alone are, since they were written: {exact} of {plural(len(layers), 'layer')} exact; {said}"


def failures(evidence: Evidence) -> Iterator[str]:
    """What failed, the most telling first: layers, outputs, carried tensors, graph, artefacts."""
    certificate = evidence.certificate
    if certificate is not None:
        wrong = [layer for layer in certificate.layers if not layer.passed]
        yield from (f"layer {layer_failure(layer)}" for layer in wrong)
        yield from witness.failures(certificate.witness)
        yield from (output_failure(output) for output in certificate.outputs if not output.passed)
        if certificate.carried.different:
            yield carried_failure(certificate)
        if certificate.graph.differences:
            yield f"graph differs from the base: {certificate.graph.differences[0]}"
    for each in evidence.exported:
        yield from artifact_failures(each)
    yield from latency.failures(evidence)


def layer_failure(layer: LayerEvidence) -> str:
    """The layer, its error against its bound and the worst entry."""
    entry = worst_entry(layer)
    return f"{_layer_error(layer)}; worst entry {entry}" if entry else _layer_error(layer)


def worst_entry(layer: LayerEvidence) -> str:
    """``blocks.0.fc1.weight[3, 7]: expected 0.1, found 0.2``."""
    worst = layer.worst
    if not worst:
        return ""
    index = worst.get("index")
    place = "" if index is None else f"{index if isinstance(index, list) else [index]}"
    expected, found = _full(worst.get("expected")), _full(worst.get("found"))
    return f"{worst.get('tensor', '')}{place}: expected {expected}, found {found}"


def output_failure(output: OutputEvidence) -> str:
    """One output of one model, with its error, bound and noise floor."""
    return (
        f"output {output.output} of {output.model} at batch {output.batch}: error {number(output.error)}, "
        f"bound {number(output.bound)}, noise floor {number(output.floor)}"
    )


def vacuity(output: OutputEvidence) -> str:
    """Why an output that passed proves nothing."""
    if output.magnitude == 0:
        return f"{output.output} is 0 for every sample, with the adapter and without"
    if output.moved == 0:
        return f"the adapter does not move {output.output} on these samples"
    by = f"by {number(output.moved)} on these samples, the bound is {number(output.bound)}"
    return f"the adapter moves {output.output} {by}: the plain base would pass as well"


def moved(output: OutputEvidence) -> str:
    """How far the adapter moves an output."""
    return "–" if output.moved is None else number(output.moved)


def same_class(output: OutputEvidence) -> str:
    """The share of equal predictions; where some differ, how many, and how near the two classes are in the reference."""
    if not output.differing:
        return percent(output.agree)
    return f"{percent(output.agree)}, {output.differing} not: classes within {number(output.margin)}"


def carried_failure(certificate: Certificate) -> str:
    """How many untouched tensors changed, and the first of them."""
    different = certificate.carried.different
    return f"{plural(len(different), 'untouched tensor')} changed, first {different[0]}"


def artifact_failures(exported: Exported) -> Iterator[str]:
    """Why an artefact does not stand for the proven weights."""
    artifact = exported.artifact
    if exported.stale:
        yield f"{artifact.path} {exported.stale}"
    if exported.tensors_found:
        found = exported.tensors_found
        yield f"{artifact.path} still holds {plural(len(found), 'adapter tensor')}, first {found[0]}"
    if artifact.failure:
        yield f"{artifact.path}: {artifact.failure}"
    yield from (f"{artifact.path}, {output_failure(output)}" for output in artifact.outputs if not output.passed)


def ran_sentence(exported: Exported) -> str:
    """Whether the artefact was executed on this machine, in words nobody can misread."""
    if exported.artifact.failure:
        return "Not written"
    if exported.artifact.ran:
        return "Run here against the reference"
    return "Audited only, not run here" if exported.audit else "Not run here"


def graph_sentence(graph: GraphEvidence) -> str:
    """What the fused graph has that the base's has not."""
    nodes = plural(graph.nodes_fused - graph.nodes_base, "added node")
    more = graph.bytes_fused - graph.bytes_base
    weight = f"{size(more)} added" if more else "0 added bytes"
    if graph.differences:
        return f"graph differs from the base in {plural(len(graph.differences), 'place')}, {nodes}, {weight}"
    start = f"graph identical to the base but for {plural(len(graph.added), 'addition')}" if graph.added else ""
    return f"{start or 'graph identical to the base'}, {nodes}, {weight}"


def worst_output(outputs: tuple[OutputEvidence, ...]) -> OutputEvidence | None:
    """The output that comes closest to its bound, or goes furthest beyond it."""
    return max(outputs, key=share_of_bound, default=None)


def share_of_bound(output: OutputEvidence) -> float:
    """Error over bound; anything that is not a number counts as beyond."""
    if not math.isfinite(output.error) or not math.isfinite(output.bound):
        return math.inf
    if output.bound <= 0:
        return math.inf if output.error > 0 else 0.0
    return output.error / output.bound


def _first_failure(evidence: Evidence) -> str:
    """Short enough for a headline: the worst entry stands below it."""
    layers = evidence.certificate.layers if evidence.certificate else ()
    wrong = [layer for layer in layers if not layer.passed]
    if wrong:
        return f"{len(wrong)} of {plural(len(layers), 'layer')} wrong, first {_layer_error(wrong[0])}"
    return next(failures(evidence), "verification.json says wrong, although no part of it does")


def _layer_error(layer: LayerEvidence) -> str:
    return f"{layer.module}, error {number(layer.max_error)}, {number(layer.bound_ratio)} times its bound"


def _layers_sentence(certificate: Certificate, replaced: object) -> str:
    layers = certificate.layers
    exact = sum(layer.verdict == "exact" for layer in layers)
    if not layers and isinstance(replaced, list) and replaced:
        return f"{plural(len(replaced), 'tensor')} taken whole from the checkpoint, nothing to fold"
    if not layers:
        return "no layer was changed"
    experts = sum("[" in layer.module for layer in layers)  # each is a matrix of a stack, and the stack is one layer
    if experts:
        exactly = "exact" if exact == len(layers) else f"within the rounding bound, {exact} of them exact"
        return f"all {len(layers)} matrices, {experts} of them of experts, {exactly}"
    if exact == len(layers):
        return f"all {plural(exact, 'layer')} exact" if exact > 1 else "the 1 layer exact"
    within = f"{plural(len(layers), 'layer')} within the rounding bound"
    return f"{within}, {exact} of them exact" if exact else within


def _output_sentence(certificate: Certificate) -> str:
    output = worst_output(certificate.outputs)
    if output is None:
        return "no output was compared"
    if not certificate.outputs_prove:
        return f"its outputs prove nothing: {vacuity(max(certificate.outputs, key=lambda o: o.moved or 0.0))}"
    return f"{output.model} output error {number(output.error)}, bound {number(output.bound)}"


def _full(value: object) -> str:
    if value is None:
        return "NaN"
    if isinstance(value, float):
        return f"{value:.9g}" if math.isfinite(value) else number(value)
    return str(value)
