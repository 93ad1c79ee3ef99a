"""Threads of the command line, settled before torch is loaded."""

from __future__ import annotations

import os
from math import ceil

from skvq.engine.control_groups import processors

SPINS = 1000
"""How often a thread of OpenMP looks for work before it sleeps. libgomp's 300,000 are no faster where all cores are free; with
two busy processes beside it SmolLM2 wrote 1.5 tokens a second with them on two cores, with these 70 to 100."""


def settle_threads() -> None:
    """Let waiting threads sleep, and start no more than a control group lets run; what the environment says stands."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    quota = processors()
    if quota is not None and quota < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, ceil(quota))))
