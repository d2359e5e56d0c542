"""Being asked to stop. A handler only remembers; the ranks agree at the end of a step, save, and leave."""

import signal
import time
from pathlib import Path
from types import FrameType

LOOK_EVERY = 1.0  # seconds between looks for the stop file


class Stop:
    """Set by SIGTERM, SIGUSR1, SIGINT (a second one ends the process at once), or a file `stop` in the run folder."""

    def __init__(self, folder: Path):
        self.reason: str | None = None
        self._file, self._looked = folder / "stop", 0.0

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
        return self.reason is not None

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.reason = signal.Signals(number).name
