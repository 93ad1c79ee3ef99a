"""Backend for CPUs: numba kernels on torch's threads, ``vpdpbusd`` / ``vpmaddubsw`` where the CPU has them."""

from __future__ import annotations

from skvq.kernels.numba_cpu.backend import NumbaCpu

__all__ = ["NumbaCpu"]
