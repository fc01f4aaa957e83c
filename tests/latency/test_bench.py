"""``bench``: the real thing on a small model, and the whole of it on times whose truth is known."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CASES

import reparam_export as rx
from reparam_export.errors import CheckpointError, EquivalenceError, ExportError, MissingBackendError, UsageError
from reparam_export.files import exported_sha256
from reparam_export.folder import plain_json, save_evidence, save_fused
from reparam_export.latency import bench, contenders, measurement, rounds
from reparam_export.latency.measurement import Contest, from_json, verdict_of
from reparam_export.latency.rounds import Models, Settings, Worker, WorkerError
from reparam_export.latency.runners import Job, names, runner
from reparam_export.latency.statistics import judged
from reparam_export.latency.worker import WARMUPS, repeated

FEW = Settings(rounds=2, cycles=2, max_time=300, memory=False)


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "latency.json").read_text())
    return found


@pytest.fixture(scope="module")
def measured(exported: Path) -> rx.Measurement:
    return bench(exported, batches=(1, 3), settings=FEW)


def test_every_runner_that_is_there_times_all_four_models_at_every_batch_size(measured: rx.Measurement) -> None:
    usable = [name for name in names() if not runner(name).missing() and runner(name).TAKES != "engine"]
    assert {(c.runner, c.batch) for c in measured.cases} == {(name, batch) for name in usable for batch in (1, 3)}
    assert {"onnxruntime_cpu", "torch_eager", "torch_compile"} <= set(usable)
    for case in measured.cases:
        assert list(case.raw) == ["base", "base again", "adapted", "fused"] or set(case.raw) == set(
            measured.contest.models
        )
        assert all(len(rounds) == 2 and all(len(r) == 2 and min(r) > 0 for r in rounds) for rounds in case.raw.values())
        assert [ratio.over for ratio in case.ratios] == ["fused", "adapted", "base again"]
        assert [t.model for t in case.times] == ["base", "base again", "adapted", "fused"]
        assert all(0 < t.p50 <= t.p90 <= t.p99 for t in case.times)
        assert case.verdict == "undecided"
        assert "more rounds" in case.said
    assert measured.verdict == "undecided"


def test_what_cannot_run_here_says_so_and_the_rest_goes_on(measured: rx.Measurement) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.fail("this test is about a machine without a GPU")
    assert set(measured.skipped) == {"onnxruntime, CUDA", "TensorRT"}
    assert all("no GPU" in why or "CUDA" in why for why in measured.skipped.values())


def test_the_structure_of_base_unfused_and_fused_stands_side_by_side(measured: rx.Measurement, exported: Path) -> None:
    import onnx

    assert measured.structure is not None
    base, adapted, fused = measured.structure.sizes
    assert [s.model for s in measured.structure.sizes] == ["base", "adapted", "fused"]
    assert replace(base, model="fused", file_bytes=fused.file_bytes) == fused
    assert measured.structure.differences == ()
    nodes = [node.op_type for node in onnx.load(exported / "model.onnx").graph.node]
    assert fused.nodes == len(nodes)
    assert fused.operators["MatMul"] == nodes.count("MatMul")
    added = {name: adapted.operators[name] - base.operators.get(name, 0) for name in adapted.operators}
    assert {name: n for name, n in added.items() if n} == {"Add": 36, "MatMul": 24, "Mul": 12}
    assert adapted.nodes - base.nodes == 72
    extra = {"attn.proj": 4 * (96 + 96) * 2, "mlp.fc2": 4 * (384 + 96) + 4 * (96 + 96)}  # multiply-adds of one token
    assert adapted.multiply_adds - base.multiply_adds == 3 * sum(extra.values()) * (1 + 16)
    assert adapted.parameters > base.parameters == fused.parameters
    assert adapted.stored_bytes - base.stored_bytes == 4 * (adapted.parameters - base.parameters)


def test_the_exported_file_itself_is_what_is_timed(measured: rx.Measurement, exported: Path) -> None:
    artifact = json.loads((exported / "artifact.json").read_text())["artifacts"][0]
    assert measured.artifact_sha256 == artifact["sha256"]
    assert measured.weights_sha256 == artifact["weights_sha256"]


def test_raw_times_machine_and_settings_are_kept_and_come_back(measured: rx.Measurement, exported: Path) -> None:
    content = read(exported)
    assert from_json(content) == from_json(plain_json(asdict(measured)))
    assert from_json(content).cases[0].raw == measured.cases[0].raw
    assert content["machine"]["processor"]
    assert content["machine"]["versions"]["torch"]
    assert content["settings"]["threads"] == 1
    assert not list(exported.glob(".bench-*"))


@pytest.mark.parametrize(
    "damage", [{"margin": "wide"}, {"cases": 3}, {"verdict": "fine"}, {"contest": {"base": "a"}}, {"skipped": []}]
)
def test_a_damaged_measurement_is_refused(measured: rx.Measurement, damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"should be|missing"):
        from_json({**plain_json(asdict(measured)), **damage})


def test_a_model_with_much_more_work_is_called_so_for_real(tmp_path: Path) -> None:
    import torch

    from reparam_export.exporters.onnx import write
    from reparam_export.models import Input, Signature

    signature = Signature((Input("x", ("batch", 64, 256)),), ("output",))
    files = {}
    for name, width in (("A", 256), ("B", 2048)):
        layers = torch.nn.Sequential(torch.nn.Linear(256, width), torch.nn.GELU(), torch.nn.Linear(width, 256)).eval()
        files[name] = tmp_path / f"{name}.onnx"
        write(layers, signature, {"x": torch.randn(2, 64, 256)}, files[name])
    np.savez(tmp_path / "inputs.npz", x=np.random.default_rng(0).standard_normal((1, 64, 256), dtype=np.float32))
    files["A again"] = files["A"]
    models = Models(Contest("A", "A again", "B"), tmp_path / "inputs.npz", files)
    found = measurement(models, [1], ["onnxruntime_cpu"], Settings(rounds=10, cycles=3, margin=0.5), None)
    assert found.cases[0].ratio("B").look.position == "above"
    assert found.cases[0].ratio("B").ratio > 2


def test_without_an_export_it_is_written_for_the_measurement_and_new_weights_take_that_away(
    tmp_path: Path, synthetic: Any
) -> None:
    synthetic()
    folder = proven(tmp_path)
    found = bench(folder, batches=(1,), runners=("onnxruntime_cpu",), settings=Settings(rounds=1))
    assert found.artifact_sha256 == ""
    assert found.structure is not None
    assert found.structure.differences == ()
    assert not (folder / "model.onnx").exists()
    assert (folder / "latency.json").is_file()
    checkpoint = CASES["hydra_vtab"].read()
    save_fused(folder, checkpoint, rx.fuse(checkpoint, "bf16"))
    assert not (folder / "latency.json").exists()


def proven(tmp_path: Path, dtype: str | None = None) -> Path:
    case, folder = CASES["hydra_vtab"], tmp_path / "out"
    checkpoint = case.read()
    save_evidence(folder, rx.verify(checkpoint, rx.fuse(checkpoint, dtype), case.inputs()))
    return folder


def test_precision_follows_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic: Any) -> None:
    synthetic()
    case = CASES["hydra_vtab"]
    checkpoint = case.read()
    model = rx.verify(checkpoint, rx.fuse(checkpoint), case.inputs())
    rx.export(model, "onnx", tmp_path, precision="fp16", batch=(1, 1, 2))
    seen: list[dict[str, Path]] = []
    real = contenders.file_facts
    monkeypatch.setattr(contenders, "file_facts", lambda file: (seen.append(file), real(file))[1])
    found = bench(tmp_path, batches=(1,), runners=("onnxruntime_cpu",), settings=Settings(rounds=1))
    assert found.artifact_sha256
    assert [f.parent.name for f in seen] == ["lowered", "lowered", tmp_path.name]  # type: ignore[attr-defined]
    assert found.structure is not None
    base, _, fused = found.structure.sizes
    assert abs(base.file_bytes / fused.file_bytes - 1) < 0.01
    assert base.stored_bytes > 1.5 * base.file_bytes


def test_what_folding_added_is_named(tmp_path: Path, synthetic: Any) -> None:
    synthetic()
    case = CASES["glora_llama"]
    checkpoint = case.read()
    model = rx.verify(checkpoint, rx.fuse(checkpoint), case.inputs())
    save_evidence(tmp_path, model)
    found = bench(tmp_path, batches=(1,), runners=("onnxruntime_cpu",), settings=Settings(rounds=1))
    assert found.structure is not None
    assert found.structure.added == tuple(model.weights.created)
    assert len(found.structure.added) == 10
    base, _, fused = found.structure.sizes
    assert fused.operators["Add"] - base.operators["Add"] == 10
    assert found.structure.differences
    assert any("makes its whole weight anew" in note for note in found.notes)


# Times whose truth is known, through all of it but the timing process.

Install = Callable[..., Any]


def run(*batches: int, name: str = "onnxruntime_cpu", **settings: Any) -> rx.Measurement:
    """The whole measurement but for the line-up's files, which no synthetic process opens."""
    contest = Contest("base", "base again", "fused", ("adapted",))
    files, modules = ({m: Path(f"{m}.onnx") for m in contest.models}, {m: ("out", m) for m in contest.models})
    models = Models(contest, Path("inputs.npz"), files, modules)
    return measurement(models, batches or (1,), [name], Settings(**{"max_time": 60.0, **settings}), None)


def test_equal_models_cost_nothing_and_the_run_ends_with_the_verdict(synthetic: Install) -> None:
    answering = synthetic(adapted=1.12, seed=1)
    found = run()
    assert found.verdict == "no added cost"
    rounds = found.cases[0].ratio("fused").rounds
    assert rounds in (10, 15, 22, 33)
    assert found.cases[0].ratio("adapted").look.position == "above"
    assert 1.10 < found.cases[0].ratio("adapted").low < 1.12 < found.cases[0].ratio("adapted").high < 1.14
    assert (
        sum("round" in request for request in answering.asked) == rounds + 1
    )  # the first says how many cycles make a round
    assert found.cases[0].times[0].memory == 1_000_000


@pytest.mark.parametrize("name", ["onnxruntime_cpu", "torch_eager", "torch_compile"])
def test_every_round_is_a_new_process_that_loads_the_models_in_another_order(synthetic: Install, name: str) -> None:
    answering = synthetic()
    run(name=name, memory=False)
    assert len(answering.orders) == len(answering.asked) > 10
    rounds = answering.orders[1:]  # the first says how many cycles make a round
    assert len({tuple(order) for order in rounds}) > 5
    assert {frozenset(order) for order in rounds} == {frozenset({"base", "base again", "adapted", "fused"})}


def test_a_model_that_is_decided_is_not_timed_any_more_and_the_base_always_is(synthetic: Install) -> None:
    answering = synthetic(spread=0.012, seed=1, adapted=1.2, fused=1.005)
    case = run(rounds=120, memory=False).cases[0]
    rounds = {model: len(times) for model, times in case.raw.items()}
    assert rounds["adapted"] == 10  # the first look
    assert rounds["adapted"] < rounds["base again"] < rounds["fused"] == rounds["base"]
    assert all(case.ratio(model).rounds == rounds[model] for model in ("adapted", "base again", "fused"))
    assert case.ratio("adapted").look.rounds == 10
    assert case.ratio("base again").look.position == "within"
    asked = [request["round"]["batches"][1][1] for request in answering.asked]
    assert asked[0] == ("base",)
    assert [len(models) for models in asked[1:]] == sorted((len(models) for models in asked[1:]), reverse=True)
    assert len(answering.orders[-1]) == len(asked[-1]) == 2


def test_five_percent_more_is_added_cost(synthetic: Install) -> None:
    synthetic(fused=1.05)
    assert run().verdict == "added cost"


def test_faster_than_the_base_is_no_added_cost_and_says_so(synthetic: Install) -> None:
    synthetic(fused=0.9)
    found = run()
    assert found.verdict == "no added cost"
    assert found.cases[0].said == "no added cost: faster than the base"


def test_a_control_outside_the_margin_withholds_the_verdict(synthetic: Install) -> None:
    synthetic(base_again=1.04)
    found = run()
    assert found.verdict == "withheld"
    assert "differs from itself by +" in found.cases[0].said


def test_a_control_that_is_not_decided_withholds_the_verdict_and_says_what_is_missing() -> None:
    equal = judged("fused", "base", np.random.default_rng(0).normal(0, 0.004, 20), 0.01)
    noisy = judged("base again", "base", np.random.default_rng(0).normal(0, 0.03, 20), 0.01)
    verdict, said = verdict_of(equal, noisy)
    assert verdict == "withheld"
    assert f"{noisy.more} more rounds" in said
    assert verdict_of(noisy, equal)[0] == "undecided"


def test_a_noisy_machine_is_undecided_with_a_number_of_rounds_that_decides(synthetic: Install) -> None:
    synthetic(spread=0.02, seed=2)
    found = run(rounds=22)
    assert found.verdict == "undecided"
    more = max(ratio.more or 0 for ratio in found.cases[0].ratios if ratio.over != "adapted")
    synthetic(spread=0.02, seed=2)
    assert 22 < 22 + more < 1000
    assert run(rounds=2 * (22 + more)).verdict == "no added cost"


def test_a_batch_size_that_is_decided_costs_nothing_more(synthetic: Install) -> None:
    answering = synthetic(spread=0.012, seed=1)
    run(1, 2, 8)
    asked = [list(request["round"]["batches"]) for request in answering.asked if "round" in request]
    assert asked[0] == [1, 2, 8]
    assert len(asked[-1]) < 3
    lengths = [len(batches) for batches in asked]
    assert lengths == sorted(lengths, reverse=True)


def test_the_end_of_the_time_is_kept_but_there_is_one_round(
    synthetic: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = synthetic(spread=0.1)
    started, real = time.monotonic(), answering.ask

    def slow(self: Any, **request: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return real(self, **request)

    monkeypatch.setattr(answering, "ask", slow)
    found = run(max_time=0.0)
    assert found.cases[0].ratio("fused").rounds == 1
    assert found.verdict == "undecided"
    assert time.monotonic() - started < 60


def test_ctrl_c_keeps_what_was_measured(
    exported: Path, once: None, synthetic: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = synthetic()
    real = answering.ask

    def interrupted(self: Any, **request: Any) -> dict[str, Any]:
        if sum("round" in r for r in self.asked) == 6:
            raise KeyboardInterrupt
        return real(self, **request)

    monkeypatch.setattr(answering, "ask", interrupted)
    found = bench(exported, batches=(1,), runners=("onnxruntime_cpu",))
    assert found.cases[0].ratio("fused").rounds == 5
    assert read(exported)["verdict"] == "undecided"


def test_a_timing_process_that_dies_takes_no_rounds_with_it(
    synthetic: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = synthetic()
    real = answering.ask

    def dying(self: Any, **request: Any) -> dict[str, Any]:
        if sum("round" in r for r in self.asked) == 6:
            raise WorkerError("the timing process ended with code -9")
        return real(self, **request)

    monkeypatch.setattr(answering, "ask", dying)
    found = run()
    assert found.cases[0].ratio("fused").rounds == 5
    assert found.verdict == "undecided"
    assert found.skipped == {"onnxruntime, CPU": "ended early: the timing process ended with code -9"}


def test_a_round_of_long_runs_has_few_cycles_and_one_of_short_runs_many(synthetic: Install) -> None:
    answering = synthetic()
    run(1, 16, 640, rounds=1)
    plans = next(r["round"]["batches"] for r in answering.asked[::-1] if "round" in r)
    assert {batch: cycles for batch, (cycles, _) in plans.items()} == {1: 25, 16: 6, 640: 4}


# The timing process.


def job(folder: Path, name: str = "onnxruntime_cpu", file: str = "model.onnx") -> Job:
    inputs = folder / "inputs.npz"
    np.savez(inputs, image=np.zeros((2, 3, 32, 32), np.float32))
    files = {} if name.startswith("torch") else {"a": str(folder / file)}
    return Job(name, str(inputs), files, {"a": (str(folder), "fused")} if name.startswith("torch") else {})


def test_the_timing_process_is_pinned_and_single_threaded(exported: Path) -> None:
    with Worker(job(exported)) as worker:
        pid = worker._process.pid
        worker.ask(round={"seed": 0, "cpus": [0], "batches": {1: (1, ["a"])}})
        assert os.sched_getaffinity(pid) == {0}
        threads = {os.sched_getaffinity(int(t.name)) == {0} for t in Path(f"/proc/{pid}/task").iterdir()}
        assert threads == {True}
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"OMP_NUM_THREADS=1" in environment


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")
def test_after_the_warm_ups_onnxruntime_has_all_of_its_memory(tmp_path: Path) -> None:
    import resource

    import torch

    from reparam_export.exporters.onnx import write
    from reparam_export.models import Input, Signature

    layers = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 256)).eval()
    signature = Signature((Input("x", ("batch", 64, 256)),), ("output",))
    write(layers, signature, {"x": torch.randn(2, 64, 256)}, tmp_path / "model.onnx")
    place = runner("onnxruntime_cpu").load(Job("onnxruntime_cpu", "", {"a": str(tmp_path / "model.onnx")}, {}))
    run = place("a")({"x": np.zeros((32, 64, 256), np.float32)})

    def pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    found = [pages() for _ in range(WARMUPS + 3)]
    assert min(found[:WARMUPS]) > 1000 > 10 * max(found[WARMUPS:])


@pytest.mark.parametrize("name", ["onnxruntime_cpu", "torch_eager"])
def test_memory_is_that_of_one_model_in_a_process_of_its_own(exported: Path, name: str) -> None:
    found = rounds.peak_memory(job(exported, name), Contest("a", "a again", "a"), [1, 2])
    assert set(found) == {1, 2}
    assert 20_000_000 < found[1]["a"] <= found[2]["a"] < 4_000_000_000


def test_a_file_that_cannot_be_loaded_is_a_reason_not_a_crash(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not onnx")
    with Worker(job(tmp_path)) as worker, pytest.raises(WorkerError, match=r"\w"):
        worker.ask(round={"seed": 0, "cpus": [0], "batches": {1: (1, ["a"])}})


def test_a_timing_process_that_is_killed_is_an_error_with_its_signal(exported: Path) -> None:
    with Worker(job(exported)) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        with pytest.raises(WorkerError, match="code -9, killed: out of memory"):
            worker.ask(round={"seed": 0, "cpus": [0], "batches": {1: (1, ["a"])}})


def test_no_timing_process_is_left_behind(exported: Path) -> None:
    with Worker(job(exported)) as worker:
        process = worker._process
    assert process.poll() is not None


def test_a_batch_is_filled_with_the_samples_again_and_again() -> None:
    rows = {"x": np.arange(3)[:, None]}
    assert repeated(rows, 7)["x"][:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert repeated(rows, 2)["x"][:, 0].tolist() == [0, 1]


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, "batch sizes"),
        ({"batches": (1, 1)}, "batch sizes"),
        ({"batches": (0,)}, "batch sizes"),
        ({"settings": Settings(margin=0.0)}, "margin"),
        ({"settings": Settings(threads=4096)}, "threads"),
        ({"runners": ("abacus",)}, "abacus"),
    ],
)
def test_wrong_options_are_refused_before_any_work(exported: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(exported, **options)


def test_a_runner_that_is_asked_for_and_not_there_is_an_error(exported: Path) -> None:
    with pytest.raises(MissingBackendError, match="GPU"):
        bench(exported, runners=("tensorrt",))


def test_an_unproven_folder_has_no_latency_to_speak_of(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fuse"):
        bench(tmp_path)
    folder = proven(tmp_path)
    content = json.loads((folder / "verification.json").read_text())
    (folder / "verification.json").write_text(json.dumps({**content, "weights_sha256": "0" * 64}))
    with pytest.raises(EquivalenceError, match="verify"):
        bench(folder)


def test_a_file_that_changed_since_its_export_is_not_timed(exported: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="changed since it was exported"):
        bench(folder)


def test_nothing_that_can_be_timed_is_an_error(
    exported: Path, synthetic: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = synthetic()

    def fail(self: Any, **request: Any) -> dict[str, Any]:
        raise WorkerError("no kernel for bfloat16")

    monkeypatch.setattr(answering, "ask", fail)
    with pytest.raises(ExportError, match="no kernel for bfloat16"):
        bench(exported, settings=FEW)


def test_engines_of_base_unfused_and_fused_stand_side_by_side(tmp_path: Path, synthetic: Install) -> None:
    synthetic()
    case = CASES["hydra_vtab"]
    checkpoint = case.read()
    model = rx.verify(checkpoint, rx.fuse(checkpoint), case.inputs())
    rx.export(model, "trt", tmp_path, batch=(1, 2, 4), gpus=("sm89",))
    found = bench(tmp_path, batches=(1,), runners=("onnxruntime_cpu",), settings=Settings(rounds=1))
    assert found.structure is not None
    base, adapted, fused = found.structure.engines
    assert [e["model"] for e in found.structure.engines] == ["base", "adapted", "fused"]
    assert base["layers"] == fused["layers"]
    assert adapted["layers"]["MATRIX_MULTIPLY"] == base["layers"]["MATRIX_MULTIPLY"] + 24
    assert fused["plan_bytes"] == (tmp_path / "model.engine").stat().st_size
    assert found.engine_sha256 == exported_sha256(tmp_path / "model.engine")
    assert abs(base["plan_bytes"] / fused["plan_bytes"] - 1) < 0.01
    assert adapted["plan_bytes"] > base["plan_bytes"] + 4 * 6 * 4 * 96
    assert "cannot be opened without a GPU" in base["source"]
    assert found.skipped == {}


def test_a_precision_that_a_runner_lacks_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    folder = proven(tmp_path)
    found = bench(
        folder, batches=(1,), precision="bf16", settings=Settings(rounds=1, cycles=1, max_time=300, memory=False)
    )
    assert "onnxruntime, CPU" in found.skipped or any(c.runner == "onnxruntime_cpu" for c in found.cases)
    assert {"torch_eager", "torch_compile"} <= {c.runner for c in found.cases}
