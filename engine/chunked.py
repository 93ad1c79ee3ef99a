"""A cache method under dual chunk attention (``chunks``): the pages of each chunk are a text of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.engine.arena import Arena
from skvq.engine.chunks import Chunks, ChunkStep, Turns, chunk_steps, turned
from skvq.engine.methods import Attends, CacheMethod, HeadMethod, LabelMethod, PlainMethod, joined
from skvq.kernels.dense import SoftmaxParts
from skvq.kernels.interface import Step
from skvq.kernels.layout import PAGE_TOKENS


class ChunkedMethod:
    """``method`` chunk by chunk. Nothing is dropped from its sequences: what is left would be in other chunks then.

    Slots say at which position their token is; for each chunk but the first there is another copy of these marks, written at
    the beginning of every step, that counts from where the chunk begins. What lies outside of it is not seen then.
    """

    def __init__(self, method: HeadMethod | LabelMethod | PlainMethod, arena: Arena, chunks: Chunks, ring: int) -> None:
        self._chunks, self._ring, self._positions = chunks, ring, arena.positions
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
        for number, marks in enumerate(self._marks[: len(steps) - 1], 1):
            torch.sub(self._positions, number * self._chunks.length, out=marks)
        return _BegunInChunks(self._methods, steps, self._chunks.further(step.positions))

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

    methods: Sequence[CacheMethod]
    steps: Sequence[ChunkStep]
    further: Turns

    def attend(self, layer: int, q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Of a chunk that is the query's, the one before, or an earlier one: of the last nobody is in a later one."""
        last = len(self.steps) - 1
        if not last:
            return self.methods[0].attend(layer, q, self.steps[0].step)
        behind, far = turned(q, self.further)
        parts = SoftmaxParts()
        for number, (method, at) in enumerate(zip(self.methods, self.steps, strict=False)):
            query = q
            if number < last:
                query = torch.where(at.own, q, behind if number == last - 1 else torch.where(at.next, behind, far))
            out, lse = method.attend(layer, query, at.step)
            parts.add(out.flatten(0, 1), lse.flatten(0, 1))
        out, lse = parts.merged(q.dtype)
        return out.view(q.shape), lse.view(q.shape[:3])
