"""A server in front of another one that fails when it is told to: where no double is wanted but the network's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

import httpx

Fault = Literal["close", "half", "slow", "401", "429", "500"]
SLOW = 30.0  # seconds
HOP_BY_HOP = {"connection", "content-encoding", "content-length", "keep-alive", "transfer-encoding", "host"}


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `target`. `fail` makes the next ones fail; `calls` are what addresses below /__call run.

    close: the connection ends without an answer; half: after half of its body; slow: the answer comes after 30 s.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.url = target, f"http://127.0.0.1:{self.server_address[1]}"
        self.client = httpx.Client(timeout=120, trust_env=False)
        self.calls: dict[str, Callable[[], object]] = {}
        self.fail("close", 0)

    def fail(self, fault: Fault, count: int = -1) -> None:
        """The next `count` requests fail, by default all until the next call."""
        self.fault, self.left = fault, count

    def failing(self, fault: Fault, count: int = -1) -> str:
        """The address that does the same when another process asks for it."""
        return f"{self.url}/__fail?fault={fault}&count={count}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/__"):
            self._control()
            return
        fault = self.server.fault if self.server.left else ""
        self.server.left -= self.server.left > 0
        if fault == "close":
            self.close_connection = True
            return
        if fault.isdigit():
            self._answer(int(fault), {"content-type": "application/json"}, b'{"detail": "so it was told"}')
            return
        if fault == "slow":
            time.sleep(SLOW)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in HOP_BY_HOP}
        known = self.server.client.request(self.command, self.server.target + self.path, headers=headers, content=body)
        kept = {key: value for key, value in known.headers.items() if key.lower() not in HOP_BY_HOP}
        self._answer(known.status_code, kept, known.content, half=fault == "half")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _pass_on

    def _control(self) -> None:
        parts = urlsplit(self.path)
        asked = dict(parse_qsl(parts.query))
        if parts.path == "/__fail":
            self.server.fail(asked["fault"], int(asked["count"]))  # type: ignore[arg-type]
        else:
            self.server.calls[parts.path.removeprefix("/__call/")]()
        self._answer(200, {}, b"")

    def _answer(self, status: int, headers: dict[str, str], body: bytes, half: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = self.close_connection or half

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the drill tells what it saw."""


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    server = Proxy(target)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.client.close()
