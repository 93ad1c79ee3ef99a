"""What kernels have to tell a user, on stderr: that they are being compiled, or are slower than they could be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO, cast


def stderr() -> TextIO | None:
    """The stream, if there is one: a program may have none, or have closed it. What cannot be written is lost, as on a full
    disk or when whoever read it has gone: it is no reason to stop.
    """
    stream = sys.stderr
    return None if stream is None or getattr(stream, "closed", False) else cast(TextIO, _Unfailing(stream))


def notice(text: str) -> None:
    """A line of its own."""
    if (stream := stderr()) is not None:
        print(f"skvq: {text}", file=stream, flush=True)


@dataclass(frozen=True)
class _Unfailing:
    """The same stream, equal to any other wrapper of it, but for errors of ``write`` and ``flush``."""

    stream: TextIO

    def write(self, text: str) -> None:
        self._tried(self.stream.write, text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, call: Callable[..., object], *values: str) -> None:
        with suppress(OSError, ValueError):
            call(*values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
