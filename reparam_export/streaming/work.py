"""The work of a plan on all cores: every module and tensor is one unit; shards are finished, synced and written down one by one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from blake3 import blake3

from reparam_export.files import fingerprint
from reparam_export.streaming import rows
from reparam_export.streaming.formats import F64, FORMATS, Array, Format, finite, refuse_overflow, rounded, widen
from reparam_export.streaming.forms import Touched
from reparam_export.streaming.layers import WIDTHS, Buffers, Write, fold_layer
from reparam_export.streaming.plan import Plan, Shard
from reparam_export.streaming.shards import Place, Stored, write_at
from reparam_export.streaming.stacks import matrices
from reparam_export.streaming.staging import Staging
from reparam_export.verification.certificate import LayerEvidence

COPY = 1 << 22  # bytes copied at a time
FLUSH = 256 << 20  # bytes after which the disk is set to work


def workers() -> int:
    """Threads that fold: one for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Output:
    """One shard's file while it is written."""

    shard: Shard
    fd: int
    waiting: int  # units not yet done
    digests: dict[str, str] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)
    layers: list[LayerEvidence] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    dirty: int = 0

    def entry(self) -> dict[str, Any]:
        """What ``progress.json`` keeps of it."""
        return {
            "made_from": self.made_from,
            "tensors": self.digests,
            "layers": [asdict(layer) for layer in sorted(self.layers, key=lambda e: e.module)],
            "biases": sorted(self.biases),
            "seconds": self.seconds,
        }


class Writer:
    """Writes the raw values of places, in order, and digests them on the way."""

    def __init__(self, output: Output, places: tuple[Place, ...], flush: Callable[[Output, int], None]) -> None:
        self.output, self.flush = output, flush
        self.places = {place.name: place for place in places}
        self.digests = {place.name: blake3() for place in places}

    def __call__(self, name: str, at: int, raw: Array) -> None:
        view = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        self.digests[name].update(view.data)
        write_at(self.output.fd, view, self.places[name].offset + at)
        self.flush(self.output, len(view))

    def done(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self.digests.items()}


class Work:
    """Runs all units of the shards that are not finished."""

    def __init__(self, plan: Plan, staging: Staging, advance: Callable[[int, int], None] | None) -> None:
        self.plan, self.staging, self.advance = plan, staging, advance
        self.buffers = threading.local()
        self.stop = threading.Event()

    def run(self) -> None:
        """Raises the first error of any unit, after all others have stopped."""
        from threadpoolctl import threadpool_limits

        shards = [s for s in self.plan.shards if s.name not in self.staging.finished]
        with ExitStack() as stack:
            stack.enter_context(threadpool_limits(1))  # every thread here is one of ours
            pool = stack.enter_context(ThreadPoolExecutor(workers(), "fold"))
            self.disk = stack.enter_context(ThreadPoolExecutor(1, "disk"))
            outputs: list[Output] = []
            try:
                self._run(shards, outputs, pool)
            finally:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self.disk.shutdown(wait=True)
                for output in outputs:
                    if output.fd >= 0:
                        os.close(output.fd)

    def _run(self, shards: list[Shard], outputs: list[Output], pool: ThreadPoolExecutor) -> None:
        futures: dict[Future[None], Output] = {}
        total = sum(len(shard.units) for shard in shards)
        for shard in shards:
            output = self._create(shard)
            outputs.append(output)
            futures[pool.submit(self._fingerprints, output)] = output
            for name, places in sorted(shard.units, key=lambda unit: -sum(p.nbytes for p in unit[1])):
                futures[pool.submit(self._unit, output, name, places)] = output
        finishing: list[Future[None]] = []
        done = 0
        while futures:
            ready, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in ready:
                output = futures.pop(future)
                future.result()
                output.waiting -= 1
                done += 1
                if output.waiting == 0:
                    finishing.append(self.disk.submit(self._finish, output))
                if self.advance is not None:
                    self.advance(min(done, total), total)
        for last in finishing:
            last.result()

    def _create(self, shard: Shard) -> Output:
        path = self.staging.weights / shard.name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(fd, shard.size)
        write_at(fd, np.frombuffer(shard.header, np.uint8), 0)
        return Output(shard, fd, len(shard.units) + 1)

    def _flush(self, output: Output, written: int) -> None:
        """Let the disk begin before everything is written."""
        output.dirty += written
        if output.dirty >= FLUSH:
            output.dirty = 0
            self.disk.submit(os.fdatasync, output.fd)

    def _finish(self, output: Output) -> None:
        os.fsync(output.fd)
        os.close(output.fd)
        output.fd = -1
        self.staging.finish(output.shard, output.entry())

    def _fingerprints(self, output: Output) -> None:
        """Of the files that a shard is made from. Reading them in order also brings them into the page cache."""
        output.made_from = {str(path): fingerprint(path) for path in output.shard.files}

    def _unit(self, output: Output, name: str, places: tuple[Place, ...]) -> None:
        if self.stop.is_set():
            return
        started = time.thread_time()
        writer = Writer(output, places, self._flush)
        touched = self.plan.touched.get(name)
        stack = self.plan.stacks.get(name)
        if stack is not None:
            output.layers += self._stack(stack, places[0], writer)
            part = "fold"
        elif touched is not None and places[0].name != name:
            buffers = self.buffers.__dict__.setdefault("kept", Buffers())
            targets = {place.name: FORMATS[place.code] for place in places}
            folded = fold_layer(touched, targets, writer, buffers, crc32(name.encode()))
            if f"{name}.weight" in targets:
                output.layers.append(folded.evidence)
            if folded.bias_changed:
                output.biases.append(f"{name}.bias")
            part = "fold"
            output.seconds["of which probes"] = output.seconds.get("of which probes", 0.0) + folded.proving
        else:
            carry(places[0], self.plan.tensors.get(name), writer)
            part = "copy"
        output.digests |= writer.done()
        output.seconds[part] = output.seconds.get(part, 0.0) + time.thread_time() - started

    def _stack(self, stack: tuple[Touched | None, ...], place: Place, writer: Writer) -> list[LayerEvidence]:
        """One tensor that holds a stack of matrices, one after the other."""
        buffers = self.buffers.__dict__.setdefault("kept", Buffers())
        size, found = place.nbytes // len(stack), []
        for number, touched in enumerate(stack):
            at = number * size

            def write(_: str, start: int, raw: Array, at: int = at) -> None:
                writer(place.name, at + start, raw)

            if touched is None:
                whole = self.plan.originals[place.name]
                raw = matrices(whole.shape, whole.raw)[number]
                part = Place(place.name, place.code, place.shape[1:], 0)
                carry(part, Stored(place.name, whole.code, whole.shape[1:], raw), write)
                continue
            targets = {f"{touched.module}.weight": FORMATS[place.code]}
            found.append(fold_layer(touched, targets, write, buffers, crc32(touched.module.encode())).evidence)
        return found


def carry(place: Place, stored: Stored | None, write: Write) -> None:
    """A tensor that is not folded: copied, rounded to another format, or zeros when there is none. Raises FusionError."""
    if stored is None:
        write(place.name, 0, np.zeros(place.nbytes, np.uint8))
        return
    of = FORMATS.get(stored.code)
    target = FORMATS.get(place.code)
    if of is None or of is target:
        for start in range(0, len(stored.raw), COPY):
            chunk = stored.raw[start : start + COPY]
            if of is not None and not finite(chunk.view(of.raw), of):
                raise refuse_overflow(place.name, of)
            write(place.name, start, chunk)
        return
    if target is None:
        raise TypeError(f"{place.name}: a {stored.code} tensor cannot become {place.code}")
    cast(place, stored.raw.view(of.raw), of, target, write)


def cast(place: Place, values: Array, of: Format, target: Format, write: Write) -> None:
    """Every value in another float format, rounded once."""
    step = rows.ENTRIES
    for start in range(0, len(values), step):
        chunk = values[start : start + step]
        wide = np.empty(len(chunk), np.float64 if of is F64 else np.float32)
        widen(chunk, of, wide)
        raw = rounded(wide, target)
        if not finite(raw, target):
            raise refuse_overflow(place.name, target)
        write(place.name, start * target.size, raw)


def folded_whole(plan: Plan) -> list[str]:
    """The modules with a kind that has no factors: folded as whole layers."""
    from reparam_export.adapters import kind

    return [t.module for t in plan.folded if any(not hasattr(kind(a.kind), "low_rank") for a in t.adapters)]


def memory_needed(plan: Plan) -> int:
    """Bytes of anonymous memory at most: the adapters, buffers of every thread, a whole layer in float64 for kinds without factors."""
    from reparam_export.affine import tensors_of

    buffers = workers() * WIDTHS * (6 * 8 + rows.SPAN * 4) * rows.ENTRIES
    adapters: int = sum(
        t.nbytes for touched in plan.folded for a in touched.adapters for t in tensors_of(a.params).values()
    )
    apart = set(folded_whole(plan))
    whole = [touched for touched in plan.folded if touched.module in apart]
    largest = max((int(np.prod(t.weight.shape)) * 8 * 6 for t in whole), default=0)
    return 120_000_000 + buffers + adapters + workers() * largest


def seconds_expected(plan: Plan) -> float:
    """Of folding, on all cores: measured on the first rows of the largest touched weight. The disk, and whole layers, take longer."""
    from reparam_export.streaming.forms import format_of

    if not plan.folded:
        return 0.0
    largest = max(plan.folded, key=lambda t: len(t.weight.raw))
    source = format_of(largest.weight)
    values = largest.weight.values()[: max(1, rows.ENTRIES // largest.weight.shape[1])]
    factors = ((np.ones((len(values), 16)), np.full((16, values.shape[1]), 1e-4)),)
    fold = rows.Fold.of(values, source, plan.storage or source, (factors, ()), 0)
    work = rows.workspace(fold)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        rows.fold_rows(fold, work, 0, len(values))
        best = min(best, time.perf_counter() - started)
    measured: float = plan.entries * best / values.size / workers()
    return measured
