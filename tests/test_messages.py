"""What is printed on the way: numbers that say what they count."""

from __future__ import annotations

from typing import Any

import pytest

from reparam_export.checkpoints._peft_names import unused_targets
from reparam_export.cli._stages import counted, show_created
from reparam_export.report.statement import _layers_sentence


class Lines:
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("count", "lines", "last"), [(1, 1, "b0.bias, a"), (6, 6, "b5.bias, a"), (7, 6, "2 more biases")]
)
def test_the_rest_of_many_biases_is_more_than_one(count: int, lines: int, last: str) -> None:
    console: Any = Lines()
    show_created(console, [f"b{number}.bias" for number in range(count)])
    assert len(console.lines) == lines
    assert f"added: {last}" in console.lines[-1]


def test_what_is_counted_of_a_mixture_is_said() -> None:
    from types import SimpleNamespace as Plain

    layers = [Plain(module="q", verdict="exact"), *(Plain(module=f"up[{n}]", verdict="exact") for n in range(3))]
    certificate: Any = Plain(layers=layers)
    assert _layers_sentence(certificate, []) == "all 4 matrices, 3 of them of experts, exact"
    layers[0].verdict = "rounded"
    assert _layers_sentence(certificate, []).endswith("within the rounding bound, 3 of them exact")
    adapters = (Plain(expert=None, rows=None), Plain(expert=1, rows=None))
    checkpoint: Any = Plain(adapters=adapters)
    assert counted(checkpoint) == "2 adapters, one for each matrix or block of rows,"
    plain: Any = Plain(adapters=adapters[:1])
    assert counted(plain) == "1 adapters"
    assert "each matrix" in counted(plain, checkpoint)


def test_a_note_does_not_say_that_a_target_is_passed_over_where_the_base_may_have_it() -> None:
    (note,) = unused_targets({"target_modules": ["q", "lm_head"]}, ["layers.0.q"], [])
    assert note.endswith(
        "lm_head too, which nothing in the file is called: passed over where the base has no such module"
    )
