"""A strict walk over a tar's headers.

`tarfile`, and with it webdataset, takes a damaged header for the end of the archive and goes on without a word
(webdataset/tariterators.py, `tarfile.open(mode="r|*")`), so a cut or damaged shard only looks shorter. Here it is an
error with its place.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from penstock.streams.manifest import safe_name

BLOCK = 512
LARGEST = (1 << 32) - 1  # sizes are 32 bits in the index
RUNS_CODE = {"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"}  # readers unpickle these
KINDS = {
    tarfile.DIRTYPE: "a directory",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.XHDTYPE: "a pax header",
    tarfile.XGLTYPE: "a global pax header",
    tarfile.GNUTYPE_LONGNAME: "a GNU long name",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
REMAKE = (
    "make the tar of plain files with `tar --format=ustar` (in Python, tarfile.USTAR_FORMAT), or unpack it and use "
    "`penstock shards pack`"
)


class TarError(Exception):
    """What is wrong with a tar; `offset` is the byte where it shows."""

    def __init__(self, message: str, offset: int):
        super().__init__(message)
        self.message, self.offset = message, offset

    def __reduce__(self) -> tuple:
        return TarError, (self.message, self.offset)


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in a tar: name, and where header, payload and the next header begin."""

    name: str
    header: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + padded(self.size)


def padded(size: int) -> int:
    """Bytes a payload takes in the archive."""
    return -(-size // BLOCK) * BLOCK


def members(data: mmap | bytes) -> Iterator[Member]:
    """The files of an archive, in order. Raises TarError at anything but plain files and a proper end."""
    position, last = 0, "the start"
    while True:
        header = data[position : position + BLOCK]
        if len(header) < BLOCK:
            raise TarError(f"the tar ends after {last} without its end mark: it was cut short", position)
        if not header.strip(b"\0"):
            if len(data) - position < 2 * BLOCK:
                raise TarError(f"the tar ends after {last} within its end mark: it was cut short", position)
            if data[position:].strip(b"\0"):
                raise TarError(f"after {last} the tar's end mark is followed by more data, unseen by readers", position)
            return
        member = parse(header, position, last)
        if member.end > len(data):
            raise TarError(f"the tar ends inside {member.name}: it was cut short", len(data))
        yield member
        position, last = member.end, member.name


def parse(header: bytes, position: int, last: str) -> Member:
    """The member whose 512-byte header is at `position`; `last` names what came before it."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarError(f"damaged header after {last} ({error})", position) from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = KINDS.get(info.type, f"a member of type {info.type!r}")
        raise TarError(f"{info.name} is {kind}, which is not read from shards; {REMAKE}", position)
    if not safe_name(info.name):
        raise TarError(f"the name {info.name!r} leaves the folder; such a tar is not used", position)
    if not 0 <= info.size <= LARGEST:
        raise TarError(f"{info.name} has {info.size:,} bytes; a member can have 4 GB at most", position)
    if info.name.lower().rsplit(".", 1)[-1] in RUNS_CODE:
        raise TarError(
            f"{info.name} is a pickle, which can run code when it is read; make the tar without it", position
        )
    return Member(info.name, position, position + BLOCK, info.size)
