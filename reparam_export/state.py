"""State dicts: name -> tensor, read from a file and put into a module, strictly.

load_state(path)                       the tensors of a file, whatever its suffix
digest(tensors)                        sha256 over names and bytes
assign(module, state, optional=...)    into the module; nothing missing, left over or mis-shaped
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.errors import CheckpointError, MissingSettingError, TensorMismatchError, UsageError
from reparam_export.files import load_pickle, load_safetensors, plain_tensors, state_dicts, unpacks_too_far
from reparam_export.names.constants import CONSTANTS as CONSTANTS
from reparam_export.names.constants import is_constant as is_constant
from reparam_export.names.once import once
from reparam_export.torchscript import DAMAGED, is_torch_script, load_torch_script

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".tar", ".ckpt")


def load_state(path: Path | str, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pt``/``.pth``/``.bin``/``.tar``/``.ckpt``, TorchScript or ``.npz`` file, by name.

    They keep their dtype and shape and are memory-mapped where the format allows. Pickles are read with
    ``weights_only=True``, and TorchScript archives without their code, so a file cannot run any. Of what a training script saved, the
    only state dict in it is taken, or the one of that entry where there are several (a moving average beside the weights).
    Raises CheckpointError for a missing, truncated or unknown file and for one without weights, MissingSettingError for several models.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise CheckpointError(f"weights {path}: expected a file; found {found}; check the path")
    if path.suffix == ".safetensors":
        return load_safetensors(path, numpy=False)[0]
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix in TORCH_SUFFIXES:
        return _torch_script(path) if is_torch_script(path) else _tensors(path, load_pickle(path), entry)
    raise CheckpointError(
        f"weights {path}: expected a file that ends in .safetensors, .npz, {', '.join(TORCH_SUFFIXES)}; found "
        f"{path.suffix or 'no suffix'!r}; convert it to .safetensors"
    )


def stored_in(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Those of these tensors that the weight files of a Hugging Face folder hold. Raises CheckpointError."""
    from reparam_export.files import weight_files

    files = weight_files(folder)
    wanted = {path for name, path in files.items() if name in names or not name}
    return {name: t for path in sorted(wanted) for name, t in load_state(path).items() if name in names}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and blake3 of the bytes of every tensor, in the order of the names."""
    return digest_of((name, str(t.dtype), tuple(t.shape), content_digest(t)) for name, t in tensors.items())


def content_digest(tensor: Tensor) -> bytes:
    """blake3 of the bytes of a tensor."""
    import torch
    from blake3 import blake3

    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(max_threads=blake3.AUTO).update(raw.data).digest()


def digest_of(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """The same from names, torch's dtypes, shapes and blake3 digests."""
    total = hashlib.sha256()
    for name, dtype, shape, content in sorted(tensors):
        total.update(f"{name}\0{dtype}\0{shape}\0".encode() + content)
    return total.hexdigest()


def _npz(path: Path) -> dict[str, Tensor]:
    import numpy as np
    import torch

    try:
        _check_unpacked(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = once(((f"{n}.npy", n, n) for n in arrays.files), path)  # a member a.npy and one a are both a
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in names}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise _unreadable(path, "a whole .npz file of plain arrays", error) from error


def _check_unpacked(path: Path) -> None:
    """Raises ValueError for an archive that unpacks to far more than weights do."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if unpacks_too_far(path, size):
        raise ValueError(f"it unpacks to {size:,} bytes")


def _torch_script(path: Path) -> dict[str, Tensor]:
    try:
        return load_torch_script(path)
    except DAMAGED as error:
        raise _unreadable(path, "a whole TorchScript archive", error) from error


def _tensors(path: Path, content: Any, entry: str | None) -> dict[str, Tensor]:
    """The one name -> tensor mapping in what a pickle holds. Raises CheckpointError when there is none, or several."""
    found = state_dicts(content, path)
    if entry is not None and entry not in found:
        raise UsageError(f"weights {path}: base_weights={entry}: expected one of {', '.join(found) or 'none'}")
    if len(found) > 1 and entry is None:
        raise MissingSettingError(
            f"weights {path}: expected one dict of names and tensors, found {', '.join(found)}: which one the adapter "
            f"was trained on decides the result; say it with --set base_weights={'|'.join(found)}",
            setting="base_weights",
            found_in="the training script",
            option=f"--set base_weights={'|'.join(found)}",
        )
    if not found:
        entries = (
            ", ".join(f"{k} ({type(v).__name__})" for k, v in content.items()) if isinstance(content, Mapping) else ""
        )
        raise CheckpointError(
            f"weights {path}: expected a dict of names and tensors, or a dict with such a dict in it; found a {type(content).__name__} "
            f"{entries[:300]}; save the right dict on its own"
        )
    return plain_tensors(found[entry] if entry is not None else next(iter(found.values())))


def unnested(state: Mapping[str, Tensor], expected: Collection[str]) -> Mapping[str, Tensor]:
    """The state without the one name that all of its names begin with, as a LightningModule's do, where that makes it the model's."""
    rest = state
    while rest and not any(name in expected for name in rest):
        heads = {name.partition(".")[0] for name in rest}
        if len(heads) > 1 or not all("." in name for name in rest):
            return state
        rest = {name.partition(".")[2]: tensor for name, tensor in rest.items()}
    return rest


def _unreadable(path: Path, expected: str, error: Exception) -> CheckpointError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"weights {path}: expected {expected}; found {path.stat().st_size} bytes that are not ({detail}); "
        "the file is truncated, damaged or of another format: fetch it again"
    )


def assign(module: nn.Module, state: Mapping[str, Tensor], *, optional: Collection[str] = ()) -> None:
    """Make the tensors of ``state`` the parameters and buffers of ``module``; their dtype and memory are kept.

    Names in ``optional`` may be missing or have another shape; the module then has zeros there. Tied parameters stay
    tied: the file may hold one of their names, or all with equal numbers. Raises TensorMismatchError for a tensor
    that is missing, left over (but for the constants listed above) or mis-shaped.
    """
    import torch

    expected = module.state_dict(keep_vars=True)
    state = unnested(state, expected)
    ties = _ties(expected)
    chosen: dict[str, Tensor] = {}
    for names in ties:
        target = expected[names[0]].detach()
        given = [n for n in names if n in state and not (n in optional and state[n].shape != target.shape)]
        if given:
            _check_tensor(given, state, target)
            chosen.update(dict.fromkeys(names, state[given[0]]))
        elif any(n in optional for n in names) or names[0].endswith("num_batches_tracked"):
            chosen.update(dict.fromkeys(names, torch.zeros_like(target)))
        else:
            raise _mismatch(
                names[0], tuple(target.shape), None, [n for t in ties for n in t if not set(t) & set(state)]
            )
    left_over = [n for n in state if n not in expected and n not in optional and not is_constant(n, state[n])]
    if left_over:
        shape = tuple(state[left_over[0]].shape)
        raise _mismatch(left_over[0], None, shape, left_over)
    module.load_state_dict(chosen, strict=True, assign=True)
    _tie(module, ties)


def _ties(expected: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The names of ``expected``, those of one and the same tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    return [tuple(names) for names in groups.values()]


def _check_tensor(names: list[str], state: Mapping[str, Tensor], target: torch.Tensor) -> None:
    import torch

    first = state[names[0]]
    for name in names:
        shape, kind = tuple(state[name].shape), state[name].is_floating_point()
        if shape != tuple(target.shape):
            raise _mismatch(name, tuple(target.shape), shape, [name])
        if kind != target.is_floating_point():
            raise _mismatch(name, target.dtype, state[name].dtype, [name])
        if not (state[name] is first or torch.equal(state[name], first)):
            raise _mismatch(name, f"the numbers of {names[0]}, to which it is tied", "other numbers", [name])


def _tie(module: nn.Module, ties: list[tuple[str, ...]]) -> None:
    """Make the names of one group one tensor object again; ``assign=True`` has made them several."""
    for first, *others in ties:
        owner, _, leaf = first.rpartition(".")
        tensor = getattr(module.get_submodule(owner), leaf)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, tensor)


def _mismatch(tensor: str, expected: object, found: object, all_names: Collection[str]) -> TensorMismatchError:
    what = "is missing from" if found is None else "is left over in" if expected is None else "does not fit in"
    more = f" (and {len(all_names) - 1} more: {', '.join(list(all_names)[1:6])})" if len(all_names) > 1 else ""
    return TensorMismatchError(
        f"{tensor} {what} the base weights{more}: the model expects {expected or 'no such tensor'}, the weights hold "
        f"{found or 'no such tensor'}; choose the base and the options that these weights were saved from",
        module=tensor.rpartition(".")[0],
        tensor=tensor,
        expected=expected,
        found=found,
    )
