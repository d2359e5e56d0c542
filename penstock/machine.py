"""What figures of time depend on: the machine, and what else it was doing."""

import os
import platform
from pathlib import Path


def facts() -> dict[str, str]:
    """The machine in words: cores, processor, torch, GPU where there is one, and the load at this moment."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "machine": f"{cores} cores, {processor()}, {platform.system()}",
        "torch": f"{torch.__version__} with {torch.backends.cpu.get_cpu_capability()}; {_bf16()}",
    }
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found | {"load": load()}


def processor() -> str:
    """The processor's name."""
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def load() -> str:
    """Processes that ran or waited, over the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def _bf16() -> str:
    flags = set(_cpuinfo().split())
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return f"bf16 on this CPU: {', '.join(found) or 'emulated'}"


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.is_file() else ""
