"""What well-known models take, from what their libraries say of them: the names in the forward, and the sizes in the config.

transformers   main_input_name, the text, vision and audio parts of the config
diffusers      the config of a UNet or transformer; conditions in a dict are inputs of their own

Several lists of inputs may do, the fullest first; the first that the model can be called with is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from reparam_export.errors import CheckpointError, MissingSettingError
from reparam_export.models import Input, Signature, with_observed_outputs

Inputs = tuple[Input, ...]
TOKENS = ("batch", "sequence")
SECOND = 16000  # samples of sound; models of waves are captured at a fixed length
IMAGE = 224  # where neither the config nor its vision part says
PROMPT = 16  # tokens of a condition that has no length of its own


def well_known(model: Any, settings: Mapping[str, Any], what: str) -> Signature:
    """The signature of a model of transformers or diffusers. Raises MissingSettingError for others, and where no list of inputs does."""
    refused = "its config does not tell them"
    for inputs, more in (*of_transformers(model), *of_diffusers(model)):
        try:
            return with_observed_outputs(model, Signature(inputs, (), {**settings, **more}), what)
        except CheckpointError as error:
            refused = str(error)
    raise MissingSettingError(
        f"base {what!r}: the inputs of {type(model).__name__} are not known ({refused}); state each with --input NAME=batch,...:DTYPE",
        setting="inputs",
        found_in="the forward of the model",
        option="--input",
    )


def usual_settings(model: Any) -> dict[str, Any]:
    """How a model of transformers is called: inputs by name, no cache."""
    accepted = inspect.signature(model.forward).parameters
    settings: dict[str, Any] = {"by_name": True}
    open_ended = "return_dict" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    settings |= {"return_dict": True} if hasattr(model, "main_input_name") and open_ended else {}
    return settings | ({"use_cache": False} if "use_cache" in accepted else {})


def is_known(model: Any) -> bool:
    """Is it a model of one of the two libraries?"""
    return any(name.__module__.partition(".")[0] in ("transformers", "diffusers") for name in type(model).__mro__)


def of_transformers(model: Any) -> Iterator[tuple[Inputs, dict[str, Any]]]:
    """The lists of inputs that a model of transformers may take."""
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if not isinstance(main, str) or not hasattr(config, "get_text_config"):
        return
    accepted = inspect.signature(model.forward).parameters
    text, seen, heard = _text(model, accepted), _images(model, accepted), _sounds(model, accepted)
    boxes = (Input("bbox", (*TOKENS, 4), "int64", 1, text[0].default),) if "bbox" in accepted and text else ()
    points = (Input("input_points", ("batch", 1, 1, 2)),) if "input_points" in accepted else ()
    answer = _answer(model) if "decoder_input_ids" in accepted and _is_answering(config) else ()
    lists = [(*text, *seen, *boxes, *answer), (*text, *boxes, *answer), (*seen, *points, *answer), (*seen, *points)]
    if main == "input_ids" and "pixel_values" in accepted and not hasattr(config, "projection_dim"):
        lists.insert(0, lists.pop(1))  # pictures in a text need tokens that stand for them: the text alone
    if main == "pixel_values":
        lists.sort(key=lambda found: found != (*seen, *points, *answer))
    lists += [(*text, *heard), (*heard, *answer), heard]
    tried: list[Inputs] = []
    for found in lists:
        if found not in tried and any(i.name == main for i in found):
            tried.append(found)
            yield found, {}


def _is_answering(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _text(model: Any, accepted: Mapping[str, Any]) -> Inputs:
    """Token ids, and their mask where the model takes one."""
    vocabulary = _vocabulary(model)
    if "input_ids" not in accepted or vocabulary is None:
        return ()
    config = model.config.get_text_config()
    most = next((getattr(c, "max_position_embeddings", None) for c in (config, model.config)), None)
    usual = {"sequence": min(16, int(most or 16) // 2)}
    ids, mask = (
        Input("input_ids", TOKENS, "int64", vocabulary, usual),
        Input("attention_mask", TOKENS, "int64", 2, usual),
    )
    return (ids, mask) if "attention_mask" in accepted else (ids,)


def _vocabulary(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError, TypeError):  # the model has several, or none for text
        config = model.config
        text = getattr(config, "decoder", None) or config.get_text_config()
        size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
        return None if size is None else int(size)


def _answer(model: Any) -> Inputs:
    """The tokens that a decoder has so far."""
    size = _vocabulary(model)
    return () if size is None else (Input("decoder_input_ids", ("batch", "target"), "int64", size, {"target": 8}),)


def _images(model: Any, accepted: Mapping[str, Any]) -> Inputs:
    config = model.config
    if "pixel_values" not in accepted:
        return ()
    parts = (config, *(getattr(config, name, None) for name in ("vision_config", "encoder", "backbone_config")))
    size = next((found for c in parts if (found := getattr(c, "image_size", None))), IMAGE)
    channels = next((n for c in parts if isinstance(n := getattr(c, "num_channels", None), int)), 3)
    sides = tuple(int(side) for side in (size if isinstance(size, list | tuple) else (size, size)))
    frames = getattr(config, "num_frames", None)
    shape = (frames, channels, *sides) if frames and model.input_modalities == "video" else (channels, *sides)
    return (Input("pixel_values", ("batch", *map(int, shape))),)


def _sounds(model: Any, accepted: Mapping[str, Any]) -> Inputs:
    """Waves, or a spectrum of as many frames as the config says."""
    config = model.config
    bands = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None)
    if "input_features" in accepted and bands:
        most = getattr(config, "max_source_positions", None) or 100
        wide = hasattr(config, "input_feat_per_channel")  # frames first
        frames = 100 if wide else 2 * int(most)  # two are one position
        return (Input("input_features", ("batch", frames, int(bands)) if wide else ("batch", int(bands), frames)),)
    if "input_values" in accepted:
        spectrum = (int(config.max_length), int(bands)) if bands and getattr(config, "max_length", None) else (SECOND,)
        return (Input("input_values", ("batch", *spectrum)),)
    return ()


def of_diffusers(model: Any) -> Iterator[tuple[Inputs, dict[str, Any]]]:
    """The inputs of a UNet or transformer of diffusers: what it denoises, when, and under which conditions."""
    config = getattr(model, "config", None)
    if not hasattr(model, "_internal_dict") or config is None:
        return
    accepted = inspect.signature(model.forward).parameters
    main = next((name for name in ("sample", "hidden_states") if name in accepted), None)
    if main is None:
        return
    own, fixed = _denoised(main, config)
    conditions, groups = _conditions(config, accepted)
    settings = {**fixed, "return_dict": True} if "return_dict" in accepted else fixed
    counted, sigma = Input("timestep", ("batch",), "int64", 1000), Input("timestep", ("batch",))
    scaled = "axes_dims_rope" in config or any(
        getattr(m, "scale", 1) == 1000 for m in model.modules()
    )  # they multiply it by 1000
    for moment in ((sigma, counted) if scaled else (counted, sigma)) if "timestep" in accepted else ():
        yield (own, moment, *conditions), {**settings, "by_name": True, **({"groups": groups} if groups else {})}


def _denoised(main: str, config: Any) -> tuple[Input, dict[str, Any]]:
    """The latent image or video; of a list of patches with positions, these too, which are the same for all samples."""
    import torch

    channels = int(config.get("in_channels") or 4)
    size = config.get("sample_size") or 16
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if "axes_dims_rope" in config:  # patches in a row
        grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in (1, 4, 4)))
        return Input(main, ("batch", 16, channels)), {"img_ids": grid, "txt_ids": torch.zeros(PROMPT, 3)}
    shape: tuple[int, ...] = (channels, *map(int, sides))
    if set(config) >= {"sample_frames", "temporal_compression_ratio", "max_text_seq_length"}:  # CogVideoX: frames first
        ratio, wide = config["temporal_compression_ratio"], (config["sample_height"], config["sample_width"])
        frames = (config["sample_frames"] - 1) // ratio + 1  # as many as it has positions for
        return Input(main, ("batch", frames, channels, *wide)), {}
    if config["_class_name"].endswith("3DModel") or "3D" in config["_class_name"]:
        shape = (channels, 4, *map(int, sides))
    if "1D" in config["_class_name"]:
        shape = (channels, int(sides[0]))
    return Input(main, ("batch", *shape)), {}


def _conditions(config: Any, accepted: Mapping[str, Any]) -> tuple[list[Input], dict[str, str]]:
    """What the model is told beside the time; of those in a dict: under which name the dict is passed."""

    def given(*names: str) -> int | None:
        return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)

    found, groups = [], {}
    told = given(
        "encoder_hid_dim",
        "joint_attention_dim",
        "caption_channels",
        "text_embed_dim",
        "text_dim",
        "cross_attention_dim",
    )
    if "encoder_hidden_states" in accepted and told:
        found.append(Input("encoder_hidden_states", ("batch", given("max_text_seq_length") or PROMPT, told)))
    if "pooled_projections" in accepted and (pooled := given("pooled_projection_dim")):
        found.append(Input("pooled_projections", ("batch", pooled)))
    if "encoder_attention_mask" in accepted and accepted["encoder_attention_mask"].default is inspect.Parameter.empty:
        found.append(Input("encoder_attention_mask", ("batch", PROMPT)))
    if "guidance" in accepted and config.get("guidance_embeds"):
        found.append(Input("guidance", ("batch",)))
    if "class_labels" in accepted and (classes := given("num_class_embeds", "num_embeds_ada_norm")):
        found.append(Input("class_labels", ("batch",), "int64", classes))
    if config.get("addition_embed_type") == "text_time":
        ids = 6
        size = int(config["projection_class_embeddings_input_dim"]) - ids * int(config["addition_time_embed_dim"])
        found += [Input("text_embeds", ("batch", size)), Input("time_ids", ("batch", ids))]
        groups = dict.fromkeys(("text_embeds", "time_ids"), "added_cond_kwargs")
    return found, groups
