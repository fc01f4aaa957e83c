"""A small proven and exported folder, and timing processes that answer with times whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CASES

import reparam_export as rx
from reparam_export.folder import load_proof
from reparam_export.latency import contenders, rounds

Answers = Callable[..., None]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded Hydra case, proven and exported."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    case = CASES["hydra_vtab"]
    checkpoint = case.read()
    rx.export(rx.verify(checkpoint, rx.fuse(checkpoint), case.inputs()), "onnx", folder, batch=(1, 2, 4))
    return folder


@pytest.fixture(scope="session")
def lined_up(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> contenders.Lineup:
    return contenders.lineup(exported, load_proof(exported, again=False), None, tmp_path_factory.mktemp("line-up"))


@pytest.fixture
def once(lined_up: contenders.Lineup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of the exported folder are written once for all tests, since that takes longer than anything else in them."""
    monkeypatch.setattr(contenders, "lineup", lambda *_: lined_up)


class Synthetic:
    """In place of a timing process: 10 ms a sample times the model's factor, times noise of the round and of the run."""

    factors: dict[str, float]
    spread: float
    asked: list[dict[str, Any]]
    orders: list[list[str]]  # of the models, by process
    chance: np.random.Generator

    def __init__(self, job: Any) -> None:
        self.models = list(job.files or job.modules)
        self.orders.append(self.models)

    def __enter__(self) -> Synthetic:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request)
        if "memory" in request:
            return {"memory": {str(b): 1_000_000 * b for b in request["memory"]["batches"]}}
        times: dict[str, dict[str, list[int]]] = {}
        for batch, (cycles, models) in request["round"]["batches"].items():
            times[str(batch)] = {}
            assert set(models) <= set(self.models)
            for model in models:
                placed = self.factors.get(model, 1.0) * np.exp(self.chance.normal(0, self.spread))
                runs = 10e6 * batch * placed * np.exp(self.chance.normal(0, 0.002, cycles))
                times[str(batch)][model] = [int(t) for t in runs]
        return {"times": times}


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Synthetic]]:
    """``synthetic(fused=1.05, spread=0.005)``: from now on models take that many times as long as the base."""

    def install(spread: float = 0.005, seed: int = 0, **factors: float) -> type[Synthetic]:
        names = {name.replace("_", " "): factor for name, factor in factors.items()}
        held = {"factors": names, "spread": spread, "asked": [], "orders": [], "chance": np.random.default_rng(seed)}
        answering = type("Answering", (Synthetic,), held)
        monkeypatch.setattr(rounds, "Worker", answering)
        return answering

    return install
