"""Attention over rows of 16-bit numbers: full-precision slots and the pages of method ``fp``."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import HIDDEN, row_to_float
from skvq.kernels.numba_cpu.products import mix
from skvq.kernels.numba_cpu.simd import f32, i32, i64, u8
from skvq.kernels.numba_cpu.softmax import take
from skvq.kernels.numba_cpu.spread import transpose
from skvq.kernels.numba_cpu.tiles import FAST, LANE_BLOCK, round_up


@njit(**FAST)
def scale_queries(job, work, row, head, query, count):
    """Write queries times log2(e)/sqrt(D) to ``w_q``, row ``n * share + r`` for query n, head r of the kv head."""
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
    """Attend over the sequence's full-precision slots, ``job.tile`` at a time, into the state."""
    slot = i64(job.slots)[row]
    held = i32(job.full_positions + slot * job.full_positions_stride)
    base = slot * job.full_slot + head * job.full_head
    for first in range(0, job.full, job.tile):
        count = min(job.tile, job.full - first)
        attend_rows(
            job, work, row, query, rows,
            job.full_keys + base + first * job.full_row, job.full_values + base + first * job.full_row,
            job.full_row, job.full_kind, held, first, count, True,
        )  # fmt: skip


@njit(**FAST)
def mark_visible(job, work, row, query, rows, held, first, count, slots):
    """Initialize scores: 0 where a query sees row ``first + i``, HIDDEN where it does not and in the padding to 32 lanes.

    With ``slots`` a row's position is ``held[first + i]`` and a query sees none after its own; else it is ``first + i``.
    Marks the rows that any query sees in ``w_seen``, and returns how many.
    """
    share, tile = job.heads // job.kv_heads, job.tile
    positions, seen = i32(job.positions + 4 * row * job.queries), u8(work + job.w_seen)
    lanes = round_up(count, LANE_BLOCK)
    for i in range(lanes):
        seen[i] = 0
    for m in range(0, rows, share):
        t, start = np.int64(positions[query + m // share]), f32(work + job.w_scores + 4 * m * tile)
        for i in range(count):
            at = np.int64(held[first + i]) if slots else first + i
            sees = t - at < job.span and at >= 0 and (at <= t or not slots)
            start[i] = np.float32(0) if sees else HIDDEN
            seen[i] |= np.uint8(1) if sees else np.uint8(0)
        for i in range(count, lanes):
            start[i] = HIDDEN
        for r in range(m + 1, m + share):
            scores = f32(work + job.w_scores + 4 * r * tile)
            for i in range(lanes):
                scores[i] = start[i]
    total = 0
    for i in range(count):
        total += np.int64(seen[i])
    return total


@njit(**FAST)
def load_rows(job, work, source, step, kind, first):
    """Rows ``first .. first+31`` as float32 ``[32][lanes]`` at ``w_rows``; zeros for rows no query sees, which hold garbage."""
    size, lanes = job.size, round_up(job.size, LANE_BLOCK)
    seen, all_seen = u8(work + job.w_seen + first), 0
    for i in range(LANE_BLOCK):
        all_seen += np.int64(seen[i])
    if all_seen == LANE_BLOCK and lanes == size and step == 2 * size:
        row_to_float(source + first * step, work + job.w_rows, LANE_BLOCK * size, kind)
        return
    for i in range(LANE_BLOCK):
        out = work + job.w_rows + 4 * i * lanes
        if seen[i]:
            row_to_float(source + (first + i) * step, out, size, kind)
        padding = f32(out)
        for c in range(size if seen[i] else 0, lanes):
            padding[c] = np.float32(0)


@njit(**FAST)
def attend_rows(job, work, row, query, rows, keys, values, step, kind, held, first, count, slots):
    """Attend over ``count`` rows, at most a tile, ``step`` bytes apart, into the state. See ``mark_visible``."""
    size, tile, width = job.size, job.tile, job.size + job.groups
    if mark_visible(job, work, row, query, rows, held, first, count, slots) == 0:
        return
    lanes = round_up(size, LANE_BLOCK)
    scores, acc = work + job.w_scores, work + job.w_acc
    turned = work + job.w_rows + 4 * LANE_BLOCK * lanes  # [D][32]
    for block in range(0, count, LANE_BLOCK):
        load_rows(job, work, keys, step, kind, block)
        for half in range(2):
            for c in range(0, size, 8):
                at = work + job.w_rows + 4 * (16 * half * lanes + c)
                transpose(at, 4 * lanes, turned + 4 * (c * LANE_BLOCK + 16 * half), 4 * LANE_BLOCK)
        mix(rows, turned, 4 * LANE_BLOCK, size, work + job.w_q, 4 * size, scores + 4 * block, 4 * tile, LANE_BLOCK)
    take(scores, tile, count, rows, work + job.w_top, work + job.w_total, acc, width)
    for block in range(0, count, LANE_BLOCK):
        load_rows(job, work, values, step, kind, block)
        mix(
            rows,
            work + job.w_rows,
            4 * lanes,
            min(LANE_BLOCK, count - block),
            scores + 4 * block,
            4 * tile,
            acc,
            4 * width,
            lanes,
        )
