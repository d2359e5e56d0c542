"""What every benchmark prints around its numbers: the command, the machine, and a table."""

import sys
from collections.abc import Sequence

from penstock.machine import facts, load


def print_facts() -> None:
    """The command line and what the numbers depend on. Figures taken under load are not to be quoted."""
    spec: str = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    print("command ", "python -m", spec, *sys.argv[1:])
    for name, text in facts().items():
        print(f"{name:8}", text)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    print(f"load at the end {load()}", flush=True)
