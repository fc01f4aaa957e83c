"""Options that several commands share, and what they say as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reparam_export.errors import UsageError

if TYPE_CHECKING:
    from reparam_export.checkpoints import Recipe

TARGETS = ("onnx", "trt", "safetensors", "genai")
Command = Callable[..., Any]


def stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, shown in the given order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
CHECKPOINT = stack(
    click.argument("checkpoint", type=click.Path(path_type=Path)),
    click.option(
        "--base",
        metavar="SPEC",
        help="timm:NAME?kw=value, hf:FOLDER, diffusers:FOLDER, open_clip:NAME or py:FILE.py:FUNCTION.",
    ),
    click.option(
        "--base-weights",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="The base's state: .npz .pt .safetensors.",
    ),
    click.option(
        "--config",
        metavar="FILE",
        multiple=True,
        type=click.Path(path_type=Path),
        help="YAML/JSON settings or GLoRA paths; N:FILE for the Nth of a stack.",
    ),
    click.option(
        "--set", "settings", metavar="NAME=VALUE", multiple=True, help="One setting, such as scale=0.5, or 2:scale=0.5."
    ),
    click.option(
        "--candidate", metavar="K", default=0, help="K-th best candidate of an evolution checkpoint; 0 is the best."
    ),
    click.option(
        "--input",
        "input_specs",
        metavar="SPEC",
        multiple=True,
        help="Input of a py: base: image=batch,3,64,64:float32.",
    ),
    click.option(
        "--rename",
        "renames",
        metavar="OLD=NEW",
        multiple=True,
        help="A part of the checkpoint's names as the base has it; may be repeated.",
    ),
    click.option(
        "--drop",
        metavar="PATTERN",
        multiple=True,
        help="Leave tensors of the checkpoint out by name, such as 'v_head.*'; recorded; may be repeated.",
    ),
    click.option(
        "--adapter",
        "adapters",
        metavar="PATH[=WEIGHT]",
        multiple=True,
        help="Another checkpoint on top, in this order; may be repeated.",
    ),
    click.option("--weight", type=float, default=1.0, help="How much of CHECKPOINT's change to keep.  [1]"),
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "auto"]),
    help="Storage of the fused weights; auto: the narrowest that keeps 99 % of every layer's change; default: as the base's.",
)
SAMPLES = stack(
    click.option(
        "--inputs", metavar="FILE", type=click.Path(path_type=Path), help="Real samples for the proof: .npy or .npz."
    ),
    click.option(
        "--samples", "count", default=8, type=click.IntRange(1, 4096), help="Random samples when no --inputs.  [8]"
    ),
    click.option("--seed", default=0, help="Seed of random samples and probes.  [0]"),
)
WITNESS = click.option(
    "--witness",
    metavar="auto|required|none|py:FILE.py:FUNCTION",
    default="auto",
    help="Second reading of the checkpoint, by the library that wrote it, or the adapted model as your own code makes it.  [auto]",
)
EXPECTED = click.option(
    "--expected",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Inputs and the answers that your own training code gave: .npz, by name.",
)
EXPORT = stack(
    click.option(
        "--to", "targets", type=click.Choice(TARGETS), multiple=True, required=True, help="Target; may be repeated."
    ),
    click.option(
        "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", help="Of ONNX and TensorRT.  [fp32]"
    ),
    click.option("--opset", type=click.IntRange(18, 25), help="ONNX opset; default: torch's."),
    click.option(
        "--batch", metavar="MIN:OPT:MAX", default="1:8:64", help="Batch sizes of the engine's profile.  [1:8:64]"
    ),
    click.option(
        "--gpu",
        metavar="LIST",
        help="Compute capabilities for TensorRT, such as sm80,sm89; default: all it supports here.",
    ),
)
OUT = click.option(
    "-o", "--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Output folder; default: CHECKPOINT-fused."
)
AGAIN = stack(
    click.option("--resume", is_flag=True, help="Continue a folder made from the same checkpoint and settings."),
    click.option("--overwrite", is_flag=True, help="Start anew in a folder that reparam-export made."),
)
FOLDER = click.argument("folder", type=click.Path(path_type=Path))
CODE = click.option(
    "--base", metavar="SPEC", help="Of a folder that was made on a py: base, that base: a folder names no code to run."
)


def recipe_of_call(
    checkpoint: Path,
    base: str | None,
    base_weights: Path | None,
    config: tuple[Path, ...],
    settings: tuple[str, ...],
    candidate: int,
    input_specs: tuple[str, ...],
    renames: tuple[str, ...] = (),
    drop: tuple[str, ...] = (),
    adapters: tuple[str, ...] = (),
    weight: float = 1.0,
    dtype: str | None = None,
) -> Recipe:
    """What the user gave, as the recipe of the first checkpoint with those of the others in it. Raises UsageError."""
    from reparam_export.checkpoints import Recipe

    stack = [(checkpoint, weight), *map(_weighted, adapters)]
    configs, values = _of_each(tuple(map(str, config)), len(stack)), _of_each(settings, len(stack))
    changed, left_out = (_of_each(given, len(stack)) for given in (renames, drop))
    first, *others = (
        Recipe(
            checkpoint=str(path.absolute()),
            config=tuple(str(Path(c).absolute()) for c in configs[n]),
            settings=dict(_setting(text) for text in values[n]),
            renames=tuple(changed[n]),
            drop=tuple(left_out[n]),
            weight=kept,
        )
        for n, (path, kept) in enumerate(stack, 1)
    )
    return replace(
        first,
        base=None if base is None else _absolute_base(base),
        base_weights=None if base_weights is None else str(base_weights.absolute()),
        candidate=candidate,
        inputs=input_specs,
        dtype=dtype,
        others=tuple(others),
    )


def _weighted(text: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH=WEIGHT``; a path may hold ``=``."""
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(number)
    except ValueError:
        raise UsageError(
            f"--adapter {text!r}: no such file, and {number!r} is no weight; expected PATH or PATH=WEIGHT"
        ) from None


def _of_each(given: tuple[str, ...], count: int) -> dict[int, list[str]]:
    """For each checkpoint of the stack, from 1 on, what is given for it: with its number and a colon in front, 1 without."""
    found: dict[int, list[str]] = {n: [] for n in range(1, count + 1)}
    for text in given:
        number, colon, rest = text.partition(":")
        own = colon and number.isdecimal() and not Path(text).exists()
        if own and int(number) not in found:
            raise UsageError(f"{text!r}: is for checkpoint {number} of the stack, which has {count}")
        found[int(number) if own else 1].append(rest if own else text)
    return found


def _absolute_base(base: str) -> str:
    """A base spec whose folder or file does not depend on where the command is run."""
    scheme, _, argument = base.partition(":")
    path, mark, rest = argument.rpartition(":") if scheme == "py" else argument.partition("?")
    if scheme in ("hf", "py", "diffusers") and Path(path).exists():
        return f"{scheme}:{Path(path).absolute()}{mark}{rest}"
    return base


def _setting(text: str) -> tuple[str, Any]:
    import ast

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {text!r}: expected NAME=VALUE, such as scale=0.5")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def out_folder(out: Path | None, recipe: Recipe) -> Path:
    return out or Path(f"{Path(recipe.checkpoint).name.split('.')[0]}-fused")


def batch_sizes(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) == 3 and all(p.isdecimal() for p in parts):
        low, best, high = map(int, parts)
        if 1 <= low <= best <= high:
            return low, best, high
    raise UsageError(f"--batch {text!r}: expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, such as 1:8:64")
