"""What peft's layers say of themselves against what our adapters say: known without any number of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reparam_export.adapters import kind
from reparam_export.checkpoints import Adapter

if TYPE_CHECKING:
    from torch import nn

RANKED = ("lora", "dora", "hira", "loha")  # whose rank is peft's r
SCALED = ("lora", "dora", "loha", "gralora")  # whose scale is peft's scaling


def settings_parted(name: str, layer: Any, adapters: Sequence[Adapter], module: nn.Module, who: str) -> list[str]:
    """Each setting in which one of peft's layers and our adapters on it differ: module, setting, ours and theirs."""
    from reparam_export.verification.witness._peft_model import of_name

    if adapters and any(a.rows is not None for a in adapters) and type(layer).__name__ == "Linear":
        rows = [a.rows for a in adapters if a.rows is not None]
        return [f"{name}: outputs: ours {', '.join(f'{a}:{b}' for a, b in rows)}, {who} all of them"]
    wrappers = of_name(layer, "ParamWrapper")
    if wrappers:
        return [text for w in wrappers for text in _parameter_parted(name, w, adapters, who)] + _not_wrapped(
            name, wrappers, adapters, who
        )
    found = []
    for adapter in (a for a in adapters if a.module == name):
        ours, theirs = said_by_us(adapter, module), said_by_peft(layer, adapter.kind)
        found += [_parted(adapter.site, what, ours[what], theirs[what], who) for what in ours if what in theirs]
    return [text for text in found if text]


def said_by_us(adapter: Adapter, module: nn.Module | None = None) -> dict[str, Any]:
    """The settings that both sides have a word for."""
    from reparam_export.layouts import layout_of

    told = kind(adapter.kind).describe(adapter.params)
    found: dict[str, Any] = {}
    if adapter.kind in RANKED:
        found["rank"] = told.get("rank")
    if adapter.kind in SCALED:
        found["scale"] = told.get("scale")
    if adapter.kind in ("lora", "dora"):
        found |= {"DoRA": adapter.kind == "dora", "bias of lora_B": adapter.params.pair.up.bias is not None}
    elif adapter.kind != "probed":
        found["kind"] = adapter.kind
    if module is not None and adapter.parameter is None and type(module).__name__ in ("Linear", "Conv1D"):
        found["transposed"] = layout_of(adapter.module, module) == "transposed"
    return found


def said_by_peft(layer: Any, ours: str) -> dict[str, Any]:
    """The same of peft's layer, as far as it has these words."""
    active = layer.active_adapters[0] if getattr(layer, "active_adapters", None) else "default"

    def of(attribute: str) -> Any:
        values = getattr(layer, attribute, None)
        return values[active] if isinstance(values, dict) and active in values else None

    family = type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    found: dict[str, Any] = {"rank": of("r"), "scale": of("scaling")}
    down = of_module(layer, "lora_A", active)
    if found["rank"] is not None and down is not None and not hasattr(layer, "num_experts"):
        found["rank"] = int(
            getattr(down, "weight", down).shape[0]
        )  # r is not it where A and B are those of a tied embedding
    if family == "lora":
        ups = getattr(layer, "lora_B", {})
        found["DoRA"] = bool(of("use_dora")) or "Dora" in type(of_module(layer, "lora_variant", active)).__name__
        found["bias of lora_B"] = active in ups and getattr(ups[active], "bias", None) is not None
        if ours not in ("lora", "dora"):
            found["kind"] = "lora"
    elif ours in ("lora", "dora"):
        found |= {"DoRA": family, "bias of lora_B": family}
    if isinstance(getattr(layer, "fan_in_fan_out", None), bool) and type(layer).__name__ == "Linear":
        found["transposed"] = layer.fan_in_fan_out
    return {name: value for name, value in found.items() if value is not None}


def of_module(layer: Any, attribute: str, active: str) -> Any:
    """An entry of one of a layer's dictionaries of modules; None without it."""
    values = getattr(layer, attribute, None)
    return values[active] if values is not None and active in values else None


def _parameter_parted(name: str, wrapper: Any, adapters: Sequence[Adapter], who: str) -> list[str]:
    """One targeted parameter: our adapters on it, one for each matrix of a stack."""
    parameter = wrapper.parameter_name
    own = [a for a in adapters if a.module == name and (a.parameter or "weight") == parameter]
    site = f"{name}.{parameter}"
    if not own:
        return [f"{site}: {who} adapts this parameter, we do not"]
    experts = {expert: [said_by_us(a) for a in own if a.expert == expert] for expert in {a.expert for a in own}}
    found = [_parted(site, "matrices of the stack", len(experts), wrapper.num_experts, who)]
    theirs = said_by_peft(wrapper, "lora")
    if all(
        "rank" in said for each in experts.values() for said in each
    ):  # of rows apart, peft puts the ranks side by side
        ranks = {sum(said["rank"] for said in each) for each in experts.values()}
        found += [_parted(site, "rank", rank, theirs["rank"], who) for rank in ranks]
    scales = {said["scale"] for each in experts.values() for said in each if "scale" in said}
    found += [_parted(site, "scale", scale, theirs["scale"], who) for scale in scales]
    return [text for text in found if text]


def _not_wrapped(name: str, wrappers: Sequence[Any], adapters: Sequence[Adapter], who: str) -> list[str]:
    known = {w.parameter_name for w in wrappers}
    others = dict.fromkeys(a.parameter or "weight" for a in adapters if a.module == name)
    return [f"{name}.{other}: we adapt this parameter, {who} does not" for other in others if other not in known]


def _parted(site: str, what: str, ours: Any, theirs: Any, who: str) -> str:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (ours, theirs))
    same = math.isclose(ours, theirs, rel_tol=1e-9) if numbers else ours == theirs
    return "" if same else f"{site}: {what}: ours {_shown(ours)}, {who} {_shown(theirs)}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
