"""Where, with what and of which commit a figure was measured; results by name that later calls add to."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def stamp(device: str, *packages: str) -> dict[str, Any]:
    """Device, versions of Python and the packages, and the commit of this tree; what cannot be found is ``unknown``."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in packages}
    return {"device": device, "versions": versions, "commit": _commit()}


def go_on(path: Path, stamped: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call has written to ``path``, to go on with, and the stamp; the stamp alone if that was another.

    What another commit, or other versions, measured would pass for a result of these. (Outside git trees are not told apart.)
    """
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    other = {name: found.get(name) for name in stamped}
    if other == stamped:
        return found
    if found:
        print(f"{path} is of {other}, this run is of {stamped}: everything is measured anew", file=sys.stderr, flush=True)
    return dict(stamped)


def write(path: Path, found: dict[str, Any]) -> None:
    """``found`` as JSON whose lines can be compared with what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


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
