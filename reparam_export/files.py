"""Opening files that others wrote: tensors by name, without ever running code from the file.

``.safetensors`` is read through numpy while inspecting, so that torch need not be imported; pickles with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reparam_export.calls import first_line
from reparam_export.errors import CheckpointError
from reparam_export.names.once import once

SINGLE = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face folder, or with .index.json and shards
PARTIAL = ".partial"  # how a temporary file ends
UNPACKED = 50  # times the size of a packed file: weights do not shrink so far
STEP = 1 << 18  # bytes digested at a time: they stay in the processor's cache
PICKLES = (".pt", ".pth", ".bin", ".pth.tar", ".ckpt")


def load_safetensors(path: Path, *, numpy: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors (numpy arrays or torch tensors) and the metadata of a safetensors file. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    if numpy:
        import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    try:
        with safe_open(path, framework="numpy" if numpy else "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, "safetensors", error) from error
    except AttributeError as error:  # numpy has no such type, and no adapter is trained in one
        raise CheckpointError(
            f"{path}: holds numbers of 8 bits or fewer ({first_line(error)}), of which no adapter is made here; save it in float16, "
            "bfloat16 or float32"
        ) from error


def load_pickle(path: Path) -> Any:
    """What ``torch.load(weights_only=True)`` gives, memory-mapped where the file allows.

    A pickle that wants more than plain data is refused by the name it wants; nothing of it runs. ``argparse.Namespace``, the options of
    a training script, is plain data. Raises CheckpointError.
    """
    import argparse
    import pickle
    import warnings
    import zipfile

    import torch

    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "torch.distributed" in str(error):
            raise in_parts(path, "it holds tensors of torch.distributed") from error
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise _damaged(path, "a torch file", error) from error
        raise CheckpointError(
            f"{path}: this pickle wants {wanted[1]}, which is code, not weights; it was not run. "
            "Save the plain state dict (tensors by name) and pass that"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise _damaged(path, "a torch file", error) from error
    if _holds_parts(content):  # they say the whole's shape, and have the numbers of one part
        raise in_parts(path, "it holds tensors of torch.distributed")
    return content


def in_parts(path: Path, what: str) -> CheckpointError:
    """The error for a file of one rank, with what puts such files together."""
    return CheckpointError(
        f"{path}: {what}: one part of a model that was saved in parts, by rank (FSDP, tensor parallel). Put them together first: for verl "
        "`python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir OUT`, for DeepSpeed the zero_to_fp32.py beside "
        "its checkpoint; or save again gathered (FSDP's FULL_STATE_DICT), and give that"
    )


def _holds_parts(content: Any, depth: int = 3) -> bool:
    if isinstance(content, Mapping) and depth:
        return any(_holds_parts(value, depth - 1) for value in content.values())
    return is_tensor(content) and type(content).__module__.startswith("torch.distributed")


def save_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write torch tensors so that the same input gives the same bytes, readable as other new files are.

    ``safetensors`` writes the metadata in a random order; here its header is rewritten in place, in sorted order.
    """
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{path}: the safetensors header grew from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))
    path.chmod(0o666 & ~_mask())


def replace_file(
    path: Path, write: Callable[[Path], object], synced: Callable[[Path], object] = lambda _: None
) -> None:
    """Let ``write`` make a temporary file beside ``path``, then rename it; on failure nothing is left of it.

    synced: called with the temporary file before it is renamed. Its name cannot be known before, and it is made anew: a link of that
    name in a folder that came from elsewhere would be written through.
    """
    import os
    import tempfile

    handle, name = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o666 & ~_mask())
        write(temporary)
        synced(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _mask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove(path: Path) -> None:
    """A file, a folder with all in it, or a link, of which what it points to stays."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unpacks_too_far(path: Path, size: int, times: int = UNPACKED) -> bool:
    """Is this number of bytes far more than a packed file of weights unpacks to?"""
    return size > times * path.stat().st_size + (1 << 20)


def plain_shard_name(name: object, index: Path) -> None:
    """Raises CheckpointError unless an index names a weight file of its own folder, and nothing else."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", ".bin")):
        raise CheckpointError(
            f"{index}: names the shard {name!r}; expected the name of a weight file in the same folder"
        )


def sha256(path: Path) -> str:
    """Digest of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def exported_sha256(path: Path) -> str:
    """Digest of an exported file or folder; of an ONNX file with its weights beside it (``<path>.data``), of both digests, one a line."""
    data = path.with_name(f"{path.name}.data")
    if not data.is_file():
        return sha256(path)
    return hashlib.sha256(f"{sha256(path)}\n{sha256(data)}\n".encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """xxh3 of a file, or of all files of a folder with their names: has it changed? Fast enough for a model's own weights.

    It notices accidents, not intent: what a proof is tied to has sha256 and blake3.
    """
    from xxhash import xxh3_128

    digest = xxh3_128()
    if not path.is_file():
        for each in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{each.relative_to(path)}\0{fingerprint(each)}\0".encode())
        return digest.hexdigest()
    part = memoryview(bytearray(STEP))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(part):
            digest.update(part[:count])
    return digest.hexdigest()


def weight_files(folder: Path) -> dict[str, Path]:
    """Every tensor of a Hugging Face folder and its file; the one file of a folder without index stands under the name "".

    Raises CheckpointError for a folder without full weights, an index that is none or names files elsewhere, and a shard that is missing.
    """
    for name in SINGLE:
        if (folder / name).is_file():
            return {"": folder / name}
        index = folder / f"{name}.index.json"
        if index.is_file():
            return indexed(index)
    raise CheckpointError(
        f"{folder}: expected the full weights: {' or '.join(SINGLE)}, or their shards and index; found none; "
        "an adapter folder is not a base: give the folder of the base"
    )


def indexed(index: Path) -> dict[str, Path]:
    """Every tensor that an index names, and its file. Raises CheckpointError for names of files elsewhere, and a shard that is missing."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index}: expected a weight_map of tensor names and shards")
    for shard in entries.values():
        plain_shard_name(shard, index)
    files = {str(name): index.parent / shard for name, shard in entries.items()}
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} shard(s) are missing, first {missing[0]}; the download is incomplete, fetch it again"
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unlike_pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def unlike_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One object of JSON. Raises ValueError for a name that it gives two values: of which readers keep the last, and say nothing."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise ValueError(
                f"it gives {name!r:.80} twice, {found[name]!r:.80} and {value!r:.80}: take out the one that is not meant"
            )
        found[name] = value
    return found


def is_tensor(value: Any) -> bool:
    """A torch tensor or numpy array."""
    return hasattr(value, "dtype") and hasattr(value, "shape")


def state_dicts(content: Any, path: Path) -> dict[str, Mapping[str, Any]]:
    """Every state dict in what a training script saved, by the dotted name of its entry; ``""``: the content itself is one.

    Moving averages go first. States of optimizers and of random generators are none; what else stands beside is passed over.
    Raises TensorMismatchError for two of one name.
    """
    found = once(((keys, name, state) for keys, name, state in _states(content)), path)
    return dict(sorted(found.items(), key=lambda item: "ema" not in item[0]))


def _states(content: Any, depth: int = 2) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each state dict with its keys one by one, and as a dotted name."""
    if _is_state(content):
        yield "", "", content
    elif isinstance(content, Mapping) and depth:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping) and "optim" not in key:
                for keys, name, state in _states(value, depth - 1):
                    yield f"[{key!r}]{keys}", f"{key}.{name}".removesuffix("."), state


def _is_state(value: Any) -> bool:
    """Tensors by name, with weights among them."""
    if (
        not isinstance(value, Mapping)
        or not value
        or not all(isinstance(k, str) and is_tensor(v) for k, v in value.items())
    ):
        return False
    return any("float" in str(tensor.dtype) for tensor in value.values())


def flat_tensors(path: Path, content: Any) -> dict[str, Any]:
    """A flat mapping of tensors: the content, or the only state dict in it. Raises CheckpointError where there is none, or several."""
    found = state_dicts(content, path)
    if len(found) == 1:
        return plain_tensors(next(iter(found.values())))
    if found:
        raise CheckpointError(
            f"{path}: expected the tensors of one model, found several: {', '.join(found)}; save one on its own"
        )
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(content).__name__}")
    others = [name for name, value in content.items() if not is_tensor(value)]
    if others:
        raise CheckpointError(
            f"{path}: entry {others[0]!r} is a {type(content[others[0]]).__name__}, expected a tensor"
        )
    return plain_tensors(content)


def plain_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a state dict; an nn.Parameter as the plain tensor it holds."""
    return {name: _plain(value) for name, value in state.items()}


def _plain(tensor: Any) -> Any:
    """An nn.Parameter as the plain tensor it holds."""
    return tensor.detach() if hasattr(tensor, "detach") else tensor


def _damaged(path: Path, expected: str, error: Exception) -> CheckpointError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    size = path.stat().st_size if path.is_file() else 0
    return CheckpointError(
        f"{path}: {size} bytes that cannot be read as {expected} ({detail}); "
        "the file is truncated or damaged, fetch it again"
    )
