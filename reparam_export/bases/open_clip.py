"""``open_clip:openai`` and ``open_clip:NAME?key=value&...``: the image tower of a CLIP model.

    open_clip:openai            with --base-weights ViT-B-32.pt: geometry from an OpenAI file, TorchScript or state dict
    open_clip:ViT-B-32          with --base-weights FILE: geometry from open_clip, keywords for its ``create_model``

The module is the whole model, text tower too, under its own names, such as
``visual.transformer.resblocks.0.mlp.c_proj.weight``; what is run and exported is ``encode_image``: ``image``
(batch, 3, height, width) float32 to ``features`` (batch, width), not normalised. Tensors keep the dtype of the file:
OpenAI's are mostly float16, so the image is cast to the dtype of the first convolution, as OpenAI's own code does.
OpenAI weights run with QuickGELU, whatever NAME says. Nothing is downloaded.
Needs ``pip install reparam-export[open-clip]``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reparam_export.errors import CheckpointError, MissingBackendError, MissingSettingError, UsageError
from reparam_export.models import Base, Input, Signature, first_line, split_argument
from reparam_export.state import assign

if TYPE_CHECKING:
    from torch import Tensor, nn

GEOMETRY = ("input_resolution", "context_length", "vocab_size")  # integers in an OpenAI state dict, no tensors of it


def build(argument: str, base: Base) -> tuple[nn.Module, Signature]:
    """The CLIP model with its weights, in their own dtypes.

    Raises MissingBackendError without open_clip, UsageError for an unknown name or keyword, MissingSettingError without
    weights, CheckpointError for weights that are not of this layout and TensorMismatchError for ones that do not fit.
    """
    _check_installed()
    name, keywords = split_argument(argument)
    state = base.tensors()
    if state is None:
        raise MissingSettingError(
            f"base {base.spec!r}: no weights, and none are downloaded; give --base-weights FILE",
            setting="weights",
            found_in="the CLIP file that the checkpoint was trained on",
            option="--base-weights",
        )
    plain = {k: v for k, v in state.items() if k not in GEOMETRY}
    if name == "openai":
        if keywords:
            raise UsageError(f"base {base.spec!r}: 'openai' takes its geometry from the file; expected no keywords")
        model = _openai(plain, base)
    else:
        model = _named(name, keywords, openai=len(plain) < len(state), base=base)
    assign(model, plain, optional=base.replaced)
    model.visual.conv1.register_forward_pre_hook(_cast_image)
    return model, _signature(model, base)


def _check_installed() -> None:
    try:
        _import()
    except ImportError as error:
        raise MissingBackendError(
            "a base of the scheme open_clip needs the package open_clip_torch, which is not installed; "
            "pip install 'reparam-export[open-clip]'",
            package="open_clip_torch",
            extra="open-clip",
        ) from error


def _import() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        import open_clip
    return open_clip


def _openai(state: Mapping[str, Tensor], base: Base) -> Any:
    """The model whose sizes are those of the tensors, with unset weights."""
    import torch
    from open_clip.model import CLIP

    # LayerNorm runs in float32 when the weights around it are float16, as in OpenAI's own code.
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in state.values())
    try:
        width, vision, text = _geometry(state)
        return CLIP(width, vision, text, quick_gelu=True, cast_dtype=torch.float16 if half else torch.float32)
    except (KeyError, IndexError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"base {base.spec!r}: expected the tensors of an OpenAI CLIP file (visual.conv1.weight, text_projection, "
            f"...) in {base.weights or 'the checkpoint'}; found others: {first_line(error)}; "
            "for another layout give open_clip:NAME"
        ) from error


def _geometry(state: Mapping[str, Tensor]) -> tuple[int, Any, Any]:
    """The joint width and the configs of both towers, read off the shapes as OpenAI's own loader does.

    open_clip's ``build_model_from_openai_state_dict`` reads the same, but casts to float16 and reports no names.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    def parts(prefix: str, position: int) -> int:
        return len({name.split(".")[position] for name in state if name.startswith(prefix)})

    if "visual.proj" in state:
        wide, _, patch, _ = state["visual.conv1.weight"].shape
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        layers: Any = parts("visual.transformer.resblocks.", 3)
        vision = CLIPVisionCfg(layers=layers, width=wide, patch_size=patch, image_size=patch * grid)
    else:
        wide = state["visual.layer1.0.conv1.weight"].shape[0]
        grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        layers = tuple(parts(f"visual.layer{stage}.", 2) for stage in (1, 2, 3, 4))
        vision = CLIPVisionCfg(layers=layers, width=wide, patch_size=None, image_size=grid * 32)
    length, text_width = state["positional_embedding"].shape
    text = CLIPTextCfg(
        context_length=length,
        vocab_size=state["token_embedding.weight"].shape[0],
        width=text_width,
        heads=text_width // 64,
        layers=parts("transformer.resblocks.", 2),
    )
    return state["text_projection"].shape[1], vision, text


def _named(name: str, keywords: Mapping[str, Any], *, openai: bool, base: Base) -> Any:
    import difflib

    open_clip = _import()
    if name not in open_clip.list_models():
        close = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 3))
        raise UsageError(
            f"base {base.spec!r}: expected 'openai' or a model of open_clip {open_clip.__version__}; found {name!r}"
            f"{'; did you mean ' + close if close else '; see open_clip.list_models()'}"
        )
    quick = {"force_quick_gelu": True} if openai else {}
    logging.disable(logging.WARNING)  # it warns that the model is random, which it is for a moment
    try:
        return open_clip.create_model(name, pretrained=None, load_weights=False, **{**quick, **keywords})
    except Exception as error:  # whatever the constructors raise about their keywords
        raise UsageError(
            f"base {base.spec!r}: open_clip.create_model refuses {dict(keywords)}: {first_line(error)}; "
            "correct the keywords after the '?'"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _cast_image(module: nn.Module, images: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: Any = module.weight
    return (images[0].to(weight.dtype),)


def _signature(model: Any, base: Base) -> Signature:
    size = model.visual.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    inputs = base.inputs or (Input("image", ("batch", int(model.visual.conv1.in_channels), int(height), int(width))),)
    return Signature(inputs, ("features",), {"method": "encode_image"})
