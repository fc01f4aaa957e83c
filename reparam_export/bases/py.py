"""``py:FILE.py:FUNCTION``: your own model; FUNCTION takes no argument and returns the plain ``nn.Module``.

    py:models/net.py:make_base --input image=batch,3,64,64:float32
    py:models/net.py:make_base --input image=batch,3,64,64:float32 --base-weights base.pt

The file is run, as an import would, with its folder on the import path. Without --base-weights the function has to
bring the weights itself: it is called twice, and refused when the two modules differ. The inputs are stated with
--input, unless the module is a model of transformers or diffusers, whose inputs are known. The outputs are those of
one call: ``output`` for a tensor, the keys of a dict, ``output_0``, ``output_1``, ... for a tuple.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reparam_export.bases._inputs import is_known, usual_settings, well_known
from reparam_export.calls import evaluated
from reparam_export.errors import CheckpointError, MissingSettingError, UsageError
from reparam_export.models import Base, Signature, first_line, with_observed_outputs
from reparam_export.state import assign

if TYPE_CHECKING:
    from torch import nn


def build(argument: str, base: Base) -> tuple[nn.Module, Signature]:
    """The module that the function returns, with the weights in it.

    Raises UsageError when the file or the function is not there, MissingSettingError without inputs, CheckpointError
    when the function fails, returns no module or a random one, TensorMismatchError for weights that do not fit.
    """
    make = _maker(argument, base)
    module = _made(make, base, seed=0)
    if not (base.inputs or is_known(module)):
        raise MissingSettingError(
            f"base {base.spec!r}: the inputs of your own model are not known; state each with "
            "--input NAME=batch,...:DTYPE, such as --input image=batch,3,64,64:float32",
            setting="inputs",
            found_in="the forward of your module",
            option="--input",
        )
    state = base.tensors()
    if state is None:
        _check_not_random(module, _made(make, base, seed=1), base)
    else:
        assign(module, state, optional=base.replaced)
    if not base.inputs:
        return module, well_known(module, usual_settings(module), base.spec)
    return module, with_observed_outputs(module, Signature(base.inputs, ()), base.spec)


def skeleton(base: Base) -> nn.Module:
    """The module that the function returns, for its names."""
    return _made(_maker(base.spec.partition(":")[2], base), base, seed=0)


def _maker(argument: str, base: Base) -> Any:
    """The function that the spec names. Raises UsageError, CheckpointError."""
    file, _, function = argument.rpartition(":")
    if not (function.isidentifier() and Path(file).is_file()):
        raise UsageError(f"base {base.spec!r}: expected py:FILE.py:FUNCTION; found no file {file!r} with {function!r}")
    return _function(Path(file), function, base)


def _function(file: Path, name: str, base: Base) -> Any:
    """Run the file and return its function. Its bytes are compiled afresh: no cached bytecode of an earlier version."""
    module = ModuleType(f"reparam_export_base_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up by its name
    sys.path.insert(0, str(file.resolve().parent))
    try:
        exec(compile(file.read_bytes(), file, "exec"), module.__dict__)
    except Exception as error:
        raise CheckpointError(f"base {base.spec!r}: {file} cannot be run: {first_line(error)}; correct it") from error
    finally:
        sys.path.pop(0)
    if not callable(getattr(module, name, None)):
        public = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise UsageError(f"base {base.spec!r}: expected a function {name!r} in {file}; found {public or 'none'}")
    return getattr(module, name)


def _made(make: Any, base: Base, *, seed: int) -> nn.Module:
    import torch

    torch.manual_seed(seed)  # Base.build restores the caller's generator
    try:
        module = make()
    except Exception as error:
        raise CheckpointError(f"base {base.spec!r}: the function fails: {first_line(error)}; correct it") from error
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(
            f"base {base.spec!r}: expected an nn.Module from the function; found {type(module).__name__}; "
            "return the plain base, not its state dict"
        )
    return evaluated(module).requires_grad_(False)


def _check_not_random(module: nn.Module, again: nn.Module, base: Base) -> None:
    """Raise unless two calls gave the same tensors; those that the checkpoint replaces become zero if they differ."""
    import torch

    second = again.state_dict()
    for name, tensor in module.state_dict().items():
        if name in second and torch.equal(tensor, second[name]):
            continue
        if name not in base.replaced:
            raise MissingSettingError(
                f"base {base.spec!r}: two calls of the function give different numbers in {name}: a random base is "
                "not what the checkpoint was trained on; load the weights in the function or give --base-weights FILE",
                setting="weights",
                found_in="the base's state dict",
                option="--base-weights",
            )
        tensor.zero_()
