"""A matrix of 16-bit floats in memory: product with a few vectors in float32 arithmetic, and rows in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.numba_cpu.amx import DEPTH
from skvq.kernels.numba_cpu.amx_linear import multiply_by_amx
from skvq.kernels.numba_cpu.attend import KINDS
from skvq.kernels.numba_cpu.each import multiply_each
from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.flash_simd import BLOCK
from skvq.kernels.numba_cpu.flash_simd import STEP as ROW
from skvq.kernels.numba_cpu.halves import FIELDS, build_multiply_halves
from skvq.kernels.numba_cpu.halves_many import BLOCKS, COLUMNS, build_multiply_many
from skvq.kernels.numba_cpu.halves_many import FIELDS as MANY_FIELDS
from skvq.kernels.numba_cpu.job import offsets
from skvq.kernels.numba_cpu.launch import workspace
from skvq.kernels.numba_cpu.permission import has_amx

MULTIPLY, MULTIPLY_MANY = Entry(build_multiply_halves, FIELDS), Entry(build_multiply_many, MANY_FIELDS)
FEW = 16
"""Vectors that are multiplied with weights widened in registers; for more they are widened in memory, once for all."""
LEAST_BATCH = 128
"""Vectors of a task, at least, so that widening its weights is a small part of it."""
CHUNKS_PER_THREAD = 4
STEP = 16
"""Columns must be a multiple of this."""


class HalfMatrix:
    """Weights bfloat16 or float16 [rows, columns], held as they are: every number is exact in float32. Immutable."""

    def __init__(self, data: Tensor) -> None:
        assert data.dim() == 2 and data.is_contiguous() and data.shape[1] % STEP == 0, (data.shape, data.stride())
        assert data.dtype in (torch.bfloat16, torch.float16), data.dtype
        self.data, self.shape = data, (data.shape[0], data.shape[1])

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out[n] = W x[n] + bias`` for float32 x [N, columns] and out [N, rows], of which only rows may be strided."""
        count, columns = x.shape
        rows, threads = self.shape[0], torch.get_num_threads()
        bias_at = 0 if bias is None else bias.data_ptr()
        assert x.dtype == out.dtype == torch.float32 and columns == self.shape[1] and x.is_contiguous(), (x.dtype, x.shape)
        assert out.shape == (count, rows) and out.stride(1) == 1, (out.shape, out.stride())
        if count > FEW and columns % DEPTH == 0 and has_amx():
            multiply_by_amx(x, bias, out, self.data, KINDS[self.data.dtype], is_blocks=False)
            return
        if count > FEW:
            self._multiply_many(x, bias_at, out, threads)
            return
        MULTIPLY(
            min(threads, rows), 0, self.data.data_ptr(), KINDS[self.data.dtype], rows, columns, x.data_ptr(), count,
            bias_at, out.data_ptr(), 4 * out.stride(0), max(1, rows // (CHUNKS_PER_THREAD * threads)),
        )  # fmt: skip

    def _multiply_many(self, x: Tensor, bias: int, out: Tensor, threads: int) -> None:
        count, (rows, columns) = len(x), self.shape
        runs = -(-rows // (BLOCKS * BLOCK))
        batch = min(count, max(LEAST_BATCH, -(-count // -(-CHUNKS_PER_THREAD * threads // runs))))
        sizes = {"w_rows": ROW * COLUMNS, "w_table": BLOCKS * ROW * COLUMNS, "w_out": BLOCKS * ROW * batch}
        where, nbytes = offsets(sizes, tuple(sizes))
        threads = min(threads, runs * -(-count // batch))
        work = workspace(threads * nbytes)
        MULTIPLY_MANY(
            threads, 0, 0, self.data.data_ptr(), KINDS[self.data.dtype], rows, columns, x.data_ptr(), count, bias,
            out.data_ptr(), 4 * out.stride(0), batch, work.data_ptr(), nbytes, *where,
        )  # fmt: skip

    def part(self, first: int, rows: int) -> HalfMatrix:
        """``rows`` rows from ``first`` on, a view."""
        return HalfMatrix(self.data[first : first + rows])

    def multiply_each(self, x: Tensor, ids: Tensor, out: Tensor) -> None:
        """See ``each.multiply_each``."""
        multiply_each(self.data, x, ids, out)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` int64 [N] in float32."""
        return self.data[ids].float()
