"""Plain models and their unfused reference.

Signature   names, shapes and dtypes of a model's inputs and outputs
Base        a base spec that builds the same plain ``nn.Module`` again and again
adapted()   the unfused model: every touched module runs its kind's ``apply``
fused()     the plain model with the fused tensors in it
"""

from __future__ import annotations

import ast
import copy
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export import plugins
from reparam_export.batches import ROWS, Axes, axes_of, is_plain
from reparam_export.calls import evaluated, experts, foreign
from reparam_export.calls import first_line as first_line
from reparam_export.errors import CheckpointError, UsageError
from reparam_export.fit import check_replaced
from reparam_export.float64 import pure_float64 as pure_float64
from reparam_export.names.wrappers import unwrapped
from reparam_export.state import load_state

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

USUAL_SIZE = 16  # of a dynamic axis, when the model or the user names no other


@dataclass(frozen=True)
class Input:
    """One model input. ``shape`` holds ints and names of dynamic axes; the first is always ``"batch"``."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"  # "float32" or "int64"
    high: int | None = None  # integers are drawn from [0, high)
    default: dict[str, int] | None = None  # a usual size for each dynamic axis other than batch


@dataclass(frozen=True)
class Signature:
    """A model's inputs, the names of its outputs, and how it is called.

    Four ``settings`` are ours: ``method`` (another method than forward), ``by_name`` (inputs as keyword arguments), ``groups`` (inputs that
    are passed together in a dict, by the name of that argument) and ``experts`` (the implementation of a mixture of experts that the user
    asked for).
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any] | None = None  # keyword arguments the forward always gets, such as use_cache=False
    renamed: Mapping[str, str] = field(
        default_factory=dict
    )  # outputs that cannot have the model's own name -> that name
    axes: Mapping[str, Axes] = field(default_factory=dict)  # of outputs that are not one row a sample

    @property
    def experts(self) -> str | None:
        """The implementation of a mixture of experts that the user asked for."""
        return (self.settings or {}).get("experts")


@dataclass(frozen=True)
class Base:
    """The plain, un-adapted model that a checkpoint belongs to, as ``SCHEME:ARGUMENT`` (see ``reparam_export/bases``).

    ``replaced`` holds names and shapes of base tensors that the checkpoint brings itself (a new head): they may be
    missing or have another shape in the base weights. ``ignored`` holds names in the base's own weight file that
    belong to the adapter. ``inputs`` overrides what the model says about its inputs. ``weights`` go before ``state``; ``entry`` says which
    of several models in that file is the base.
    """

    spec: str
    weights: Path | None = None
    state: Mapping[str, Tensor] | None = None  # the base's tensors, where the checkpoint carries them
    replaced: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    inputs: tuple[Input, ...] = ()
    entry: str | None = None

    def tensors(self) -> dict[str, Tensor] | None:
        """The base's state dict out of ``weights`` or ``state``, without wrappers' names and the ignored ones; None without either."""
        state = self.state if self.weights is None else unwrapped(load_state(self.weights, self.entry), self.weights)
        return None if state is None else {k: v for k, v in state.items() if k not in self.ignored}

    def skeleton(self) -> nn.Module | None:
        """The module without its numbers (on the meta device), for its names; None where its scheme cannot make it apart from them.

        Heads have whatever size the scheme gives them. Raises what ``build`` raises.
        """
        import torch

        make = getattr(plugins.load("bases", self._scheme()), "skeleton", None)
        if make is None:
            return None
        with (
            torch.random.fork_rng(devices=[]),
            foreign(f"base {self.spec!r}", "laid out without its numbers", CheckpointError),
        ):
            torch.manual_seed(0)
            module: nn.Module = make(self)
        return module

    def _scheme(self) -> str:
        """Raises UsageError for an unknown one."""
        scheme, _, argument = self.spec.partition(":")
        if scheme not in plugins.names("bases") or not argument:
            raise UsageError(
                f"base {self.spec!r}: expected SCHEME:ARGUMENT with one of the schemes "
                f"{', '.join(plugins.names('bases'))}; found {scheme!r}"
            )
        return scheme

    def build(self) -> tuple[nn.Module, Signature]:
        """The module (eval mode, no gradients, the same bytes every time) and its signature.

        A tensor of ``replaced`` that the base weights do not have in that shape is zero until it is replaced.
        Raises UsageError for an unknown scheme, what the scheme raises, and TensorMismatchError when a tensor of
        ``replaced`` is not in the module or has another shape there.
        """
        import torch

        scheme, argument = self._scheme(), self.spec.partition(":")[2]
        with torch.random.fork_rng(devices=[]), foreign(f"base {self.spec!r}", "built", CheckpointError):
            torch.manual_seed(0)
            module, signature = plugins.load("bases", scheme).build(argument, self)
        evaluated(module).requires_grad_(False)
        check_replaced(module, self.replaced)
        return module, signature


def plain(model: nn.Module, signature: Signature) -> nn.Module:
    """``model`` as a module of positional tensors (in signature order) to a tuple of tensors. It owns ``.model``."""
    from torch import nn as torch_nn

    class Plain(torch_nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return outputs_of_call(self.model, signature, tensors)

    return Plain()


def outputs_of_call(model: nn.Module, signature: Signature, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Call the model and return its outputs as a flat tuple, in the order of ``signature.outputs``."""
    return tuple(named_outputs(model, signature, tensors).values())


def named_outputs(model: nn.Module, signature: Signature, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Call the model and return its tensor outputs by name, nested values left out.

    A model that returns a bare tensor has ``output``, one that returns a tuple or list ``output_0``, ``output_1``, ...
    """
    import torch

    settings = {name: value for name, value in (signature.settings or {}).items() if name != "experts"}
    method = getattr(model, settings.pop("method", "__call__"))
    groups = settings.pop("groups", {})
    if settings.pop("by_name", False):
        given: dict[str, Any] = {i.name: t for i, t in zip(signature.inputs, tensors, strict=True)}
        for name, group in groups.items():
            given.setdefault(group, {})[name] = given.pop(name)
        result = method(**given, **settings)
    else:
        result = method(*tensors, **settings)
    if isinstance(result, torch.Tensor):
        return {"output": result}
    pairs = result.items() if isinstance(result, Mapping) else ((f"output_{i}", v) for i, v in enumerate(result))
    return {name: value for name, value in pairs if isinstance(value, torch.Tensor)}


def split_argument(argument: str) -> tuple[str, dict[str, Any]]:
    """``NAME?key=value&...`` as the name and its keywords; a value is a Python or JSON literal, else a string.

    Raises UsageError for a keyword without ``=`` or one that is given twice.
    """
    name, _, tail = argument.partition("?")
    words = {"true": True, "false": False, "none": None, "null": None}
    keywords: dict[str, Any] = {}
    for item in filter(None, tail.split("&")):
        key, equals, text = item.partition("=")
        if not (key.isidentifier() and equals) or key in keywords:
            raise UsageError(f"base {argument!r}: expected key=value, each key once; found {item!r}")
        try:
            keywords[key] = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            keywords[key] = text
    return name, keywords


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating point parameter, which its floating point inputs must have."""
    import torch

    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def with_observed_outputs(model: nn.Module, signature: Signature, what: str) -> Signature:
    """The signature with the output names of one real call on one sample, in eval mode, and of one on two where one leaves doubts.

    Raises CheckpointError if the call fails, or for an output that is not made of samples.
    """
    import torch

    model.eval()  # in training mode the call would change the statistics of batch norms

    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1:
        model = copy.deepcopy(model).to(torch.float32)  # many models cannot be called in several dtypes at once
    dtype = float_dtype(model)

    def answers(count: int) -> dict[str, tuple[int, ...]]:
        given = samples(signature, count, seed=0).values()
        tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in given)
        with torch.inference_mode(), experts(model, "run", signature.experts):
            return {name: tuple(tensor.shape) for name, tensor in named_outputs(model, signature, tensors).items()}

    try:
        outputs = answers(1)
        doubtful = {name: shape for name, shape in outputs.items() if not is_plain(shape)}
        two = answers(2) if doubtful else {}
        pairs = {name: (shape, two[name]) for name, shape in doubtful.items()}
    except Exception as error:
        raise CheckpointError(
            f"base {what!r}: the model cannot be called with "
            f"{', '.join(f'{i.name} {i.shape} {i.dtype}' for i in signature.inputs)}: {first_line(error)}; "
            "state its inputs with --input NAME=batch,...:DTYPE"
        ) from error
    if not outputs:
        raise CheckpointError(
            f"base {what!r}: the model returns no tensor (nested containers are not looked into), so there is no output to prove; "
            "give a py: function that returns a model with plain outputs"
        )
    odd = {name: axes_of(*shapes) for name, shapes in pairs.items()}
    lost = next((name for name, axes in odd.items() if axes is None), None)
    if lost is not None:
        raise CheckpointError(
            f"base {what!r}: output {lost} is not made of samples: its shape is {pairs[lost][0]} for one and {pairs[lost][1]} for two; "
            "give a py: function that returns a model without it"
        )
    taken = {*(i.name for i in signature.inputs), *model.state_dict()}
    names = {_free(name, taken | set(outputs) - {name}): name for name in outputs}
    renamed = {new: own for new, own in names.items() if new != own}
    known = {new: odd.get(own) or () for new, own in names.items() if odd.get(own, ROWS) != ROWS}
    return replace(signature, outputs=tuple(names), renamed=renamed, axes=known)


def _free(name: str, taken: set[str]) -> str:
    """An output's name in a graph, where names are one for all: ``out_sample`` where an input is called ``sample``."""
    while name in taken:
        name = f"out_{name}"
    return name


def parse_input(text: str) -> Input:
    """``NAME=batch,AXIS,...:DTYPE[:HIGH]``: ``image=batch,3,64,64:float32`` or ``ids=batch,sequence:int64:120``.

    An axis is a size or the name of a dynamic axis; integers are drawn from [0, HIGH), 2 when it is not given.
    Raises UsageError.
    """
    name, _, rest = text.partition("=")
    axes, *types = rest.split(":")
    shape = tuple(int(a) if a.isdecimal() else a for a in axes.split(","))
    dtype = types[0] if types else "float32"
    bound = types[1] if len(types) > 1 else ("2" if dtype == "int64" else None)
    fine = (
        name.isidentifier()
        and shape[0] == "batch"
        and all(a > 0 if isinstance(a, int) else a.isidentifier() for a in shape)
        and dtype in ("float32", "int64")
        and len(types) <= (2 if dtype == "int64" else 1)
        and (bound is None or (bound.isdecimal() and int(bound) > 0))
    )
    if not fine:
        raise UsageError(
            f"input {text!r}: expected NAME=batch,SIZE,...:float32 or NAME=batch,SIZE,...:int64:HIGH, the first axis "
            "called batch, such as image=batch,3,224,224:float32"
        )
    default = {a: USUAL_SIZE for a in shape[1:] if isinstance(a, str)}
    return Input(name, shape, dtype, None if bound is None else int(bound), default or None)


def samples(signature: Signature, count: int, seed: int) -> dict[str, Tensor]:
    """Random inputs by name, the same for the same seed: normal floats, integers uniform in [0, high).

    ``attention_mask`` is ones, with a padded tail for every second sample; dynamic axes have their usual size.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Tensor] = {}
    for i in signature.inputs:
        sizes = [a if isinstance(a, int) else (i.default or {}).get(a, USUAL_SIZE) for a in i.shape[1:]]
        shape = (count, *sizes)
        if i.name == "attention_mask":
            result[i.name] = torch.ones(shape, dtype=torch.int64)
            result[i.name][1::2, sizes[-1] - sizes[-1] // 3 :] = 0
        elif i.dtype == "int64":
            result[i.name] = torch.randint(i.high or 2, shape, generator=generator)
        else:
            result[i.name] = torch.randn(shape, generator=generator, dtype=torch.float32)
    return result


def read_inputs(path: Path, signature: Signature) -> dict[str, Tensor]:
    """Real inputs by name, from ``.npz`` (by input name) or ``.npy`` (the one input; ids get a mask of ones).

    Raises UsageError when a name, shape, dtype or range is not that of the signature, and for empty or non-finite data.
    """
    return checked_inputs(path, read_arrays(path, signature.inputs[0].name), signature)


def checked_inputs(path: Path, arrays: dict[str, np.ndarray[Any, Any]], signature: Signature) -> dict[str, Tensor]:
    """The arrays as the signature's inputs. Raises UsageError as ``read_inputs`` does."""
    import numpy as np
    import torch

    expected = {i.name: i for i in signature.inputs}
    if set(expected) - set(arrays) == {"attention_mask"} and "input_ids" in arrays:
        arrays["attention_mask"] = np.ones(arrays["input_ids"].shape, np.int64)
    if set(arrays) != set(expected):
        raise UsageError(
            f"inputs {path}: expected the arrays {', '.join(expected)}; found {', '.join(arrays)}; "
            "save them under these names with numpy.savez"
        )
    axes: dict[str, int] = {}
    for name, i in expected.items():
        _check_array(path, i, arrays[name], axes)
    return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in expected}


def read_arrays(path: Path, single: str | None) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an ``.npz`` file by name, or that of an ``.npy`` file as ``single``; None: there must be several.

    Raises UsageError for anything else; a zip archive of other things, as a ``.pt`` file is, opens as an ``.npz`` does.
    """
    import numpy as np

    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not hasattr(loaded, "files") and single is None:
                raise UsageError(f"inputs {path}: expected an .npz file with an array for every input; found one array")
            arrays = {n: loaded[n] for n in loaded.files} if hasattr(loaded, "files") else {str(single): loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"inputs {path}: expected a .npy or .npz file of arrays; found {first_line(error)}") from error
    other = next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None)
    if other is not None:
        raise UsageError(f"inputs {path}: expected a .npy or .npz file of arrays; found {other}, which is none")
    return arrays


def _check_array(path: Path, i: Input, array: np.ndarray[Any, Any], axes: dict[str, int]) -> None:
    """Raise UsageError unless the array is one the input takes; dynamic axes must agree between inputs."""
    import numpy as np

    def refuse(expected: object, found: object) -> UsageError:
        return UsageError(f"inputs {path}: {i.name}: expected {expected}; found {found}")

    if str(array.dtype) != i.dtype:
        raise refuse(f"dtype {i.dtype}", f"{array.dtype}; convert it with .astype('{i.dtype}')")
    if array.ndim != len(i.shape) or array.size == 0:
        raise refuse(f"shape {i.shape}, not empty", f"shape {array.shape}")
    for axis, size in zip(i.shape, array.shape, strict=True):
        if size != (axis if isinstance(axis, int) else axes.setdefault(axis, size)):
            raise refuse(f"shape {tuple(axes.get(str(a), a) for a in i.shape)}", f"shape {array.shape}")
    if i.dtype == "float32" and not np.isfinite(array).all():
        raise refuse("finite numbers", f"{int((~np.isfinite(array)).sum())} that are not")
    if i.high is not None and (array.min() < 0 or array.max() >= i.high):
        raise refuse(f"integers in [0, {i.high})", f"[{array.min()}, {array.max()}]")
