"""Products with block-quantized matrices that stay as they are in memory (``linear_pack.py``), on all threads.

The vector is rounded to 16-bit integers, with a scale for each block of 32 columns, not to 8 bits as in llama.cpp: its error is
then at most 1.6e-5 of the largest of 32 neighbours. Logits of SmolLM2 differ from those of the expanded weights by 7e-4 on
average (largest of 10 million: 7e-3), with 8 bits by 0.18 (1.5). It costs nothing for one vector, whose time is that of reading
the weights; for many, unpacked once for four, it is 1.5 to 3.5 times as fast as expanding to float32 and torch.mm.
"""

# mypy: ignore-errors
from __future__ import annotations

from numba import njit

from skvq.kernels.ggml.formats import BLOCK
from skvq.kernels.numba_cpu import linear_simd as simd
from skvq.kernels.numba_cpu.block_format import LANES
from skvq.kernels.numba_cpu.job import record
from skvq.kernels.numba_cpu.linear_expand import expand_block
from skvq.kernels.numba_cpu.linear_simd import TOGETHER
from skvq.kernels.numba_cpu.simd import f32, fetch_add, i64, record_at
from skvq.kernels.numba_cpu.tiles import FAST

MULTIPLY_FIELDS = (
    "counter", "members", "matrix", "kind", "rows", "groups", "blocks", "group_bytes",
    "x", "count", "bias", "out", "out_stride", "chunk", "work", "work_bytes",  # strides in bytes
)  # fmt: skip
EACH_FIELDS = (
    "counter", "members", "matrix", "kind", "rows", "groups", "blocks", "group_bytes",
    "x", "share", "ids", "count", "bias", "out", "out_stride", "chunk", "work", "work_bytes",
)  # fmt: skip
EXPAND_FIELDS = (
    "counter", "members", "matrix", "kind", "rows", "groups", "blocks", "group_bytes",
    "ids", "count", "out", "out_stride", "chunk",
)  # fmt: skip
multiply_job = record_at(record(*MULTIPLY_FIELDS))
each_job = record_at(record(*EACH_FIELDS))
expand_job = record_at(record(*EXPAND_FIELDS))
FOUND_BYTES = 4 * LANES * TOGETHER


def rounded_bytes(columns: int) -> int:
    """Bytes of one rounded vector (layout: ``linear_simd.dot_body``)."""
    return -(-(columns // BLOCK * (2 * BLOCK + 12)) // 64) * 64


@njit(**FAST)
def dot(kind, matrix, blocks, rounded, step, out):
    """Sixteen rows times a rounded vector."""
    simd.dot(kind, matrix, blocks, rounded, step, out)


@njit(**FAST)
def dots(kind, matrix, blocks, rounded, step, out):
    """Sixteen rows times TOGETHER rounded vectors."""
    simd.dots(kind, matrix, blocks, rounded, step, out)


@njit(**FAST)
def round_vector(x, blocks, rounded):
    """Round a vector to 16-bit integers, with a scale and sums per block (layout: ``linear_simd.dot_body``)."""
    scales = rounded + blocks * 2 * BLOCK
    sums = scales + blocks * 4
    firsts = sums + blocks * 4
    for b in range(blocks):
        simd.round_block(x + 4 * BLOCK * b, rounded + 2 * BLOCK * b, scales + 4 * b, sums + 4 * b, firsts + 4 * b)


@njit(**FAST)
def put(job, found, group, n):
    """Write sixteen results with the bias added; fewer if the last group of rows is not full."""
    values = f32(found)
    out = f32(job.out + n * job.out_stride + 4 * LANES * group)
    count = min(LANES, job.rows - group * LANES)
    if job.bias:
        bias = f32(job.bias + 4 * LANES * group)
        for r in range(count):
            out[r] = values[r] + bias[r]
    else:
        for r in range(count):
            out[r] = values[r]


def build_multiply(stamp):
    """Kernel of ``out[n] = W x[n] + bias``. Threads take ``chunk`` groups of sixteen rows at a time."""

    def multiply(address):
        if stamp == 0:
            return
        job = multiply_job(address)
        work = job.work + fetch_add(address + 8, 1) * job.work_bytes
        blocks, size = job.blocks, (job.work_bytes - FOUND_BYTES) // job.count
        found = work + job.count * size
        ready = False
        while True:
            first = fetch_add(address, job.chunk)
            if first >= job.groups:
                break
            if not ready:
                for n in range(job.count):
                    round_vector(job.x + 4 * BLOCK * blocks * n, blocks, work + n * size)
                ready = True
            for group in range(first, min(first + job.chunk, job.groups)):
                matrix = job.matrix + group * job.group_bytes
                whole = job.count // TOGETHER * TOGETHER
                for n in range(0, whole, TOGETHER):
                    dots(job.kind, matrix, blocks, work + n * size, size, found)
                    for m in range(TOGETHER):
                        put(job, found + 4 * LANES * m, group, n + m)
                for n in range(whole, job.count):
                    dot(job.kind, matrix, blocks, work + n * size, size, found)
                    put(job, found, group, n)

    return multiply


def build_multiply_each(stamp):
    """Kernel of ``out[p] = W_i x[p // share]``, W_i the ``ids[p]``-th of matrices of ``rows`` rows, ``groups`` whole groups.

    Threads take ``chunk`` groups of one such product at a time.
    """

    def multiply_each(address):
        if stamp == 0:
            return
        job = each_job(address)
        work = job.work + fetch_add(address + 8, 1) * job.work_bytes
        blocks, found = job.blocks, work + job.work_bytes - FOUND_BYTES
        pieces, ready = (job.groups + job.chunk - 1) // job.chunk, -1
        while True:
            task = fetch_add(address, 1)
            if task >= job.count * pieces:
                break
            pair, first = task // pieces, task % pieces * job.chunk
            if ready != pair // job.share:
                ready = pair // job.share
                round_vector(job.x + 4 * BLOCK * blocks * ready, blocks, work)
            matrix = job.matrix + i64(job.ids)[pair] * job.groups * job.group_bytes
            for group in range(first, min(first + job.chunk, job.groups)):
                dot(job.kind, matrix + group * job.group_bytes, blocks, work, 0, found)
                put(job, found, group, pair)

    return multiply_each


@njit(**FAST)
def expand_row(kind, matrix, blocks, row, out):
    """One row (0 to 15) of a group as float32."""
    for b in range(blocks):
        expand_block(kind, matrix, b, row, out + 4 * BLOCK * b)


def build_expand(stamp):
    """Kernel of ``out[n] = W[ids[n]]`` in float32."""

    def expand(address):
        if stamp == 0:
            return
        job = expand_job(address)
        while True:
            first = fetch_add(address, job.chunk)
            if first >= job.count:
                break
            for n in range(first, min(first + job.chunk, job.count)):
                row = i64(job.ids)[n]
                matrix = job.matrix + row // LANES * job.group_bytes
                expand_row(job.kind, matrix, job.blocks, row % LANES, job.out + n * job.out_stride)

    return expand
