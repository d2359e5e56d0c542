"""A set in an object store, as readers see it: a `Storage` whose bytes come from the fetcher and its cache."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from penstock.errors import InputError
from penstock.streams.sets.manifest import safe_name
from penstock.streams.sets.remote.address import place, redacted
from penstock.streams.sets.remote.cache import key_of, path_of
from penstock.streams.sets.remote.link import Link
from penstock.streams.sets.remote.options import Remote
from penstock.streams.sets.storage import Fault, exactly
from penstock.streams.timing import CACHE_HITS, CACHE_MISSES, FETCHED, RETRIES

TOUCHED = 10.0  # seconds that a file in the cache counts as used just now
ANEW = 60.0  # seconds without a look at a unit after which the next one counts anew
TRIES = 3  # times that a file may leave the cache between its arrival and its use
SAMPLES = ("whole", "block", "range")  # what is asked for samples, of which some may be lost
FAULTS = {"Missing": "missing", "Changed": "changed", "Failed": "unreachable"}
T = TypeVar("T")


class RemoteStorage:
    """The files below an address. It may be forked and pickled: every process opens connections of its own."""

    shards_looked_at = 100  # with two requests each
    fetches = True
    _whole: ClassVar[dict[Path, dict[str, int]]] = {}  # bytes of this process's sets of whole shards, by cache

    def __init__(self, address: str, remote: Remote | None = None):
        self.place = place(address)
        self.address, self.remote = address.rstrip("/"), remote or Remote()
        self.key = f"{self.address} {self.remote.model_dump_json()}"
        self.counters: dict[str, float] = dict.fromkeys((RETRIES, FETCHED, CACHE_HITS, CACHE_MISSES), 0.0)
        self._uncounted = dict(self.counters)  # since the last read, to which it is counted
        self.folder = self.remote.folder
        self.whole = self.remote.mode != "ranges"
        self._link = Link.to(self.remote)

    @property
    def shown(self) -> str:
        return redacted(self.address)

    @property
    def lists(self) -> bool:
        return self.place.kind != "https"

    def expect(self, total: int) -> None:
        """Choose what is fetched at once, for a set of so many bytes."""
        if self.remote.mode == "auto":
            chosen = self._whole.setdefault(self.folder, {})
            chosen.pop(self.address, None)
            self.whole = total + sum(chosen.values()) <= self.remote.settings()["bytes"]
            if self.whole:
                chosen[self.address] = total

    def open(self, name: str, size: int, sha256: str) -> "RemoteFile":
        return RemoteFile(self, name, size, sha256)

    def local(self, name: str, sha256: str, use: Callable[[Path], T]) -> T:
        path = path_of(self.folder, key_of(self.address, name, sha256, 0, None))
        for _ in range(TRIES):
            cached = path.is_file()
            if not cached:
                self._arrive(name, sha256)
            try:
                with contextlib.suppress(OSError):  # another user's file
                    os.utime(path)
                return use(path)
            except (FileNotFoundError, EOFError, ValueError, InputError):
                if path.is_file() and not cached:
                    raise
                path.unlink(missing_ok=True)  # it left meanwhile, or is damaged
        raise InputError(
            f"{self.shown}/{name} leaves the cache {self.folder} before it can be used; set a larger "
            "data.remote.cache_bytes"
        )

    def _arrive(self, name: str, sha256: str) -> None:
        """Have the cache fetch a whole file."""
        found = self.ask("whole", name=name, size=None, sha256=sha256)[0]["path"]
        if found is None:
            raise InputError(
                f"{self.shown}/{name}: the cache {self.folder} has no room for it; set data.remote.cache_dir"
            )

    def read(self, name: str, offset: int, size: int) -> bytes:
        known = self.sizes([name])[0]
        if known is None:
            raise FileNotFoundError(f"there is no {name}")
        try:
            return self.range(name, offset, offset + size, known)
        except _NoRanges:
            return exactly(self.content(name)[offset : offset + size], size)

    def range(self, name: str, begin: int, end: int, size: int) -> bytes:
        """Bytes [begin, end) of an object of `size` bytes, past the cache."""
        data = self.ask("range", name=name, begin=begin, end=end, size=size)[1]
        assert data is not None
        return data

    def content(self, name: str) -> bytes:
        data = self.ask("content", name=name)[1]
        assert data is not None
        return data

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        return self.ask("sizes", names=list(names))[0]["sizes"]

    def names(self) -> list[str]:
        return [name for name in self.ask("names")[0]["names"] if not name.startswith(".")]

    @contextmanager
    def copies(self, names: Iterable[str]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="penstock-copies-") as folder:
            for name in names:
                if not safe_name(name):
                    raise InputError(f"{self.shown}: {name!r} lies outside the set; it is not fetched")
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    self.ask("copy", name=name, path=str(path))
            yield Path(folder)

    def write(self, name: str, content: bytes | Path) -> None:
        if isinstance(content, bytes):
            self.ask("put", payload=content, name=name)
        else:
            self.ask("put", name=name, path=str(content.absolute()))

    def create(self, name: str, content: bytes) -> bool:
        return self.ask("create", payload=content, name=name)[0]["created"]

    def remove(self, name: str) -> None:
        self.ask("remove", name=name)

    def ahead(self, requests: list[dict[str, Any]]) -> None:
        """Begin to fetch what will be asked for."""
        if requests:
            wanted = [each | {"address": self.address} for each in requests]
            self.count(self._link.ask({"do": "ahead", "requests": wanted})[0]["counts"])

    def count(self, counts: Mapping[str, float]) -> None:
        """Note what happened, for the next read."""
        for name, count in counts.items():
            self._uncounted[name] += count

    def close_counts(self) -> None:
        for name, count in self._uncounted.items():
            self.counters[name] += count
            self._uncounted[name] -= count

    def whole_request(self, name: str, sha256: str) -> dict[str, Any]:
        return {"do": "whole", "name": name, "size": None, "sha256": sha256}

    def ask(self, do: str, payload: bytes | None = None, **values: Any) -> tuple[dict[str, Any], bytes | None]:
        """An answer of the fetcher.

        Raises:
            FileNotFoundError: there is no such object.
            Fault: an object cannot be had, or is another one.
            InputError: the store cannot be used.
        """
        answer, data = self._link.ask({"do": do, "address": self.address, **values}, payload)
        self.count(answer["counts"])
        error = answer.get("error")
        if error == "Missing" and do in ("content", "whole", "copy"):
            raise FileNotFoundError(answer["message"])
        if error == "NoRanges" and do in ("block", "range"):
            self.whole = True
            raise _NoRanges
        if error in FAULTS and do in SAMPLES:
            raise Fault(answer["message"], FAULTS[error])
        if error in FAULTS:
            raise InputError(f"{self.shown}: {answer['message']}; run the same command again")
        if error:
            raise InputError(answer["message"])
        return answer, data


class _NoRanges(Exception):
    """The server sends whole files alone."""


class RemoteFile:
    """A shard of a set in an object store, fetched when it is read."""

    def __init__(self, storage: RemoteStorage, name: str, size: int, sha256: str):
        self._storage, self._name, self._size, self._sha256 = storage, name, size, sha256
        self._dropped: set[tuple[int, int]] = set()
        self._paths: dict[tuple[int, int], Path] = {}
        self._touched: dict[int, float] = {}  # when the cache was told of a use, by where the unit begins
        self._sought: dict[tuple[int, int], float] = {}  # when a unit was last looked for
        self._loose = False  # its content as a whole is not what the manifest says; its samples may still be

    def read(self, offset: int, size: int, around: tuple[int, int] | None = None) -> bytes:
        try:
            return self._read(offset, size, around)
        finally:
            self._storage.close_counts()

    def _read(self, offset: int, size: int, around: tuple[int, int] | None) -> bytes:
        storage, (begin, end) = self._storage, self._unit(offset, size, around)
        for number in range(TRIES):
            data = self._cached(begin, end, offset, size)
            if number == 0:
                self._count(begin, end, data is not None)
            if data is not None:
                return data
            if not self._fetched(begin, end):
                break
            begin, end = self._unit(offset, size, around)
        try:
            return storage.range(self._name, offset, offset + size, self._size)
        except _NoRanges:
            raise InputError(
                f"{storage.shown}: the server sends whole files alone, and the cache {storage.folder} has no room for "
                f"one of {self._size / 1e6:,.0f} MB; set data.remote.cache_dir or cache_bytes"
            ) from None

    def request(self, offset: int, size: int, around: tuple[int, int] | None) -> dict[str, Any] | None:
        """What to ask for ahead of such a read; nothing where the cache has it."""
        begin, end = self._unit(offset, size, around)
        known = self._path(begin, end).is_file()
        self._count(begin, end, known)
        return None if known else self._wanted(begin, end)

    def drop(self, offset: int, size: int, around: tuple[int, int] | None = None) -> bool:
        """Forget the cached bytes of a read that turned out wrong. False if that was done before: they came so."""
        unit = self._unit(offset, size, around)
        if unit in self._dropped:
            return False
        self._dropped.add(unit)
        self._path(*unit).unlink(missing_ok=True)
        return True

    def close(self) -> None:
        pass

    def _unit(self, offset: int, size: int, around: tuple[int, int] | None) -> tuple[int, int]:
        """The run of bytes that is fetched at once."""
        if self._storage.whole and not self._loose:
            return 0, self._size
        if around is not None and around[0] <= offset and offset + size <= around[1]:
            return around
        return offset, offset + size

    def _count(self, begin: int, end: int, known: bool) -> None:
        """A unit counts as found or fetched by the first who looks for it, until nobody did for some time."""
        now = time.monotonic()
        if now > self._sought.get((begin, end), -ANEW) + ANEW:
            self._storage.count({CACHE_HITS if known else CACHE_MISSES: 1})
        self._sought[begin, end] = now

    def _wanted(self, begin: int, end: int) -> dict[str, Any]:
        known = {"name": self._name, "size": self._size, "sha256": self._sha256}
        if (begin, end) == (0, self._size):
            return {"do": "whole", **known}
        return {"do": "block", "begin": begin, "end": end, **known}

    def _path(self, begin: int, end: int) -> Path:
        if (begin, end) not in self._paths:
            last = None if (begin, end) == (0, self._size) else end
            key = key_of(self._storage.address, self._name, self._sha256, begin, last)
            self._paths[begin, end] = path_of(self._storage.folder, key)
        return self._paths[begin, end]

    def _cached(self, begin: int, end: int, offset: int, size: int) -> bytes | None:
        try:
            file = os.open(self._path(begin, end), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(file, size, offset - begin)
            now = time.monotonic()
            if now > self._touched.get(begin, 0.0) + TOUCHED:
                self._touched[begin] = now
                with contextlib.suppress(OSError):
                    os.utime(file)  # the cache lets go of what was not used for longest
        finally:
            os.close(file)
        return data if len(data) == size else None

    def _fetched(self, begin: int, end: int) -> bool:
        """Have the cache fetch a unit; False where it cannot, and every read goes over the network."""
        wanted = self._wanted(begin, end)
        try:
            return self._storage.ask(wanted.pop("do"), **wanted)[0]["path"] is not None
        except _NoRanges:
            return True  # whole files from now on
        except FileNotFoundError as error:
            raise Fault(str(error), "missing") from None
        except Fault as fault:
            if fault.kind != "changed" or not str(fault).endswith("(SHA-256)"):
                raise
            self._loose = True  # each sample is judged by its own checksum, as it is on a local disk
            return True
