"""Streaming that is killed, at any system call and at random moments, or runs out of disk: the old state, or the whole new one."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reparam_export.files import fingerprint
from streaming.models import llama, lora

# counts the calls that touch the disk, and kills the process at one of them; prints their number when it lives
DRIVER = """
import os, shutil, signal, sys
calls, at = [0], int(sys.argv.pop(1))
def counted(function):
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("pwrite", "fsync", "replace", "rename", "unlink", "rmdir", "ftruncate", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
from reparam_export.streaming import rows
rows.ENTRIES = 1024
from reparam_export.cli import cli
folding = ["--witness", "none"] if sys.argv[1] == "fuse" else []  # it is what is interrupted here
cli.main([*sys.argv[1:], *folding], standalone_mode=False)
print("calls", calls[0])
"""


def run(kill_at: int, *words: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limits() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", DRIVER, str(kill_at), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limits if limit else None, check=False)


def state(out: Path) -> dict[str, str]:
    """Everything a user or a later stage sees of the folder; the record without its times."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and ".fuse" not in p.parts):
        found[str(path.relative_to(out))] = fingerprint(path)
    if (out / "fused.json").is_file():
        record = json.loads((out / "fused.json").read_text())
        found["fused.json"] = json.dumps({k: v for k, v in record.items() if "seconds" not in k}, sort_keys=True)
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of three shards, two adapters, and the clean result of each."""
    root = tmp_path_factory.mktemp("interrupted")
    base = llama(root / "base", layers=3, shards=3)
    places = {"root": root, "a": lora(root / "a", base), "b": lora(root / "b", base, lora_alpha=3)}
    for name in "ab":
        done = run(0, "fuse", places[name], "-o", root / f"clean-{name}")
        assert done.returncode == 0, done.stderr
        places[f"clean-{name}"] = root / f"clean-{name}"
    places["calls"] = Path(done.stdout.split()[-1])
    return places


def points(given: dict[str, Path], count: int, seed: int) -> list[int]:
    """Which call is the last one: some at random, and the very last ones, where the result is put in its place."""
    calls = int(str(given["calls"]))
    return [*random.Random(seed).sample(range(1, calls - 8), count), calls - 6, calls - 3, calls - 1]


def test_killed_at_any_call_it_leaves_nothing_or_all_and_resumes(given: dict[str, Path], tmp_path: Path) -> None:
    clean = state(given["clean-a"])
    for number, at in enumerate(points(given, 4, seed=1)):
        out = tmp_path / str(number)
        killed = run(at, "fuse", given["a"], "-o", out)
        assert killed.returncode == -signal.SIGKILL, (at, killed.stderr)
        seen = {k: v for k, v in state(out).items() if k != "fused.json"} if out.exists() else {}
        assert seen in ({}, {k: v for k, v in clean.items() if k != "fused.json"}), at
        shards = {p: p.stat().st_mtime_ns for p in (out / ".fuse" / "hf").glob("*.safetensors")}
        progress = out / ".fuse" / "progress.json"
        finished = set(json.loads(progress.read_text())["shards"]) if progress.exists() else set()
        resumed = run(0, "fuse", given["a"], "-o", out, "--resume")
        assert resumed.returncode == 0, (at, resumed.stderr)
        assert state(out) == clean, at
        assert not (out / ".fuse").exists()
        for path, written in shards.items():
            if path.name in finished and (out / "hf" / path.name).exists():
                assert (out / "hf" / path.name).stat().st_mtime_ns == written  # not folded again


def test_killed_while_replacing_an_older_result_it_leaves_the_old_one_or_the_new(
    given: dict[str, Path], tmp_path: Path
) -> None:
    old, new = state(given["clean-a"]), state(given["clean-b"])
    for number, at in enumerate(points(given, 3, seed=2)):
        out = tmp_path / str(number)
        assert run(0, "fuse", given["a"], "-o", out).returncode == 0
        killed = run(at, "fuse", given["b"], "-o", out, "--overwrite")
        assert killed.returncode == -signal.SIGKILL
        committed = (out / ".fuse" / "fused.json").exists()
        if not committed and (out / "hf").exists() and (out / "fused.json").exists():
            assert state(out) in (old, new), at
        # whoever opens the folder next finds a whole one
        run(0, "report", out)
        assert state(out) | {"report.html": "", "report.md": "", "junit.xml": ""} in (
            old | {"report.html": "", "report.md": "", "junit.xml": ""},
            new | {"report.html": "", "report.md": "", "junit.xml": ""},
        ), at
        assert run(0, "fuse", given["b"], "-o", out, "--overwrite").returncode == 0
        assert state(out) == new


def test_killed_at_random_moments_it_resumes(given: dict[str, Path], tmp_path: Path) -> None:
    generator = random.Random(3)
    clean = state(given["clean-a"])
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, "0", "fuse", str(given["a"]), "-o", str(out), "--resume"]
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.1, 1.0))
        process.kill()
        process.wait()
        seen = {k: v for k, v in state(out).items() if k != "fused.json"} if out.exists() else {}
        assert seen in ({}, {k: v for k, v in clean.items() if k != "fused.json"})
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert state(out) == clean


def test_what_changed_in_between_is_not_taken_up(given: dict[str, Path], tmp_path: Path) -> None:
    """Another adapter is refused; a finished shard that was damaged, or whose base changed, is folded again."""
    import shutil

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(given["root"] / "base", base)
    calls = int(str(given["calls"]))
    for at in range(calls - 12, 0, -12):
        shutil.rmtree(out, ignore_errors=True)
        run(at, "fuse", given["a"], "--base", f"hf:{base}?task=CAUSAL_LM", "-o", out)
        progress = out / ".fuse" / "progress.json"
        if progress.exists() and 1 <= len(json.loads(progress.read_text())["shards"]) < 3:
            break
    else:
        pytest.fail("no point with a finished and an unfinished shard")
    other = run(0, "fuse", given["b"], "--base", f"hf:{base}?task=CAUSAL_LM", "-o", out, "--resume")
    assert other.returncode != 0
    assert "another checkpoint, base or settings" in other.stderr
    shard = out / ".fuse" / "hf" / next(iter(json.loads(progress.read_text())["shards"]))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run(0, "fuse", given["a"], "--base", f"hf:{base}?task=CAUSAL_LM", "-o", out, "--resume").returncode == 0
    found, clean = state(out), state(given["clean-a"])
    shards = [name for name in clean if name.endswith(".json") is False]
    assert [found[n] for n in shards if "safetensors" not in n] == [clean[n] for n in shards if "safetensors" not in n]
    record, expected = json.loads(found["fused.json"]), json.loads(clean["fused.json"])
    assert record["tensors"] == expected["tensors"]


def test_a_full_disk_is_one_line_and_what_is_finished_is_kept(given: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = sorted(f.stat().st_size for f in given["clean-a"].glob("hf/*.safetensors"))
    full = run(0, "fuse", given["a"], "-o", out, limit=sizes[0] // 2)
    assert full.returncode != 0
    assert "File too large" in full.stderr
    assert not out.exists()
    full = run(0, "fuse", given["a"], "-o", out, limit=sizes[-1] - 1)
    assert full.returncode != 0
    assert {p.name for p in out.iterdir()} <= {".fuse"} if out.exists() else True
    assert run(0, "fuse", given["a"], "-o", out, "--resume").returncode == 0
    assert state(out) == state(given["clean-a"])


def test_too_little_room_is_said_before_anything_is_written(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    from reparam_export.checkpoints import read
    from reparam_export.errors import ExportError
    from reparam_export.streaming import plan_of, stream

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10, 0, 10))
    with pytest.raises(ExportError, match="are needed"):
        stream(plan_of(read(given["a"], numpy=True), None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting needs root")
def test_a_disk_that_fills_up_while_writing(given: dict[str, Path], tmp_path: Path) -> None:
    """A file system of half a megabyte: the room is checked before, so the check is led to believe in more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.fail(f"cannot mount: {mounted.stderr!r}")
    try:
        small = run(0, "fuse", given["a"], "-o", disk / "out")
        assert "are needed" in small.stderr
        code = DRIVER.replace(
            "from reparam_export.cli import cli",
            "import reparam_export.streaming as s\ns.SPARE = -10**9\nfrom reparam_export.cli import cli",
        )
        command = [sys.executable, "-c", code, "0", "fuse", str(given["a"]), "-o", str(disk / "out")]
        full = subprocess.run(command, capture_output=True, text=True, check=False)
        assert full.returncode != 0
        assert "No space left on device" in full.stderr
        assert "Traceback" not in full.stderr or "ExportError" in full.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
