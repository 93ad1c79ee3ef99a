"""Online softmax in base 2.

The state of a query vector: running maximum ``top`` (m_i), sum of weights ``total`` (l_i), weighted values ``acc``. Partial
states of one query are merged by the last thread to finish.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import LARGEST_BITS, NOT_A_NUMBER, NOTHING, exp2
from skvq.kernels.numba_cpu.simd import f32, i32, largest
from skvq.kernels.numba_cpu.tiles import FAST

LN2 = np.float32(0.6931471805599453)
MINUS_INFINITY = np.int32(-8388608)  # bits of float32 -inf; fast-math code must not name the number


@njit(**FAST)
def start(tops, totals, acc, rows, width):
    """Initialize the state of ``rows`` query vectors."""
    top, total, a = f32(tops), f32(totals), f32(acc)
    for m in range(rows):
        top[m] = NOTHING
        total[m] = np.float32(0)
    for i in range(rows * width):
        a[i] = np.float32(0)


@njit(**FAST)
def take(scores, stride, count, rows, tops, totals, acc, width):
    """Turn ``count`` scores of each row into weights, in place; update ``top`` and ``total``, rescale ``acc``.

    A row with a score that is no number, or infinite, comes to NaN, as by the reference: weights would hide it.
    """
    top, total = f32(tops), f32(totals)
    for m in range(rows):
        s = f32(scores + 4 * m * stride)
        if has_no_number(scores + 4 * m * stride, count):
            broken = i32(acc + 4 * m * width)
            for i in range(width):
                broken[i] = NOT_A_NUMBER
            for t in range(count):
                s[t] = np.float32(0)
            total[m] = max(total[m], np.float32(1))
            continue
        best = largest(scores + 4 * m * stride, count)
        if best > top[m]:
            alpha = exp2(top[m] - best)
            a = f32(acc + 4 * m * width)
            for i in range(width):
                a[i] *= alpha
            total[m] *= alpha
            top[m] = best
        m_i = top[m]
        l_i = np.float32(0)
        for t in range(count):
            p = exp2(s[t] - m_i)
            s[t] = p
            l_i += p
        total[m] += l_i


@njit(**FAST)
def has_no_number(address, count):
    """Whether one of ``count`` float32 is NaN or infinite: by their bits, for fast-math code knows no such numbers."""
    words, most = i32(address), np.int32(0)
    for i in range(count):
        most = max(most, words[i] & np.int32(0x7FFFFFFF))
    return most > LARGEST_BITS


@njit(**FAST)
def merge(partials, count, step, rows, size, out, tops, totals):
    """Merge ``count`` states, ``step`` bytes apart, rows ``[top, total, acc]``, into ``out`` [rows, size], not normalized."""
    top, total = f32(tops), f32(totals)
    for m in range(rows):
        at = partials + 4 * m * (size + 2)
        best = NOTHING
        for i in range(count):
            best = max(best, f32(at + i * step)[0])
        o = f32(out + 4 * m * size)
        for j in range(size):
            o[j] = np.float32(0)
        l_i = np.float32(0)
        for i in range(count):
            row = f32(at + i * step)
            if row[1] > np.float32(0):
                alpha = exp2(row[0] - best)
                l_i += alpha * row[1]
                for j in range(size):
                    o[j] += alpha * row[2 + j]
        top[m] = best
        total[m] = l_i


@njit(**FAST)
def matvec(matrix, x, out, size):
    """``out = matrix @ x``, row-major [size, size]."""
    v, o = f32(x), f32(out)
    for i in range(size):
        row = f32(matrix + 4 * i * size)
        dot = np.float32(0)
        for j in range(size):
            dot += row[j] * v[j]
        o[i] = dot


@njit(**FAST)
def write_lse(address, top, total):
    """Write the natural log-sum-exp of a state; -inf if it has seen no token."""
    if total > np.float32(0):
        f32(address)[0] = (top + np.log2(total)) * LN2
    else:
        i32(address)[0] = MINUS_INFINITY
