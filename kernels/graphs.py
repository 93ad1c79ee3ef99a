"""Work of a device held as a graph, to be done again and again without the host launching it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Captured:
    """Work held as a graph: ``replay`` does it again and leaves its result in ``result``, always the same tensor."""

    replay: Callable[[], None]
    result: Tensor


class Graphs(Protocol):
    """What can hold the work of a device. Capturing does the work: ``result`` holds what it gave."""

    def capture(self, work: Callable[[], Tensor]) -> Captured: ...

    def bound(self, packed: int) -> int:
        """Packed tokens that a step captured at ``packed`` is good for, and is to be launched for."""

    @property
    def setting(self) -> object:
        """What else of the process a captured step depends on: in another it is captured anew."""


class CudaGraphs:
    """Graphs of one device, captured on a stream of their own, each in memory of its own, which is given back with the graph.

    The work is first launched kernel by kernel, with the grids of the graph: kernels get compiled and scratch memory allocated.
    Grids are those of the longest sequence the arena may hold, ``max_packed``, so no length outgrows them.
    """

    _one_at_a_time: ClassVar[Lock] = Lock()  # torch captures one graph of a process at a time

    def __init__(self, device: torch.device, max_packed: int) -> None:
        self.max_packed = max_packed
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own is one for all devices

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        found = work()
        graph = torch.cuda.CUDAGraph()
        # memory of its own: of a pool whose graph is gone cuBLAS keeps a part; other threads may allocate meanwhile
        with self._one_at_a_time, torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        result.copy_(found)
        return Captured(graph.replay, result)

    def bound(self, packed: int) -> int:
        return self.max_packed

    @property
    def setting(self) -> object:
        return None
