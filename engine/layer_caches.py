"""How a layer meets the cache in a step of the model.

Each class here is a ``model.LayerCache`` and differs in what attention sees and where the new tokens go:

    DenseLayer      a text chunk by chunk, dense causal attention in full precision, nothing kept  (Engine.logits)
    ExactLayer      the same, a chunk at a time; the layer is packed when its last chunk is done        (exact prefill)
    StreamingLayer  a chunk of one sequence against its packed cache, staged in segments            (streaming prefill)
    DecodeLayer     the next tokens of each sequence of a batch, through the backend's fused attention  (decode, short reads)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from skvq.engine.absorb import absorb, pack_window
from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.interrupts import uninterrupted
from skvq.engine.mass import add_mass
from skvq.engine.methods import Attends, Begins, CacheMethod, RowByRow
from skvq.engine.model_config import FULL_SPAN
from skvq.engine.prefill_form import SEGMENT_TOKENS
from skvq.engine.rollback import RING_MARKS, all_or_nothing
from skvq.engine.rope import StepRope
from skvq.engine.streams import pinned, sent
from skvq.kernels.dense import SoftmaxParts, attend_behind
from skvq.kernels.interface import Ops, Step
from skvq.kernels.ops import TorchOps


class DenseLayer:
    """Full-precision keys and values of one layer in buffers that are given, [KH, T, D] each: those of the tokens attended now
    are written from ``first`` on, those before are there."""

    def __init__(self, keys: Tensor, values: Tensor, span: int, first: int = 0) -> None:
        self.keys, self.values, self.span, self.first = keys, values, span, first

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        return self._attend(TorchOps(), q, k, v, rope)[1][None]

    def _attend(self, ops: Ops, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> tuple[Tensor, Tensor, Tensor]:
        """The queries [N, H, D] after RoPE, what they read, and its log-sum-exp [N, H]."""
        q = ops.rope_to_buffer(q, k, v, rope.cos, rope.sin, self.keys, self.values, self.first)[0]
        last = self.first + len(q)
        return q, *rope.distances.attend(q, self.first, self.keys[:, :last], self.values[:, :last], 0, self.span)


class ExactLayer(DenseLayer):
    """A chunk of exact prefill: attention in full precision of all heads, or of the group of kv heads that the buffers are of.

    What tokens are attended with is added to ``mass``, float32 [T].
    """

    def __init__(self, setup: CacheSetup, layer: int, keys: Tensor, values: Tensor, mass: Tensor, first: int) -> None:
        super().__init__(keys, values, setup.spans[layer], first)
        self.setup, self.mass = setup, mass

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        q, out, lse = self._attend(self.setup.backend.ops, q, k, v, rope)
        if self.setup.needs_mass:
            last = self.first + len(q)
            add_mass(self.mass[:last], q, lse, self.keys[:, :last], self.setup.regions.window, self.span)
        return out[None]


class StreamingLayer:
    """A chunk of N tokens of one sequence against everything cached: packed segments, window and the chunk itself."""

    def __init__(self, sequence: SequenceCache, layer: int, ids: Tensor) -> None:
        self.sequence, self.layer, self.ids = sequence, layer, ids
        self.span = sequence.setup.spans[layer]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        sequence = self.sequence
        q, k, v = rope.apply(q)[0], rope.apply(k)[0], v[0]
        old_k, old_v, old_mass = sequence.window(self.layer, sequence.length)
        keys = torch.cat([old_k.to(k.dtype), k])  # the window and this chunk, [T, KH, D]
        values = torch.cat([old_v.to(v.dtype), v])
        first_seen = max(0, sequence.length - self.span + 1)
        parts = SoftmaxParts()
        for start in range(first_seen // SEGMENT_TOKENS * SEGMENT_TOKENS, sequence.packed, SEGMENT_TOKENS):
            count = min(SEGMENT_TOKENS, sequence.packed - start)
            parts.add(*self._attend(q, *sequence.stage(self.layer, start, count, q.dtype), start, rope))
        if sequence.orphans:  # of a cut sequence there may be more of them than tokens
            sink_keys, sink_values = (t.to(q.dtype).transpose(0, 1) for t in sequence.sinks(self.layer))
            parts.add(*attend_behind(q, sink_keys, sink_values, sequence.length - self.span + 1))
        parts.add(*self._attend(q, keys, values, sequence.packed, rope))
        out, lse = parts.merged(q.dtype)
        mass = torch.cat([old_mass, old_mass.new_zeros(len(k))])
        if sequence.setup.needs_mass:
            add_mass(mass, q, lse, keys.transpose(0, 1), sequence.setup.regions.window, self.span)
        absorb(sequence, self.layer, keys, values, mass, self.ids)
        return out[None]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, start: int, rope: StepRope) -> tuple[Tensor, Tensor]:
        """Attention over tokens from ``start`` on, [T, KH, D]."""
        keys, values = (t.to(q.dtype).transpose(0, 1) for t in (keys, values))
        return rope.distances.attend(q, self.sequence.length, keys, values, start, self.span)


class DecodeBatch:
    """The tensors of a step of B sequences, N tokens of each: where they lie and what they are. They are moved in place from
    step to step, whichever sequences a step is of, so that a graph which reads them holds for all.
    """

    def __init__(self, setup: CacheSetup, count: int, tokens: int = 1) -> None:
        self.setup, self.tokens = setup, tokens
        self.sequences: list[SequenceCache] = []  # of the step under way
        self.methods: list[CacheMethod] = []
        self.method: Begins = setup.method
        self.mass: list[tuple[Any, Tensor]] = []  # where attention mass goes and what it becomes
        device, each = setup.device, count * tokens
        width = each + each % 2  # rows of 16 bytes: Triton compiles a kernel anew for another alignment
        self._numbers = torch.zeros(7, width, dtype=torch.int64, device=device)  # all that the host says
        self.slots, self._packed = self._numbers[:2, :count]
        self.rows, self._positions, rope_positions, self.ring_slots, token_ids = self._numbers[2:, :each]
        self.rope_positions, self.token_ids = (row.view(count, tokens) for row in (rope_positions, token_ids))
        self.packed = torch.zeros(count, dtype=torch.int32, device=device)
        self.positions = torch.zeros(count, tokens, dtype=torch.int32, device=device)
        # a number of the host would be copied, and waited for
        self._no_mass = torch.zeros((), dtype=torch.float32, device=device)

    @property
    def max_packed(self) -> int:
        """Packed tokens of the sequence that has most."""
        return max(s.packed for s in self.sequences)

    @contextmanager
    def step(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> Iterator[None]:
        """Around the device's work for the next tokens of these sequences, row by row [B * N]: room before, commit after.

        They fit the ring (``ring_room``). Of a step that is broken off nothing is committed, in no sequence.
        """
        try:
            self.begin(sequences, token_ids)
            yield
            self.commit(token_ids)
        finally:
            self.sequences = []

    def begin(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> None:
        """The host's part of a step: make room for the next tokens, and say where they go, in one copy."""
        count = self.tokens
        assert len(sequences) == len(self.slots) and len(token_ids) == len(self.rows), (len(sequences), len(token_ids))
        for sequence in sequences:
            sequence.reserve(count)
            assert count <= sequence.ring_room, (count, sequence.ring_room)
        self.sequences, self.methods = list(sequences), [s.method for s in sequences]
        same = all(method is self.methods[0] for method in self.methods)
        self.method = self.methods[0] if same else RowByRow(self.methods)
        self.mass = []
        new = [(s, s.length + n) for s in sequences for n in range(count)]
        numbers = (
            [s.slot for s in sequences],
            [s.packed for s in sequences],
            [s.slot for s, _ in new],
            [position for _, position in new],
            [s.origin + position for s, position in new],
            [self.setup.regions.slot(position) for _, position in new],
            token_ids,
        )
        width = self._numbers.shape[1]
        padded = [[*row, *[0] * (width - len(row))] for row in numbers]
        self._numbers.copy_(pinned(padded, self.setup.device), non_blocking=True)

    def mark_slots(self) -> None:
        """The device's part: lengths as kernels read them, and the slots of the new tokens marked in every layer."""
        self.packed.copy_(self._packed)
        self.positions.view(-1).copy_(self._positions)
        self.setup.arena.positions[:, self.rows, self.ring_slots] = self.positions.view(-1)
        self.setup.arena.mass[:, self.rows, self.ring_slots] = self._no_mass

    def layers(self, max_packed: int) -> Iterator[DecodeLayer]:
        """The cache of each layer for this step, for sequences of up to ``max_packed`` packed tokens."""
        step = Step(
            slots=self.slots,
            positions=self.positions,
            packed=self.packed,
            page_table=self.setup.arena.page_table,
            max_packed=max_packed,
            span=FULL_SPAN,
        )
        attends = self.method.begun(step)
        for layer, span in enumerate(self.setup.spans):
            yield DecodeLayer(self, attends, layer, replace(step, span=span))

    def commit(self, token_ids: Sequence[int]) -> None:
        """The step is over; a window that has grown by a tile is packed, in every layer. token_ids: row by row, [B * N]."""
        count = self.tokens
        new = [list(token_ids[start : start + count]) for start in range(0, len(token_ids), count)]
        packs = [sequence.packed_after(count) > sequence.packed for sequence in self.sequences]
        with uninterrupted(), ExitStack() as guarded:
            for sequence in self.sequences if any(packs) else ():  # packing may fail: a filter rule is anybody's
                guarded.enter_context(all_or_nothing(sequence, RING_MARKS))
            for at, mass in self.mass:
                self.setup.arena.mass[at] = mass
            for sequence, ids in compress(zip(self.sequences, new, strict=True), packs):
                pack_window(sequence, sent(ids, self.setup.device))
            for sequence, ids in zip(self.sequences, new, strict=True):
                sequence.commit(ids)


class DecodeLayer:
    """The next tokens of each sequence: written into its window, then attended with everything before them."""

    def __init__(self, batch: DecodeBatch, attends: Attends, layer: int, step: Step) -> None:
        self.batch, self.attends, self.layer, self.step = batch, attends, layer, step

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        batch, setup = self.batch, self.batch.setup
        q_rows, k_rows, v_rows, cos, sin = (
            t.reshape(-1, 1, *t.shape[2:]) for t in (q, k, v, rope.cos, rope.sin)
        )  # [B * N, 1, ...]
        full, ops = setup.arena.full(self.layer), setup.backend.ops
        q = ops.rope_to_slots(q_rows, k_rows, v_rows, cos, sin, full, batch.rows, batch.ring_slots).view(q.shape)
        out, lse = self.attends.attend(self.layer, q, self.step)
        if setup.needs_mass:
            self._add_mass(q, lse)
        return out

    def _add_mass(self, q: Tensor, lse: Tensor) -> None:
        setup, full = self.batch.setup, self.batch.setup.arena.full(self.layer)
        mass = setup.arena.mass[self.layer]
        for row, sequence in enumerate(self.batch.sequences):
            first = max(sequence.packed, sequence.length - setup.regions.window)
            at = torch.arange(first, sequence.length + self.batch.tokens, device=q.device)
            slots = setup.regions.slot(at)
            seen = mass[sequence.slot, slots]
            add_mass(seen, q[row], lse[row], full.keys[sequence.slot][:, slots], setup.regions.window, self.step.span)
            self.batch.mass.append(((self.layer, sequence.slot, slots), seen))
