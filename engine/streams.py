"""What the host does not wait for: copies to a GPU, and work of layers that do not depend on one another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LITTLE = 1 << 20
"""Bytes that any device has to spare."""
SIDE_STREAMS = 4
"""Streams beside the current one. Each keeps memory of its own that it has once allocated."""


def pinned(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Whole numbers, int64, in host memory from which a copy to ``device`` need not be waited for: pinned memory is not handed
    out again before the copy is done."""
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")


def sent(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Whole numbers, int64, on ``device``."""
    return pinned(numbers, device).to(device, non_blocking=True)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, made when the device comes to it: whatever follows on this stream may write over the original."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    copy_parts(copy, tensor)
    return copy


def copy_parts(to: Tensor, tensor: Tensor) -> None:
    """Copy between pinned memory and device, waiting for nothing; of much that is not contiguous part by part, which are: torch
    would first copy all of it on the device, where there may be no memory for that."""
    whole = to.nbytes <= LITTLE or (to.is_contiguous() and tensor.is_contiguous())
    for to_part, part in [(to, tensor)] if whole else zip(to, tensor, strict=True):
        to_part.copy_(part, non_blocking=True)


@functools.cache
def side_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """A device's, for all caches: torch has 32 streams and then hands them out again."""
    return tuple(torch.cuda.Stream(device) for _ in range(SIDE_STREAMS))  # type: ignore[no-untyped-call]


class Streams:
    """Work of layers that do not depend on one another; here one after another."""

    def each(self, layers: int, work: Callable[[int], None]) -> None:
        """``work(layer)`` for each of ``layers`` layers; what comes after on the current stream comes after all of it."""
        for layer in range(layers):
            work(layer)


class SideStreams(Streams):
    """Layers beside each other: for kernels too small to fill the device.

    The first time they run on the current stream one after another, which compiles kernels and makes the tables that layers
    share. Layers must share nothing else that they write.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._sides, self._is_warm = device, side_streams(device), False

    def each(self, layers: int, work: Callable[[int], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        used = self._sides if self._is_warm else (current,)
        for stream in used:
            stream.wait_stream(current)
        try:
            for layer in range(layers):
                with torch.cuda.stream(used[layer % len(used)]):
                    work(layer)
        finally:
            for stream in used:
                current.wait_stream(stream)
        self._is_warm = True


def streams_of(device: torch.device) -> Streams:
    """Side streams on a GPU; on a CPU one layer after another."""
    return SideStreams(device) if device.type == "cuda" else Streams()
