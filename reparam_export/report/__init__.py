"""The report of one output folder: reads its JSON files, once the digests of what they vouch for hold; computes nothing else.

write_report(folder) -> report.html (for eyes), report.md (for a pull request), junit.xml (for a CI server)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from reparam_export.report.evidence import Evidence, read_evidence
from reparam_export.report.latency import state
from reparam_export.report.statement import ReportVerdict, headline, verdict

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """The three files that were written, and what they say."""

    folder: Path
    html: Path
    markdown: Path
    junit: Path
    verdict: ReportVerdict
    headline: str
    latency: str = (
        "not measured"  # the measurement's verdict, "not known" when it is not of proven files of this folder
    )


def write_report(folder: Path) -> Report:
    """Write ``report.html``, ``report.md`` and ``junit.xml`` from the JSON files of the stages before.

    Without ``verification.json``, or with one about other weights, the report says "not proven", and "not known" of a
    latency that was measured before. Raises CheckpointError for a file that is missing, damaged or contradicts itself.
    """
    from reparam_export.report.junit import junit
    from reparam_export.report.markdown import markdown
    from reparam_export.report.page import page
    from reparam_export.streaming.staging import settle

    folder = Path(folder)
    settle(folder)
    evidence = read_evidence(folder)
    texts = {"report.html": page(evidence), "report.md": markdown(evidence), "junit.xml": junit(evidence)}
    for name, text in texts.items():
        _replace(folder / name, text)
    return Report(
        folder=folder,
        html=folder / "report.html",
        markdown=folder / "report.md",
        junit=folder / "junit.xml",
        verdict=verdict(evidence),
        headline=headline(evidence),
        latency=_latency(evidence),
    )


def _latency(evidence: Evidence) -> str:
    return "not measured" if evidence.latency is None else state(evidence.latency)


def _replace(path: Path, text: str) -> None:
    """A reader never sees half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
