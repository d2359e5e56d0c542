"""Where the runs of a series go: one at a time to this machine, or whatever else can run one to its end."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from penstock.errors import STOPPED


class Launcher(Protocol):
    def run(self, stage: str, arguments: Sequence[str], log: Path) -> int:
        """Run a stage with a recipe and overrides to its end, its words appended to `log`; its exit code."""

    def stop(self) -> None:
        """Ask the run that goes on, and any that comes, to stop resumably."""


class Local:
    """`python -m launch local` as a child."""

    def __init__(self, procs: int | None = None, threads: int | None = None):
        given = {"--procs": procs, "--threads": threads}
        self.options = [word for option, value in given.items() if value for word in (option, str(value))]
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self, stage: str, arguments: Sequence[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "launch", "local", *self.options, stage, *arguments]
        with log.open("ab") as words:
            # A group of its own: Ctrl-C reaches this process, which asks the run to stop once.
            self._child = subprocess.Popen(command, stdout=words, stderr=words, start_new_session=True)
            if self._stopping:
                self.stop()
            code = self._child.wait()
        self._child = None
        return STOPPED if self._stopping and code else code

    def stop(self) -> None:
        self._stopping = True
        if self._child and self._child.poll() is None:
            os.kill(self._child.pid, signal.SIGTERM)
