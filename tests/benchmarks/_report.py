"""What every benchmark prints around its numbers: the command, the machine, and a table."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path


def print_facts() -> None:
    """The command line and what the numbers depend on. Figures taken under load are not to be quoted."""
    import torch

    spec: str = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    print("command ", "python -m", spec, *sys.argv[1:])
    print("machine ", f"{len(os.sched_getaffinity(0))} cores, {_processor()}, {platform.system()}; load", _load())
    print("torch   ", torch.__version__, "with", torch.backends.cpu.get_cpu_capability(), f"; {_bf16()}")
    if torch.cuda.is_available():
        print("GPU     ", torch.cuda.get_device_name())


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    print(f"load at the end {_load()}", flush=True)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _bf16() -> str:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return f"bf16 on this CPU: {', '.join(found) or 'emulated'}"


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())
