"""``reference.quantize_lattice`` for LANES tokens at once, one token per SIMD lane.

Every array here is [rows][LANES] float32, so each step of the inherently sequential algorithm is one vector operation per
channel, about 12 D^2 multiply-adds a token in all.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import e4m3
from skvq.kernels.numba_cpu.products import add_outer, mix, mix_1
from skvq.kernels.numba_cpu.quantizer import E4M3_MIN, e4m3_encode
from skvq.kernels.numba_cpu.simd import f32, i32
from skvq.kernels.numba_cpu.tiles import FAST, round_up

LATTICE_FITS, LATTICE_ROUNDS, LATTICE_SWEEPS = 2, 2, 2  # reference.LATTICE_*; copied (``compiled.source_stamp``)
LANES = 32
ROW = 4 * LANES  # bytes of a row
BLOCK = 16  # rows whose effect on all others is applied at once, as a matrix product


def lattice_bytes(size: int, groups: int) -> int:
    """Bytes that ``quantize_lattice`` needs at ``work``: y, codes, errors, slopes, scales, mids, sums and a block of rows."""
    return ROW * (4 * size + 2 * groups + 4 + BLOCK) + 4 * groups + 64


@njit(**FAST)
def fit_range(y, count, levels, clip, tiny, scale, mid, sums):
    """Scale and mid [LANES] of ``count`` rows at ``y``: the clipped range, then plain least squares."""
    top, half = np.float32(levels - 1), np.float32((levels - 1) * 0.5)
    n, scale, mid = np.float32(count), f32(scale), f32(mid)
    mean, a, b, c = f32(sums), f32(sums + ROW), f32(sums + 2 * ROW), f32(sums + 3 * ROW)
    for t in range(LANES):
        a[t], b[t], mean[t] = f32(y)[t], f32(y)[t], np.float32(0)
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
def clear(out, rows):
    numbers = f32(out)
    for i in range(rows * LANES):
        numbers[i] = np.float32(0)


@njit(**FAST)
def slope_of(y, code, scale, mid, error, slope, metric, size, width):
    """``error = y - mid - scale * code`` and ``slope = metric error``."""
    for i in range(size):
        g = i // width * ROW
        x, c, e = f32(y + i * ROW), f32(code + i * ROW), f32(error + i * ROW)
        s, m = f32(scale + g), f32(mid + g)
        for t in range(LANES):
            e[t] = x[t] - m[t] - s[t] * c[t]
    clear(slope, size)
    mix(size, error, ROW, size, metric, 4 * size, slope, ROW, LANES)


@njit(**FAST)
def descend(code, slope, scale, metric, size, width, half, steps):
    """Sweeps of coordinate descent over centred codes. ``slope`` is kept up to date: inside a block of BLOCK rows after every
    step, outside it once the block is done.

    ``steps`` is scratch of BLOCK rows.
    """
    whole = round_up(size, BLOCK)
    for start in range(0, LATTICE_SWEEPS * whole, BLOCK):
        first = start % whole
        count, moves = min(BLOCK, size - first), np.float32(0)
        for i in range(first, first + count):
            here = 4 * (i * size + first)
            c, x, s, step = (
                f32(code + i * ROW),
                f32(slope + i * ROW),
                f32(scale + i // width * ROW),
                f32(steps + (i - first) * ROW),
            )
            inverse, moved = np.float32(1) / f32(metric + 4 * i * size)[i], np.float32(0)
            for t in range(LANES):
                wanted = min(max(np.rint(c[t] + x[t] * inverse / s[t] + half), np.float32(0)), half + half) - half
                step[t] = (c[t] - wanted) * s[t]
                moved += abs(step[t])
                c[t] = wanted
            if moved > np.float32(0):
                add_outer(steps + (i - first) * ROW, metric + here, count, slope + first * ROW, ROW)
            moves += moved
        if moves > np.float32(0):
            after = first + count
            mix(first, steps, ROW, count, metric + 4 * first, 4 * size, slope, ROW, LANES)
            mix(size - after, steps, ROW, count, metric + 4 * (after * size + first), 4 * size, slope + after * ROW, ROW, LANES)


@njit(**FAST)
def fit_metric(code, slope, scale, mid, metric, tiny, size, width, turned, sums):
    """Fit scale and mid of one group after another by least squares in the metric, and keep ``slope`` up to date.

    ``turned`` is scratch of D / G rows.
    """
    cc, c1, cs, s1 = f32(sums), f32(sums + ROW), f32(sums + 2 * ROW), f32(sums + 3 * ROW)
    for g in range(size // width):
        one, block = np.float32(0), metric + 4 * g * width * (size + 1)
        clear(turned, width)
        mix(width, code + g * width * ROW, ROW, width, block, 4 * size, turned, ROW, LANES)
        for t in range(LANES):
            cc[t], c1[t], cs[t], s1[t] = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(g * width, (g + 1) * width):
            row = f32(metric + 4 * (i * size + g * width))
            total = np.float32(0)
            for j in range(width):
                total += row[j]
            one += total
            c, x, turn = f32(code + i * ROW), f32(slope + i * ROW), f32(turned + (i - g * width) * ROW)
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
            c, turn = f32(code + i * ROW), f32(turned + (i - g * width) * ROW)
            for t in range(LANES):
                turn[t] = -c1[t] - cc[t] * c[t]
        mix(size, turned, ROW, width, metric + 4 * g * width, 4 * size, slope, ROW, LANES)


@njit(**FAST)
def nearest_plane(y, code, error, scale, mid, factor, size, width, half, wanted):
    """Choose centred codes from the last channel to the first, each correcting for the errors of those already chosen.

    Errors of later blocks are applied to a block of rows all at once. ``wanted`` is scratch of BLOCK rows.
    """
    for first in range((size - 1) // BLOCK * BLOCK, -1, -BLOCK):
        count, after = min(BLOCK, size - first), min(first + BLOCK, size)
        for i in range(first, after):
            x, m, w = f32(y + i * ROW), f32(mid + i // width * ROW), f32(wanted + (i - first) * ROW)
            for t in range(LANES):
                w[t] = x[t] - m[t]
        mix(count, error + after * ROW, ROW, size - after, factor + 4 * (first * size + after), 4 * size, wanted, ROW, LANES)
        for i in range(after - 1, first - 1, -1):
            w, g = wanted + (i - first) * ROW, i // width * ROW
            mix_1(error + (i + 1) * ROW, ROW, after - 1 - i, factor + 4 * (i * size + i + 1), 0, w, 0)
            x, c, e, s, m, v = f32(y + i * ROW), f32(code + i * ROW), f32(error + i * ROW), f32(scale + g), f32(mid + g), f32(w)
            for t in range(LANES):
                moved = min(max(np.rint(v[t] / s[t] + half), np.float32(0)), half + half) - half
                c[t] = moved
                e[t] = x[t] - m[t] - s[t] * moved


@njit(**FAST)
def round_meta(code, slope, scale, mid, y, error, metric, units, size, width, words):
    """Round scale to E4M3, fit mid to it, round mid. Writes scale byte | mid byte << 8 to int32 ``words`` [G][LANES]."""
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
    tiny, steps = f32(sums + 4 * ROW), sums + 4 * ROW + round_up(4 * groups, 64)
    for g in range(groups):
        tiny[g] = units[g] * E4M3_MIN
        fit_range(y + g * width * ROW, width, levels, clips[g], tiny[g], scale + g * ROW, mid + g * ROW, sums)
    nearest_plane(y, code, error, scale, mid, factor, size, width, half, slope)
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    for _ in range(LATTICE_ROUNDS):
        descend(code, slope, scale, metric, size, width, half, steps)
        fit_metric(code, slope, scale, mid, metric, tiny, size, width, error, sums)
    round_meta(code, slope, scale, mid, y, error, metric, units, size, width, words)
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    descend(code, slope, scale, metric, size, width, half, steps)
