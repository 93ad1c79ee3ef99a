"""Triton kernels against the specification, under Triton's interpreter: arithmetic, not speed. Needs no GPU.

Every group of checks is a process of its own (``triton_checks.py``): Triton reads TRITON_INTERPRET when a kernel is decorated,
and this process may have imported the kernels without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HERE, import_paths

pytest.importorskip("triton")
CODE = "import sys; sys.argv = ['triton_checks.py', *sys.argv[1:]]; import runpy; runpy.run_path(%r, run_name='__main__')"
LONGEST = ["on_a_card", "decode_steps", "lattice", "packing"]
OTHERS = [
    "attend_heads",
    "attend_chunks",
    "attend_parts",
    "attend_spans",
    "attend_others",
    "attend_formats",
    "label_ranges",
    "invariants",
    "merging",
    "assembly_order",
    "odd_shapes",
    "crowded_labels",
    "fused_operations",
    "matrices",
    "blocks",
    "experts",
]


def run_checks(name: str, cache: Path) -> None:
    command = [sys.executable, "-c", CODE % str(HERE / "triton_checks.py"), name]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": import_paths(), "OMP_NUM_THREADS": "1", "SKVQ_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", [*LONGEST, *OTHERS])
def test_equals_the_reference(name: str, tmp_path: Path) -> None:
    run_checks(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["every_format", "more_on_a_card"])
def test_more_equals_the_reference(name: str, tmp_path: Path) -> None:
    run_checks(name, tmp_path)


def test_needs_a_gpu_and_says_so() -> None:
    code = (
        "import torch\nfrom skvq.kernels.interface import BackendUnavailable\nfrom skvq.kernels.registry import get_backend\n"
        "try:\n    get_backend('triton', torch.device('cpu'))\nexcept BackendUnavailable as error:\n    print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": import_paths()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=env, check=False)
    assert "needs an NVIDIA GPU" in done.stdout, done.stdout + done.stderr
