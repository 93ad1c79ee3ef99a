"""The key mean's share of a score, ``q . RoPE_t(mu)``, for all tokens of a tile at once.

A pair of channels adds ``A cos(t w) + B sin(t w)`` with ``A = q1 m1 + q2 m2, B = q2 m1 - q1 m2``. Once a tile, (A, B) are
turned to the tile's centre; inside the tile a fast pair adds two table rows. All slow pairs (``turns.SLOW_ANGLE``) together are
one Chebyshev series of 16 terms: cosines fill the even ones, sines the odd ones. Pairs whose mean is zero are not listed
and cost nothing.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.products import mix
from skvq.kernels.numba_cpu.simd import f32, f64, i32
from skvq.kernels.numba_cpu.tiles import FAST
from skvq.kernels.numba_cpu.turns import TERMS


@njit(**FAST)
def start_rotors(job, work, pairs, count, tile_number):
    """Write float64 rotors ``[4][D / 2]`` of the pairs listed: cos, sin at the tile's centre; cos, sin of one tile's step."""
    half = job.size // 2
    frequency, rotor = f64(job.inv_freq), f64(work + job.w_rotor)
    centre = tile_number * job.tile + (job.tile - 1) * 0.5
    for i in range(count):
        w = frequency[pairs[i]]
        rotor[i], rotor[half + i] = np.cos(centre * w), np.sin(centre * w)
        rotor[2 * half + i], rotor[3 * half + i] = np.cos(job.tile * w), np.sin(job.tile * w)


@njit(**FAST)
def turn_rotors(job, work, count):
    """Advance the rotors to the next tile."""
    half = job.size // 2
    cos, sin = f64(work + job.w_rotor), f64(work + job.w_rotor + 8 * half)
    x, y = f64(work + job.w_rotor + 16 * half), f64(work + job.w_rotor + 24 * half)
    for i in range(count):
        c, d = cos[i], sin[i]
        cos[i] = c * x[i] - d * y[i]
        sin[i] = d * x[i] + c * y[i]


@njit(**FAST)
def mean_prepare(job, work, head, rows, tile_number):
    """Write (A, B) of each query, ``[row][2][D / 2]``, to ``w_mean``, and start the rotors. Returns the number of pairs."""
    if not job.mean:
        return 0
    half, size = job.size // 2, job.size
    listed = i32(job.mean_pairs + 4 * head * (2 + half))
    count = np.int64(listed[0] + listed[1])
    pairs = i32(job.mean_pairs + 4 * head * (2 + half) + 8)
    start_rotors(job, work, pairs, count, tile_number)
    mean, scale = f32(job.mean + 4 * head * size), np.float32(job.rope_scale)
    for m in range(rows):
        q = f32(work + job.w_q + 4 * m * size)
        ab = f32(work + job.w_mean + 4 * m * size)
        for i in range(count):
            pair = pairs[i]
            m1, m2 = mean[pair] * scale, mean[half + pair] * scale
            ab[i] = q[pair] * m1 + q[half + pair] * m2
            ab[half + i] = q[half + pair] * m1 - q[pair] * m2
    return count


@njit(**FAST)
def mean_scores(job, work, head, rows):
    """Add the mean's share to the scores of the tile that the rotors have reached."""
    half, tile, size = job.size // 2, job.tile, job.size
    listed = i32(job.mean_pairs + 4 * head * (2 + half))
    fast, slow = np.int64(listed[0]), np.int64(listed[1])
    cos, sin = f64(work + job.w_rotor), f64(work + job.w_rotor + 8 * half)
    turned = work + job.w_dots  # [row][2 F + 32 | 2 S]: coefficients of the fast rows, of the terms, and of the slow pairs
    stride = 4 * (size + 32)
    for m in range(rows):
        a, b = f32(work + job.w_mean + 4 * m * size), f32(work + job.w_mean + 4 * (m * size + half))
        x = f32(turned + m * stride)
        for i in range(fast):
            c, d = np.float32(cos[i]), np.float32(sin[i])
            x[i] = a[i] * c + b[i] * d
            x[fast + i] = b[i] * c - a[i] * d
        for i in range(32):
            x[2 * fast + i] = np.float32(0)
        x = f32(turned + m * stride + 4 * (fast + 32))
        for i in range(fast, fast + slow):
            c, d = np.float32(cos[i]), np.float32(sin[i])
            x[i] = a[i] * c + b[i] * d
            x[slow + i] = b[i] * c - a[i] * d
    terms = turned + 8 * fast
    if slow > 0:
        mix(rows, job.mean_series + 128 * head * size, 128, 2 * slow, terms + 128, stride, terms, stride, 32)
    count = 2 * fast + (TERMS if slow > 0 else 0)
    mix(
        rows,
        job.mean_rows + 4 * tile * head * (size + TERMS),
        4 * tile,
        count,
        turned,
        stride,
        work + job.w_scores,
        4 * tile,
        tile,
    )
