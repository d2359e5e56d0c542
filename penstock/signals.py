"""Being asked to stop. A handler only remembers; the ranks agree at the end of a step, save, and leave."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

LOOK_EVERY = 1.0  # seconds between looks for the stop file
STOP_FILE = "PENSTOCK_STOP_FILE"  # names another such file, by which a launcher stops this start of the run


class Stop:
    """Set by SIGTERM, SIGUSR1, SIGINT (a second one ends the process at once), or a file `stop` in the run folder."""

    def __init__(self, folder: Path):
        self.reason: str | None = None
        self._file, self._looked = folder / "stop", 0.0
        self._launchers = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._heard)

    def asked(self) -> bool:
        now = time.monotonic()
        if self.reason is None and now - self._looked >= LOOK_EVERY:
            self._looked = now
            if self._file.exists():
                self._file.unlink(missing_ok=True)
                self.reason = "the stop file"
            elif self._launchers and self._launchers.exists():  # it stays: every rank of this start may look
                self.reason = "the launcher's stop file"
        return self.reason is not None

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.reason = signal.Signals(number).name
