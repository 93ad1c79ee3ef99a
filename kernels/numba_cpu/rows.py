"""Attention over rows of 16-bit numbers: full-precision slots and the pages of method ``fp``."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import HIDDEN, row_to_float
from skvq.kernels.numba_cpu.simd import f32, i32, i64
from skvq.kernels.numba_cpu.softmax import take
from skvq.kernels.numba_cpu.tiles import FAST


@njit(**FAST)
def scale_queries(job, work, row, head, query, count):
    """Queries of a chunk in float32 times log2(e)/sqrt(D): row m = n * R + r of ``w_q``. Returns the rows."""
    share, size = job.heads // job.kv_heads, job.size
    factor = np.float32(1.4426950408889634 / np.sqrt(size))
    for n in range(count):
        for r in range(share):
            given = f32(job.q + 4 * size * (((row * job.queries + query + n) * job.heads) + head * share + r))
            scaled = f32(work + job.w_q + 4 * size * (n * share + r))
            for c in range(size):
                scaled[c] = given[c] * factor
    return count * share


@njit(**FAST)
def attend_slots(job, work, row, head, query, rows):
    """Take the full-precision slots that are held, ``job.tile`` at a time."""
    slot = i64(job.slots)[row]
    held = i32(job.full_positions + slot * job.full_positions_stride)
    base = slot * job.full_slot + head * job.full_head
    for first in range(0, job.full, job.tile):
        count = min(job.tile, job.full - first)
        attend_rows(
            job, work, row, query, rows, job.full_keys + base + first * job.full_row, job.full_values + base + first * job.full_row,
            job.full_row, job.full_kind, held, first, count, True,
        )  # fmt: skip


@njit(**FAST)
def attend_rows(job, work, row, query, rows, keys, values, step, kind, held, first, count, slots):
    """Scores, softmax and weighted values of ``count`` rows, ``step`` bytes apart.

    ``slots``: positions are ``held[first + i]`` and each query sees only those up to its own; else they are ``first + i``.
    """
    size, share, tile = job.size, job.heads // job.kv_heads, job.tile
    positions = i32(job.positions + 4 * row * job.queries)
    line = f32(work + job.w_row)
    scores, width = work + job.w_scores, job.size + job.groups
    seen = 0
    for i in range(count):
        at = np.int64(held[first + i]) if slots else first + i
        any_sees = False
        for m in range(rows):
            t = np.int64(positions[query + m // share])
            sees = t - at < job.span and at >= 0 and (at <= t or not slots)
            f32(scores + 4 * m * tile)[i] = np.float32(0) if sees else HIDDEN
            any_sees = any_sees or sees
        if any_sees:
            seen += 1
            row_to_float(keys + i * step, work + job.w_row, size, kind)
            for m in range(rows):
                q = f32(work + job.w_q + 4 * m * size)
                dot = np.float32(0)
                for c in range(size):
                    dot += q[c] * line[c]
                f32(scores + 4 * m * tile)[i] += dot
    if seen == 0:
        return
    take(scores, tile, count, rows, work + job.w_top, work + job.w_total, work + job.w_acc, width)
    for i in range(count):
        some = np.float32(0)
        for m in range(rows):
            some += f32(scores + 4 * m * tile)[i]
        if some > np.float32(0):  # an unseen slot may hold anything, and 0 * inf is not 0
            row_to_float(values + i * step, work + job.w_row, size, kind)
            for m in range(rows):
                p = f32(scores + 4 * m * tile)[i]
                acc = f32(work + job.w_acc + 4 * m * width)
                for c in range(size):
                    acc[c] += p * line[c]
