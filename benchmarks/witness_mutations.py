"""Misreadings planted in the readers, one at a time: our own proof certifies each, the second witness finds each out.

    python -m benchmarks.witness_mutations        writes results/witness_mutations.md, and the table of the README

A misreading is either a setting of ``adapter_config.json`` that the reader does not see as it is, or adapters that it makes otherwise.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch

import reparam_export as rx
from benchmarks.witness_files import of_files
from benchmarks.witness_kinds import of_other_kinds
from benchmarks.witness_lora import of_parameters, plain
from benchmarks.witness_readings import Config, Mutation
from reparam_export import checkpoints
from reparam_export.checkpoints import Checkpoint
from reparam_export.errors import EquivalenceError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "witness_mutations.md"
BEGIN, END = "<!-- witness: made by python -m benchmarks.witness_mutations -->", "<!-- /witness -->"
INPUT = "ids=batch,7:int64:30"


@dataclass(frozen=True)
class Outcome:
    """alone: the verdict of our own proof without a witness; differences: what the witness says."""

    mutation: Mutation
    alone: str
    differences: tuple[str, ...]

    @property
    def caught(self) -> bool:
        return bool(self.differences)


def mutations() -> list[Mutation]:
    """All of them."""
    return [*plain(), *of_parameters(), *of_other_kinds(), *of_files()]


def run(mutation: Mutation) -> Outcome:
    """Read what its library wrote with the misreading planted, fold it, and prove it without and with the witness."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        read = [made(mutation, config, Path(folder) / str(n), n) for n, config in enumerate(mutation.configs)]
        read = [mutation.reads(Path(folder))] if mutation.reads else read
        if len(read) > 1:
            read = [read[0], *(replace(c, base=None, recipe=replace(c.recipe, base=None)) for c in read[1:])]
            read = [rx.stacked(read, mutation.weights)]
        recipe = read[0].recipe
        checkpoint = replace(mutation.plant(read[0]), recipe=recipe) if mutation.plant else read[0]
        weights = rx.fuse(checkpoint)
        alone = rx.verify(checkpoint, weights, count=2, witness="none").certificate.verdict
        try:
            heard = rx.verify(checkpoint, weights, count=2).certificate.witness
        except EquivalenceError as error:
            heard = error.evidence.witness
    return Outcome(mutation, alone, tuple(text for each in heard for text in each.differences))


def made(mutation: Mutation, config: Callable[[], Any], folder: Path, seed: int) -> Checkpoint:
    """The folder as peft writes it, read by a reader with the fault in it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    net = mutation.net()
    file = folder / "net.py"
    file.write_text(
        f"import sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks.witness_nets import {mutation.net.__name__}\n"
        f"def build():\n    torch.manual_seed(0)\n    return {mutation.net.__name__}()\n"
    )
    torch.manual_seed(1 + seed)
    adapted = peft.get_peft_model(net, config())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    with seen_as(mutation.sees):
        return rx.read(folder / "adapter", f"py:{file}:build", inputs=[INPUT])


@contextmanager
def seen_as(sees: Config | None) -> Iterator[None]:
    """Readers take every configuration for another one."""
    opened = checkpoints.open_source

    def open_source(*args: Any, **kwargs: Any) -> Any:
        source = opened(*args, **kwargs)
        return source if sees is None else replace(source, config=sees(dict(source.config)))

    with mock.patch.object(checkpoints, "open_source", open_source):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """peft warns of what it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def summary(outcomes: list[Outcome]) -> str:
    """A row for each family: how many were planted, certified by our own proof alone, found out by the witness."""
    rows = ["| setting or family | misreadings | certified without a witness | found out by it |", "|---|--:|--:|--:|"]
    families = list(dict.fromkeys(o.mutation.family for o in outcomes))
    for name in [*families, "all"]:
        own = [o for o in outcomes if name in ("all", o.mutation.family)]
        certified = sum(o.alone in ("exact", "rounded") for o in own)
        rows.append(f"| {name} | {len(own)} | {certified} | {sum(o.caught for o in own)} |")
    return "\n".join(rows)


def full(outcomes: list[Outcome]) -> str:
    """A row for each misreading, with the first thing that the witness says."""
    rows = [
        "| family | misreading | our own proof alone | what the witness says first | and more |",
        "|---|---|---|---|--:|",
    ]
    for o in outcomes:
        first = o.differences[0].replace("|", "\\|") if o.caught else "**nothing**"
        rows.append(
            f"| {o.mutation.family} | {o.mutation.what} | {o.alone} | {first} | {max(len(o.differences) - 1, 0)} |"
        )
    return "\n".join(rows)


def versions() -> str:
    """Of the libraries that bear witness."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("peft", "lycoris-lora", "diffusers"))


def main() -> None:
    """Run all, write the two tables; exit 1 when one is not found out."""
    outcomes = []
    for mutation in mutations():
        outcomes.append(run(mutation))
        print("caught" if outcomes[-1].caught else "MISSED", outcomes[-1].alone, mutation.name, flush=True)
    caught = sum(o.caught for o in outcomes)
    head = f"# Misreadings and the second witness\n\nMade by `python -m benchmarks.witness_mutations`, {versions()}: "
    RESULTS.write_text(f"{head}{caught} of {len(outcomes)} found out.\n\n{full(outcomes)}\n", encoding="utf-8")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{summary(outcomes)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    sys.exit(caught < len(outcomes))


if __name__ == "__main__":
    main()
