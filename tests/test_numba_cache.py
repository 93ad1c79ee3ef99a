"""The process that compiles kernels and those that read them from numba's cache compute the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from skvq.kernels import numba_cpu
from skvq.kernels.numba_cpu.tiles import CALLED, FAST

ANSWERS = """
import hashlib
import torch
from cases import make_case
from skvq.kernels.numba_cpu import NumbaCpu
case = make_case(has_key_mean=True, has_metric=True)
out, lse = NumbaCpu().heads.attend(case.q, case.pages, case.heads, case.full, case.step)
count = 4 * case.pages.layout.tile
rows = torch.randn(2, count, *case.full.keys.shape[1::2], generator=torch.Generator().manual_seed(1)).half()
NumbaCpu().heads.pack(case.pages, case.heads, case.step.page_table[0], 0, *rows, torch.zeros(count, dtype=torch.bool))
found = (out, lse, case.pages.key_codes, case.pages.value_codes, case.pages.meta)
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest())
"""
ELSEWHERE = """
import sys
from skvq.kernels.numba_cpu import compiled, small
compiled.NOTICE_SECONDS = 0
if sys.argv[1:]:
    sys.executable = sys.argv[1]
kernels = compiled.Kernels()
kernels.function(small.build_norm, soon=small.build_swiglu)
kernels.function(small.build_swiglu)
print([kernels._compiled[build][0].cache_hits for build in (small.build_norm, small.build_swiglu)])
"""


def run(script: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """What a new process prints that keeps compiled kernels in ``folder``."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script, *args], env=environment, capture_output=True, text=True, check=True)


def test_every_jitted_function_is_inlined() -> None:
    """See ``FAST``: one that is called comes from another module when it is compiled than when it is read."""
    assert FAST["forceinline"] and not CALLED["forceinline"]
    for path in Path(numba_cpu.__file__).parent.glob("*.py"):
        for decorator, name in re.findall(r"^(@n?jit.*)\ndef (\w+)", path.read_text(), re.MULTILINE):
            inlined = "**FAST" in decorator or "forceinline=True" in decorator
            assert inlined or ("**CALLED" in decorator and name in ("mix", "dots", "product")), (path.name, decorator, name)


@pytest.mark.parametrize("executable, hits", [((), [0, 1]), (("/nowhere/python",), [0, 0]), (("",), [0, 0])])
def test_the_next_kernel_is_compiled_by_another_process(executable: tuple[str, ...], hits: list[int], tmp_path: Path) -> None:
    """This process then reads it from the cache; where there can be no other process it compiles it itself."""
    done = run(ELSEWHERE, tmp_path, *executable)
    assert done.stdout == f"{hits}\n" and done.stderr.count("compiling the CPU kernels") == 1, done


@pytest.mark.slow
def test_the_first_run_gives_what_later_runs_give(tmp_path: Path) -> None:
    digests = {run(ANSWERS, tmp_path).stdout for _ in range(3)}
    assert len(digests) == 1 and list(tmp_path.rglob("*.nbc"))
