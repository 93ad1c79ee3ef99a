"""Tapes as the engine asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skvq.kernels.graphs import Captured
from skvq.kernels.numba_cpu.launch import here
from skvq.kernels.numba_cpu.tape import Tape


class Tapes:
    """``kernels.graphs.Graphs`` of the CPU. Recording costs about a step, so work is divided for the lengths there are."""

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        tape = Tape()
        try:
            with tape:
                result = work()
        finally:
            here.tape = None  # also if it was interrupted on its way in
        return Captured(tape.play, result)

    def bound(self, packed: int) -> int:
        return packed

    @property
    def setting(self) -> object:
        return torch.get_num_threads()
