"""What launches depend on: the card, and how work is cut for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from skvq.kernels.interface import BackendUnavailable
from skvq.kernels.triton_gpu.forms import PackedForm, packed_form
from skvq.kernels.triton_gpu.overlap import overlaps, wait_for_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as launches see it, or Triton's interpreter on the CPU."""

    fp8: bool  # converts E4M3 itself: sm_89 and later
    pdl: bool  # a launch may start before the one before it has ended
    processors: int
    shared_bytes: int  # shared memory of a multiprocessor
    block_bytes: int  # the most of it that one program may have
    interpreted: bool  # no assembly, no registers, no bfloat16 dot

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """Raises BackendUnavailable if kernels cannot run there."""
        interpreted = not isinstance(wait_for_inputs, triton.JITFunction)
        if device.type != "cuda":
            if not interpreted:
                raise BackendUnavailable(
                    f"backend 'triton' needs an NVIDIA GPU, not {device}; TRITON_INTERPRET=1 runs it on the CPU, for tests only"
                )
            return cls(fp8=False, pdl=False, processors=1, shared_bytes=164 << 10, block_bytes=163 << 10, interpreted=True)
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise BackendUnavailable(f"backend 'triton' needs compute capability 8.0 or later, {device} has {capability}")
        properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks some
        return cls(
            fp8=capability >= (8, 9),
            pdl=overlaps(device),
            processors=properties.multi_processor_count,
            shared_bytes=properties.shared_memory_per_multiprocessor,
            block_bytes=properties.shared_memory_per_block_optin,
            interpreted=interpreted,
        )

    @property
    def meta(self) -> float:
        """What ``metadata`` leaves out of scales and mids: where the card does not convert E4M3 they come times 2^-8."""
        return 1.0 if self.fp8 else 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How work is cut: a matter of speed. Results differ in the order of sums alone."""

    form_of: Callable[..., PackedForm] = packed_form
    lanes: int = 32  # tokens of a program of the lattice quantizer
