"""One decode step of the whole model: launched kernel by kernel, or replayed as a graph.

Within ``DecodeBatch.step`` nothing depends on the host: lengths, places and token ids lie in tensors that are moved in place,
grids are fixed. A graph therefore holds the step of any sequences; packing and new pages come after it and change only what
tensors hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from operator import is_
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.layer_caches import DecodeBatch
from skvq.engine.methods import CacheMethod
from skvq.engine.model import Model
from skvq.engine.rope import ModelRope, at_positions
from skvq.engine.sizes import held_rows
from skvq.kernels.graphs import Captured, Graphs, NotCaptured
from skvq.kernels.notices import notice

T = TypeVar("T")


def hidden_states(model: Model, rope: ModelRope, batch: DecodeBatch, max_packed: int) -> Tensor:
    """Hidden states [B * N, d] of all tokens after all layers; ``batch.begin`` has said where they go."""
    batch.mark_slots()
    step_rope = at_positions(rope, batch.rope_positions)
    x = model.embed(batch.token_ids)  # [B, N, d]
    for index, layer in enumerate(batch.layers(max_packed)):
        x = model.layer(index, x, step_rope, layer)
    return x.flatten(0, 1)


def logits(model: Model, rope: ModelRope, batch: DecodeBatch, max_packed: int) -> Tensor:
    """Logits float32 [B * N, V] of what follows each token."""
    return model.head(hidden_states(model, rope, batch, max_packed))


class DecodeStep(Protocol):
    """The next N tokens of each sequence, row by row: logits float32 [B * N, V] of what follows each, the caller's own; the
    tokens are cached then.
    """

    def run(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> Tensor: ...

    def give_up_graphs(self) -> bool:
        """Free the memory that graphs hold: whether there were any."""
        ...


class EagerStep:
    """Every kernel launched by the host: any device, any backend, filters that need attention mass."""

    def __init__(self, model: Model, rope: ModelRope, setup: CacheSetup) -> None:
        self.model, self.rope = model, rope
        self._batch = cache(partial(DecodeBatch, setup))  # one for each shape

    def run(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> Tensor:
        batch = self._batch(len(sequences), len(token_ids) // len(sequences))
        with batch.step(sequences, token_ids):
            return logits(self.model, self.rope, batch, batch.max_packed)

    def give_up_graphs(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, eq=False)
class HeldGraph:
    """A graph and what it is good for: steps over these tensors, so long, read by these methods, in this setting."""

    batch: DecodeBatch
    bound: int
    methods: list[CacheMethod]
    setting: object
    captured: Captured

    def serves(self, batch: DecodeBatch, bound: int, setting: object) -> bool:
        """Whether the step that ``batch`` has begun is one of those."""
        same = batch is self.batch and bound == self.bound and setting == self.setting
        return same and all(map(is_, self.methods, batch.methods))


MOST_FAILURES = 3
"""Captures in a row that fail before there are no more."""
MOST_GRAPHS = 16
"""Graphs kept, if their logits are few (``sizes.held_rows``): on a GPU one per batch shape, each with memory of its own for
these and what a layer computes."""


class GraphStep:
    """The step captured once and replayed for whatever sequences, until they outgrow the graph.

    A sequence that drops its oldest tokens may change its method, whose tensors a graph holds by address: the step is then
    captured anew.
    """

    def __init__(self, model: Model, rope: ModelRope, setup: CacheSetup, graphs: Graphs) -> None:
        self.model, self.rope, self.graphs = model, rope, graphs
        self._batch = cache(partial(DecodeBatch, setup))  # one for each shape
        self._held: list[HeldGraph] = []  # the one used last is the last
        self._held_rows = held_rows(setup.arena.shape.sequences)
        self._failed: dict[tuple[int, int], int] = {}  # captures one after another, by sequences and tokens of each

    def run(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> Tensor:
        shape = len(sequences), len(token_ids) // len(sequences)
        batch = self._batch(*shape)
        with batch.step(sequences, token_ids):
            bound = self.graphs.bound(batch.max_packed)
            captured = self._recall(batch, bound)
            if captured is not None:
                captured.replay()
            elif self._failed.get(shape) == MOST_FAILURES:
                return self._in_memory(partial(logits, self.model, self.rope, batch, batch.max_packed))
            else:
                work = partial(logits, self.model, self.rope, batch, bound)
                try:
                    captured = self._in_memory(partial(self.graphs.capture, work))
                except NotCaptured as failed:
                    self._give_up(shape, str(failed))
                    return failed.result
                self._failed.pop(shape, None)
                self._held.append(HeldGraph(batch, bound, batch.methods, self.graphs.setting, captured))
            return captured.result.clone()  # the next replay writes over them

    def give_up_graphs(self) -> bool:
        held, self._held = self._held, []
        return bool(held)

    def _in_memory(self, work: Callable[[], T]) -> T:
        """Do the work of a step. Where memory is short for it, that of the other steps' graphs may be what is missing."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.give_up_graphs():
                raise
        return work()

    def _give_up(self, shape: tuple[int, int], why: str) -> None:
        """Make room for the next try, or tell that there will be none for this shape: torch may be unable to capture after one
        has failed."""
        failed = self._failed[shape] = self._failed.get(shape, 0) + 1
        if failed == 1:
            self.give_up_graphs()  # their memory may be what was missing
        if failed == MOST_FAILURES:
            notice(f"{why}; steps of this many sequences are launched kernel by kernel from now on, which is slower")

    def _recall(self, batch: DecodeBatch, bound: int) -> Captured | None:
        """The graph of this step, if there is one; it is the last then.

        The oldest is given up if there are too many: nothing else holds it, so its memory is free for the next.
        """
        known = [held for held in self._held if held.serves(batch, bound, self.graphs.setting)]
        others = [held for held in self._held if held not in known]
        rows = accumulate(len(held.captured.result) for held in reversed(others))
        kept = min(MOST_GRAPHS - 1, sum(count <= self._held_rows for count in rows))
        self._held = others[len(others) - kept :] + known
        return known[0].captured if known else None


def decode_step_of(model: Model, rope: ModelRope, setup: CacheSetup, *, graph: bool) -> DecodeStep:
    """A graph, if it is wanted and everything in the step can be captured; else kernel by kernel.

    Filters that need attention mass address their slots from the host: they keep the eager step.
    """
    if not graph or setup.needs_mass or not setup.backend.captures(model.config.head_size):
        return EagerStep(model, rope, setup)
    return GraphStep(model, rope, setup, graphs_of(setup))


def graphs_of(setup: CacheSetup) -> Graphs:
    """The backend's graphs for this arena: CUDA graphs on a GPU, tapes on a CPU."""
    tile = setup.regions.tile
    most = setup.max_context // tile * tile  # a sequence that was cut may have packed more than another of its length
    return setup.backend.graphs(setup.device, most)
