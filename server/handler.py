"""HTTP around a ``Service``: OpenAI's completions and chat completions, whole or as a stream of events.

GET  /health               {"status": "ok"}
GET  /v1/models            the one model that is served
POST /v1/completions       a text, token ids, or a list of those
POST /v1/chat/completions  messages
"""

from __future__ import annotations

import errno
import hmac
import json
import re
import select
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from email.errors import (
    FirstHeaderLineIsContinuationDefect,
    MisplacedEnvelopeHeaderDefect,
    MissingHeaderBodySeparatorDefect,
)
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from skvq import __version__
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError, OptionError, SkvqError, counted
from skvq.engine.report import Reporter
from skvq.server.asked import Asked, asked_for
from skvq.server.replies import Replies, error_of
from skvq.server.service import Answers, Call, NotRunning, Scores, Service

MOST_BYTES = 1 << 20
"""Of a request, beside 64 for each token that the context has room for."""
PATIENCE = 120
"""Seconds that a client may take for sending or taking the next bytes."""
PULSE = 10.0
"""Seconds between signs of life in a stream whose prompt is still being read, and looks at whether a client is still there."""
LINGER = 5.0
"""Seconds for which the rest of a body that is too long is read and thrown away."""
MOST_TOLD = 100
"""Unknown names that are told of."""
SLICE = 1 << 16
"""Bytes that are sent at a time, each within ``PATIENCE``."""
BROKEN = (FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect, MisplacedEnvelopeHeaderDefect)
"""What Python's parser says of lines that are no headers; it says more of bodies, which it is not given."""
POSTS = {"/v1/completions": False, "/v1/chat/completions": True}
"""Where prompts are sent to, and whether they are chats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is served, and to whom. key: what clients must send as ``Authorization: Bearer KEY``, if anything; origin: the web
    pages that may ask from a browser (``Access-Control-Allow-Origin``), if any."""

    model: str
    defaults: SamplingConfig
    key: str | None
    report: Reporter
    origin: str | None = None


class Server(ThreadingHTTPServer):
    """Listens from the start, and answers once it ``serves`` something. Raises OptionError where it cannot listen."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    service: Service
    settings: Settings

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.told: set[str] = set()  # names in requests that are not known
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise OptionError(f"cannot listen on {host}, port {port} ({why}): choose another --host or --port") from None

    def serve(self, service: Service, settings: Settings) -> None:
        """Answer clients until ``shutdown``, in this thread; ``service`` runs in another."""
        self.service, self.settings = service, settings
        self.serve_forever()

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection. Without a file descriptor for it it stays in the queue: some may be free in a moment."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)
            raise

    @property
    def address(self) -> str:
        """Of the API."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's error; anything else is a bug, and is printed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def tell_unknown(self, names: Iterable[str]) -> None:
        """Say once of each name that it means nothing here."""
        for name in sorted(set(names) - self.told):
            if len(self.told) >= MOST_TOLD:
                return
            self.told.add(name)
            self.settings.report.message(f"requests say {name[:40]!r}, which means nothing to this server and is left alone")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

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

    def do_HEAD(self) -> None:
        """As a GET is answered, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """See the module."""
        self._expect_no_body()
        if self._place == "/health":
            return self._send(200, {"status": "ok"})
        if not self._is_known():
            return None
        if self._place == "/v1/models" or self._place.startswith("/v1/models/"):
            model = {"id": self.server.settings.model, "object": "model", "created": 0, "owned_by": "skvq"}
            return self._send(200, {"object": "list", "data": [model]} if self._place == "/v1/models" else model)
        return self._not_here()

    def do_OPTIONS(self) -> None:
        """What a browser asks first, if web pages may ask."""
        self._expect_no_body()
        if self.server.settings.origin is None:
            return self._send(404, error_of("web pages may not ask here: start the server with --allow-origin"))
        self.send_response(204)
        self.send_header("Access-Control-Allow-Methods", "GET, POST")
        asked = self.headers.get("Access-Control-Request-Headers", "*")
        self.send_header("Access-Control-Allow-Headers", " ".join(asked.split()))
        self.send_header("Access-Control-Max-Age", "86400")
        return self.end_headers()

    def end_headers(self) -> None:
        """With who may read the answer."""
        if (origin := self.server.settings.origin) is not None:
            self.send_header("Access-Control-Allow-Origin", origin)
        super().end_headers()

    def do_POST(self) -> None:
        """See the module."""
        body = self._body() if self._is_known() else None
        if body is None:
            return None
        if self._place not in POSTS:
            return self._not_here()
        service, settings = self.server.service, self.server.settings
        try:
            asked = asked_for(body, settings.defaults, is_chat=POSTS[self._place])
            self.server.tell_unknown(asked.unknown)
            if asked.likeliest:
                call: Call = service.score(asked.prompts, asked.likeliest)
            else:
                call = service.answer(asked.prompts, asked.sampling)
        except RecursionError:
            return self._refuse(OptionError("the request's JSON is nested too deeply"))
        except SkvqError as error:
            return self._refuse(error)
        gone = ""
        try:
            self._wait(asked, call)
        except OSError:
            gone, self.close_connection = "the client has gone", True
        finally:
            call.cancel()
        return settings.report.message(_line(self._place, call, gone))

    def _wait(self, asked: Asked, call: Call) -> None:
        """Send what is asked for, as it comes or when it is there."""
        tokenizer = self.server.service.engine.parts.tokenizer
        replies = Replies(self.server.settings.model, tokenizer, is_chat=asked.is_chat)
        if asked.is_stream and isinstance(call, Answers):
            return self._stream(asked, call, replies)
        left = len(asked.prompts) * (len(asked.sampling) if isinstance(call, Answers) else 1)
        while left and not call.error:
            news = call.next(PULSE)
            self._require_there()
            left -= news is not None and news[1] is None
        if call.error:
            return self._refuse(call.error, status=500)
        if isinstance(call, Scores):
            return self._send(200, replies.scored(call, drawn=bool(asked.sampling[0].max_new_tokens)))
        assert isinstance(call, Answers)
        return self._send(200, replies.whole(call))

    def _refuse(self, error: SkvqError, status: int = 400) -> None:
        """Answer with an error; ``status``: unless the error says more."""
        if isinstance(error, CapacityError):
            return self._send(400, error_of(str(error), code="context_length_exceeded"))
        if isinstance(error, NotRunning):
            return self._send(503, error_of(str(error), kind="server_error"))
        return self._send(status, error_of(str(error), kind="invalid_request_error" if status == 400 else "server_error"))

    def _stream(self, asked: Asked, call: Answers, replies: Replies) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self._events(replies.first(len(call.requests)))
        left = len(call.requests)
        while left and not call.error:
            news = call.next(PULSE)
            if news is None:
                self._write(b": reading\n\n")
            elif news[1] is not None:
                self._events([replies.piece(news[0], news[1])])
            else:
                left -= 1
                if not call.error:
                    self._events([replies.last(news[0], call.requests[news[0]].finish)])
        if call.error:
            return self._events([error_of(str(call.error), kind="server_error")])
        if asked.tells_usage:
            self._events([replies.usage(call)])
        return self._write(b"data: [DONE]\n\n")

    def _events(self, found: Iterable[dict[str, Any]]) -> None:
        for one in found:
            self._write(b"data: " + json.dumps(one).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        for at in range(0, len(data), SLICE):
            self.wfile.write(data[at : at + SLICE])
        self.wfile.flush()

    def _require_there(self) -> None:
        """Raise ConnectionError if the client has closed its side."""
        state = select.poll()  # unlike ``select.select`` of any file descriptor
        state.register(self.connection, select.POLLRDHUP)
        if state.poll(0):
            raise ConnectionError("the client has gone")

    def _body(self) -> bytes | None:
        """What was sent, or None if an error was answered. Only a body of one stated length is taken."""
        lengths = self.headers.get_all("Content-Length", [])
        most = MOST_BYTES + 64 * self.server.service.engine.parts.setup.max_context
        one = len(lengths) == 1 and "Transfer-Encoding" not in self.headers and re.fullmatch(r"[0-9]{1,12}", lengths[0])
        if one and int(lengths[0]) <= most:
            return self.rfile.read(int(lengths[0]))
        self.close_connection = True
        status = 413 if one else 400 if lengths else 411
        self._send(status, error_of(f"a request says its length, once, and has up to {most:,} bytes"))
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

    def _expect_no_body(self) -> None:
        """One that came would be taken for the next request: the connection is closed then."""
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True

    def _not_here(self) -> None:
        if self._place in POSTS:
            return self._send(405, error_of(f"{self._place} is asked by POST"))
        there_is = f"GET /v1/models, or POST to {' or '.join(POSTS)}"
        return self._send(404, error_of(f"there is nothing at {self.path[:80]}: {there_is}"))

    @property
    def _place(self) -> str:
        try:
            return urlsplit(self.path).path.rstrip("/")
        except ValueError:  # no address at all
            return self.path

    def _is_known(self) -> bool:
        """Whether the client has the key, if there is one; else that is answered."""
        key, (scheme, _, sent) = self.server.settings.key, self.headers.get("Authorization", "").partition(" ")
        if key is None or (scheme.lower() == "bearer" and hmac.compare_digest(sent.encode("latin-1"), key.encode())):
            return True
        self.close_connection = True  # what it sends is not read
        self._send(401, error_of("this server wants its key: Authorization: Bearer KEY", kind="authentication_error"))
        if self.command == "POST":
            self._ignore(MOST_BYTES)
        return False

    def _send(self, status: int, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self._write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, as JSON."""
        self.close_connection, self.request_version = True, self.protocol_version  # of a broken request line none is known
        self._send(code, error_of(message or explain or "the request cannot be answered"))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line is written when an answer is over."""


def _line(path: str, call: Call, gone: str) -> str:
    """What was done for a client, for people; ``gone``: why it is over, if nobody waits for it."""
    read, why = sum(map(len, call.prompts)), gone or (str(call.error) if call.error else "")
    if not isinstance(call, Answers):
        return f"{path}: {counted(read, 'token')} {why or 'scored'}"
    timings = [request.timing for request in call.requests]
    reused, written = sum(t.reused_tokens for t in timings), sum(t.new_tokens for t in timings)
    again = f", {reused:,} of them reused" if reused else ""
    seconds = max(t.prefill_seconds for t in timings), max(t.decode_seconds for t in timings)
    finish = why or ", ".join(dict.fromkeys(t.finish for t in timings))
    begun = f" read{again} in {seconds[0]:.1f} s, {written:,} written in {seconds[1]:.1f} s" if seconds[0] else ""
    return f"{path}: {counted(read, 'token')}{begun}, {finish}"
