"""A plain state dict of a model with peft's own layers in it: what ``torch.save(model.state_dict())``, Lightning, FSDP and verl write.

    [OUTER.]base_model.model.X.base_layer.weight               the base's own, below an adapter
    [OUTER.]base_model.model.X.lora_A.NAME.weight lora_B...    as in a folder, with the name of the adapter
    [OUTER.]base_model.model.H.modules_to_save.NAME.weight     trained whole; H.original_module.weight is the unused copy
    [OUTER.]base_model.model.Y.weight                          the base's own

``base_model.model.`` may be missing (``inject_adapter_in_model``, ``model.add_adapter``), and so may all of the base's own tensors (peft,
tuners/tuners_utils.py and utils/other.py). The settings are in ``adapter_config.json``, beside the file or given with ``--config``; it may
be of any type that a folder may be of. Without it the file must be LoRA: ranks are the tensors' own, ``lora_alpha`` is asked for (or is
that of Lightning's ``hyper_parameters``), and ``use_rslora`` may be set. Of several adapters one is chosen with ``--set adapter=NAME``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from reparam_export import plugins
from reparam_export.affine import Tensor
from reparam_export.checkpoints import Format, Parts, Source, alike
from reparam_export.checkpoints._carried import with_base
from reparam_export.checkpoints._peft import WRAPPERS, is_state, tuner_prefix
from reparam_export.checkpoints._peft_names import PREFIX
from reparam_export.errors import CheckpointError, TensorMismatchError
from reparam_export.names.once import renamed_once
from reparam_export.names.wrappers import several, unwrapped

LOOKED_FOR = "base_model.model.X.lora_A.weight and the like in a plain state dict (a peft model's own)"
HEAD = re.compile(r"(?:\A|(?<=\.))base_model\.model\.")
SHARED = re.compile(r"(?:\A|.+\.)(base_model\.(?!model\.).+)")  # by all modules, such as VeRA's projections
TRAINED = re.compile(r"\.(?:modules_to_save|original_module|token_adapter|ln_tuning_layers)\.|trainable_tokens")

accepts = is_state


def read(source: Source) -> Parts:
    tensors = _once(renamed_once(_one_adapter(source), _in_folder, source.path))
    config = source.config if "peft_type" in source.config else lora_settings(source, list(tensors))
    tuned = f".{tuner_prefix(replace(source, config=config))}"
    own = {n: t for n, t in tensors.items() if tuned not in n and n.startswith(PREFIX) and not TRAINED.search(n)}
    inner = replace(source, tensors={n: t for n, t in tensors.items() if n not in own}, config=config)
    return with_own(source, reader_of(inner).read(inner), own)


def _in_folder(name: str) -> str:
    """The name that a folder would have."""
    shared = SHARED.fullmatch(name)
    return shared[1] if shared else PREFIX + HEAD.sub("", name)


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all modules share once, and not again in each of them."""
    shared = {n.removeprefix("base_model."): t for n, t in tensors.items() if not n.startswith(PREFIX)}
    copies = {n for n in tensors if n.startswith(PREFIX) and n.rpartition(".")[2] in shared}
    return {n: t for n, t in tensors.items() if n not in copies or bool((t != shared[n.rpartition(".")[2]]).any())}


def reader_of(source: Source) -> Format:
    """The reader of a folder of this type. Raises CheckpointError for tensors that none reads."""
    for name in plugins.names("checkpoints"):
        fmt = cast(Format, plugins.load("checkpoints", name))
        if name.startswith("peft_") and name != "peft_state" and fmt.accepts(source):
            return fmt
    raise CheckpointError(f"{source.path}: a state dict of peft's layers without adapters in it")


def with_own(source: Source, parts: Parts, own: Mapping[str, Tensor]) -> Parts:
    """The parts with the base's own tensors of the same file: all of them, or some that were trained (biases)."""
    state = renamed_once(own, lambda name: WRAPPERS.sub("", name.removeprefix(PREFIX)), source.path)
    for name in parts.replaced:
        if name in state and not alike(state[name], parts.replaced[name]):
            raise TensorMismatchError(
                f"{source.path}: {name} is in the file twice, as the base's own and as one that was trained, with other numbers; the one "
                "that was not in use is called original_module by peft: take it out",
                module=name.rpartition(".")[0],
                tensor=name,
                expected="one of them",
                found="two",
            )
    if not any(".base_layer." in name and name.endswith("weight") for name in own):
        return replace(parts, replaced=state | dict(parts.replaced))
    covers = parts.covers or (lambda names: [])  # a layer without an adapter has its plain name in the file
    return with_base(source, replace(parts, covers=covers), state)


SCRIPT = "adapter_config.json, or the LoraConfig of the training script"


def lora_settings(
    source: Source, names: list[str], found_in: str = SCRIPT, alphas: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What stands for ``adapter_config.json`` of LoRA where there is none. alphas: of each module, where the file has them.

    Raises MissingSettingError without them and without ``lora_alpha``.
    """
    given = source.settings
    options = source.content.get("hyper_parameters")
    options = getattr(options, "__dict__", options)
    if isinstance(options, Mapping) and "lora_alpha" in options:
        for name in ("lora_alpha", "use_rslora"):
            given.offer(name, options.get(name), "the file's hyper_parameters")
    alpha = 1 if alphas else given.number("lora_alpha", found_in=found_in)
    rs = given.flag("use_rslora")
    otherwise = (
        "" if "use_rslora" in given.values else " (if it was trained with use_rslora, / sqrt(r): --set use_rslora=true)"
    )
    name = "alpha" if alphas else "lora_alpha"
    given.notes.append(f"scale {name} / {'sqrt(r)' if rs else 'r'} on every module{otherwise}")
    return {
        "peft_type": "LORA",
        "lora_alpha": alpha,
        "alpha_pattern": {rf"\A{re.escape(name)}": own for name, own in (alphas or {}).items()},
        "use_rslora": rs,
        "use_dora": any(".lora_magnitude_vector" in name for name in names),
        "lora_bias": any(name.endswith(".lora_B.bias") for name in names),
    }


def _one_adapter(source: Source) -> dict[str, Tensor]:
    """The tensors of one of the adapters in the file, without its name, and those that belong to none."""
    adapters = several(source.tensors)
    tensors = dict(source.tensors)
    if len(adapters) > 1:
        why = (
            f"{source.path}: the file holds the adapters {', '.join(adapters)}; which one was in use decides the result"
        )
        chosen = source.settings.choice("adapter", adapters, why=why)
        others = re.compile(
            rf"\.(?:lora_\w+|modules_to_save)\.(?:{'|'.join(map(re.escape, set(adapters) - {chosen}))})(?:\.|\Z)"
        )
        tensors = {n: t for n, t in tensors.items() if not others.search(n)}
        mark = ".modules_to_save."
        tensors = renamed_once(tensors, lambda n: n.replace(f"{mark}{chosen}.", mark), source.path)
        tensors = unwrapped(tensors, source.path)
    return renamed_once(tensors, lambda name: _unnamed(name, tensors), source.path)


def _unnamed(name: str, tensors: Mapping[str, Tensor]) -> str:
    """``H.modules_to_save.NAME.weight`` without NAME, where the unused copy shows that it is one."""
    owner, mark, rest = name.partition(".modules_to_save.")
    inner = rest.partition(".")[2]
    if mark and f"{owner}.original_module.{rest}" not in tensors and f"{owner}.original_module.{inner}" in tensors:
        return f"{owner}{mark}{inner}"
    return name
