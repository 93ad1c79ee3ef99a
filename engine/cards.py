"""Limits of devices that a plan is made for: known cards, and this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from skvq.engine.errors import OptionError
from skvq.engine.guard import own_settings
from skvq.engine.machine import DTYPES, available_memory, pick_device, pick_dtype, pinnable_memory
from skvq.engine.measure import timed
from skvq.kernels.dense import attend_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Limits of a device: usable bytes, bytes per second of a copy, multiply-adds per second of matrix work.

    Efficiencies are the share of those limits that the engine is expected to reach; assumptions until measured on that card.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    dtype: torch.dtype
    host_memory: int = 0  # that may be pinned for it
    host_bandwidth: float = 2e10  # bytes per second of a copy between the two: PCIe 4 with 16 lanes, less what it loses
    weight_efficiency: float = 0.75
    cache_efficiency: float = 0.80
    matrix_efficiency: float = 0.60


GIB = 2**30
ASSUMED, OF_H200 = (0.75, 0.80, 0.60), (0.92, 0.57, 0.65)
"""Efficiencies of weights, cache and matrices. The H200's are measured (``benchmarks/results``): packed attention is slower
than its memory."""
OF_BLOCKS = 0.6
"""Efficiency of weights in quantized blocks on a card, at most. An assumption: by its instructions their product keeps up with
the memory of an A100 or an H100, and with nine tenths of an H200's (``benchmarks/results/sass.json``)."""
OF_CPU_CACHE, OF_CPU_MATRICES = 0.28, 0.85
"""Measured on a CPU (``benchmarks/results/attention_cpu.json``, ``peers_cpu.json``), where packed attention is arithmetic, and
all of prefill runs at about the speed of dense attention."""

CARDS = {
    name: Machine(
        name=name, memory=int(gib_ * GIB), bandwidth=speed, flops=flops, dtype=torch.bfloat16, host_memory=host * GIB,
        weight_efficiency=of_weights, cache_efficiency=of_cache, matrix_efficiency=of_matrices,
    )
    for name, gib_, speed, flops, host, (of_weights, of_cache, of_matrices) in (
        ("a100", 79.1, 1.9e12, 312e12, 128, ASSUMED),
        ("a100-40", 39.4, 1.4e12, 312e12, 128, ASSUMED),
        ("h100", 79.1, 3.0e12, 800e12, 128, ASSUMED),
        ("h200", 139.8, 4.3e12, 800e12, 128, OF_H200),
        ("l40s", 44.4, 0.80e12, 362e12, 64, ASSUMED),
        ("3090", 23.5, 0.87e12, 71e12, 32, ASSUMED),
        ("4090", 23.5, 0.95e12, 165e12, 32, ASSUMED),
    )
}  # fmt: skip
"""Host memory is an assumption throughout: what a host of such a card has to spare."""


def this_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Limits of the device at hand: its memory, and a copy and a matrix product timed now (well under a second); on a CPU in
    float32 dense attention, for its kernels are ours and torch's products are slower on some (the first time it is compiled).
    """
    memory = available_memory(device)
    with own_settings(device):
        size = 1 << (28 if device.type == "cuda" else 27)  # more than caches hold
        a, b = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
        copy_seconds = min(timed(lambda: b.copy_(a), device, 5))
        on_cpu = device.type == "cpu"
        if on_cpu and dtype == torch.float32:
            count, tokens, heads, head_size = 512, 1024, 8, 64
            q, (k, v) = torch.randn(count, heads, head_size), torch.randn(2, heads, tokens, head_size)
            flops = 4 * count * tokens * heads * head_size / min(timed(lambda: attend_all(q, k, v), device, 5))
        else:
            side = 256 if on_cpu else 8192  # a CPU takes its time for 16 bits
            m = torch.randn(side, side, dtype=dtype, device=device)
            flops = 2 * side**3 / min(timed(lambda: m @ m, device, 5))
    return Machine(
        name=str(device),
        memory=memory,
        bandwidth=2 * size / copy_seconds,
        flops=flops,
        dtype=dtype,
        host_memory=pinnable_memory(device),
        cache_efficiency=OF_CPU_CACHE if on_cpu else ASSUMED[1],
        matrix_efficiency=OF_CPU_MATRICES if on_cpu and dtype == torch.float32 else ASSUMED[2],
    )


def card_of(device: str, dtype: str | None) -> Machine:
    device = device.lower()
    if device in CARDS:
        card = CARDS[device]
    elif device == "auto" or device.split(":")[0] in ("cpu", "cuda"):
        here = pick_device(device)
        card = this_machine(here, pick_dtype(dtype or "auto", here))
    else:
        raise OptionError(
            f"unknown device {device!r}; known: {', '.join([*CARDS, 'auto', 'cpu', 'cuda'])}; for another card name the one "
            "most like it and give --memory, such as 24GB"
        )
    return card if dtype is None else replace(card, dtype=DTYPES[dtype])
