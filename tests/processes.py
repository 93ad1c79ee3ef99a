"""What a process that a test starts may import."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def import_paths() -> str:
    """What a process of ours may import from, as PYTHONPATH: all but the repository's root."""
    return os.pathsep.join(p for p in sys.path if p and Path(p).resolve() != HERE.parent.resolve())
