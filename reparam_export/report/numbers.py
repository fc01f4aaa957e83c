"""How numbers are written in a report: the same in the page, the pull request text and the test cases."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """``3.1e-7``, ``0.48``, ``412``, ``NaN``: two digits at least, no padding of the exponent."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 10_000:
        return f"{value:.0f}" if abs(value) >= 10 else f"{value:#.2g}".removesuffix(".")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float | None) -> str:
    """Rounded down, so that 100 % means all of it."""
    if share is None:
        return "–"
    if not math.isfinite(share):
        return number(share)
    hundredths = math.floor(share * 10_000 + 1e-9)
    return f"{hundredths / 100:.2f} %" if hundredths % 100 else f"{hundredths // 100} %"


def count(value: int | None) -> str:
    """Thousands apart: ``12,345``."""
    return "–" if value is None else f"{value:,}"


def size(value: int | None) -> str:
    """Bytes in steps of a thousand: ``1.2 MB``."""
    if value is None:
        return "–"
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def quantity(value: int | None) -> str:
    """Large counts in steps of a thousand: ``17.6 G``."""
    if value is None:
        return "–"
    return _scaled(value, ("", "k", "M", "G", "T")).strip()


def signed(text: str) -> str:
    """A difference with its sign; zero has none."""
    return text if text.startswith(("-", "–")) or text.split()[0] == "0" else f"+{text}"


def plural(amount: int, noun: str) -> str:
    """``1 layer``, ``24 layers``."""
    return f"{count(amount)} {noun}" if amount == 1 else f"{count(amount)} {noun}s"


def _scaled(value: int, units: tuple[str, ...]) -> str:
    amount, unit = float(value), 0
    while abs(amount) >= 999.95 and unit < len(units) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{value} {units[0]}" if unit == 0 else f"{amount:.1f} {units[unit]}"
