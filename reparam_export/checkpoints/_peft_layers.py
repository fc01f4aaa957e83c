"""The universal road for PEFT folders: peft's own layers, made on the base by peft itself, as adapters of the kind ``probed``.

peft puts the adapter on a copy of the base in the dtype it is stored in, as it does for its user (some types compute a singular value
decomposition of the base then); each of its layers, with the base layer inside, is one adapter. Needs ``pip install reparam-export[peft]``.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reparam_export.affine import Tensor
from reparam_export.checkpoints import Adapter, Bind, Parts, Source, Unbound
from reparam_export.checkpoints._peft import on_base, other_settings, parts_of, tuner_prefix
from reparam_export.checkpoints._peft_names import PREFIX, check_matched
from reparam_export.checkpoints._peft_rebuilt import note_of, rebuilt_by
from reparam_export.errors import CheckpointError, FusionError, MissingBackendError, NotAffineError, TensorMismatchError

if TYPE_CHECKING:
    from torch import nn

MATCH_SECONDS = 5
NOT_GIVEN = {  # to peft, so that nothing is looked up
    "auto_mapping", "base_model_name_or_path", "revision", "runtime_config", "task_type", "peft_version",
}  # fmt: skip
MATCH_ALL = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for p in patterns:
    try:
        forms = [re.compile(f) for f in (p, rf"(.*\.)?({p})$", rf"(?:^|.*?\.){p}\.(\d+)\.", rf".*\.{p}$", rf"(^|.*\.){p}($|\..*)")]
    except re.error:
        continue  # peft will say so, if it is meant to be a pattern
    for name in names:
        forms[0].fullmatch(name), forms[0].search(name), [form.match(name) for form in forms]
"""


def read_layers(source: Source, note: str = "", kind_of: str | None = None) -> Parts:
    """The folder's parts, with adapters that are made when the base is there. Raises CheckpointError and its kin.

    kind_of: what decides whether the base is decomposed while loading, where that is not the peft_type.
    """
    claim = source.claim()
    ours = f".{tuner_prefix(source)}"
    taken = claim.take_all(lambda name: ours in name or name.startswith(f"base_model{ours}"))
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, tensor in taken.items():
        module, _, rest = name.partition(ours)
        if module.startswith(PREFIX):
            by_module.setdefault(module.removeprefix(PREFIX).removesuffix(".base_layer"), {})[ours[1:] + rest] = tensor
    if not by_module:  # all that is saved is shared by the modules
        named = source.config.get("target_modules") or []
        by_module = {str(name): {} for name in ([named] if isinstance(named, str) else named)}
    kind = str(source.config.get("peft_type"))
    settings = {"peft": kind} | ({"rank": source.config["r"]} if isinstance(source.config.get("r"), int) else {})
    adapters = [Adapter(module, "probed", Unbound(dict(t), settings)) for module, t in by_module.items()]
    parts = parts_of(source, claim, adapters, names=[])
    rebuilt = rebuilt_by(kind_of or kind)
    notes = (
        note or f"peft's own {kind} layers, probed one by one",
        *parts.notes,
        *([note_of(rebuilt)] if rebuilt else []),
    )
    # peft itself says which modules are adapted, and that each has its tensors: OSF leaves out what is no nn.Linear, though it is named
    return replace(
        parts,
        bind=bind_layers(source, list(parts.replaced)),
        notes=notes,
        rebuilt=rebuilt,
        covers=lambda names: [],
        only=False,
    )


def bind_layers(source: Source, whole: Sequence[str]) -> Bind:
    """Puts the folder's adapter on a copy of a base, and takes each of peft's layers as an adapter, and the trained tokens."""

    def bind(module: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
        peft = import_peft()
        from peft.tuners.tuners_utils import BaseTunerLayer

        check_patterns(source, [name for name, _ in module.named_modules()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_peft_type(**_plain_settings(peft, source.config))
            model = peft.get_peft_model(copy.deepcopy(module), config)
            result = peft.set_peft_model_state_dict(model, dict(source.tensors))
        _check_loaded(source, peft, model, result)
        model.eval().requires_grad_(False)
        layers: dict[str, Any] = dict(model.base_model.model.named_modules())
        layers = {n: part for n, part in layers.items() if isinstance(part, BaseTunerLayer)}
        layers = {n: part for n, part in layers.items() if not hasattr(part, "trainable_tokens_delta")}
        check_matched(source.path, source.config, list(layers), whole)
        return [
            *(_adapter(n, part, module.get_submodule(n)) for n, part in layers.items()),
            *on_base(None, module, [a for a in adapters if a.kind == "tokens"]),
        ]

    return bind


def check_patterns(source: Source, names: Sequence[str]) -> None:
    """Every pattern of the configuration, as peft will match it with ``re``, ends on these names; tried in a process that can be ended.

    Raises CheckpointError. A pattern is any text in it, however deep, with more than the signs of a plain name.
    """
    import re
    import subprocess
    import sys

    given = {name: value for name, value in source.config.items() if name not in NOT_GIVEN}
    patterns = sorted({text for text in _texts(given) if not re.fullmatch(r"[\w./ -]*", text)})
    if not patterns:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", MATCH_ALL],
            input=json.dumps([patterns, list(names)]),
            text=True,
            timeout=MATCH_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{source.path}: matching the patterns of adapter_config.json with the base's {len(names)} module names takes more than "
            f"{MATCH_SECONDS} s: one of {', '.join(repr(p[:80]) for p in patterns[:3])}"
        ) from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_texts(key), *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def import_peft() -> Any:
    """The package peft. Raises MissingBackendError."""
    try:
        import peft
    except ImportError as error:
        raise MissingBackendError(
            "this adapter is folded by probing peft's own layers, and the package peft is not installed; "
            "pip install 'reparam-export[peft]'",
            package="peft",
            extra="peft",
        ) from error
    return peft


def _plain_settings(peft: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that this version of peft knows; base and hub are left out, so that nothing is looked up."""
    import inspect

    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    name = config.get("peft_type")
    if name not in kinds:
        raise FusionError(
            f"peft {peft.__version__} does not know the peft_type {name!r}; install the version that wrote the folder"
        )
    known = inspect.signature(kinds[name]).parameters
    quiet = {"progressbar": False} if "progressbar" in known else {}
    strange = [k for k in other_settings(config, known) if k not in NOT_GIVEN]
    if strange:
        raise FusionError(
            f"adapter_config.json sets {strange[0]}={str(config[strange[0]])[:80]}, which peft {peft.__version__} does not know for {name}"
        )
    given = {k: v for k, v in config.items() if k in known and k not in NOT_GIVEN and v is not None}
    return given | quiet | {"peft_type": name, "inference_mode": True}


def _check_loaded(source: Source, peft: Any, model: Any, result: Any) -> None:
    """Every tensor of the file found its place, and every tensor of the adapters was in the file. Raises TensorMismatchError."""
    ours = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft.PeftType(source.config["peft_type"])]
    state, absent = model.state_dict(keep_vars=True), set(result.missing_keys)
    loaded = {id(tensor) for name, tensor in state.items() if name not in absent}  # modules may share one tensor
    missing = [name for name in absent if f".{ours}" in name and id(state[name]) not in loaded]
    for name in (*result.unexpected_keys, *sorted(missing)):
        what = "is not in the file, and belongs to" if name in absent else "has no place in"
        raise TensorMismatchError(
            f"{source.path}: {name}: {what} the {source.config['peft_type']} adapter that peft {peft.__version__} builds on this base",
            module=name.rpartition(".")[0],
            tensor=name,
            expected=name if name in absent else None,
            found=None if name in absent else name,
        )


def _adapter(name: str, layer: nn.Module, base: nn.Module) -> Adapter:
    """One of peft's layers as an adapter on its base. Raises NotAffineError for a layer of several inputs."""
    from torch import nn as torch_nn

    from reparam_export.adapters import probed

    if isinstance(base, torch_nn.MultiheadAttention):
        raise NotAffineError(
            f"{name}: peft's layer on an nn.MultiheadAttention takes three inputs and cannot be probed; plain LoRA on it can be folded",
            modules=(name,),
            reason="attention",
        )
    if isinstance(base, torch_nn.Conv1d | torch_nn.Conv2d | torch_nn.Conv3d):
        return Adapter(name, "probed", probed.Params(layer, name, "conv", base))
    return Adapter(
        name, "probed", probed.Params(layer, name, "embedding" if isinstance(base, torch_nn.Embedding) else "linear")
    )
