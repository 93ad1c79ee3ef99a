"""Measuring: times of calls, this machine's limits, and its name."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from skvq.engine.errors import counted
from skvq.engine.machine import available_memory


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that this thread has given it. All of the device would break another thread's capture."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def timed(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds of each of ``count`` calls, as the device's clock has it, what the host takes included where the device waits."""
    if device.type != "cuda":
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times
    wait_for(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    wait_for(device)
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairwise(marks)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy far larger than any cache, the best of several: the ceiling of whatever reads
    memory."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.ones(min(size, available_memory(device) // 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(timed(lambda: target.copy_(source), device, 10))


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held since ``reset_peak``: on the GPU, or in main memory (Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def reset_peak(device: torch.device) -> None:
    """Count the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    Path("/proc/self/clear_refs").write_text("5")


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(found, platform.processor())}, {counted(torch.get_num_threads(), 'thread')}"
