"""Where, with what and of which commit a figure was measured."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def stamp(device: str, *packages: str) -> dict[str, Any]:
    """Device, versions of Python and the packages, and the commit of this tree; what cannot be found is ``unknown``."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in packages}
    return {"device": device, "versions": versions, "commit": _commit()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
