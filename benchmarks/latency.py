"""The README's latency table: base, unfused and fused models of the papers' sizes, until there is a verdict.

    python -m benchmarks.latency                     all nine, hours on two cores; prints the table and puts it into README.md
    python -m benchmarks.latency vit_tiny minilm     some of them (vit_tiny-hydra names one); the others stay as they were
    python -m benchmarks.latency --table             the table anew from benchmarks/results

Each result is kept, raw times and machine included, as benchmarks/results/latency-MODEL-KIND.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import reparam_export as rx
from benchmarks.checkpoints import KINDS, MODELS, checkpoint
from reparam_export.folder import plain_json
from reparam_export.latency import bench
from reparam_export.latency.measurement import Case, Measurement, from_json
from reparam_export.latency.rounds import Progress, Settings
from reparam_export.latency.statistics import Ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- latency: made by python -m benchmarks.latency -->", "<!-- /latency -->"
NAMES = {"vit_tiny": "ViT-Tiny", "vit_base": "ViT-Base", "minilm": "MiniLM-L6"}
TITLES = {"hydra": "Hydra", "glora": "GLoRA", "lora": "LoRA"}
RUNNERS = {
    "vit_tiny": ("onnxruntime_cpu", "torch_eager"),
    "vit_base": ("onnxruntime_cpu",),
    "minilm": ("onnxruntime_cpu", "torch_eager"),
}
HEAD = (
    "| model | adapter | runner | batch | base ms | unfused / base | fused / base | base again / base | rounds | fused: |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|---|\n"
)


def measure(model: str, kind: str, max_time: float) -> Measurement:
    """Make the checkpoint, fuse, prove and export it, then time it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        inputs = checkpoint(model, kind, folder / "ckpt.pt")
        opened = rx.read(folder / "ckpt.pt")
        proven = rx.verify(opened, rx.fuse(opened), inputs, count=2)
        rx.export(proven, "onnx", folder / "out", batch=(1, 1, 2))
        settings = Settings(max_time=max_time)
        return bench(folder / "out", runners=RUNNERS[model], settings=settings, progress=_progress(f"{model}-{kind}"))


def _progress(name: str) -> Progress:
    return lambda title, rounds, left: print(
        f"\r{name}, {title}: round {rounds}, {left / 60:.0f} min left ", end="", flush=True
    )


def table() -> str:
    """The rows of all results that there are, and the machines they were made on."""
    rows: list[str] = []
    machines: dict[str, list[float]] = {}
    for model in MODELS:
        for kind in KINDS:
            path = RESULTS / f"latency-{model}-{kind}.json"
            if path.is_file():
                found = from_json(json.loads(path.read_text(encoding="utf-8")))
                rows += [_row(model, kind, case) for case in found.cases]
                machines.setdefault(_machine(found), []).extend(found.machine[at]["load"] for at in ("before", "after"))
    lines = (f"{machine}; load {min(load):.1f} to {max(load):.1f}.\n" for machine, load in machines.items())
    return HEAD + "".join(rows) + "\n" + "".join(lines)


def _row(model: str, kind: str, case: Case) -> str:
    fused, adapted, again = (case.ratio(name) for name in ("fused", "adapted", "base again"))
    base = next(times.p50 for times in case.times if times.model == "base")
    cells = (
        NAMES[model],
        TITLES[kind],
        case.title,
        str(case.batch),
        f"{base:.0f}" if base >= 100 else f"{base:.1f}",
        *map(_factor, (adapted, fused, again)),
        str(fused.rounds),
        case.verdict,
    )
    return f"| {' | '.join(cells)} |\n"


def _factor(ratio: Ratio) -> str:
    return f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _machine(found: Measurement) -> str:
    machine, versions = found.machine, found.machine["versions"]
    return (
        f"Measured on {machine['processor']}, {machine['usable CPUs']} CPUs ({machine['system']}), {found.settings['threads']} thread, "
        f"onnxruntime {versions['onnxruntime-gpu']}, torch {versions['torch']}"
    )


def write_table() -> None:
    """Print the table and put it between its marks in README.md."""
    text = table()
    print(text)
    readme = ROOT / "README.md"
    content = readme.read_text(encoding="utf-8")
    readme.write_text(f"{content.split(BEGIN)[0]}{BEGIN}\n{text}{END}{content.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Measure what was asked for; what is there already is measured again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models, or MODEL-KIND")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--max-time", type=float, default=7200, help="seconds for each of the nine")
    given = parser.parse_args()
    wanted = [(m, k) for m in MODELS for k in KINDS if not given.names or {m, f"{m}-{k}"} & set(given.names)]
    RESULTS.mkdir(exist_ok=True)
    for model, kind in [] if given.table else wanted:
        found = measure(model, kind, given.max_time)
        path = RESULTS / f"latency-{model}-{kind}.json"
        path.write_text(json.dumps(plain_json(asdict(found)), separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"\n{model}, {kind}: {found.verdict}, {found.seconds:.0f} s", flush=True)
    write_table()


if __name__ == "__main__":
    main()
