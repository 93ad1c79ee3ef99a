"""A step that is broken off, by Ctrl-C or an error, leaves no trace: the sequence is what it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from skvq.engine.arena_shape import SLOT_TENSORS
from skvq.engine.cache import SequenceCache
from skvq.engine.streams import copy_parts, on_host

RING_MARKS = ("full_positions", "full_mass")
"""All that decode steps write over: their tokens go to slots of the ring that hold nothing."""


@contextmanager
def all_or_nothing(
    sequence: SequenceCache, written: Sequence[str] = SLOT_TENSORS, unless: Callable[[], bool] = bool
) -> Iterator[None]:
    """Around forward and commit of a step, after reserve: if it raises, window, retained tokens and lengths are as they were,
    ``unless`` it says that the sequence is past that.

    Costs a copy, in host memory, of what the step may write over in the sequence's full-precision slots: all of it in a chunk
    of a prompt, ``RING_MARKS`` in a decode step. The host does not wait for it. Pages are only appended to; those that were
    reserved stay reserved.
    """
    slots = sequence.setup.arena.slot(sequence.slot)
    kept = {name: on_host(slots[name]) for name in written}
    length, packed, pending, changes = sequence.length, sequence.packed, sequence.pending, sequence.changes
    try:
        yield
    except BaseException:
        if unless():
            raise
        del sequence.token_ids[length:]
        sequence.length, sequence.packed, sequence.pending, sequence.changes = length, packed, pending, changes
        for name, was in kept.items():
            copy_parts(slots[name], was)
        raise
