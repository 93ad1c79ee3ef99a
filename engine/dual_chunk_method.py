"""A cache method under dual chunk attention (``dual_chunks``): the pages of each chunk are a text of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.engine.arena import Arena
from skvq.engine.dual_chunks import Chunks, chunk_steps
from skvq.engine.methods import Attends, CacheMethod, HeadMethod, LabelMethod, PlainMethod, joined
from skvq.kernels.interface import Ops, Step
from skvq.kernels.layout import PAGE_TOKENS


class ChunkedMethod:
    """``method`` chunk by chunk. Nothing is dropped from its sequences: what is left would be in other chunks then.

    Slots say at which position their token is; for each chunk but the first there is another copy of these marks, written at
    the beginning of every step, that counts from where the chunk begins. What lies outside of it is not seen then.
    """

    def __init__(
        self, method: HeadMethod | LabelMethod | PlainMethod, arena: Arena, chunks: Chunks, ring: int, ops: Ops
    ) -> None:
        self._chunks, self._ring, self._ops, self._positions = chunks, ring, ops, arena.positions
        self._marks = arena.tensors["chunk_positions"].unbind(0)
        self._methods: list[CacheMethod] = [method, *(method.over(marks) for marks in self._marks)]

    def pack(self, layer: int, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor) -> None:
        for chunk, a, b in self._runs(first, len(keys)):
            part = slice(a - first, b - first)
            place = a - chunk * self._chunks.length
            self._methods[0].pack(layer, self._pages(page_row, chunk), place, keys[part], values[part], retained[part])

    def unpack(self, layer: int, page_row: Tensor, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        found = []
        for chunk, a, b in self._runs(first, count):
            place = a - chunk * self._chunks.length
            found.append(self._methods[0].unpack(layer, self._pages(page_row, chunk), place, b - a, dtype))
        return joined(found, 0)

    def begun(self, step: Step) -> Attends:
        steps = chunk_steps(step, self._chunks, self._ring)
        if len(steps) == 1:
            return self._methods[0]
        for number, marks in enumerate(self._marks[: len(steps) - 1], 1):
            torch.sub(self._positions, number * self._chunks.length, out=marks)
        turns = zip(*self._chunks.further(step.positions, len(steps) - 1), strict=True)
        return _BegunInChunks(self._ops, self._methods, steps, list(turns))

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return self.begun(step).attend(layer, q, step)

    def origin(self, dropped: int) -> int:
        return 0

    def at(self, dropped: int) -> ChunkedMethod:
        assert not dropped, dropped
        return self

    def _pages(self, page_row: Tensor, chunk: int) -> Tensor:
        """A chunk's part of a row of the page table."""
        pages = self._chunks.length // PAGE_TOKENS
        return page_row[chunk * pages : (chunk + 1) * pages]

    def _runs(self, first: int, count: int) -> list[tuple[int, int, int]]:
        return [(a // self._chunks.length, a, b) for a, b in self._chunks.runs(first, count)]


@dataclass(frozen=True, slots=True)
class _BegunInChunks:
    """``Attends`` of one step."""

    ops: Ops
    methods: Sequence[CacheMethod]
    steps: Sequence[Step]
    turns: Sequence[tuple[Tensor, Tensor]]  # of queries where they meet each chunk but the last, which is nobody's earlier one

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        queries = [*(self.ops.turn(q, cos, sin) for cos, sin in self.turns), q]
        parts = [m.attend(layer, query, at) for m, query, at in zip(self.methods, queries, self.steps, strict=False)]
        outs, lses = zip(*parts, strict=True)
        return self.ops.merge(outs, lses)
