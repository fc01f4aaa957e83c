"""``report.md``: pastes into a pull request. The verdict on top, small tables, everything long folded away."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from reparam_export.latency.measurement import Measurement
from reparam_export.report import latency, witness
from reparam_export.report.evidence import Evidence
from reparam_export.report.measured import Measured
from reparam_export.report.numbers import count, number, percent, plural, quantity, signed, size
from reparam_export.report.statement import (
    checkpoint_facts,
    failures,
    headline,
    moved,
    ran_sentence,
    same_class,
    verdict,
)
from reparam_export.verification.certificate import Certificate, GraphEvidence, LayerEvidence
from reparam_export.verification.survival import least, overall

MARKS = {"exact": "✅", "rounded": "✅", "wrong": "❌", "unproven": "⚠️"}
LISTED = 20  # layers shown, worst first; the page has all of them


def markdown(evidence: Evidence) -> str:
    """The whole text."""
    certificate = evidence.certificate
    parts = [f"### {MARKS[verdict(evidence)]} {prose(headline(evidence))}", _failed(evidence)]
    if certificate is not None:
        parts += [_proof_table(certificate, evidence), _output_table(evidence)]
    elif evidence.written:
        parts.append(_written_table(evidence))
    parts.append(_artifact_table(evidence))
    if evidence.latency is not None:
        parts += _latency(evidence.latency)
    if certificate is not None:
        parts += [_layer_details(certificate), _graph_details(certificate.graph)]
    if evidence.analysis:
        parts.append(_branch_details(evidence))
    parts.append(_provenance(evidence))
    return "\n\n".join(part for part in parts if part) + "\n"


def code(text: str) -> str:
    """A name as code. A name that could break out of a code span or a table becomes character references."""
    if re.fullmatch(r"[A-Za-z0-9_./:, =+\-]+", text):
        return f"`{text}`"
    return "<code>" + re.sub(r"[^A-Za-z0-9./: ]", lambda found: f"&#{ord(found[0])};", text) + "</code>"


def prose(text: str) -> str:
    """Text that may quote names: no markup, no mentions, no issue links out of them."""
    escaped = re.sub(r"[*_`\[\]|~\\#!]", lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))
    return escaped.replace("@", "&#64;&#8203;").replace("://", "&#58;//")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A column whose title starts with ``>`` holds numbers and is set to the right."""
    marks = ["---:" if title.startswith(">") else "---" for title in head]
    lines = [[title.removeprefix(">") for title in head], marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def details(summary: str, body: str) -> str:
    """Folded away; the blank lines let the Markdown inside be read as such."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"


def _failed(evidence: Evidence) -> str:
    found = list(failures(evidence))
    lines = [f"- {prose(sentence)}" for sentence in found[:LISTED]]
    if len(found) > LISTED:
        lines.append(f"- and {len(found) - LISTED} more, all of them in `junit.xml`")
    return "\n".join(lines)


def _proof_table(certificate: Certificate, evidence: Evidence) -> str:
    layers, carried, graph = certificate.layers, certificate.carried, certificate.graph
    exact = sum(layer.verdict == "exact" for layer in layers)
    wrong = sum(not layer.passed for layer in layers)
    stack = [
        (name, code(str(fact))) for name, fact in checkpoint_facts(evidence).items() if name.endswith("of the stack")
    ]
    fewer = evidence.fused["narrowed"]
    narrowed = [("Taken whole, in fewer bits than trained", count(len(fewer)))] if fewer else []
    rows = [
        *stack,
        ("Layers", f"{exact} exact, {len(layers) - exact - wrong} rounded, {wrong} wrong, of {len(layers)}"),
        (
            "Change kept by the storage format",
            f"{percent(certificate.survival)}, {percent(least(layers))} in the layer that keeps least",
        ),
        ("Untouched tensors", f"{carried.equal} of {carried.compared} equal, {len(carried.replaced)} replaced"),
        *narrowed,
        *((title, prose(text)) for title, text in witness.rows(certificate.witness)),
        ("Graph nodes", f"{count(graph.nodes_fused)} ({_added(graph.nodes_base, graph.nodes_fused)})"),
        ("Graph bytes", f"{size(graph.bytes_fused)} ({_added(graph.bytes_base, graph.bytes_fused)})"),
    ]
    return table(("proof", ""), rows)


def _written_table(evidence: Evidence) -> str:
    """Of weights that were proven while they were written, and not since."""
    layers = evidence.written
    exact = sum(layer.verdict == "exact" for layer in layers)
    kept = f"{percent(overall(layers))}, {percent(least(layers))} in the layer that keeps least"
    rows = [
        ("Layers, as they were written", f"{exact} exact, of {len(layers)}"),
        ("Change kept by the storage format", kept),
        *((title, prose(text)) for title, text in witness.rows(evidence.witness_of_weights)),
    ]
    return table(("weights", ""), rows)


def _added(base: int, fused: int) -> str:
    return f"{signed(count(fused - base))} against the base"


def _output_table(evidence: Evidence) -> str:
    rows = [
        (
            code(output.model),
            code(output.output),
            count(output.batch),
            number(output.error),
            number(output.floor),
            number(output.bound),
            moved(output),
            same_class(output),
            "**failed**" if not output.passed else "proves nothing" if output.vacuous else "passed",
        )
        for output in evidence.outputs
    ]
    head = ("model", "output", ">batch", ">error", ">noise floor", ">bound", ">moved by the adapter", ">same class", "")
    return table(head, rows) if rows else ""


def _artifact_table(evidence: Evidence) -> str:
    rows = [
        (
            code(each.artifact.path),
            f"{prose(each.artifact.target)} {prose(each.artifact.precision)}",
            size(each.artifact.size),
            code(each.artifact.sha256[:12]),
            ran_sentence(each),
            "passed" if each.passed else "**failed**",
        )
        for each in evidence.exported
    ]
    return table(("artefact", "target", ">size", "sha256", "checked", ""), rows) if rows else ""


def _latency(measured: Measured) -> list[str]:
    """The verdict, the ratios, the table of the papers; folded away, what each model consists of and the machine."""
    found = measured.measurement
    head = f"#### {MARKS[latency.tone(measured)]} {prose(latency.sentence(measured))}"
    models, rows = latency.throughputs(found)
    rates = [
        (prose(row.name), *row.cells, prose(latency.said(measured, case)))
        for row, case in zip(rows, found.cases, strict=True)
    ]
    ratios = [(prose(row.group), prose(row.name), *map(prose, row.cells)) for row in latency.ratio_rows(found)]
    notes = [f"Not run: {title}: {why}" for title, why in found.skipped.items()] + list(found.notes)
    return [
        head,
        table(("samples a second", *(f">{m}" for m in models), "verdict"), rates),
        "\n".join(f"- {prose(note)}" for note in notes),
        details(
            f"Ratios to the base, with {latency.share(found.confidence)} intervals over rounds",
            table(("runner", "ratio", ">factor", ">interval", ">rounds", ">spread of a round", "tested"), ratios),
        ),
        _structure(found),
        details(
            "Machine of the measurement", table(("", ""), [(prose(k), code(v)) for k, v in latency.machine_rows(found)])
        ),
    ]


def _structure(found: Measurement) -> str:
    models, rows, operators = latency.structure_rows(found)
    if not models or found.structure is None:
        return ""
    differ = [row for row in operators if len(set(row.cells)) > 1]
    body = table(("", *(f">{m}" for m in models)), [(prose(row.name), *row.cells) for row in [*rows, *differ]])
    same = len(operators) - len(differ)
    body += f"\n\n{plural(same, 'further operator')} as often in each of them."
    for title, names in (("Differs", found.structure.differences), ("Added by fusion", found.structure.added)):
        if names:
            body += f"\n\n{title}: {', '.join(map(code, names))}"
    return details("What each model consists of", body)


def _layer_details(certificate: Certificate) -> str:
    order = {"wrong": 0, "rounded": 1, "exact": 2}
    layers = sorted(certificate.layers, key=lambda layer: (order[layer.verdict], -_finite(layer.bound_ratio)))
    head = ("layer", "kind", "shape", "method", ">max error", ">of its bound", ">kept", "verdict")
    body = table(head, (_layer_row(layer) for layer in layers[:LISTED]))
    if len(layers) > LISTED:
        body += f"\n\nThe {LISTED} closest to their bound; all {len(layers)} are in `report.html`."
    return details(plural(len(layers), "layer"), body) if layers else ""


def _layer_row(layer: LayerEvidence) -> tuple[str, ...]:
    method = plural(layer.probes, "probe") if layer.method == "probes" else "every entry"
    return (
        code(layer.module),
        prose(layer.kind),
        " × ".join(map(str, layer.shape)),
        method,
        number(layer.max_error),
        number(layer.bound_ratio),
        percent(layer.survival),
        layer.verdict if layer.passed else f"**{layer.verdict}**",
    )


def _finite(value: float) -> float:
    return value if value == value else float("inf")


def _graph_details(graph: GraphEvidence) -> str:
    rows = [
        ("nodes", count(graph.nodes_base), count(graph.nodes_fused)),
        ("parameters", count(graph.parameters_base), count(graph.parameters_fused)),
        ("bytes", size(graph.bytes_base), size(graph.bytes_fused)),
        ("multiply-adds", quantity(graph.macs_base), quantity(graph.macs_fused)),
    ]
    body = table(("", ">base", ">fused"), rows)
    for title, names in (("Differs", graph.differences), ("Added by fusion", graph.added)):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            body += f"\n\n{title}: {', '.join(map(code, names[:LISTED]))}{more}"
    return details("Graph against the base", body)


def _branch_details(evidence: Evidence) -> str:
    rows = [
        (
            code(a.module),
            prose(a.branch),
            *map(number, (a.share, a.effective_rank, a.similarity_out, a.similarity_in, a.amplification)),
        )
        for a in evidence.analysis[:LISTED]
    ]
    head = ("layer", "branch", ">share", ">effective rank", ">writes alike", ">reads alike", ">amplification")
    body = table(head, rows)
    if len(evidence.analysis) > LISTED:
        body += f"\n\nThe first {LISTED}; all {len(evidence.analysis)} are in `report.html`."
    return details("Branches against the pre-trained weight", body)


def _provenance(evidence: Evidence) -> str:
    fused, certificate = evidence.fused, evidence.certificate
    rows = [("weights", str(fused["weights_sha256"])), ("computed in", str(fused.get("compute", "not recorded")))]
    rows += [(f"checkpoint {key}", _flat(value)) for key, value in checkpoint_facts(evidence).items()]
    rows += [(f"base {key}", _flat(value)) for key, value in fused["base"].items()]
    if certificate is not None:
        rows += [("seed", str(certificate.seed)), ("samples", _flat(certificate.samples))]
        rows += [(f"version {name}", version) for name, version in certificate.versions.items()]
    body = table(("", ""), [(prose(name), code(value)) for name, value in rows if value])
    return details("Checkpoint, base, digests, versions", body)


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
