"""The process that mirrors one run: `python -m penstock.tracking FOLDER`, started by the run itself."""

import sys
from pathlib import Path

from penstock.tracking.process import follow

follow(Path(sys.argv[1]))
