"""The README's examples run, and its table and file map are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES

import reparam_export as rx
from reparam_export import plugins

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(mark: str) -> str:
    match = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert match is not None
    return match[1]


def test_the_two_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loop = (
        "import torch\n"
        "for p in model.parameters():\n"
        "    if p.requires_grad:\n"
        "        p.data += 0.05 * torch.randn_like(p)\n"
    )
    exec(example("training").replace("...  #", f"{loop}#"), {})
    names: dict[str, object] = {}
    exec(example("example"), names)
    assert isinstance(names["artifact"], rx.Artifact)
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert rx.__doc__ is not None
    assert all(line.strip() in rx.__doc__ for line in example("example").splitlines()[1:] if line)


def test_the_search_example_runs_and_its_files_convert_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loop = (
        "net.model.train()\n"
        "for p in net.model.parameters():\n"
        "    if p.requires_grad:\n"
        "        p.data += 0.05 * torch.randn_like(p)\n"
    )
    names: dict[str, Any] = {}
    exec(example("search").replace("...  #", f"{loop}#"), names)
    best = rx.read("best.pt")
    chosen = rx.read("net.pt", config="search/checkpoint-2.pth.tar", candidate=0)
    assert [a.params.path for a in best.adapters] == [a.params.path for a in chosen.adapters] == [*names["found"].best]
    assert rx.fuse(best).sha256() == rx.fuse(chosen).sha256()


def test_the_table_has_a_row_for_every_recorded_case_and_each_is_within_its_bound() -> None:
    table = README.split("<!-- recorded")[1].split("<!-- /recorded")[0]
    rows = {cells[1].strip(): cells for line in table.splitlines() if len(cells := line.split("|")) == 10}
    assert set(CASES) <= set(rows)
    for name in CASES:
        error, bound, without = (float(rows[name][i]) for i in (6, 7, 8))
        assert error <= bound < without / 1000


def test_the_table_of_pefts_types_has_every_type_folded_or_refused() -> None:
    import peft

    table = README.split("<!-- peft types")[1].split("<!-- /peft types")[0]
    rows = {cells[1].strip(): cells for line in table.splitlines()[3:] if len(cells := line.split("|")) == 9}
    refused = set(re.findall(r"^- (\w+): ", table, re.MULTILINE))
    assert set(rows) | refused == {kind.value for kind in peft.PeftType}
    assert not set(rows) & refused
    for cells in rows.values():
        assert "closed form" in cells[2] or "probed" in cells[2]
        assert float(cells[4]) < 1e-14
        assert float(cells[5]) < 1e-6


def test_the_file_map_names_every_room_kind_format_and_base() -> None:
    listing = README.split("## Where things are")[1].split("## Not yet")[0]
    for file in (ROOT / "reparam_export").iterdir():
        if file.name not in ("__init__.py", "__main__.py", "py.typed", "__pycache__"):
            assert file.name in listing, file.name
    for folder in ("adapters", "checkpoints", "bases"):
        for name in plugins.names(folder):
            assert re.search(rf"\b{name}\b", listing), f"{folder}/{name}"
