"""A strict walk over a tar's headers.

`tarfile`, and with it webdataset, takes a damaged header for the end of the archive and goes on without a word
(webdataset/tariterators.py, `tarfile.open(mode="r|*")`), so a cut or damaged shard only looks shorter. Here it is an
error with its place.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from penstock.streams.sets.manifest import safe_name

BLOCK = 512
LARGEST = (1 << 32) - 1  # sizes are 32 bits in the index
RUNS_CODE = {"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"}  # readers unpickle these
KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.GNUTYPE_LONGLINK: "a GNU long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
# What tars say beside a member's name and content, without changing either.
HARMLESS = {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"}
HARMLESS_GROUPS = ("SCHILY.xattr.", "LIBARCHIVE.xattr.", "RHT.security.")
LONGEST_EXTENSION = 1 << 20  # bytes of an extended header
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
    """A plain file in a tar: name, and where its headers, payload and the next header begin.

    The name is empty for what readers pass over: directories and global headers.
    """

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
        member = member_at(data, position, last)
        if member.end > len(data):
            raise TarError(f"the tar ends inside {member.name}: it was cut short", len(data))
        if member.name:
            yield member
        position, last = member.end, member.name or last


def member_at(data: mmap | bytes, position: int, last: str) -> Member:
    """The member whose headers begin at `position`; `last` names what came before it.

    Names that do not fit a header come in an extended one before it (POSIX pax, or GNU's long name), and are honoured.
    """
    start, name, size = position, None, None
    info = _header(data, position, last)
    if info.type == tarfile.XGLTYPE:
        if _pax(_payload(data, position, info, last), position):
            raise TarError(f"a global pax header after {last} names or sizes files; {REMAKE}", position)
        return Member("", start, position + BLOCK + padded(info.size), 0)
    if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        payload = _payload(data, position, info, last)
        if info.type == tarfile.XHDTYPE:
            extended = _pax(payload, position)
            name, size = extended.get("path"), extended.get("size")
        else:
            name = _text(payload.rstrip(b"\0"), position)
        position += BLOCK + padded(info.size)
        info = _header(data, position, last)
    name = info.name if name is None else name
    if info.type == tarfile.DIRTYPE and info.size == 0:
        return Member("", start, position + BLOCK, 0)
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        kind = KINDS.get(info.type, f"a member of type {info.type!r}")
        raise TarError(f"{name} is {kind}, which is not read from shards; {REMAKE}", position)
    if size not in (None, str(info.size)):
        raise TarError(f"{name} has {info.size} bytes by its header and {size} by its pax header; {REMAKE}", position)
    if not safe_name(name):
        raise TarError(f"the name {name!r} leaves the folder; such a tar is not used", position)
    if not 0 <= info.size <= LARGEST:
        raise TarError(f"{name} has {info.size:,} bytes; a member can have 4 GB at most", position)
    if runs_code(name):
        raise TarError(f"{name} is a pickle, which can run code when it is read; make the tar without it", position)
    return Member(name, start, position + BLOCK, info.size)


def runs_code(name: str) -> bool:
    """Whether readers would unpickle a member of this name; webdataset unpacks `.gz` first."""
    name = name.lower()
    while name.endswith(".gz"):
        name = name.removesuffix(".gz")
    return name.rsplit(".", 1)[-1] in RUNS_CODE


def _header(data: mmap | bytes, position: int, last: str) -> tarfile.TarInfo:
    block = data[position : position + BLOCK]
    if len(block) < BLOCK:
        raise TarError(f"the tar ends after {last} within a header: it was cut short", len(data))
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarError(f"damaged header after {last} ({error})", position) from None


def _payload(data: mmap | bytes, position: int, info: tarfile.TarInfo, last: str) -> bytes:
    payload = data[position + BLOCK : position + BLOCK + max(info.size, 0)]
    if not 0 < info.size <= LONGEST_EXTENSION or len(payload) < info.size:
        raise TarError(f"damaged extended header after {last}, of {info.size} bytes", position)
    return payload


def _pax(payload: bytes, position: int) -> dict[str, str]:
    """What a pax header says of a member's name and size; other things it may say are refused unless harmless.

    Its records are "LENGTH KEY=VALUE\\n", the length counting all of the record (POSIX.1-2001, pax interchange format).
    """
    found: dict[str, str] = {}
    while payload:
        length, _, _ = payload.partition(b" ")
        record = payload[: int(length)] if length.isdigit() and len(length) < 8 else b""
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != int(length):
            raise TarError("damaged pax header", position)
        payload, word = payload[len(record) :], _text(key, position)
        if word in ("path", "size"):
            found[word] = _text(value, position)
        elif word not in HARMLESS and not word.startswith(HARMLESS_GROUPS):
            raise TarError(f"a pax header says {word!r}, which is not read from shards; {REMAKE}", position)
    return found


def _text(name: bytes, position: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise TarError(f"the name {name!r} is not UTF-8; {REMAKE}", position) from None
