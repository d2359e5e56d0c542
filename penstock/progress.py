"""Progress for people: a bar in a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Meter:
    """`advance()` and `note()` are cheap enough to call for every item."""

    def __init__(self, label: str, total: int, start: int, bar: Progress | None):
        self.label, self.total, self.count, self.note_text = label, total, start, ""
        self._start, self._began, self._said, self._bar = start, time.monotonic(), time.monotonic(), bar
        self._task: Any = bar.add_task(label, total=total, completed=start, note="") if bar else None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.count += count
        self.note_text = self.note_text if note is None else note
        if self._bar:
            self._bar.update(self._task, completed=self.count, note=self.note_text)
        elif time.monotonic() - self._said >= PLAIN_LINE_EVERY:
            self.say()

    def note(self, text: str) -> None:
        """Words shown behind the count from now on."""
        self.note_text = text

    def say(self) -> None:
        self._said = time.monotonic()
        rate = (self.count - self._start) / max(self._said - self._began, 1e-9)
        left = (self.total - self.count) / rate if rate > 0 else float("inf")
        remaining = f", {left:.0f} s left" if 0 < left < float("inf") else ""
        print(f"{self.label} {self.count}/{self.total} {self.note_text}{remaining}", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, start: int = 0, show: bool = True) -> Iterator[Meter]:
    """A meter over `total` items; silent when `show` is false (ranks other than 0)."""
    console = Console(stderr=True)
    if not show:
        meter = Meter(label, total, start, None)
        meter.say = lambda: None  # type: ignore[method-assign]
        yield meter
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, refresh_per_second=4) as bar:
            yield Meter(label, total, start, bar)
    else:
        meter = Meter(label, total, start, None)
        yield meter
        meter.say()
