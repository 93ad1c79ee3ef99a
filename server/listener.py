"""The server that listens, and what it serves."""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Lock
from typing import Any

from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.report import Reporter
from skvq.server.service import Service

FAREWELL = 5
"""Seconds at most that the end waits for clients that do not read."""
MOST_TOLD = 100
"""Unknown names that are told of."""


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
    """Listens from the start, and answers once it ``serves`` something, each connection by a ``handler``.

    Raises OptionError where it cannot listen.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    service: Service
    settings: Settings

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.told: set[str] = set()  # names in requests that are not known
        self._answering, self._told = 0, Condition()
        self.long_request = Lock()  # held while one is encoded, which takes some 200 bytes of memory a character
        try:
            super().__init__((host, port), handler)
        except (OSError, OverflowError, TypeError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise OptionError(f"cannot listen on {host}, port {port} ({why}): choose another --host or --port") from None

    def serve(self, service: Service, settings: Settings) -> None:
        """Answer clients until ``shutdown``, in this thread; ``service`` runs in another."""
        self.service, self.settings = service, settings
        self.serve_forever()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around a request, from when it is known to when its client has been told."""
        with self._told:
            self._answering += 1
        try:
            yield
        finally:
            with self._told:
                self._answering -= 1
                self._told.notify_all()

    def end(self) -> None:
        """Stop listening, and wait for clients that are being told how their answers have ended."""
        self.shutdown()
        with self._told:
            self._told.wait_for(lambda: not self._answering, FAREWELL)

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
