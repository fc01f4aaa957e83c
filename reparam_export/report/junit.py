"""``junit.xml``: one test case for every layer, output, artefact, runner and batch size, the carried tensors and the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from reparam_export.report import latency, witness
from reparam_export.report.evidence import Evidence
from reparam_export.report.measured import Measured
from reparam_export.report.numbers import number, percent, plural
from reparam_export.report.statement import (
    artifact_failures,
    carried_failure,
    graph_sentence,
    headline,
    layer_failure,
    output_failure,
    ran_sentence,
    vacuity,
    verdict,
)
from reparam_export.verification.certificate import Certificate, LayerEvidence, OutputEvidence

if TYPE_CHECKING:
    from junitparser import TestCase

Case = tuple[str, str, str]  # name, what was measured, why it failed ("" when it passed)


def junit(evidence: Evidence) -> str:
    """The whole file as text. Not proven is a failure: a green run must mean a proof."""
    from junitparser import JUnitXml, TestSuite

    xml: Any = JUnitXml("reparam-export")
    for name, cases in _suites(evidence):
        suite = TestSuite(name)
        for case in cases:
            suite.add_testcase(_test_case(name, *case))
        xml.add_testsuite(suite)
    xml.update_statistics()
    text = xml.tostring()
    return text.decode("utf-8") if isinstance(text, bytes) else str(text)


def _suites(evidence: Evidence) -> Iterator[tuple[str, list[Case]]]:
    unproven = verdict(evidence) == "unproven"
    yield "proof", [("verdict", headline(evidence), headline(evidence) if unproven else "")]
    certificate = evidence.certificate
    if certificate is not None:
        yield "layers", [_layer_case(layer) for layer in certificate.layers]
        yield "carried tensors", [_carried_case(certificate)]
        yield "graph", [_graph_case(certificate)]
        yield "second witness", [_witness_case(certificate)]
    if evidence.outputs:
        yield "outputs", [_output_case(output) for output in evidence.outputs]
    if evidence.latency is not None:
        yield "latency", _latency_cases(evidence.latency)
    if evidence.exported:
        yield (
            "artefacts",
            [
                (
                    f"{each.artifact.path} ({each.artifact.target}, {each.artifact.precision})",
                    f"{ran_sentence(each)}. {each.artifact.note}",
                    "\n".join(artifact_failures(each)),
                )
                for each in evidence.exported
            ],
        )


def _latency_cases(measured: Measured) -> list[Case]:
    """A case a runner and batch size. Not decided is a failure: a green run must mean a verdict."""
    if measured.stale:
        return [("latency", latency.sentence(measured), latency.sentence(measured))]
    found = measured.measurement
    subject = found.contest.subject
    return [
        (
            latency.name_of(c),
            f"{c.said}: {latency.factors(c)}, {latency.rounds_sentence(c)}; timed: {measured.timed}",
            latency.failure(c, subject),
        )
        for c in found.cases
    ]


def _layer_case(layer: LayerEvidence) -> Case:
    measured = (
        f"{layer.kind}, {layer.method}, {layer.verdict}: error {number(layer.max_error)}, "
        f"{number(layer.bound_ratio)} times its bound, survival {percent(layer.survival)}"
    )
    return layer.module, measured, "" if layer.passed else layer_failure(layer)


def _output_case(output: OutputEvidence) -> Case:
    measured = (
        f"error {number(output.error)}, noise floor {number(output.floor)}, bound {number(output.bound)}, "
        f"magnitude {number(output.magnitude)}, {plural(output.samples, 'sample')} in {output.dtype}"
    )
    if output.moved is not None:
        measured += f", moved by the adapter {number(output.moved)}"
    if output.vacuous:
        measured += f"; proves nothing: {vacuity(output)}"
    failed = "" if output.passed else output_failure(output)
    return f"{output.model}: {output.output}, batch {output.batch}", measured, failed


def _carried_case(certificate: Certificate) -> Case:
    carried = certificate.carried
    measured = f"{carried.equal} of {carried.compared} untouched tensors equal, {len(carried.replaced)} replaced"
    failed = "" if carried.passed else "\n".join((carried_failure(certificate), *carried.different))
    return "untouched tensors", measured, failed


def _witness_case(certificate: Certificate) -> Case:
    """That there is none is said, and fails nothing: who needs one says --witness required."""
    said = "\n".join(f"{title}: {text}" for title, text in witness.rows(certificate.witness))
    return "second witness", said, "\n".join(witness.failures(certificate.witness))


def _graph_case(certificate: Certificate) -> Case:
    graph = certificate.graph
    said = graph_sentence(graph)
    return "graph of the base", said, "" if graph.passed else "\n".join((said, *graph.differences))


def _test_case(suite: str, name: str, measured: str, failed: str) -> TestCase:
    from junitparser import Failure, TestCase

    case = TestCase(name, classname=f"reparam-export.{suite}")
    case.system_out = measured
    if failed:
        failure = Failure(failed.splitlines()[0], "EquivalenceError")
        failure.text = f"{failed}\n{measured}"
        case.result = [failure]
    return case
