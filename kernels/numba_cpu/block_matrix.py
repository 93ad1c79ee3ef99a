"""A weight matrix kept as GGUF blocks: products with a few vectors, and rows expanded to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.ggml.formats import BLOCK
from skvq.kernels.numba_cpu.block_format import FORMATS, LANES
from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.launch import workspace
from skvq.kernels.numba_cpu.linear import (
    EXPAND_FIELDS,
    FOUND_BYTES,
    MULTIPLY_FIELDS,
    build_expand,
    build_multiply,
    rounded_bytes,
)
from skvq.kernels.numba_cpu.linear_pack import pack_blocks
from skvq.kernels.numba_cpu.linear_simd import TOGETHER

CHUNKS_PER_THREAD = 4
"""Pieces of the matrix per thread: a thread that the system interrupts holds up one piece, not its whole share."""
ROUNDED_BYTES = 1 << 19
"""Most bytes of rounded vectors multiplied at once: they stay in the cache while the matrix streams by."""
EXPAND_ROWS = 16
"""Rows a thread expands at a time."""


MULTIPLY, EXPAND = Entry(build_multiply, MULTIPLY_FIELDS), Entry(build_expand, EXPAND_FIELDS)


class BlockMatrix:
    """Weights uint8 ``data`` in blocks of type ``kind``, (rows, columns) = ``shape`` when expanded. Immutable."""

    def __init__(self, blocks: Tensor, kind: str) -> None:
        """``blocks`` uint8 [rows, bytes of a row] as a GGUF file holds them; it is copied."""
        self.form = FORMATS[kind]
        rows, columns = len(blocks), blocks.shape[1] // self.form.file_bytes * self.form.span * BLOCK
        self.shape = rows, columns
        self.data = pack_blocks(blocks, self.form)
        self._groups = self.data.shape[0]
        counter, members, number = 0, 0, list(FORMATS).index(kind)
        self._fields = (
            counter, members, self.data.data_ptr(), number, rows, self._groups, columns // BLOCK, self.data.stride(0),
        )  # fmt: skip

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
        size = rounded_bytes(columns)
        step = max(TOGETHER, ROUNDED_BYTES // size // TOGETHER * TOGETHER)
        if count <= step:
            self._multiply(x, bias, out, size)
            return
        for start in range(0, count, step):
            self._multiply(x[start : start + step], bias, out[start : start + step], size)

    def _multiply(self, x: Tensor, bias: Tensor | None, out: Tensor, size: int) -> None:
        threads, groups, count = torch.get_num_threads(), self._groups, x.shape[0]
        work_bytes = size * count + FOUND_BYTES
        work = workspace(threads * work_bytes)
        MULTIPLY(
            min(threads, groups), *self._fields, x.data_ptr(), count, 0 if bias is None else bias.data_ptr(), out.data_ptr(),
            4 * out.stride(0), max(1, groups // (CHUNKS_PER_THREAD * threads)), work.data_ptr(), work_bytes,
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
