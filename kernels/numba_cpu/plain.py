"""Attention over 16-bit pages (method ``fp``): the control group, same arena and same division of labour."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.rows import attend_rows
from skvq.kernels.numba_cpu.simd import fetch_add, i32, i64, job_at
from skvq.kernels.numba_cpu.tiles import FAST
from skvq.kernels.numba_cpu.worker import begin_task, end_task, my_workspace, task_count


@njit(**FAST)
def attend_pages(job, work, row, head, query, rows, begin, end):
    """Attend over tiles ``begin .. end-1`` of 16-bit pages, into the state."""
    table = i32(job.page_table + i64(job.slots)[row] * job.page_table_stride)
    width = 2 * job.size
    packed = i32(job.packed)[row]
    for tile in range(begin, end):
        page, inside = np.int64(table[tile // job.tiles]), tile % job.tiles
        start = tile * job.tile
        count = min(job.tile, packed - start)
        keys = job.key_codes + page * job.key_page + head * job.key_head + inside * job.tile * width
        values = job.value_codes + page * job.value_page + head * job.value_head + inside * job.tile * width
        attend_rows(job, work, row, query, rows, keys, values, width, job.page_kind, i32(job.packed), start, count, False)


def build_attend_plain(stamp):
    """The kernel of method ``fp``; its job is ATTEND of ``job.py``."""

    def attend_plain(address):
        if stamp == 0:
            return
        job = job_at(address)
        work = my_workspace(job)
        while True:
            task = fetch_add(job.counters, 1)
            if task >= task_count(job):
                break
            row, head, query, rows, begin, end = begin_task(job, work, task)
            attend_pages(job, work, row, head, query, rows, begin, end)
            end_task(job, work, task, row, head, query, rows)

    return attend_plain
