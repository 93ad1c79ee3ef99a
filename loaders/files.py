"""Files that are whole or absent, and where this user's files are cached."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path
from typing import BinaryIO

from skvq.engine.errors import SkvqError


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` by ``atomic_file``."""
    with atomic_file(path, len(data)) as file:
        file.write(data)


def require_writable(path: Path) -> None:
    """Raise SkvqError unless a file can be written at ``path``: checked before long work. What killed processes have left of
    it is removed."""
    try:
        target = _target(path)
        probe = _temporary(target)
        _remove_leftovers(target)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SkvqError(f"cannot write {path}: {error.strerror or error}") from None


@contextmanager
def atomic_file(path: Path, count: int) -> Iterator[BinaryIO]:
    """A file of about ``count`` bytes under a temporary name of this writer's own, renamed to ``path`` when the block ends
    well: of several writers the last one wins, and a reader sees one whole file or another.

    Readable too. What killed processes have left behind is removed; symbolic links are followed. Raises SkvqError, with nothing
    written, if the place takes no file or there is not enough room.
    """
    temporary: Path | None = None
    try:
        target = _target(path)
        temporary = _temporary(target)
        _remove_leftovers(target)
        free = shutil.disk_usage(target.parent).free
        if free < count:
            raise SkvqError(
                f"cannot write {path}: it needs {count:,} bytes, {target.parent} has {free:,} free: free some or write "
                "elsewhere"
            )
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise SkvqError(f"cannot write {path} ({count:,} bytes): {error.strerror or error}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """Where a file at ``path`` would lie, links followed. Raises SkvqError if that is no place for one."""
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:
        raise SkvqError(f"cannot write {str(path)!r}: {error}") from None
    if not path.name or target.is_dir():
        raise SkvqError(f"cannot write {path}: {os.strerror(EISDIR)}")
    if target.exists() and not target.is_file():
        raise SkvqError(f"cannot write {path}: it is a device or a pipe, not a file")
    if not target.parent.is_dir():
        raise SkvqError(f"cannot write {path}: {target.parent} is no folder: make it first, or give another file name")
    return target


def _temporary(target: Path) -> Path:
    """A name beside ``target`` that no other writer uses."""
    return target.with_name(f".{target.name}.{platform.node()}.{os.getpid()}-{threading.get_ident()}.partial")


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of processes of this machine that are gone: of others, on a shared disk, nothing is known."""
    ours = f".{target.name}.{platform.node()}."
    for left in target.parent.glob(f"{glob.escape(ours)}*-*.partial"):
        owner = left.name[len(ours) :].partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            left.unlink(missing_ok=True)


def cache_folder() -> Path:
    """This user's folder for calibrations: ``$SKVQ_CACHE``, else ``$XDG_CACHE_HOME/skvq``, else ``~/.cache/skvq``. Raises
    SkvqError for a user without a home."""
    if own := os.environ.get("SKVQ_CACHE"):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "skvq"  # relative ones are none, by XDG's rules
    except RuntimeError:
        raise SkvqError("this user has no home folder to keep anything in: set SKVQ_CACHE or HOME") from None
