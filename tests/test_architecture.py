"""The order of imports, what starts without heavy imports, and names that say nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import reparam_export
from reparam_export.errors import UsageError

PACKAGE = Path(reparam_export.__file__).parent
ROOT = PACKAGE.parent
ORDER = (  # rooms of one row may import each other, and every row above
    ("errors", "affine", "plugins", "state"),
    ("adapters",),
    ("checkpoints",),
    ("layouts", "models", "bases"),
    ("assembly",),
    ("fusion",),
    ("verification",),
    ("folder",),
    ("exporters",),
    ("latency",),
    ("report", "training"),
    ("console", "inspection"),
    ("cli",),
    ("__main__",),
)
ROW = {room: i for i, row in enumerate(ORDER) for room in row}
HEAVY = {"torch", "onnx", "onnxruntime", "timm", "transformers", "tensorrt", "tensorrt_rtx", "numpy", "matplotlib"}
EMPTY_NAMES = {"utils", "util", "common", "helpers", "core", "base", "manager", "misc"}


def imports(node: ast.AST) -> Iterator[str]:
    """Every name imported from the package, in functions too, but not under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


def rooms(file: Path) -> set[str]:
    """The rooms of the package that a file imports; a public name counts as the room it lives in."""
    found = [
        name.split(".")[1:] for name in imports(ast.parse(file.read_text())) if name.split(".")[0] == "reparam_export"
    ]
    homes = [reparam_export._HOME.get(parts[0], parts[0]).split(".")[0] for parts in found if parts]
    return set(homes)


FILES = sorted(
    file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" or file.parent != PACKAGE
)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_room_imports_only_rooms_above_it(file: Path) -> None:
    room = file.parts[0].removesuffix(".py")
    same_row = {r for r in ROW if ROW[r] == ROW[room]} - ({"report", "training"} - {room})
    wrong = {other for other in rooms(PACKAGE / file) if ROW[other] >= ROW[room] and other not in same_row}
    assert not wrong, f"{file} imports {', '.join(sorted(wrong))}, which come after {room}"


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda file: str(file.name))
def test_pipelines_use_the_public_api_only(file: Path) -> None:
    used = {name for name in imports(ast.parse(file.read_text())) if name.split(".")[0] == "reparam_export"}
    allowed = {"reparam_export", *(f"reparam_export.{name}" for name in reparam_export.__all__)}
    assert {name for name in used - allowed if not name.startswith("reparam_export.training.")} == set()


@pytest.mark.parametrize(
    "module", ["reparam_export", "reparam_export.cli", "reparam_export.checkpoints", "reparam_export.errors"]
)
def test_the_command_line_starts_without_heavy_imports(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY.isdisjoint(loaded)


def test_help_is_shown_without_heavy_imports() -> None:
    code = "import sys; sys.argv[1:] = ['--help']; import atexit; atexit.register(lambda: print(*sys.modules))\nimport reparam_export.__main__"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "convert" in shown
    assert HEAVY.isdisjoint(shown.splitlines()[-1].split())


def test_no_file_has_an_empty_name() -> None:
    names = {file.stem.strip("_") for file in PACKAGE.rglob("*.py")} | {
        d.name.strip("_") for d in PACKAGE.rglob("*") if d.is_dir()
    }
    assert names.isdisjoint(EMPTY_NAMES)


def test_public_names_are_where_they_are_said_to_be() -> None:
    assert all(getattr(reparam_export, name).__name__ == name for name in reparam_export.__all__)
    assert issubclass(UsageError, Exception)
