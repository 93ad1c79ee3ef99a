"""This tree as ``skvq``, whatever is installed here, its kernels without the rest; and what is no part of the package.

Imported before anything of skvq.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if "skvq" not in sys.modules:
    package = types.ModuleType("skvq")
    package.__path__ = [str(ROOT)]
    sys.modules["skvq"] = package
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
