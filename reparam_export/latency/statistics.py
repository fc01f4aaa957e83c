"""Is one model as fast as another? A test of equivalence over rounds, which may be asked again and again.

A round gives one number: the median, over its cycles, of the ratio of two runs that stood next to each other in time.
Rounds are independent: each is a fresh process that loads the models in a new random order. So the statistics are over
rounds; runs of one round share their memory and their hour, and tell nothing about another.

    estimate    Hodges and Lehmann's: the median of all averages of two rounds (1963)
    interval    bootstrap over rounds, 95 % (``scipy.stats.bootstrap``, BCa)
    decision    two one-sided tests against the margin (Schuirmann 1987), each Wilcoxon's signed rank test of the rounds
                (``scipy.stats.wilcoxon``): exact, and a burst of other work on the machine is one rank, not a variance
    looking     the k-th look, at rounds 10, 15, 22, 33, ..., spends ALPHA / (k (k + 1)) of ALPHA; these sum up to ALPHA, so
                that no number of looks makes a wrong decision likelier than that (Lan and DeMets 1983, by the union bound)

All ratios are handled as logarithms, and the margin is symmetric in them: from 1 / (1 + margin) to 1 + margin.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

ALPHA = 0.025  # chance of deciding wrongly, on either side of the margin, over all looks together
FIRST, GROWTH, FARTHEST = 10, 1.5, 1_000_000  # rounds
RESAMPLES = 2000
POWER = 0.8
EFFICIENCY = math.pi / 3  # rounds that Wilcoxon's test needs per round of a t-test, where rounds are normal

Position = Literal["within", "above", "below", "open"]


@dataclass(frozen=True)
class Look:
    """One look: ``p_within`` and ``p_above`` of the tests that the ratio is not within the margin, not above it."""

    rounds: int  # that were looked at; 0: no look was due yet
    level: float  # what a p must not exceed
    position: Position = "open"
    p_within: float = 1.0
    p_above: float = 1.0


@dataclass(frozen=True)
class Ratio:
    """How the time of ``over`` compares with that of ``under``. ``ratio``, ``low`` and ``high`` are factors; 1.0 is equal."""

    over: str
    under: str
    ratio: float
    low: float
    high: float
    rounds: int
    spread: float  # robust deviation of one round, relative
    look: Look  # the look that decided, else the last one
    more: int | None  # rounds that would probably decide; None when it is decided

    @property
    def within(self) -> tuple[float, float] | None:
        """The interval; None where one round is all there is."""
        return (self.low, self.high) if math.isfinite(self.high) else None


def log_ratios(over: Sequence[Sequence[int]], under: Sequence[Sequence[int]]) -> Array:
    """One log ratio a round, from run times (rounds, cycles) in any unit; run j of both stood in the same cycle.

    ``under`` may go on for more rounds, in which ``over`` was not timed any more.
    """
    import numpy as np

    return np.array([np.median(np.log(np.divide(a, b))) for a, b in zip(over, under[: len(over)], strict=True)])


def looks() -> Iterator[tuple[int, float]]:
    """(rounds, level) of every look, without end."""
    rounds, k = float(FIRST), 1
    while True:
        yield math.floor(rounds), ALPHA / (k * (k + 1))
        rounds, k = rounds * GROWTH, k + 1


def is_look(rounds: int) -> bool:
    """Is a look due after exactly so many rounds?"""
    return rounds in (done for done, _ in _looks_until(rounds))


def judged(over: str, under: str, logs: Array, margin: float, seed: int = 0) -> Ratio:
    """The ratio with its interval, and what the first look that could decide has decided.

    logs: one log ratio a round, one round at least. Later rounds sharpen the estimate and the interval, never the decision.
    """
    import numpy as np

    look = decided(logs, margin)
    middle, deviation, done = float(hodges_lehmann(logs)), spread(logs), len(logs)
    ratio, low, high = map(float, np.exp((middle, *interval(logs, seed))))
    more = rounds_needed(middle, deviation, math.log1p(margin), done) - done if look.position == "open" else None
    return Ratio(over, under, ratio, low, high, done, deviation, look, more)


def decided(logs: Array, margin: float) -> Look:
    """The first look at these rounds, from the first round on, that decides; the last one if none does."""
    look = Look(0, ALPHA / 2)
    for rounds, level in _looks_until(len(logs)):
        look = look_at(logs[:rounds], level, math.log1p(margin))
        if look.position != "open":
            break
    return look


def look_at(logs: Array, level: float, bound: float) -> Look:
    """Where the ratio lies with regard to the margin, by one look at these rounds."""
    p_within = max(_p(logs - bound, "less"), _p(logs + bound, "greater"))
    p_above, p_below = _p(logs - bound, "greater"), _p(logs + bound, "less")
    found: Position = (
        "within" if p_within <= level else "above" if p_above <= level else "below" if p_below <= level else "open"
    )
    return Look(len(logs), level, found, p_within, p_above)


def hodges_lehmann(values: Array, axis: int = -1) -> Any:
    """The median of all averages of two values, each with itself as well, along the last axis."""
    import numpy as np

    i, j = np.triu_indices(values.shape[-1])
    return np.median((values[..., i] + values[..., j]) / 2, axis=-1)


def interval(values: Array, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of the estimate over rounds; infinite for one round, a point where all are equal."""
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        return -math.inf, math.inf
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of degenerate resamples: few rounds make many equal ones
        found = stats.bootstrap(
            (values,),
            hodges_lehmann,
            n_resamples=RESAMPLES,
            batch=max(1, 4_000_000 // len(values) ** 2),  # a resample has about half as many averages
            confidence_level=1 - 2 * ALPHA,
            method="BCa" if len(values) >= FIRST else "percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low + high) else (float(values.min()), float(values.max()))


def spread(values: Array) -> float:
    """The deviation of one round, from the median absolute deviation: outliers do not count."""
    from scipy import stats

    return float(stats.median_abs_deviation(values, scale="normal")) if len(values) > 1 else math.inf


def rounds_needed(middle: float, deviation: float, bound: float, done: int) -> int:
    """The first look after ``done`` rounds that decides with probability POWER, if middle and deviation are the true ones.

    Both of the one-sided tests may fail, each with half of 1 - POWER. A middle that is closer to the margin than its own error
    is taken to be that error away. At most FARTHEST.
    """
    from scipy.stats import norm

    unit = deviation * math.sqrt(EFFICIENCY) if done > 1 else 0.0  # of one round: nothing is known of how rounds vary
    distance = max(abs(bound - abs(middle)), min(bound, unit / math.sqrt(max(done, 1))))
    due = ((rounds, level) for rounds, level in _looks_until(FARTHEST) if rounds > done)
    for rounds, level in due:
        if (norm.isf(level) + norm.ppf((1 + POWER) / 2)) * unit / math.sqrt(rounds) <= distance:
            return rounds
    return FARTHEST


def _looks_until(rounds: int) -> Iterator[tuple[int, float]]:
    return itertools.takewhile(lambda look: look[0] <= rounds, looks())


def _p(values: Array, alternative: str) -> float:
    """Wilcoxon's p of the one-sided hypothesis about the middle of ``values`` against 0."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties: scipy then uses the normal approximation
        return float(stats.wilcoxon(values, alternative=alternative).pvalue)
