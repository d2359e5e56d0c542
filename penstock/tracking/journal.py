"""A run's journal: one JSON line for each thing that happened, appended at once, never changed. It is the truth about
the run; MLflow is its mirror.

Every line has `time` (ms since 1970) and one of these:

    attempt   a process began or resumed the run: id, number, name, experiment, uri, params, tags, changed
    step, metrics    numbers by name; those that are not finite are the strings "nan", "inf", "-inf"
    step, event, data    something worth knowing: a skipped step, a checkpoint, a stop
    step, picture    a file in the run folder
    artifact | tag | dataset | status
"""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import InputError

NAME = "journal.jsonl"
PARENT = "parent"  # the tag that holds the id of the run that a run is shown under
NONFINITE = "health/nonfinite"  # how many values of the run were not finite so far
OTHERS_WAIT = 10.0  # seconds for a process that was killed to be gone


class Lock:
    """An advisory lock on a file, free again the moment its process ends, however it ends.

    POSIX record locks, because forked data workers must not inherit them; within one process they never conflict.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None

    def take(self, wait: float = 0.0) -> bool:
        """Whether the lock was had within `wait` seconds. A file system without locks gives it to everyone."""
        self._file = self._file or self.path.open("a")
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= until:
                    return False
                time.sleep(0.1)
            except OSError:
                return True
            else:
                return True

    def release(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


class Journal:
    """The writer. One process at a time may hold a run's journal.

    A resumed run repeats the steps since its last checkpoint; what they log was journaled the first time, so a metric
    is kept only for steps after the last one it has.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self.lock = live_lock(folder)
        if not self.lock.take(wait=OTHERS_WAIT):
            raise InputError(f"{folder}: another process is writing this run; wait for it, or choose another folder")
        cut_torn_line(self.path)
        self.attempts: list[dict[str, Any]] = []
        self._steps: dict[str, int] = {}
        self._nonfinite = 0
        for line in read_lines(self.path):
            if "attempt" in line:
                self.attempts.append(line["attempt"])
            for name in line.get("metrics", ()):
                self._steps[name] = line["step"]
            if "picture" in line:
                self._steps[line["picture"]] = line["step"]
            self._nonfinite = int(line.get("metrics", {}).get(NONFINITE, self._nonfinite))
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._unwritten = b""
        self._warned = False

    def write(self, **line: Any) -> None:
        """Append one line. Where the disk is full the bytes wait in memory and the next call tries them again."""
        entry = {"time": time.time_ns() // 1_000_000, **line}
        self._unwritten += json.dumps(entry, allow_nan=False, separators=(",", ":"), default=str).encode() + b"\n"
        try:
            self._write_all()
        except OSError as error:
            if not self._warned:
                print(f"{self.path}: {error}; its lines wait in memory", file=sys.stderr, flush=True)
            self._warned = True

    def _write_all(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        fresh = {name: float(value) for name, value in metrics.items() if self.is_new(name, step)}
        bad = sum(not math.isfinite(value) for value in fresh.values())
        if bad:
            self._nonfinite += bad
            fresh[NONFINITE] = float(self._nonfinite)
        if fresh:
            self._steps.update(dict.fromkeys(fresh, step))
            self.write(step=step, metrics=strict(fresh))

    def picture(self, step: int, path: str) -> None:
        self._steps[path] = step
        self.write(step=step, picture=path)

    def is_new(self, name: str, step: int) -> bool:
        return step > self._steps.get(name, -1)

    def flush(self) -> None:
        """Onto the disk itself: called before a checkpoint counts as complete. Raises OSError where that fails."""
        self._write_all()
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
        self.lock.release()


def strict(value: Any) -> Any:
    """The same with numbers that are not finite as strings, since JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def live_lock(folder: Path) -> Lock:
    """Held by the process that writes the run's journal."""
    return Lock(folder / ".journal.lock")


def cut_torn_line(path: Path) -> None:
    """Drop an unfinished last line, left by a crash in the middle of a write."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def read_lines(path: Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The complete lines from byte `offset` on."""
    yield from (line for line, _ in read_from(path, offset))


def read_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete lines from byte `offset` on, each with the offset just after it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise InputError(
                    f"{path}: the line at byte {offset} is damaged ({error}); restore the file from a copy, "
                    f"or delete that line"
                ) from None
            offset += len(raw)
            yield line, offset


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """A nested recipe as dotted keys and strings: `optim.betas` is '[0.9, 0.95]', lists of blocks are numbered."""
    if isinstance(values, Mapping):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, (list, tuple)) and any(isinstance(value, Mapping) for value in values):
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        text = json.dumps(values, default=str) if isinstance(values, (list, tuple)) else str(values)
        return {prefix: text} if prefix else {}
    if prefix and not items:
        return {prefix: "{}"}
    flat: dict[str, str] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


@dataclass
class Run:
    """What a run did, wherever it was read from."""

    name: str
    source: str  # a folder, or an MLflow run id
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # metric: (step, value), in step order

    def last(self, metric: str) -> float | None:
        points = self.series.get(metric)
        return points[-1][1] if points else None

    @property
    def steps(self) -> int:
        return max((points[-1][0] for points in self.series.values() if points), default=0)


def read_run(folder: Path) -> Run:
    """A run from its folder alone: the journal, and the resolved recipe of its newest attempt."""
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"{folder} is not a run: it holds no {NAME}")
    run = Run(folder.name, str(folder))
    previous = None
    for line in read_lines(path):
        if "attempt" in line:
            attempt = line["attempt"]
            run.name, run.params, run.status = attempt["name"], attempt["params"], "RUNNING"
            run.tags |= attempt["tags"]
        elif previous is not None:  # the time between two attempts is nobody's
            run.seconds += (line["time"] - previous) / 1000
        previous = line["time"]
        run.tags |= line.get("tag", {})
        run.status = line.get("status", run.status)
        for name, value in line.get("metrics", {}).items():
            run.series.setdefault(name, []).append((line["step"], float(value)))
    if run.status == "RUNNING" and not is_live(folder):
        run.status = "FAILED"
    return run


def is_live(folder: Path) -> bool:
    """Whether another process is writing the run now."""
    lock = live_lock(folder)
    try:
        return not lock.take()
    except OSError:  # a read-only folder: nobody here can tell
        return False
    finally:
        lock.release()
