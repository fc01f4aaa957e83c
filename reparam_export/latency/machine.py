"""Where times were taken: processor, clocks, memory, load, versions, the GPU where there is one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """What does not change while times are taken. Sizes in bytes."""
    import psutil

    from reparam_export.verification import versions

    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "usable CPUs": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "virtual machine": {True: "yes", False: "no", None: None}[_flag("hypervisor")],
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not shown by the system",
        "priority of the runs": _priority(),
        "GPU": _gpu(),
        "versions": versions(),
    }


def state() -> dict[str, Any]:
    """What does change: clocks, and how many processes wanted to run during the last minute."""
    import psutil

    clock = psutil.cpu_freq()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"clock in MHz": round(clock.current) if clock else None, "load": load, "GPU clocks": _gpu_clocks()}


def available_memory() -> int:
    """Bytes that a new process could take now."""
    import psutil

    return int(psutil.virtual_memory().available)


def _priority() -> str:
    """What a timing process gets when it asks for the highest."""
    ask = "import sys; from reparam_export.latency.worker import raise_priority; sys.exit(not raise_priority())"
    done = subprocess.run((sys.executable, "-c", ask), capture_output=True, check=False, start_new_session=True)
    return "normal" if done.returncode else "highest"


def _processor() -> str:
    info = _lines("/proc/cpuinfo")
    named = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _flag(name: str) -> bool | None:
    info = [line for line in _lines("/proc/cpuinfo") if line.startswith("flags")]
    return name in info[0].split() if info else None


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _gpu_clocks() -> str | None:
    """Of the first GPU, in the words of its driver; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    query = "clocks.sm,clocks.mem,clocks.max.sm,pstate,persistence_mode,temperature.gpu"
    call = ("nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader")
    try:
        return f"{query}: {subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return "nvidia-smi does not say"


def _first_line(path: str) -> str:
    return next(iter(_lines(path)), "")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
