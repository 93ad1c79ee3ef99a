"""The process that compiles kernels and those that read them from numba's cache compute the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from skvq.kernels import numba_cpu
from skvq.kernels.numba_cpu.tiles import FAST

SCRIPT = """
import hashlib
from cases import make_case
from skvq.kernels.numba_cpu import NumbaCpu
case = make_case()
out, lse = NumbaCpu().attend_heads(case.q, case.pages, case.heads, case.full, case.step)
print(hashlib.sha256(out.numpy().tobytes() + lse.numpy().tobytes()).hexdigest())
"""


def test_every_jitted_function_is_inlined() -> None:
    """See ``FAST``: one that is called comes from another module when it is compiled than when it is read."""
    assert FAST["forceinline"]
    for path in Path(numba_cpu.__file__).parent.glob("*.py"):
        for decorator in re.findall(r"^@n?jit.*", path.read_text(), re.MULTILINE):
            assert "**FAST" in decorator or "forceinline=True" in decorator, (path.name, decorator)


@pytest.mark.slow
def test_the_first_run_gives_what_later_runs_give(tmp_path: Path) -> None:
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    digests = set()
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1 and list(tmp_path.rglob("*.nbc"))
