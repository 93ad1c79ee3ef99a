"""``rotate``: subtract what does not depend on the token, spread the rest over all channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.calibrate.clip import fit_unit, sample, search_clip, squared_error
from skvq.calibrate.stats import LayerStats
from skvq.engine.config import CacheConfig


def spread_matrix(size: int) -> Tensor:
    """Orthogonal matrix that spreads every channel over all: Hadamard for powers of two, else a seeded random rotation.

    float64 [size, size].
    """
    if size & (size - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h.div(size**0.5)
    generator = torch.Generator().manual_seed(0)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return torch.mul(q, torch.sign(torch.diagonal(r)))


def fit_rotate(stats: LayerStats, turn: torch.Tensor, config: CacheConfig) -> dict[str, Tensor]:
    """Tensors of one layer (``engine.codecs``). ``turn`` [S, T, KH, D] is the key mean turned by every position."""
    heads, size = stats.keys.shape[2:]
    basis = spread_matrix(size).float().to(stats.keys.device).expand(heads, size, size).contiguous()
    value_mean = stats.values.flatten(0, 1).mean(0)
    tensors = {"key_basis": basis, "value_basis": basis, "value_mean": value_mean}
    sides = (
        ("key", stats.turned_keys - turn, config.key_bits),
        ("value", stats.values - value_mean, config.value_bits),
    )
    for side, x, bits in sides:
        y = torch.einsum("hij,sthj->sthi", basis, x).flatten(0, 1)  # [S * T, KH, D]
        y = y.view(*y.shape[:2], -1, config.group_size)  # [S * T, KH, G, g]
        unit = fit_unit(y)
        tensors[f"{side}_unit"] = unit
        tensors[f"{side}_clip"] = search_clip(sample(y), bits, unit, squared_error(sample(y)))
    return tensors
