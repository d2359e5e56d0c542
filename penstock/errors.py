"""Errors meant for people, and the exit codes they become."""

import difflib
from collections.abc import Iterable

DONE, INPUT_WRONG, STOPPED = 0, 2, 75  # 75 is EX_TEMPFAIL: try again later, nothing is lost

EXIT_FILE = "PENSTOCK_EXIT_FILE"  # names a file that rank 0 writes its exit code to, for the launcher


class InputError(Exception):
    """The user's input (recipe, data, checkpoint, cluster) is wrong.

    The message says what is wrong, where, and what to do instead. Programs print it without a traceback and exit 2.
    """

    def __str__(self) -> str:
        """The message alone, where a data loader's worker has put its traceback before it."""
        said = super().__str__()
        in_worker = said.startswith("Caught InputError in DataLoader worker")
        return said.rpartition(f"{__name__}.InputError: ")[2].rstrip() if in_worker else said


class RunFailed(Exception):
    """Training cannot go on (it diverged, say). The message says why and what to try; programs exit 3."""

    code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known word is close, else the known words when they are few, else nothing."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of: {', '.join(known)}" if 0 < len(known) <= 12 else ""
