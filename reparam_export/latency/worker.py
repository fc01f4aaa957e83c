"""The process that takes time: ``python -m reparam_export.latency.worker``, one JSON request a line in, one answer a line out.

    {"job": {...}}                                                              first
    {"round": {"seed": 1, "cpus": [0], "batches": {"1": [cycles, ["base", ...]]}}} -> {"times": {"1": {"base": [ns, ...], ...}}}
    {"memory": {"model": "base", "batches": [1, 4]}}                            -> {"memory": {"1": bytes, ...}}

Anything that goes wrong is answered with {"error": text}. It imports what its runner needs and no more.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from reparam_export.latency.runners import Inputs, Job, Place, runner

HIGHEST = -20  # nice value
WARMUPS = 2  # onnxruntime plans its memory in the first run of a shape and allocates it in the second, page by page


def main() -> None:
    """Answer requests until the input ends."""
    raise_priority()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    try:
        _serve(sys.stdin, out)
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}), file=out)
        out.flush()
        sys.exit(1)


def raise_priority() -> bool:
    """Where it is allowed, let other work on this machine wait for the runs; says whether it was.

    Linux weighs sessions against each other before it weighs processes (autogroups), so this one's is raised, too.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, 0, HIGHEST)
        group = Path("/proc/self/autogroup")
        if group.exists():
            group.write_text(str(HIGHEST), encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _serve(requests: IO[str], out: IO[str]) -> None:
    job = Job(**json.loads(requests.readline())["job"])
    place = runner(job.runner).load(job)
    rows = _read(job.inputs)
    for line in requests:
        request = json.loads(line)
        answer = (
            {"times": take_times(place, list(job.files or job.modules), rows, **request["round"])}
            if "round" in request
            else {"memory": take_memory(place, rows, **request["memory"])}
        )
        print(json.dumps(answer), file=out, flush=True)


def take_times(
    place: Place,
    models: list[str],
    rows: Inputs,
    *,
    seed: int,
    cpus: list[int],
    batches: Mapping[str, tuple[int, list[str]]],
) -> dict[str, dict[str, list[int]]]:
    """One round: every model placed in a random order; at each batch warm-ups, then cycles of its models in a random order."""
    _pin(cpus)
    chance = random.Random(seed)
    chance.shuffle(models)
    placed = {model: place(model) for model in models}
    times: dict[str, dict[str, list[int]]] = {}
    gc.collect()
    gc.disable()
    for batch, (cycles, chosen) in batches.items():
        inputs, order = repeated(rows, int(batch)), list(chosen)
        runs = {model: placed[model](inputs) for model in models if model in chosen}
        for run in runs.values():
            for _ in range(WARMUPS):
                run()
        found: dict[str, list[int]] = {model: [] for model in order}
        for _ in range(cycles):
            chance.shuffle(order)
            for model in order:
                found[model].append(runs[model]())
        times[batch] = found
    gc.enable()
    return times


def take_memory(place: Place, rows: Inputs, model: str, batches: list[int]) -> dict[str, int]:
    """The most bytes of this process in memory at each batch size, from the smallest on; nothing where Linux does not say.

    Asked of a fresh process that holds this one model: what was needed to load it no longer counts, placing it does. For a
    runner that brought torch to a GPU: what of the GPU's memory is used by then, and was not before.
    """
    _forget_peak()
    before = _on_gpu()
    prepare = place(model)
    found: dict[str, int] = {}
    for batch in sorted(batches):
        run = prepare(repeated(rows, batch))
        for _ in range(WARMUPS):
            run()
        used = _on_gpu()
        peak = _peak() if before is None or used is None else used - before
        if peak is not None:
            found[str(batch)] = peak
    return found


def repeated(rows: Inputs, batch: int) -> dict[str, Any]:
    """A batch of the given rows, from the first on and round again."""
    import numpy as np

    return {name: np.ascontiguousarray(array[np.arange(batch) % len(array)]) for name, array in rows.items()}


def _read(path: str) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _pin(cpus: list[int]) -> None:
    """All threads of this process, those that libraries have started as well."""
    if cpus:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), cpus)


def _on_gpu() -> int | None:
    """Bytes of the GPU that are used; None without a GPU, and for a runner that has no use for torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _forget_peak() -> None:
    with contextlib.suppress(
        OSError
    ):  # not Linux, or a container that does not allow it: the peak of loading counts too
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int | None:
    """VmHWM, which unlike getrusage's maximum does not hold that of the process it was started by."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main()
