"""What the command line shows: tables and a progress bar on a terminal, plain lines in a pipe, one JSON object with ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from reparam_export.errors import short_words

Advance = Callable[[int, int], None]  # (done, in all)


class Console:
    """Results go to stdout, progress to stderr; with ``as_json`` stdout carries one JSON object and nothing else."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    def line(self, text: str) -> None:
        """One line of result."""
        if not self.as_json:
            print(clean(text))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table on a terminal, tab-separated lines in a pipe."""
        if self.as_json:
            return
        cells = [[clean(str(cell)) for cell in row] for row in rows]
        if not sys.stdout.isatty():
            for row in ([*columns], *cells):
                print("\t".join(row))
            return
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in cells:
            table.add_row(*map(escape, row))
        RichConsole().print(table)

    def result(self, content: Mapping[str, Any]) -> None:
        """The JSON object of ``--json``."""
        if self.as_json:
            from reparam_export.folder import plain_json

            print(json.dumps(plain_json(content), indent=1))

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Shows that a stage runs, how far it is, and how long it took."""
        import time

        started = time.perf_counter()
        if self.as_json or not sys.stderr.isatty():
            yield lambda done, total: None
        else:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=RichConsole(stderr=True), transient=True) as progress:
                task = progress.add_task(name, total=None)
                yield lambda done, total: progress.update(task, completed=done, total=total)
        self.line(f"{name}: done in {time.perf_counter() - started:.1f} s")


def clean(text: str) -> str:
    """Text without control characters and endless words: names in a checkpoint must not move the cursor of a terminal, nor fill it."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in short_words(text))
