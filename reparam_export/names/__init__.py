"""Names: what a key of a file means in the base, for every format.

wrappers.py     what wrappers put into keys (``module.``, ``_orig_mod.``, the name of an adapter), taken out again
conversions.py  the names that transformers' files have for a model's tensors, and where in the model each lies
constants.py    buffers that files have and models do not
once.py         other names for a file's keys, and an error where two of them would be one
found.py        which of the base's own names each name of a checkpoint means

A key is used once or named; what could mean several modules is an error with the candidates; what was done is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Where in the model one tensor of a file lies.

    tensor: name of the model's tensor. expert: which matrix of a stack (experts, rows, columns). rows: (start, stop) of the tensor's own
    rows, None: all. transposed: the file holds the transpose of that part. whole: it is the whole tensor, as it is.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def whole(self) -> bool:
        return self.expert is None and self.rows is None and not self.transposed

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        return self.tensor.rpartition(".")[2]


@dataclass(frozen=True)
class Own:
    """What a base calls its own.

    modules: dotted names, in the model's order. tensors: the shape of each tensor by its name. files: for a base of transformers, each
    tensor's name in files (of any version) and its place in the model; a name without a place is a part that is no block of rows.
    transposed: modules whose stacks hold (in, out). routers: modules that multiply by a matrix ``weight`` of their own, and are no
    layers (in transformers 4 they were linear layers). language: the decoder inside a model of more than text.
    newer: a tensor's name in files of any older version as the model has it.
    """

    modules: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Place | None] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    routers: frozenset[str] = frozenset()
    language: str | None = None
    newer: Callable[[str], str] | None = None
