"""peft's own model of a plain state dict: peft makes it from the configuration, and it loads the file as its user's script does.

Every tensor of the file must have its place in peft's model, and every tensor of peft's layers its numbers in the file. Without a
configuration, ranks and modules are those of the file's tensors, and alpha is the user's.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Checkpoint, Source, open_source
from reparam_export.checkpoints._peft_names import PREFIX
from reparam_export.checkpoints._settings import read_settings
from reparam_export.names.wrappers import plain_names, several, unwrapped
from reparam_export.verification.witness import UnableError
from reparam_export.verification.witness._peft_names import config_of_base, name_in_base

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD = re.compile(r"(?:\A|.+?\.)base_model\.(?=model\.)")
SHARED = re.compile(r"(?:\A|.+?\.)(?=base_model\.)")  # what peft keeps once for all modules
LORA = re.compile(r"\.lora_(?:A|embedding_A)(?:\.weight)?\Z")


def state_loaded(peft: Any, checkpoint: Checkpoint, base: nn.Module, *, skeleton: bool) -> tuple[nn.Module, bool]:
    """peft's model, and whether the file has other names than the base. Raises UnableError.

    skeleton: the base's own numbers are not there, and those of the file are not put in.
    """
    source = _opened(checkpoint)
    source = replace(source, tensors={n: t for n, t in source.tensors.items() if n not in checkpoint.dropped})
    tensors = {_in_folder(name): tensor for name, tensor in _of_one_adapter(source, checkpoint).items()}
    named = {name_in_base(name, checkpoint.spelled): tensor for name, tensor in tensors.items()}
    config = dict(source.config) if "peft_type" in source.config else _lora(checkpoint, tensors)
    model = peft.get_peft_model(base, _config(peft, config_of_base(config, checkpoint), base))
    _fill(peft, model, named, skeleton=skeleton)
    model.eval().requires_grad_(False)
    inner: nn.Module = model.base_model.model
    return inner, named.keys() != tensors.keys()


def _opened(checkpoint: Checkpoint) -> Source:
    recipe = checkpoint.recipe
    given = read_settings([Path(c) for c in recipe.config], recipe.settings, recipe.candidate)
    return open_source(checkpoint.path, given, base_given=True, numpy=False)


def _of_one_adapter(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    """The tensors of the adapter that is read, without its name, and those that belong to none."""
    chosen = checkpoint.settings.get("adapter")
    others = [re.escape(name) for name in several(source.tensors) if name != chosen]
    if chosen is None or not others:
        return dict(source.tensors)
    away = re.compile(rf"\.(?:lora_\w+|modules_to_save)\.(?:{'|'.join(others)})(?:\.|\Z)")
    kept = {n.replace(f".{chosen}.", ".default."): t for n, t in source.tensors.items() if not away.search(n)}
    return unwrapped(kept, source.path)


def _in_folder(name: str) -> str:
    """The name that a folder would have: what peft's model stands inside is left away, what it was taken out of is put in front."""
    if HEAD.match(name):
        return HEAD.sub("base_model.", name, count=1)
    return SHARED.sub("", name, count=1) if SHARED.match(name) else PREFIX + name


def _lora(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of a file without one: it is LoRA, with the ranks of its tensors. Modules by their names in the file."""
    downs = {LORA.sub("", name): tensor for name, tensor in tensors.items() if LORA.search(name)}
    ranks = {name.removeprefix(PREFIX): int(tensor.shape[0]) for name, tensor in downs.items()}
    saved = [n.partition(".modules_to_save.")[0] for n in tensors if ".modules_to_save." in n]
    if any("token_adapter" in name for name in tensors) or any(".base_layer.base_layer." in name for name in tensors):
        raise UnableError("peft needs adapter_config.json for trained tokens and parameters; give it with --config")
    return {
        "peft_type": "LORA",
        "r": next(iter(ranks.values()), 1),
        "target_modules": list(ranks),
        "rank_pattern": {
            re.escape(n): ranks[n] for n in sorted(ranks, key=len, reverse=True)
        },  # peft takes the first that ends so
        "lora_alpha": checkpoint.settings.get("lora_alpha"),
        "use_rslora": bool(checkpoint.settings.get("use_rslora", False)),
        "use_dora": any(".lora_magnitude_vector" in name for name in tensors),
        "lora_bias": any(name.endswith(".lora_B.bias") for name in tensors),
        "modules_to_save": [name.removeprefix(PREFIX) for name in dict.fromkeys(saved)] or None,
    }


def _config(peft: Any, config: Mapping[str, Any], base: nn.Module) -> Any:
    """As peft reads it from a folder, with nothing looked up."""
    with tempfile.TemporaryDirectory(prefix="reparam-witness-") as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        made = peft.PeftConfig.from_pretrained(folder)
    made.base_model_name_or_path = made.revision = None
    made.inference_mode = False  # as when it was trained: peft makes every layer that the file has numbers for
    if hasattr(made, "progressbar"):
        made.progressbar = False
    if not hasattr(base, "prepare_inputs_for_generation") and made.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        made.task_type = None  # peft's class for it wants a model of transformers
    return made


def _fill(peft: Any, model: Any, tensors: Mapping[str, Tensor], *, skeleton: bool) -> None:
    """The file's tensors in peft's model. Raises UnableError for one without a place, and for a layer of peft's without numbers."""
    state = model.state_dict(keep_vars=True)
    places = dict(zip(plain_names(list(state)), state, strict=True))
    left = [name for name in tensors if name not in places]
    if left:
        raise UnableError(
            f"peft {peft.__version__} itself has no place on this base for {len(left)} tensors of the file, first {left[0]}"
        )
    frozen = {id(state[places[n]]) for n in places if not state[places[n]].requires_grad}
    mine = {places[n]: t for n, t in tensors.items() if not (skeleton and id(state[places[n]]) in frozen)}
    apart = [n for n in mine if tuple(state[n].shape) != tuple(mine[n].shape)]
    if apart:
        raise UnableError(
            f"peft {peft.__version__} itself has another shape for {apart[0]}: {tuple(state[apart[0]].shape)}"
        )
    model.load_state_dict(mine, strict=False)
    absent = _absent(state, mine)
    if absent:
        raise UnableError(
            f"peft {peft.__version__} itself finds no numbers in the file for {len(absent)} tensors, first {absent[0]}"
        )


def _absent(state: Mapping[str, Tensor], mine: Iterable[str]) -> list[str]:
    """What peft trains and the file does not have; modules may share one tensor."""
    found = {id(state[name]) for name in mine}
    return [name for name, tensor in state.items() if tensor.requires_grad and id(tensor) not in found]
