"""Weights from a source into memory: matrices as they are stored where the device multiplies those, the rest in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from skvq.engine.embedding import DenseEmbedding, Embedding, StoredEmbedding
from skvq.engine.report import Reporter
from skvq.kernels.experts import DenseStack, Stack, StoredStack
from skvq.kernels.ggml.blocks import scales_of
from skvq.kernels.ggml.formats import FORMATS
from skvq.kernels.linear import DenseLinear, FloatMatrix, Linear, StackedMatrix, StoredLinear
from skvq.loaders.names import EMBEDDING, expected_shapes, expert_stacks
from skvq.loaders.source import QuantizedBlocks, WeightSource, check_finite

CPU = torch.device("cpu")
EXPANDED, HALF = "", str(torch.float16)
"""The kind of a matrix that is held in the compute dtype, and of one in float16."""


class Kinds(Protocol):
    """The kinds of stored matrices, ggml types or torch dtypes, that a device multiplies as they are."""

    def keeps(self, kind: str, columns: int) -> bool:
        """Whether such a matrix is kept as it is stored."""

    def nbytes(self, kind: str, rows: int, columns: int) -> int:
        """Bytes that one which is kept will take."""

    def matrix(self, kind: str, data: Tensor) -> StackedMatrix:
        """One which is kept: rows of ggml blocks uint8 [rows, bytes], or numbers [rows, columns]."""

    @property
    def expanded_bytes(self) -> int:
        """Bytes of one that are expanded at a time, to multiply many vectors."""


class NoKinds:
    """All are expanded."""

    def keeps(self, kind: str, columns: int) -> bool:
        return False

    def nbytes(self, kind: str, rows: int, columns: int) -> int:
        raise AssertionError(kind)

    def matrix(self, kind: str, data: Tensor) -> StackedMatrix:
        raise AssertionError(kind)

    @property
    def expanded_bytes(self) -> int:
        return 0


class WeightReader:
    """A source whose weights are checked to be finite, with progress in numbers read."""

    def __init__(self, source: WeightSource, advance: Callable[[float], None]) -> None:
        self._source, self.advance = source, advance

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The weight in its stored type on a device, checked there: a card does it at the speed of its memory."""
        tensor = self._source.read(name).to(device)
        self.check(name, tensor)
        self.advance(tensor.numel())
        return tensor

    def kind(self, name: str) -> str:
        """Of the blocks or the numbers that it is stored as."""
        return self._source.stored(name)[0]

    def blocks(self, name: str) -> QuantizedBlocks | None:
        """As stored, not checked and not counted yet: ``check`` its scales and ``advance`` if it is kept."""
        return self._source.blocks(name)

    def expanded(self, name: str) -> str:
        """How the weight is stored if there are no blocks of it, and ``read`` expands it."""
        return self._source.expanded(name)

    def check(self, name: str, tensor: Tensor) -> None:
        check_finite(name, tensor, self._source.where)


class Storage:
    """Weights by canonical name, each read once.

    Blocks that the device does not multiply are expanded, which is reported once for each kind.
    """

    def __init__(self, form: Form, reader: WeightReader, report: Reporter) -> None:
        self._form, self._reader, self._report = form, reader, report
        self._told: set[str] = set()

    def vector(self, names: Sequence[str]) -> Tensor:
        """Norms or biases, one after another."""
        return _stacked([self._reader.read(name, self._form.device).to(self._form.dtype) for name in names])

    def linear(self, names: Sequence[str], bias: Tensor | None) -> Linear:
        """Matrices stacked by rows."""
        return self._linear([self._read(name) for name in names], bias)

    def stack(self, names: Sequence[Sequence[str]]) -> Stack:
        """The matrix of each expert, stacked by rows of those that are named for it.

        Where they are not ``alike``, all of them are expanded, to float16 if that is kept. No two copies of a stack are held.
        """
        every = [name for expert in names for name in expert]
        as_stored = alike(self._reader.kind(name) for name in every)
        kind, first = self._read(every[0], as_stored=as_stored)
        held = first.new_empty(len(every) * len(first), first.shape[1])  # all have as many rows: gates, ups
        for place, name in zip(torch.split(held, len(first)), every, strict=True):
            place.copy_(first if name == every[0] else self._read(name, as_stored=as_stored)[1])
        rows = len(held) // len(names)
        if kind == EXPANDED:
            return DenseStack(held.view(len(names), rows, -1))
        return StoredStack(self._form.kinds.matrix(kind, held), rows)

    def embedding(self, name: str) -> tuple[Embedding, Linear]:
        """Token embedding, and the same matrix as a head."""
        head = self._linear([self._read(name)], None)
        if isinstance(head, StoredLinear):
            return StoredEmbedding(head.parts[0], self._form.dtype), head
        return DenseEmbedding(head.tensors[0]), head

    def _linear(self, found: list[tuple[str, Tensor]], bias: Tensor | None) -> Linear:
        if all(kind == EXPANDED for kind, _ in found):
            return DenseLinear(_stacked([data for _, data in found]), bias)
        parts = []
        for kind, group in groupby(found, lambda item: item[0]):  # neighbours of one kind are one matrix
            data = _stacked([data for _, data in group])
            parts.append(FloatMatrix(data) if kind == EXPANDED else self._form.kinds.matrix(kind, data))
        return StoredLinear(tuple(parts), bias)

    def _read(self, name: str, *, as_stored: bool = True) -> tuple[str, Tensor]:
        """Kind and data of a matrix: as it is stored, or else as float16, if that is kept; or the numbers on the device."""
        form, blocks, stored = self._form, self._reader.blocks(name), self._reader.expanded(name)
        if blocks is not None:
            if as_stored and form.kinds.keeps(blocks.kind, blocks.shape[1]):
                self._reader.check(name, scales_of(blocks.data, FORMATS[blocks.kind]))
                self._reader.advance(prod(blocks.shape))
                return blocks.kind, blocks.data
            stored = blocks.kind
        data = self._reader.read(name, form.device)
        if not as_stored:
            data = data.to(torch.float16 if form.kinds.keeps(HALF, data.shape[1]) else form.dtype)
        keeps = form.kinds.keeps(str(data.dtype), data.shape[1])
        if stored and stored not in self._told:
            self._told.add(stored)
            held = str(data.dtype if keeps else form.dtype).removeprefix("torch.")
            self._report.message(f"weights stored as {stored} are held as {held}: more memory, slower decoding")
        return (str(data.dtype), data.contiguous()) if keeps else (EXPANDED, data.to(form.dtype))


def alike(kinds: Iterable[str]) -> bool:
    """Whether matrices of these kinds can be one."""
    return len(set(kinds)) == 1


@dataclass(frozen=True, slots=True)
class Form:
    """How a model's weights are held: on which device, what of them as it is stored, the rest in which dtype."""

    device: torch.device
    dtype: torch.dtype
    kinds: Kinds

    def held_bytes(self, source: WeightSource) -> int:
        """Bytes that all weights of a source will take; nothing is read."""
        return sum(self._nbytes(source, expected_shapes(source.config)))

    def idle_bytes(self, source: WeightSource) -> int:
        """Those that a step of one token does not read: an embedding that is not the head too, experts that are not chosen."""
        config = source.config
        table = 0 if config.tie_embeddings else sum(self._nbytes(source, [EMBEDDING]))
        if config.experts is None:
            return table
        names = [name for stack in expert_stacks(config) for expert in stack for name in expert]
        held = sum(self._nbytes(source, names))
        return table + held * (config.experts.count - config.experts.chosen) // config.experts.count

    def expanded_bytes(self, source: WeightSource) -> int:
        """Bytes that are expanded of them at a time: of experts, one at least."""
        config = source.config
        expert = 4 * config.intermediate_size * config.hidden_size if config.experts else 0
        return max(self.kinds.expanded_bytes, expert) if self.kinds.expanded_bytes and self._kept(source) else 0

    def _nbytes(self, source: WeightSource, names: Iterable[str]) -> Iterator[int]:
        kept, shapes = self._kept(source), expected_shapes(source.config)
        for name in names:
            yield self.kinds.nbytes(kept[name], *shapes[name]) if name in kept else prod(shapes[name]) * self.dtype.itemsize

    def _kept(self, source: WeightSource) -> dict[str, str]:
        """Names and kinds of matrices that will be held as they are stored."""
        shapes = expected_shapes(source.config)
        kinds = {name: source.stored(name)[0] for name, shape in shapes.items() if len(shape) == 2}
        for stack in expert_stacks(source.config):
            if not alike(kinds[name] for expert in stack for name in expert):
                kinds |= {name: HALF for expert in stack for name in expert}
        return {name: kind for name, kind in kinds.items() if self.kinds.keeps(kind, shapes[name][1])}


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
