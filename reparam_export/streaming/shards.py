"""Weight files one tensor at a time: where each lies on disk, mapped and never read whole; and files that are written in place.

safetensors   8 bytes of header length, a JSON header, then the tensors' bytes (github.com/huggingface/safetensors, README, Format)
.bin          a torch file, memory-mapped by torch itself
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reparam_export.errors import CheckpointError
from reparam_export.files import load_pickle
from reparam_export.streaming.formats import FORMATS, SIZES, Array

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 4096


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file or in memory. ``code``: its dtype as safetensors names it; ``raw``: its bytes, mapped."""

    name: str
    code: str
    shape: tuple[int, ...]
    raw: Array  # uint8, flat

    @property
    def is_float(self) -> bool:
        return self.code in FORMATS

    def values(self) -> Array:
        """The raw values in their shape; floats of 16 bits as uint16."""
        return self.raw.view(FORMATS[self.code].raw).reshape(self.shape)

    def tensor(self) -> Tensor:
        """The float values as a torch tensor on these very bytes, to be read only."""
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it must not be written to
            raw = torch.from_numpy(self.raw)
        return raw.view(getattr(torch, FORMATS[self.code].torch)).reshape(self.shape)


def open_shard(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, mapped. Raises CheckpointError."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks the header: sizes, bounds, overlaps
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
            whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes that cannot be read as safetensors ({error}); "
            "the file is truncated or damaged, fetch it again"
        ) from error
    header.pop("__metadata__", None)
    start = 8 + size
    return {
        name: Stored(
            name, e["dtype"], tuple(e["shape"]), whole[start + e["data_offsets"][0] : start + e["data_offsets"][1]]
        )
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def _open_pickle(path: Path) -> dict[str, Stored]:
    from reparam_export.files import flat_tensors

    return {name: of_tensor(name, tensor) for name, tensor in flat_tensors(path, load_pickle(path)).items()}


def of_tensor(name: str, tensor: Any) -> Stored:
    """A torch tensor or numpy array as it would be stored. Raises CheckpointError for a dtype that safetensors has not."""
    code = _codes().get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"{name}: tensors of {tensor.dtype} cannot be written to safetensors")
    shape = tuple(int(n) for n in tensor.shape)
    if hasattr(tensor, "detach"):
        import torch

        tensor = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Stored(name, code, shape, np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def _codes() -> dict[str, str]:
    """Names of dtypes, as torch and numpy say them, and safetensors' codes."""
    whole = {f"{kind}{8 * n}": f"{code}{8 * n}" for kind, code in (("int", "I"), ("uint", "U")) for n in (1, 2, 4, 8)}
    return whole | {"bool": "BOOL"} | {f.torch: f.code for f in FORMATS.values()}


@dataclass(frozen=True)
class Place:
    """Where one tensor goes in an output file. ``offset``: of its bytes from the file's start."""

    name: str
    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * SIZES[self.code]


def layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[Place], int]:
    """Header bytes, places and size of a safetensors file with these (name, code, shape), in this order.

    The header is padded so that the data begin at a page: then the kernel copies whole pages, two to three times as fast.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    starts = []
    end = 0
    for name, code, shape in tensors:
        start, end = end, end + Place(name, code, shape, 0).nbytes
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        starts.append(start)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data = -(-(8 + len(text)) // PAGE) * PAGE
    places = [Place(*tensor, data + start) for tensor, start in zip(tensors, starts, strict=True)]
    return (data - 8).to_bytes(8, "little") + text.ljust(data - 8), places, data + end


def write_at(fd: int, raw: Array, offset: int) -> None:
    """All bytes of a contiguous array at one place of an open file. Raises OSError."""
    view = raw.data.cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
