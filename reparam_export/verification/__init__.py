"""The proof that the fused model is the trained one: weights, outputs, graph. ``verify`` puts the three together."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reparam_export.assembly import adapted, base_of, fused, opened, place, settled
from reparam_export.calls import copied, foreign
from reparam_export.checkpoints import Adapter, Checkpoint, by_site, components
from reparam_export.errors import EquivalenceError, FusionError
from reparam_export.fit import touched_module
from reparam_export.fusion import DTYPES, Advance, FusedWeights, own_state
from reparam_export.layouts import site_of, touched
from reparam_export.models import Signature, read_inputs, samples
from reparam_export.verification.certificate import (
    CarriedEvidence,
    Certificate,
    GraphEvidence,
    LayerEvidence,
    OutputEvidence,
)
from reparam_export.verification.graph import compare_graphs
from reparam_export.verification.outputs import (
    DRAWS,
    Reference,
    check_apart,
    compare,
    distance,
    first_parting,
    jolt,
    judged_again,
    measure_floors,
    run,
)
from reparam_export.verification.survival import overall
from reparam_export.verification.weights import EXHAUSTIVE_LIMIT, prove_carried, prove_layer, uncovered
from reparam_export.verification.witness import Subject, check_mode, hear

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SAMPLES = 8
BATCHES = (1, 2)


@dataclass(frozen=True)
class VerifiedModel:
    """Fused weights with the certificate that they are the trained model; the only thing that can be exported."""

    checkpoint: Checkpoint
    weights: FusedWeights
    signature: Signature
    reference: Reference
    certificate: Certificate

    def check(self) -> None:
        """Raises EquivalenceError if the weights are not the proven ones."""
        found = self.weights.sha256()
        if found != self.certificate.weights_sha256 or self.certificate.verdict == "wrong":
            raise EquivalenceError(
                f"these weights ({found[:12]}) are not the ones that were proven ({self.certificate.weights_sha256[:12]}); "
                "verify them again"
            )

    def module(self) -> nn.Module:
        """The plain fused model, in its storage dtypes. Raises EquivalenceError if the weights are not the proven ones."""
        self.check()
        return fused(base_of(settled(self.checkpoint)).build()[0], self.weights.tensors)

    def unfused(self, dtype: torch.dtype) -> nn.Module:
        """The unfused adapted model in one dtype: what noise floors are measured on."""
        module, _, checkpoint = opened(self.checkpoint)
        return adapted(place(module, checkpoint.replaced), checkpoint.adapters, dtype)

    def drawn_floors(self) -> dict[str, float]:
        """The floors of the reference, from several runs of the unfused model; see ``outputs``."""
        module, signature, checkpoint = opened(self.checkpoint)
        return drawn_floors(module, checkpoint, signature, self.reference)


def verify(
    checkpoint: Checkpoint,
    weights: FusedWeights,
    inputs: str | Path | Mapping[str, Tensor] | None = None,
    *,
    count: int = SAMPLES,
    seed: int = 0,
    exhaustive_limit: int = EXHAUSTIVE_LIMIT,
    advance: Advance | None = None,
    witness: str = "auto",
    expected: str | Path | None = None,
) -> VerifiedModel:
    """Prove that ``weights`` is the checkpoint's adapted model. Raises EquivalenceError with the certificate as evidence.

    inputs: real samples (.npy or .npz file, or tensors by input name); None: ``count`` random ones of the base's input spec.
    exhaustive_limit: layers with in * in * out above it are probed instead of read out entry by entry.
    advance: called with (layers done, layers in all).
    witness: who reads the checkpoint a second time: "auto", "required", "none", or "py:FILE.py:FUNCTION", which returns
    the adapted model as it was trained. expected: .npz file of inputs and of the answers that the user's own training code gave.
    """
    check_mode(witness)
    base, signature, on_base = opened(checkpoint)
    given, source = _inputs(inputs, signature, count, seed)
    layers = prove_weights(base, on_base, weights, seed, exhaustive_limit, advance)
    carried = _carried(base, on_base, weights)
    graph = _graph(base, weights, signature, given)
    reference, outputs, layer, idle = prove_outputs(base, on_base, weights, signature, given)
    subject = Subject(
        checkpoint=on_base,
        fresh=lambda: base_of(on_base).build()[0],
        layer=base.get_submodule,
        signature=signature,
        reference=reference,
        unfused=lambda dtype: _unfused(base, on_base, dtype),
        seed=seed,
    )
    certificate = Certificate(
        weights_sha256=weights.sha256(),
        checkpoint={**checkpoint.describe(), "notes": list(on_base.notes)},
        base={
            "spec": checkpoint.base,
            "weights": None if checkpoint.base_weights is None else str(checkpoint.base_weights),
        },
        storage=weights.storage(),
        layers=layers,
        carried=carried,
        outputs=outputs,
        graph=graph,
        survival=overall(layers),
        seed=seed,
        samples={"source": source, "count": reference.samples},
        unexercised=idle,
        versions=versions(),
        witness=hear(subject, witness, expected),
    )
    if certificate.verdict == "wrong":
        _check_called(base, on_base, weights, signature, reference, certificate)
        raise refusal(certificate, layer)
    return VerifiedModel(checkpoint, weights, signature, reference, certificate)


def check_given(checkpoint: Checkpoint, inputs: str | Path | None, expected: str | Path | None) -> None:
    """Raises UsageError for a file of samples or of answers that is not of this base: before there is anything to prove."""
    from reparam_export.verification.witness._code import check_answers

    if inputs is None and expected is None:
        return
    base, signature = base_of(settled(checkpoint)).build()
    if inputs is not None:
        read_inputs(Path(inputs), signature)
    if expected is not None:
        check_answers(Path(expected), base, signature)


def prove_weights(
    base: nn.Module,
    checkpoint: Checkpoint,
    weights: FusedWeights,
    seed: int,
    limit: int,
    advance: Advance | None = None,
) -> tuple[LayerEvidence, ...]:
    """The weight proof of every adapter, of those on the same outputs together.

    Raises EquivalenceError for a touched tensor that is missing or mis-shaped.
    """
    evidence = []
    tensors = weights.by_every_name()
    order = {name: number for number, (name, _) in enumerate(base.named_modules())}
    stacks = [stack for group in by_site(checkpoint.adapters).values() for stack in components(group)]
    for done, stack in enumerate(sorted(stacks, key=lambda s: order.get(s[0].module, 0)), 1):
        module = touched_module(base, stack[0].module)
        _check_present(module, stack[0], tensors)
        evidence.append(prove_layer(module, stack, tensors, seed=seed, limit=limit))
        if advance is not None:
            advance(done, len(stacks))
    return tuple(evidence)


def _check_present(module: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Raises EquivalenceError unless the fused weights hold the touched tensors in their shapes, as floating point numbers."""
    site = site_of(module, adapter)
    own = site.of(module)
    expected, found = tuple(own[site.tensor].shape), tensors.get(site.tensor)
    if found is None or tuple(found.shape) != expected:
        raise EquivalenceError(
            f"{site.tensor}: expected shape {expected}, found "
            f"{'no such tensor' if found is None else tuple(found.shape)} in the fused weights",
            layer=adapter.module,
        )
    bias = tensors.get(site.bias) if site.bias else None
    outputs = site.affine(own).out_features
    fits = bias is None or (tuple(bias.shape) == (outputs,) and bias.is_floating_point())
    if not fits or not found.is_floating_point():
        raise EquivalenceError(
            f"{adapter.module}: the fused weights hold it as {found.dtype} {tuple(found.shape)}"
            + (f" with a bias {bias.dtype} {tuple(bias.shape)}" if bias is not None else "")
            + "; expected floating point numbers and one bias per output",
            layer=adapter.module,
        )


def prove_again(checkpoint: Checkpoint, weights: FusedWeights, certificate: Certificate) -> None:
    """The weight proof once more, for a certificate that was picked up from disk. Raises EquivalenceError."""
    base, _, checkpoint = opened(checkpoint)
    layers = prove_weights(base, checkpoint, weights, certificate.seed, EXHAUSTIVE_LIMIT)
    again = replace(certificate, layers=layers, carried=_carried(base, checkpoint, weights))
    if again.verdict == "wrong":
        raise refusal(again, None)


def prove_outputs(
    base: nn.Module, checkpoint: Checkpoint, weights: FusedWeights, signature: Signature, given: Mapping[str, Tensor]
) -> tuple[Reference, tuple[OutputEvidence, ...], str | None, tuple[str, ...]]:
    """Reference, evidence at batch 1, 2 and all samples, the first module that parts when it fails, modules never called."""
    import torch

    def unfused(dtype: torch.dtype) -> nn.Module:
        return _unfused(base, checkpoint, dtype)

    dtype = storage_dtype(weights)
    reference_model = unfused(torch.float64)
    exact = run(reference_model, signature, given, torch.float64)
    modules = list(dict.fromkeys(adapter.module for adapter in checkpoint.adapters))
    idle = tuple(n for n in modules if not getattr(reference_model.get_submodule(n), "calls", 1))
    truth = dict(zip(signature.outputs, exact, strict=True))
    moved = _moved(base, checkpoint, signature, given, truth)
    noisy = run(unfused(dtype), signature, given, dtype)
    _check_repeatable(checkpoint, noisy, run(unfused(dtype), signature, given, dtype))
    floors = measure_floors(truth, noisy)
    reference = Reference(given, truth, floors, str(dtype).removeprefix("torch."), signature.axes, moved)
    check_apart(reference_model, signature, reference)
    del reference_model
    running = running_dtype(weights)
    model = fused(copied(base), weights.tensors).to(running)
    outputs: list[OutputEvidence] = []
    for batch in dict.fromkeys((*BATCHES, reference.samples)):
        outputs += compare(
            "fused", lambda x: run(model, signature, x, running, step=len(next(iter(x.values())))), reference, batch
        )
    layer = None
    if not all(o.passed for o in outputs):
        reference = replace(reference, floors=drawn_floors(base, checkpoint, signature, reference))
        outputs = [judged_again(output, reference) for output in outputs]
    if not all(o.passed for o in outputs):
        models = (unfused(torch.float64), unfused(dtype), model)
        layer = first_parting(models, (torch.float64, dtype, running), signature, given, modules)
    return reference, tuple(outputs), layer, idle


def _check_called(
    base: nn.Module,
    checkpoint: Checkpoint,
    weights: FusedWeights,
    signature: Signature,
    reference: Reference,
    certificate: Certificate,
) -> None:
    """Raises FusionError where nothing is wrong but this: the model reads the weights of layers that it never calls, past their adapters.

    So it is when the fused model without its change of these layers answers as the reference does.
    """
    import torch

    idle = set(certificate.unexercised)
    told = [text for each in certificate.witness for text in each.differences]
    if not idle or told or not certificate.carried.passed or not all(layer.passed for layer in certificate.layers):
        return
    names = {n for a in checkpoint.adapters if a.module in idle for n in touched(a)} & set(weights.tensors)
    state = state_for(base, weights)
    plain = {
        n: state[n].to(t.dtype) if n in state else torch.zeros_like(t) for n, t in weights.tensors.items() if n in names
    }
    running = running_dtype(weights)
    model = fused(copied(base), {**weights.tensors, **plain}).to(running)
    found = compare("fused", lambda x: run(model, signature, x, running), reference, reference.samples)
    if all(output.passed for output in found):
        first = certificate.unexercised[0]
        raise FusionError(
            f"{type(base).__name__} never calls {len(idle)} of the layers that have adapters, first {first}: it reads their weights "
            "itself, past whatever an adapter adds to what the layer answers. Unfused (in peft, too) these adapters do nothing, folded "
            "they would change every answer. If peft trained them, take them out of target_modules in adapter_config.json, and out of "
            f"the file with --drop '*{first}.*' each; if the training code put them into the weight that is read, there is no unfused "
            "forward here that the fused model can be held against"
        )


def _moved(
    base: nn.Module,
    checkpoint: Checkpoint,
    signature: Signature,
    given: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
) -> dict[str, float]:
    """How far the adapters move each output: from the plain model with the same whole tensors, or, of a checkpoint that has nothing but
    these, from the model without them."""
    import torch

    plain = base_of(settled(checkpoint)).build()[0] if not checkpoint.adapters else copied(base)
    if checkpoint.adapters:
        plain = place(plain, checkpoint.replaced)
    found = run(plain.to(torch.float64), signature, given, torch.float64)
    return {name: distance(tensor, truth[name]) for name, tensor in zip(signature.outputs, found, strict=True)}


def drawn_floors(
    base: nn.Module, checkpoint: Checkpoint, signature: Signature, reference: Reference
) -> dict[str, float]:
    """The floors of ``reference``, or the largest of DRAWS more where that is larger; see ``outputs``."""
    import torch

    dtype: torch.dtype = getattr(torch, reference.dtype)
    floors = dict(reference.floors)
    for draw in range(DRAWS):
        noisy = run(_unfused(base, checkpoint, dtype, draw), signature, reference.inputs, dtype)
        found = measure_floors(reference.outputs, noisy)
        floors = {name: max(floor, found[name]) for name, floor in floors.items()}
    return floors


def _unfused(base: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, draw: int | None = None) -> nn.Module:
    """Our unfused model: the base with the whole tensors as they were trained, not in the base's dtypes, and the adapters.

    draw: the number of a run with other roundings; None: the plain one.
    """
    whole = place(copied(base), checkpoint.replaced)
    if draw is not None:
        whole = jolt(whole.to(dtype), draw)
    with foreign(type(base).__name__, f"cast to {str(dtype).removeprefix('torch.')} with its adapters in it"):
        return adapted(whole, checkpoint.adapters, dtype)


def _check_repeatable(checkpoint: Checkpoint, once: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """Raises EquivalenceError for a model that answers the same input in two ways: nothing can be proven of it."""
    import torch

    if not all(torch.equal(a, b) or not bool(a.isfinite().all()) for a, b in zip(once, again, strict=True)):
        raise EquivalenceError(
            f"{checkpoint.base}: the unfused model answers the same samples differently on each call (dropout that eval() does not "
            "switch off, random numbers in the forward, or state that a call changes); nothing can be proven of it"
        )


def asked_dtype(weights: FusedWeights) -> torch.dtype | None:
    """The storage that was asked for; None: each tensor as in the base."""
    import torch

    return getattr(torch, DTYPES[weights.dtype]) if weights.dtype in DTYPES else None


def running_dtype(weights: FusedWeights) -> torch.dtype:
    """What the fused model is run in: its storage, or the widest one where tensors have several."""
    return max((t.dtype for t in weights.tensors.values() if t.is_floating_point()), key=lambda d: d.itemsize)


def storage_dtype(weights: FusedWeights) -> torch.dtype:
    """The float dtype whose noise the outputs may have: the one that holds most of the values, or the coarsest chosen for a layer."""
    import torch

    if weights.dtype == "auto":
        return max((weights[name].dtype for name in weights.changed), key=lambda d: torch.finfo(d).eps)
    sizes: dict[torch.dtype, int] = {}
    for tensor in weights.tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda d: sizes[d])


def refusal(certificate: Certificate, layer: str | None) -> EquivalenceError:
    """The error for a failed proof: the first layer that parts, and the numbers."""
    wrong = [e for e in certificate.layers if not e.passed]
    parts = []
    if wrong:
        first = wrong[0]
        layer = first.module
        at = first.worst or {}
        parts.append(
            f"{len(wrong)} of {len(certificate.layers)} layers differ from the trained adapter, first {first.module} ({first.kind}): "
            f"{at.get('tensor')}{at.get('index')} is {at.get('found')!r}, the exact value is {at.get('expected')!r}, "
            f"{first.bound_ratio:.3g} times the rounding bound"
        )
    if not certificate.carried.passed:
        parts.append(f"tensors that no adapter touches differ: {'; '.join(certificate.carried.different[:3])}")
    bad = next((o for o in certificate.outputs if not o.passed), None)
    if bad is not None:
        where = f", first parting at {layer}" if layer else ""
        if certificate.unexercised and not wrong:
            never = certificate.unexercised[0]
            where = (
                f"; {never} is never called (its weight is read directly), so an adapter on it has no unfused forward"
            )
        if bad.error <= bad.bound:
            where = (
                f", which is as large as the output itself ({bad.magnitude:.3g}): in {bad.dtype} this model's own noise hides "
                "everything; prove it with real --inputs, or in a wider --dtype"
            )
        parts.append(
            f"output {bad.output} at batch {bad.batch} is off by {bad.error:.3g}, bound {bad.bound:.3g}{where}"
        )
    read_twice = [text for each in certificate.witness for text in each.differences]
    if read_twice:
        parts.insert(
            0,
            f"the second witness reads the checkpoint in another way in {len(read_twice)} places: {'; '.join(read_twice[:3])}",
        )
    if not certificate.graph.passed:
        parts.append(f"the graph differs from the base's: {certificate.graph.differences[0]}")
    return EquivalenceError(
        "the fused model is not the trained model: " + "; ".join(parts), layer=layer, evidence=certificate
    )


def versions() -> dict[str, str]:
    """Versions of what the proof ran on."""
    import importlib.metadata

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in (
        "reparam-export",
        "torch",
        "timm",
        "transformers",
        "onnx",
        "onnxruntime-gpu",
        "tensorrt-rtx",
        "tensorrt",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _inputs(
    inputs: str | Path | Mapping[str, Tensor] | None, signature: Signature, count: int, seed: int
) -> tuple[dict[str, Tensor], str]:
    if inputs is None:
        return samples(signature, count, seed), "random"
    if isinstance(inputs, Mapping):
        return dict(inputs), "given"
    return read_inputs(Path(inputs), signature), str(inputs)


def state_for(base: nn.Module, weights: FusedWeights) -> dict[str, Tensor]:
    """The base's tensors by name, each tied one once; under its other name too where the fused weights tell the two apart."""
    state, _ = own_state(base)
    return state | {name: state[holder] for name, holder in own_state(base)[1].items() if name in weights.tensors}


def untied(base: nn.Module, weights: FusedWeights) -> dict[str, str]:
    """Names that are one tensor with another in the base, and tensors of their own in the fused weights -> that other.

    base: with what the checkpoint unties untied already, where the same numbers stand twice.
    """
    import torch

    state, aliases = own_state(base)
    found = {name: holder for name, holder in aliases.items() if name in weights.tensors}
    for name in weights.untied:
        alike = (o for o, t in state.items() if o != name and name in state and t.shape == state[name].shape)
        holder = next((o for o in alike if o not in weights.untied and torch.equal(state[o], state[name])), None)
        if name not in found and name in weights.tensors:
            found[name] = holder or "another"
    return found


def _graph(base: nn.Module, weights: FusedWeights, signature: Signature, given: Mapping[str, Tensor]) -> GraphEvidence:
    """Base against fused, both in the storage dtypes of the fused weights; a created bias stands as zeros in the base."""
    import torch

    state = state_for(base, weights)
    cast = {
        name: state[name].to(t.dtype) if name in state else torch.zeros_like(t) for name, t in weights.tensors.items()
    }
    models = [fused(copied(base), tensors) for tensors in (cast, weights.tensors)]
    if len({t.dtype for t in weights.tensors.values() if t.is_floating_point()}) > 1:  # a model is called in one dtype
        models = [model.to(running_dtype(weights)) for model in models]
    return compare_graphs(models[0], models[1], signature, given, weights.created, untied(base, weights))


def _carried(base: nn.Module, checkpoint: Checkpoint, weights: FusedWeights) -> CarriedEvidence:
    state = state_for(base, weights)
    names = {name for adapter in checkpoint.adapters for name in touched(adapter)}
    if weights.dtype == "auto":  # a touched layer has the format that was chosen for it: its own proof speaks of it
        state = {n: t.to(weights[n].dtype) if n in names and n in weights.tensors else t for n, t in state.items()}
    evidence = prove_carried(state, weights.tensors, names, checkpoint.replaced, asked_dtype(weights))
    outside: list[str] = []
    tensors: dict[tuple[str, str | None], list[Adapter]] = {}
    for adapter in checkpoint.adapters:
        tensors.setdefault((adapter.module, adapter.parameter), []).append(adapter)
    for (name, _), adapters in tensors.items():
        outside += uncovered(base.get_submodule(name), adapters, weights.by_every_name())
    return CarriedEvidence(evidence.compared, evidence.equal, evidence.replaced, (*evidence.different, *outside))
