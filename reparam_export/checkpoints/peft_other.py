"""PEFT folders of the other types: without a short formula, through peft's own layers; where no weight reproduces them, refused."""

from __future__ import annotations

from reparam_export import plugins
from reparam_export.checkpoints import Parts, Source
from reparam_export.checkpoints._peft_layers import read_layers
from reparam_export.checkpoints._peft_names import PREFIX
from reparam_export.errors import FusionError, NotAffineError

LOOKED_FOR = "a folder with adapter_config.json and any other peft_type (peft)"
PROBED = ("ADAMSS", "OSF", "PEANUT", "PSOFT", "SUPERTUNING", "TINYLORA", "UNILORA")
PROMPT = "it adds learned vectors to the input sequence or to the keys and values, and changes no weight"
REFUSED = {
    "ADAPTION_PROMPT": "it attends to learned prompts through a gate inside attention, beside the weights",
    "CARTRIDGE": PROMPT,
    "CPT": PROMPT,
    "FROD": "its projections are eigenvectors of the base's weights, computed again while loading: a last bit of the base, or another "
    "number of threads, gives another model (peft does not reproduce its own outputs elsewhere); save it as LoRA where it was trained",
    "LILY": "it routes each input among experts, so the change depends on the input",
    "MULTITASK_PROMPT_TUNING": PROMPT,
    "POLY": "it mixes adapters by a task id that comes with each call",
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT,
    "SHADOW": "it runs a second network beside the base",
    "XLORA": "a classifier weighs the adapters anew for every token",
}


def accepts(source: Source) -> bool:
    return "peft_type" in source.config and not any(
        plugins.load("checkpoints", name).accepts(source)
        for name in plugins.names("checkpoints")
        if name != __name__.rpartition(".")[2]
    )


def read(source: Source) -> Parts:
    kind = str(source.config["peft_type"])
    if kind in PROBED:
        return read_layers(source)
    modules = tuple(dict.fromkeys(name.removeprefix(PREFIX).rpartition(".")[0] or name for name in source.tensors))
    where = f"({len(modules)} modules, first {modules[0]})" if modules else ""
    if kind in REFUSED:
        raise NotAffineError(
            f"{source.path}: a {kind} adapter cannot be folded: {REFUSED[kind]} {where}",
            modules=modules,
            reason=REFUSED[kind],
        )
    raise FusionError(
        f"{source.path}: peft_type {kind!r} is not known to this version of reparam-export, so whether weights alone reproduce it is not "
        f"known either {where}; look for a newer one"
    )
