"""The work in progress inside an output folder, and the one moment at which it becomes the result.

    OUT/.fuse/hf/             shards, config, tokenizer in the making
    OUT/.fuse/progress.json   which shards are finished, with the digests of what they hold and of what they were made from
    OUT/.fuse/fused.json      written last: from here on OUT/hf is this one, and whoever opens OUT puts it there

Until ``fused.json`` stands in ``.fuse``, nothing else in OUT is touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from reparam_export.errors import UsageError
from reparam_export.files import PARTIAL, fingerprint, read_json, remove, replace_file
from reparam_export.refuted import ENDING
from reparam_export.streaming.plan import Plan, Shard

STAGING, WEIGHTS, RECORD, PROGRESS = ".fuse", "hf", "fused.json", "progress.json"


class Staging:
    """The folder ``.fuse`` of one output folder, opened for one plan."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.root = out / STAGING
        self.weights = self.root / WEIGHTS
        self.plan = plan
        self.finished: dict[str, dict[str, Any]] = {}

    def take_up(self, *, resume: bool) -> None:
        """What is finished already, when it is to be resumed; nothing on disk is changed.

        Raises UsageError when what is there was made from something else, or lies elsewhere.
        """
        check_own(self.root)
        if resume and (self.root / PROGRESS).is_file():
            content = read_json(self.root / PROGRESS)
            if content.get("plan") != self.plan.digest():
                raise UsageError(
                    f"{self.root}: holds shards made from another checkpoint, base or settings; pass --overwrite to start anew"
                )
            known = content.get("shards")
            for shard in self.plan.shards:
                entry = known.get(shard.name) if isinstance(known, dict) else None
                if isinstance(entry, dict) and self._is_whole(shard, entry):
                    self.finished[shard.name] = entry

    def make(self) -> None:
        """The folder, with what is finished in it and nothing else."""
        if not self.finished and self.root.exists():
            shutil.rmtree(self.root)
        self.weights.mkdir(parents=True, exist_ok=True)
        for file in self.weights.iterdir():
            if file.name not in self.finished:
                file.unlink()

    def _is_whole(self, shard: Shard, entry: Mapping[str, Any]) -> bool:
        """Is a finished shard still what it was, and made from files that still are what they were?"""
        path = self.weights / shard.name
        digests, made_from = entry.get("tensors"), entry.get("made_from")
        if (
            path.is_symlink()
            or not path.is_file()
            or path.stat().st_size != shard.size
            or not isinstance(digests, dict)
        ):
            return False
        if made_from != {str(file): fingerprint(file) for file in shard.files}:
            return False
        content = np.memmap(path, np.uint8, "r")
        places = [place for _, filled in shard.units for place in filled]
        found = {p.name: blake3(content[p.offset : p.offset + p.nbytes].data).hexdigest() for p in places}
        return found == digests and content[: len(shard.header)].tobytes() == shard.header

    def finish(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Write down that a shard, already synced, is finished."""
        self.finished[shard.name] = dict(entry)
        write_synced(self.root / PROGRESS, {"plan": self.plan.digest(), "shards": self.finished})

    def commit(self, record: Mapping[str, Any]) -> None:
        """The moment: everything is on disk, and now it is the result."""
        for file in self.weights.iterdir():
            sync(file)
        sync(self.weights)
        write_synced(self.root / RECORD, record)
        settle(self.root.parent)

    def abandon(self) -> None:
        """Leave what is finished for --resume; without a finished shard, nothing. A result that is committed stays one."""
        if (self.root / RECORD).is_file():
            return
        if not self.finished:
            self.discard()
            return
        for file in self.weights.iterdir():
            if file.name not in self.finished:
                file.unlink()

    def discard(self) -> None:
        """Leave nothing, but for a result that is committed."""
        if not (self.root / RECORD).is_file():
            shutil.rmtree(self.root, ignore_errors=True)


def settle(out: Path) -> None:
    """Put a committed result in its place, if one waits; a run that was killed in the middle of it is carried on here.

    What stood in the folder before belonged to the former weights and goes.
    """
    root = out / STAGING
    if not (root / RECORD).is_file():
        return
    check_own(root)
    if (root / WEIGHTS).is_dir():
        for stale in former(out):
            remove(stale)
        (root / WEIGHTS).rename(out / WEIGHTS)
        sync(out)
    (root / RECORD).replace(out / RECORD)
    sync(out)
    shutil.rmtree(root)


def check_own(root: Path) -> None:
    """Raises UsageError for a place of work that is a link: what it points to is not ours to write to or to clear."""
    for place in (root, root / WEIGHTS):
        if place.is_symlink():
            raise UsageError(
                f"{place}: is a link to {place.readlink()}; nothing is written or removed there; take the link away"
            )


def former(out: Path) -> list[Path]:
    """What earlier stages left, newest meaning first: the record goes before the weights that it speaks of."""
    names = (
        RECORD, "verification.json", "reference.npz", "artifact.json", "analysis.json", "latency.json", "report.html", "report.md",
        "junit.xml", "model.onnx*", "model.engine", "engine.log", "model.safetensors", "genai", "fused.safetensors", WEIGHTS, f"*{ENDING}",
        f".*{PARTIAL}",
    )  # fmt: skip
    return [path for name in names for path in sorted(out.glob(name))]


def in_progress(out: Path) -> bool:
    """Does the folder hold shards of an interrupted run?"""
    return (out / STAGING / PROGRESS).is_file()


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file that is on disk whole before it has its name."""
    replaced(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, and rename it once it is on disk."""
    replace_file(path, write, sync)
    sync(path.parent)
