"""Fusing a LLaMA of random weights shard by shard: against ``peft``'s merge and against ``cp`` of the same files, whole processes.

    python -m benchmarks.fusion                       1.1 B parameters, bf16, 4 shards: results/fusion.json and the README's table
    python -m benchmarks.fusion --size 7b --once      one run of ``fuse`` with LoRA, nothing else: results/fusion-7b.json

Every round runs each command once, in random order, since a disk is not the same from minute to minute; ratios are made within a round, and
their medians are what counts. ``cp + sync`` waits until the copy is on the disk, as ``fuse`` does. Anonymous memory is sampled from
/proc/PID/smaps_rollup every 20 ms; files that are mapped do not count. That slows down who is sampled, so it is done in a round of its own.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- fusion: made by python -m benchmarks.fusion -->", "<!-- /fusion -->"
SIZES = {  # layers, hidden, inner, heads, key/value heads, shards
    "1b": (22, 2048, 5632, 32, 4, 4),
    "3b": (26, 3200, 8640, 32, 32, 2),
    "7b": (32, 4096, 11008, 32, 32, 3),
}
VOCABULARY, RANK = 32_000, 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass(frozen=True)
class Run:
    """One process. Seconds; bytes of anonymous memory at most; the machine's load when it began."""

    name: str
    wall: float
    user: float
    system: float
    anonymous: int
    load: float


def shapes(size: str) -> dict[str, tuple[int, int]]:
    """The linear layers of one block."""
    _, hidden, inner, heads, kv, _ = SIZES[size]
    narrow = hidden // heads * kv
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def make_model(folder: Path, size: str) -> None:
    """A LLaMA folder of random bf16 weights, written a few megabytes at a time."""
    from reparam_export.streaming.shards import layout

    layers, hidden, inner, heads, kv, count = SIZES[size]
    names: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, hidden))]
    for i in range(layers):
        names += [(f"model.layers.{i}.{name}.weight", shape) for name, shape in shapes(size).items()]
        names += [
            (f"model.layers.{i}.{name}.weight", (hidden,)) for name in ("input_layernorm", "post_attention_layernorm")
        ]
    names += [("model.norm.weight", (hidden,)), ("lm_head.weight", (VOCABULARY, hidden))]
    total = sum(int(np.prod(shape)) for _, shape in names)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    where, done = {}, 0
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(count)]
    for name, shape in names:
        number = min(count - 1, done * count // total)
        shards[number].append((name, "BF16", shape))
        where[name] = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        done += int(np.prod(shape))
    for number, tensors in enumerate(shards):
        header, _, _ = layout(tensors, {"format": "pt"})
        with (folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors").open("wb") as file:
            file.write(header)
            for _, _, shape in tensors:
                left = int(np.prod(shape))
                while left:
                    n = min(left, 1 << 22)
                    values = (
                        generator.standard_normal(n, dtype=np.float32) * 0.02
                        if len(shape) > 1
                        else np.ones(n, np.float32)
                    )
                    file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                    left -= n
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def linears(size: str) -> list[tuple[str, tuple[int, int]]]:
    """Every linear layer of the blocks."""
    return [(f"model.layers.{i}.{name}", shape) for i in range(SIZES[size][0]) for name, shape in shapes(size).items()]


def make_lora(folder: Path, base: Path, size: str) -> None:
    """A PEFT folder: LoRA of rank 16 on every linear layer, fp32."""
    from safetensors.numpy import save_file

    folder.mkdir()
    generator = np.random.default_rng(1)
    tensors = {}
    for name, (out, inn) in linears(size):
        tensors[f"base_model.model.{name}.lora_A.weight"] = (generator.standard_normal((RANK, inn)) * inn**-0.5).astype(
            np.float32
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = (generator.standard_normal((out, RANK)) * 0.003).astype(
            np.float32
        )
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": [name.partition(".")[2] for name in shapes(size)], "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_native(file: Path, base: Path, size: str, kind: str) -> None:
    """Hydra (both branches) or GLoRA (A, B and C low-rank, D none, E a vector) of rank 16 on every linear layer, fp32."""
    import torch

    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, size: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * size

    def pair(inn: int, out: int) -> dict[str, Any]:
        return {
            "down": {"weight": draw(RANK, inn, size=inn**-0.5), "bias": None},
            "up": {"weight": draw(out, RANK, size=0.003), "bias": None},
        }

    adapters = []
    for name, (out, inn) in linears(size):
        if kind == "hydra":
            params: dict[str, Any] = {
                "parallel": pair(inn, out),
                "sequential": pair(out, out),
                "parallel_scale": 1.0,
                "sequential_scale": 1.0,
            }
        else:
            path = {"A": f"LoRA_{RANK}", "B": f"LoRA_{RANK}", "C": f"LoRA_{RANK}", "D": "none", "E": "vector"}
            params = {
                "path": path,
                "Ad": draw(out, RANK, size=0.003), "Au": draw(RANK, inn, size=1.0),
                "Bd": draw(out, RANK, size=0.003), "Bu": draw(RANK, inn, size=inn**-0.5),
                "Cd": draw(inn, RANK, size=0.003), "Cu": draw(RANK, 1, size=1.0),
                "D": draw(out, size=0.003), "E": draw(out, size=0.003),
            }  # fmt: skip
        adapters.append({"module": name, "kind": kind, "rows": None, "params": params})
    torch.save({"format": "reparam-export/1", "base": f"hf:{base}", "adapters": adapters, "replaced": {}}, file)


def run(name: str, command: list[str], *, watched: bool) -> Run:
    """A process from start to end; its memory where it is watched, which takes time. Raises when it fails."""
    load = os.getloadavg()[0]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peak = [0]
    if watched:
        threading.Thread(target=_watch, args=(process.pid, peak), daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{name} failed: {process.stderr.read().decode()[-2000:] if process.stderr else ''}")
    return Run(name, round(wall, 3), round(usage.ru_utime, 3), round(usage.ru_stime, 3), peak[0], round(load, 2))


def _watch(pid: int, peak: list[int]) -> None:
    while True:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:")]
        peak[0] = max([peak[0], *found])
        time.sleep(0.02)


def commands(place: Path) -> dict[str, list[str]]:
    """What is compared. Each writes to ``out``."""
    base, out = place / "base", str(place / "out")
    fuse = [sys.executable, "-m", "reparam_export", "fuse"]
    copy = f"mkdir {out} && cp {base}/* {out}/"
    return {
        "fuse LoRA": [*fuse, str(place / "lora"), "-o", out],
        "fuse Hydra": [*fuse, str(place / "hydra.pt"), "-o", out],
        "fuse GLoRA": [*fuse, str(place / "glora.pt"), "-o", out],
        "cp": ["sh", "-c", copy],
        "cp + sync": ["sh", "-c", f"{copy} && sync {out}/*"],
        "import torch": [sys.executable, "-c", "import torch"],
        "peft": [sys.executable, "-c", PEFT, str(base), str(place / "lora"), out],
    }


def measure(place: Path, rounds: int) -> tuple[list[list[Run]], dict[str, Any]]:
    """All commands, watched once and then ``rounds`` times in random order, and what the fusions said of themselves."""
    generator = random.Random(0)
    said: dict[str, Any] = {}
    found = []
    for number in range(rounds + 1):
        order = list(commands(place).items())
        generator.shuffle(order)
        runs = []
        for name, command in order:
            shutil.rmtree(place / "out", ignore_errors=True)
            os.sync()
            runs.append(run(name, command, watched=number == 0))
            print(f"round {number}: {name}: {runs[-1].wall:.2f} s", flush=True)
            record = place / "out" / "fused.json"
            if record.is_file() and number:
                content = json.loads(record.read_text())
                said.setdefault(name, []).append(
                    {k: content[k] for k in ("cpu_seconds", "seconds", "survival") if k in content}
                )
                said[name][-1]["survival"] = said[name][-1]["survival"]["overall"]
        found.append(runs)
    shutil.rmtree(place / "out", ignore_errors=True)
    return found, said


def ratios(found: list[list[Run]], above: str, below: str, without: str | None = None) -> float:
    """The median over the rounds of one command's time, less that of ``without``, over another's."""
    pairs = [{r.name: r.wall for r in runs} | {"": 0.0} for runs in found]
    return statistics.median((pair[above] - pair[without or ""]) / pair[below] for pair in pairs)


def summary(found: list[list[Run]], said: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios and the share of the probes; memory from the first round, which is not timed."""
    watched, *found = found
    names = [r.name for r in watched]
    medians = {n: round(statistics.median(r.wall for runs in found for r in runs if r.name == n), 2) for n in names}
    cpu = {
        n: round(statistics.median(r.user + r.system for runs in found for r in runs if r.name == n), 2) for n in names
    }
    memory = {r.name: r.anonymous for r in watched}
    shares = {
        n: [s["cpu_seconds"]["of which probes"] / s["cpu_seconds"]["fold"] for s in each] for n, each in said.items()
    }
    pairs = (
        ("peft", "fuse LoRA"),
        ("fuse LoRA", "cp"),
        ("fuse LoRA", "cp + sync"),
        ("fuse Hydra", "fuse LoRA"),
        ("fuse GLoRA", "fuse LoRA"),
    )
    return {
        "seconds": medians,
        "cpu_seconds": cpu,
        "anonymous": memory,
        "ratios": {f"{a} / {b}": round(ratios(found, a, b), 2) for a, b in pairs}
        | {
            f"{a} less import torch": round(ratios(found, a, "fuse LoRA", "import torch"), 2)
            for a in ("fuse Hydra", "fuse GLoRA")
        },
        "load": [
            round(min(r.load for runs in found for r in runs), 1),
            round(max(r.load for runs in found for r in runs), 1),
        ],
        "probes of folding": {n: round(statistics.median(each), 3) for n, each in shares.items()},
    }


def machine() -> dict[str, Any]:
    """Where it was measured."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "python": platform.python_version(),
    }


def table(content: dict[str, Any]) -> str:
    """The README's table."""
    seconds, cpu, memory, ratio = (content[k] for k in ("seconds", "cpu_seconds", "anonymous", "ratios"))
    head = "| whole process | seconds | CPU seconds | anonymous memory | against |\n|---|--:|--:|--:|---|\n"
    against = {
        "fuse LoRA": f"{ratio['peft / fuse LoRA']:.1f} times as fast as peft; {ratio['fuse LoRA / cp + sync']:.2f} x cp + sync, "
        f"{ratio['fuse LoRA / cp']:.2f} x cp",
        **{
            f"fuse {k}": f"{ratio[f'fuse {k} / fuse LoRA']:.2f} x LoRA; {ratio[f'fuse {k} less import torch']:.2f} x less `import torch`, "
            "which reading its `.pt` takes"
            for k in ("Hydra", "GLoRA")
        },
    }
    names = {
        "fuse LoRA": "`fuse`, LoRA",
        "fuse Hydra": "`fuse`, Hydra",
        "fuse GLoRA": "`fuse`, GLoRA",
        "peft": "`peft` load, merge, save",
    }
    order = ("fuse LoRA", "fuse Hydra", "fuse GLoRA", "peft", "cp", "cp + sync")
    rows = [
        f"| {names.get(n, f'`{n}`')} | {seconds[n]:.1f} | {cpu[n]:.1f} | {memory[n] / 1e6:,.0f} MB | {against.get(n, '')} |\n"
        for n in order
    ]
    low, high = content["load"]
    return f"{head}{''.join(rows)}\nLoad average of the machine's {content['machine']['cores']} cores meanwhile: {low} to {high}.\n"


def main() -> None:
    """Measure, write the JSON, and the table between its marks in README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="one run of fuse with LoRA, for models larger than memory")
    parser.add_argument("--folder", type=Path, help="where to make the model; default: a temporary folder")
    given = parser.parse_args()
    compileall.compile_dir(ROOT / "reparam_export", quiet=1)  # as pip does it with peft
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        place = Path(scratch)
        make_model(place / "base", given.size)
        make_lora(place / "lora", place / "base", given.size)
        content: dict[str, Any] = {
            "size": given.size,
            "machine": machine(),
            "command": f"python -m benchmarks.fusion --size {given.size}{' --once' if given.once else ''}",
        }
        content["bytes"] = sum(f.stat().st_size for f in (place / "base").iterdir())
        if given.once:
            os.sync()
            content["run"] = asdict(run("fuse LoRA", commands(place)["fuse LoRA"], watched=True))
            record = json.loads((place / "out" / "fused.json").read_text())
            content["fused.json"] = {k: record[k] for k in ("cpu_seconds", "seconds", "bytes")}
            content["layers"] = {
                "exact": sum(e["verdict"] == "exact" for e in record["layers"]),
                "all": len(record["layers"]),
            }
        else:
            for kind in ("hydra", "glora"):
                make_native(place / f"{kind}.pt", place / "base", given.size, kind)
            found, said = measure(place, given.rounds)
            content |= summary(found, said)
            content["runs"] = [[asdict(r) for r in runs] for runs in found]
    name = "fusion.json" if not given.once else f"fusion-{given.size}.json"
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({k: v for k, v in content.items() if k != "runs"}, indent=1))
    if not given.once and given.size == "1b":
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{table(content)}{END}{text.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
