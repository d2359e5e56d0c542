"""A folder that one command writes to."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.errors import InputError

LOCK = ".write-lock"


@contextmanager
def claimed(dest: Path) -> Iterator[None]:
    """`dest`, made if need be, for this process alone, rid of an earlier run's drafts."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
        lock = (dest / LOCK).open("wb")
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror}; give another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.path.samestat(os.fstat(lock.fileno()), (dest / LOCK).stat())
        except (BlockingIOError, FileNotFoundError):
            alone = False
        except OSError:
            alone = True  # a file system without locks, where a second command goes unnoticed
        if not alone:
            raise InputError(f"another process is writing into {dest}; wait for it, or give another folder")
        for draft in dest.glob(".*.tmp-*"):
            draft.unlink(missing_ok=True)
        try:
            yield
        finally:
            (dest / LOCK).unlink(missing_ok=True)


@contextmanager
def full_disk_said(dest: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"the disk of {dest} is full; free some space and run the same command again, it goes on where it was"
        ) from None
