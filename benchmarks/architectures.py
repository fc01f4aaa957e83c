"""A sweep over architectures: does ``convert --to onnx`` come out right, is it refused with a reason, does it crash?

    python -m benchmarks.architectures                   what is not there yet, then what other code made; then the README's table
    python -m benchmarks.architectures --only gpt        those whose names hold this; --again: whatever is there
    python -m benchmarks.architectures --missing         only what is not there yet
    python -m benchmarks.architectures --table           the table alone, and which rows other code made

Each architecture of transformers, timm and diffusers is made tiny and random (``architectures_tiny.py``), with a random LoRA of peft on all
of its linear layers, and one on all of its convolutions without groups. The ONNX file is run by onnxruntime on the CPU, and judged against
peft's own unfused model in float64; "not reached" is an adapter that the samples have no use for (a vision tower under text alone). Every
row is kept in benchmarks/results/architectures.json as soon as it is made, with a digest of the code that it went through (``code_of``): a
row that other code made is made again. All of it takes an hour or two of a quiet core.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.architectures_tiny import architectures
from reparam_export import cli
from reparam_export.calls import experts
from reparam_export.models import Base, outputs_of_call

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reparam_export"
THROUGH = (  # what every row goes through: not the other kinds of adapters and files, other targets, reports
    "*.py",
    "bases/_*.py",
    "names/*.py",
    "streaming/*.py",
    "adapters/__init__.py",
    "adapters/lora.py",
    "checkpoints/_*.py",
    "checkpoints/peft_lora.py",
    "exporters/_*.py",
    "exporters/onnx.py",
    "verification/**/*.py",
)
SCHEMES = {"transformers": "hf", "timm": "timm", "diffusers": "diffusers"}
RESULTS = Path(__file__).parent / "results" / "architectures.json"
BEGIN, END = "<!-- architectures: made by python -m benchmarks.architectures -->", "<!-- /architectures -->"
ALLOWED = 1e-4  # of the largest answer; float32 against float64 through a whole network
PARTS = ("linear", "conv")
OUTCOMES = ("right", "not reached", "refused", "not proven", "wrong", "crash")
REACHED = 1e-6  # of the largest answer: below it the adapter has no part in what the samples show


@functools.cache
def code_of(library: str) -> str:
    """A digest of the code that a row of this library goes through, without the sweep itself."""
    paths = {path for pattern in (*THROUGH, f"bases/{SCHEMES[library]}.py") for path in PACKAGE.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def stale(kept: dict[str, Any]) -> list[str]:
    """The rows that other code made, and those that the benchmark itself failed at."""
    rows = {key: row for key, row in kept.items() if row}
    failed = [key for key, row in rows.items() if row["result"] == "benchmark failed"]
    return failed + [k for k, r in rows.items() if k not in failed and r.get("made_by") != code_of(k.partition("/")[0])]


def targets(model: torch.nn.Module, part: str) -> list[str]:
    """The layers that a LoRA goes on."""
    from transformers.pytorch_utils import Conv1D

    head = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()  # type: ignore[operator]
    inside = tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.MultiheadAttention))
    linear, conv = (torch.nn.Linear, Conv1D), (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, linear if part == "linear" else conv)
        and module is not head
        and getattr(module, "groups", 1) == 1
        and not name.startswith(inside or ("\0",))
    ]


def adapted(model: torch.nn.Module, names: list[str], folder: Path) -> torch.nn.Module:
    """peft's unfused model with random numbers in its adapter, which is saved."""
    from peft import LoraConfig, get_peft_model

    own = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=names, init_lora_weights=False))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in own.named_parameters():
        if "lora_" in name:
            wide = max(1.0, parameter[0].numel() / 64) ** 0.5  # kernels of many channels would end in infinity
            parameter.data = 0.3 / wide * torch.randn(parameter.shape, generator=generator)
    own.save_pretrained(str(folder))
    return own.eval()


def converted(arguments: list[str]) -> tuple[int, str]:
    """The command line's exit code, and the last line it says."""
    said = io.StringIO()
    own = mock.patch.object(sys, "argv", ["reparam-export", *arguments])
    with own, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")] or lines[-1:]
    return code, "".join(told)[:400]


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    """What a forward makes out of nothing is float64, too."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def judged(own: torch.nn.Module, base: Base, out: Path) -> dict[str, float]:
    """How far the ONNX file is from peft's unfused model in float64, the largest answer, and what the adapter does to it."""
    import numpy as np
    import onnxruntime

    _, signature = base.build()
    arrays = np.load(out / "reference.npz")
    inputs = {i.name: arrays[f"input:{i.name}"] for i in signature.inputs}
    tensors = [torch.from_numpy(x) for x in inputs.values()]
    wide = copy.deepcopy(own).double()
    doubles = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    with torch.no_grad(), experts(wide, "float64"), double_by_default():
        expected = outputs_of_call(wide, signature, doubles)
        with wide.disable_adapter():  # type: ignore[operator]
            without = outputs_of_call(wide, signature, doubles)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    found = session.run(list(signature.outputs), {n: x for n, x in inputs.items() if n in wanted})
    worst = {"error": 0.0, "effect": 0.0}
    for theirs, plain, ours in zip(expected, without, found, strict=True):
        size = max(float(theirs.abs().max()), 1e-30)
        worst["error"] = max(worst["error"], float((torch.from_numpy(ours).double() - theirs).abs().max()) / size)
        worst["effect"] = max(worst["effect"], float((plain - theirs).abs().max()) / size)
    return worst


def row(make: Callable[[Path], tuple[torch.nn.Module, list[str]]], part: str) -> dict[str, Any] | None:
    """One architecture with one adapter; None where it has no such layer."""
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="architectures-"))
    try:
        torch.manual_seed(0)
        model, base = make(folder / "base")
        names = targets(model, part)
        if not names:
            return None
        try:
            own = adapted(model, names, folder / "adapter")
        except Exception as error:  # of peft: nothing of ours was asked yet
            return {"result": "peft refuses", "said": f"{type(error).__name__}: {error}"[:300]}
        small = ["--samples", "3", "--batch", "1:2:3", "--to", "onnx", "-o", str(folder / "out")]
        code, said = converted(["convert", str(folder / "adapter"), *base, *small])
        if code == 130:  # the command takes SIGTERM and Ctrl-C for itself
            raise KeyboardInterrupt
        found: dict[str, Any] = {"layers": len(names), "code": code}
        if code == 0:
            try:
                found |= judged(own, Base(base[1], Path(base[3]) if len(base) > 2 else None), folder / "out")
            except (
                AttributeError
            ) as error:  # MobileNet asks its convolutions for their stride, and peft's layers have none
                return {"result": "peft refuses", "said": f"its own model cannot be run: {error}"}
            right = found["error"] <= ALLOWED and found["effect"] > 10 * found["error"]
            unseen = found["error"] <= REACHED and found["effect"] <= REACHED
            found["result"] = "right" if right else "not reached" if unseen else "wrong"
        else:
            found |= {"result": {1: "not proven", 70: "crash"}.get(code, "refused"), "said": said}
        return {**found, "seconds": round(time.monotonic() - started, 1)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(kept: dict[str, Any]) -> str:
    """The README's table: how many of each library came out how, and why the refused ones were."""
    lines = [
        f"| library | LoRA on | architectures | {' | '.join(OUTCOMES)} |",
        "|---|---|" + "--:|" * (1 + len(OUTCOMES)),
    ]
    for library in ("transformers", "timm", "diffusers"):
        for part in PARTS:
            rows = [r for name, r in kept.items() if name.startswith(f"{library}/") and name.endswith(f"/{part}") and r]
            counts = Counter(r["result"] for r in rows)
            cells = [counts[name] for name in OUTCOMES]
            layers = "linear layers" if part == "linear" else "convolutions"
            lines.append(f"| {library} | {layers} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def keep(key: str, make: Callable[[Path], tuple[torch.nn.Module, list[str]]]) -> None:
    """Make one row, and write it down."""
    code = code_of(key.partition("/")[0])  # before: the files may change meanwhile
    try:
        found = row(make, key.rpartition("/")[2])
    except Exception:  # of the benchmark or of the library that makes the model: to be seen, and mended
        found = {"result": "benchmark failed", "said": traceback.format_exc()[-600:]}
    found = found and {**found, "made_by": code}
    RESULTS.write_text(json.dumps(dict(sorted((read() | {key: found}).items())), indent=1) + "\n", encoding="utf-8")
    print(key, found, flush=True)


def main() -> None:
    """Make what is not there yet, keep every row, put the table into README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that hold this")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--slice", default="0/1", help="I/N: every Nth from I on")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    known = architectures()
    first, step = map(int, given.slice.split("/"))
    chosen = [name for name in sorted(known) if given.only in name][first::step]
    keys = [f"{name}/{part}" for part in PARTS for name in chosen]
    kept, other = read(), set(stale(read()))
    todo = [key for key in keys if key not in kept or given.again]
    todo += [] if given.missing or given.again else [key for key in keys if key in other]
    for key in () if given.table else todo:
        keep(key, known[key.rpartition("/")[0]])
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN in text:
        head, rest = text.split(BEGIN)
        readme.write_text(f"{head}{BEGIN}\n{table(read())}{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table(read()))
    print(f"made by other code than this: {len(stale(read()))} of {len(read())} rows")


def read() -> dict[str, Any]:
    """The rows that were made."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


if __name__ == "__main__":
    main()
