"""A head's numbers to codes chosen together (``reference.quantize_lattice``), LANES tokens at once: a token is a SIMD lane.

Every array here is [rows][LANES] float32, so each step of the inherently sequential algorithm is one vector operation per
channel, about 12 D^2 multiply-adds a token in all.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import e4m3
from skvq.kernels.numba_cpu.quantizer import E4M3_MIN, e4m3_encode
from skvq.kernels.numba_cpu.simd import add_outer, f32, i32, mix_1
from skvq.kernels.numba_cpu.tiles import FAST

LATTICE_FITS, LATTICE_ROUNDS, LATTICE_SWEEPS = 2, 2, 2  # reference.LATTICE_*
LANES = 32
ROW = 4 * LANES  # bytes of a row


def lattice_bytes(size, groups):
    """Workspace of ``quantize_lattice``: y, codes, errors and slopes, then scale and mid of each group, then sums."""
    return 4 * LANES * (4 * size + 2 * groups + 8)


@njit(**FAST)
def fit_range(y, count, levels, clip, tiny, scale, mid, sums):
    """Scale and mid [LANES] of ``count`` rows at ``y``: the clipped range, then plain least squares."""
    top, half = np.float32(levels - 1), np.float32((levels - 1) * 0.5)
    n, scale, mid = np.float32(count), f32(scale), f32(mid)
    mean, a, b, c = f32(sums), f32(sums + ROW), f32(sums + 2 * ROW), f32(sums + 3 * ROW)
    for t in range(LANES):
        a[t], b[t], mean[t] = np.float32(np.inf), np.float32(-np.inf), np.float32(0)
    for i in range(count):
        x = f32(y + i * ROW)
        for t in range(LANES):
            a[t], b[t] = min(a[t], x[t]), max(b[t], x[t])
            mean[t] += x[t]
    for t in range(LANES):
        low, high = a[t] * clip, b[t] * clip
        scale[t], mid[t] = max((high - low) / top, tiny), (high + low) * np.float32(0.5)
        mean[t] /= n
    for _ in range(LATTICE_FITS):
        for t in range(LANES):
            a[t], b[t], c[t] = np.float32(0), np.float32(0), np.float32(0)
        for i in range(count):
            x = f32(y + i * ROW)
            for t in range(LANES):
                code = min(max(np.rint((x[t] - mid[t]) / scale[t] + half), np.float32(0)), top) - half
                a[t] += code
                b[t] += code * code
                c[t] += code * (x[t] - mean[t])
        for t in range(LANES):
            code_mean = a[t] / n
            spread = b[t] - a[t] * code_mean
            fitted = max(c[t] / max(spread, np.float32(0.25)), tiny)
            scale[t] = fitted if spread > np.float32(0.25) else scale[t]  # two codes differ: at least 1/2
            mid[t] = mean[t] - scale[t] * code_mean


@njit(**FAST)
def slope_of(y, code, scale, mid, error, slope, metric, size, width):
    """``error = y - mid - scale * code`` and ``slope = metric error``."""
    for i in range(size):
        g = i // width * ROW
        x, c, e = f32(y + i * ROW), f32(code + i * ROW), f32(error + i * ROW)
        s, m = f32(scale + g), f32(mid + g)
        for t in range(LANES):
            e[t] = x[t] - m[t] - s[t] * c[t]
    for i in range(size):
        out = f32(slope + i * ROW)
        for t in range(LANES):
            out[t] = np.float32(0)
        mix_1(error, ROW, size, metric + 4 * i * size, 0, slope + i * ROW, 0)


@njit(**FAST)
def descend(code, slope, scale, metric, size, width, half, sums):
    """Sweeps of coordinate descent over centred codes; ``slope`` follows."""
    step = f32(sums)
    for _ in range(LATTICE_SWEEPS):
        for i in range(size):
            row = f32(metric + 4 * i * size)
            c, x, s = f32(code + i * ROW), f32(slope + i * ROW), f32(scale + i // width * ROW)
            inverse, moves = np.float32(1) / row[i], np.float32(0)
            for t in range(LANES):
                moved = min(max(np.rint(c[t] + x[t] * inverse / s[t] + half), np.float32(0)), half + half) - half
                step[t] = (c[t] - moved) * s[t]
                moves += abs(step[t])
                c[t] = moved
            if moves > np.float32(0):
                add_outer(sums, metric + 4 * i * size, size, slope, ROW)


@njit(**FAST)
def fit_metric(code, slope, scale, mid, metric, tiny, size, width, turned, sums):
    """Least squares in the metric of scale and mid, group after group; ``slope`` follows. ``turned`` is room for a row."""
    cc, c1, cs, s1, turn = f32(sums), f32(sums + ROW), f32(sums + 2 * ROW), f32(sums + 3 * ROW), f32(turned)
    for g in range(size // width):
        one = np.float32(0)
        for t in range(LANES):
            cc[t], c1[t], cs[t], s1[t] = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(g * width, (g + 1) * width):
            row = f32(metric + 4 * (i * size + g * width))
            total = np.float32(0)
            for j in range(width):
                total += row[j]
            one += total
            for t in range(LANES):
                turn[t] = np.float32(0)
            mix_1(code + g * width * ROW, ROW, width, metric + 4 * (i * size + g * width), 0, turned, 0)
            c, x = f32(code + i * ROW), f32(slope + i * ROW)
            for t in range(LANES):
                cc[t] += c[t] * turn[t]
                c1[t] += c[t] * total
                cs[t] += c[t] * x[t]
                s1[t] += x[t]
        s, m = f32(scale + g * ROW), f32(mid + g * ROW)
        for t in range(LANES):
            determinant = cc[t] * one - c1[t] * c1[t]
            good = determinant > np.float32(1e-6) * cc[t] * one
            step = (cs[t] * one - s1[t] * c1[t]) / (determinant if good else np.float32(1))
            good = good and s[t] + step > tiny[g]
            step = step if good else np.float32(0)
            move = (s1[t] - step * c1[t]) / one if good else np.float32(0)
            s[t] += step
            m[t] += move
            cc[t], c1[t] = step, move
        for i in range(g * width, (g + 1) * width):
            c = f32(code + i * ROW)
            for t in range(LANES):
                turn[t] = -c1[t] - cc[t] * c[t]
            add_outer(turned, metric + 4 * i * size, size, slope, ROW)


@njit(**FAST)
def nearest_plane(y, code, error, scale, mid, factor, size, width, half, sums):
    """Centred codes from the last channel to the first, each making up for the errors of those before."""
    wanted = f32(sums)
    for i in range(size - 1, -1, -1):
        g, x, c, e = i // width * ROW, f32(y + i * ROW), f32(code + i * ROW), f32(error + i * ROW)
        s, m = f32(scale + g), f32(mid + g)
        for t in range(LANES):
            wanted[t] = x[t] - m[t]
        mix_1(error + (i + 1) * ROW, ROW, size - 1 - i, factor + 4 * (i * size + i + 1), 0, sums, 0)
        for t in range(LANES):
            moved = min(max(np.rint(wanted[t] / s[t] + half), np.float32(0)), half + half) - half
            c[t] = moved
            e[t] = x[t] - m[t] - s[t] * moved


@njit(**FAST)
def round_meta(code, slope, scale, mid, y, error, metric, units, size, width, words):
    """Scale and mid to E4M3, mid fitted to the rounded scale; bytes scale | mid << 8 to int32 ``words`` [G][LANES]."""
    for g in range(size // width):
        s, word = f32(scale + g * ROW), i32(words + g * ROW)
        for t in range(LANES):
            byte = e4m3_encode(s[t] / units[g])
            word[t] = byte
            s[t] = e4m3(byte) * units[g]
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    for g in range(size // width):
        stiffness = np.float32(0)
        for i in range(g * width, (g + 1) * width):
            row = f32(metric + 4 * (i * size + g * width))
            for j in range(width):
                stiffness += row[j]
        m, word = f32(mid + g * ROW), i32(words + g * ROW)
        for t in range(LANES):
            pull = np.float32(0)
            for i in range(g * width, (g + 1) * width):
                pull += f32(slope + i * ROW)[t]
            byte = e4m3_encode((m[t] + pull / stiffness) / units[g])
            word[t] |= byte << 8
            m[t] = e4m3(byte) * units[g]


@njit(**FAST)
def quantize_lattice(work, size, groups, levels, units, clips, metric, factor, words):
    """Centred codes of LANES tokens to the second array of ``work``, their metadata to int32 ``words`` [G][LANES].

    The first array of ``work``, [D][LANES], holds the numbers; units, clips [groups]; metric, factor [D, D] of this head.
    """
    width, half, rows = size // groups, np.float32((levels - 1) * 0.5), ROW * size
    y, code, error, slope = work, work + rows, work + 2 * rows, work + 3 * rows
    scale, mid, sums = work + 4 * rows, work + 4 * rows + groups * ROW, work + 4 * rows + 2 * groups * ROW
    tiny = f32(sums + 4 * ROW)
    for g in range(groups):
        tiny[g] = units[g] * E4M3_MIN
        fit_range(y + g * width * ROW, width, levels, clips[g], tiny[g], scale + g * ROW, mid + g * ROW, sums)
    nearest_plane(y, code, error, scale, mid, factor, size, width, half, sums)
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    for _ in range(LATTICE_ROUNDS):
        descend(code, slope, scale, metric, size, width, half, sums)
        fit_metric(code, slope, scale, mid, metric, tiny, size, width, error, sums)
    round_meta(code, slope, scale, mid, y, error, metric, units, size, width, words)
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    descend(code, slope, scale, metric, size, width, half, sums)
