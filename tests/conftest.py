"""Test set-up. The repository root is the package, so it must not be on sys.path (`kernels` would hide others' packages)."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what they start in the background
settings.register_profile("here", deadline=None)  # how fast a machine is, or how busy, is no failure
settings.register_profile("ci", deadline=None, derandomize=True)  # to search anew each time is for a person who looks at it
settings.load_profile("ci" if "CI" in os.environ else "here")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
HELPERS = str(ROOT / "tests")  # helper modules, here and in processes that tests start: the tests are no part of the package
sys.path.insert(0, HELPERS)
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
if WORKERS:  # each has its share of the cores; read when torch is imported, which is not done above
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))
os.environ["SKVQ_AMX"] = "0"  # what is computed does not hang on the machine; tests of AMX ask for ``by_tiles``
os.environ["PYTHONPATH"] = os.pathsep.join([HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process waits at the end for one that has just begun them."""
    items.sort(key=lambda item: item.path.name not in ("test_triton_interpreter.py", "test_gpu_benchmark.py"))


def pytest_collection_finish() -> None:
    """What was imported is here to stay: half a million objects that no collection of garbage need look at."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Calibrations made by tests go to a folder of their own, and nothing is downloaded."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SKVQ_CACHE", str(tmp_path_factory.mktemp("skvq-cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test draws the same numbers by itself and after any others."""
    import numpy as np
    import torch

    torch.manual_seed(20)
    np.random.seed(20)
    random.seed(20)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors on one thread: on a busy machine two are twenty times slower than one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    """The specification, then the kernels of the CPU."""
    return str(request.param)


@pytest.fixture
def by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's products of many vectors go by AMX, or by what stands for it where the CPU has none."""
    from skvq.kernels.numba_cpu import amx_linear, block_matrix, flash, half_matrix, permission

    monkeypatch.delenv("SKVQ_AMX")
    permission.has_amx.cache_clear()
    if not permission.has_amx() and permission.compiles_tiles():
        pytest.skip("this CPU has AMX, and the system does not let this process use it")
    for module in (amx_linear, block_matrix, flash, half_matrix):
        monkeypatch.setattr(module, "has_amx", lambda: True)
    permission.has_amx.cache_clear()


@pytest.fixture
def nothing_is_left_behind(engine: Any) -> Iterator[None]:
    """After each test of a module that has an ``engine``: all of its sequences and pages are free again."""
    from tiny import arena_of

    yield
    gc.collect()
    arena = engine.parts.setup.arena
    arena.check(arena_of())
    assert arena.free_sequences == arena.shape.sequences
