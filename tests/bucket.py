"""A real S3 service (moto's) on loopback, behind a proxy that counts requests and does to them what networks do."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, cycle
from pathlib import Path

import fsspec

FAULTS = ("503", "cut", "truncated", "flipped", "slow")


class Handler(BaseHTTPRequestHandler):
    """Passes one request on; `fault` is what is done to it or to its answer."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, self.path)
        with self.server.lock:
            self.server.log.append((self.command, self.path, self.headers.get("Range"), fault))
        if fault == "503":
            return self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>")
        if fault == "cut":
            self.close_connection = True
            return self.connection.close()
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Expect"})
        reply = upstream.getresponse()
        data = bytearray(reply.read())
        upstream.close()
        if fault == "slow":
            time.sleep(self.server.delay)
        if fault == "flipped" and data:
            data[len(data) // 2] ^= 1
        self.answer(reply.status, dict(reply.getheaders()), data, half=fault == "truncated")

    def answer(self, status: int, headers: dict, data: bytes, half: bool = False) -> None:
        self.send_response_only(status)
        headers = {k: v for k, v in headers.items() if k.lower() not in ("connection", "transfer-encoding")}
        if self.command != "HEAD":
            headers["Content-Length"] = len(data)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        self.close_connection |= half

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on


class Proxy(ThreadingHTTPServer):
    """`log`: (method, path, range, fault) of every request. `fault`: decides what befalls one."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.lock, self.delay = upstream, threading.Lock(), 0.3
        self.calm()
        self.url = "http://{}:{}".format(*self.server_address)

    def calm(self) -> None:
        self.log: list[tuple[str, str, str | None, str | None]] = []
        self.fault: Callable[[str, str], str | None] = lambda method, path: None

    def trouble(self, kinds: tuple[str, ...] = FAULTS, methods: str = "GET", every: int = 2) -> None:
        """Every so many requests for a shard end in one of these faults, by turns."""
        numbers, turns = count(), cycle(kinds)
        lock = threading.Lock()

        def fault(method: str, path: str) -> str | None:
            with lock:
                hit = method in methods.split() and (".tar" in path or ".beton" in path) and next(numbers) % every == 0
                return next(turns) if hit else None

        self.fault = fault

    def requests(self, method: str, part: str = ".tar") -> list[tuple[str, str | None]]:
        """(path, range) of the requests that got what they asked for."""
        good = (None, "slow")
        return [(path, where) for m, path, where, fault in self.log if m == method and part in path and fault in good]

    def handle_error(self, *_) -> None:
        """Clients that were killed hang up."""


@contextmanager
def service() -> Iterator[Proxy]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    moto.stop()


def upload(folder: Path, url: str) -> str:
    """The files of a folder, as a copying tool would lay them down."""
    fs, root = fsspec.core.url_to_fs(url)
    for path in folder.iterdir():
        if path.is_file():
            fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    return url
