"""Fused attention over packed pages whose groups lie inside a head (methods ``rotate`` and ``plain``).

Score of a token: ``sum_g scale_g (q_g . (code - half)) + mid_g sum(q_g)``, the q of the stored basis times log2(e)/sqrt(D) in
two int8 limbs. Values: ``sum_t p_t (mid_g + scale_g (code - half))``, with ``p_t scale_g`` in two limbs under one factor.
Both are the same dot product of bytes (``products.py``), 2 D codes a token and kv head, each unpacked once for all queries.
Reads (key bits + value bits) D / 8 + 4 G bytes a token and kv head; writes nothing but the state.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.mean import mean_prepare, mean_scores, turn_rotors
from skvq.kernels.numba_cpu.numeric import HIDDEN, LEAST, decode_meta, limb_bits, limb_limit, split_limbs
from skvq.kernels.numba_cpu.products import dots
from skvq.kernels.numba_cpu.simd import f32, fetch_add, i8, i32, i64, job_at, largest, prefetch, smallest
from skvq.kernels.numba_cpu.softmax import matvec, take
from skvq.kernels.numba_cpu.tiles import FAST, LANE_BLOCK, load_keys, load_values, round_up
from skvq.kernels.numba_cpu.worker import begin_task, end_task, my_workspace, task_count


@njit(**FAST)
def group_words(job, group):
    """The first word (four channels) that overlaps a group, and how many do."""
    begin = group * job.group_size // 4
    return begin, ((group + 1) * job.group_size + 3) // 4 - begin


@njit(**FAST)
def query_stride(job):
    """Bytes of one limb of a query: each group has words of its own, with zeros for channels outside the group."""
    return job.groups * ((job.group_size + 3) // 4 + 1) * 4


@njit(**FAST)
def prepare(job, work, head, rows):
    """Take queries to the stored basis; write their limbs ``[row][limb][G][words]`` and coefficients ``[row][G][3]``."""
    size, gsize, groups = job.size, job.group_size, job.groups
    bits = limb_bits(job.key_levels)
    limit, half = limb_limit(bits), np.float32((job.key_levels - 1) * 0.5)
    stride = query_stride(job)
    units = f32(job.key_unit + 4 * head * groups)
    stored = work + job.w_stored_q
    for m in range(rows):
        if job.has_basis:
            matvec(job.query_basis + 4 * head * size * size, work + job.w_q + 4 * m * size, stored, size)
        else:
            given, kept = f32(work + job.w_q + 4 * m * size), f32(stored)
            for c in range(size):
                kept[c] = given[c]
        q = f32(stored)
        limbs = work + job.w_limbs + 2 * m * stride
        cleared = i8(limbs)
        for i in range(2 * stride):
            cleared[i] = 0
        for g in range(groups):
            total, begin = np.float32(0), stored + 4 * g * gsize
            for c in range(g * gsize, (g + 1) * gsize):
                total += q[c]
            most = max(LEAST, max(largest(begin, gsize), -smallest(begin, gsize)))
            at = limbs + g * (stride // groups) + g * gsize % 4
            whole = split_limbs(begin, limit / most, gsize, at, at + stride, bits)
            coef = f32(work + job.w_coefs + 12 * (m * groups + g))
            coef[0] = most / limit * units[g]
            coef[1] = half * whole * coef[0]
            coef[2] = total * units[g]


@njit(**FAST)
def tile_scores(job, work, rows, ahead):
    """Scores ``[row][token]`` of the tile that is unpacked in the workspace. ``ahead``: address to prefetch meanwhile."""
    tile, groups = job.tile, job.groups
    bits, stride, share = limb_bits(job.key_levels), query_stride(job), job.key_tile // groups
    for g in range(groups):
        word, count = group_words(job, g)
        dots(
            rows, work + job.w_codes + word * tile * 4, tile * 4, count, work + job.w_limbs + g * (stride // groups),
            stride, 2 * stride, work + job.w_dots, tile * 4, bits, tile, ahead + g * share, share,
        )  # fmt: skip
        scale = f32(work + job.w_meta + 4 * g * tile)
        mid = f32(work + job.w_meta + 4 * (groups + g) * tile)
        bias = f32(work + job.w_bias)
        for m in range(rows):
            coef = f32(work + job.w_coefs + 12 * (m * groups + g))
            a, b, c = coef[0], coef[1], coef[2]
            dot, s = f32(work + job.w_dots + 4 * m * tile), f32(work + job.w_scores + 4 * m * tile)
            if g == 0:
                for t in range(tile):
                    s[t] = bias[t] + scale[t] * (a * dot[t] - b) + mid[t] * c
            else:
                for t in range(tile):
                    s[t] += scale[t] * (a * dot[t] - b) + mid[t] * c


@njit(**FAST)
def tile_values(job, work, head, rows, ahead):
    """Add the tile's values, weighted by what ``take`` left in the scores, to the state."""
    tile, groups, gsize, size = job.tile, job.groups, job.group_size, job.size
    bits, share = limb_bits(job.value_levels), job.value_tile // groups
    limit, half = limb_limit(bits), np.float32((job.value_levels - 1) * 0.5)
    lanes = round_up(size, LANE_BLOCK)
    units = f32(job.value_unit + 4 * head * groups)
    for g in range(groups):
        scale = f32(work + job.w_meta + 4 * (2 * groups + g) * tile)
        mid = f32(work + job.w_meta + 4 * (3 * groups + g) * tile)
        weight = f32(work + job.w_row)
        factors = f32(work + job.w_factors)
        for m in range(rows):
            p = f32(work + job.w_scores + 4 * m * tile)
            middle = np.float32(0)
            for t in range(tile):
                weight[t] = p[t] * scale[t]
                middle += p[t] * mid[t]
            most = max(LEAST, largest(work + job.w_row, tile))
            low = work + job.w_weights + 2 * m * tile
            whole = split_limbs(work + job.w_row, limit / most, tile, low, low + tile, bits)
            factor = most / limit * units[g]
            factors[m] = factor
            f32(work + job.w_acc + 4 * (m * (size + groups) + size))[g] += middle * units[g] - half * whole * factor
        begin, end = g * gsize, (g + 1) * gsize
        first = begin // LANE_BLOCK * LANE_BLOCK
        width = round_up(end - first, LANE_BLOCK)
        dots(
            rows, work + job.w_codes + first * 4, lanes * 4, tile // 4, work + job.w_weights,
            tile, 2 * tile, work + job.w_dots, lanes * 4, bits, width, ahead + g * share, share,
        )  # fmt: skip
        for m in range(rows):
            factor = factors[m]
            acc = f32(work + job.w_acc + 4 * m * (size + groups))
            dot = f32(work + job.w_dots + 4 * (m * lanes - first))
            for c in range(begin, end):
                acc[c] += factor * dot[c]


@njit(**FAST)
def hide_before(job, work, row, query, rows, start):
    """Hide the tokens of the tile at ``start`` that lie outside a query's span."""
    share, tile = job.heads // job.kv_heads, job.tile
    positions = i32(job.positions + 4 * row * job.queries)
    for m in range(rows):
        outside = min(np.int64(positions[query + m // share]) - job.span + 1 - start, tile)
        s = f32(work + job.w_scores + 4 * m * tile)
        for t in range(outside):
            s[t] = HIDDEN


@njit(**FAST)
def tile_address(job, table, head, number):
    """Where the key codes, value codes and metadata of a tile lie."""
    page, inside = np.int64(table[number // job.tiles]), number % job.tiles
    return (
        job.key_codes + page * job.key_page + head * job.key_head + inside * job.key_tile,
        job.value_codes + page * job.value_page + head * job.value_head + inside * job.value_tile,
        job.meta + page * job.meta_page + head * job.meta_head + inside * 4 * job.groups * job.tile,
    )


@njit(**FAST, inline="always")
def attend_packed(job, work, row, head, query, rows, begin, end):
    """Attend over tiles ``begin .. end-1`` of the packed tokens, into the state."""
    tile, groups, size = job.tile, job.groups, job.size
    table = i32(job.page_table + i64(job.slots)[row] * job.page_table_stride)
    prepare(job, work, head, rows)
    pairs = mean_prepare(job, work, head, rows, begin)
    keys, values, meta = tile_address(job, table, head, begin)
    for number in range(begin, end):
        next_keys, next_values, next_meta = tile_address(job, table, head, min(number + 1, end - 1))
        prefetch(next_meta, 4 * groups * tile)
        decode_meta(meta, work + job.w_meta, work + job.w_bias, groups, tile)
        load_keys(keys, work + job.w_codes, job.key_levels, size, tile)
        tile_scores(job, work, rows, next_keys)
        if pairs > 0:
            mean_scores(job, work, head, rows)
            turn_rotors(job, work, pairs)
        hide_before(job, work, row, query, rows, number * tile)
        take(work + job.w_scores, tile, tile, rows, work + job.w_top, work + job.w_total, work + job.w_acc, size + groups)
        load_values(values, work + job.w_codes, job.value_levels, size, tile)
        tile_values(job, work, head, rows, next_values)
        keys, values, meta = next_keys, next_values, next_meta


def build_attend_heads(stamp):
    """The kernel; its job is ATTEND of ``job.py``."""

    def attend_heads(address):
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

    return attend_heads
