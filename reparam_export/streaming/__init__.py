"""Fusing a Hugging Face folder shard by shard, without ever building the model: read, fold, prove, write, a few rows at a time.

    plan_of(checkpoint, storage) -> Plan      everything is checked and laid out; nothing is written
    stream(plan, out) -> record               OUT/hf, which stock transformers loads, and what ``fused.json`` says of it

The bytes are those that folding in float64 and rounding once gives. Torch is not imported for kinds that give their factors (``low_rank``).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from reparam_export.errors import ExportError, FusionError
from reparam_export.files import fingerprint, sha256
from reparam_export.fit import check_trained_on
from reparam_export.fusion import check_kept, narrowed
from reparam_export.state import digest_of
from reparam_export.streaming.formats import FORMATS, torch_name
from reparam_export.streaming.plan import Plan, plan_of
from reparam_export.streaming.shards import Place
from reparam_export.streaming.source import NotStreamableError
from reparam_export.streaming.staging import WEIGHTS, Staging, settle, write_synced
from reparam_export.streaming.witness import heard_of
from reparam_export.streaming.work import Work, folded_whole, memory_needed, seconds_expected, workers
from reparam_export.tokenizer import beside_weights
from reparam_export.verification.certificate import LayerEvidence, from_entry
from reparam_export.verification.survival import least, overall

__all__ = ["NotStreamableError", "Plan", "plan_of", "settle", "stream"]

INDEX = "model.safetensors.index.json"
SPARE = 32 << 20  # bytes of disk for everything that is not a weight
Advance = Callable[[int, int], None]


def stream(
    plan: Plan,
    out: Path | str,
    *,
    dtype: str | None = None,
    resume: bool = False,
    advance: Advance | None = None,
    witness: str = "auto",
) -> dict[str, Any]:
    """Fold into ``out``; what ``fused.json`` then holds. Until all is written and proven, ``out`` keeps what it held.

    dtype: the storage that was asked for, where the plan's own is what was chosen for it ("auto"). resume: take up the finished shards
    of an interrupted run. witness: who reads the checkpoint a second time, as for ``verify``.
    advance: called with (units of work done, units in all).
    Raises EquivalenceError (a stored entry is not the rounded exact value), FusionError, ExportError (the disk), UsageError.
    """
    started = time.perf_counter()
    heard = heard_of(plan, witness)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    staging = Staging(out, plan)
    try:
        staging.take_up(resume=resume)
        check_disk(plan, out, staging)
        staging.make()
    except BaseException:
        _remove_if_empty(out)
        raise
    try:
        check_trained_on(plan.checkpoint, plan.parameter)
        Work(plan, staging, advance).run()
        if not _moved(plan, staging):
            raise FusionError(
                f"{plan.checkpoint.path}: the adapter changes nothing: every fused weight equals the base's. "
                "It was never trained, or the code that trained it never switched it on"
            )
        check_kept(plan.checkpoint, overall(layers_of(staging)))
        _beside(plan, staging)
        record = record_of(plan, staging, dtype, time.perf_counter() - started)
        record["witness"] = [asdict(each) for each in heard]
        staging.commit(record)
    except OSError as error:
        staging.abandon()
        done = len(staging.finished)
        kept = f"{done} finished shards are kept, --resume continues" if done else "nothing was kept"
        raise ExportError(f"{error.filename or staging.root}: {error.strerror or error}; {kept}") from error
    except KeyboardInterrupt:
        staging.abandon()
        raise
    except BaseException:
        staging.discard()
        raise
    finally:
        _remove_if_empty(out)
    return record


def check_disk(plan: Plan, out: Path, staging: Staging) -> None:
    """Raises ExportError unless there is room for what is still to be written."""
    done = sum(shard.size for shard in plan.shards if shard.name in staging.finished)
    needed, free = plan.size - done + SPARE, shutil.disk_usage(out).free
    if needed > free:
        raise ExportError(
            f"{out}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room, or choose another folder with -o"
        )


def layers_of(staging: Staging) -> tuple[LayerEvidence, ...]:
    """The proof of every layer, in the order of the shards."""
    entries = [staging.finished[shard.name] for shard in staging.plan.shards]
    return tuple(from_entry(layer) for entry in entries for layer in entry["layers"])


def _moved(plan: Plan, staging: Staging) -> bool:
    """Does the checkpoint change anything: with its adapters, if it has any, else with the tensors that it brings whole?"""
    if not plan.folded:
        return bool(plan.moved)
    return any(layer.change != 0 for layer in layers_of(staging)) or bool(_biases_changed(staging))


def _biases_changed(staging: Staging) -> list[str]:
    return [name for entry in staging.finished.values() for name in entry["biases"]]


def record_of(plan: Plan, staging: Staging, dtype: str | None, seconds: float) -> dict[str, Any]:
    """What ``fused.json`` holds: as that of a fusion in memory, with the proof of the weights in it."""
    checkpoint = plan.checkpoint
    layers = layers_of(staging)
    places = {place.name: place for shard in plan.shards for _, filled in shard.units for place in filled}
    digests = {name: bytes.fromhex(d) for entry in staging.finished.values() for name, d in entry["tensors"].items()}
    apart = apart_of(plan, places)
    own = {name: place for name, place in places.items() if name not in apart}
    biases = set(_biases_changed(staging))
    changed = [
        n
        for module in plan.touched
        for n in (f"{module}.weight", f"{module}.bias")
        if n in own and (n.endswith(".weight") or n in biases or n in plan.created)
    ]
    changed += plan.stacks
    storage: dict[str, int] = {}
    for place in own.values():
        storage[torch_name(place.code)] = storage.get(torch_name(place.code), 0) + 1
    recipe = replace(checkpoint.recipe, dtype=dtype or (plan.storage.short if plan.storage else None))
    return {
        "checkpoint": checkpoint.describe(),
        "base": {"spec": checkpoint.base, "weights": None, "weights_sha256": None, "inputs": list(checkpoint.inputs)},
        "compute": "float32 with every undecided entry in float64: the bytes of float64" if _quick(plan) else "float64",
        "weights": WEIGHTS,
        "names": "files" if plan.renamed else "model",
        "storage": storage,
        "dtype": plan.storage.short if plan.storage else None,
        "weights_sha256": digest_of((n, f"torch.{torch_name(p.code)}", p.shape, digests[n]) for n, p in own.items()),
        "changed": {name: list(own[name].shape) for name in sorted(changed)},
        "created": list(plan.created),
        "replaced": sorted(checkpoint.replaced),
        "narrowed": narrowed(checkpoint, plan.itemsize),
        "aliases": dict(plan.ties),
        "apart": sorted(apart),
        "untied": list(plan.untied),
        "config_changed": plan.corrected,
        "bytes": sum(place.nbytes for place in own.values()),
        "seconds": round(seconds, 3),
        "cpu_seconds": _cpu_seconds(staging),
        "shards": {shard.name: shard.size for shard in plan.shards},
        "beside": {
            file.name: sha256(file) for file in sorted(staging.weights.iterdir()) if file.name not in staging.finished
        },
        "tensors": {name: digest.hex() for name, digest in sorted(digests.items())},
        "survival": {
            "overall": overall(layers),
            "least": least(layers),
            "layers": {e.module: e.survival for e in layers},
        },
        "layers": [asdict(layer) for layer in layers],
        "recipe": asdict(recipe),
        "digests": _digests(plan, staging),
    }


def _digests(plan: Plan, staging: Staging) -> dict[str, str]:
    """The fingerprint of every file that the result was made from; those of the shards were taken while they were read."""
    known: dict[str, str] = {}
    for entry in staging.finished.values():
        known |= entry["made_from"]
    files = replace(plan.checkpoint.recipe, base=plan.checkpoint.base).files()
    return {str(path): known.get(str(path)) or fingerprint(path) for path in files}


def _cpu_seconds(staging: Staging) -> dict[str, float]:
    parts: dict[str, float] = {}
    for entry in staging.finished.values():
        for name, value in entry["seconds"].items():
            parts[name] = round(parts.get(name, 0.0) + value, 3)
    return parts


def _quick(plan: Plan) -> bool:
    return any(
        FORMATS[place.code].size == 2 for s in plan.shards for _, ps in s.units for place in ps if place.code in FORMATS
    )


def apart_of(plan: Plan, places: Mapping[str, Place]) -> set[str]:
    """Tensors in the files that are none of the model's own: zero biases that a switch brings, second names, constants of old files."""
    from reparam_export.state import CONSTANTS

    constants = {
        n
        for n in places
        if n not in plan.touched and n not in plan.stacks and n.endswith(tuple(end for end, _ in CONSTANTS))
    }
    return set(plan.zeros) | {n for n in plan.ties if n in places} | constants


def _beside(plan: Plan, staging: Staging) -> None:
    """config, tokenizer and index."""
    for file in beside_weights(plan.source, plan.checkpoint):
        shutil.copyfile(file, staging.weights / file.name)
    write_synced(staging.weights / "config.json", plan.config)
    if len(plan.shards) > 1 or (plan.source / INDEX).is_file():
        where = {place.name: shard.name for shard in plan.shards for _, filled in shard.units for place in filled}
        total = sum(place.nbytes for shard in plan.shards for _, filled in shard.units for place in filled)
        write_synced(
            staging.weights / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        )


def _remove_if_empty(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def expected(plan: Plan, out: Path) -> dict[str, Any]:
    """What the plan will take, for the user: sizes, memory and time of folding; nothing is written."""
    return {
        "base": str(plan.source),
        "shards": {shard.name: shard.size for shard in plan.shards},
        "touched": len(plan.folded),
        "entries": plan.entries,
        "created": list(plan.created),
        "zeros": list(plan.zeros),
        "untied": list(plan.untied),
        "config_changed": plan.corrected,
        "bytes": plan.size,
        "free": shutil.disk_usage(_existing(out)).free,
        "memory": memory_needed(plan),
        "cores": workers(),
        "seconds": seconds_expected(plan),
        "whole": len(folded_whole(plan)),
    }


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.absolute().parent)
