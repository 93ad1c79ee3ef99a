"""Work of a device held as a graph, to be done again and again without the host launching it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


class NotCaptured(RuntimeError):
    """Work that could not be held as a graph this time, but was done: ``result`` is what it gave."""

    def __init__(self, result: Tensor, reason: str) -> None:
        super().__init__(f"a step could not be held as a CUDA graph: {reason}")
        self.result = result


class Graphs(Protocol):
    """What can hold the work of a device. Capturing does the work: ``result`` holds what it gave."""

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        """Raises NotCaptured, with the result."""

    def bound(self, packed: int) -> int:
        """Packed tokens that a step captured at ``packed`` is good for, and is to be launched for."""

    @property
    def setting(self) -> object:
        """What else of the process a captured step depends on: in another it is captured anew."""


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which steps are captured. One for all: torch has 32 streams and then hands them out again, and
    one on which something is captured must have no other work."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own is one for all devices


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Cycles are left for later."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def give_up_pool(device: torch.device, pool: tuple[int, int]) -> None:
    """Where torch cannot end a capture it goes on allocating for it (mended after 2.11, pytorch #180395): no cached memory is
    given back from then on, and no graph begun.
    """
    with suppress(RuntimeError, AttributeError):  # it has ended it
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        torch._C._cuda_releasePool(device.index or 0, pool)


class CudaGraphs:
    """Graphs of one device, captured on a stream of their own, each in memory of its own, which is given back with the graph.

    The work is first launched kernel by kernel, with the grids of the graph: kernels get compiled and scratch memory allocated.
    Grids are those of the longest sequence the arena may hold, ``max_packed``, so no length outgrows them.
    """

    _one_at_a_time: ClassVar[Lock] = Lock()  # torch captures one graph of a process at a time

    def __init__(self, device: torch.device, max_packed: int) -> None:
        self.max_packed, self._device = max_packed, device

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        """Raises NotCaptured if memory is short, or another thread waits for the whole device."""
        found = work()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        pool = torch.cuda.graph_pool_handle()  # of its own: of one whose graph is gone cuBLAS keeps a part
        try:
            with (
                self._one_at_a_time,
                no_garbage_collection(),  # what it finds may unload a kernel, which ends the capture
                torch.cuda.graph(  # other threads may allocate meanwhile
                    graph, pool=pool, stream=capture_stream(self._device), capture_error_mode="thread_local"
                ),
            ):
                result = work()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves its own where it cannot end the capture
            give_up_pool(self._device, pool)
            raise NotCaptured(found, (str(error).splitlines() or [type(error).__name__])[0]) from error
        result.copy_(found)
        return Captured(graph.replay, result)

    def bound(self, packed: int) -> int:
        return self.max_packed

    @property
    def setting(self) -> object:
        return None
