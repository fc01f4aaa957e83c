"""Every error this package raises on purpose, and the exit code of the command line for each.

    ReparamError
    |- UsageError                 the call itself is wrong                          exit 2
    |- CheckpointError            cannot be understood                              exit 3
    |  |- UnknownFormatError      no reader accepts it
    |  |- MissingSettingError     a scale, a rank or a path choice is not in the file
    |  '- TensorMismatchError     missing, left over or mis-shaped tensor
    |- FusionError                cannot be fused                                   exit 4
    |  |- NotAffineError          the module is not an affine map
    |  '- SharedWeightError       the base tensor also belongs to another module
    |- EquivalenceError           outside the bound; carries the evidence           exit 1
    |- AddedCostError             slower than its base, by more than the margin     exit 1
    |- UndecidedError             measured, but without a verdict                   exit 6
    '- ExportError                the target refused                                exit 5
       '- MissingBackendError     a package is not installed; names the extra

A message says what is wrong, where, what was expected and found, and what to do.
The fields on the exception carry the same facts, so that callers never match text.
"""

from __future__ import annotations

import re
from typing import Any

WORD, LINE, TEXT = 400, 2000, 10_000  # characters of a message: one run without spaces, one line, all of it


def clipped(text: str) -> str:
    """A message that what a file says (names, numbers, paths) cannot make endless: the middle of what is too long left out."""
    return _without_middle("\n".join(_without_middle(line, LINE) for line in short_words(text).split("\n")), TEXT)


def short_words(text: str) -> str:
    """The text with the middle left out of what is too long for a word."""
    return re.sub(rf"\S{{{WORD + 1},}}", lambda match: _without_middle(match[0], WORD), text)


def _without_middle(text: str, most: int) -> str:
    left = len(text) - most
    return (
        text if left <= 0 else f"{text[: most // 2]}... ({left:,} characters more) ...{text[len(text) - most // 2 :]}"
    )


class ReparamError(Exception):
    """Root of the tree. ``exit_code`` is what the command line exits with."""

    exit_code = 1

    def __str__(self) -> str:
        return clipped(super().__str__())


class UsageError(ReparamError):
    """An option, an argument or an output folder is not usable."""

    exit_code = 2


class CheckpointError(ReparamError):
    """A checkpoint, a base or a setting cannot be understood."""

    exit_code = 3


class UnknownFormatError(CheckpointError):
    """No reader accepts the file. ``looked_for`` maps each reader to what it wanted."""

    def __init__(self, message: str, *, path: str, looked_for: dict[str, str]) -> None:
        super().__init__(message)
        self.path = path
        self.looked_for = looked_for


class MissingSettingError(CheckpointError):
    """The file lacks a setting that decides the result; it is never guessed."""

    def __init__(self, message: str, *, setting: str, found_in: str, option: str) -> None:
        super().__init__(message)
        self.setting = setting
        self.found_in = found_in
        self.option = option


class TensorMismatchError(CheckpointError):
    """A tensor is missing, left over or has another shape than its module."""

    def __init__(self, message: str, *, module: str, tensor: str, expected: object, found: object) -> None:
        super().__init__(message)
        self.module = module
        self.tensor = tensor
        self.expected = expected
        self.found = found


class FusionError(ReparamError):
    """An adapter cannot be folded into its base."""

    exit_code = 4


class NotAffineError(FusionError):
    """The named modules are not affine maps of their input."""

    def __init__(self, message: str, *, modules: tuple[str, ...], reason: str) -> None:
        super().__init__(message)
        self.modules = modules
        self.reason = reason


class SharedWeightError(FusionError):
    """Folding into this tensor would also change another module."""

    def __init__(self, message: str, *, tensor: str, owners: tuple[str, ...]) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.owners = owners


class EquivalenceError(ReparamError):
    """The fused model, or an artefact of it, is outside its bound.

    ``layer`` is the first module where the two part (``None`` when unknown), ``evidence`` what was measured.
    """

    exit_code = 1

    def __init__(self, message: str, *, layer: str | None = None, evidence: Any = None) -> None:
        super().__init__(message)
        self.layer = layer
        self.evidence = evidence


class AddedCostError(ReparamError):
    """The measurement shows that the fused model costs more than its base, or one of two compared models more than the other."""

    exit_code = 1


class UndecidedError(ReparamError):
    """The measurement could not decide in its time, or the machine was too noisy to. Never a success."""

    exit_code = 6


class ExportError(ReparamError):
    """The target refused the model."""

    exit_code = 5


class MissingBackendError(ExportError):
    """A package that this target needs is not installed; ``extra`` of this project brings it."""

    def __init__(self, message: str, *, package: str, extra: str) -> None:
        super().__init__(message)
        self.package = package
        self.extra = extra
