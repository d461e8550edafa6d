"""A local server that behaves like Google Cloud Storage."""

from __future__ import annotations

import base64
import hashlib
import http.server
import re
import threading
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np

BODY = np.random.default_rng(0).bytes(3_000_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves ``body`` as Google Cloud Storage does. Each of ``faults``, in turn, spoils one request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.etag: str | None = '"first"'
        self.last_modified: str | None = None
        self.hashes = True
        self.ranges = True
        self.faults: list[Callable[[Handler], bool]] = []
        self.requests: list[dict[str, str]] = []
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/e"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections: the tests break them on purpose."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append({"path": self.path, **dict(self.headers)})
        if self.server.faults and self.server.faults.pop(0)(self):
            return
        self.serve()

    def serve(self, limit: int | None = None, changed: dict[str, str | None] | None = None) -> None:
        """Send the requested bytes, at most ``limit``; ``changed`` replaces headers, None removes one."""
        server = self.server
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if asked and server.ranges and condition in (None, server.etag, server.last_modified):
            start = int(asked[1])
            if start >= len(server.body):
                self.send_error(416)
                return
        headers: dict[str, str | None] = {"Content-Length": str(len(server.body) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(server.body) - 1}/{len(server.body)}"
        headers["ETag"], headers["Last-Modified"] = server.etag, server.last_modified
        if server.hashes:
            crc32c = google_crc32c.value(server.body).to_bytes(4, "big")
            md5 = hashlib.md5(server.body).digest()
            headers["x-goog-hash"] = f"crc32c={encode(crc32c)}"
            headers["X-Goog-Hash"] = f"md5={encode(md5)}"  # two lines, as Google sends them
        headers.update(changed or {})
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(server.body[start:][:limit])

    def log_message(self, *args: Any) -> None: ...


def encode(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
