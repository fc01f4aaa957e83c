"""The LoRA inside a ``.nemo`` archive: a tar of ``model_config.yaml`` and ``model_weights.ckpt``, read by name.

Nothing of it is unpacked but the weights, into a temporary folder of their own, while they are read.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from reparam_export.errors import CheckpointError
from reparam_export.files import load_pickle, unpacks_too_far

ENDING = ".nemo"
WEIGHTS, CONFIG = "model_weights.ckpt", "model_config.yaml"
LARGEST = 1 << 22  # bytes of a configuration
MEMBERS = 10_000  # files of one archive
RANK = re.compile(r"\$\{[\w.]*\badapter_dim\}")  # OmegaConf's way to say: as that entry


def open_archive(path: Path) -> tuple[Any, dict[str, Any]]:
    """What the archive's weights file holds, and its configuration. Raises CheckpointError."""
    try:
        with tarfile.open(path) as archive:
            members = _members(path, archive)
            found = [member for member in members if PurePosixPath(member.name).name == WEIGHTS]
            if len(found) != 1:
                raise _parts(path, found, members)
            config = next((m for m in members if PurePosixPath(m.name).name == CONFIG), None)
            return _weights(archive, found[0]), {} if config is None else _config(path, archive, config)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as an archive of NeMo, a tar file ({error}); it is damaged, fetch it again"
        ) from error


def _members(path: Path, archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Its files. Raises CheckpointError before more of it is unpacked than weights can be: to pass over a file unpacks it."""
    found, size = [], 0
    for member in archive:
        found += [member] if member.isfile() else []
        size += member.size
        if unpacks_too_far(path, size) or len(found) > MEMBERS:
            raise CheckpointError(f"{path}: unpacks to {size:,} bytes and more, far more than weights do")
    return found


def _parts(path: Path, found: list[tarfile.TarInfo], members: list[tarfile.TarInfo]) -> CheckpointError:
    what = f"{len(found)} of them, one for each rank" if found else f"it holds {', '.join(m.name for m in members[:5])}"
    return CheckpointError(
        f"{path}: expected one {WEIGHTS} in the archive, the weights of a model on one rank, found {what}; merge them with NeMo "
        f"(tensor_model_parallel_size 1, no distributed checkpoint) and give that archive, or its {WEIGHTS} (tar -xf {path.name})"
    )


def _weights(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    with tempfile.TemporaryDirectory(prefix="reparam-nemo-") as folder:
        file = Path(folder) / WEIGHTS
        content = archive.extractfile(member)
        assert content is not None  # it is a file
        with content, file.open("wb") as out:
            shutil.copyfileobj(content, out)
        return load_pickle(file)


def _config(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    import yaml

    if member.size > LARGEST:
        raise CheckpointError(f"{path}: {member.name} has {member.size:,} bytes, too many for a configuration")
    content = archive.extractfile(member)
    assert content is not None
    try:
        found = yaml.safe_load(content.read())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {member.name} cannot be read as YAML: {str(error).splitlines()[0]}") from error
    return {"nemo": found} if isinstance(found, Mapping) else {}


def settings_in(config: Mapping[str, Any]) -> dict[str, int | float | None]:
    """lora_alpha, num_query_groups and head_dim as ``model_config.yaml`` has them; None for what it does not say in numbers."""
    peft = config.get("peft")
    tuning = peft.get("lora_tuning") if isinstance(peft, Mapping) else None
    tuning = tuning if isinstance(tuning, Mapping) else {}
    alpha = tuning.get("alpha")
    alpha = tuning.get("adapter_dim") if isinstance(alpha, str) and RANK.fullmatch(alpha) else alpha
    heads, width = _number(config.get("num_attention_heads")), _number(config.get("hidden_size"))
    groups = config.get("num_query_groups")
    size = config.get("kv_channels")
    return {
        "lora_alpha": _number(alpha),
        "num_query_groups": heads if groups is None else _number(groups),
        "head_dim": _number(size) if size is not None else width / heads if width and heads else None,
    }


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
