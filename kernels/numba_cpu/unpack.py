"""The kernel that unpacks whole tiles to float32 rows in the stored basis: the inverse of ``pack.py``."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import decode_meta, label_meta
from skvq.kernels.numba_cpu.pack import page_of
from skvq.kernels.numba_cpu.simd import f32, fetch_add, i32, i64, pack_job_at, u8
from skvq.kernels.numba_cpu.spread import transpose
from skvq.kernels.numba_cpu.tiles import FAST, load_keys, load_value_rows


@njit(**FAST)
def write_rows(source, target, stride, size, tile):
    """Transpose float32 ``[channel][token]`` at ``source`` to tokens ``stride`` bytes apart at ``target``."""
    whole = size // 16 * 16
    for c in range(0, whole, 16):
        for t in range(0, tile, 8):
            transpose(source + 4 * (c * tile + t), 4 * tile, target + t * stride + 4 * c, stride)
    for c in range(whole, size):
        given = f32(source + 4 * c * tile)
        for t in range(tile):
            f32(target + t * stride)[c] = given[t]


@njit(**FAST)
def read_keys(job, work, start, head):
    """Dequantize the keys of a tile and head to the job's rows, from codes ``[D / 4][token][4]`` at ``w_codes``."""
    size, tile = job.size, job.tile
    half = np.float32((job.key_levels - 1) * 0.5)
    for c in range(size):
        label = i64(job.key_labels)[head * size + c]
        unit, out = f32(job.key_unit)[label], f32(work + job.w_rows + 4 * c * tile)
        scale, mid = f32(label_meta(job, work, label, 0)), f32(label_meta(job, work, label, 1))
        words, shift = i32(work + job.w_codes + c // 4 * tile * 4), np.int32(c % 4 * 8)
        for t in range(tile):
            code = np.float32((words[t] >> shift) & np.int32(255))
            out[t] = mid[t] * unit + scale[t] * unit * (code - half)
    target = job.keys + 4 * ((start - job.first) * job.kv_heads + head) * size
    write_rows(work + job.w_rows, target, 4 * job.kv_heads * size, size, tile)


@njit(**FAST)
def read_values(job, work, start, head):
    """Dequantize the values of a tile and head to the job's rows, from codes ``[channel][token]`` at ``w_codes``."""
    size, tile = job.size, job.tile
    half = np.float32((job.value_levels - 1) * 0.5)
    for c in range(size):
        label = i64(job.value_labels)[head * size + c]
        unit, out = f32(job.value_unit)[label], f32(work + job.w_rows + 4 * c * tile)
        scale, mid = f32(label_meta(job, work, label, 2)), f32(label_meta(job, work, label, 3))
        codes = u8(work + job.w_codes + c * tile)
        for t in range(tile):
            out[t] = mid[t] * unit + scale[t] * unit * (np.float32(codes[t]) - half)
    target = job.values + 4 * ((start - job.first) * job.kv_heads + head) * size
    write_rows(work + job.w_rows, target, 4 * job.kv_heads * size, size, tile)


def build_unpack(stamp):
    """The kernel; its job is PACK of ``job.py``."""

    def unpack(address):
        if stamp == 0:
            return
        job = pack_job_at(address)
        work = job.work + fetch_add(job.counters + 8, 1) * job.work_bytes
        size, tile, words = job.size, job.tile, 4 * job.groups * job.tile
        while True:
            task = fetch_add(job.counters, 1)
            if task >= job.count // tile * job.kv_heads:
                break
            start, head = job.first + task // job.kv_heads * tile, task % job.kv_heads
            page, inside = page_of(job, start)
            for other in range(job.kv_heads):
                if other == head or job.heads_together > 1:
                    meta = job.meta + page * job.meta_page + other * job.meta_head + inside * words
                    decode_meta(meta, work + job.w_meta + 4 * other * words, work + job.w_group, job.groups, tile)
            keys = job.key_codes + page * job.key_page + head * job.key_head + inside * job.key_tile
            values = job.value_codes + page * job.value_page + head * job.value_head + inside * job.value_tile
            load_keys(keys, work + job.w_codes, job.key_levels, size, tile)
            read_keys(job, work, start, head)
            load_value_rows(values, work + job.w_codes, job.value_levels, size, tile)
            read_values(job, work, start, head)

    return unpack
