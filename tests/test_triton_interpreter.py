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

pytest.importorskip("triton")
HERE = Path(__file__).parent
QUICK = [
    "attend_heads",
    "attend_parts",
    "attend_spans",
    "attend_others",
    "attend_formats",
    "label_ranges",
    "invariants",
    "packing",
    "lattice",
    "merging",
    "assembly_order",
    "odd_shapes",
    "crowded_labels",
]


def run_checks(name: str) -> None:
    code = "import sys; sys.argv = ['triton_checks.py', *sys.argv[1:]]; import runpy; runpy.run_path(%r, run_name='__main__')"
    paths = os.pathsep.join(p for p in sys.path if p and Path(p).resolve() != HERE.parent.resolve())
    done = subprocess.run(
        [sys.executable, "-c", code % str(HERE / "triton_checks.py"), name], capture_output=True, text=True, cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", [*QUICK, "fused_operations", "matrices", "decode_steps", "on_a_card"])
def test_equals_the_reference(name: str) -> None:
    run_checks(name)


@pytest.mark.slow
def test_every_format_equals_the_reference() -> None:
    run_checks("every_format")


def test_needs_a_gpu_and_says_so() -> None:
    code = (
        "import torch\nfrom skvq.kernels.registry import BackendUnavailable, get_backend\n"
        "try:\n    get_backend('triton', torch.device('cpu'))\nexcept BackendUnavailable as error:\n    print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(p for p in sys.path if p and Path(p).resolve() != HERE.parent.resolve())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=env | {"PYTHONPATH": paths}, check=False
    )
    assert "needs an NVIDIA GPU" in done.stdout, done.stdout + done.stderr
