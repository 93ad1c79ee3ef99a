"""Which form a model's weights are held in: the compute dtype, or on the CPU what the file has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from skvq.engine.linear import (
    DenseEmbedding,
    DenseLinear,
    Embedding,
    FloatMatrix,
    Linear,
    StoredEmbedding,
    StoredLinear,
    StoredMatrix,
)
from skvq.engine.report import Reporter
from skvq.kernels.numba_cpu.block_matrix import BlockMatrix
from skvq.kernels.numba_cpu.half_matrix import STEP, HalfMatrix
from skvq.loaders import check_finite
from skvq.loaders.names import expected_shapes
from skvq.loaders.source import QuantizedBlocks, WeightSource

HALVES = (str(torch.float16), str(torch.bfloat16))


class Storage(Protocol):
    """Weights by canonical name, each read once."""

    def vector(self, names: Sequence[str]) -> Tensor:
        """Norms or biases, one after another."""

    def linear(self, names: Sequence[str], bias: Tensor | None) -> Linear:
        """Matrices stacked by rows."""

    def embedding(self, name: str) -> tuple[Embedding, Linear]:
        """Token embedding, and the same matrix as a head."""


class WeightReader:
    """A source whose weights are checked to be finite, with progress in numbers read."""

    def __init__(self, source: WeightSource, advance: Callable[[float], None]) -> None:
        self._source, self._advance = source, advance

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        self.check(name, tensor)
        self._advance(tensor.numel())
        return tensor

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """As stored and not checked yet: ``check`` its scales."""
        found = self._source.blocks(name)
        if found is not None and BlockMatrix.takes(found.kind):
            self._advance(found.shape[0] * found.shape[1])
        return found

    def check(self, name: str, tensor: Tensor) -> None:
        check_finite(name, tensor, self._source.where)


class DenseStorage:
    """Everything in one dtype on one device."""

    def __init__(self, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        self._reader, self._device, self._dtype = reader, device, dtype

    def vector(self, names: Sequence[str]) -> Tensor:
        parts = [self._reader.read(name).to(device=self._device, dtype=self._dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def linear(self, names: Sequence[str], bias: Tensor | None) -> Linear:
        return DenseLinear(self.vector(names), bias)

    def embedding(self, name: str) -> tuple[Embedding, Linear]:
        weight = self.vector([name])
        return DenseEmbedding(weight), DenseLinear(weight, None)


class StoredStorage:
    """On the CPU: GGUF blocks and 16-bit floats as their file has them, the rest float32. Arithmetic is float32 for all.

    A block type that cannot be kept is expanded, and the reporter is told once.
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
            return blocks.kind, blocks.data
        if blocks is not None and blocks.kind not in self._told:
            self._told.add(blocks.kind)
            self._report.message(f"blocks of type {blocks.kind} are held as float32: more memory, slower decoding")
        data = self._reader.read(name)
        return (str(data.dtype), data.contiguous()) if HalfMatrix.takes(data) else ("floats", data.float())


def held_bytes(source: WeightSource, dtype: torch.dtype, *, as_stored: bool) -> int:
    """Bytes that all weights of a source will take in ``StoredStorage`` or ``DenseStorage``; nothing is read."""
    total = 0
    for name, shape in expected_shapes(source.config).items():
        kind, nbytes = source.stored(name)
        half = kind in HALVES and shape[-1] % STEP == 0
        kept = as_stored and len(shape) == 2 and (half or BlockMatrix.takes(kind))
        total += nbytes if kept else prod(shape) * (4 if as_stored else dtype.itemsize)
    return total


def _matrix(form: str, data: Tensor) -> StoredMatrix:
    if BlockMatrix.takes(form):
        return BlockMatrix(data, form)
    return HalfMatrix(data) if HalfMatrix.takes(data) else FloatMatrix(data)
