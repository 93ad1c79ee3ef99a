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
from skvq.kernels.numba_cpu.simd import f32
from skvq.kernels.numba_cpu.tiles import FAST

LATTICE_FITS, LATTICE_ROUNDS, LATTICE_SWEEPS = 2, 2, 2  # reference.LATTICE_*
LANES = 16


def lattice_bytes(size, groups):
    """Workspace of ``quantize_lattice``: y, codes, errors and slopes, then scale and mid of each group, then sums."""
    return 4 * LANES * (4 * size + 2 * groups + 8)


@njit(**FAST)
def fit_range(y, at, count, levels, clip, tiny, scale, mid, sums):
    """Scale and mid [LANES] of rows ``at .. at+count-1``: the clipped range, then plain least squares."""
    top, half = np.float32(levels - 1), np.float32((levels - 1) * 0.5)
    n = np.float32(count)
    for t in range(LANES):
        low, high, total = y[at * LANES + t], y[at * LANES + t], np.float32(0)
        for i in range(at, at + count):
            x = y[i * LANES + t]
            low, high = min(low, x), max(high, x)
            total += x
        low, high = low * clip, high * clip
        scale[t], mid[t] = max((high - low) / top, tiny), (high + low) * np.float32(0.5)
        sums[t] = total / n
    for _ in range(LATTICE_FITS):
        for t in range(3 * LANES):
            sums[LANES + t] = np.float32(0)
        for i in range(at, at + count):
            for t in range(LANES):
                x = y[i * LANES + t]
                code = min(max(np.rint((x - mid[t]) / scale[t] + half), np.float32(0)), top) - half
                sums[LANES + t] += code
                sums[2 * LANES + t] += code * code
                sums[3 * LANES + t] += code * (x - sums[t])
        for t in range(LANES):
            code_mean = sums[LANES + t] / n
            spread = sums[2 * LANES + t] - sums[LANES + t] * code_mean
            fitted = max(sums[3 * LANES + t] / max(spread, np.float32(0.25)), tiny)
            scale[t] = fitted if spread > np.float32(0.25) else scale[t]  # two codes differ: at least 1/2
            mid[t] = sums[t] - scale[t] * code_mean


@njit(**FAST)
def slope_of(y, code, scale, mid, error, slope, metric, size, width):
    """``error = y - mid - scale * code`` and ``slope = metric error``."""
    for i in range(size):
        g = i // width * LANES
        for t in range(LANES):
            error[i * LANES + t] = y[i * LANES + t] - mid[g + t] - scale[g + t] * code[i * LANES + t]
            slope[i * LANES + t] = np.float32(0)
    for j in range(size):
        row, at = f32(metric + 4 * j * size), j * LANES
        for i in range(size):
            m = row[i]
            for t in range(LANES):
                slope[i * LANES + t] += m * error[at + t]


@njit(**FAST)
def descend(code, slope, scale, metric, size, width, half, step):
    """Sweeps of coordinate descent over centred codes; ``slope`` follows."""
    for _ in range(LATTICE_SWEEPS):
        for i in range(size):
            row, at, g = f32(metric + 4 * i * size), i * LANES, i // width * LANES
            inverse = np.float32(1) / row[i]
            moves = np.float32(0)
            for t in range(LANES):
                wanted = code[at + t] + slope[at + t] * inverse / scale[g + t]
                moved = min(max(np.rint(wanted + half), np.float32(0)), half + half) - half
                step[t] = (moved - code[at + t]) * scale[g + t]
                moves += abs(step[t])
                code[at + t] = moved
            if moves > np.float32(0):
                for j in range(size):
                    m = row[j]
                    for t in range(LANES):
                        slope[j * LANES + t] -= step[t] * m


@njit(**FAST)
def fit_metric(code, slope, scale, mid, metric, tiny, size, width, turned, sums):
    """Least squares in the metric of scale and mid, group after group; ``slope`` follows. ``turned`` is room for D rows."""
    for g in range(size // width):
        first, last, gt = g * width, (g + 1) * width, g * LANES
        one = np.float32(0)
        for t in range(4 * LANES):
            sums[t] = np.float32(0)
        for i in range(first, last):
            row, total = f32(metric + 4 * i * size), np.float32(0)
            for j in range(first, last):
                total += row[j]
            one += total
            for t in range(LANES):
                turned[t] = np.float32(0)
            for j in range(first, last):
                m = row[j]
                for t in range(LANES):
                    turned[t] += m * code[j * LANES + t]
            for t in range(LANES):
                c, s = code[i * LANES + t], slope[i * LANES + t]
                sums[t] += c * turned[t]
                sums[LANES + t] += c * total
                sums[2 * LANES + t] += c * s
                sums[3 * LANES + t] += s
        for t in range(LANES):
            cc, c1, cs, s1 = sums[t], sums[LANES + t], sums[2 * LANES + t], sums[3 * LANES + t]
            determinant = cc * one - c1 * c1
            good = determinant > np.float32(1e-6) * cc * one
            step = (cs * one - s1 * c1) / (determinant if good else np.float32(1))
            good = good and scale[gt + t] + step > tiny[g]
            step = step if good else np.float32(0)
            move = (s1 - step * c1) / one if good else np.float32(0)
            scale[gt + t] += step
            mid[gt + t] += move
            sums[t], sums[LANES + t] = step, move
        for i in range(first, last):
            row = f32(metric + 4 * i * size)
            for t in range(LANES):
                turned[t] = sums[LANES + t] + sums[t] * code[i * LANES + t]
            for j in range(size):
                m = row[j]
                for t in range(LANES):
                    slope[j * LANES + t] -= turned[t] * m


@njit(**FAST)
def nearest_plane(y, code, error, scale, mid, factor, size, width, half, wanted):
    """Centred codes from the last channel to the first, each making up for the errors of those before."""
    for i in range(size - 1, -1, -1):
        row, at, g = f32(factor + 4 * i * size), i * LANES, i // width * LANES
        for t in range(LANES):
            wanted[t] = y[at + t] - mid[g + t]
        for j in range(i + 1, size):
            m = row[j]
            for t in range(LANES):
                wanted[t] += m * error[j * LANES + t]
        for t in range(LANES):
            moved = min(max(np.rint(wanted[t] / scale[g + t] + half), np.float32(0)), half + half) - half
            code[at + t] = moved
            error[at + t] = y[at + t] - mid[g + t] - scale[g + t] * moved


@njit(**FAST)
def round_meta(code, slope, scale, mid, y, error, metric, units, size, width, words, by_group):
    """Scale and mid to E4M3, mid fitted to the rounded scale; bytes scale | mid << 8 to ``words[g * by_group + t]``."""
    for g in range(size // width):
        for t in range(LANES):
            byte = e4m3_encode(scale[g * LANES + t] / units[g])
            words[g * by_group + t] = byte
            scale[g * LANES + t] = e4m3(byte) * units[g]
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    for g in range(size // width):
        stiffness = np.float32(0)
        for i in range(g * width, (g + 1) * width):
            row = f32(metric + 4 * i * size)
            for j in range(g * width, (g + 1) * width):
                stiffness += row[j]
        for t in range(LANES):
            pull = np.float32(0)
            for i in range(g * width, (g + 1) * width):
                pull += slope[i * LANES + t]
            byte = e4m3_encode((mid[g * LANES + t] + pull / stiffness) / units[g])
            words[g * by_group + t] |= byte << 8
            mid[g * LANES + t] = e4m3(byte) * units[g]


@njit(**FAST)
def quantize_lattice(work, size, groups, levels, units, clips, metric, factor, words, by_group):
    """Centred codes of LANES tokens in place of the numbers in the second array of ``work``; their metadata to ``words``.

    The first array of ``work``, [D][LANES], holds the numbers; units, clips [groups]; metric, factor [D, D] of this head.
    """
    width, half, rows = size // groups, np.float32((levels - 1) * 0.5), 4 * LANES * size
    y, code, error, slope = f32(work), f32(work + rows), f32(work + 2 * rows), f32(work + 3 * rows)
    small = work + 4 * rows
    scale, mid, sums = f32(small), f32(small + 4 * LANES * groups), f32(small + 8 * LANES * groups)
    tiny = f32(small + 8 * LANES * groups + 16 * LANES)
    for g in range(groups):
        tiny[g] = units[g] * E4M3_MIN
        part = 4 * LANES * g
        fit_range(
            y, g * width, width, levels, clips[g], tiny[g], f32(small + part), f32(small + 4 * LANES * groups + part), sums
        )
    nearest_plane(y, code, error, scale, mid, factor, size, width, half, sums)
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    for _ in range(LATTICE_ROUNDS):
        descend(code, slope, scale, metric, size, width, half, sums)
        fit_metric(code, slope, scale, mid, metric, tiny, size, width, error, sums)
    round_meta(code, slope, scale, mid, y, error, metric, units, size, width, words, by_group)
    slope_of(y, code, scale, mid, error, slope, metric, size, width)
    descend(code, slope, scale, metric, size, width, half, sums)
