"""CPU seconds of this process and of a side's own worker processes."""

import time
from contextlib import suppress
from pathlib import Path


def children() -> set[int]:
    """Processes that this one started and that still run."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


class Meter:
    """Counts CPU seconds of all threads of this process and of `workers`."""

    def __init__(self, workers: set[int]):
        self.workers = workers

    def seconds(self) -> float:
        return time.process_time() + self._of_workers()

    def settle(self) -> None:
        """Wait until the workers have prepared all that they may prepare ahead."""
        last = -1.0
        while self.workers and (now := self._of_workers()) > last + 1e-3:
            last = now
            time.sleep(0.1)

    def _of_workers(self) -> float:
        return sum(time.clock_gettime(_clock_of(pid)) for pid in self.workers)


def _clock_of(pid: int) -> int:
    """The clock of a process's CPU time, ended threads included, in ns: Linux's clock_getcpuclockid(3)."""
    return (~pid << 3) | 2
