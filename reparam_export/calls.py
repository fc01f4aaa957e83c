"""Calls into code that is not ours: a user's model, and the libraries that are inside it.

``foreign``   what such code raises becomes one line of ours: whose code, in which step, what it said
``copied``    a copy of a module, ``evaluated``: a module in eval mode
``experts``   transformers' mixtures of experts for the time of one step: not every implementation takes every step
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from reparam_export.errors import FusionError, ReparamError

if TYPE_CHECKING:
    from torch import nn

PACKAGE = Path(__file__).parent
M = TypeVar("M", bound="nn.Module")
Step = Literal["float64", "run", "capture"]
IMPLEMENTATIONS: dict[Step, str] = {
    "float64": "eager",  # grouped_mm, transformers' own choice, has no float64; batched_mm copies the weights for every token
    "run": "eager",  # the same code as the reference: what differs is rounding
    "capture": "batched_mm",  # a loop over the experts that were hit depends on numbers: torch.export cannot follow it
}


@contextmanager
def foreign(whose: str, step: str, error: type[ReparamError] = FusionError, hint: str = "") -> Iterator[None]:
    """Inside, code that is not ours runs. Whatever it raises is raised as ``error``; our own errors and faults go through as they are.

    whose: the model or the package, step: what it was asked, as a passive: "cannot be" is put before it.
    """
    try:
        yield
    except (ReparamError, MemoryError):
        raise
    except Exception as raised:  # of any type: a model may raise what it likes
        if is_our_fault(raised):
            raise
        raise error(f"{whose} cannot be {step}: {first_line(raised)}{hint and '; '}{hint}") from raised


def is_our_fault(raised: Exception) -> bool:
    """Was it raised in a line of this package, and is it of a kind that no model can make that line raise?

    A name that is not there, a failed assertion, an attribute that an object of ours or of Python's has not.
    """
    last = raised.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not Path(last.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
        return False
    if isinstance(raised, AttributeError):
        return type(raised.obj).__module__.partition(".")[0] in ("builtins", PACKAGE.name)
    return isinstance(raised, NameError | AssertionError)


def copied(module: M) -> M:
    """A copy of somebody else's module. Raises FusionError: not all modules can be copied."""
    with foreign(type(module).__name__, "copied"):
        return copy.deepcopy(module)


def evaluated(module: M) -> M:
    """The module itself, in eval mode; what its own ``eval`` or ``train`` returns is not relied on (loralib's return None)."""
    module.eval()
    return module


def first_line(error: BaseException) -> str:
    """The type and the first line of an error of a third party, for our own message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextmanager
def experts(model: nn.Module, step: Step, named: str | None = None) -> Iterator[None]:
    """Inside, the experts of transformers' models in ``model`` run in the implementation that the step needs.

    named: what the user asked for, which holds for every step but float64, where only a loop over plain products is sure to work.
    A model without such experts, and transformers before 5, are left alone.
    """
    wanted = named if named and step != "float64" else IMPLEMENTATIONS[step]
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            configs[id(config)] = config
    before = [(config, config._experts_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = wanted  # what set_experts_implementation sets, checks aside
        yield
    finally:
        for config, own in before:
            config._experts_implementation_internal = own
