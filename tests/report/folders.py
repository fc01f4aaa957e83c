"""Output folders as the stages before the report leave them, built from the real dataclasses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from reparam_export.exporters.artifact import Artifact
from reparam_export.latency.measurement import Case, Contest, Measurement, Size, Structure, case_of, overall
from reparam_export.verification.certificate import (
    CarriedEvidence,
    Certificate,
    GraphEvidence,
    LayerEvidence,
    OutputEvidence,
)

WEIGHTS = "3f1c" * 16
OTHER = "aaaa" * 16

FUSED: dict[str, Any] = {
    "checkpoint": {
        "path": "runs/pets/hydra.pt",
        "sha256": "9b0d" * 16,
        "format": "hydra",
        "kinds": {"hydra": 24},
        "modules": 24,
        "rank": [2],
        "settings": {"scale": 3.0, "path": "both"},
        "files": ["hydra.pt"],
        "notes": ["the classifier head is part of the checkpoint"],
    },
    "base": {"spec": "timm:vit_base_patch16_224", "weights": "vit.safetensors", "weights_sha256": "77e1" * 16},
    "compute": "float64",
    "storage": {"float32": 152},
    "weights_sha256": WEIGHTS,
    "changed": {"blocks.0.attn.proj.weight": [768, 768], "blocks.0.attn.proj.bias": [768]},
    "created": [],
    "bytes": 346_270_000,
    "seconds": 2.41,
}


def layer(module: str = "blocks.0.attn.proj", **changes: Any) -> LayerEvidence:
    return replace(
        LayerEvidence(
            module=module,
            kind="hydra",
            tensors=(f"{module}.weight", f"{module}.bias"),
            shape=(768, 768),
            dtype="float32",
            method="exhaustive",
            entries=590_592,
            exact_entries=590_592,
            max_error=5.9e-9,
            bound_ratio=0.98,
            survival=0.99998,
            verdict="exact",
        ),
        **changes,
    )


def output(**changes: Any) -> OutputEvidence:
    return replace(
        OutputEvidence(
            model="fused",
            output="logits",
            batch=1,
            samples=64,
            dtype="float32",
            magnitude=12.4,
            error=3.1e-7,
            floor=4.2e-7,
            bound=1.6e-6,
            agree=1.0,
            passed=True,
        ),
        **changes,
    )


def graph(**changes: Any) -> GraphEvidence:
    return replace(
        GraphEvidence(
            nodes_base=617,
            nodes_fused=617,
            operators={"MatMul": 72, "Add": 146, "LayerNormalization": 25, "Softmax": 12, "Gelu": 12, "Reshape": 60},
            differences=(),
            added=(),
            parameters_base=86_567_656,
            parameters_fused=86_567_656,
            bytes_base=346_270_624,
            bytes_fused=346_270_624,
            macs_base=17_563_830_000,
            macs_fused=17_563_830_000,
        ),
        **changes,
    )


def certificate(**changes: Any) -> Certificate:
    return replace(
        Certificate(
            weights_sha256=WEIGHTS,
            checkpoint={"path": "runs/pets/hydra.pt"},
            base={"spec": "timm:vit_base_patch16_224"},
            storage={"float32": 152},
            layers=tuple(layer(f"blocks.{index // 2}.{('attn.proj', 'mlp.fc2')[index % 2]}") for index in range(24)),
            carried=CarriedEvidence(compared=104, equal=104, replaced=("head.weight", "head.bias"), different=()),
            outputs=(output(), output(batch=8, error=4.0e-7)),
            graph=graph(),
            survival=0.99998,
            seed=7,
            samples={"source": "random", "count": 64},
            unexercised=(),
            versions={"reparam-export": "0.1.0", "torch": "2.9.1"},
        ),
        **changes,
    )


def artifact(**changes: Any) -> Artifact:
    return replace(
        Artifact(
            target="onnx",
            path="model.onnx",
            precision="fp16",
            size=173_512_884,
            sha256="c0de" * 16,
            weights_sha256=WEIGHTS,
            ran=True,
            note="Exported at opset 20 and run on the CPU.",
            outputs=(output(model="onnx fp16", error=2.2e-3, floor=2.0e-3, bound=8.1e-3, dtype="float16"),),
            kept_fp32=(("blocks.0.norm1", "sum of squares over 65504"),),
            details={"opset": 20, "seconds": 4.2},
        ),
        **changes,
    )


def measurement(fused: float = 1.0, again: float = 1.0, spread: float = 0.002, rounds: int = 22) -> Measurement:
    """A measurement whose times are drawn, so that all that follows from them is real."""
    contest = Contest("base", "base again", "fused", ("adapted",))
    chance = np.random.default_rng(0)
    factors = {"base": 1.0, "base again": again, "adapted": 1.12, "fused": fused}

    def case(runner: tuple[str, str], batch: int) -> Case:
        raw = {
            model: [
                [int(t) for t in 28e6 * batch * factor * np.exp(chance.normal(0, spread) + chance.normal(0, 0.004, 9))]
                for _ in range(rounds)
            ]
            for model, factor in factors.items()
        }
        return case_of(contest, runner, batch, raw, margin=0.01, memory=dict.fromkeys(factors, 114_000_000 + batch))

    cpu, eager = ("onnxruntime_cpu", "onnxruntime, CPU"), ("torch_eager", "torch, eager")
    cases = tuple(case(runner, batch) for runner in (cpu, eager) for batch in (1, 4, 16))
    same = {"Add": 73, "MatMul": 72, "Softmax": 12}
    base = Size("base", 455, same, 165, 22_961_150, 5_717_416, 22_869_664, 1_074_851_328)
    adapted = replace(base, model="adapted", nodes=743, operators={**same, "Add": 217, "MatMul": 168, "Mul": 48})
    return Measurement(
        contest=contest,
        margin=0.01,
        confidence=0.95,
        verdict=overall([c.verdict for c in cases]),
        cases=cases,
        skipped={"onnxruntime, CUDA": "there is no GPU here", "TensorRT": "there is no GPU here"},
        settings={"threads": 1, "seed": 0, "batches": [1, 4, 16]},
        machine={
            "processor": "EPYC <7B13>",
            "memory": 25_276_514_304,
            "before": {"load": 0.4},
            "after": {"load": 0.9},
            "versions": {"onnxruntime-gpu": "1.31.1"},
        },
        seconds=312.0,
        weights_sha256=WEIGHTS,
        artifact_sha256="c0de" * 16,
        structure=Structure((base, adapted, replace(base, model="fused")), (), ()),
        notes=("unfused, glora makes its whole weight anew at every call",),
    )


def audited(exported: Artifact, **changes: Any) -> dict[str, Any]:
    audit = {
        "fused_tensors": 48,
        "bitwise": [f"blocks.{index}.attn.proj.weight" for index in range(40)],
        "relaid": ["head.weight"],
        "adapter_tensors_found": [],
        "precisions": {"float16": 210, "float32": 25},
    }
    return {**asdict(exported), "audit": {**audit, **changes}}


def write(
    folder: Path,
    *,
    fused: dict[str, Any] | None = None,
    proof: Certificate | dict[str, Any] | None = None,
    artifacts: list[Artifact | dict[str, Any]] | None = None,
    latency: Measurement | None = None,
) -> Path:
    """The folder, with the files that are given."""
    dump(folder / "fused.json", FUSED if fused is None else fused)
    if proof is not None:
        dump(folder / "verification.json", proof.to_json() if isinstance(proof, Certificate) else proof)
    if artifacts is not None:
        plain = [asdict(each) if isinstance(each, Artifact) else each for each in artifacts]
        dump(folder / "artifact.json", {"artifacts": plain})
    if latency is not None:
        dump(folder / "latency.json", asdict(latency))
    return folder


def dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
