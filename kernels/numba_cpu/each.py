"""Each vector by a matrix of its own, of those that lie one above the other, in float32 arithmetic (``kernels.experts``)."""

# mypy: ignore-errors
from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.halves import make_dot, product
from skvq.kernels.numba_cpu.job import record
from skvq.kernels.numba_cpu.numeric import BFLOAT16, FLOAT16, FLOAT32
from skvq.kernels.numba_cpu.simd import FLOATS, LANES, _at, f32, fetch_add, i64, record_at
from skvq.kernels.numba_cpu.tiles import FAST

FIELDS = ("counter", "matrix", "kind", "rows", "columns", "x", "share", "ids", "count", "out", "chunk")
KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
PIECES_PER_THREAD = 4
job_at = record_at(record(*FIELDS))


def _floats(context, builder, address):
    """Sixteen float32."""
    return builder.load(_at(builder, address, 0, FLOATS), align=4)


dot_float32 = make_dot("dot_float32", _floats, 4)


@njit(**FAST)
def row_product(job, row, x):
    """One row times one vector."""
    if job.kind == FLOAT32:
        return dot_float32(job.matrix + 4 * row * job.columns, x, job.columns)
    return product(job.kind, job.matrix + 2 * row * job.columns, x, job.columns)


def build_multiply_each_row(stamp):
    """Kernel of ``out[p] = W_i x[p // share]``, W_i the ``ids[p]``-th of matrices of ``rows`` rows.

    Threads take ``chunk`` rows of one such product at a time.
    """

    def multiply_each_row(address):
        if stamp == 0:
            return
        job = job_at(address)
        pieces = (job.rows + job.chunk - 1) // job.chunk
        while True:
            task = fetch_add(address, 1)
            if task >= job.count * pieces:
                break
            pair, first = task // pieces, task % pieces * job.chunk
            out, above = f32(job.out + 4 * pair * job.rows), i64(job.ids)[pair] * job.rows
            x = job.x + 4 * (pair // job.share) * job.columns
            for row in range(first, min(first + job.chunk, job.rows)):
                out[row] = row_product(job, above + row, x)

    return multiply_each_row


MULTIPLY_EACH = Entry(build_multiply_each_row, FIELDS)


def multiply_each(weight: Tensor, x: Tensor, ids: Tensor, out: Tensor) -> None:
    """``out[p] = W_i x[p // (P / N)]``, W_i the ``ids[p]``-th of the matrices in ``weight`` [their rows, columns].

    float32 x [N, columns] and out [P, rows of one], ids int64 [P]; columns a multiple of sixteen.
    """
    (count, rows), columns = out.shape, weight.shape[1]
    assert x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous(), (x.dtype, out.stride())
    assert x.shape[1] == columns and columns % LANES == 0 and count % len(x) == 0, (x.shape, out.shape, weight.shape)
    assert ids.shape == (count,) and ids.dtype == torch.int64 and ids.is_contiguous(), (ids.shape, ids.dtype)
    assert weight.dim() == 2 and weight.is_contiguous(), (weight.shape, weight.stride())
    threads = torch.get_num_threads()
    MULTIPLY_EACH(
        threads, 0, weight.data_ptr(), KINDS[weight.dtype], rows, columns, x.data_ptr(), count // len(x), ids.data_ptr(), count,
        out.data_ptr(), min(rows, -(-rows * count // (PIECES_PER_THREAD * threads))),
    )  # fmt: skip
