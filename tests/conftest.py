"""Test set-up. The repository root is the package, so it must not be on sys.path (`kernels` would hide others' packages)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Calibrations made by tests go to a folder of their own, and nothing is downloaded."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SKVQ_CACHE", str(tmp_path_factory.mktemp("skvq-cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
