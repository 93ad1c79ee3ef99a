"""Files that are whole or absent, and where this user's files are cached."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from skvq.engine.errors import SkvqError


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside ``path``, then rename over it. Raises SkvqError if the place cannot be written; nothing is left behind."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise SkvqError(f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}") from None


def cache_folder() -> Path:
    """This user's folder for calibrations: ``$SKVQ_CACHE``, else ``$XDG_CACHE_HOME/skvq``, else ``~/.cache/skvq``."""
    if own := os.environ.get("SKVQ_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "skvq"
