"""``report.html``: one file, no network, no script. The template only lays out what is gathered here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from reparam_export.report import numbers, witness
from reparam_export.report.branches import TONES, branch_names, branch_plot, numbered
from reparam_export.report.evidence import Evidence
from reparam_export.report.plots import OUTPUTS_DRAWN, layer_plot, output_plot
from reparam_export.report.statement import (
    LITTLE,
    checkpoint_facts,
    failures,
    headline,
    moved,
    ran_sentence,
    same_class,
    share_of_bound,
    vacuity,
    verdict,
    worst_entry,
    worst_output,
)
from reparam_export.verification.certificate import Certificate, LayerEvidence, WitnessEvidence
from reparam_export.verification.survival import least, overall

AUDIT_NAMES = {
    "fused_tensors": "Tensors changed by fusion",
    "bitwise": "Found bit for bit in the plan",
    "relaid": "Laid out anew by the builder",
    "adapter_tensors_found": "Adapter tensors found",
    "precisions": "Layer outputs by precision",
}


@dataclass(frozen=True)
class Tile:
    """One number worth seeing first. ``tone`` is a CSS class: "", "good", "warn" or "bad"."""

    name: str
    value: str
    note: str
    tone: str = ""


def page(evidence: Evidence) -> str:
    """The whole file; every name and path is escaped, the plots are the only markup let through."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("reparam_export.report", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for function in (numbers.number, numbers.percent, numbers.count, numbers.size, numbers.quantity, numbers.signed):
        environment.filters[function.__name__] = function
    environment.filters["plural"] = numbers.plural
    return environment.get_template("page.html.j2").render(_context(evidence)) + "\n"


def _context(evidence: Evidence) -> dict[str, Any]:
    certificate = evidence.certificate
    return {
        "evidence": evidence,
        "certificate": certificate,
        "verdict": verdict(evidence),
        "headline": headline(evidence),
        "failures": list(failures(evidence)),
        "folder": evidence.folder.resolve().name,
        "remedy": f"reparam-export verify {shlex.quote(evidence.folder.resolve().name)}",
        "tiles": _tiles(evidence),
        "layer_plots": _plots(layer_plot, certificate.layers if certificate else evidence.written),
        "output_plots": _plots(output_plot, evidence.outputs),
        "branch_plots": _plots(branch_plot, evidence.analysis),
        "branch_rows": numbered(evidence.analysis),
        "branch_names": branch_names(evidence.analysis),
        "branch_tones": TONES,
        "outputs_drawn": OUTPUTS_DRAWN,
        "little": LITTLE,
        "ran_sentence": ran_sentence,
        "worst_entry": worst_entry,
        "same_class": same_class,
        "moved": moved,
        "vacuity": vacuity,
        "audit_rows": _audit_rows,
        "provenance": _provenance(evidence),
        "operators": sorted(certificate.graph.operators.items(), key=lambda item: -item[1]) if certificate else [],
        "flat": _flat,
        **_latency(evidence),
    }


def _latency(evidence: Evidence) -> dict[str, Any]:
    """What the latency section is made of."""
    from reparam_export.report import latency
    from reparam_export.report.latency_plots import ratios_plot, times_plot

    made = (latency.tone, latency.share, latency.throughputs, latency.ratio_rows, latency.times_rows)
    more = (latency.structure_rows, latency.engine_rows, latency.machine_rows, latency.rounds_sentence, latency.said)
    found = evidence.latency.measurement if evidence.latency else None
    return {
        **{function.__name__: function for function in (*made, *more)},
        "latency": evidence.latency,
        "latency_sentence": latency.sentence,
        "latency_state": latency.state,
        "bench_command": f"reparam-export bench {shlex.quote(evidence.folder.resolve().name)}",
        "ratio_plots": [_drawn(ratios_plot(found, narrow=narrow)) for narrow in (False, True)] if found else [],
        "times_plots": [_drawn(times_plot(found, narrow=narrow)) for narrow in (False, True)] if found else [],
    }


def _drawn(picture: str) -> Any:
    """Markup of ours that is let through."""
    from markupsafe import Markup

    return Markup(picture)


def _plots(draw: Any, subjects: tuple[Any, ...]) -> list[Any]:
    """The same plot for a desk and for a phone; the page shows one of them."""
    return [_drawn(draw(subjects, narrow=narrow)) for narrow in (False, True)] if subjects else []


def _tiles(evidence: Evidence) -> list[Tile]:
    tiles = _proof_tiles(evidence.certificate, evidence) if evidence.certificate else _written_tiles(evidence)
    if evidence.exported:
        ran = sum(each.artifact.ran for each in evidence.exported)
        good = all(each.passed for each in evidence.exported)
        total = len(evidence.exported)
        tone = ("good" if ran == total else "") if good else "bad"
        note = "the others were not run" if ran < total else ""
        tiles.append(Tile("Artefacts run here", f"{ran} of {total}", note, tone))
    return tiles


def _proof_tiles(certificate: Certificate, evidence: Evidence) -> list[Tile]:
    layers, graph = certificate.layers, certificate.graph
    exact = sum(layer.verdict == "exact" for layer in layers)
    wrong = sum(not layer.passed for layer in layers)
    tone = "bad" if wrong else "good"
    note = f"{exact} exact, {len(layers) - exact - wrong} rounded, {wrong} wrong"
    tiles = [Tile("Layers proven", f"{len(layers) - wrong} of {len(layers)}", note, tone)]
    output = worst_output(evidence.outputs)
    if output is not None:
        passed = all(each.passed for each in evidence.outputs)
        share = f"{numbers.number(share_of_bound(output))} of its bound" if passed else "beyond its bound"
        why = "proves nothing: the plain base would pass as well"
        note = f"{output.model}, {share}" if certificate.outputs_prove else why
        tone = ("good" if certificate.outputs_prove else "warn") if passed else "bad"
        tiles.append(Tile("Output error", numbers.number(output.error), note, tone))
    tiles += [_witness_tile(certificate.witness), _kept_tile(layers, certificate.survival)]
    added = graph.nodes_fused - graph.nodes_base
    weight = numbers.size(graph.bytes_fused - graph.bytes_base)
    tone = "bad" if graph.differences else ("" if graph.added else "good")
    tiles.append(Tile("Nodes added", numbers.signed(numbers.count(added)), f"{numbers.signed(weight)} added", tone))
    return tiles


def _witness_tile(heard: tuple[WitnessEvidence, ...]) -> Tile:
    present = [each for each in heard if each.who]
    if not present:
        return Tile("Second witness", "none", "no second witness", "warn")
    agree = all(each.passed for each in present)
    note = ", ".join(f"{each.who} {each.version}".strip() for each in present)
    return Tile("Second witness", "agrees" if agree else "differs", note, "good" if agree else "bad")


def _kept_tile(layers: tuple[LayerEvidence, ...], share: float) -> Tile:
    note = f"by the storage format; {numbers.percent(least(layers))} in the layer that keeps least"
    return Tile("Change kept", numbers.percent(share), note, "warn" if share < LITTLE else "")


def _written_tiles(evidence: Evidence) -> list[Tile]:
    """Of weights that were proven while they were written, and not since."""
    layers = evidence.written
    if not layers or evidence.certificate:
        return []
    exact = sum(layer.verdict == "exact" for layer in layers)
    return [
        Tile("Layers proven", f"{exact} of {len(layers)}", "as they were written", ""),
        _kept_tile(layers, overall(layers)),
    ]


def _audit_rows(audit: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Title, amount and the names behind it; keys this version does not know are shown under their own name."""
    rows = []
    for key, value in audit.items():
        title = AUDIT_NAMES.get(key, key.replace("_", " "))
        if isinstance(value, list):
            rows.append((title, numbers.count(len(value)), [_flat(item) for item in value]))
        else:
            rows.append((title, _flat(value), []))
    return rows


def _provenance(evidence: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    fused, certificate = evidence.fused, evidence.certificate
    weights = {key: fused.get(key) for key in ("weights_sha256", "compute", "storage")}
    weights |= {"size": numbers.size(fused["bytes"]) if isinstance(fused.get("bytes"), int) else None}
    weights |= {"tensors changed": len(fused["changed"]), "biases created": fused["created"]}
    weights |= {"taken whole, in fewer bits than trained": fused["narrowed"]}
    weights |= {"fused in": f"{numbers.number(fused['seconds'])} s" if _is_number(fused.get("seconds")) else None}
    groups: list[tuple[str, dict[str, Any]]] = [
        ("Checkpoint", checkpoint_facts(evidence)),
        ("Base", fused["base"]),
        ("Fused weights", weights),
    ]
    if certificate is not None:
        proof = {"seed": certificate.seed, **{f"samples {key}": value for key, value in certificate.samples.items()}}
        proof |= {"replaced tensors": list(certificate.carried.replaced)}
        groups += [("Proof", proof), ("Versions", dict(certificate.versions))]
    heard = certificate.witness if certificate is not None else evidence.witness_of_weights
    return [*((title, _rows(values)) for title, values in groups), ("Second witness", witness.rows(heard))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _flat(value)) for key, value in values.items() if value not in (None, [], {}, "")]


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_flat, value))
    return numbers.number(value) if isinstance(value, float) and not value.is_integer() else str(value)
