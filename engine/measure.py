"""Measuring: times of calls, what this machine can do at most, what it is called."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def timed(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds of each of ``count`` calls, a GPU waited for."""
    wait: Callable[[torch.device], None] = _synchronize if device.type == "cuda" else _ready
    wait(device)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return times


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _ready(device: torch.device) -> None:
    """A CPU is done when the call is."""


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 256 MiB, the best of several: the ceiling of whatever reads memory."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
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
    return f"{next(found, platform.processor())}, {torch.get_num_threads()} threads"
