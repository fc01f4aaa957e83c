"""What a failed proof does to the files it was about: they stand aside under names that no loader takes, until they are proven.

    hf/model.safetensors  ->  hf.refuted/model.safetensors.refuted        fused.safetensors  ->  fused.safetensors.refuted

The evidence (verification.json, the report) stays where it is. Nothing is deleted: the next ``verify``, with other samples perhaps, is
about the same files. Of a link, the link is renamed; what it points at is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reparam_export.errors import EquivalenceError, FusionError
from reparam_export.files import remove

ENDING = ".refuted"
LOADABLE = ("fused.safetensors", "hf", "model.safetensors", "model.onnx*", "model.engine", "genai")


def set_aside(folder: Path, names: tuple[str, ...] = LOADABLE) -> list[str]:
    """Rename whatever of an output folder somebody could load; the new names."""
    paths = [path for name in names for path in sorted(folder.glob(name)) if not path.name.endswith(ENDING)]
    for path in paths:
        aside = path.with_name(path.name + ENDING)
        remove(aside)
        if path.is_dir() and not path.is_symlink():  # its files first: a kill in between leaves nothing that loads
            for file in sorted(path.rglob("*")):
                if file.is_file() and not file.name.endswith(ENDING):
                    file.rename(file.with_name(file.name + ENDING))
        path.rename(aside)
    return [path.name + ENDING for path in paths]


def aside(folder: Path) -> list[Path]:
    """What stands aside in an output folder."""
    return sorted(folder.glob(f"*{ENDING}"))


def put_back(folder: Path) -> bool:
    """Undo ``set_aside``; whether there was anything to undo. What has been made anew since keeps its place."""
    found = aside(folder)
    for path in found:
        place = path.with_name(path.name.removesuffix(ENDING))
        if place.exists() or place.is_symlink():
            remove(path)
            continue
        path.rename(place)
        for file in sorted(place.rglob(f"*{ENDING}")) if place.is_dir() and not place.is_symlink() else ():
            file.rename(file.with_name(file.name.removesuffix(ENDING)))
    return bool(found)


@contextmanager
def on_trial(folder: Path) -> Iterator[None]:
    """Around a proof of the weights in a folder: what was refuted before is in its place meanwhile, and what is refuted now is set aside.

    EquivalenceError is raised again with the names that it stands under, and so is FusionError, where the model cannot be proven.
    What stood aside before goes there again when nothing was decided.
    """
    before = put_back(folder)
    try:
        yield
    except (EquivalenceError, FusionError) as error:
        names = set_aside(folder)
        if names:
            error.args = (f"{error}; set aside: {', '.join(names)}, which no loader takes until it is proven",)
        raise
    except BaseException:
        if before:
            set_aside(folder)
        raise


def check_none(folder: Path) -> None:
    """Raises EquivalenceError when the weights of a folder stand aside."""
    found = aside(folder)
    if found:
        raise EquivalenceError(
            f"{folder}: the proof failed, as verification.json and the report say; {found[0].name} was set aside, nothing is made of it. "
            f"Run `reparam-export verify {folder}` again, with other --inputs if the samples were at fault, or fuse anew"
        )
