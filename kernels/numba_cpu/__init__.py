"""Backend for CPUs: numba kernels on torch's threads, with ``vpdpbusd`` or ``vpmaddubsw`` where the CPU has them.

Words used throughout:

    job       the int64 array a kernel gets as its only argument: addresses, sizes, strides in bytes (``job.py``)
    w_...     fields of a job: offsets of scratch arrays in a thread's workspace, whose address jitted code calls ``work``
    build_x   makes the entry point of a kernel. ``stamp`` identifies its source (``compiled.source_stamp``): the compiled code
              reads it, so numba's disk cache keeps one version per stamp
    lanes     a row length rounded up to LANE_BLOCK (32), the width of the inner loops
    levels    3, 4, 8, 16 or 256: stands for the bit width of codes
    limbs     two int8 numbers that together hold a float rounded to an integer, so that int8 dot products keep its precision
"""

from __future__ import annotations

from skvq.kernels.numba_cpu.backend import NumbaCpu

__all__ = ["NumbaCpu"]
