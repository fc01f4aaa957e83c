"""The second witness in words. Every view of the report says the same; where there is none, that is said."""

from __future__ import annotations

from collections.abc import Sequence

from reparam_export.report.numbers import number, plural
from reparam_export.verification.certificate import WitnessEvidence


def sentence(witness: Sequence[WitnessEvidence]) -> str:
    """For the headline: who agrees, on how much, how far apart; or that there is none."""
    heard = [each for each in witness if each.who]
    return "; ".join(f"second witness: {agreed(each)}" for each in heard) or "no second witness"


def agreed(each: WitnessEvidence) -> str:
    """Who, on what, and how far apart."""
    who = f"{each.who} {each.version}".strip()
    if not each.passed:
        return f"{who} differs in {plural(len(each.differences), 'place')}"
    seen = []
    if each.settings:
        seen.append(f"{plural(each.settings, 'layer')}")
    if each.layers < each.of_layers:
        seen[-1:] = [f"the settings of {plural(each.settings, 'layer')} and the numbers of {each.layers} of them"]
    if each.outputs:
        seen.append(f"{plural(each.outputs, 'whole output')}")
    return f"{who} agrees on {' and '.join(seen) or 'nothing'}, to {number(max(each.error, each.output_error))}"


def rows(witness: Sequence[WitnessEvidence]) -> list[tuple[str, str]]:
    """Title and text of everything that is known of them."""
    found: list[tuple[str, str]] = []
    for each in witness:
        if not each.who:
            found.append(("Second witness", f"no second witness: {each.absent}"))
            continue
        found.append(("Second witness", agreed(each)))
        if each.of_layers:
            drawn = f", drawn with seed {each.seed}" if each.layers < each.of_layers else ""
            found.append(
                (
                    "Layers in numbers",
                    f"{each.layers} of {each.of_layers}{drawn}: {number(each.error)} of what the adapter does, bound {number(each.bound)}",
                )
            )
        if each.outputs:
            found.append(
                ("Whole model", f"{number(each.output_error)} of the largest answer, bound {number(each.output_bound)}")
            )
        found += [("Differs", difference) for difference in each.differences]
        found += [("Note", note) for note in each.notes]
    return found


def failures(witness: Sequence[WitnessEvidence]) -> list[str]:
    """One sentence for each difference."""
    return [f"second witness {each.who}: {difference}" for each in witness for difference in each.differences]
