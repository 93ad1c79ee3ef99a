"""What kernels have to tell a user, on stderr: that they are being compiled, or are slower than they could be."""

from __future__ import annotations

import sys
from typing import TextIO


def stderr() -> TextIO | None:
    """The stream, if there is one that can be written to: a program may have none, or have closed it."""
    stream = sys.stderr
    return None if stream is None or getattr(stream, "closed", False) else stream


def notice(text: str) -> None:
    """A line of its own."""
    if (stream := stderr()) is not None:
        print(f"skvq: {text}", file=stream, flush=True)
