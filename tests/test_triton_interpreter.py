"""Triton kernels against the specification, under Triton's interpreter: arithmetic, not speed. Needs no GPU.

Every group of checks is a process of its own (``triton_checks.py``): Triton reads TRITON_INTERPRET when a kernel is decorated,
and this process may have imported the kernels without it. They start when tests are collected (``conftest.py``) and run beside
the other tests, one at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from interpreter import CHECKS, HERE, import_paths

pytest.importorskip("triton")
QUICK = [
    "attend_heads",
    "attend_chunks",
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
    done = CHECKS.result(name)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", [*QUICK, "fused_operations", "matrices", "blocks", "experts", "decode_steps", "on_a_card"])
def test_equals_the_reference(name: str) -> None:
    run_checks(name)


@pytest.mark.slow
def test_every_format_equals_the_reference() -> None:
    run_checks("every_format")


def test_needs_a_gpu_and_says_so() -> None:
    code = (
        "import torch\nfrom skvq.kernels.interface import BackendUnavailable\nfrom skvq.kernels.registry import get_backend\n"
        "try:\n    get_backend('triton', torch.device('cpu'))\nexcept BackendUnavailable as error:\n    print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": import_paths()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=env, check=False)
    assert "needs an NVIDIA GPU" in done.stdout, done.stdout + done.stderr
