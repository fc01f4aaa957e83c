"""``diffusers:FOLDER``: a model of diffusers (a UNet, a transformer) with its ``config.json`` and its weights, as it was saved.

    diffusers:stable-diffusion/unet
    diffusers:flux/transformer       with --base-weights FILE: config from the folder, weights from the file

The class is the ``_class_name`` of the config. Parameters keep the dtype that they are stored in; nothing is fetched, and no code that
comes with a model is run. Inputs: what --input says, else what the config tells (``_inputs.py``). Needs the package diffusers.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.bases._inputs import usual_settings, well_known
from reparam_export.calls import foreign
from reparam_export.errors import CheckpointError, MissingBackendError
from reparam_export.files import read_json
from reparam_export.models import Base, Signature, with_observed_outputs
from reparam_export.names.once import once
from reparam_export.state import assign, load_state

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model"


def build(argument: str, base: Base) -> tuple[nn.Module, Signature]:
    """The model with its weights. Raises MissingBackendError without diffusers, CheckpointError, TensorMismatchError."""
    folder = Path(argument)
    with quiet():
        model = _laid_out(folder, base)
        state = base.tensors()
        assign(model, _stored(folder, base) if state is None else state, optional=base.replaced)
        if base.inputs:
            settings = {"by_name": True, "return_dict": True}
            return model, with_observed_outputs(model, Signature(base.inputs, (), settings), base.spec)
        return model, well_known(model, usual_settings(model), base.spec)


def skeleton(base: Base) -> nn.Module:
    """The model without its numbers."""
    import torch

    folder = Path(base.spec.partition(":")[2])
    with quiet():
        try:
            with torch.device("meta"):
                return _laid_out(folder, base)
        except CheckpointError:  # some constructors compute with numbers
            return _laid_out(folder, base)


def _laid_out(folder: Path, base: Base) -> nn.Module:
    """The model of the folder's config, with whatever numbers."""
    import diffusers

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"base {base.spec!r}: expected a folder with config.json, as save_pretrained writes it, such as .../unet"
        )
    name = str(read_json(folder / "config.json").get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)):
        raise CheckpointError(
            f"base {base.spec!r}: expected a model class of diffusers {diffusers.__version__} as _class_name; found {name!r}; "
            "of a pipeline, give the folder of its unet or transformer"
        )
    with foreign(f"base {base.spec!r}: {name}", "built from its config.json", CheckpointError):
        model: nn.Module = kind.from_config(kind.load_config(folder))  # type: ignore[no-untyped-call]
    return model


def _stored(folder: Path, base: Base) -> dict[str, Tensor]:
    """All tensors of the folder's own weight files."""
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{WEIGHTS}{suffix}").is_file():
            return load_state(folder / f"{WEIGHTS}{suffix}")
        index = folder / f"{WEIGHTS}{suffix}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            if any(Path(shard).name != shard for shard in shards):
                raise CheckpointError(f"weights {index}: expected plain names of shards; found {shards[0]!r}")
            stored = ((shard, load_state(folder / shard)) for shard in shards)
            return once(
                ((f"{name} in {shard}", name, t) for shard, state in stored for name, t in state.items()), index
            )
    raise CheckpointError(
        f"base {base.spec!r}: expected {WEIGHTS}.safetensors or .bin in {folder}; found none; or give --base-weights FILE"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """diffusers without its log lines and progress bars."""
    try:
        from diffusers.utils import logging as own
    except ImportError as error:
        raise MissingBackendError(
            "a base of the scheme diffusers needs the package diffusers, which is not installed; pip install 'reparam-export[diffusers]'",
            package="diffusers",
            extra="diffusers",
        ) from error
    level: Any = own.get_verbosity()
    own.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        own.set_verbosity(level)
