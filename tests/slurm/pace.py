"""A stage of a stream that makes training as slow as a test wants it: seconds per sample, from the file in PACE."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def pace(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        time.sleep(float(Path(os.environ["PACE"]).read_text() or 0))
        yield sample
