"""What happens when a sequence's context is full: it stops, or its oldest pages are dropped, except the attention sinks.

Dropping D tokens (whole pages) moves every later token's place in the sequence down by D; the sinks keep theirs, so they
share places with the first of what is left (StreamingLLM, arXiv 2309.17453, section 3.2, has them directly before it). RoPE
sees only differences of positions, so two of three groups must agree with the third, which cannot be changed: packed keys.

    packed keys carry the RoPE they were cached with (rotate, plain, fp): they stay, queries and new keys keep counting
        from ``place + dropped``, and the sinks are moved on by D
    packed keys get their RoPE when read (reorder): places are positions, and tokens of the window are moved back by D

Either way no difference reaches ``max_context``, so every RoPE scaling is as right as before, frequencies being fixed for
``max_context``. What is moved is 16 bits and is rounded once more each time: a share of the pages goes at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import OnFull
from skvq.engine.config import ON_FULL
from skvq.engine.errors import CapacityError, require_known
from skvq.engine.interrupts import uninterrupted
from skvq.engine.prefill_form import CHUNK_TOKENS
from skvq.engine.regions import Regions
from skvq.engine.rollback import all_or_nothing
from skvq.engine.rope import shifted
from skvq.kernels.layout import PAGE_TOKENS, pages_for

ENDLESS = 2**62
DROPPED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Stop:
    """A full sequence takes no more; ``could_shift``: the context is long enough to drop pages of it."""

    could_shift: bool = True

    @property
    def advice(self) -> str:
        return ", or with on_full 'shift' (--on-full)" if self.could_shift else ""

    def room(self, left: int) -> int:
        return left

    def make_room(self, sequence: SequenceCache, count: int) -> None: ...


class Shift:
    """A full sequence drops its oldest pages: DROPPED_SHARE of them, or as many as are needed."""

    @property
    def advice(self) -> str:
        return ""

    def room(self, left: int) -> int:
        return ENDLESS

    def make_room(self, sequence: SequenceCache, count: int) -> None:
        needed = pages_for(sequence.length + count - sequence.setup.max_context)
        whole = sequence.packed // PAGE_TOKENS
        if 0 < needed <= whole:
            drop_pages(sequence, max(needed, int(whole * DROPPED_SHARE)))


def on_full_of(name: str, regions: Regions, max_context: int) -> OnFull:
    """The mode of that name. Raises CapacityError where a full context might hold no whole page to drop."""
    require_known(name, ON_FULL, "on_full")
    least = PAGE_TOKENS + regions.ring + CHUNK_TOKENS
    if name == "shift" and max_context < least:
        raise CapacityError(
            f"on_full 'shift' drops whole pages of {PAGE_TOKENS:,} tokens and needs a context of at least {least:,}; this one "
            f"is {max_context:,}: load with a larger max_context (--ctx), or on_full 'stop'"
        )
    if name == "shift" and regions.sinks > PAGE_TOKENS:
        raise CapacityError(f"on_full 'shift' keeps at most {PAGE_TOKENS:,} attention sinks, got {regions.sinks:,}")
    return Shift() if name == "shift" else Stop(could_shift=max_context >= least and regions.sinks <= PAGE_TOKENS)


def drop_pages(sequence: SequenceCache, count: int) -> None:
    """Drop the oldest ``count`` whole pages and all tokens in them but the attention sinks."""
    assert 0 < count * PAGE_TOKENS <= sequence.packed, (count, sequence.packed)
    tokens = count * PAGE_TOKENS
    with uninterrupted(), all_or_nothing(sequence):
        for layer in range(sequence.setup.arena.shape.layers):
            if not sequence.setup.rules and not sequence.dropped:
                _hold_sinks(sequence, layer)
            _move_slots(sequence, layer, tokens)
        sequence.forget(count)


def _hold_sinks(sequence: SequenceCache, layer: int) -> None:
    """Copy the sinks from their page: without filter rules (16-bit pages) they were not retained until now."""
    regions, full = sequence.setup.regions, sequence.setup.arena.full(layer)
    if not regions.sinks:
        return
    keys, values = sequence.stage(layer, 0, -(-regions.sinks // regions.tile) * regions.tile, full.keys.dtype)
    for target, found in ((full.keys, keys), (full.values, values)):
        target[sequence.slot, :, : regions.sinks] = found[: regions.sinks].transpose(0, 1)
    full.positions[sequence.slot, : regions.sinks] = torch.arange(regions.sinks, device=full.positions.device).int()


def _move_slots(sequence: SequenceCache, layer: int, tokens: int) -> None:
    """Move sinks and the rest to their new places; window tokens go to the slots that belong to these."""
    setup, slot = sequence.setup, sequence.slot
    regions, full = setup.regions, setup.arena.full(layer)
    forward = setup.method.origin(sequence.dropped + tokens) - setup.method.origin(sequence.dropped)
    for part, by in ((slice(0, regions.sinks), forward), (slice(regions.sinks, None), forward - tokens)):
        if by:
            keys = full.keys[slot, :, part].transpose(0, 1)  # [F, KH, D]
            full.keys[slot, :, part] = shifted(keys, by, setup.rope.of(layer)).transpose(0, 1)
    rest = full.positions[slot, regions.sinks : regions.retained]
    rest.copy_(torch.where(rest >= tokens, rest - tokens, -1))
    keys, values, mass = (t.clone() for t in sequence.window(layer, sequence.length))  # [T, KH, D]
    full.positions[slot, regions.retained :] = -1
    slots = sequence.put(layer, sequence.packed - tokens, keys, values)
    setup.arena.mass[layer, slot, slots] = mass
