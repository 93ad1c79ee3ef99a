"""Files that are whole or absent, and where this user's files are cached."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path
from typing import BinaryIO

from skvq.engine.errors import SkvqError


def write_atomically(path: Path, data: bytes) -> None:
    """Write next to ``path``, then rename over it. Raises SkvqError if it cannot be written; nothing is left behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # a process of its own: two may make the same calibration
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SkvqError(f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}") from None


def require_writable(path: Path) -> None:
    """Raise SkvqError unless a file can be written at ``path``: checked before long work. Missing folders are created."""
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SkvqError(f"cannot write {path}: {error.strerror or error}") from None


@contextmanager
def atomic_file(path: Path, count: int) -> Iterator[BinaryIO]:
    """A file of about ``count`` bytes to be written as ``.NAME.partial``, renamed to ``path`` when the block ends well.

    Readable too. For large files: what a killed process left under that name is overwritten, so leftovers do not pile up.
    Raises SkvqError, with nothing written, if there is not enough room.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < count:
            raise SkvqError(
                f"cannot write {path}: it needs {count:,} bytes, {path.parent} has {free:,} free: free some or write elsewhere"
            )
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SkvqError(f"cannot write {path} ({count:,} bytes): {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """This user's folder for calibrations: ``$SKVQ_CACHE``, else ``$XDG_CACHE_HOME/skvq``, else ``~/.cache/skvq``."""
    if own := os.environ.get("SKVQ_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "skvq"
