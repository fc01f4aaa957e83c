"""peft's own model of a folder: its loader, on a base of its own, with nothing looked up and nothing of the file run."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.checkpoints import Checkpoint
from reparam_export.checkpoints._folder import INDEX, shards
from reparam_export.errors import CheckpointError, MissingBackendError
from reparam_export.files import read_json
from reparam_export.models import first_line
from reparam_export.verification.witness import UnableError
from reparam_export.verification.witness._peft_names import under_base_names

if TYPE_CHECKING:
    from torch import Tensor, nn

INSIDE = re.compile(r"\.(?:base_layer|modules_to_save\.default|token_adapter|ln_tuning_layers\.default)(?=\.|\Z)")
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Read:
    """The base with peft's layers in it (``PeftModel.base_model.model``), in float64 wherever the folder's numbers are exact in it."""

    model: nn.Module
    version: str
    renamed: bool = False  # from a copy of the folder under the base's own names
    who: str = "peft"  # whose loader it was; the layers are peft's

    @property
    def said(self) -> str:
        return f"{self.who} {self.version}"

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors of peft's model under the base's own names, where peft put the checkpoint's in place of the base's."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            own = INSIDE.sub("", name)
            if ".original_module." not in name and (own not in found or own != name):
                found[own] = tensor.detach()
        return found


def loaded(checkpoint: Checkpoint, fresh: Callable[[], nn.Module], *, skeleton: bool = False) -> Read:
    """What ``PeftModel.from_pretrained`` makes of a folder, peft's model of a state dict. Raises MissingBackendError, UnableError.

    skeleton: the base has the dtypes that it is to have; a cast would give its weights of zeros their full size.
    """
    from reparam_export.checkpoints._peft_layers import import_peft

    peft = import_peft()
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    state = checkpoint.format == "peft_state"
    if not state and not ((folder / "adapter_config.json").is_file() and (_stored(folder) or _index(folder))):
        raise UnableError(f"{folder} does not hold {WEIGHTS[0]} and adapter_config.json, as peft loads them")
    probed = any(adapter.kind == "probed" for adapter in checkpoint.adapters)
    attempts = ("as it is stored",) if probed or skeleton else ("float64", "as it is stored")
    failure: Exception | None = None
    for attempt in attempts:
        base = fresh()
        _resize(base, checkpoint)
        base = base.double() if attempt == "float64" else base
        try:
            with quiet(), offline():
                load = _of_state if state else _of_folder
                model, renamed = load(peft, checkpoint, base, folder, skeleton=skeleton)
            return Read(model if skeleton else model.double(), str(peft.__version__), renamed)
        except UnableError:
            raise
        except Exception as error:  # of another library on a damaged or foreign folder: many types, one meaning
            failure = failure or error
    assert failure is not None
    raise UnableError(
        f"peft {peft.__version__} cannot load {checkpoint.path if state else folder} on this base: {first_line(failure)}"
    ) from failure


def _of_folder(
    peft: Any, checkpoint: Checkpoint, base: nn.Module, folder: Path, *, skeleton: bool
) -> tuple[nn.Module, bool]:
    check_patterns_of(folder, base)
    with _in_one_file(folder) as (whole, file), under_base_names(checkpoint, whole, file) as (place, renamed):
        return _load(peft, base, place, (*checkpoint.dropped, *_written_twice(file))), renamed


def _stored(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _index(folder: Path) -> Path | None:
    return next((folder / f"{name}{INDEX}" for name in WEIGHTS if (folder / f"{name}{INDEX}").is_file()), None)


@contextlib.contextmanager
def _in_one_file(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The folder and its weights; of shards, which peft's loader does not know, a copy with all of them in one file."""
    file, index = _stored(folder), _index(folder)
    if file is not None or index is None:
        yield folder, file or folder / WEIGHTS[0]
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="reparam-witness-") as place:
        copy = Path(place) / WEIGHTS[0]
        save_file({name: tensor.contiguous() for name, tensor in shards(index, numpy=False).items()}, copy)
        shutil.copyfile(folder / "adapter_config.json", copy.with_name("adapter_config.json"))
        yield copy.parent, copy


def _of_state(
    peft: Any, checkpoint: Checkpoint, base: nn.Module, folder: Path, *, skeleton: bool
) -> tuple[nn.Module, bool]:
    from reparam_export.verification.witness._peft_state import state_loaded

    return state_loaded(peft, checkpoint, base, skeleton=skeleton)


def _resize(base: Any, checkpoint: Checkpoint) -> None:
    """As every user does before loading a folder with a table of another number of tokens."""
    from reparam_export.bases._vocabulary import token_layers

    table = token_layers(base)[0] if hasattr(base, "resize_token_embeddings") else None
    name = next((f"{n}.weight" for n, part in base.named_modules() if table is not None and part is table), None)
    brought = checkpoint.replaced.get(name) if name is not None else None
    if brought is not None and table is not None and int(brought.shape[0]) != int(table.weight.shape[0]):
        base.resize_token_embeddings(int(brought.shape[0]), mean_resizing=False)


def _written_twice(file: Path) -> list[str]:
    """Tensors that peft writes under two names, with and without ``modules_to_save``, as of resized embeddings, and reads under one."""
    from reparam_export.state import load_state

    state = load_state(file)
    plain = {name: name.replace(".modules_to_save.", ".") for name in state if ".modules_to_save." in name}
    return [name for name, other in plain.items() if other in state and bool((state[name] == state[other]).all())]


def _load(peft: Any, base: nn.Module, folder: Path, dropped: Sequence[str] = ()) -> nn.Module:
    """peft's model; its loader is called twice, for it tells only the second time what it did not find. Raises UnableError.

    dropped: names of tensors in the file that the model is wanted without.
    """
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = config.revision = None
    if hasattr(config, "progressbar"):
        config.progressbar = False
    if not hasattr(base, "prepare_inputs_for_generation") and config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        config.task_type = None  # peft's class for it wants a model of transformers
    mapping = getattr(base, "_checkpoint_conversion_mapping", {})
    model = peft.PeftModel.from_pretrained(base, str(folder), config=config, torch_device="cpu")
    result = model.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=mapping)
    unused = [name for name in result.unexpected_keys if not any(f".{name}".endswith(f".{gone}") for gone in dropped)]
    if unused:
        raise UnableError(
            f"peft {peft.__version__} itself leaves {len(unused)} tensors of {folder} unused on this base, first {unused[0]}"
        )
    _check_found(peft, model, result.missing_keys, folder)
    model.eval().requires_grad_(False)
    inner: nn.Module = model.base_model.model
    return inner


def _check_found(peft: Any, model: Any, missing: list[str], folder: Path) -> None:
    """Raises UnableError where peft left numbers of an adapter as they were drawn; modules may share one tensor."""
    state = model.state_dict(keep_vars=True)
    found = {id(tensor) for name, tensor in state.items() if name not in missing}
    absent = [name for name in missing if name in state and id(state[name]) not in found]
    if absent:
        raise UnableError(
            f"peft {peft.__version__} itself finds no numbers in {folder} for {len(absent)} tensors of its layers, first {absent[0]}"
        )


def check_patterns_of(folder: Path, base: nn.Module) -> None:
    """Raises UnableError for patterns that take for ever."""
    from reparam_export.checkpoints import Source
    from reparam_export.checkpoints._peft_layers import check_patterns
    from reparam_export.checkpoints._settings import Settings

    try:
        config = read_json(folder / "adapter_config.json")
        source = Source(folder, folder, {}, config, {}, {}, Settings(), True)
        check_patterns(source, [name for name, _ in (*base.named_modules(), *base.named_parameters())])
    except CheckpointError as error:
        raise UnableError(str(error)) from error


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """peft's layers by the base's own names: the outermost where one holds another, trained tokens by their embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Any] = {}
    parts: Any = model.named_modules()
    for name, part in parts:
        own = INSIDE.sub("", name)
        if isinstance(part, BaseTunerLayer) and not any(below(own, other) for other in found):
            found[own] = part
    return found


def below(name: str, module: str) -> bool:
    """Is it that module, or inside it?"""
    return name == module or name.startswith(f"{module}.")


def of_name(layer: Any, class_name: str) -> list[Any]:
    """The layers of this class from the outermost on, one inside the other."""
    found = []
    while type(layer).__name__ == class_name:
        found.append(layer)
        layer = layer.base_layer
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing is looked up on the hub, whatever a folder names."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


__all__ = ["MissingBackendError", "Read", "below", "loaded", "of_name", "tuner_layers"]
