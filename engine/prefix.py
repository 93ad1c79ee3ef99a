"""Prompts with a common prefix share its full packed pages, found by a hash of all tokens up to their end, if there is room.

A prompt read exactly attends to all of itself in full precision. With a reused prefix only the remainder is read, by streaming,
attending to the packed pages, as in the next turn of a chat: much faster, but not bit-identical. Whatever must
read every prompt the same way (``skvq needle``, ``skvq bench``) loads its engine with ``prefix_cache=False``.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.interrupts import uninterrupted
from skvq.kernels.layout import PAGE_TOKENS


class Prefixes:
    """What the engine asks before and after it reads; here nothing is shared unless forked."""

    changes = 0
    """Times that what is known has changed."""

    def reuse(self, sequence: SequenceCache, ids: Sequence[int]) -> int:
        """Give an empty sequence the longest known beginning of ``ids``; how many tokens that is."""
        return 0

    def known(self, ids: Sequence[int]) -> list[int]:
        """The pages that ``reuse`` would give."""
        return []

    def keep(self, sequence: SequenceCache) -> None:
        """Remember the whole packed pages of a sequence beyond its life."""

    @property
    def pages(self) -> list[int]:
        """Pages held, for ``Arena.check``."""
        return []


AT = "at"
"""Which slots a copy holds, int64."""


@dataclass(frozen=True, slots=True)
class _Entry:
    page: int
    before: _Entry | None  # what it was written behind
    retained: dict[str, Tensor]  # retained slots [L, ..., R, ...] when the page was kept, shared by the pages of a sequence


class PagePrefixes(Prefixes):
    """Pages by the hash of their prefix, a lender to the arena: the least recently used are given back first.

    Retained tokens are kept beside, on the host: a few per sequence. They belong to the pages they were kept with, whose copies
    of them are flagged, so a page is only kept behind those that it was written behind. Nothing is kept where a rule looks at
    attention mass, which tokens get from what follows the page, nor of a sequence that has dropped pages or was filled without
    the model.
    """

    def __init__(self, setup: CacheSetup) -> None:
        self._setup = setup
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._keys: dict[int, bytes] = {}  # of the pages held
        setup.arena.when_short(self)

    @property
    def pages(self) -> list[int]:
        return [entry.page for entry in self._entries.values()]

    @property
    def spare_pages(self) -> int:
        return sum(not self._setup.arena.is_shared(entry.page) for entry in self._entries.values())

    @uninterrupted()
    def reuse(self, sequence: SequenceCache, ids: Sequence[int]) -> int:
        """Whole pages only, and none that would lie in the window of a sequence of these ids; at least one token is left."""
        assert sequence.length == 0, "a prefix is reused by an empty sequence"
        found = self._found(ids)
        if not found:
            return 0
        count = len(found) * PAGE_TOKENS
        self._touch([key for key, _ in found])
        sequence.share([entry.page for _, entry in found], ids[:count])
        self._restore(sequence, found[-1][1].retained, count)
        return count

    def known(self, ids: Sequence[int]) -> list[int]:
        return [entry.page for _, entry in self._found(ids)]

    def _found(self, ids: Sequence[int]) -> list[tuple[bytes, _Entry]]:
        found: list[tuple[bytes, _Entry]] = []
        for key in _chain(ids, min(self._setup.regions.packed(len(ids)), len(ids) - 1)):
            entry = self._entries.get(key)
            if entry is None or entry.before is not (found[-1][1] if found else None):
                break
            found.append((key, entry))
        return found

    @uninterrupted()
    def keep(self, sequence: SequenceCache) -> None:
        if self._setup.needs_mass or sequence.dropped or sequence.filled:  # what is left of a text is the beginning of none
            return
        known = list(takewhile(self._keys.__contains__, sequence.pages[: sequence.packed // PAGE_TOKENS]))
        keys = [self._keys[page] for page in known]  # pages held are never written: their tokens need no second hash
        rest = sequence.token_ids[len(known) * PAGE_TOKENS : sequence.packed]
        retained: dict[str, Tensor] | None = None
        for page, key in zip(sequence.pages[len(known) :], _chain(rest, len(rest), keys[-1] if keys else b""), strict=False):
            before = self._entries[keys[-1]] if keys else None
            if (entry := self._entries.get(key)) is not None:
                if entry.before is before:
                    break  # read once more: what follows was written behind other pages than those that are kept
                self._drop(key)  # what it was written behind is not kept any more: nobody finds it
            keys.append(key)
            retained = self._retained(sequence) if retained is None else retained
            self._setup.arena.share(page)
            self._entries[key], self._keys[page] = _Entry(page, before, retained), key
            self.changes += 1
        self._touch(keys)

    def give_back(self, count: int) -> None:
        """First pages that only this holds. Where they are too few the rest frees none, but need not be copied on write."""
        arena = self._setup.arena
        for key in sorted(self._entries, key=lambda key: arena.is_shared(self._entries[key].page)):
            if arena.unused_pages >= count:
                return
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        page = self._entries.pop(key).page
        del self._keys[page]
        self._setup.arena.release(page)
        self.changes += 1

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Used now; a page goes before those it continues, which are of use without it."""
        for key in reversed(keys):
            self._entries.move_to_end(key)

    def _retained(self, sequence: SequenceCache) -> dict[str, Tensor]:
        """Slots that hold a token in any layer, and which they are: rules have room for many more than they keep."""
        slots = self._slots(sequence)
        at = (slots["full_positions"] >= 0).any(0).nonzero()[:, 0]
        return {AT: at.cpu()} | {name: t.index_select(t.dim() // 2, at).cpu() for name, t in slots.items()}

    def _restore(self, sequence: SequenceCache, retained: dict[str, Tensor], count: int) -> None:
        """Retained tokens before position ``count``: a rule fills its slots in order of position, so these were the first."""
        slots = self._slots(sequence)
        positions = slots["full_positions"]
        positions.fill_(-1)
        at = retained[AT].to(positions.device)
        for name, target in slots.items():
            target.index_copy_(target.dim() // 2, at, retained[name].to(target.device))
        positions.masked_fill_(positions >= count, -1)

    def _slots(self, sequence: SequenceCache) -> dict[str, Tensor]:
        """The sequence's retained slots in all layers, by name."""
        count, slots = self._setup.regions.retained, self._setup.arena.slot(sequence.slot)
        return {name: t[:, :, :count] if t.dim() == 4 else t[:, :count] for name, t in slots.items()}


def _chain(ids: Sequence[int], packed: int, key: bytes = b"") -> Iterator[bytes]:
    """A key for each whole page of the first ``packed`` tokens: the hash of its tokens and of the key before it."""
    for start in range(0, packed // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS):
        tokens = np.asarray(ids[start : start + PAGE_TOKENS], dtype=np.int64)
        key = hashlib.blake2b(key + tokens.tobytes(), digest_size=16).digest()
        yield key
