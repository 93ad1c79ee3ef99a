"""Products of a 16-bit matrix with many vectors in float32 arithmetic: rows are widened once for all of them.

A task is 64 rows, in blocks of 32 lanes, and some vectors. COLUMNS of the rows at a time are widened and transposed, so that
they lie in the CPU's cache, and multiplied with all vectors of the task (``flash_simd.product``).
"""

# mypy: ignore-errors
from __future__ import annotations

from numba import njit

from skvq.kernels.numba_cpu.flash_simd import BLOCK, STEP
from skvq.kernels.numba_cpu.job import record
from skvq.kernels.numba_cpu.numeric import row_to_float
from skvq.kernels.numba_cpu.products import product
from skvq.kernels.numba_cpu.simd import f32, fetch_add, record_at
from skvq.kernels.numba_cpu.spread import transpose
from skvq.kernels.numba_cpu.tiles import FAST

FIELDS = (
    "counter", "members", "matrix", "kind", "rows", "columns", "x", "count", "bias", "out", "out_stride", "batch", "work",
    "work_bytes", "w_rows", "w_table", "w_out",  # strides in bytes
)  # fmt: skip
BLOCKS = 2  # of a task
COLUMNS = 256
VECTORS = 64  # multiplied with one block before the next: they stay in the CPU's first cache
multiply_job = record_at(record(*FIELDS))


@njit(**FAST)
def widen(job, rows, first, column, count, table):
    """Columns ``column ..`` of 32 rows from ``first`` on as float32 [count][32] at ``table``; rows there are not are zero.
    ``rows``: room for them before they are transposed.
    """
    for r in range(BLOCK):
        target = rows + 4 * COLUMNS * r
        if first + r < job.rows:
            row_to_float(job.matrix + 2 * ((first + r) * job.columns + column), target, count, job.kind)
        else:
            empty = f32(target)
            for c in range(count):
                empty[c] = 0
    for half in range(2):
        for c in range(0, count, 8):
            at = rows + 4 * (16 * half * COLUMNS + c)
            transpose(at, 4 * COLUMNS, table + STEP * c + 64 * half, STEP)


@njit(**FAST)
def multiply_task(job, work, row, first, count):
    """``out[n] = W x[n] + bias`` of 64 rows from ``row`` on and ``count`` vectors from ``first`` on."""
    for column in range(0, job.columns, COLUMNS):
        here = min(COLUMNS, job.columns - column)
        for block in range(BLOCKS):
            if row + BLOCK * block < job.rows:
                table = work + job.w_table + STEP * COLUMNS * block
                widen(job, work + job.w_rows, row + BLOCK * block, column, here, table)
        for n in range(0, count, VECTORS):
            some = min(VECTORS, count - n)
            x = job.x + 4 * ((first + n) * job.columns + column)
            for block in range(BLOCKS):
                table, out = work + job.w_table + STEP * COLUMNS * block, work + job.w_out + STEP * (job.batch * block + n)
                if row + BLOCK * block >= job.rows:
                    break
                product(some, table, STEP, here, x, 4 * job.columns, 4, out, STEP, column > 0)
    for block in range(BLOCKS):
        start = row + BLOCK * block
        for n in range(count):
            found, to = f32(work + job.w_out + STEP * (job.batch * block + n)), f32(job.out + (first + n) * job.out_stride)
            for r in range(min(BLOCK, job.rows - start)):
                to[start + r] = found[r] + (f32(job.bias)[start + r] if job.bias else 0)


def build_multiply_many(stamp):
    """Kernel of ``out[n] = W x[n] + bias``. Threads take tasks from a counter."""

    def multiply_many(address):
        if stamp == 0:
            return
        job = multiply_job(address)
        work = job.work + fetch_add(address + 8, 1) * job.work_bytes
        batches = (job.count + job.batch - 1) // job.batch
        tasks = (job.rows + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK) * batches
        while True:
            task = fetch_add(address, 1)
            if task >= tasks:
                break
            first = task % batches * job.batch
            multiply_task(job, work, task // batches * BLOCKS * BLOCK, first, min(job.batch, job.count - first))

    return multiply_many
