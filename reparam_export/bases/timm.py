"""``timm:NAME?key=value&...``: a timm model; the keywords are those of ``timm.create_model``.

    timm:vit_base_patch16_224                     with --base-weights FILE
    timm:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=96&depth=3&num_heads=3
    timm:vit_base_patch16_224?pretrained=true     downloads; nothing else ever does

Values are Python literals (``true``, ``false`` and ``none`` in any case), else strings. ``num_classes`` is taken from
the head in the checkpoint, or in the base weights, when it is not given. The weights may be a timm state dict or the
Google JAX ``.npz`` of a vision transformer (``ViT-B_16.npz``). One input ``image`` (batch, channels, height, width)
float32; one output ``logits`` (batch, classes), or ``features`` for a model without a head.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.errors import CheckpointError, MissingSettingError, TensorMismatchError, UsageError
from reparam_export.models import Base, Input, Signature, first_line, split_argument, with_observed_outputs
from reparam_export.state import assign, unnested

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

log = logging.getLogger(__name__)
# with these timm loads files by itself, and a spec may come from a checkpoint
LOADING = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
JAX_PREFIXES = ("", "opt/target/", "params/", "params/img/")


def build(argument: str, base: Base) -> tuple[nn.Module, Signature]:
    """The timm model with its weights, in their own dtype.

    Raises UsageError for an unknown name or keyword, MissingSettingError without weights, CheckpointError for weights
    that cannot be read and TensorMismatchError for ones that do not fit.
    """
    name, keywords = split_argument(argument)
    _check_keywords(keywords, base)
    pretrained = keywords.pop("pretrained", False)
    state = base.tensors()
    if state is None and not pretrained:
        raise MissingSettingError(
            f"base {base.spec!r}: no weights; a randomly initialised base is not what the checkpoint was trained on; "
            "give --base-weights FILE, or pretrained=true in the spec",
            setting="weights",
            found_in="the base's state dict, which the adapter checkpoint does not hold",
            option="--base-weights",
        )
    if state is not None and pretrained:
        raise UsageError(f"base {base.spec!r}: expected pretrained=true or --base-weights; found both; drop one")
    model = _pretrained(name, keywords, base) if state is None else _with_weights(name, keywords, state, base)
    return model, _signature(model, keywords, base)


def skeleton(base: Base) -> nn.Module:
    """The model without its numbers, with a head of whatever size."""
    import torch

    name, keywords = split_argument(base.spec.partition(":")[2])
    _check_keywords(keywords, base)
    _head_name(name, base)
    keywords.pop("pretrained", None)
    try:
        with torch.device("meta"):
            return _create(name, keywords, base)  # type: ignore[no-any-return]
    except UsageError:  # some constructors compute with numbers
        return _create(name, keywords, base)  # type: ignore[no-any-return]


def _check_keywords(keywords: Mapping[str, Any], base: Base) -> None:
    loading = sorted(LOADING & keywords.keys())
    if loading:
        raise UsageError(
            f"base {base.spec!r}: expected keywords that shape the model; found {loading[0]}, with which timm loads files by itself; "
            "give weights with --base-weights FILE, or pretrained=true"
        )


def _with_weights(name: str, keywords: dict[str, Any], state: Mapping[str, Tensor], base: Base) -> Any:
    head = _head_name(name, base)
    jax_prefix = next((p for p in JAX_PREFIXES if base.weights and f"{p}embedding/kernel" in state), None)
    if jax_prefix is None and f"{head}.weight" not in state:
        state = unnested(state, skeleton(base).state_dict())
    if "num_classes" not in keywords:
        rows = base.replaced.get(f"{head}.weight", ()) or tuple(getattr(state.get(f"{head}.weight"), "shape", ()))
        if jax_prefix is not None and not rows:
            rows = tuple(getattr(state.get(f"{jax_prefix}head/bias"), "shape", ()))
        keywords = keywords | ({"num_classes": rows[0]} if rows else {})
    model = _create(name, keywords, base)
    if jax_prefix is None or base.weights is None:
        assign(model, state, optional=base.replaced)
    else:
        _assign_jax(model, state, jax_prefix, base.weights, base)
    return model


def _pretrained(name: str, keywords: dict[str, Any], base: Base) -> Any:
    import torch

    head = _head_name(name, base)
    rows = base.replaced.get(f"{head}.weight")
    if "num_classes" not in keywords and rows:
        keywords = keywords | {"num_classes": rows[0]}
    model = _create(name, keywords | {"pretrained": True}, base)
    classes = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    fresh = model.num_classes not in (0, classes)
    if fresh and not rows:
        raise MissingSettingError(
            f"base {base.spec!r}: the pretrained model has {classes} classes; a head of {model.num_classes} would be "
            "random and the checkpoint does not bring one; drop num_classes or give --base-weights",
            setting="num_classes",
            found_in="the head of the checkpoint",
            option="--base-weights",
        )
    if fresh:
        with torch.no_grad():
            for tensor in model.get_submodule(head).parameters():
                tensor.zero_()
    return model


def _create(name: str, keywords: dict[str, Any], base: Base) -> Any:
    import timm

    try:
        return timm.create_model(name, **keywords)
    except Exception as error:  # whatever the constructor of that model raises about its keywords
        if keywords.get("pretrained"):
            raise CheckpointError(
                f"base {base.spec!r}: the pretrained weights cannot be had: {first_line(error)}; download them "
                "yourself and give --base-weights FILE"
            ) from error
        raise UsageError(
            f"base {base.spec!r}: timm.create_model refuses {name!r} with {keywords}: {first_line(error)}; "
            "correct the keywords after the '?'"
        ) from error


def _head_name(name: str, base: Base) -> str:
    """The module that timm calls this model's classifier. Raises UsageError for a name that timm does not have."""
    import difflib

    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3)
        raise UsageError(
            f"base {base.spec!r}: expected a model name of timm {timm.__version__}; found {name!r}"
            f"{'; did you mean ' + ', '.join(close) if close else '; see timm.list_models()'}"
        )
    config = timm.get_pretrained_cfg(name.partition(".")[0], allow_unregistered=True)
    classifier = getattr(config, "classifier", None) or "head"
    return str(classifier if isinstance(classifier, str) else classifier[0])


def _signature(model: Any, keywords: Mapping[str, Any], base: Base) -> Signature:
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size") or (3, 224, 224)
    asked = keywords.get("img_size") or size
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or asked
    size = (size, size) if isinstance(size, int) else size
    inputs = base.inputs or (Input("image", ("batch", int(keywords.get("in_chans", channels)), *map(int, size))),)
    signature = with_observed_outputs(model, Signature(inputs, ()), base.spec)
    if signature.outputs == ("output",):
        return Signature(inputs, ("logits" if getattr(model, "num_classes", 0) else "features",))
    return signature


def _assign_jax(model: Any, state: Mapping[str, Tensor], prefix: str, weights: Path, base: Base) -> None:
    """Load a Google JAX file with the model's own ``load_pretrained``, which skips silently, and check that it did not.

    The same loader is first run on a file where every array is filled with its own number: where the numbers end up
    is where the arrays go. Every parameter must be covered, and every array used but for a head that the checkpoint
    replaces, and the ``pre_logits`` that belong to such a head.
    """
    import timm
    import torch

    if not isinstance(model, timm.models.VisionTransformer) or model.patch_embed is None:
        raise CheckpointError(
            f"base {base.spec!r}: {weights} holds the JAX weights of a vision transformer; expected timm's "
            f"VisionTransformer; found {type(model).__name__}; choose the model that the file was saved from"
        )
    for name in _resized(model, state, prefix):
        raise _jax_mismatch(base, name, "an array of the model's own size", tuple(state[name].shape))
    with torch.no_grad():
        used = _landed(model, state, base)
        heads = {f"head.{n}": tuple(p.shape) for n, p in model.head.named_parameters()}
        spare = all(base.replaced.get(n) == shape for n, shape in heads.items())
        unused = [n for n in state if n not in used]
        for name in unused:
            if not (spare and name.startswith((f"{prefix}head/", f"{prefix}pre_logits/"))):
                raise _jax_mismatch(base, name, None, tuple(state[name].shape))
        for tensor in model.parameters():
            tensor.zero_()
        _load_pretrained(model, weights, base)
    if unused:
        log.info("%s: not used, because the checkpoint brings its own head: %s", weights, ", ".join(unused))


def _landed(model: Any, state: Mapping[str, Tensor], base: Base) -> set[str]:
    """The arrays that the model's loader uses. Raises TensorMismatchError for a parameter that it leaves alone."""
    import torch

    names, used = list(state), set[str]()
    for tensor in model.parameters():
        tensor.fill_(-1)
    with tempfile.TemporaryDirectory() as folder:
        _write_numbered(Path(folder) / "numbered.npz", state)
        _load_pretrained(model, Path(folder) / "numbered.npz", base)
    for name, tensor in model.named_parameters():
        values = torch.bincount(tensor.flatten().long() + 1).nonzero().flatten().tolist()  # 0 is what was left alone
        used |= {names[v - 1] for v in values if v > 0}
        if 0 in values and name not in base.replaced:
            raise _jax_mismatch(base, name, tuple(tensor.shape), None)
    return used


def _load_pretrained(model: Any, path: Path, base: Base) -> None:
    try:
        model.load_pretrained(str(path))
    except KeyError as error:
        array = str(error.args[0]).removesuffix(" is not a file in the archive")
        raise _jax_mismatch(base, array, "an array in the file", None) from error.with_traceback(
            None
        )  # closes the file
    except (AttributeError, RuntimeError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"base {base.spec!r}: expected the JAX weights of this model; found ones that it refuses: "
            f"{first_line(error)}; choose the model that the file was saved from"
        ) from error.with_traceback(None)


def _write_numbered(path: Path, state: Mapping[str, Tensor]) -> None:
    import numpy as np

    numbered: dict[str, np.ndarray[Any, Any]] = {
        name: np.full(tuple(tensor.shape), i, np.float32) for i, (name, tensor) in enumerate(state.items())
    }
    np.savez_compressed(path, **numbered)  # type: ignore[arg-type]


def _resized(model: Any, state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The arrays that timm would resample to the model's image or patch size: another function than the file's."""
    kernel = tuple(state[f"{prefix}embedding/kernel"].shape)
    if len(kernel) != 4:
        return [f"{prefix}embedding/kernel"]
    height, width, channels, wide = kernel
    patches = (wide, channels, height, width)
    found = [] if tuple(model.patch_embed.proj.weight.shape) == patches else [f"{prefix}embedding/kernel"]
    for name in (f"{prefix}Transformer/posembed_input/pos_embedding", f"{prefix}pos_embedding"):
        if name in state and state[name].numel() != model.pos_embed.numel():
            found.append(name)
    return found


def _jax_mismatch(base: Base, tensor: str, expected: object, found: object) -> TensorMismatchError:
    return TensorMismatchError(
        f"base {base.spec!r}: {tensor}: expected {expected or 'no such array'}; the JAX file holds "
        f"{found or 'nothing for it'}; choose the model and the options that the file was saved from",
        module=tensor.rpartition("/")[0] or tensor.rpartition(".")[0],
        tensor=tensor,
        expected=expected,
        found=found,
    )
