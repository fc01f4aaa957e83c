"""Latency: does the fused model cost what its base costs? Measured, with an interval and a verdict.

``bench(folder)`` times the base, the base again (the control), the unfused and the fused model on every runner that is
there, and writes ``latency.json``. How times are taken: ``rounds``; what follows from them: ``statistics``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_export.errors import ExportError, MissingBackendError, UsageError
from reparam_export.latency.measurement import Case, Measurement, overall
from reparam_export.latency.rounds import Models, Progress, Settings, StoppedError, WorkerError, cpus_allowed, take
from reparam_export.latency.runners import names, runner
from reparam_export.latency.statistics import ALPHA

if TYPE_CHECKING:
    from reparam_export.latency.contenders import Lineup
    from reparam_export.latency.engines import Engines
    from reparam_export.verification import VerifiedModel

BATCHES = (1, 4, 16)  # as in the papers' tables


def bench(
    folder: str | Path,
    *,
    base: str | None = None,
    batches: Sequence[int] = BATCHES,
    runners: Sequence[str] = (),
    precision: str | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Time the models of a proven output folder until there is a verdict; writes ``latency.json``.

    base: of a folder that was made on a ``py:`` base, that base: a folder names no code to run.
    runners: names of modules in ``latency/runners``; none: all that can run here, which share the time.
    precision: "fp32", "fp16" or "bf16"; None: the artefact's. settings: margin, time, threads, seed.
    progress: called with (runner, rounds done, seconds left) after every round. Ctrl-C ends the run; what was measured is kept.
    Raises EquivalenceError or CheckpointError for a folder that is not proven, UsageError for a wrong option, ExportError
    when nothing can be timed. Added cost is a verdict, not an error.
    """
    from reparam_export.folder import LATENCY, load_proof, write_json
    from reparam_export.latency.contenders import lineup, saved_inputs

    place, settings, started = Path(folder), settings or Settings(), time.monotonic()
    check(batches, runners, settings)
    model = load_proof(place, again=False, base=base)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=place) as scratch:
        who = lineup(place, model, precision, Path(scratch))
        inputs = saved_inputs(model, max(batches), Path(scratch) / "inputs.npz")
        engines, lack = _engines(place, who, model, Path(scratch))
        found = measurement(who.models(inputs, engines), batches, runners, settings, progress)
    done = replace(
        found,
        weights_sha256=model.certificate.weights_sha256,
        artifact_sha256=who.artifact_sha256,
        engine_sha256=engines.sha256 if engines else "",
        precision=who.precision,
        structure=replace(who.structure, engines=engines.facts if engines else ()),
        notes=(*who.notes, *lack),
        seconds=round(time.monotonic() - started, 1),
    )
    write_json(place / LATENCY, asdict(done))
    return done


def _engines(place: Path, who: Lineup, model: VerifiedModel, scratch: Path) -> tuple[Engines | None, tuple[str, ...]]:
    """The engines to compare with the folder's own, if it has one, or why they cannot be had here."""
    from reparam_export.latency.engines import built

    try:
        return built(place, who, model, scratch), ()
    except MissingBackendError as error:
        return None, (f"the engine is not compared with the base's: {error}",)


def check(batches: Sequence[int], runners: Sequence[str], settings: Settings) -> None:
    """Refuse early what cannot be measured. Raises UsageError, MissingBackendError for a runner that is not there."""
    allowed = cpus_allowed()
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise UsageError(f"batch sizes {list(batches)}: expected different whole numbers of at least 1, such as 1,4,16")
    if not 0 < settings.margin < 1:
        raise UsageError(f"margin {settings.margin}: expected a share between 0 and 1, such as 0.01 for 1 %")
    if not 1 <= settings.threads <= allowed:
        raise UsageError(f"{settings.threads} threads: this process may use {allowed} CPUs; expected 1 to {allowed}")
    for name in runners:
        why = runner(name).missing()
        if why:
            raise MissingBackendError(f"runner {name}: {why}", package=name, extra="none")


def measurement(
    models: Models, batches: Sequence[int], runners: Sequence[str], settings: Settings, progress: Progress | None = None
) -> Measurement:
    """Time what is there on every runner; a runner that was not asked for by name and cannot run is noted, not an error."""
    from reparam_export.latency import machine

    before, started = machine.state(), time.monotonic()
    cases, skipped = _cases(models, batches, runners, settings, progress)
    if not cases:
        raise ExportError(f"nothing could be timed: {'; '.join(f'{name}: {why}' for name, why in skipped.items())}")
    return Measurement(
        contest=models.contest,
        margin=settings.margin,
        confidence=1 - 2 * ALPHA,
        verdict=overall([case.verdict for case in cases]),
        cases=tuple(cases),
        skipped=skipped,
        settings={**asdict(settings), "batches": list(batches)},
        machine={**machine.describe(), "before": before, "after": machine.state()},
        seconds=round(time.monotonic() - started, 1),
    )


def _cases(
    models: Models, batches: Sequence[int], runners: Sequence[str], settings: Settings, progress: Progress | None
) -> tuple[list[Case], dict[str, str]]:
    ends = time.monotonic() + settings.max_time
    why = {name: runner(name).missing() or models.lack(name) for name in runners or names()}
    skipped = {runner(name).TITLE: reason for name, reason in why.items() if reason}
    usable = [name for name, reason in why.items() if not reason]
    cases: list[Case] = []
    for number, name in enumerate(usable):
        share = max(ends - time.monotonic(), 0.0) / (len(usable) - number)
        try:
            job = models.job(name, settings.threads)
            cases += take(job, models.contest, batches, replace(settings, max_time=share), progress)
        except StoppedError as stop:
            if not cases + stop.cases:
                raise KeyboardInterrupt from stop
            return cases + stop.cases, skipped
        except WorkerError as error:
            if name in runners and not error.cases:
                raise
            cases += error.cases
            skipped[runner(name).TITLE] = f"ended early: {error}" if error.cases else str(error)
    return cases, skipped
