"""Tables of RoPE within a tile, with angles relative to its centre, for ``mean.py`` and ``labels.py``."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skvq.kernels.interface import RopeFrequencies

SLOW_ANGLE = 5.0
TERMS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTables:
    """Tables of one codec and tile length. Each kv head lists F fast pairs of channels, then S slow ones (``SLOW_ANGLE``).

    frequencies float64 [D/2]; pairs int32 [KH, 2 + D/2]: F, S, then the pairs, fast first; cos and sin float32 [D/2, tile],
    around the centre; rows float32 [KH, D + 16, tile]: cosines and sines of F pairs, T_0, T_2, ..., T_1, T_3, ...; series
    float32 [KH, D, 32]: coefficients of S cosines, of S sines, in that order of terms.
    """

    arrays: dict[str, np.ndarray[Any, Any]]
    fields: tuple[int, ...]  # job.TABLE_FIELDS


def _tables(rope: RopeFrequencies, arrays: dict[str, np.ndarray[Any, Any]]) -> TurnTables:
    names = ("frequencies", "pairs", "cos", "sin", "rows", "series")
    (scale,) = struct.unpack("q", struct.pack("d", rope.scale))
    return TurnTables(arrays=arrays, fields=(scale, *(arrays[name].ctypes.data for name in names)))


def mean_tables(rope: RopeFrequencies, key_mean: Tensor, tile: int) -> TurnTables:
    """Tables for the pairs of ``key_mean`` [KH, D] that are not zero."""
    frequencies = rope.inv_freq.double().numpy()
    u = (np.arange(tile) - (tile - 1) / 2) / ((tile - 1) / 2)
    edge = frequencies * (tile - 1) / 2
    cos, sin = np.cos(edge[:, None] * u), np.sin(edge[:, None] * u)
    slow = edge <= SLOW_ANGLE
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    fit = np.polynomial.chebyshev.chebvander(nodes, TERMS - 1) * (2 / 64)
    fit[:, 0] /= 2
    angles = np.where(slow, edge, 0)[:, None] * nodes
    basis = np.polynomial.chebyshev.chebvander(u, TERMS - 1).T
    mean = key_mean.float().numpy()
    half = mean.shape[1] // 2
    active = (mean[:, :half] != 0) | (mean[:, half:] != 0)
    pairs = np.zeros((len(mean), 2 + half), np.int32)
    rows = np.zeros((len(mean), 2 * half + TERMS, tile), np.float32)
    series = np.zeros((len(mean), 2 * half, 32), np.float32)
    for head, used in enumerate(active):
        fast_pairs, slow_pairs = np.flatnonzero(used & ~slow), np.flatnonzero(used & slow)
        f, s = len(fast_pairs), len(slow_pairs)
        pairs[head, :2] = f, s
        pairs[head, 2 : 2 + f + s] = np.concatenate([fast_pairs, slow_pairs])
        rows[head, : 2 * f + TERMS] = np.concatenate([cos[fast_pairs], sin[fast_pairs], basis[0::2], basis[1::2]])
        series[head, :s, :8] = np.cos(angles[slow_pairs]) @ fit[:, 0::2]
        series[head, s : 2 * s, 8:16] = np.sin(angles[slow_pairs]) @ fit[:, 1::2]
    arrays = {"pairs": pairs, "frequencies": np.ascontiguousarray(frequencies), "rows": rows, "series": series}
    return _tables(rope, arrays | {"cos": cos.astype(np.float32), "sin": sin.astype(np.float32)})


def all_turns(rope: RopeFrequencies, size: int, tile: int) -> TurnTables:
    """Tables that list every pair in order, all as fast: ``labels.py`` turns each key pair by pair."""
    found = mean_tables(rope, torch.ones(1, size, dtype=torch.float32), tile)
    return _tables(rope, found.arrays | {"pairs": np.array([size // 2, 0, *range(size // 2)], np.int32)})
