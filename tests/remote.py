"""An object store on loopback, and what can go wrong between it and a reader.

`Wire` answers HTTP requests from a folder, or hands them on to another server (moto's S3), and spoils chosen answers.
"""

import hashlib
import http.client
import http.server
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from penstock.streams.sets.remote import link

KEY, SECRET = "AKIATESTSTESTSTEST01", "secret/of+the/tests0123456789abcdefghijk"


@dataclass
class Spoil:
    """One way to spoil answers: `kind`, for requests whose method and path match, so many times (None: always)."""

    kind: str
    match: str = ""
    times: int | None = 1
    seen: int = 0


@dataclass
class Wire:
    """A server on loopback. Kinds of spoiling: 503, 429, 500, 403, cut, reset, hang, whole, shift, flip, tag."""

    folder: Path | None = None
    upstream: int | None = None  # port of the server that requests are handed on to
    ranges: bool = True
    spoils: list[Spoil] = field(default_factory=list)
    log: list[tuple[str, str, str, int]] = field(default_factory=list)  # method, path, range, status
    headers: list[dict[str, str]] = field(default_factory=list)  # of the requests

    def __post_init__(self) -> None:
        wire = self
        self._lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _any(self) -> None:
                wire._answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PROPFIND = _any  # noqa: N815

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True, args=(0.05,)).start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spoil(self, kind: str, match: str = "", times: int | None = 1) -> Spoil:
        self.spoils.append(Spoil(kind, match, times))
        return self.spoils[-1]

    def gets(self, match: str) -> list[tuple[str, str, str, int]]:
        """The GET requests whose path matches."""
        return [entry for entry in self.log if entry[0] == "GET" and re.search(match, entry[1])]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _kind(self, request: str) -> str:
        with self._lock:
            for spoil in self.spoils:
                if re.search(spoil.match, request) and (spoil.times is None or spoil.seen < spoil.times):
                    spoil.seen += 1
                    return spoil.kind
        return ""

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        kind = self._kind(f"{handler.command} {handler.path}")
        if kind == "hang":
            time.sleep(5)
            kind = "reset"
        if kind == "reset":
            self._note(handler, 0)
            handler.close_connection = True
            handler.connection.close()
            return
        if kind.isdigit():
            status, headers, content = int(kind), {}, b"try later"
        else:
            asked = dict(handler.headers)
            if kind == "whole":
                asked.pop("Range", None)
                asked.pop("range", None)
            made = self._from_folder if self.folder is not None else self._from_upstream
            status, headers, content = made(handler.command, handler.path, asked, body)
        if kind == "flip" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if kind == "tag":
            headers = {**headers, "ETag": '"another"'}
        if kind == "shift" and "Content-Range" in headers:
            content = content[:-3]
            begin, end, total = re.findall(r"\d+", headers["Content-Range"])
            headers = {**headers, "Content-Range": f"bytes {begin}-{int(end) - 3}/{total}"}
        self._note(handler, status)
        handler.send_response(status)
        if handler.command != "HEAD" or "Content-Length" not in headers:
            headers = {**headers, "Content-Length": str(len(content))}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content[: len(content) // 2] if kind == "cut" else content)
            handler.wfile.flush()
        if kind == "cut":
            handler.close_connection = True

    def _note(self, handler: http.server.BaseHTTPRequestHandler, status: int) -> None:
        with self._lock:
            self.log.append((handler.command, handler.path, handler.headers.get("Range") or "", status))
            self.headers.append(dict(handler.headers))

    def _from_folder(self, method: str, path: str, asked: dict[str, str], _: bytes) -> tuple[int, dict, bytes]:
        assert self.folder is not None
        file = self.folder / unquote(urlsplit(path).path).lstrip("/")
        if method not in ("GET", "HEAD"):
            return 501, {}, b""
        if not file.is_file():
            return 404, {}, b"not here"
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Content-Length": str(len(content))}
        spoken = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.get("range", asked.get("Range", "")))
        if spoken and self.ranges:
            begin, end = int(spoken[1]), min(int(spoken[2] or len(content)), len(content) - 1)
            if begin >= len(content):
                return 416, {}, b""
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            return 206, headers, content[begin : end + 1]
        return 200, headers, content

    def _from_upstream(self, method: str, path: str, asked: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        assert self.upstream is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        connection.request(method, path, body or None, asked)
        answer = connection.getresponse()
        content = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date")}
        connection.close()
        kept = {name: value for name, value in headers.items() if name.lower() not in ("content-length", "server")}
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), "0")
        return answer.status, {**kept, "Content-Length": length}, content


def environment(wire: Wire, cache: Path) -> dict[str, str]:
    """What a process needs to read s3:// addresses through a wire."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": wire.url,
        "AWS_ALLOW_HTTP": "true",
        "PENSTOCK_CACHE": str(cache),
    }


@contextmanager
def s3(bucket: str = "bucket") -> Iterator[Wire]:
    """moto's S3 with one bucket, behind a wire."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(upstream=server.get_host_and_port()[1])
    try:
        put(wire, bucket, "", b"")
        yield wire
    finally:
        wire.close()
        server.stop()


def put(wire: Wire, bucket: str, name: str, content: bytes) -> None:
    """Store an object past the wire, unsigned; without a name, make the bucket."""
    assert wire.upstream is not None
    path = f"/{bucket}/{name}" if name else f"/{bucket}"
    status, _, answer = wire._from_upstream(
        "PUT", path, {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request"}, content
    )
    assert status == 200, answer


def upload(wire: Wire, folder: Path, bucket: str, prefix: str) -> None:
    """Store a folder's files below a prefix."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        put(wire, bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def end_fetchers() -> None:
    """End the fetchers of this process, and wait for them."""
    while link._processes:
        process = link._processes.pop()
        assert process.stdin
        process.stdin.close()
        process.wait(timeout=10)
    link.Link._links.clear()
