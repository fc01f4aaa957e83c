"""What every PEFT folder shares: the prefix of its keys and the place where it names its base."""

from __future__ import annotations

from reparam_export.checkpoints import Source
from reparam_export.errors import CheckpointError

PREFIX = "base_model.model."


def base_spec(source: Source) -> str | None:
    """``hf:`` spec of ``base_model_name_or_path``: a folder beside the adapter's, one of the working folder, or a hub id."""
    name = source.config.get("base_model_name_or_path")
    if not name:
        return None
    if not isinstance(name, str) or len(name) > 1000 or any(c in "?&" or not c.isprintable() for c in name):
        raise CheckpointError(f"{source.path}: base_model_name_or_path is not a usable folder or hub id; pass --base")
    beside = source.file.parent / str(name)
    task = source.config.get("task_type")
    return f"hf:{beside if beside.is_dir() else name}" + (f"?task={task}" if task else "")
