"""Products of a matrix with many vectors by AMX, whatever numbers it is stored in.

A task is some panels of 32 rows. A slice of their columns is taken apart into the two parts that tiles hold (``amx.py``), once
for all vectors, whose own parts another kernel has laid out before.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
from numba import njit
from numba.extending import intrinsic
from torch import Tensor

from skvq.kernels.numba_cpu.amx import (
    DEPTH,
    ROW,
    SIDE,
    STEP,
    TILE,
    clear,
    close_tiles,
    multiply_exact,
    multiply_tiles,
    open_tiles,
    split_row,
    store_pairs,
    turn_tile,
)
from skvq.kernels.numba_cpu.block_format import FORMATS, LANES, LaneFormat
from skvq.kernels.numba_cpu.block_parts import by_kind, code_pairs, places_of, scales_of
from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.job import offsets, record
from skvq.kernels.numba_cpu.launch import workspace
from skvq.kernels.numba_cpu.numeric import BFLOAT16, row_to_float
from skvq.kernels.numba_cpu.permission import has_amx
from skvq.kernels.numba_cpu.simd import FLOATS, WORDS, _all, _at, f32, fetch_add, i64, prefetch, record_at
from skvq.kernels.numba_cpu.tiles import FAST

SPLIT_FIELDS = ("counter", "x", "stride", "count", "steps", "tiles")
FIELDS = (
    "counter", "members", "matrix", "stride", "kind", "is_blocks", "rows", "column", "steps", "x", "count", "bias", "out",
    "out_stride", "panels", "work", "work_bytes", "w_table", "w_out", "w_row", "w_large", "w_small",  # strides in bytes
)  # fmt: skip
AHEAD = 512  # bytes of a row that are fetched before they are needed
SLICE = 1024
"""Columns taken apart at once: those of a task's rows stay in the second cache."""
MOST_PANELS = 8
"""Panels of a task: the more, the less often all vectors are read."""
split_job, multiply_job = record_at(record(*SPLIT_FIELDS)), record_at(record(*FIELDS))


def build_split(stamp):
    """Kernel that lays vectors out as A's tiles, SIDE of them after the other: ``[steps][large, small][2][16]`` rows of tiles.

    Threads take SIDE vectors at a time. Vectors there are not are zeros.
    """

    def split(address):
        if stamp == 0:
            return
        job = split_job(address)
        while True:
            first = fetch_add(address, SIDE)
            if first >= job.count:
                break
            for n in range(SIDE):
                to = job.tiles + first // SIDE * job.steps * STEP + ROW * n
                x = job.x + (first + n) * job.stride
                for s in range(job.steps):
                    if first + n < job.count:
                        split_row(x + 4 * DEPTH * s, to + STEP * s, to + STEP * s + 2 * TILE)
                    else:
                        clear(to + STEP * s, ROW)
                        clear(to + STEP * s + 2 * TILE, ROW)

    return split


def block_body(form: LaneFormat):
    """``(matrix, index, large_to, small_to)``: block ``index`` of sixteen rows as tiles of B."""

    def body(context, builder, matrix, index, large_to, small_to):
        block, heads = places_of(builder, form, matrix, index)
        units, low = scales_of(context, builder, form, block, heads)
        for p, codes in enumerate(code_pairs(builder, form, block)):
            both = []
            for left in (16, 0):
                value = builder.ashr(builder.shl(codes, _all(left)), _all(16))
                if form.offset:
                    value = builder.sub(value, _all(form.offset))
                value = builder.fmul(builder.sitofp(value, FLOATS), units[p * form.parts // 16], flags=("contract",))
                both.append(value if low is None else builder.fadd(value, low, flags=("contract",)))
            store_pairs(builder, *both, *(_at(builder, to, ROW * p, WORDS) for to in (large_to, small_to)))

    return body


BLOCK = [block_body(form) for form in FORMATS.values()]


@intrinsic
def block_to_tiles(typingctx, kind, matrix, index, large_to, small_to):
    """``block_body`` of the ``kind``-th of FORMATS."""
    return by_kind(BLOCK, 4)


@njit(**FAST)
def rows_to_tiles(job, work, row, column, to):
    """DEPTH columns of sixteen rows of 16-bit numbers as tiles of B; rows there are not are zeros."""
    source = job.matrix + row * job.stride + 2 * column
    here = min(LANES, job.rows - row)
    large, small = work + job.w_large, work + job.w_small
    if here < LANES:
        clear(large, TILE)
        clear(small, TILE)
    for r in range(here):
        numbers = source + r * job.stride
        prefetch(numbers + AHEAD, ROW)
        if job.kind == BFLOAT16:
            for i in range(ROW // 8):
                i64(large + ROW * r)[i] = i64(numbers)[i]
        else:
            row_to_float(numbers, work + job.w_row, DEPTH, job.kind)
            split_row(work + job.w_row, large + ROW * r, small + ROW * r)
    turn_tile(large, ROW, to)
    if job.kind != BFLOAT16:
        turn_tile(small, ROW, to + 2 * TILE)


@njit(**FAST)
def load_panel(job, work, row, table, step):
    """A slice of SIDE rows as B's tiles at ``table``."""
    for half in range(2):
        first = row + LANES * half
        for s in range(job.steps):
            to = table + step * s + TILE * half
            if not job.is_blocks:
                rows_to_tiles(job, work, first, job.column + DEPTH * s, to)
            elif first < job.rows:
                matrix = job.matrix + first // LANES * job.stride
                block_to_tiles(job.kind, matrix, job.column // DEPTH + s, to, to + 2 * TILE)
            else:
                clear(to, TILE)
                clear(to + 2 * TILE, TILE)


@njit(**FAST)
def put(job, found, row, n):
    """Write SIDE x SIDE results, or as many as there are, with the bias; of a later slice added to what is there."""
    rows = min(SIDE, job.rows - row)
    for i in range(min(SIDE, job.count - n)):
        values, out = f32(found + 4 * SIDE * i), f32(job.out + (n + i) * job.out_stride + 4 * row)
        if job.column:
            for r in range(rows):
                out[r] += values[r]
        elif job.bias:
            bias = f32(job.bias + 4 * row)
            for r in range(rows):
                out[r] = values[r] + bias[r]
        else:
            for r in range(rows):
                out[r] = values[r]


@njit(**FAST)
def multiply_task(job, work, first, panels):
    """``panels`` panels from row ``first`` on, times all vectors."""
    exact = not job.is_blocks and job.kind == BFLOAT16
    step = STEP // 2 if exact else STEP
    table, found = work + job.w_table, work + job.w_out
    for p in range(panels):
        load_panel(job, work, first + SIDE * p, table + p * job.steps * step, step)
    for n in range(0, job.count, SIDE):
        a = job.x + n // SIDE * job.steps * STEP
        for p in range(panels):
            row, b = first + SIDE * p, table + p * job.steps * step
            whole = n + SIDE <= job.count and row + SIDE <= job.rows and (job.column > 0 or job.bias == 0)
            to, stride = (job.out + n * job.out_stride + 4 * row, job.out_stride) if whole else (found, 4 * SIDE)
            if exact:
                multiply_exact(a, b, job.steps, to, stride, whole and job.column > 0)
            else:
                multiply_tiles(a, b, job.steps, to, stride, whole and job.column > 0)
            if not whole:
                put(job, found, row, n)


def build_multiply_amx(stamp):
    """Kernel of ``out[n] = W x[n] + bias`` over a slice of columns. Threads take ``panels`` panels at a time."""

    def multiply_amx(address):
        if stamp == 0:
            return
        job = multiply_job(address)
        work = job.work + fetch_add(address + 8, 1) * job.work_bytes
        open_tiles()
        while True:
            first = fetch_add(address, SIDE * job.panels)
            if first >= job.rows:
                break
            multiply_task(job, work, first, min(job.panels, (job.rows - first + SIDE - 1) // SIDE))
        close_tiles()

    return multiply_amx


SPLIT, MULTIPLY = Entry(build_split, SPLIT_FIELDS), Entry(build_multiply_amx, FIELDS)


def multiply_by_amx(x: Tensor, bias: Tensor | None, out: Tensor, data: Tensor, kind: int, *, is_blocks: bool) -> None:
    """``out[n] = W x[n] + bias`` for float32 x [N, columns], contiguous, and out [N, rows], of which only rows may be strided.

    ``data``: rows of 16-bit numbers, ``kind`` one of ``numeric``'s, or with ``is_blocks`` groups of sixteen rows
    (``linear_pack.py``) of the ``kind``-th of FORMATS. Columns must be a multiple of 32.
    """
    (count, columns), rows, threads = x.shape, out.shape[1], torch.get_num_threads()
    assert has_amx() and columns % DEPTH == 0 and data.is_contiguous(), (columns, data.stride())
    blocks, steps = -(-count // SIDE), min(SLICE, columns) // DEPTH
    panels = -(-rows // SIDE)
    panels = -(-panels // (threads * -(-panels // (threads * MOST_PANELS))))  # all threads have as many tasks
    sizes = {"w_table": panels * steps * STEP, "w_out": 4 * SIDE * SIDE, "w_row": 4 * DEPTH, "w_large": TILE, "w_small": TILE}
    where, nbytes = offsets(sizes, tuple(sizes))
    work = workspace(threads * nbytes + blocks * steps * STEP + 64)
    start = work.data_ptr() + -work.data_ptr() % 64
    tiles = start + threads * nbytes
    stride = data.stride(0) * data.element_size()
    for column in range(0, columns, SLICE):
        steps = min(SLICE, columns - column) // DEPTH
        SPLIT(min(threads, blocks), 0, x.data_ptr() + 4 * column, 4 * columns, count, steps, tiles)
        MULTIPLY(
            threads, 0, 0, data.data_ptr(), stride, kind, int(is_blocks), rows, column, steps, tiles,
            count, 0 if bias is None else bias.data_ptr(), out.data_ptr(), 4 * out.stride(0), panels, start, nbytes, *where,
        )  # fmt: skip
