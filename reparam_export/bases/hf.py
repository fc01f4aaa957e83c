"""``hf:FOLDER_OR_ID?key=value&...``: a transformers model with its ``config.json`` and its full weights.

    hf:path/to/folder                           safetensors or pytorch_model.bin, sharded or not
    hf:path/to/folder                           with --base-weights FILE: config from the folder, weights from the file
    hf:FacebookAI/roberta-base?architecture=RobertaForSequenceClassification
    hf:FacebookAI/roberta-base?task=SEQ_CLS       the class that peft's task_type stands for

The class is ``architectures[0]`` of the config, or what the keyword ``architecture`` or ``task`` says (the heads of
other classes in the weights are then left out); ``attn_implementation`` is passed on, and so is ``experts_implementation``. Where it is not
given, a mixture of experts runs as each step needs: ``eager`` in the proofs, ``batched_mm`` where its graph is captured and exported
(transformers' own ``grouped_mm`` has no float64). Every other keyword must be a field of the config and replaces it. ``num_labels``
is taken from the classifier that the checkpoint brings when it is not given, ``vocab_size`` from its embedding. Parameters keep the dtype
they are stored in. Code that comes with a model is never run, and ``HF_HUB_OFFLINE`` is honoured. Needs ``pip install reparam-export[hf]``.

Inputs: what --input says, else what the config and the forward tell (``_inputs.py``): tokens and their mask, images, sound, points,
the tokens that a decoder has so far. Outputs: every tensor of the model's output, by its name there.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.bases._inputs import usual_settings, well_known
from reparam_export.bases._vocabulary import fit_vocabulary
from reparam_export.calls import foreign
from reparam_export.errors import (
    CheckpointError,
    MissingBackendError,
    MissingSettingError,
    TensorMismatchError,
    UsageError,
)
from reparam_export.files import plain_shard_name
from reparam_export.models import Base, Signature, first_line, split_argument, with_observed_outputs
from reparam_export.names.once import once
from reparam_export.state import is_constant, load_state, unnested

if TYPE_CHECKING:
    from torch import Tensor, nn

SINGLE = ("model.safetensors", "pytorch_model.bin")
TASKS = {  # peft's task_type -> the part of the name of transformers' auto mapping
    "SEQ_CLS": "FOR_SEQUENCE_CLASSIFICATION_",
    "TOKEN_CLS": "FOR_TOKEN_CLASSIFICATION_",
    "QUESTION_ANS": "FOR_QUESTION_ANSWERING_",
    "CAUSAL_LM": "FOR_CAUSAL_LM_",
    "SEQ_2_SEQ_LM": "FOR_SEQ_TO_SEQ_CAUSAL_LM_",
    "FEATURE_EXTRACTION": "",
}
CLASSIFIERS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")


def build(argument: str, base: Base) -> tuple[nn.Module, Signature]:
    """The transformers model with its weights, in the dtypes they are stored in.

    Raises MissingBackendError without transformers, UsageError for a keyword that the config does not have,
    MissingSettingError for a config without an architecture, CheckpointError for a model that cannot be had or read
    and TensorMismatchError for weights that do not fit.
    """
    place, keywords = split_argument(argument)
    with quiet():
        folder = _file(place, "config.json", base).parent
        config, model_class, options = _configured(folder, keywords, base)
        state = base.tensors()
        if state is None:
            state = {k: v for k, v in _stored(place, folder, base).items() if k not in base.ignored}
        elif len({name.partition(".")[0] for name in state}) == 1:
            state = dict(unnested(state, skeleton(base).state_dict()))
        model = _load(model_class, config, state, options, base)
    return model, _signature(model, base, options.get("experts_implementation"))


def skeleton(base: Base) -> nn.Module:
    """The model of an ``hf:`` base on torch's meta device: its modules and parameters without their numbers. Raises as ``build`` does."""
    import torch

    place, keywords = split_argument(base.spec.partition(":")[2])
    with quiet():
        config, model_class, _ = _configured(_file(place, "config.json", base).parent, keywords, base)
        try:
            with torch.device("meta"):
                model = model_class(copy.deepcopy(config))
        except Exception:  # some constructors compute with numbers
            with foreign(f"base {base.spec!r}: {model_class.__name__}", "built from its config.json", CheckpointError):
                model = model_class(config)
        model.tie_weights()
    return model  # type: ignore[no-any-return]


def stock(folder: Path) -> nn.Module:
    """The model as anyone loads it who knows the folder alone: ``AutoModel...from_pretrained(folder)``, no argument given.

    The auto class is the one that has the config's class, else that class itself. Raises CheckpointError when transformers does not take
    the folder, or lacks a tensor.
    """
    import transformers

    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            name = next(iter(config.architectures or ()), "")
            autos = (getattr(transformers, text) for text in dir(transformers) if text.startswith("AutoModel"))
            found = (auto for auto in autos if _class_of(auto, config) == name)
            loader = next(found, None) or getattr(transformers, name)
            model, info = loader.from_pretrained(folder, output_loading_info=True)
        except Exception as error:  # of transformers' many kinds, one meaning
            raise CheckpointError(f"{folder}: {first_line(error)}") from error
    odd = sorted({*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])})
    if odd:
        raise CheckpointError(f"{folder}: {odd[0]} is missing or of another shape")
    model.eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _class_of(auto: Any, config: Any) -> str | None:
    """The name of the class that an auto class takes for a config."""
    mapping = getattr(auto, "_model_mapping", None)
    found = None if mapping is None else mapping.get(type(config), None)
    return getattr(found, "__name__", None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars, its log lines and its warnings about legacy files."""
    try:
        from transformers.utils.logging import (
            disable_progress_bar,
            enable_progress_bar,
            get_verbosity,
            is_progress_bar_enabled,
            set_verbosity,
        )
    except ImportError as error:
        raise MissingBackendError(
            "a base of the scheme hf needs the package transformers, which is not installed; "
            "pip install 'reparam-export[hf]'",
            package="transformers",
            extra="hf",
        ) from error
    level, bars = get_verbosity(), is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    set_verbosity(logging.CRITICAL)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    hub.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|huggingface_hub)\b.*")
            yield
    finally:
        set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            enable_progress_bar()  # type: ignore[no-untyped-call]


def _file(place: str, name: str, base: Base, *, needed: bool = True) -> Any:
    """The path of one file of the model, fetched when ``place`` is an ID; None when it is not needed and not there."""
    from transformers.utils.hub import cached_file

    if Path(place).is_dir():
        path = Path(place) / name
        found = str(path) if path.is_file() else None
    else:
        try:
            found = cached_file(place, name, _raise_exceptions_for_missing_entries=needed)
        except Exception as error:  # no network, no such ID, no access: many types, one meaning
            raise CheckpointError(
                f"base {base.spec!r}: expected a folder, or the ID of a model that can be fetched; found no folder "
                f"{place!r} and no such model ({first_line(error)}); check the path, the ID, the network and "
                "HF_HUB_OFFLINE"
            ) from error
    if found is None and needed:
        raise CheckpointError(
            f"base {base.spec!r}: expected {name} in {place}; found none; give the folder that save_pretrained wrote"
        )
    return None if found is None else Path(found)


def _configured(folder: Path, keywords: dict[str, Any], base: Base) -> tuple[Any, Any, dict[str, Any]]:
    """The config, the model class and the options of ``from_pretrained``."""
    import transformers

    options: dict[str, Any] = {
        k: keywords.pop(k) for k in ("attn_implementation", "experts_implementation") if k in keywords
    }
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"base {base.spec!r}: config.json is not one of transformers {transformers.__version__}: "
            f"{first_line(error)}; models that bring their own code are not run: give them as py:FILE.py:FUNCTION"
        ) from error
    quantized = next((n for n in ("quantization_config", "quantization") if getattr(config, n, None)), None)
    if quantized:
        by = " by mlx" if isinstance(getattr(config, "quantization", None), dict) else ""
        raise CheckpointError(
            f"base {base.spec!r}: expected plain weights; config.json says they are quantized{by} ({quantized}); give the base before "
            "quantization"
        )
    name = _class_name(config, keywords, base)
    if name is None:
        raise MissingSettingError(
            f"base {base.spec!r}: config.json names no class in 'architectures'; add ?architecture=CLASS to the spec",
            setting="architectures",
            found_in="config.json of the base",
            option="--base",
        )
    model_class = getattr(transformers, name, None)
    if not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"base {base.spec!r}: expected a model class of transformers {transformers.__version__}; found {name!r}; "
            "another one can be named with ?architecture=CLASS"
        )
    carried = {} if base.weights else {name: tuple(tensor.shape) for name, tensor in (base.state or {}).items()}
    labels = next((s[0] for n, s in (carried | dict(base.replaced)).items() if n in CLASSIFIERS), None)
    if labels is not None and labels != config.num_labels:
        keywords.setdefault("num_labels", labels)
    for key, value in keywords.items():
        if not hasattr(config, key):
            raise UsageError(f"base {base.spec!r}: {type(config).__name__} has no field {key!r}; correct the keyword")
        setattr(config, key, value)
    fit_vocabulary(config, model_class, {n: s for n, s in base.replaced.items() if n not in CLASSIFIERS})
    return config, model_class, options


def _class_name(config: Any, keywords: dict[str, Any], base: Base) -> str | None:
    """The model class that the keywords ask for, else the config's. Takes its keywords out. Raises UsageError."""
    from transformers.models.auto import modeling_auto

    own = next(iter(config.architectures or ()), None)
    name, task = keywords.pop("architecture", None), keywords.pop("task", None)
    if name is not None or task is None:
        return name or own
    if task not in TASKS:
        raise UsageError(f"base {base.spec!r}: unknown task {task!r}; there are: {', '.join(TASKS)}")
    classes = getattr(modeling_auto, f"MODEL_{TASKS[task]}MAPPING_NAMES")
    found = classes.get(config.model_type)
    return own if found is None else str(found if isinstance(found, str) else found[0])


def _stored(place: str, folder: Path, base: Base) -> dict[str, Tensor]:
    """All tensors of the model's own weight files, by the names they have there."""
    import json

    for name in SINGLE:
        if (path := _file(place, name, base, needed=False)) is not None:
            return load_state(path)
        if (index := _file(place, f"{name}.index.json", base, needed=False)) is not None:
            try:
                shards = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"weights {index}: expected an index of shards; {first_line(error)}") from error
            return _shards({str(k): str(v) for k, v in shards.items()}, place, base)
    raise CheckpointError(
        f"base {base.spec!r}: expected the full weights in {folder}: {' or '.join(SINGLE)}, or their shards and index; "
        "found none; an adapter folder is not a base: give the folder of the base, or --base-weights FILE"
    )


def _shards(where: Mapping[str, str], place: str, base: Base) -> dict[str, Tensor]:
    found: list[tuple[str, str, Tensor]] = []
    for shard in sorted(set(where.values())):
        plain_shard_name(shard, Path(place))
        found += [(f"{name} in {shard}", name, t) for name, t in load_state(_file(place, shard, base)).items()]
    state = once(found, f"base {base.spec!r}")
    for name in sorted(set(where) ^ set(state)):
        raise _mismatch(base, name, where.get(name, "not in the index"), "in a shard" if name in state else None)
    return state


def _load(model_class: Any, config: Any, state: dict[str, Tensor], options: dict[str, Any], base: Base) -> nn.Module:
    """The model with the state in it; what transformers did not find, use or fit is refused, not skipped."""
    import torch

    dtypes = {t.dtype for t in state.values() if t.is_floating_point()} or {torch.float32}
    widest = (
        max(dtypes, key=lambda d: d.itemsize) if len({d.itemsize for d in dtypes}) == len(dtypes) else torch.float32
    )
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=widest,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:
        raise CheckpointError(
            f"base {base.spec!r}: {model_class.__name__} cannot be built or loaded: {first_line(error)}; "
            "check config.json against the weights"
        ) from error
    heads = set() if model_class.__name__ in (config.architectures or ()) else _other_heads(model, state)
    fresh = _refuse(info, state, base, heads, _known(model, base))
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in fresh:
                tensor.zero_()
    _restore_dtypes(model, state)
    return model  # type: ignore[no-any-return]


def _restore_dtypes(model: Any, state: Mapping[str, Tensor]) -> None:
    """Give tensors back the dtype of the file: all were loaded in the widest one there, so nothing was lost."""
    prefix = f"{model.base_model_prefix}."
    narrow: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stored = state.get(name, state.get(name.removeprefix(prefix)))
        if stored is not None and stored.dtype != tensor.dtype and stored.is_floating_point():
            narrow[name] = tensor.to(stored.dtype)
    if narrow:
        model.load_state_dict(narrow, strict=False, assign=True)
        model.tie_weights()


def _other_heads(model: Any, state: Mapping[str, Tensor]) -> set[str]:
    """Tensors of another class's head: they stand under no module of this model, nor of its inner model."""
    inner = getattr(model, model.base_model_prefix, model)
    known = {name for name, _ in (*model.named_children(), *inner.named_children())} | {model.base_model_prefix}
    return {name for name in state if name.partition(".")[0] not in known}


def _known(model: Any, base: Base) -> set[str]:
    """The names that the checkpoint brings, and those that are tied to them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    brought = {id(parameters[name]) for name in base.replaced if name in parameters}
    return set(base.replaced) | {name for name, parameter in parameters.items() if id(parameter) in brought}


def _refuse(
    info: Mapping[str, Any], state: Mapping[str, Tensor], base: Base, heads: set[str], known: set[str]
) -> set[str]:
    """Raise TensorMismatchError unless all fits; the names that only the checkpoint brings, random so far."""
    mismatched = {str(m[0]): (tuple(m[1]), tuple(m[2])) for m in info["mismatched_keys"]}  # name, file's, model's
    for name in sorted(set(info["missing_keys"]) - known):
        raise _mismatch(base, name, "a tensor in the weights", None)
    for name in sorted(set(mismatched) - known):
        raise _mismatch(base, name, mismatched[name][1], mismatched[name][0])
    for name in sorted(info["unexpected_keys"]):
        if not (name in known or name in heads or (name in state and is_constant(name, state[name]))):
            raise _mismatch(base, name, None, tuple(state[name].shape) if name in state else "a tensor")
    return set(info["missing_keys"]) | set(mismatched)


def _mismatch(base: Base, tensor: str, expected: object, found: object) -> TensorMismatchError:
    return TensorMismatchError(
        f"base {base.spec!r}: {tensor}: the model expects {expected or 'no such tensor'}; the weights hold "
        f"{found or 'no such tensor'}; {_advice(base, tensor, expected)}",
        module=tensor.rpartition(".")[0],
        tensor=tensor,
        expected=expected,
        found=found,
    )


def _signature(model: Any, base: Base, experts: str | None) -> Signature:
    settings = usual_settings(model)
    if experts is not None:
        settings["experts"] = experts
    if base.inputs:
        return with_observed_outputs(model, Signature(base.inputs, (), settings), base.spec)
    return well_known(model, settings, base.spec)


def _advice(base: Base, tensor: str, expected: object) -> str:
    if expected is None and base.weights is None and base.state is not None:
        return (
            f"it stands in the checkpoint beside the model's own: a loss or the like is left out with --drop '{tensor}'"
        )
    return "check that config.json and its architecture belong to these weights"
