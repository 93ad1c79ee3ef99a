"""How threads share the work of attention.

A unit is a (row of the batch, kv head, chunk of queries). Its tasks are the splits of its packed tokens, then one more for its
full-precision slots. Threads take tasks from a counter; who finishes the last of a unit merges them.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import exp2
from skvq.kernels.numba_cpu.rows import attend_slots, scale_queries
from skvq.kernels.numba_cpu.simd import f32, fetch_add, i32
from skvq.kernels.numba_cpu.softmax import matvec, merge, start, write_lse
from skvq.kernels.numba_cpu.tiles import FAST


@njit(**FAST)
def first_tile(job, row, query, count):
    """First packed tile within the span of any of ``count`` queries."""
    positions = i32(job.positions + 4 * row * job.queries)
    earliest = np.int64(positions[query])
    for n in range(1, count):
        earliest = min(earliest, np.int64(positions[query + n]))
    return max(np.int64(0), earliest - job.span + 1) // job.tile


@njit(**FAST)
def write_partial(job, work, target, rows):
    """Write the state of a task as rows ``[top, total, acc (D)]``, the mid part of each group added to its channels."""
    size, width = job.size, job.size + job.groups
    for m in range(rows):
        out = f32(target + 4 * m * (size + 2))
        acc = f32(work + job.w_acc + 4 * m * width)
        out[0] = f32(work + job.w_top)[m]
        out[1] = f32(work + job.w_total)[m]
        for g in range(job.groups):
            constant = acc[size + g]
            for c in range(g * job.group_size, (g + 1) * job.group_size):
                out[2 + c] = acc[c] + constant


@njit(**FAST)
def finish(job, work, row, head, query, rows, partials):
    """Merge the splits of a unit, take the sum out of the stored basis, merge the full-precision slots, normalize, write."""
    size, share = job.size, job.heads // job.kv_heads
    step = 4 * job.vectors * (size + 2)
    tops, totals, acc = work + job.w_top, work + job.w_total, work + job.w_dots
    merge(partials, job.splits, step, rows, size, acc, tops, totals)
    full = partials + job.splits * step
    mean = f32(job.value_mean + 4 * head * size)
    for m in range(rows):
        index = (row * job.queries + query + m // share) * job.heads + head * share + m % share
        out = f32(job.out + 4 * index * size)
        packed = f32(acc + 4 * m * size)
        top, total = f32(tops)[m], f32(totals)[m]
        if job.has_basis:
            matvec(job.output_basis + 4 * head * size * size, acc + 4 * m * size, work + job.w_row, size)
            packed = f32(work + job.w_row)
            for c in range(size):
                packed[c] += total * mean[c]
        other = f32(full + 4 * m * (size + 2))
        best = max(top, other[0])
        a, b = exp2(top - best), exp2(other[0] - best)
        total = a * total + b * other[1]
        share_of = np.float32(1) / total if total > np.float32(0) else np.float32(0)
        a, b = a * share_of, b * share_of
        for c in range(size):
            out[c] = a * packed[c] + b * other[2 + c]
        write_lse(job.lse + 4 * index, best, total)


@njit(**FAST)
def my_workspace(job):
    """Address of the calling thread's workspace; call once per thread."""
    return job.work + fetch_add(job.counters + 8, 1) * job.work_bytes


@njit(**FAST)
def task_count(job):
    return job.rows * job.kv_heads * job.chunks * (job.splits + 1)


@njit(**FAST)
def begin_task(job, work, task):
    """Set up a task: scaled queries and an empty state. A task of full-precision slots is done here.

    Returns row, kv head, first query, query rows, and the packed tiles to attend over: first and one past the last.
    """
    unit, part = task // (job.splits + 1), task % (job.splits + 1)
    query = unit % job.chunks * job.chunk
    head, row = unit // job.chunks % job.kv_heads, unit // job.chunks // job.kv_heads
    queries = min(job.chunk, job.queries - query)
    rows = scale_queries(job, work, row, head, query, queries)
    start(work + job.w_top, work + job.w_total, work + job.w_acc, rows, job.size + job.groups)
    if part == job.splits:
        attend_slots(job, work, row, head, query, rows)
        return row, head, query, rows, 0, 0
    first = first_tile(job, row, query, queries)
    count = max(np.int64(0), (i32(job.packed)[row] + job.tile - 1) // job.tile - first)
    return row, head, query, rows, first + count * part // job.splits, first + count * (part + 1) // job.splits


@njit(**FAST)
def end_task(job, work, task, row, head, query, rows):
    """Store the state of a task; the last task of a unit merges all of them."""
    parts = job.splits + 1
    unit, part = task // parts, task % parts
    nbytes = 4 * job.vectors * (job.size + 2)
    partials = job.work + job.partials + unit * parts * nbytes
    write_partial(job, work, partials + part * nbytes, rows)
    if fetch_add(job.counters + 16 + 8 * unit, 1) == job.splits:
        finish(job, work, row, head, query, rows, partials)
