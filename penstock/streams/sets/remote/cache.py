"""Files that were fetched, on a local disk: shared by all processes of a machine, the longest unused leave first.

A file's name is the hash of its full address, its version and its range. It appears whole or not at all, under a lock
that lets one process fetch it while others wait. A reader needs no lock: what is removed stays readable to whoever has
it open.
"""

import errno
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from penstock.errors import InputError

AFTER_EVICTION = 0.9  # share of the limit that is left in use, so that not every file needs a look at all
FULL = (errno.ENOSPC, errno.EDQUOT)


def key_of(address: str, name: str, version: str, begin: int, end: int | None) -> str:
    """Name of a cached range of an object; without an end, of the whole."""
    return hashlib.sha256(f"{address}\0{name}\0{version}\0{begin}\0{end}".encode()).hexdigest()


def path_of(folder: Path, key: str) -> Path:
    return folder / key[:2] / key


class Cache:
    """Fetches what is not there, and keeps it within a limit of bytes."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
            with self._locked():
                pass
        except OSError as error:
            raise InputError(
                f"the cache {folder} cannot be written and locked: {error.strerror}; name a folder on a local disk as "
                "data.remote.cache_dir or $PENSTOCK_CACHE"
            ) from None

    def have(self, key: str, size: int | None) -> Path | None:
        """A cached file, if it is there and whole."""
        path = path_of(self.folder, key)
        try:
            found = path.stat().st_size
        except OSError:
            return None
        if size is not None and found != size:
            path.unlink(missing_ok=True)
            return None
        return path

    def get(self, key: str, size: int | None, fetch: Callable[[BinaryIO], None]) -> Path | None:
        """The file of a key, made by `fetch(file)` if need be; None where there is no room for it."""
        path = path_of(self.folder, key)
        try:
            path.parent.mkdir(exist_ok=True)
            with self._drafted(path) as file:
                if self.have(key, size) is not None:
                    return path
                return path if self._fetched(path, file, size, fetch) else None
        except OSError as error:
            if error.errno not in (*FULL, errno.EACCES, errno.EROFS):
                raise
            self._warn(f"cannot be written ({error.strerror})")
            return None

    def _fetched(self, path: Path, file: BinaryIO, size: int | None, fetch: Callable[[BinaryIO], None]) -> bool:
        counted = size or 0
        if not self._has_room(counted):
            return False
        try:
            if counted:
                self._allocate(file, counted)
            fetch(file)
            file.flush()
            os.fsync(file.fileno())
            found = os.fstat(file.fileno()).st_size  # once it has its name, it may leave at any time
            if self._has_room(found - counted, written=found - counted):
                counted = found
                draft = path.with_name(f"{path.name}.part")
                if _is_at(file, draft):
                    draft.replace(path)
                    return True
        except BaseException:
            self._reserve(-counted)
            raise
        self._reserve(-counted)
        return False

    def _has_room(self, size: int, written: int = 0) -> bool:
        """`_reserve`, and a warning where there is none."""
        if self._reserve(size, written):
            return True
        self._warn(f"has no room for {size / 1e6:,.0f} MB within its {self.limit / 1e6:,.0f} MB")
        return False

    def _allocate(self, file: BinaryIO, size: int) -> None:
        """Take the room on the disk before anything is fetched."""
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._evict(size)
            os.posix_fallocate(file.fileno(), 0, size)

    @contextmanager
    def _drafted(self, path: Path) -> Iterator[BinaryIO]:
        """The file that becomes `path`, for one process at a time; gone afterwards, unless it was renamed."""
        draft = path.with_name(f"{path.name}.part")
        while True:
            file = open(os.open(draft, os.O_RDWR | os.O_CREAT, 0o666), "w+b")  # noqa: SIM115, PTH123 - not truncated
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, draft):
                break
            file.close()  # another process was faster, and has renamed it
        with file:
            file.truncate(0)  # what a process left that was killed
            try:
                yield file
            finally:
                if _is_at(file, draft):
                    draft.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, size: int, written: int = 0) -> bool:
        """Count bytes as used, if there is room for them; `written` of them are on the disk already."""
        if size > self.limit:
            return False
        with self._locked():
            used = self._used()
            if size > 0 and used + size > self.limit:
                used = self._emptied(size - written) - written
                if used + size > self.limit:
                    return False
            self._note(max(0, used + size))
        return True

    def _evict(self, room: int) -> None:
        with self._locked():
            self._note(self._emptied(room, limit=self._used()))

    def _emptied(self, room: int, limit: int | None = None) -> int:
        """Remove what was not used for longest, until there is room; returns the bytes that are left."""
        files = sorted(self._files(), key=lambda found: found[0])
        used, most = sum(size for _, size, _ in files), int((limit or self.limit) * AFTER_EVICTION) - room
        for _, size, path in files:
            if used <= max(most, 0):
                break
            if _removed(path):
                used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for folder in self.folder.iterdir():
            if folder.is_dir():
                for path in folder.iterdir():
                    try:
                        found = path.stat()
                    except FileNotFoundError:
                        continue
                    yield found.st_mtime, found.st_size, path

    def _used(self) -> int:
        try:
            return int((self.folder / "used").read_text())
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._files())

    def _note(self, used: int) -> None:
        (self.folder / "used").write_text(str(used))

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"warning: the cache {self.folder} {what}; images are read one by one over the network, which is slow. "
                "Free some space, or set data.remote.cache_dir and cache_bytes",
                file=sys.stderr,
                flush=True,
            )


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _removed(path: Path) -> bool:
    """Remove a file, but not a draft that a process is writing."""
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return True
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
