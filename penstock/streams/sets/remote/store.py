"""One set in an object store: requests that are checked, and tried again when they fail for the moment.

Used in the fetcher's process alone: the client library's threads do not survive a fork.
"""

import contextlib
import datetime
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from penstock.streams.sets.remote.address import Place, place, redacted
from penstock.streams.sets.remote.cache import FULL

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 20.0  # seconds between attempts
CHUNK = 1 << 20  # bytes of a whole file handled at once
PART = 16 << 20  # bytes of a part of an upload
PROBE = "manifest.json"  # asked for to tell one bad object from a store that is gone
PROBED = 10.0  # seconds that the answer holds
METADATA = "169.254.169.254"  # where machines of a cloud are asked for credentials when the environment has none
ENVIRONMENT = (
    "set credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT, "
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, HF_TOKEN), or AWS_SKIP_SIGNATURE=true where all may read"
)
T = TypeVar("T")


class Missing(Exception):
    """There is no such object."""


class Changed(Exception):
    """The object is another one than the manifest describes."""


class Failed(Exception):
    """The object could not be had, however often it was tried; others can."""


class Unusable(Exception):
    """The store cannot be used at all: it does not answer, or does not let us in."""


class NoRanges(Exception):
    """The server sends whole files alone."""


class Store:
    """Requests for the objects below one address.

    Args:
        retries: times that a request which failed is sent again.
        timeout: seconds without a byte after which a request has failed.
    """

    def __init__(self, address: str, retries: int, timeout: float):
        self.place = place(address)
        self.address, self.retries = address, retries
        self.retried, self.fetched = 0, 0  # times that a request was sent again; bytes of objects that came
        try:
            self._client = _open(self.place, timeout)
        except Exception as error:
            raise Unusable(f"{address} cannot be used: {_brief(error)}; {ENVIRONMENT}") from None
        self._tags: dict[str, str | None] = {}  # the versions seen first
        self._lock = threading.Lock()
        self._gone: tuple[float, str] | None = None  # when the store was found unusable, and why

    def content(self, name: str) -> bytes:
        """A whole object, of a size that nobody knows."""
        return self._tried(name, lambda: bytes(self._client.get(name).bytes()))

    def size(self, name: str) -> int | None:
        try:
            return self._tried(name, lambda: int(self._client.head(name)["size"]))
        except Missing:
            return None

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.size, names))

    def names(self) -> list[str]:
        """Objects directly below the address. Raises Unusable where the server gives no list."""
        if self.place.kind == "https":
            raise Unusable(f"{self.address}: a web server gives no list of its files")
        listed = self._tried("", lambda: self._client.list_with_delimiter()["objects"])
        return sorted(meta["path"].rsplit("/", 1)[-1] for meta in listed)

    def range(self, name: str, begin: int, end: int, size: int) -> bytes:
        """Bytes [begin, end) of an object that has `size`."""

        def once() -> bytes:
            options: dict[str, Any] = {"range": (begin, end)}
            data = bytes(self._answer(name, options, size).bytes())
            self._came(len(data))
            if len(data) != end - begin:
                raise OSError(f"{len(data):,} of {end - begin:,} bytes came")
            return data

        return self._tried(name, once)

    def download(self, name: str, file: BinaryIO, size: int | None = None, sha256: str | None = None) -> int:
        """Write a whole object to `file`, and return its size. An answer that breaks off is taken up where it ended,
        if the object is still of the version that its first bytes were of.

        Raises:
            Changed: it has not the size or the checksum.
        """
        received, digest, tag = 0, hashlib.sha256(), None

        def begun() -> Any:
            nonlocal received, digest
            if received and tag is not None:
                with contextlib.suppress(NoRanges, Changed):
                    answer = self._answer(name, {"range": {"offset": received}}, size)
                    if answer.meta["e_tag"] == tag:
                        return answer
            received, digest = 0, hashlib.sha256()
            return self._answer(name, {}, size)

        def once() -> None:
            nonlocal received, tag
            answer = begun()
            tag = answer.meta["e_tag"]
            file.seek(received)
            for chunk in answer.stream(min_chunk_size=CHUNK):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                self._came(len(chunk))
            if received != answer.meta["size"]:
                raise OSError(f"{received:,} of {answer.meta['size']:,} bytes came")

        self._tried(name, once, progress=lambda: received)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise Changed(f"{name} has other content than the manifest says (SHA-256)")
        return received

    def put(self, name: str, content: bytes | Path) -> None:
        """Store an object, whole or not at all."""
        if self.place.kind == "https":
            raise Unusable(f"{self.address}: nothing can be written to a web server; write s3://, gs:// or az://")
        self._tried(name, lambda: self._client.put(name, content, chunk_size=PART, max_concurrency=8))

    def create(self, name: str, content: bytes) -> bool:
        """Store a small object unless there is one; False where there is. A store without such requests overwrites."""

        def once() -> bool:
            try:
                self._client.put(name, content, mode="create")
            except Exception as error:
                kind = type(error).__name__
                if kind == "NotSupportedError" or re.search(r"status code: 501\b", _brief(error)):
                    self._client.put(name, content)
                elif kind == "AlreadyExistsError":
                    return False
                else:
                    raise
            return True

        return self._tried(name, once)

    def remove(self, name: str) -> None:
        with contextlib.suppress(Missing):
            self._tried(name, lambda: self._client.delete(name))

    def _came(self, count: int) -> None:
        with self._lock:
            self.fetched += count

    def _answer(self, name: str, options: dict[str, Any], size: int | None) -> Any:
        """The beginning of an answer, for an object of that size and of the version that was seen first.

        After a change the next attempt takes the new version: whether its bytes are those of the manifest, checksums
        tell, and an object that was copied anew may have another tag.
        """
        tag = self._tags.get(name)
        if tag is not None and self.place.versioned:
            options = {**options, "if_match": tag}
        try:
            answer = self._client.get(name, options=options) if options else self._client.get(name)
        except Exception as error:
            raise OSError(self._sorted_out(name, error)) from None
        meta = answer.meta
        if size is not None and meta["size"] != size:
            raise Changed(f"{name} has {meta['size']:,} bytes instead of {size:,}")
        if tag is not None and meta["e_tag"] != tag:
            self._tags.pop(name, None)
            raise OSError(f"another version of {name} than before")
        self._tags[name] = meta["e_tag"]
        return answer

    def _tried(self, name: str, once: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """`once()`, again and again until it is done. Every byte of progress begins the count of attempts anew."""
        pause, attempts, done = FIRST_PAUSE, 0, 0
        while True:
            self._refuse_if_gone()
            try:
                return once()
            except (Missing, Changed, NoRanges, Unusable):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                why = self._sorted_out(name, error)
            if progress() > done:
                pause, attempts, done = FIRST_PAUSE, 0, progress()
            if attempts == self.retries:
                self._probe()
                raise Failed(f"{why}, {attempts + 1} times in a row")
            attempts += 1
            with self._lock:
                self.retried += 1
            # Decorrelated jitter (Brooker 2015, "Exponential Backoff And Jitter"): clients do not come back in step.
            pause = min(LONGEST_PAUSE, random.uniform(FIRST_PAUSE, pause * 3))
            time.sleep(pause)

    def _sorted_out(self, name: str, error: Exception) -> str:
        """Why a request failed, if it may be tried again; raises what says why not."""
        why, kind = _brief(error), type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise Missing(f"there is no {name}") from None
        if kind in ("PermissionDeniedError", "UnauthenticatedError"):
            what = "does not let us in" if kind == "UnauthenticatedError" else "does not allow it"
            raise Unusable(f"{self.address} {what} ({why}); {ENVIRONMENT}") from None
        if kind == "NotSupportedError" and "Range" in why:
            raise NoRanges(f"{name}: the server sends whole files alone") from None
        if kind == "PreconditionError":
            self._tags.pop(name, None)
            return f"another version of {name} than before"
        if re.search(r"status code: 416\b", why):
            raise Changed(f"{name} ends early ({why})") from None
        if kind in ("InvalidPathError", "UnknownConfigurationKeyError", "NotSupportedError", "ValueError", "TypeError"):
            raise Unusable(f"{self.address}: {why}") from None
        return why

    def _refuse_if_gone(self) -> None:
        if self._gone is not None and time.monotonic() - self._gone[0] < PROBED:
            raise Unusable(self._gone[1])

    def _probe(self) -> None:
        """Raise Unusable if not even the manifest can be reached."""
        try:
            self._client.head(PROBE)
        except FileNotFoundError:
            pass
        except Exception as error:
            what = f"{self.address} cannot be reached: {_brief(error)}"
            remedy = f"there are no credentials: {ENVIRONMENT}" if METADATA in what else "look at network and address"
            self._gone = time.monotonic(), f"{what}; {remedy}. A run goes on where it was"
            raise Unusable(self._gone[1]) from None


def _brief(error: Exception) -> str:
    """An error's first line without credentials and without what says nothing: the client's kind and its pace."""
    line = str(error).strip().split("\n")[0]
    line = re.sub(r"^Generic \w+ error: |Error performing | in [\d.]+[mµn]?s(?= - )", "", line)
    return redacted(line)[:300] or type(error).__name__


def _open(where: Place, timeout: float) -> Any:
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    seconds = datetime.timedelta(seconds=1)
    client: dict[str, Any] = {
        "timeout": max(10 * timeout, 600.0) * seconds,
        "read_timeout": timeout * seconds,
        "connect_timeout": min(timeout, 10.0) * seconds,
    }
    plain = [os.environ.get(f"{owner}_ALLOW_HTTP", "") for owner in ("AWS", "GOOGLE", "AZURE")]
    if where.url.startswith("http://") or "true" in map(str.lower, plain):
        client["allow_http"] = True
    if where.headers:
        client["default_headers"] = where.headers
    common: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}  # ours are counted
    if where.kind == "https":
        return HTTPStore(where.url, **common)
    stores: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    return stores[where.kind].from_url(where.url, **common)
