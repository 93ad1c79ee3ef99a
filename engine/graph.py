"""One decode step of the whole model on the device, launched kernel by kernel or replayed as one CUDA graph.

Between ``DecodeBatch.begin`` and ``commit`` nothing depends on the host: lengths, places and token ids lie in tensors that are
moved in place, grids are fixed. A graph therefore holds the step for as long as the batch is the same; packing and new pages
come between steps and change only what tensors hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor

from skvq.engine.methods import CacheMethod
from skvq.engine.model import Model
from skvq.engine.rope import at_positions
from skvq.engine.setup import CacheSetup
from skvq.engine.steps import DecodeBatch
from skvq.kernels.interface import RopeFrequencies
from skvq.kernels.registry import is_capturable, new_tape


def last_hidden(model: Model, rope: RopeFrequencies, batch: DecodeBatch, max_packed: int) -> Tensor:
    """Hidden state [B, d] of each row's last token after all layers; ``batch.begin`` has said where its tokens go."""
    batch.place()
    turn = at_positions(rope, batch.turns)
    x = model.embed(batch.token_ids)  # [B, N, d]
    for layer in range(model.config.num_layers):
        x = model.layer(layer, x, turn, batch.layer(layer, max_packed))
    return x[:, -1]


class DecodeStep(Protocol):
    """Logits float32 [B, V] of one token of each sequence; the caller commits."""

    def run(self, batch: DecodeBatch, token_ids: Sequence[int]) -> Tensor: ...


class EagerStep:
    """Every kernel launched by the host: any device, any backend, filters that need attention mass."""

    def __init__(self, model: Model, rope: RopeFrequencies) -> None:
        self.model, self.rope = model, rope

    def run(self, batch: DecodeBatch, token_ids: Sequence[int]) -> Tensor:
        batch.begin(token_ids)
        return self.launch(batch, batch.max_packed)

    def launch(self, batch: DecodeBatch, max_packed: int) -> Tensor:
        """Work of the device alone, after ``batch.begin``, for up to ``max_packed`` packed tokens in each sequence."""
        return self.model.head(last_hidden(self.model, self.rope, batch, max_packed))


@dataclass(frozen=True, slots=True)
class Captured:
    """A step held as a graph: ``replay`` does it again and leaves the logits in ``logits``, always the same tensor."""

    replay: Callable[[], None]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class CapturedFor:
    """A graph and what it is good for."""

    batch: ref[DecodeBatch]  # weak: a graph holds no sequence
    bound: int
    methods: list[CacheMethod]
    captured: Captured

    def serves(self, batch: DecodeBatch, bound: int) -> bool:
        """Whether a step of ``batch`` is the one that was captured."""
        return batch is self.batch() and bound == self.bound and all(map(is_, self.methods, batch.methods))


class Graphs(Protocol):
    """What can hold the work of a device. Capturing does the work: ``logits`` hold its result."""

    def capture(self, work: Callable[[], Tensor]) -> Captured: ...

    def bound(self, batch: DecodeBatch) -> int:
        """Packed tokens of a sequence that the graph of this batch is good for; it is captured anew when they change."""


class CudaGraphs:
    """Graphs of one device, captured on a stream of their own, each in memory of its own, which is given back with the graph.

    The work is first launched kernel by kernel, with the grids of the graph: kernels get compiled and scratch memory allocated.
    Grids are those of the longest sequence the arena may hold, ``max_packed``, so no length outgrows them.
    """

    def __init__(self, max_packed: int, device: torch.device) -> None:
        self.max_packed = max_packed
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own is one for all devices

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        found = work()
        graph = torch.cuda.CUDAGraph()
        # memory of its own: of a pool whose graph is gone cuBLAS keeps a part; other threads may allocate meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            logits = work()
        logits.copy_(found)
        return Captured(graph.replay, logits)

    def bound(self, batch: DecodeBatch) -> int:
        return self.max_packed


class CpuGraphs:
    """Steps of backend ``numba`` on tape. Recording costs about a step, so work is divided for the lengths there are."""

    def capture(self, work: Callable[[], Tensor]) -> Captured:
        with new_tape() as tape:
            logits = work()
        return Captured(tape.play, logits)

    def bound(self, batch: DecodeBatch) -> int:
        return batch.max_packed


MOST_GRAPHS = 4
"""Batches that may take turns without being captured again and again."""


class GraphStep:
    """The step of a batch captured once and replayed as long as the batch lives, or until its sequences outgrow the graph.

    A sequence that drops its oldest tokens may change its method, whose tensors a graph holds by address: the step is then
    captured anew.
    """

    def __init__(self, eager: EagerStep, graphs: Graphs) -> None:
        self.eager, self.graphs = eager, graphs
        self._held: list[CapturedFor] = []  # the one used last is the last

    def run(self, batch: DecodeBatch, token_ids: Sequence[int]) -> Tensor:
        batch.begin(token_ids)
        bound = self.graphs.bound(batch)
        if self._recall(batch, bound):
            captured = self._held[-1].captured
            captured.replay()
        else:
            captured = self.graphs.capture(lambda: self.eager.launch(batch, bound))
            self._held.append(CapturedFor(ref(batch), bound, batch.methods, captured))
        return captured.logits.clone()  # the next replay writes over them

    def _recall(self, batch: DecodeBatch, bound: int) -> bool:
        """Make the graph of this step the last, if there is one.

        Those of batches that are gone, and the oldest if there are too many, are given up: nothing else holds them, so their
        memory is free for the next.
        """
        known = [held for held in self._held if held.serves(batch, bound)]
        others = [held for held in self._held if held.batch() not in (None, batch)]
        self._held = others[1 - MOST_GRAPHS :] + known
        return bool(known)


def decode_step_of(model: Model, rope: RopeFrequencies, setup: CacheSetup, *, graph: bool) -> DecodeStep:
    """A graph, if it is wanted and everything in the step can be captured; else kernel by kernel.

    Filters that need attention mass address their slots from the host, and shapes without a kernel wait for the device: they
    keep the eager step.
    """
    eager = EagerStep(model, rope)
    if not graph or setup.needs_mass or not is_capturable(setup.backend, model.config.head_size):
        return eager
    return GraphStep(eager, _cuda_graphs(setup) if _on_gpu(setup) else CpuGraphs())


def as_launched(work: Callable[[], Tensor], setup: CacheSetup) -> Callable[[], object]:
    """``work`` of the device alone, to be done again and again as a decode step does it: on a GPU as a CUDA graph."""
    if not _on_gpu(setup) or not is_capturable(setup.backend, setup.arena.shape.head_size):
        return work
    return _cuda_graphs(setup).capture(work).replay


def _on_gpu(setup: CacheSetup) -> bool:
    return setup.arena.page_table.device.type == "cuda"


def _cuda_graphs(setup: CacheSetup) -> CudaGraphs:
    return CudaGraphs(setup.regions.packed(setup.max_context), setup.arena.page_table.device)
