"""Fused attention over packed pages whose groups are labels of channels and whose keys lie before RoPE (method ``reorder``).

Keys of a tile are turned by one fixed table, position within the tile around its centre; the query is turned back by the
centre: ``q . RoPE_t(k) = RoPE_-c(q) . RoPE_{t-c}(k)``. A channel of a tile becomes a row of float32 with the scales and
mids that its label names, whichever kv head they lie with. Unpacking is shared by all queries of a kv head.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.heads import hide_before
from skvq.kernels.numba_cpu.mean import start_rotors, turn_rotors
from skvq.kernels.numba_cpu.numeric import decode_meta, label_meta
from skvq.kernels.numba_cpu.simd import f32, f64, fetch_add, i32, i64, job_at, u8
from skvq.kernels.numba_cpu.softmax import take
from skvq.kernels.numba_cpu.tiles import FAST, load_keys, load_value_rows
from skvq.kernels.numba_cpu.worker import begin_task, end_task, my_workspace, task_count


@njit(**FAST)
def decode_all_meta(job, work, head, page, inside):
    """Decode the tile's metadata, of all kv heads, to ``w_meta``, and the bias by retained flags of ``head`` to ``w_bias``."""
    words = 4 * job.groups * job.tile
    for other in range(job.kv_heads):
        meta = job.meta + page * job.meta_page + other * job.meta_head + inside * words
        decode_meta(meta, work + job.w_meta + 4 * other * words, work + job.w_dots, job.groups, job.tile)
        if other == head:
            flags, kept = f32(work + job.w_dots), f32(work + job.w_bias)
            for t in range(job.tile):
                kept[t] = flags[t]


@njit(**FAST)
def dequantize_channel(job, work, head, channel, out):
    """One channel of the tile's keys as float32 [tile] at ``out``, from codes ``[D / 4][token][4]`` at ``w_codes``."""
    label = i64(job.key_labels)[head * job.size + channel]
    unit, half = f32(job.key_unit)[label], np.float32((job.key_levels - 1) * 0.5)
    scale, mid = f32(label_meta(job, work, label, 0)), f32(label_meta(job, work, label, 1))
    words, shift, x = i32(work + job.w_codes + channel // 4 * job.tile * 4), np.int32(channel % 4 * 8), f32(out)
    for t in range(job.tile):
        x[t] = unit * (mid[t] + scale[t] * (np.float32((words[t] >> shift) & np.int32(255)) - half))


@njit(**FAST)
def label_scores(job, work, head, rows):
    """Scores ``[row][token]`` of the tile in the workspace; the rotors are those of its centre (``mean.py``)."""
    half, size, tile = job.size // 2, job.size, job.tile
    bias = f32(work + job.w_bias)
    cos_t, sin_t = f64(work + job.w_rotor), f64(work + job.w_rotor + 8 * half)
    for m in range(rows):
        s = f32(work + job.w_scores + 4 * m * tile)
        for t in range(tile):
            s[t] = bias[t]
    first, second = f32(work + job.w_dots), f32(work + job.w_dots + 4 * tile)
    scale = np.float32(job.rope_scale)
    for i in range(half):
        dequantize_channel(job, work, head, i, work + job.w_dots)
        dequantize_channel(job, work, head, half + i, work + job.w_dots + 4 * tile)
        cos, sin = f32(job.turn_cos + 4 * tile * i), f32(job.turn_sin + 4 * tile * i)
        for t in range(tile):
            a, b = first[t], second[t]
            first[t] = a * cos[t] - b * sin[t]
            second[t] = b * cos[t] + a * sin[t]
        c, d = np.float32(cos_t[i]) * scale, np.float32(sin_t[i]) * scale
        for m in range(rows):
            q = f32(work + job.w_q + 4 * m * size)
            x, y = q[i] * c + q[half + i] * d, q[half + i] * c - q[i] * d
            s = f32(work + job.w_scores + 4 * m * tile)
            for t in range(tile):
                s[t] += x * first[t] + y * second[t]


@njit(**FAST)
def label_values(job, work, head, rows):
    """Add the tile's values, weighted by what ``take`` left in the scores, to the state."""
    size, tile, width = job.size, job.tile, job.size + job.groups
    half = np.float32((job.value_levels - 1) * 0.5)
    row = f32(work + job.w_row)
    for channel in range(size):
        label = i64(job.value_labels)[head * size + channel]
        unit = f32(job.value_unit)[label]
        scale, mid = f32(label_meta(job, work, label, 2)), f32(label_meta(job, work, label, 3))
        codes = u8(work + job.w_codes + channel * tile)
        for t in range(tile):
            row[t] = mid[t] + scale[t] * (np.float32(codes[t]) - half)
        for m in range(rows):
            p = f32(work + job.w_scores + 4 * m * tile)
            dot = np.float32(0)
            for t in range(tile):
                dot += p[t] * row[t]
            f32(work + job.w_acc + 4 * m * width)[channel] += dot * unit


@njit(**FAST, inline="always")
def attend_packed(job, work, row, head, query, rows, begin, end):
    """Attend over tiles ``begin .. end-1`` of the packed tokens, into the state."""
    tile, size = job.tile, job.size
    table = i32(job.page_table + i64(job.slots)[row] * job.page_table_stride)
    start_rotors(job, work, i32(job.mean_pairs + 8), size // 2, begin)
    for number in range(begin, end):
        page, inside = np.int64(table[number // job.tiles]), number % job.tiles
        keys = job.key_codes + page * job.key_page + head * job.key_head + inside * job.key_tile
        values = job.value_codes + page * job.value_page + head * job.value_head + inside * job.value_tile
        decode_all_meta(job, work, head, page, inside)
        load_keys(keys, work + job.w_codes, job.key_levels, size, tile)
        label_scores(job, work, head, rows)
        turn_rotors(job, work, size // 2)
        hide_before(job, work, row, query, rows, number * tile)
        take(work + job.w_scores, tile, tile, rows, work + job.w_top, work + job.w_total, work + job.w_acc, size + job.groups)
        load_value_rows(values, work + job.w_codes, job.value_levels, size, tile)
        label_values(job, work, head, rows)


def build_attend_labels(stamp):
    """The kernel; its job is ATTEND of ``job.py``."""

    def attend_labels(address):
        if stamp == 0:
            return
        job = job_at(address)
        work = my_workspace(job)
        while True:
            task = fetch_add(job.counters, 1)
            if task >= task_count(job):
                break
            row, head, query, rows, begin, end = begin_task(job, work, task)
            if end > begin:
                attend_packed(job, work, row, head, query, rows, begin, end)
            end_task(job, work, task, row, head, query, rows)

    return attend_labels
