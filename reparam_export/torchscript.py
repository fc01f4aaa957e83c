"""TorchScript archives as tensors by name, with no line of their code loaded: ``torch.jit.load`` would run it.

    constants.pkl, code/*.py       what marks the archive; of the code only the lists of parameters and buffers are read, as text
    data.pkl                       a pickle of the modules: an allow-list of names stands between it and everything else
    data/N                         storages

The layout is that of torch/csrc/jit/serialization/docs/serialization.md. The names and their order are those of ``state_dict()``.
"""

from __future__ import annotations

import ast
import io
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.errors import CheckpointError
from reparam_export.files import unpacks_too_far

if TYPE_CHECKING:
    from torch import Tensor

UNPACKED = 2  # times the size of the archive: torch stores without packing
CODE = 1 << 26  # bytes of one file of code
DEPTH = 200  # of modules in modules
MODULES = 1_000_000  # of one model, a shared one as often as it has names
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool",
}  # fmt: skip
DAMAGED = (  # what comes out of an archive that is none, or not whole
    RuntimeError, OSError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError, SyntaxError, OverflowError,
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, RecursionError, NotImplementedError, MemoryError,
)  # fmt: skip
MEMBERS = re.compile(r"^  __(parameters|buffers)__ = (\[[^\]\n]*\])", re.MULTILINE)
CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)


def is_torch_script(path: Path) -> bool:
    """A zip archive with TorchScript's constants or code in it; a damaged one is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
    return any("/code/" in name or (name.count("/") == 1 and name.endswith("/constants.pkl")) for name in names)


def load_torch_script(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of the archive by their dotted names. Raises CheckpointError, and what DAMAGED lists."""
    with zipfile.ZipFile(path) as archive:
        entries = {e.filename: e.file_size for e in archive.infolist()}
        if unpacks_too_far(path, sum(entries.values()), UNPACKED):
            raise ValueError(f"it unpacks to {sum(entries.values()):,} bytes")
        top = next(iter(entries)).partition("/")[0]
        members = _members({n: archive.read(n) for n in entries if _is_code(n, entries[n], top, path)}, top, path)
        root = _Reader(path, archive, top).load()
    if not isinstance(root, _Module):
        raise ValueError(f"its data.pkl holds a {type(root).__name__}, no module")
    return dict(_tensors(root, members))


def _is_code(name: str, size: int, top: str, path: Path) -> bool:
    if not (name.startswith(f"{top}/code/") and name.endswith(".py")):
        return False
    if size > CODE:
        raise CheckpointError(f"weights {path}: {name} unpacks to {size:,} bytes of code")
    return True


def _members(code: dict[str, bytes], top: str, path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """The parameters and the buffers of every class, by its qualified name: two literals in the text of the code."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, content in code.items():
        room = name.removeprefix(f"{top}/code/").removesuffix(".py").replace("/", ".")
        text = content.decode(errors="replace")
        if "__setstate__" in text or "torch.classes" in text:
            raise CheckpointError(
                f"weights {path}: this TorchScript archive runs code of its own when it is loaded ({name}), so that its file does not "
                "hold the numbers; nothing was run. Save its state_dict with torch.save, or as .safetensors"
            )
        starts = [*CLASS.finditer(text)]
        for start, stop in pairwise([*((m.end(), m[1]) for m in starts), (len(text), "")]):
            lists = {m[1]: ast.literal_eval(m[2]) for m in MEMBERS.finditer(text, start[0], stop[0])}
            found[f"{room}.{start[1]}"] = (lists.get("parameters", []), lists.get("buffers", []))
    return found


class _Module:
    """An object of a TorchScript class: its attributes, and nothing of what the class can do."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(type(name) is str for name in state):
            raise ValueError(f"{self.kind} holds a {type(state).__name__}, no attributes by name")
        vars(self).update(state)


class _Held:
    """A tensor that the pickle can hand on, and cannot change: BUILD would call its ``__setstate__``."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, _: Any) -> None:
        raise ValueError("a state for a tensor")


class _Reader(pickle.Unpickler):
    """data.pkl; a name that is not on the list is an error, and nothing of it is called."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, top: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{top}/data.pkl")))
        self._path, self._archive, self._top = path, archive, top
        self._kinds: dict[str, type] = {}
        self._storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch", "device"): str,
            **{("torch.jit._pickle", each): list for each in LISTS},
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "__torch__" or module.startswith("__torch__."):
            return self._kinds.setdefault(f"{module}.{name}", type(name, (_Module,), {"kind": f"{module}.{name}"}))
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise CheckpointError(
            f"weights {self._path}: this TorchScript archive wants {module}.{name}, which is code, not weights; it was not run. "
            "Save its state_dict with torch.save, or as .safetensors"
        )

    def persistent_load(self, pid: Any) -> Any:
        """A storage: ("storage", type, key, location, count)."""
        import torch

        tag, kind, key, _, count = pid
        if tag != "storage" or kind not in STORAGES.values() or type(key) is not str or type(count) is not int:
            raise ValueError(f"a storage of another layout: {str(pid)[:80]}")
        if key not in self._storages:
            raw, dtype = bytearray(self._archive.read(f"{self._top}/data/{key}")), getattr(torch, kind)
            if len(raw) != count * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(raw)} bytes, not those of {count} numbers of {kind}")
            self._storages[key] = _Held(torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype))
        return self._storages[key]


def _rebuilt(held: _Held, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> _Held:
    """A view of its storage. Raises ValueError for one that reaches beyond it."""
    storage, numbers = held.tensor, (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of shape {str(size)[:80]}, strides {str(stride)[:80]}, offset {str(offset)[:20]}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel():
        raise ValueError(f"a tensor that reaches entry {last} of a storage of {storage.numel()}")
    return _Held(storage.as_strided(tuple(size), tuple(stride), offset))


def _tensors(root: _Module, members: dict[str, tuple[list[str], list[str]]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, then those of the modules inside, as ``state_dict()`` orders them; a shared module under each of its names."""
    left: list[tuple[_Module, str, tuple[int, ...]]] = [(root, "", ())]
    walked = 0
    while left:
        module, prefix, above = left.pop()
        walked += 1
        if id(module) in above or len(above) > DEPTH or walked > MODULES:
            raise ValueError(f"{prefix[:80] or 'the model'} holds itself, or more modules than a model has")
        attributes = vars(module)
        for names in members.get(module.kind, ([], [])):
            for name in names:
                if isinstance(attributes.get(name), _Held):
                    yield f"{prefix}{name}", attributes[name].tensor
        inner = [(n, value) for n, value in attributes.items() if isinstance(value, _Module)]
        left += [(value, f"{prefix}{name}.", (*above, id(module))) for name, value in reversed(inner)]
