"""Where a set's files lie: a folder, or an address of an object store (see `penstock.streams.sets.remote`).

Only names inside a set's place are ever asked for. Imports neither torch nor a client library, so checks stay quick.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BeforeValidator

from penstock.errors import InputError, nearest
from penstock.streams.sets.atomic import replacing
from penstock.streams.sets.remote.address import FORMS, SCHEMES, place, redacted

T = TypeVar("T")


class Fault(Exception):
    """A sample cannot be read; the message is the reason, and `kind` a word to count it under."""

    def __init__(self, reason: str, kind: str = "unreachable"):
        super().__init__(reason)
        self.kind = kind


class File(Protocol):
    """One file of a set, open for reading at any place."""

    def read(self, offset: int, size: int, around: tuple[int, int] | None = None) -> bytes:
        """`size` bytes from `offset` on; fewer only where the file ends. Raises OSError or Fault.

        Args:
            around: begin and end of the run of bytes that is best fetched together; of no meaning for local files.
        """

    def request(self, offset: int, size: int, around: tuple[int, int] | None) -> dict[str, Any] | None:
        """What `Storage.ahead` is to fetch before such a read; None where it need not wait."""

    def drop(self, offset: int, size: int, around: tuple[int, int] | None) -> bool:
        """Forget a copy whose bytes turned out wrong. False where there is none, or it came so again."""

    def close(self) -> None: ...


class Storage(Protocol):
    """The files of one set, by names relative to it."""

    counters: dict[str, float]  # running counts of this process (names in penstock.streams.timing)
    shards_looked_at: int  # of how many shards to ask for the files before a run
    fetches: bool  # whether reading waits for a network, and is told beforehand what will be read

    @property
    def key(self) -> str:
        """Equal for storages that read the same files in the same way."""

    @property
    def lists(self) -> bool:
        """Whether `names` can be asked for."""

    @property
    def shown(self) -> Path | str:
        """The set's place, as people are shown it: never with credentials. A Path where it is a folder."""

    def expect(self, total: int) -> None:
        """The bytes of all shards together, known from the manifest."""

    def open(self, name: str, size: int, sha256: str) -> File:
        """A file whose size and checksum the manifest gives. Raises OSError or InputError when it is not there."""

    def local(self, name: str, sha256: str, use: Callable[[Path], T]) -> T:
        """What `use` makes of a file on this machine with the whole content, which may be a copy that leaves at any
        time; then it is called again. Raises OSError, Fault or InputError, and what `use` raises."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises OSError or Fault."""

    def content(self, name: str) -> bytes:
        """A small file, whole. Raises FileNotFoundError, OSError or InputError."""

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        """Sizes in bytes; None for files that are not there."""

    def names(self) -> list[str]:
        """The files directly in the set's place, sorted, without drafts."""

    def copies(self, names: Iterable[str]) -> AbstractContextManager[Path]:
        """A folder that holds these files, as they are where the set lies; those that are not there are missing."""

    def write(self, name: str, content: bytes | Path) -> None:
        """Put a file there, whole or not at all; from memory, or from a local file."""

    def create(self, name: str, content: bytes) -> bool:
        """Put a small file there unless there is one; False where there is. Of use where no folder can be claimed."""

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""

    def ahead(self, requests: list[dict[str, Any]]) -> None:
        """Begin to fetch what files asked for (`File.request`)."""

    def whole_request(self, name: str, sha256: str) -> dict[str, Any]:
        """What `ahead` is to fetch before `local`."""


# Addresses -------------------------------------------------------------------------------------


def is_remote(address: str | Path) -> bool:
    """Whether an address names an object store. Raises InputError for a scheme that is not known."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", address) if isinstance(address, str) else None
    if match is None or Path(str(address)).exists():
        return False
    if match[1] not in SCHEMES or not address[match.end() :].startswith("//"):  # type: ignore[index]
        raise InputError(
            f"{redacted(str(address))} is neither a folder nor an address that can be read"
            f"{nearest(match[1], SCHEMES)}. Write a folder, or {FORMS}"
        )
    return True


def _checked(value: Any) -> Any:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        try:
            if is_remote(value):
                place(value)
        except InputError as error:
            raise ValueError(str(error)) from None
    return value


Address = Annotated[str, BeforeValidator(_checked)]  # of a set, in a recipe: a folder, or an address


def open_storage(address: str | Path, remote: Any = None) -> Storage:
    """The files at an address.

    Args:
        remote: how to read an object store (penstock.streams.sets.remote.options.Remote); None takes the defaults.
    """
    if not is_remote(address):
        return LocalStorage(Path(address))
    from penstock.streams.sets.remote.client import RemoteStorage

    return RemoteStorage(str(address), remote)


# Folders ---------------------------------------------------------------------------------------


class LocalStorage:
    """Files in a folder. `os.pread` has no file position, so forked workers cannot disturb each other."""

    shards_looked_at = 10_000
    fetches = False
    lists = True

    def __init__(self, folder: Path):
        self.folder, self.key = folder, str(folder)
        self.counters: dict[str, float] = {}

    def expect(self, total: int) -> None:
        pass

    @property
    def shown(self) -> Path:
        return self.folder

    def open(self, name: str, size: int, sha256: str) -> "LocalFile":
        return LocalFile(os.open(self.folder / name, os.O_RDONLY))

    def local(self, name: str, sha256: str, use: Callable[[Path], T]) -> T:
        return use(self.folder / name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        file = self.open(name, 0, "")
        try:
            return exactly(file.read(offset, size), size)
        finally:
            file.close()

    def content(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        return [_size(self.folder / name) for name in names]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))

    def copies(self, names: Iterable[str]) -> AbstractContextManager[Path]:
        return nullcontext(self.folder)

    def write(self, name: str, content: bytes | Path) -> None:
        with replacing(self.folder / name) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file)

    def create(self, name: str, content: bytes) -> bool:
        if (self.folder / name).exists():
            return False
        self.write(name, content)
        return True

    def ahead(self, requests: list[dict[str, Any]]) -> None:
        pass

    def whole_request(self, name: str, sha256: str) -> dict[str, Any]:
        return {}

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class LocalFile:
    """A file of this machine."""

    def __init__(self, handle: int):
        self._handle = handle

    def read(self, offset: int, size: int, around: tuple[int, int] | None = None) -> bytes:
        return os.pread(self._handle, size, offset)

    def request(self, offset: int, size: int, around: tuple[int, int] | None) -> None:
        return None

    def drop(self, offset: int, size: int, around: tuple[int, int] | None) -> bool:
        return False

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def exactly(data: bytes, size: int) -> bytes:
    """The data, if it is as long as asked for. Raises Fault."""
    if len(data) != size:
        raise Fault(f"the file ends early: {len(data)} of {size} bytes", "short")
    return data


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
