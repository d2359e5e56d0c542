"""torchrun, ending with the ranks' own exit code and without a traceback when they ended as they meant to.

torchrun by itself turns every exit code but 0 into 1.
"""

import logging
import os
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from penstock.errors import EXIT_FILE, INPUT_WRONG, STOPPED, RunFailed


def main() -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (INPUT_WRONG, STOPPED, RunFailed.code):
            return failure.exitcode
        print(f"rank {rank} ended with {failure.exitcode}; its own words are above", file=sys.stderr)
        return 1
    except SignalException as stopped:
        # torchrun passed the signal on and waited for the ranks, but does not tell how they ended.
        written = Path(os.environ.get(EXIT_FILE, ""))
        return int(written.read_text(encoding="utf-8")) if written.is_file() else 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
