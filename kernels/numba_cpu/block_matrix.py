"""A weight matrix kept as GGUF blocks: products with a few vectors, and rows expanded to float32."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from skvq.kernels.ggml.formats import BLOCK
from skvq.kernels.numba_cpu.amx_linear import multiply_by_amx
from skvq.kernels.numba_cpu.block_format import FORMATS, LANES
from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.launch import workspace
from skvq.kernels.numba_cpu.linear import (
    EACH_FIELDS,
    EXPAND_FIELDS,
    FOUND_BYTES,
    MULTIPLY_FIELDS,
    build_expand,
    build_multiply,
    build_multiply_each,
    rounded_bytes,
)
from skvq.kernels.numba_cpu.linear_pack import pack_blocks
from skvq.kernels.numba_cpu.linear_simd import TOGETHER
from skvq.kernels.numba_cpu.permission import has_amx

FEW = 16
"""Vectors that are rounded to 16-bit integers on a CPU that has AMX for more."""
CHUNKS_PER_THREAD = 4
"""Pieces of the matrix per thread: a thread that the system interrupts holds up one piece, not its whole share."""
ROUNDED_BYTES = 1 << 19
"""Most bytes of rounded vectors multiplied at once: they stay in the cache while the matrix streams by."""
EXPAND_ROWS = 16
"""Rows a thread expands at a time."""


MULTIPLY, EXPAND = Entry(build_multiply, MULTIPLY_FIELDS), Entry(build_expand, EXPAND_FIELDS)
MULTIPLY_EACH = Entry(build_multiply_each, EACH_FIELDS)


class BlockMatrix:
    """Weights uint8 ``data`` in blocks of type ``kind``, (rows, columns) = ``shape`` when expanded. Immutable."""

    def __init__(self, blocks: Tensor, kind: str) -> None:
        """``blocks`` uint8 [rows, bytes of a row] as a GGUF file holds them; it is copied."""
        form = FORMATS[kind]
        self.kind, self.data = kind, pack_blocks(blocks, form)
        self.shape = len(blocks), blocks.shape[1] // form.file_bytes * form.span * BLOCK
        self._fields = self._fields_of(len(blocks), len(self.data))

    def _fields_of(self, rows: int, groups: int) -> tuple[int, ...]:
        """Of a job on that many rows."""
        counter, members, number = 0, 0, list(FORMATS).index(self.kind)
        blocks = self.shape[1] // BLOCK
        return counter, members, self.data.data_ptr(), number, rows, groups, blocks, self.data.stride(0)

    def part(self, first: int, rows: int) -> BlockMatrix:
        """``rows`` rows from ``first`` on, both whole groups of sixteen; a view."""
        assert first % LANES == rows % LANES == 0, (first, rows)
        part = copy(self)
        part.shape, part.data = (rows, self.shape[1]), self.data[first // LANES : (first + rows) // LANES]
        part._fields = part._fields_of(rows, len(part.data))
        return part

    @staticmethod
    def bytes_of(kind: str, rows: int, columns: int) -> int:
        """What a matrix takes.

        >>> BlockMatrix.bytes_of("Q4_K", 16, 256) * 8 / (16 * 256)
        4.625
        """
        form = FORMATS[kind]
        return -(-rows // LANES) * (columns // (form.span * BLOCK)) * form.span_bytes

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out[n] = W x[n] + bias`` for float32 x [N, columns] and out [N, rows], of which only rows may be strided."""
        count, columns = x.shape
        assert x.dtype == out.dtype == torch.float32 and columns == self.shape[1] and x.is_contiguous(), (x.dtype, x.shape)
        assert out.shape == (count, self.shape[0]) and out.stride(1) == 1, (out.shape, out.stride())
        if count > FEW and has_amx():
            multiply_by_amx(x, bias, out, self.data, list(FORMATS).index(self.kind), is_blocks=True)
            return
        size = rounded_bytes(columns)
        step = max(TOGETHER, ROUNDED_BYTES // size // TOGETHER * TOGETHER)
        if count <= step:
            self._multiply(x, bias, out, size)
            return
        for start in range(0, count, step):
            self._multiply(x[start : start + step], bias, out[start : start + step], size)

    def _multiply(self, x: Tensor, bias: Tensor | None, out: Tensor, size: int) -> None:
        threads, groups, count = torch.get_num_threads(), len(self.data), x.shape[0]
        work_bytes = size * count + FOUND_BYTES
        work = workspace(threads * work_bytes)
        MULTIPLY(
            min(threads, groups), *self._fields, x.data_ptr(), count, 0 if bias is None else bias.data_ptr(), out.data_ptr(),
            4 * out.stride(0), max(1, groups // (CHUNKS_PER_THREAD * threads)), work.data_ptr(), work_bytes,
        )  # fmt: skip

    def multiply_each(self, x: Tensor, ids: Tensor, out: Tensor) -> None:
        """``out[p] = W_i x[p // (P / N)]``, W_i the ``ids[p]``-th of matrices one above the other, each of whole groups of
        sixteen rows; float32 x [N, columns] and out [P, rows], ids int64 [P]."""
        count, rows = out.shape
        assert x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous(), (x.dtype, out.stride())
        assert x.shape[1] == self.shape[1] and rows % LANES == 0 and count % len(x) == 0, (x.shape, out.shape, self.shape)
        assert ids.shape == (count,) and ids.dtype == torch.int64 and ids.is_contiguous(), (ids.shape, ids.dtype)
        groups, threads, size = rows // LANES, torch.get_num_threads(), rounded_bytes(self.shape[1])
        work_bytes = size + FOUND_BYTES
        work = workspace(threads * work_bytes)
        MULTIPLY_EACH(
            threads, *self._fields_of(rows, groups), x.data_ptr(), count // len(x), ids.data_ptr(), count, 0, out.data_ptr(),
            4 * rows, min(groups, -(-groups * count // (CHUNKS_PER_THREAD * threads))), work.data_ptr(), work_bytes,
        )  # fmt: skip

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` int64 [N], of which none is out of range, in float32."""
        assert ids.dtype == torch.int64 and ids.dim() == 1, (ids.dtype, ids.shape)
        ids, count = ids.contiguous(), len(ids)
        out = torch.empty(count, self.shape[1], dtype=torch.float32)
        if count:
            threads = min(torch.get_num_threads(), -(-count // EXPAND_ROWS))
            EXPAND(threads, *self._fields, ids.data_ptr(), count, out.data_ptr(), 4 * out.stride(0), EXPAND_ROWS)
        return out
