"""The statistics on synthetic rounds whose truth is known, all seeded."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from reparam_export.latency.statistics import (
    ALPHA,
    FARTHEST,
    decided,
    hodges_lehmann,
    interval,
    is_look,
    judged,
    log_ratios,
    look_at,
    looks,
    rounds_needed,
    spread,
)

MARGIN = 0.01
BOUND = math.log1p(MARGIN)
ROUNDS = 168  # eight looks


def rounds(seed: int, middle: float, deviation: float = 0.007, count: int = ROUNDS, bursts: float = 0.0) -> np.ndarray:
    """Log ratios of that middle; a share of the rounds falls into a burst of other work, which triples nothing but the noise."""
    chance = np.random.default_rng(seed)
    noise = chance.normal(0, deviation, count)
    noise[chance.random(count) < bursts] *= 10
    return middle + noise


def positions(middle: float, runs: int, **options: float) -> Counter[str]:
    return Counter(decided(rounds(seed, middle, **options), MARGIN).position for seed in range(runs))


def test_looks_are_due_ever_more_rarely_and_spend_less_than_alpha_together() -> None:
    first = list(itertools.islice(looks(), 200))
    assert [rounds for rounds, _ in first[:6]] == [10, 15, 22, 33, 50, 75]
    assert 0.99 * ALPHA < sum(level for _, level in first) < ALPHA
    assert [n for n in range(60) if is_look(n)] == [10, 15, 22, 33, 50]


@pytest.mark.parametrize(("side", "bursts"), [(1, 0.0), (-1, 0.2)])
def test_looking_again_and_again_at_a_ratio_on_the_margin_rarely_decides(side: int, bursts: float) -> None:
    found = positions(side * BOUND, 250, bursts=bursts)
    assert found["within"] <= 13  # of 250 with chance 0.025: at most 13 with chance 0.99
    assert found["above"] + found["below"] <= 13


def test_without_the_spending_the_same_looks_would_decide_wrongly_far_too_often() -> None:
    def naive(seed: int) -> bool:
        logs = rounds(seed, BOUND)
        due = [n for n, _ in itertools.takewhile(lambda look: look[0] <= ROUNDS, looks())]
        return any(look_at(logs[:n], ALPHA, BOUND).position != "open" for n in due)

    assert sum(naive(seed) for seed in range(120)) > 12


@pytest.mark.parametrize("bursts", [0.0, 0.2])
def test_two_equal_models_are_found_equal_and_never_called_different(bursts: float) -> None:
    assert positions(0.0, 50, bursts=bursts) == {"within": 50}


@pytest.mark.parametrize("deviation", [0.007, 0.03])
def test_five_percent_more_is_always_found(deviation: float) -> None:
    assert positions(math.log(1.05), 50, deviation=deviation) == {"above": 50}


def test_faster_by_more_than_the_margin_is_below_it() -> None:
    assert positions(math.log(0.95), 20) == {"below": 20}


def test_bursts_of_other_work_do_not_move_the_estimate() -> None:
    quiet, busy = rounds(1, 0.002, count=60), rounds(1, 0.002, count=60)
    busy[::10] += 0.5
    assert abs(hodges_lehmann(busy) - hodges_lehmann(quiet)) < 0.003
    assert abs(spread(busy) - spread(quiet)) < 0.003
    assert decided(busy, MARGIN).position == "within"


def test_nothing_is_decided_before_the_first_look() -> None:
    assert decided(rounds(0, 0.5, count=9), MARGIN).position == "open"
    assert decided(rounds(0, 0.5, count=10), MARGIN).position == "above"


def test_a_decision_stands_whatever_comes_later() -> None:
    logs = np.concatenate([rounds(3, 0.0, count=15), rounds(3, 0.2, count=60)])
    assert decided(logs[:15], MARGIN) == decided(logs, MARGIN)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(150):
        low, high = interval(rounds(seed, 0.003, count=22), seed)
        covered += low <= 0.003 <= high
    assert 132 <= covered <= 150  # 0.95 of 150 is 142; with few rounds a bootstrap covers a little less


@pytest.mark.parametrize(("count", "expected"), [(1, (-math.inf, math.inf)), (3, None)])
def test_few_rounds_have_a_wide_interval(count: int, expected: tuple[float, float] | None) -> None:
    logs = rounds(0, 0.0, count=count)
    low, high = interval(logs, 0)
    assert (low, high) == expected if expected else logs.min() <= low < high <= logs.max()
    assert interval(np.full(5, 0.25), 0) == (0.25, 0.25)


def test_the_same_rounds_give_the_same_judgement() -> None:
    assert judged("b", "a", rounds(0, 0.0, count=22), MARGIN) == judged("b", "a", rounds(0, 0.0, count=22), MARGIN)


@pytest.mark.parametrize(("middle", "deviation"), [(0.0, 0.02), (0.004, 0.01), (math.log(1.03), 0.03)])
def test_the_rounds_it_says_are_needed_mostly_decide(middle: float, deviation: float) -> None:
    needed = rounds_needed(middle, deviation, BOUND, 10)
    enough = [decided(rounds(s, middle, deviation, needed), MARGIN).position != "open" for s in range(60)]
    assert sum(enough) >= 42  # 0.8 of 60 is 48
    few = [decided(rounds(s, middle, deviation, needed // 4), MARGIN).position != "open" for s in range(60)]
    assert sum(few) < 30


def test_the_rounds_needed_are_sensible_even_on_the_margin_and_from_one_round() -> None:
    assert 20 < rounds_needed(BOUND, 0.01, BOUND, 20) < 1000
    assert rounds_needed(0.0, math.inf, BOUND, 1) == 10
    assert rounds_needed(0.0, 10.0, BOUND, 100) == FARTHEST


def test_a_round_is_the_median_ratio_of_neighbours_in_time() -> None:
    base = [[100, 200, 400, 100, 100]]  # the machine is busy for two cycles
    other = [[110, 220, 440, 110, 900]]  # and once more
    assert log_ratios(other, base) == pytest.approx([math.log(1.1)])
