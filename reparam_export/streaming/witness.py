"""The second witness of a streamed fusion: on the base's skeleton, before a byte is written, with the numbers of a few layers at a time.

Every layer's settings are compared. Every plain LoRA is compared in numbers, without its base layer, which it does not depend on; with the
real base layer inside, as many layers of any kind as hold no more than ``LIMIT`` entries. Folding itself needs no torch, so a process that
has not imported it lets another one do this, whose memory is free again when folding begins.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Checkpoint
from reparam_export.errors import ReparamError
from reparam_export.streaming.forms import Touched
from reparam_export.streaming.plan import Plan, plan_of
from reparam_export.verification.certificate import WitnessEvidence, witness_from_json
from reparam_export.verification.witness import LIMIT, Subject, check_heard, check_mode, hear, known

if TYPE_CHECKING:
    from torch import nn

CHILD = "from reparam_export.streaming.witness import answer_parent; answer_parent()"
LATER = WitnessEvidence(absent="it is heard by verify, with the whole model")


def heard_of(plan: Plan, wanted: str) -> tuple[WitnessEvidence, ...]:
    """What the witnesses say. wanted: as for ``verify``, or "later". Raises EquivalenceError: one differs, or is required and absent."""
    if wanted == "later":
        return (LATER,)
    check_mode(wanted)
    wanted = "auto" if wanted.startswith("py:") else wanted  # that model is held against ours when outputs are proven
    here = wanted == "none" or not known(plan.checkpoint) or "torch" in sys.modules
    found = hear(subject_of(plan), wanted) if here else _asked(plan)
    check_heard(plan.checkpoint, found, wanted)
    return found


def _asked(plan: Plan) -> tuple[WitnessEvidence, ...]:
    """The same from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(asdict(plan.checkpoint.recipe)), capture_output=True, text=True
    )
    try:
        return tuple(witness_from_json(entry) for entry in json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, ReparamError):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return (WitnessEvidence(absent=f"its process ended with {done.returncode}: {last[:200]}"),)


def answer_parent() -> None:
    """In the other process: the recipe on standard input, the evidence on standard output."""
    from reparam_export.checkpoints import recipe_from_json

    recipe = recipe_from_json(json.load(sys.stdin))
    found = hear(subject_of(plan_of(recipe.read())))
    print(json.dumps([asdict(each) for each in found]))


def subject_of(plan: Plan, seed: int = 0, limit: int = LIMIT) -> Subject:
    """What a witness is shown of a model that is never built."""
    from reparam_export.assembly import base_of
    from reparam_export.bases import hf

    layers = _layers(plan)
    drawn = _drawn(layers, seed, limit)
    base = base_of(plan.model)
    bare: list[Any] = []

    def fresh() -> nn.Module:
        model = hf.skeleton(base)
        for name, touched in layers.items():
            if name in drawn or _plain_lora(touched):
                _lay_out(model.get_submodule(name), touched, plan, exact=name in drawn)
        return model

    @lru_cache(maxsize=1)
    def filled(name: str) -> nn.Module:
        if not bare:
            bare.append(hf.skeleton(base))
        module: nn.Module = bare[0].get_submodule(name)
        return _filled(module, layers[name]) if name in drawn else module

    return Subject(_in_torch(plan.model), fresh, filled, seed=seed, limit=limit, numbers=drawn)


def _in_torch(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with torch's tensors, where it was read without torch."""
    import torch

    from reparam_export.affine import map_tensors
    from reparam_export.streaming.whole import tensor64

    def convert(tensor: Any) -> Any:
        return tensor if isinstance(tensor, torch.Tensor) else tensor64(tensor)

    adapters = tuple(replace(a, params=map_tensors(a.params, convert)) for a in checkpoint.adapters)
    biases = {name: convert(t) for name, t in checkpoint.replaced.items() if name.endswith(".bias")}
    return replace(checkpoint, adapters=adapters, replaced={**checkpoint.replaced, **biases})


def _layers(plan: Plan) -> dict[str, Touched]:
    """The touched layers by their names in the model; what the model reads itself, as the stacks of experts, is none."""
    modules = dict.fromkeys(a.module for a in plan.model.adapters if a.parameter is None)
    named = {module: plan.files.get(module, module) for module in modules}
    return {module: plan.touched[file] for module, file in named.items() if file in plan.touched}


def _drawn(layers: Mapping[str, Touched], seed: int, limit: int) -> frozenset[str]:
    """All layers where they hold no more entries than the limit, else a seeded choice; at least one."""
    names = sorted(layers)
    random.Random(seed).shuffle(names)
    kept: list[str] = []
    entries = 0
    for name in names:
        out, inn = layers[name].shape
        entries += out * inn
        if kept and entries > limit:
            break
        kept.append(name)
    return frozenset(kept)


def _plain_lora(touched: Touched) -> bool:
    return all(a.kind == "lora" and a.rows is None and a.parameter is None for a in touched.adapters)


def _lay_out(module: nn.Module, touched: Touched, plan: Plan, *, exact: bool) -> None:
    """A weight of zeros that takes no memory, and the base's own bias; the numbers come when it is this layer's turn."""
    import torch

    dtype = torch.float64 if exact else torch.float32
    shape = touched.weight.shape
    module.weight = torch.nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
    _put_scale(module)
    if getattr(module, "bias", None) is not None:
        own = touched.bias64()
        brought = f"{touched.module}.bias" in plan.checkpoint.replaced  # then the witness has to bring it as well
        values = torch.zeros(touched.shape[0]) if own is None or brought else torch.from_numpy(own)
        module.bias = torch.nn.Parameter(values.to(dtype), requires_grad=False)


def _put_scale(module: nn.Module) -> None:
    """A number for the scale of embeddings, which has none on a skeleton: which one it is has no part in how an adapter is read."""
    import torch

    from reparam_export.subclasses import SCALE, scale_of

    scale = scale_of(module)
    if isinstance(scale, torch.Tensor) and scale.is_meta:
        module._buffers[SCALE] = torch.tensor(math.sqrt(module.get_parameter("weight").shape[-1]), dtype=torch.float64)


def _filled(module: nn.Module, touched: Touched) -> nn.Module:
    """A layer of its own with the base's numbers in float64, as stored, and the bias that the checkpoint may have replaced."""
    import copy

    import torch

    from reparam_export.streaming.whole import base64

    affine = base64(touched)
    layer: Any = copy.copy(module)
    layer._parameters = dict(module._parameters)
    weight = affine.weight.T if touched.transposed else affine.weight
    layer._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    layer._buffers = dict(module._buffers)
    _put_scale(layer)
    if affine.bias is not None:
        layer._parameters["bias"] = torch.nn.Parameter(affine.bias, requires_grad=False)
    return layer  # type: ignore[no-any-return]
