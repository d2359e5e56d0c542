"""The connection to the fetcher: one for each process and thread, all to the fetcher that a process started first."""

import atexit
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, ClassVar

from penstock.errors import InputError
from penstock.streams.sets.remote.options import Remote

LONGEST = 60  # characters of a temporary folder in which the path of a socket fits into its 108
GONE = (ConnectionError, FileNotFoundError)
STARTS = 4  # times that a request is sent to a fetcher, of which each may be killed


class Link:
    """Connections to the fetcher of a process and its forks; one for each process and thread."""

    _links: ClassVar[dict[str, "Link"]] = {}
    _lock: ClassVar[Any] = threading.Lock()

    def __init__(self, settings: str):
        self.settings = settings
        self.socket: str | None = None
        self._connections: dict[tuple[int, int], Connection] = {}

    @classmethod
    def to(cls, remote: Remote) -> "Link":
        settings = json.dumps(remote.settings(), sort_keys=True)
        return cls._links.setdefault(settings, Link(settings))

    def __reduce__(self) -> Any:
        return _link, (self.settings, self.socket)

    def ask(self, request: dict[str, Any], payload: bytes | None = None) -> tuple[dict[str, Any], bytes | None]:
        """Send a request and wait for its answer. A fetcher that is gone is started anew."""
        message = json.dumps(request | {"payload": payload is not None}).encode()
        for attempt in range(STARTS):
            connection = self._connection()
            try:
                connection.send_bytes(message)
                if payload is not None:
                    connection.send_bytes(payload)
                answer = json.loads(connection.recv_bytes())
                return answer, connection.recv_bytes() if answer["payload"] else None
            except (EOFError, OSError):
                self._forget()
                time.sleep(0.1 * attempt)  # one that dies still takes connections
                if attempt == STARTS - 1:
                    raise InputError(
                        "the process that reads object stores was killed; run the same command again"
                    ) from None
        raise AssertionError("unreachable")

    def _connection(self) -> Connection:
        who = os.getpid(), threading.get_ident()
        if who not in self._connections:
            with self._lock:
                self._connections[who] = self._connect()
        return self._connections[who]

    def _connect(self) -> Connection:
        if self.socket is None or not Path(self.socket).parent.is_dir():
            self.socket = _start_anew(self.settings)
            return Client(self.socket, "AF_UNIX")
        try:
            return Client(self.socket, "AF_UNIX")
        except GONE:
            return _restarted(self.settings, self.socket)

    def _forget(self) -> None:
        connection = self._connections.pop((os.getpid(), threading.get_ident()), None)
        if connection is not None:
            connection.close()


def _link(settings: str, socket: str | None) -> Link:
    link = Link._links.setdefault(settings, Link(settings))
    link.socket = link.socket or socket
    return link


def _start_anew(settings: str) -> str:
    """Start a fetcher; returns the path of its socket, in a folder that only this user can enter."""
    folder = tempfile.mkdtemp(prefix="penstock-", dir="/tmp" if len(tempfile.gettempdir()) > LONGEST else None)
    atexit.register(_remove, folder, os.getpid())
    try:
        _start(settings, f"{folder}/fetcher")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return f"{folder}/fetcher"


def _restarted(settings: str, socket: str) -> Connection:
    """A connection to the fetcher in place of one that was killed; one of those who ask for it starts it."""
    with Path(f"{socket}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Client(socket, "AF_UNIX")
        except GONE:
            Path(socket).unlink(missing_ok=True)
            _start(settings, socket, "--restarted")
            return Client(socket, "AF_UNIX")


def _remove(folder: str, owner: int) -> None:
    """Remove a fetcher's folder when the process ends that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _start(settings: str, socket: str, *options: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.streams.sets.remote.fetcher", socket, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    process.stdin.write(settings.encode() + b"\n")
    process.stdin.flush()
    line = process.stdout.readline()
    process.stdout.close()
    try:
        said = json.loads(line)
    except ValueError:
        raise InputError("the process that reads object stores did not start; see its message above") from None
    if "error" in said:
        raise InputError(said["error"])
    _processes.append(process)


_processes: list[subprocess.Popen] = []  # kept, as a fetcher ends when its standard input closes
