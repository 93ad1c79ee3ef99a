"""One connection's plumbing: a request's head and body in, JSON or events out, and what is refused before it is looked at."""

from __future__ import annotations

import hmac
import json
import re
import select
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from email.errors import (
    FirstHeaderLineIsContinuationDefect,
    MisplacedEnvelopeHeaderDefect,
    MissingHeaderBodySeparatorDefect,
)
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from skvq import __version__
from skvq.engine.errors import CapacityError, SkvqError
from skvq.server.listener import Server
from skvq.server.replies import error_of
from skvq.server.service import NotRunning

MOST_BYTES = 1 << 20
"""Of a request, beside 64 for each token that the context has room for."""
PATIENCE = 120
"""Seconds that a client may take for sending or taking the next bytes."""
LINGER = 5.0
"""Seconds for which the rest of a body that is too long is read and thrown away."""
SLICE = 1 << 16
"""Bytes that are sent at a time, each within ``PATIENCE``."""
BROKEN = (FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect, MisplacedEnvelopeHeaderDefect)
"""What Python's parser says of lines that are no headers; it says more of bodies, which it is not given."""


def as_bytes(argument: str) -> bytes:
    """Those that an argument was given as, whatever the locale made of them."""
    return argument.encode("utf-8", "surrogateescape")


class Connection(BaseHTTPRequestHandler):
    """Speaks HTTP with one client."""

    protocol_version = "HTTP/1.1"
    server_version = f"skvq/{__version__}"
    timeout = PATIENCE
    disable_nagle_algorithm = True  # else what follows the headers waits for 40 ms
    server: Server

    def parse_request(self) -> bool:
        """A header line that is none would hide those behind it, the body's length among them."""
        found = super().parse_request()
        if found and any(isinstance(defect, BROKEN) for defect in self.headers.defects):
            self.send_error(400, "a line of the request's headers is broken")
            return False
        return found

    def end_headers(self) -> None:
        """With who may read the answer."""
        if (origin := self.server.settings.origin) is not None:
            self.send_header("Access-Control-Allow-Origin", origin)
        super().end_headers()

    @property
    def place(self) -> str:
        try:
            return urlsplit(self.path).path.rstrip("/")
        except ValueError:  # no address at all
            return self.path

    def is_known(self) -> bool:
        """Whether the client has the key, if there is one; else that is answered."""
        key, (scheme, _, sent) = self.server.settings.key, self.headers.get("Authorization", "").partition(" ")
        if key is None or (scheme.lower() == "bearer" and hmac.compare_digest(sent.encode("latin-1"), as_bytes(key))):
            return True
        self.close_connection = True  # what it sends is not read
        self.send(401, error_of("this server wants its key: Authorization: Bearer KEY", kind="authentication_error"))
        if self.command == "POST":
            self._ignore(MOST_BYTES)
        return False

    def expect_no_body(self) -> None:
        """One that came would be taken for the next request: the connection is closed then."""
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True

    def body(self) -> bytes | None:
        """What was sent, or None if an error was answered. Only a body of one stated length is taken."""
        lengths = self.headers.get_all("Content-Length", [])
        most = MOST_BYTES + 64 * self.server.service.engine.parts.setup.max_context
        one = len(lengths) == 1 and "Transfer-Encoding" not in self.headers and re.fullmatch(r"[0-9]{1,12}", lengths[0])
        if one and int(lengths[0]) <= most:
            return self.rfile.read(int(lengths[0]))
        self.close_connection = True
        status = 413 if one else 400 if lengths else 411
        self.send(status, error_of(f"a request says its length, once, and has up to {most:,} bytes"))
        self._ignore(int(lengths[0]) if one else most)
        return None

    def _ignore(self, count: int) -> None:
        """Read up to so many bytes that a client is still sending, for some seconds, lest it see a broken connection, not the
        answer."""
        self.connection.settimeout(1)
        end = time.monotonic() + LINGER
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while count > 0 and time.monotonic() < end and (data := self.rfile.read1(SLICE)):
                count -= len(data)

    def require_there(self) -> None:
        """Raise ConnectionError if the client has closed its side, be it for sending alone: nothing tells if it reads."""
        state = select.poll()  # unlike ``select.select`` of any file descriptor
        state.register(self.connection, select.POLLRDHUP)
        if state.poll(0):
            raise ConnectionError("the client has gone")

    def send(self, status: int, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.write(data)

    def refuse(self, error: SkvqError, status: int = 400) -> None:
        """Answer with an error; ``status``: unless the error says more."""
        if isinstance(error, CapacityError):
            return self.send(400, error_of(str(error), code="context_length_exceeded"))
        if isinstance(error, NotRunning):
            return self.send(503, error_of(str(error), kind="server_error"))
        return self.send(status, error_of(str(error), kind="invalid_request_error" if status == 400 else "server_error"))

    def send_events(self, found: Iterable[dict[str, Any]]) -> None:
        for one in found:
            self.write(b"data: " + json.dumps(one).encode() + b"\n\n")

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), SLICE):
            self.wfile.write(data[at : at + SLICE])
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, as JSON."""
        self.close_connection, self.request_version = True, self.protocol_version  # of a broken request line none is known
        self.send(code, error_of(message or explain or "the request cannot be answered"))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line is written when an answer is over."""
