"""A ``latency.json`` that is damaged, or says what its own raw times do not, is refused in one sentence, never shown or a fault."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from folders import FUSED, WEIGHTS, artifact, audited, certificate, dump, measurement, write

from reparam_export.errors import CheckpointError, ReparamError
from reparam_export.folder import plain_json
from reparam_export.report import latency_plots, write_report

REAL = Path(__file__).parents[2] / "benchmarks" / "results" / "latency-vit_base-hydra.json"
NASTY = (
    *(None, True, -1, 0, 0.5, 1e308, -1e308, 1e-300, 10**400, float("nan"), float("inf"), "nan", "inf"),
    *("", "$\\frac{$", "<b>\u202e", [], {}, [[]], [None], {"a": None}),
)


def huge(_: object) -> int:
    """What no float can hold."""
    return 10**400


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """One case of ten rounds, as JSON, with the structure of engines beside that of files."""
    content: dict[str, Any] = json.loads(json.dumps(plain_json(asdict(measurement(rounds=10)))))
    content["cases"] = content["cases"][:1]
    content["verdict"] = content["cases"][0]["verdict"]
    row = {"model": "base", "layers": {"MATRIX_MULTIPLY": 73}, "plan_bytes": 9, "source": "network as parsed"}
    content["structure"]["engines"] = [row]
    content["engine_sha256"] = "e9" * 32
    return content


def folder(place: Path, content: dict[str, Any]) -> Path:
    """A proven folder in which nothing was changed: there is little to draw in it but the latency."""
    proof = certificate(layers=(), outputs=())
    plan = audited(artifact(path="model.engine", target="trt", sha256="e9" * 32))
    write(place, fused={**FUSED, "changed": {}}, proof=proof, artifacts=[artifact(), plan])
    dump(place / "latency.json", content)
    return place


def refused(place: Path, content: dict[str, Any]) -> str:
    with pytest.raises(
        CheckpointError, match=r"latency\.json is damaged: .*Run `reparam-export bench .*` again"
    ) as raised:
        write_report(folder(place, content))
    return str(raised.value)


def changed(content: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value there; a function is given the one that was there."""
    content = copy.deepcopy(content)
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value
    return content


def times(factor: int) -> Callable[[list[list[int]]], list[list[int]]]:
    return lambda rounds: [[factor * t for t in runs] for runs in rounds]


def case(*path: str | int) -> tuple[str | int, ...]:
    return ("cases", 0, *path)


def test_what_is_whole_is_shown(tmp_path: Path, small: dict[str, Any]) -> None:
    assert write_report(folder(tmp_path, small)).latency == "no added cost"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("cases",), [], "cases: there is none"),
        (("cases",), lambda cases: cases * 2, "stands there twice"),
        (("verdict",), "added cost", "verdict 'added cost', its cases give 'no added cost'"),
        (case("verdict"), "added cost", "its ratios give 'no added cost'"),
        (case("said"), "faster", "its ratios give 'no added cost'"),
        (("contest", "base"), "nobody", "expected ['nobody'"),
        (("contest", "subject"), "nobody", "'nobody'"),
        (("contest", "control"), "nobody", "'nobody'"),
        (("contest", "others"), ["base"], "names a model twice"),
        *((("margin",), margin, "margin") for margin in (-1, 0, 1, 1e308, huge, "nan", float("nan"), -0.01)),
        (("confidence",), 0.99, "confidence 0.99"),
        (("seconds",), "inf", "seconds inf"),
        (("machine", "memory"), huge, "memory should be int"),
        (("machine", "before"), [1], "before should be dict"),
        (("machine", "versions"), "1.0", "versions should be dict"),
        (("structure", "sizes", 0, "nodes"), -1, "a count of -1"),
        (("structure", "sizes", 0, "file_bytes"), huge, "file_bytes should be int"),
        (("structure", "engines", 0), {"model": "base"}, "layers is missing"),
        (("structure", "engines", 0, "plan_bytes"), huge, "plan_bytes should be int"),
        (case("batch"), 0, "batch size is below 1"),
        (case("times"), lambda given: given[:-1], "times of"),
        (case("times", 0, "p50"), 1.0, "the times of base do not follow"),
        (case("times", 0, "runs"), 1, "the times of base do not follow"),
        (case("times", 0, "memory"), huge, "memory should be int"),
        (case("times", 0, "memory"), -1, "memory of base is below 0"),
    ],
)
def test_numbers_that_cannot_be_are_named(
    tmp_path: Path, small: dict[str, Any], path: tuple[str | int, ...], value: Any, said: str
) -> None:
    assert said in refused(tmp_path, changed(small, path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (case("ratios"), [], "ratios of []"),
        (case("ratios"), lambda given: given[::-1], "ratios of"),
        (case("ratios", 0, "under"), "fused", "the base is 'base'"),
        *((case("ratios", 0, "ratio"), ratio, "its raw times give") for ratio in (0, -1, 1.05, "nan", "inf")),
        (case("ratios", 0, "rounds"), 11, "is of 11 rounds, its raw times are of 10"),
        (case("ratios", 0, "spread"), 0.0, "spread 0.0"),
        *((case("ratios", 0, "low"), low, "an interval from") for low in (0.0, -1, "nan", 2.0)),
        *((case("ratios", 0, "high"), high, "an interval from") for high in ("inf", 0.5, "nan")),
        (
            case("ratios", 0, "look", "position"),
            "open",
            "is 'open' after 10 rounds, its raw times are 'within' after 10",
        ),
        (case("ratios", 0, "look", "rounds"), 9, "is 'within' after 9 rounds"),
        (case("ratios", 0, "look", "level"), 0.5, "its raw times are 'within'"),
        (case("ratios", 0, "look", "p_within"), -1, "a p is not between 0 and 1"),
        (case("ratios", 0, "more"), 3, "more rounds are stated"),
    ],
)
def test_ratios_that_do_not_follow_from_the_raw_times_are_named(
    tmp_path: Path, small: dict[str, Any], path: tuple[str | int, ...], value: Any, said: str
) -> None:
    found = refused(tmp_path, changed(small, path, value))
    assert "onnxruntime_cpu, batch 1" in found
    assert said in found


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (case("raw"), {}, "raw times of []"),
        (case("raw"), lambda raw: {**raw, "other": [[1]]}, "raw times of"),
        (case("raw", "fused"), [], "a round of fused is missing or empty"),
        (case("raw", "fused", 3), [], "a round of fused is missing or empty"),
        (case("raw", "fused", 3), lambda runs: runs[1:], "not of the base's rounds"),
        (case("raw", "fused"), lambda rounds: [*rounds, rounds[0]], "not of the base's rounds"),
        (case("raw", "fused", 3, 0), 0, "not above 0"),
        (case("raw", "fused", 3, 0), -5, "not above 0"),
        *((case("raw", "fused", 3, 0), time, "should be int") for time in (1.5, True, "9", None, huge)),
        (case("raw", "fused"), times(3), "its raw times give 2.99"),
        (case("raw", "base again"), times(3), "base again / base"),
        (case("raw", "adapted"), times(3), "adapted / base"),
    ],
)
def test_raw_times_that_are_none_or_others_are_named(
    tmp_path: Path, small: dict[str, Any], path: tuple[str | int, ...], value: Any, said: str
) -> None:
    assert said in refused(tmp_path, changed(small, path, value))


def test_a_model_that_was_decided_early_has_fewer_rounds_than_the_base(tmp_path: Path) -> None:
    from reparam_export.latency.measurement import case_of

    found = measurement(rounds=15)
    raw = {m: rounds[:10] if m == "adapted" else rounds for m, rounds in found.cases[0].raw.items()}
    few = case_of(found.contest, ("cpu", "CPU"), 1, raw, margin=found.margin, memory={})
    content = {**asdict(found), "cases": [asdict(few)], "verdict": few.verdict}
    assert write_report(folder(tmp_path, content)).latency == few.verdict


@pytest.mark.parametrize("margin", [5e-324, 1e-17, 0.999])
def test_every_margin_that_can_be_measured_with_can_be_drawn(tmp_path: Path, margin: float) -> None:
    from reparam_export.latency.measurement import case_of

    found, longest = measurement(rounds=1), 2**63 - 1
    raw = {"base": [[1, 1]], "base again": [[1, longest]], "adapted": [[longest, longest]], "fused": [[1, 1]]}
    extreme = case_of(found.contest, ("cpu", "CPU"), longest, raw, margin=margin, memory=dict.fromkeys(raw, longest))
    content = {**asdict(found), "cases": [asdict(extreme)], "verdict": extreme.verdict, "margin": margin}
    assert write_report(folder(tmp_path, plain_json(content))).latency == "undecided"


def test_a_ratio_of_nothing_is_refused_however_near_the_true_one_is(tmp_path: Path) -> None:
    from reparam_export.latency.measurement import case_of

    found = measurement(rounds=1)
    raw = {model: [[1 if model == "fused" else 2**63 - 1]] for model in found.contest.models}
    extreme = case_of(found.contest, ("cpu", "CPU"), 1, raw, margin=found.margin, memory={})
    content = {**asdict(found), "cases": [asdict(extreme)], "verdict": extreme.verdict}
    nothing = changed(plain_json(content), case("ratios", 0, "ratio"), 0)
    assert "fused / base is 0.0, its raw times give 1.0" in refused(tmp_path, nothing)


def mutated(content: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy with one value, at any depth, taken away, said twice, scaled or replaced."""
    content = copy.deepcopy(content)
    holder, key = content, chance.choice(list(content))
    while isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.85:
        holder = holder[key]
        key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value, how = holder[key], chance.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(value, int | float):
        holder[key] = value * chance.choice((3, -1, 0.999))
    elif how == 2 and isinstance(value, list) and value:
        value.append(copy.deepcopy(value[0]))
    else:
        holder[key] = copy.deepcopy(chance.choice(NASTY))
    return content


def test_a_mutated_measurement_is_shown_or_refused_and_never_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        latency_plots, "svg", lambda *_: ""
    )  # figures are made; writing them takes nearly all of the time
    real = json.loads(REAL.read_text(encoding="utf-8"))
    real |= {"cases": real["cases"][:1], "verdict": real["cases"][0]["verdict"], "weights_sha256": WEIGHTS}
    real["artifact_sha256"] = artifact().sha256
    chance, outcomes = random.Random(0), Counter[str]()
    for number in range(300):
        content = mutated(real, chance)
        try:
            outcomes[write_report(folder(tmp_path, content)).latency] += 1
        except ReparamError as error:
            outcomes["refused" if "latency.json" in str(error) else str(error)] += 1
        except Exception as error:
            pytest.fail(f"mutation {number} is a fault: {error!r}")
    assert outcomes["refused"] > 100
    assert outcomes["no added cost"] > 10
    assert set(outcomes) == {"refused", "no added cost", "not known"}
