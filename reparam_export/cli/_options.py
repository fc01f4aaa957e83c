"""Options that several commands share, and what they say as values."""

from __future__ import annotations

from collections.abc import Callable
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
        "--base", metavar="SPEC", help="timm:NAME?kw=value, hf:FOLDER, open_clip:NAME or py:FILE.py:FUNCTION."
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
        help="YAML/JSON settings or GLoRA paths.",
    ),
    click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="One setting, such as scale=0.5."),
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


def recipe_of_call(
    checkpoint: Path,
    base: str | None,
    base_weights: Path | None,
    config: tuple[Path, ...],
    settings: tuple[str, ...],
    candidate: int,
    input_specs: tuple[str, ...],
    dtype: str | None = None,
) -> Recipe:
    from reparam_export.checkpoints import Recipe

    if base is not None:
        base = _absolute_base(base)
    return Recipe(
        checkpoint=str(checkpoint.absolute()),
        base=base,
        base_weights=None if base_weights is None else str(base_weights.absolute()),
        config=tuple(str(c.absolute()) for c in config),
        settings=dict(_setting(text) for text in settings),
        candidate=candidate,
        inputs=input_specs,
        dtype=dtype,
    )


def _absolute_base(base: str) -> str:
    """A base spec whose folder or file does not depend on where the command is run."""
    scheme, _, argument = base.partition(":")
    path, mark, rest = argument.rpartition(":") if scheme == "py" else argument.partition("?")
    if scheme in ("hf", "py") and Path(path).exists():
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
