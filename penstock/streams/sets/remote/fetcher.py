"""The process that talks to object stores for a rank and its workers: `python -m penstock.streams.sets.remote.fetcher`.

Client libraries run threads, which a fork does not copy: a worker that used its parent's client would wait forever. So
neither does; both ask this process over a socket in a folder of their own. It ends with the last of those who ask.
Requests and answers are JSON, and bytes behind it where there are some.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, BinaryIO

from penstock.errors import InputError
from penstock.streams.sets.atomic import temporary
from penstock.streams.sets.remote.address import redacted
from penstock.streams.sets.remote.cache import FULL, Cache, key_of
from penstock.streams.sets.remote.store import Changed, Failed, Missing, NoRanges, Store, Unusable

AT_ONCE = 16  # files that are fetched ahead at the same time
Answer = tuple[dict[str, Any], bytes | None]


class Fetcher:
    """Answers requests; each of its methods named `do_...` is one, called with the request's values."""

    def __init__(self, folder: str, bytes: int, retries: int, timeout: float):
        self.cache = Cache(Path(folder), bytes)
        self.retries, self.timeout = retries, timeout
        self.ahead = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="ahead")
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()
        self._reported: Counter[str] = Counter()

    def store(self, address: str) -> Store:
        with self._lock:
            if address not in self._stores:
                self._stores[address] = Store(address, self.retries, self.timeout)
            return self._stores[address]

    def answer(self, request: dict[str, Any], payload: bytes | None) -> Answer:
        """What a request comes to; what went wrong is an answer, too."""
        address, values = request.get("address", ""), dict(request) | ({} if payload is None else {"payload": payload})
        try:
            answer, data = getattr(self, f"do_{values.pop('do')}")(**values)
        except (Missing, Changed, Failed, NoRanges) as error:
            answer, data = {"error": type(error).__name__, "message": redacted(str(error))}, None
        except (Unusable, InputError) as error:
            answer, data = {"error": "Unusable", "message": redacted(str(error))}, None
        except Exception as error:
            answer, data = (
                {"error": "Unusable", "message": redacted(f"{address}: {type(error).__name__}: {error}")},
                None,
            )
        with self._lock:  # what was fetched ahead is reported with the next answer
            stores = self._stores.values()
            now = Counter(retries=sum(s.retried for s in stores), fetched_bytes=sum(s.fetched for s in stores))
            answer["counts"], self._reported = {name: now[name] - self._reported[name] for name in now}, now
        return answer, data

    def do_content(self, address: str, name: str) -> Answer:
        return {}, self.store(address).content(name)

    def do_sizes(self, address: str, names: list[str]) -> Answer:
        return {"sizes": self.store(address).sizes(names)}, None

    def do_names(self, address: str) -> Answer:
        return {"names": self.store(address).names()}, None

    def do_put(self, address: str, name: str, path: str | None = None, payload: bytes = b"") -> Answer:
        self.store(address).put(name, payload if path is None else Path(path))
        return {}, None

    def do_create(self, address: str, name: str, payload: bytes) -> Answer:
        return {"created": self.store(address).create(name, payload)}, None

    def do_remove(self, address: str, name: str) -> Answer:
        self.store(address).remove(name)
        return {}, None

    def do_copy(self, address: str, name: str, path: str) -> Answer:
        """Write a whole object, as it is, to a path beside the cache."""
        draft = temporary(Path(path))
        try:
            with draft.open("xb") as file:
                file.truncate(self.store(address).download(name, file))
            draft.replace(path)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise InputError(
                f"{tempfile.gettempdir()} is full ({error.strerror}); set TMPDIR to a folder on a larger disk, or use "
                "fewer --workers"
            ) from None
        finally:
            draft.unlink(missing_ok=True)
        return {}, None

    def do_range(self, address: str, name: str, begin: int, end: int, size: int) -> Answer:
        """Bytes that are not kept. Raises NoRanges."""
        return {}, self.store(address).range(name, begin, end, size)

    def do_whole(self, address: str, name: str, size: int | None, sha256: str) -> Answer:
        """The path of the whole file in the cache; none where there is no room."""
        store = self.store(address)

        def fetch(file: BinaryIO) -> None:
            file.truncate(store.download(name, file, size, sha256))

        path = self.cache.get(key_of(address, name, sha256, 0, None), size, fetch)
        return {"path": path and str(path)}, None

    def do_block(self, address: str, name: str, begin: int, end: int, size: int, sha256: str) -> Answer:
        """The path of a range in the cache."""
        store = self.store(address)

        def fetch(file: BinaryIO) -> None:
            file.write(store.range(name, begin, end, size))

        path = self.cache.get(key_of(address, name, sha256, begin, end), end - begin, fetch)
        return {"path": path and str(path)}, None

    def do_ahead(self, requests: list[dict[str, Any]]) -> Answer:
        """Begin with requests whose answers will be asked for; what goes wrong is told then."""
        for request in requests:
            self.ahead.submit(self.answer_ahead, request)
        return {}, None

    def answer_ahead(self, request: dict[str, Any]) -> None:
        values = dict(request)
        with contextlib.suppress(Exception):
            getattr(self, f"do_{values.pop('do')}")(**values)


def serve(connection: Connection, answer: Callable[[dict[str, Any], bytes | None], Answer]) -> None:
    """Answer one client until it closes the connection."""
    try:
        while True:
            request = json.loads(connection.recv_bytes())
            payload = connection.recv_bytes() if request.pop("payload", False) else None
            reply, data = answer(request, payload)
            connection.send_bytes(json.dumps(reply | {"payload": data is not None}).encode())
            if data is not None:
                connection.send_bytes(data)
    except (EOFError, OSError):
        connection.close()


def _end_with_the_last() -> None:
    """Those who ask hold the other end of standard input; it closes when the last of them is gone, however it went."""
    sys.stdin.buffer.read()
    if "--restarted" not in sys.argv:  # else others may be about to start the next one there
        shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)
    os._exit(0)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the rank decides what they mean
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(sys.stdin.buffer.readline())
    socket = Path(sys.argv[1])
    try:
        fetcher = Fetcher(**settings)
        listener = Listener(str(socket), "AF_UNIX", backlog=128)
    except (InputError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({}), flush=True)
    threading.Thread(target=_end_with_the_last, daemon=True).start()
    while True:
        connection = listener.accept()
        threading.Thread(target=serve, args=(connection, fetcher.answer), daemon=True).start()


if __name__ == "__main__":
    main()
