"""A model's weights on the CPU, in the form their file has: GGUF blocks, 16-bit floats, the rest float32."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from skvq.engine.linear import DenseEmbedding, Embedding, FloatMatrix, StoredEmbedding, StoredLinear, StoredMatrix
from skvq.engine.report import Reporter
from skvq.engine.storage import Storage, WeightReader
from skvq.kernels.linear import DenseLinear, Linear
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import STEP, HalfMatrix
from skvq.loaders.names import expected_shapes
from skvq.loaders.source import WeightSource

HALVES = (str(torch.float16), str(torch.bfloat16))


class StoredStorage:
    """GGUF blocks and 16-bit floats as their file has them, the rest float32. Arithmetic is float32 for all.

    A block type that cannot be kept is expanded, which is reported once.
    """

    def __init__(self, reader: WeightReader, report: Reporter) -> None:
        self._reader, self._report = reader, report
        self._told: set[str] = set()

    def vector(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self._reader.read(name).float() for name in names])

    def linear(self, names: Sequence[str], bias: Tensor | None) -> Linear:
        found = [self._read(name) for name in names]
        if all(data.dtype == torch.float32 for _, data in found):
            return DenseLinear(torch.cat([data for _, data in found]), bias)
        groups = groupby(found, lambda item: item[0])  # neighbours of one form are one matrix
        return StoredLinear(tuple(_matrix(form, torch.cat([data for _, data in group])) for form, group in groups), bias)

    def embedding(self, name: str) -> tuple[Embedding, Linear]:
        form, data = self._read(name)
        if data.dtype == torch.float32:
            return DenseEmbedding(data), DenseLinear(data, None)
        matrix = _matrix(form, data)
        return StoredEmbedding(matrix), StoredLinear((matrix,), None)

    def _read(self, name: str) -> tuple[str, Tensor]:
        """Form and data of a weight: rows of ggml blocks, a 16-bit matrix, or float32."""
        blocks = self._reader.blocks(name)
        if blocks is not None and BlockMatrix.takes(blocks.kind):
            self._reader.check(name, BlockMatrix.scales_of(blocks.data, blocks.kind))
            self._reader.advance(prod(blocks.shape))
            return blocks.kind, blocks.data
        if blocks is not None and blocks.kind not in self._told:
            self._told.add(blocks.kind)
            self._report.message(f"weight blocks of type {blocks.kind} are held as float32: more memory, slower decoding")
        data = self._reader.read(name)
        return (str(data.dtype), data.contiguous()) if HalfMatrix.takes(data) else ("floats", data.float())


def _matrix(form: str, data: Tensor) -> StoredMatrix:
    if BlockMatrix.takes(form):
        return BlockMatrix(data, form)
    return HalfMatrix(data) if HalfMatrix.takes(data) else FloatMatrix(data)


class StoredForm:
    """``StoredStorage``."""

    def held_bytes(self, source: WeightSource) -> int:
        total = 0
        for name, shape in expected_shapes(source.config).items():
            kind, nbytes = source.stored(name)
            if BlockMatrix.takes(kind) and len(shape) == 2:
                total += BlockMatrix.bytes_of(kind, *shape)
            elif kind in HALVES and len(shape) == 2 and shape[-1] % STEP == 0:
                total += nbytes
            else:
                total += prod(shape) * torch.float32.itemsize
        return total

    def storage(self, reader: WeightReader, report: Reporter) -> Storage:
        return StoredStorage(reader, report)
