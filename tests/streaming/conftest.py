"""Compiled loops with a fault in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from reparam_export.streaming import kernel


@pytest.fixture
def compiled_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Replace one line of the loops by others; they are compiled anew, and the true ones after the test."""

    def mutate(line: str, by: str) -> None:
        text = kernel.source()
        assert text.count(line) == 1
        monkeypatch.setattr(kernel, "source", lambda: text.replace(line, by))
        kernel._compile.cache_clear()

    yield mutate
    monkeypatch.undo()
    kernel._compile.cache_clear()
