"""Work of layers that do not depend on one another: one after another, or on a GPU several at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

SIDE_STREAMS = 4
"""Streams beside the current one. Each keeps memory of its own that it has once allocated."""


class Streams(Protocol):
    """Runs ``work(layer)`` for each of ``layers`` layers; what comes after it on the current stream comes after all of it."""

    def each(self, layers: int, work: Callable[[int], None]) -> None: ...


class OneStream:
    """Layer by layer."""

    def each(self, layers: int, work: Callable[[int], None]) -> None:
        for layer in range(layers):
            work(layer)


class SideStreams:
    """Layers beside each other: for kernels too small to fill the device.

    The first time they run on the current stream one after another, which compiles kernels and makes the tables that layers
    share. Layers must share nothing else that they write.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sides: list[torch.cuda.Stream] = [torch.cuda.Stream(device) for _ in range(SIDE_STREAMS)]  # type: ignore[no-untyped-call]
        self._is_warm = False

    def each(self, layers: int, work: Callable[[int], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        used = self._sides if self._is_warm else [current]
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
    """Those that go with a device."""
    return SideStreams(device) if device.type == "cuda" else OneStream()
