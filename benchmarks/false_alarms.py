"""How often is ``bench`` wrong? 50 runs on two identical models, 50 runs on one with 5 % more multiply-adds.

    python -m benchmarks.false_alarms                about an hour on one core; prints the counts
    python -m benchmarks.false_alarms --runs 5       the first five of each

ViT-Tiny, onnxruntime on the CPU, batch 1, one thread, margin 1 %. "More" is the same graph with a wider MLP. Every run is kept in
benchmarks/results/false_alarms.json as soon as it ends, and is not made again; remove the file to start anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from reparam_export.exporters.onnx import write
from reparam_export.latency import machine, measurement
from reparam_export.latency.measurement import Contest
from reparam_export.latency.rounds import Models, Settings
from reparam_export.models import Input, Signature
from reparam_export.verification.graph import multiply_adds

NAME = "vit_tiny_patch16_224"
WIDER = 837 / 192  # MLP ratio, 4 in the base: 5.0 % more multiply-adds in all
RESULTS = Path(__file__).parent / "results" / "false_alarms.json"
IMAGES = Signature((Input("image", ("batch", 3, 224, 224)),), ("logits",))


def files(folder: Path) -> tuple[dict[str, Path], float]:
    """The three models as ONNX files, and how many multiply-adds the third has for one of the base."""
    paths, counts = {}, {}
    for name, ratio in (("base", 4.0), ("more", WIDER)):
        torch.manual_seed(0)
        model = timm.create_model(NAME, mlp_ratio=ratio).eval()
        paths[name] = folder / f"{name}.onnx"
        write(model, IMAGES, {"image": torch.zeros(1, 3, 224, 224)}, paths[name])
        counts[name] = multiply_adds(model, IMAGES, (torch.zeros(1, 3, 224, 224),))
    paths["same"] = Path(shutil.copy(paths["base"], folder / "same.onnx"))
    return paths, counts["more"] / counts["base"]


def run(paths: dict[str, Path], inputs: Path, subject: str, seed: int, max_time: float) -> dict[str, Any]:
    """One whole measurement of one subject."""
    started = time.monotonic()
    held = {"base": paths["base"], "base again": paths["base"], subject: paths[subject]}
    models = Models(Contest("base", "base again", subject), inputs, held)
    settings = Settings(seed=seed, max_time=max_time, memory=False)
    case = measurement(models, [1], ["onnxruntime_cpu"], settings, None).cases[0]
    ratio, control = case.ratio(subject), case.ratio("base again")
    return {
        "subject": subject,
        "seed": seed,
        "verdict": case.verdict,
        "position": ratio.look.position,
        **{name: round(getattr(ratio, name), 5) for name in ("ratio", "low", "high", "spread")},
        "control": [round(value, 5) for value in (control.ratio, control.low, control.high)],
        "rounds": ratio.rounds,
        "seconds": round(time.monotonic() - started, 1),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Run what is not there yet, then count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="of each subject")
    parser.add_argument("--max-time", type=float, default=3600, help="seconds for one run")
    given = parser.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}
    done = {(r["subject"], r["seed"]) for r in kept["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        paths, kept["multiply_adds"] = files(Path(folder))
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, image=np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32))
        for seed in range(given.runs):
            for subject in ("same", "more"):
                if (subject, seed) not in done:
                    kept["runs"].append(run(paths, inputs, subject, seed, given.max_time))
                    kept["machine"] = machine.describe()
                    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
                    print(kept["runs"][-1], flush=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"multiply-adds of more / base: {kept['multiply_adds']:.4f}")
    for subject in ("same", "more"):
        runs = [r for r in kept["runs"] if r["subject"] == subject]
        ratios = [r["ratio"] for r in runs]
        print(
            f"{subject}: {len(runs)} runs, {dict(Counter(r['verdict'] for r in runs))}, ratios {min(ratios):.4f} to {max(ratios):.4f}, "
            f"rounds {min(r['rounds'] for r in runs)} to {max(r['rounds'] for r in runs)}, "
            f"{sum(r['seconds'] for r in runs) / len(runs):.0f} s a run"
        )


if __name__ == "__main__":
    main()
