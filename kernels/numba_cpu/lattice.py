"""``reference.quantize_lattice`` for LANES tokens at once, one token per SIMD lane.

Every array here is [rows][LANES] float32, so each step of the inherently sequential algorithm is one vector operation per
channel, about 11 D^2 multiply-adds a token in all. Codes are float32 too, 0 ... levels - 1.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.lanes import LANES, both, load, rint, spread, store, where, zeros
from skvq.kernels.numba_cpu.numeric import e4m3
from skvq.kernels.numba_cpu.products import product
from skvq.kernels.numba_cpu.quantizer import E4M3_MIN, e4m3_encode
from skvq.kernels.numba_cpu.simd import f32, i32
from skvq.kernels.numba_cpu.tiles import FAST

LATTICE_FITS, LATTICE_ROUNDS, LATTICE_SWEEPS = 2, 2, 2  # reference.LATTICE_*; copied (``compiled.source_stamp``)
ROW = 4 * LANES  # bytes of a row
BLOCK = 16  # rows whose effect on all others is applied at once, as a matrix product


def lattice_bytes(size: int, groups: int) -> int:
    """Bytes that ``quantize_lattice`` needs at ``work``: y, codes, errors, slopes, scales, mids and a block of moves."""
    return ROW * (4 * size + 2 * groups + BLOCK)


@njit(**FAST)
def sum_groups(metric, size, groups, pulls):
    """``pulls`` [G][D]: the metric times the ones of a group, which is what a move of its mid does to the slope."""
    width = size // groups
    for g in range(groups):
        out = f32(pulls + 4 * g * size)
        for i in range(size):
            row, total = f32(metric + 4 * (i * size + g * width)), np.float32(0)
            for j in range(width):
                total += row[j]
            out[i] = total


@njit(**FAST)
def nearest_code(x, top):
    return min(max(rint(x), np.float32(0)), top)


@njit(**FAST)
def fit_range(y, count, top, clip, tiny, scale, mid):
    """Scale and mid of ``count`` rows at ``y``: the clipped range, then plain least squares."""
    half, n = top * np.float32(0.5), np.float32(count)
    low, high, mean = load(y), load(y), zeros()
    for i in range(count):
        x = load(y + i * ROW)
        low, high = min(low, x), max(high, x)
        mean += x
    low, high, mean = low * clip, high * clip, mean / n
    s, m = max((high - low) / top, tiny), (high + low) * np.float32(0.5)
    for _ in range(LATTICE_FITS):
        a, b, c = zeros(), zeros(), zeros()
        inverse = np.float32(1) / s
        for i in range(count):
            x = load(y + i * ROW)
            code = nearest_code((x - m) * inverse + half, top) - half
            a += code
            b += code * code
            c += code * (x - mean)
        code_mean = a / n
        spread_of_codes = b - a * code_mean
        fitted = max(c / max(spread_of_codes, np.float32(0.25)), tiny)
        s = where(spread_of_codes > np.float32(0.25), fitted, s)  # two codes differ: at least 1/2
        m = mean - s * code_mean
    store(scale, s)
    store(mid, m)


@njit(**FAST)
def round_rows(known, given, by_scale, coefs, stride, count, turn, top, codes, moves):
    """Codes of ``count`` rows of a group in turn: ``codes_k`` is ``known_k + (given_k / scale + sum_j<k coefs_kj moves_j) /
    coefs_kk``, rounded, and ``moves_k = known_k - codes_k``.

    Addresses are those of the row that comes first; the next lies a row on, or back with ``turn`` -1. ``by_scale``: 1 / scale.
    What waits is the chain from a move to the next code, so the last move stays in a register; older ones are summed before.
    """
    last = zeros()
    for k in range(count):
        line, at = f32(coefs + turn * k * stride), turn * k * ROW
        total = load(given + at) * by_scale
        for j in range(k - 1):
            total += load(moves + turn * j * ROW) * line[turn * j]
        total += last * line[turn * max(k - 1, 0)]
        here = load(known + at)
        code = nearest_code(here + total * (np.float32(1) / line[turn * k]), top)
        last = here - code
        store(codes + at, code)
        store(moves + at, last)


@njit(**FAST)
def scale_rows(rows, count, scale):
    for i in range(count):
        store(rows + i * ROW, load(rows + i * ROW) * scale)


@njit(**FAST)
def nearest_plane(y, code, error, scale, mid, factor, size, groups, top, known, given):
    """Choose codes from the last channel to the first, each correcting for the errors of those already chosen.

    Errors of later blocks are applied to a block of rows all at once. A block lies in one group: its rows share their scale.
    Scratch: ``known`` of D rows, ``given`` of BLOCK.
    """
    width, half = size // groups, top * np.float32(0.5)
    after = size
    while after > 0:
        first = max((after - 1) // BLOCK * BLOCK, (after - 1) // width * width)
        count, last, g = after - first, (after - 1) * ROW, first // width * ROW
        s, m = load(scale + g), load(mid + g)
        for i in range(first, after):
            store(known + i * ROW, (load(y + i * ROW) - m) * (np.float32(1) / s) + half)
        later = factor + 4 * (first * size + after)
        product(count, error + after * ROW, ROW, size - after, later, 4 * size, 4, given, ROW, False)
        factor_rows = factor + 4 * (after - 1) * (size + 1)
        round_rows(
            known + last, given + (count - 1) * ROW, np.float32(1) / s, factor_rows, 4 * size, count, -1, top,
            code + last, error + last,
        )  # fmt: skip
        scale_rows(error + first * ROW, count, s)
        after = first


@njit(**FAST)
def slope_of(y, code, scale, mid, error, slope, metric, size, groups, half):
    """``error = y - mid - scale * (code - half)`` and ``slope = metric error``."""
    width = size // groups
    for g in range(groups):
        s = load(scale + g * ROW)
        low = load(mid + g * ROW) - s * half
        for i in range(g * width * ROW, (g + 1) * width * ROW, ROW):
            store(error + i, load(y + i) - low - s * load(code + i))
    product(size, error, ROW, size, metric, 4 * size, 4, slope, ROW, False)


@njit(**FAST)
def descend(code, slope, scale, metric, size, groups, top, moves):
    """Sweeps of coordinate descent over the codes. ``slope`` is kept up to date, a block at a time.

    ``moves`` is scratch of BLOCK rows.
    """
    width = size // groups
    for _ in range(LATTICE_SWEEPS):
        first = 0
        while first < size:
            after = min(first + BLOCK, first // width * width + width)
            count, rows, g = after - first, code + first * ROW, first // width * ROW
            s, metric_rows = load(scale + g), metric + 4 * first * (size + 1)
            round_rows(rows, slope + first * ROW, np.float32(1) / s, metric_rows, 4 * size, count, 1, top, rows, moves)
            scale_rows(moves, count, s)
            product(size, moves, ROW, count, metric + 4 * first, 4 * size, 4, slope, ROW, True)
            first = after


@njit(**FAST)
def fit_metric(code, slope, scale, mid, metric, pulls, units, size, groups, half, turned):
    """Fit scale and mid of one group after another by least squares in the metric, and keep ``slope`` up to date.

    ``turned`` is scratch of D rows, for the metric times a group's centred codes.
    """
    width = size // groups
    for g in range(groups):
        first, pull, one = g * width, f32(pulls + 4 * g * size), np.float32(0)
        for i in range(size):
            store(turned + i * ROW, spread(-half * pull[i]))
        product(size, code + first * ROW, ROW, width, metric + 4 * first, 4 * size, 4, turned, ROW, True)
        cc, c1, cs, s1 = zeros(), zeros(), zeros(), zeros()
        for i in range(first, first + width):
            centred, x, total = load(code + i * ROW) - half, load(slope + i * ROW), pull[i]
            one += total
            cc += centred * load(turned + i * ROW)
            c1 += centred * total
            cs += centred * x
            s1 += x
        s, determinant = load(scale + g * ROW), cc * one - c1 * c1
        good = determinant > np.float32(1e-6) * cc * one
        step = (cs * one - s1 * c1) / where(good, determinant, spread(np.float32(1)))
        good = both(good, s + step > units[g] * E4M3_MIN)
        step = where(good, step, zeros())
        move = where(good, (s1 - step * c1) / one, zeros())
        store(scale + g * ROW, s + step)
        store(mid + g * ROW, load(mid + g * ROW) + move)
        for i in range(size):
            store(slope + i * ROW, load(slope + i * ROW) - move * pull[i] - step * load(turned + i * ROW))


@njit(**FAST)
def round_meta(code, slope, scale, mid, y, error, metric, pulls, units, size, groups, half, words):
    """Round scale to E4M3, fit mid to it, round mid; ``slope`` follows.

    Writes scale byte | mid byte << 8 to int32 ``words`` [G][LANES].
    """
    width = size // groups
    for g in range(groups):
        s, word = f32(scale + g * ROW), i32(words + g * ROW)
        for t in range(LANES):
            byte = e4m3_encode(s[t] / units[g])
            word[t] = byte
            s[t] = e4m3(byte) * units[g]
    slope_of(y, code, scale, mid, error, slope, metric, size, groups, half)
    for g in range(groups):
        pull, one, pulled = f32(pulls + 4 * g * size), np.float32(0), zeros()
        for i in range(g * width, (g + 1) * width):
            one += pull[i]
            pulled += load(slope + i * ROW)
        store(error + g * ROW, load(mid + g * ROW) + pulled / one)
        m, wanted, word = f32(mid + g * ROW), f32(error + g * ROW), i32(words + g * ROW)
        for t in range(LANES):
            byte = e4m3_encode(wanted[t] / units[g])
            word[t] |= byte << 8
            exact = e4m3(byte) * units[g]
            wanted[t] = exact - m[t]
            m[t] = exact
    for g in range(groups):
        pull, move = f32(pulls + 4 * g * size), load(error + g * ROW)
        for i in range(size):
            store(slope + i * ROW, load(slope + i * ROW) - move * pull[i])


@njit(**FAST)
def quantize_lattice(work, size, groups, levels, units, clips, metric, pulls, factor, words):
    """Codes of LANES tokens to the second array of ``work``, their metadata to int32 ``words`` [G][LANES].

    The first array of ``work``, [D][LANES], holds the numbers; units, clips [groups]; metric, factor [D, D] and pulls [G, D]
    of this head.
    """
    width, top, rows = size // groups, np.float32(levels - 1), ROW * size
    half = top * np.float32(0.5)
    y, code, error, slope = work, work + rows, work + 2 * rows, work + 3 * rows
    scale = work + 4 * rows
    mid, moves = scale + groups * ROW, scale + 2 * groups * ROW
    for g in range(groups):
        fit_range(y + g * width * ROW, width, top, clips[g], units[g] * E4M3_MIN, scale + g * ROW, mid + g * ROW)
    nearest_plane(y, code, error, scale, mid, factor, size, groups, top, slope, moves)
    slope_of(y, code, scale, mid, error, slope, metric, size, groups, half)
    for _ in range(LATTICE_ROUNDS):
        descend(code, slope, scale, metric, size, groups, top, moves)
        fit_metric(code, slope, scale, mid, metric, pulls, units, size, groups, half, error)
    round_meta(code, slope, scale, mid, y, error, metric, pulls, units, size, groups, half, words)
    descend(code, slope, scale, metric, size, groups, top, moves)
