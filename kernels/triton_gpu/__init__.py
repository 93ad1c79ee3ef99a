"""Triton kernels for NVIDIA GPUs, sm_80 and later."""

from skvq.kernels.triton_gpu.backend import TritonGpu

__all__ = ["TritonGpu"]
