"""The kernel that quantizes and packs whole tiles: float32 rows in the stored basis to pages.

A task is a tile of one kv head, or of all kv heads where groups cross heads. Group j of a side holds the channels
``channels[starts[j] : starts[j + 1]]`` of all KH * D; its metadata lie with kv head ``j // G``.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.lanes import LANES
from skvq.kernels.numba_cpu.lattice import quantize_lattice, sum_groups
from skvq.kernels.numba_cpu.quantizer import quantize
from skvq.kernels.numba_cpu.simd import f32, fetch_add, i32, i64, pack_job_at, u8
from skvq.kernels.numba_cpu.spread import transpose
from skvq.kernels.numba_cpu.tiles import FAST, RETAINED, SLOTS, TRITS


@njit(**FAST)
def quantize_side(job, work, start, head, heads, side):
    """Quantize keys (side 0) or values (1) of a tile.

    Writes codes as bytes to ``w_codes``, keys ``[token][channel]``, values ``[channel][token]``, and metadata to the page.
    Values come second: they fill in the upper half of words that keys have begun.
    """
    size, groups, tile = job.size, job.groups, job.tile
    channels_all = job.kv_heads * size
    page, inside = page_of(job, start)
    if side == 0:
        source, levels, units, clips = job.keys, job.key_levels, f32(job.key_unit), f32(job.key_clip)
        starts, channels = i64(job.key_starts), i64(job.key_channels)
    else:
        source, levels, units, clips = job.values, job.value_levels, f32(job.value_unit), f32(job.value_clip)
        starts, channels = i64(job.value_starts), i64(job.value_channels)
    group, coded, codes = f32(work + job.w_group), u8(work + job.w_group + 8 * channels_all), u8(work + job.w_codes)
    by_channel, by_token = (1, heads * size) if side == 0 else (tile, 1)
    flags, at = u8(job.retained + start - job.first), work + job.w_group
    if (job.key_metric if side == 0 else job.value_metric) != 0:
        quantize_head(job, work, start, head, side)
        return
    for j in range(head * groups, (head + heads) * groups):
        begin, count = starts[j], starts[j + 1] - starts[j]
        words = i32(job.meta + page * job.meta_page + j // groups * job.meta_head + 4 * (inside * groups + j % groups) * tile)
        for t in range(tile):
            row = f32(source + 4 * (start - job.first + t) * channels_all)
            for i in range(count):
                group[i] = row[channels[begin + i]]
            word = quantize(at, count, levels, units[j], clips[j], at + 4 * channels_all, at + 8 * channels_all)
            if side == 0:
                words[t] = word | (RETAINED if flags[t] and j % groups == 0 else 0)
            else:
                words[t] = (words[t] & 0xFFFF) | (word << 16)
            for i in range(count):
                codes[(channels[begin + i] - head * size) * by_channel + t * by_token] = coded[i]


@njit(**FAST)
def quantize_head(job, work, start, head, side):
    """``quantize_side`` where a side has a metric: the codes of a head are chosen together, for LANES tokens at a time."""
    size, groups, tile = job.size, job.groups, job.tile
    page, inside = page_of(job, start)
    if side == 0:
        source, levels, units, clips = job.keys, job.key_levels, job.key_unit, job.key_clip
        metric, factor, by_channel, by_token = job.key_metric, job.key_factor, 1, size
    else:
        source, levels, units, clips = job.values, job.value_levels, job.value_unit, job.value_clip
        metric, factor, by_channel, by_token = job.value_metric, job.value_factor, tile, 1
    matrix, group = 4 * head * size * size, 4 * head * groups
    lattice = work + job.w_lattice
    found, codes = i32(work + job.w_group), u8(work + job.w_codes)
    sum_groups(metric + matrix, size, groups, work + job.w_pulls)
    words = i32(job.meta + page * job.meta_page + head * job.meta_head + 4 * inside * groups * tile)
    flags = u8(job.retained + start - job.first)
    for token in range(0, tile, LANES):
        for t in range(0, LANES, 16):
            row = source + 4 * ((start - job.first + token + t) * job.kv_heads + head) * size
            for i in range(0, size, 8):
                transpose(row + 4 * i, 4 * job.kv_heads * size, lattice + 4 * (i * LANES + t), 4 * LANES)
        quantize_lattice(
            lattice, size, groups, levels, f32(units + group), f32(clips + group), metric + matrix,
            work + job.w_pulls, factor + matrix, work + job.w_group,
        )  # fmt: skip
        for g in range(groups):
            for t in range(LANES):
                word, at = found[g * LANES + t], g * tile + token + t
                if side == 0:
                    words[at] = word | (RETAINED if flags[token + t] and g == 0 else 0)
                else:
                    words[at] = (words[at] & 0xFFFF) | (word << 16)
        for i in range(size):
            code = f32(lattice + 4 * LANES * (size + i))
            for t in range(LANES):
                codes[i * by_channel + (token + t) * by_token] = np.uint8(code[t])


@njit(**FAST)
def page_of(job, start):
    """Page and tile within it of the tile that starts at a token."""
    number = start // job.tile
    return np.int64(i32(job.page_row)[number // job.tiles]), number % job.tiles


@njit(**FAST)
def pack_planes(codes, stride, rows, count, out, levels, across):
    """Pack ``rows`` x ``count`` codes into planes (``layout.py``) at ``out``.

    Channels are what planes divide: along a row for keys, across rows for values (``across``). Rows are ``stride`` bytes apart.
    """
    widths = 2 if levels <= 8 else 4 if levels == 16 else 8
    place = 0
    while True:
        planes, mask = 8 // widths, np.uint8((1 << widths) - 1)
        if across:
            for b in range(rows // planes):
                to = u8(out + b * count)
                for p in range(planes):
                    given, shift = u8(codes + (p * (rows // planes) + b) * stride), np.uint8(p * widths)
                    for t in range(count):
                        bits = ((given[t] >> place) & mask) << shift
                        to[t] = bits if p == 0 else to[t] | bits
            out += rows // planes * count
        else:
            width = count // planes
            for t in range(rows):
                to = u8(out + t * width)
                for p in range(planes):
                    given, shift = u8(codes + t * stride + p * width), np.uint8(p * widths)
                    for b in range(width):
                        bits = ((given[b] >> place) & mask) << shift
                        to[b] = bits if p == 0 else to[b] | bits
            out += rows * width
        if levels != 8 or place == 2:
            return
        widths, place = 1, 2


@njit(**FAST)
def pack_trits(codes, plane_step, rows, row_step, count, out):
    """Pack codes of three levels, five to a byte, as bytes ``[rows][count]`` at ``out``.

    Distances between codes: ``plane_step`` within a byte, one from byte to byte, ``row_step`` from row to row.
    """
    for r in range(rows):
        given, to = u8(codes + r * row_step), u8(out + r * count)
        for b in range(count):
            value = np.int32(0)
            for p in range(TRITS):
                value = value * 3 + given[b + p * plane_step]
            to[b] = (256 * value + 242) // 243


@njit(**FAST)
def write_codes(job, work, start, head, heads, side):
    """Codes of a tile from ``w_codes`` to the pages."""
    size, tile = job.size, job.tile
    page, inside = page_of(job, start)
    for h in range(heads):
        if side == 0:
            codes, stride = work + job.w_codes + h * size, heads * size
            out = job.key_codes + page * job.key_page + (head + h) * job.key_head + inside * job.key_tile
            if job.key_levels == 3:
                pack_trits(codes, SLOTS * stride, SLOTS, stride, size, out)
            else:
                pack_planes(codes, stride, tile, size, out, job.key_levels, False)
        else:
            codes = work + job.w_codes + h * size * tile
            out = job.value_codes + page * job.value_page + (head + h) * job.value_head + inside * job.value_tile
            if job.value_levels == 3:
                pack_trits(codes, SLOTS, size, tile, SLOTS, out)
            else:
                pack_planes(codes, tile, size, tile, out, job.value_levels, True)


def build_pack(stamp):
    """The kernel; its job is PACK of ``job.py``."""

    def pack(address):
        if stamp == 0:
            return
        job = pack_job_at(address)
        work = job.work + fetch_add(job.counters + 8, 1) * job.work_bytes
        parts = job.kv_heads // job.heads_together
        while True:
            task = fetch_add(job.counters, 1)
            if task >= job.count // job.tile * parts:
                break
            start, head = job.first + task // parts * job.tile, task % parts * job.heads_together
            for side in range(2):
                quantize_side(job, work, start, head, job.heads_together, side)
                write_codes(job, work, start, head, job.heads_together, side)

    return pack
