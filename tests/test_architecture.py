"""The order of imports, what starts without heavy imports, and names that say nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import reparam_export

PACKAGE = Path(reparam_export.__file__).parent
ROOT = PACKAGE.parent
# fmt: off
ORDER = [  # a room imports itself and what stands before it; nobody imports training
    "errors", "calls", "batches", "affine", "float64", "plugins", "names", "files", "refuted", "adapters", "modules", "checkpoints",
    "rounding", "subclasses", "layouts", "torchscript", "state", "fit", "naming", "ties",
    "models", "bases", "hf_folder", "tokenizer", "assembly", "training", "fusion", "verification", "analysis", "streaming", "folder",
    "exporters", "latency", "comparison", "report", "console", "inspection", "cli", "pytest_plugin", "__main__",
]
# fmt: on
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
    parts = [name.split(".") for name in imports(ast.parse(file.read_text()))]
    names = [name[1] for name in parts if name[0] == "reparam_export" and len(name) > 1]
    return {reparam_export._HOME.get(name, name).split(".")[0] for name in names}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_before_it(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(room)] if room != "__init__" else ()) - {"training"} | {room}
    assert rooms(file) - allowed == set(), f"{room} may import {sorted(allowed)}"


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
    code = (
        "import atexit, sys; sys.argv[1:] = ['--help']; atexit.register(lambda: print(*sys.modules)); "
        "import reparam_export.__main__"
    )
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
