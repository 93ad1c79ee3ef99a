"""Units and clip factors: where the 8 bits of metadata lie, and how much of a group's range is worth covering."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skvq.kernels.interface import HeadSide
from skvq.kernels.layout import LEVELS
from skvq.kernels.reference import dequantize, e4m3_decode, quantize

LATTICE_GRID, LATTICE_SAMPLE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), 256
"""Clip factors, and tokens, tried where codes are chosen together: the fit that follows leaves little to the start."""

CLIP_GRID = tuple(round(0.30 + 0.05 * i, 2) for i in range(15))
"""Clip factors tried, 0.30 to 1.00."""

SAMPLE_TOKENS = 1024
"""Tokens on which clip factors are searched."""

UNIT_TOP = 128.0
"""Metadata seen in calibration stay below this many units; E4M3 ends at 448, so larger tokens still fit."""


def fit_unit(top: Tensor) -> Tensor:
    """Power of two per group such that its largest magnitude ``top`` [...] is about UNIT_TOP units; float32 [...]."""
    return torch.exp2(torch.ceil(torch.log2(top.clamp_min(1e-20) / UNIT_TOP))).clamp(2.0**-60, 2.0**60)


def round_trip(y: Tensor, bits: float, unit: Tensor, clip: Tensor) -> Tensor:
    """``y`` [..., g] quantized and back, as the pages would hold it."""
    codes, scale, mid = quantize(y, LEVELS[bits], unit, clip)
    return dequantize(codes, e4m3_decode(scale) * unit, e4m3_decode(mid) * unit, LEVELS[bits])


def sample(y: Tensor) -> Tensor:
    """Evenly spaced tokens of ``y`` [T, ...], about SAMPLE_TOKENS of them."""
    return y[:: max(1, len(y) // SAMPLE_TOKENS)]


def search_clip(y: Tensor, bits: float, unit: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """Clip factor per group of ``y`` [T, ..., g] that minimizes ``error(y rounded)`` [...]; float32 [...]."""
    best = torch.full(unit.shape, torch.inf, dtype=torch.float32, device=y.device)
    chosen = torch.ones_like(unit)
    for factor in CLIP_GRID:
        found = error(round_trip(y, bits, unit, torch.full_like(unit, factor)))
        better = found < best
        best = torch.where(better, found, best)
        chosen = torch.where(better, factor, chosen)
    return chosen


def search_lattice_clip(x: Tensor, side: HeadSide, store: Callable[[Tensor, HeadSide], Tensor]) -> Tensor:
    """Clip factor per head of ``x`` [T, KH, D] that minimizes the error in the side's metric; float32 [KH, G].

    ``store(x, side)`` is what pages hold of x.
    """
    x = x[:: max(1, len(x) // LATTICE_SAMPLE)]
    heads, count = x.shape[1], len(LATTICE_GRID)
    # all factors at once, each as heads of its own
    grid = torch.tensor(LATTICE_GRID, dtype=torch.float32, device=x.device).repeat_interleave(heads)
    tried = HeadSide(
        unit=side.unit.repeat(count, 1),
        clip=grid[:, None].expand(-1, side.unit.shape[1]).contiguous(),
        metric=side.metric.repeat(count, 1, 1),
        factor=side.factor.repeat(count, 1, 1),
        has_metric=side.has_metric,
    )
    rows = x.repeat(1, count, 1)
    error = store(rows, tried) - rows
    found = torch.einsum("thi,hij,thj->h", error, tried.metric, error).view(count, heads)
    least = (found == found.amin(0)).int().argmax(0)  # the first of equals
    return grid[least * heads][:, None].expand_as(side.unit).contiguous()


def weighted_error(y: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean squared error by group against ``y`` [T, ..., g], channels counting by ``weight`` [g]."""
    return lambda rounded: (weight * (rounded - y).square()).mean((0, -1))
