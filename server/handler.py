"""HTTP around a ``Service``: OpenAI's completions and chat completions, whole or as a stream of events.

GET  /health               {"status": "ok"}
GET  /v1/models            the one model that is served
POST /v1/completions       a text, token ids, or a list of those
POST /v1/chat/completions  messages
"""

from __future__ import annotations

import hmac
import json
import re
import select
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from skvq import __version__
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError, OptionError, SkvqError
from skvq.engine.report import Reporter
from skvq.server.asked import Asked, asked_for
from skvq.server.replies import Replies, error_of
from skvq.server.service import Call, Service

MOST_BYTES = 1 << 28
"""Of a request: several times a text of ten million tokens."""
PATIENCE = 120
"""Seconds that a client may take for sending or taking the next bytes."""
PULSE = 10.0
"""Seconds between signs of life in a stream whose prompt is still being read, and looks at whether a client is still there."""
POSTS = {"/v1/completions": False, "/v1/chat/completions": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is served, and to whom. key: what clients must send as ``Authorization: Bearer KEY``, if anything."""

    model: str
    defaults: SamplingConfig
    key: str | None
    report: Reporter


class Server(ThreadingHTTPServer):
    """Listens from the start; ``service`` and ``settings`` are there before it serves. Raises OptionError where it cannot."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    service: Service
    settings: Settings

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise OptionError(f"cannot listen on {host}, port {port} ({why}): choose another --host or --port") from None

    @property
    def address(self) -> str:
        """Of the API."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's error."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = f"skvq/{__version__}"
    timeout = PATIENCE
    server: Server

    def do_GET(self) -> None:
        """See the module."""
        if self._place == "/health":
            return self._send(200, {"status": "ok"})
        if not self._is_known():
            return None
        if self._place == "/v1/models":
            model = {"id": self.server.settings.model, "object": "model", "created": 0, "owned_by": "skvq"}
            return self._send(200, {"object": "list", "data": [model]})
        return self._not_here()

    def do_POST(self) -> None:
        """See the module."""
        body = self._body() if self._is_known() else None
        if body is None:
            return None
        if self._place not in POSTS:
            return self._not_here()
        settings = self.server.settings
        try:
            asked = asked_for(body, settings.defaults, is_chat=POSTS[self._place])
            if asked.likeliest:
                return self._score(asked)
            call = self.server.service.add(asked.prompts, asked.sampling)
        except SkvqError as error:
            kind = "context_length_exceeded" if isinstance(error, CapacityError) else "invalid_request_error"
            return self._send(400, error_of(str(error), kind=kind))
        except RuntimeError as error:  # of a score
            return self._send(500, error_of(str(error), kind="server_error"))
        replies = Replies(settings.model, is_chat=asked.is_chat)
        gone = ""
        try:
            (self._stream if asked.is_stream else self._answer)(asked, call, replies)
        except OSError:
            gone, self.close_connection = "the client has gone", True
        finally:
            call.cancel()
        return settings.report.message(_line(self._place, call, gone))

    def _score(self, asked: Asked) -> None:
        """Prompts scored, one after another."""
        engine, settings = self.server.service.engine, self.server.settings
        texts = [engine.encode(prompt) for prompt in asked.prompts]
        waiting = [self.server.service.score(ids, asked.likeliest) for ids in texts]
        found = [(ids, one.result()) for ids, one in zip(texts, waiting, strict=True)]
        drawn = bool(asked.sampling[0].max_new_tokens)
        self._send(200, Replies(settings.model, is_chat=False).scored(found, engine.parts.tokenizer, drawn=drawn))
        settings.report.message(f"{self._place}: {sum(map(len, texts)):,} tokens scored")

    def _answer(self, asked: Asked, call: Call, replies: Replies) -> None:
        left = len(call.requests)
        while left:
            news = call.next(PULSE)
            self._require_there()
            left -= news is not None and news[1] is None
        if call.error:
            return self._send(500, error_of(call.error, kind="server_error"))
        return self._send(200, replies.whole(call.requests))

    def _stream(self, asked: Asked, call: Call, replies: Replies) -> None:
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
            return self._events([error_of(call.error, kind="server_error")])
        if asked.tells_usage:
            self._events([replies.usage(call.requests)])
        return self._write(b"data: [DONE]\n\n")

    def _events(self, found: Iterable[dict[str, Any]]) -> None:
        for one in found:
            self._write(b"data: " + json.dumps(one, ensure_ascii=False).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _require_there(self) -> None:
        """Raise ConnectionError if the client has closed its side."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client has gone")

    def _body(self) -> bytes | None:
        """What was sent, or None if an error was answered."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,12}", length) or int(length) > MOST_BYTES:
            self.close_connection = True
            self._send(413 if length else 411, error_of(f"a request says its length, of up to {MOST_BYTES:,} bytes"))
            return None
        return self.rfile.read(int(length))

    def _not_here(self) -> None:
        self._send(404, error_of(f"there is nothing at {self.path[:80]}: GET /v1/models, or POST to {' or '.join(POSTS)}"))

    @property
    def _place(self) -> str:
        return self.path.partition("?")[0].rstrip("/")

    def _is_known(self) -> bool:
        """Whether the client has the key, if there is one; else that is answered."""
        key, sent = self.server.settings.key, self.headers.get("Authorization", "")
        if key is None or hmac.compare_digest(sent.encode("latin-1"), f"Bearer {key}".encode()):
            return True
        self.close_connection = True  # what it sends is not read
        self._send(401, error_of("this server wants its key: Authorization: Bearer KEY", kind="authentication_error"))
        return False

    def _send(self, status: int, found: dict[str, Any]) -> None:
        data = json.dumps(found, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self._write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, as JSON."""
        self.close_connection = True
        self._send(code, error_of(message or explain or "the request cannot be answered"))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line is written when an answer is over."""


def _line(path: str, call: Call, gone: str) -> str:
    """An answer that is over, for people; ``gone``: why it is, if nobody waits for it."""
    read, written = sum(len(r.ids) for r in call.requests), sum(r.timing.new_tokens for r in call.requests)
    reused = sum(r.timing.reused_tokens for r in call.requests)
    seconds = max(r.timing.prefill_seconds for r in call.requests), max(r.timing.decode_seconds for r in call.requests)
    again = f", {reused:,} of them reused" if reused else ""
    finish = gone or call.error or ", ".join(dict.fromkeys(r.finish for r in call.requests))
    return f"{path}: {read:,} tokens read{again} in {seconds[0]:.1f} s, {written:,} written in {seconds[1]:.1f} s, {finish}"
