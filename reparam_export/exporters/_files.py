"""Files appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reparam_export.errors import ExportError


@contextmanager
def placed(path: Path, also: Sequence[str] = ()) -> Iterator[Path]:
    """A folder next to ``path`` to write into; what is in it replaces ``path`` (and the files ``also``) on success.

    On any failure the folder is removed and what stood at ``path`` before is untouched. A file of ``also`` that was not
    written this time is removed from the destination, since it belonged to the file that is replaced. The disk's errors
    become ExportError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write to {path.parent}: {error}") from error
    try:
        yield folder
        if not (folder / path.name).is_file():
            raise ExportError(f"{path.name} was not written")
        for name in also:
            if (folder / name).exists():
                (folder / name).replace(path.parent / name)
            else:
                (path.parent / name).unlink(missing_ok=True)
        (folder / path.name).replace(path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
