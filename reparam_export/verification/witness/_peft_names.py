"""A folder under its base's own names, where it has others: peft looks for modules by name, and knows nothing of wrappers or other models.

Which module a name means is our reading; every setting and number stays the file's, and patterns are matched by peft's own function with
the file's own names. What transformers renames between its versions in the experts of a mixture, peft converts itself: such a folder
stays as it is.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reparam_export.checkpoints import Checkpoint
from reparam_export.checkpoints._peft_names import PREFIX
from reparam_export.files import flat_tensors, load_pickle, load_safetensors, read_json
from reparam_export.names.wrappers import unwrapped

NOTE = "under the base's own names, which are our reading: the names in the file are others"


@contextmanager
def under_base_names(checkpoint: Checkpoint, folder: Path, file: Path) -> Iterator[tuple[Path, bool]]:
    """The folder that peft is to load, and whether it is a copy under other names. Raises CheckpointError."""
    content = (
        load_safetensors(file, numpy=False)[0]
        if file.suffix == ".safetensors"
        else flat_tensors(file, load_pickle(file))
    )
    spelled = checkpoint.spelled
    tensors = {name_in_base(name, spelled): tensor for name, tensor in unwrapped(content, file).items()}
    if list(tensors) == list(content):
        yield folder, False
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="reparam-witness-") as place:
        copy = Path(place)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")
        config = read_json(folder / "adapter_config.json")
        (copy / "adapter_config.json").write_text(json.dumps(config_of_base(config, checkpoint)))
        yield copy, True


def name_in_base(name: str, spelled: Mapping[str, str]) -> str:
    """A tensor's name with its module as the base calls it."""
    inner = name.removeprefix(PREFIX)
    parts = inner.split(".")
    for stop in range(len(parts), 0, -1):
        module = ".".join(parts[:stop])
        if module in spelled:
            return f"{PREFIX}{'.'.join([spelled[module], *parts[stop:]])}"
    return name


def config_of_base(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration that means the same modules by the base's names, each named in full."""
    if not checkpoint.spelled:
        return dict(config)
    from peft.utils.other import get_pattern_key

    files = {base: name for name, base in checkpoint.spelled.items()}
    adapted = list(dict.fromkeys(a.module for a in checkpoint.adapters if a.kind != "tokens"))
    made = {k: v for k, v in config.items() if k not in ("layers_to_transform", "layers_pattern", "exclude_modules")}
    if made.get("target_modules"):
        made["target_modules"] = adapted
    if isinstance(made.get("feedforward_modules"), list):  # of (IA)^3: by the ends of names, as peft has it
        ends = tuple(made["feedforward_modules"])
        own = {base: files.get(base, base) for base in adapted}
        made["feedforward_modules"] = [
            b for b, f in own.items() if f in ends or f.endswith(tuple(f".{e}" for e in ends))
        ]
    for setting, patterns in config.items():
        if setting.endswith("_pattern") and isinstance(patterns, dict):
            keys = {base: get_pattern_key(list(patterns), files.get(base, base)) for base in adapted}
            made[setting] = {re.escape(base): patterns[key] for base, key in keys.items() if key in patterns}
    return made
