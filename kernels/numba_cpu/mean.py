"""The key mean's share of a score, ``q . RoPE_t(mu)``, for all tokens of a tile at once.

A pair of channels adds ``A cos(t w) + B sin(t w)`` with ``A = q1 m1 + q2 m2, B = q2 m1 - q1 m2``. Once a tile, (A, B) are turned to the
tile's centre; inside the tile a fast pair adds two table rows. All slow pairs together (at most SLOW_ANGLE between the centre
and the edge) are one Chebyshev series of 16 terms: cosines fill the even ones, sines the odd ones. Pairs whose mean is zero
are not listed and cost nothing.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from torch import Tensor

from skvq.kernels.interface import RopeFrequencies
from skvq.kernels.numba_cpu.simd import f32, f64, i32
from skvq.kernels.numba_cpu.tiles import FAST

SLOW_ANGLE = 5.0
TERMS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanTables:
    """Tables of one codec and tile length."""

    pairs: np.ndarray  # int32 [KH, 2 + D/2]: fast pairs, slow pairs, then the pairs, fast first
    frequencies: np.ndarray  # float64 [D/2]
    cos: np.ndarray  # float32 [D/2, tile], around the centre
    sin: np.ndarray
    even: np.ndarray  # float32 [D/2, 8], coefficients of T_0, T_2, ...
    odd: np.ndarray  # float32 [D/2, 8], of T_1, T_3, ...
    chebyshev: np.ndarray  # float32 [16, tile]: T_0, T_2, ..., then T_1, T_3, ...


def mean_tables(rope: RopeFrequencies, key_mean: Tensor, tile: int) -> MeanTables:
    """Tables for the pairs of ``key_mean`` [KH, D] that are not zero."""
    frequencies = rope.inv_freq.double().numpy()
    u = (np.arange(tile) - (tile - 1) / 2) / ((tile - 1) / 2)
    edge = frequencies * (tile - 1) / 2
    slow = edge <= SLOW_ANGLE
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    fit = np.polynomial.chebyshev.chebvander(nodes, TERMS - 1) * (2 / 64)
    fit[:, 0] /= 2
    angles = np.where(slow, edge, 0)[:, None] * nodes
    even, odd = np.cos(angles) @ fit[:, 0::2], np.sin(angles) @ fit[:, 1::2]
    basis = np.polynomial.chebyshev.chebvander(u, TERMS - 1).T
    mean = key_mean.float().numpy()
    half = mean.shape[1] // 2
    active = (mean[:, :half] != 0) | (mean[:, half:] != 0)
    pairs = np.zeros((len(mean), 2 + half), np.int32)
    for head, used in enumerate(active):
        fast_pairs, slow_pairs = np.flatnonzero(used & ~slow), np.flatnonzero(used & slow)
        pairs[head, :2] = len(fast_pairs), len(slow_pairs)
        pairs[head, 2 : 2 + len(fast_pairs) + len(slow_pairs)] = np.concatenate([fast_pairs, slow_pairs])

    def single(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32)

    return MeanTables(
        pairs=pairs,
        frequencies=np.ascontiguousarray(frequencies),
        cos=single(np.cos(edge[:, None] * u)),
        sin=single(np.sin(edge[:, None] * u)),
        even=single(even),
        odd=single(odd),
        chebyshev=single(np.concatenate([basis[0::2], basis[1::2]])),
    )


@njit(**FAST)
def mean_prepare(job, work, head, rows, tile_number):
    """(A, B) ``[row][pair][2]`` at ``w_mean`` and rotors ``[pair][cos, sin, step cos, step sin]``; returns the pairs."""
    if not job.mean:
        return 0
    half, size = job.size // 2, job.size
    listed = i32(job.mean_pairs + 4 * head * (2 + half))
    count = np.int64(listed[0] + listed[1])
    mean, frequency = f32(job.mean + 4 * head * size), f64(job.inv_freq)
    rotor = f64(work + job.w_rotor)
    centre = tile_number * job.tile + (job.tile - 1) * 0.5
    scale = np.float32(job.rope_scale)
    for i in range(count):
        pair = listed[2 + i]
        rotor[4 * i] = np.cos(centre * frequency[pair])
        rotor[4 * i + 1] = np.sin(centre * frequency[pair])
        rotor[4 * i + 2] = np.cos(job.tile * frequency[pair])
        rotor[4 * i + 3] = np.sin(job.tile * frequency[pair])
        m1, m2 = mean[pair] * scale, mean[half + pair] * scale
        for m in range(rows):
            q = f32(work + job.w_q + 4 * m * size)
            ab = f32(work + job.w_mean + 8 * (m * half + i))
            ab[0] = q[pair] * m1 + q[half + pair] * m2
            ab[1] = q[half + pair] * m1 - q[pair] * m2
    return count


@njit(**FAST)
def mean_scores(job, work, head, rows):
    """Add the mean's share to the scores of the tile the rotors stand at."""
    half, tile = job.size // 2, job.tile
    listed = i32(job.mean_pairs + 4 * head * (2 + half))
    fast, count = np.int64(listed[0]), np.int64(listed[0] + listed[1])
    rotor = f64(work + job.w_rotor)
    series = f32(work + job.w_row)
    for m in range(rows):
        ab = f32(work + job.w_mean + 8 * m * half)
        s = f32(work + job.w_scores + 4 * m * tile)
        for i in range(fast):
            c, d = np.float32(rotor[4 * i]), np.float32(rotor[4 * i + 1])
            a, b = ab[2 * i] * c + ab[2 * i + 1] * d, ab[2 * i + 1] * c - ab[2 * i] * d
            cos, sin = f32(job.turn_cos + 4 * tile * listed[2 + i]), f32(job.turn_sin + 4 * tile * listed[2 + i])
            for t in range(tile):
                s[t] += a * cos[t] + b * sin[t]
        for k in range(TERMS):
            series[k] = np.float32(0)
        for i in range(fast, count):
            c, d = np.float32(rotor[4 * i]), np.float32(rotor[4 * i + 1])
            a, b = ab[2 * i] * c + ab[2 * i + 1] * d, ab[2 * i + 1] * c - ab[2 * i] * d
            even, odd = f32(job.even + 32 * listed[2 + i]), f32(job.odd + 32 * listed[2 + i])
            for k in range(8):
                series[k] += a * even[k]
            for k in range(8):
                series[8 + k] += b * odd[k]
        if count > fast:
            for k in range(TERMS):
                term, x = f32(job.chebyshev + 4 * tile * k), series[k]
                for t in range(tile):
                    s[t] += x * term[t]


@njit(**FAST)
def mean_step(work_rotor, pairs):
    """Turn the rotors on by one tile."""
    rotor = f64(work_rotor)
    for i in range(pairs):
        c, d, x, y = rotor[4 * i], rotor[4 * i + 1], rotor[4 * i + 2], rotor[4 * i + 3]
        rotor[4 * i] = c * x - d * y
        rotor[4 * i + 1] = d * x + c * y
