"""One sequence's cache: its pages, its length, and what its regions hold (``absorb`` moves tokens from one into another)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from skvq.engine.cache_setup import CacheSetup
from skvq.engine.errors import OptionError
from skvq.engine.guard import computes
from skvq.engine.interrupts import uninterrupted
from skvq.engine.methods import CacheMethod
from skvq.engine.options import is_whole, names_options, path_of
from skvq.engine.sampling import TokenLogprob
from skvq.engine.session import save_session
from skvq.engine.streams import sent
from skvq.engine.timing import Timing
from skvq.kernels.layout import PAGE_TOKENS, pages_for


class Mark(NamedTuple):
    """Where a sequence stands (``SequenceCache.mark``); as it is here, a new one's."""

    total_tokens: int = 0
    pending: tuple[int, ...] = ()
    changes: int = 0


class SequenceCache:
    """Page table, length and window of one sequence; the engine moves them by reserve -> forward -> commit.

    Between commits ``length`` tokens are cached: ``0 .. packed-1`` in pages (some of them retained), the rest in the ring.
    Of a sequence that has dropped its oldest pages these are the tokens after them; only the attention sinks are left of
    those, in their slots (``overflow``).
    """

    alive = False

    def __init__(self, setup: CacheSetup) -> None:
        self.setup, self.device, self.lock = setup, setup.device, setup.lock
        self.slot = setup.arena.new_sequence()
        self.pages: list[int] = []
        self.length = 0
        self.packed = 0
        self.dropped = 0
        self.changes = 0  # of its tokens, but for those that are dropped
        self.token_ids: list[int] = []
        self.filled = False  # holds tokens that no model has read (``stress.fill``)
        self.suspended = False  # half read, between two pieces (``engine.pieces``)
        self.pending: list[int] = []  # drawn by the last answer but not cached yet: the next text follows them
        self.logits: Tensor | None = None  # [V] that reading gave, of what follows the last token, until anything changes
        self.asked = False  # what was read last, while there are such logits, is a conversation: an answer begins a text
        self.timing = Timing()  # of the last generation, or of reading if nothing was written since
        self.logprobs: list[TokenLogprob] = []  # of the tokens of the last answer, where ``SamplingConfig.logprobs`` asked
        self.alive = True

    def __repr__(self) -> str:
        held = f"{self.length:,} tokens, {self.packed:,} packed in {len(self.pages)} pages" if self.alive else "freed"
        return f"<SequenceCache: {held}>"

    def __enter__(self) -> SequenceCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.free()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise OptionError("a sequence cannot be copied or pickled: fork() gives another one, save(file) keeps it")

    def __del__(self) -> None:
        if self.alive:
            self.alive = False  # first: of a cycle, a generator that frees it may be closed after this
            self.setup.arena.abandon(self.slot, self.pages)

    def require_alive(self) -> None:
        """Raise OptionError if it has been freed: its slot may be another sequence's by now."""
        if not self.alive:
            raise OptionError("the sequence has been freed")

    def require_whole(self) -> None:
        """Raise OptionError if it has been freed, or is being read in pieces by something else."""
        self.require_alive()
        if self.suspended:
            raise OptionError("the sequence is being read: wait until that is done, or cancel it")

    def require_of(self, setup: CacheSetup) -> None:
        """Raise OptionError unless it is alive and of this setup."""
        self.require_alive()
        if self.setup is not setup:
            raise OptionError("the sequence belongs to another engine: read its text with this one, or save and restore it")

    @property
    def total_tokens(self) -> int:
        """Tokens it has held, dropped ones counted: the position of the next in the whole text."""
        return self.dropped + self.length

    @property
    def mark(self) -> Mark:
        """Where it stands: its tokens and what is pending. Another one if it has been continued or cut, however that ended."""
        return Mark(self.total_tokens, tuple(self.pending), self.changes)

    @names_options()
    def rewind(self, mark: Mark) -> bool:
        """Forget what came since it had that ``mark``; False, and nothing changes, where no token from before is left."""
        length = mark.total_tokens - self.dropped
        if length > 0:
            with uninterrupted():
                self.truncate(length)
                self.pending = list(mark.pending)
        return length > 0

    # --- lengths ---------------------------------------------------------------------------------------------------------

    def packed_after(self, count: int) -> int:
        """Packed tokens once ``count`` more are cached (after a truncation there may be more than the rule would pack)."""
        return max(self.packed, self.setup.regions.packed(self.length + count))

    @property
    def ring_room(self) -> int:
        """Tokens that the window's ring can take before something must be packed: at least one."""
        return self.setup.regions.ring - (self.length - self.packed)

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more tokens: pages of one's own for what will be packed. Raises CapacityError.

        Of a full context it may drop the oldest pages (``Engine.load(on_full="shift")``): lengths are other ones afterwards.
        """
        self.require_whole()
        self.setup.on_full.make_room(self, count)
        self.setup.require(self.length, count)
        target = self.packed_after(count)
        if target > self.packed:
            self.grow(target)

    @uninterrupted()
    def grow(self, target: int) -> None:
        """Pages of one's own for packed tokens up to ``target``; nothing has changed if there are not enough."""
        arena, last = self.setup.arena, self.packed // PAGE_TOKENS
        new, partial = pages_for(target) - len(self.pages), bool(self.packed % PAGE_TOKENS)
        arena.collect(new + (partial and arena.is_shared(self.pages[last])))
        copies = partial and arena.is_shared(self.pages[last])  # a lender may just have given it up
        arena.require_pages(new + copies)
        if copies:
            copy = arena.copy_page(self.pages[last])
            arena.release(self.pages[last])
            self.pages[last] = copy
        while len(self.pages) < pages_for(target):
            self.pages.append(arena.new_page())
        if new > 0 or copies:
            self._write_row()

    def adopt(self, token_ids: Sequence[int], packed: int, dropped: int, pending: Sequence[int]) -> None:
        """Make an empty sequence one of ``token_ids`` with pages for ``packed`` of them; the caller fills pages and slots.

        ``dropped`` tokens went before them.
        """
        assert self.length == 0 and 0 <= packed <= len(token_ids), (self.length, packed, len(token_ids))
        if packed:
            self.grow(packed)
        self.length, self.packed, self.dropped = len(token_ids), packed, dropped
        self.token_ids, self.pending = list(token_ids), list(pending)
        self.changes += 1

    def forget(self, pages: int) -> None:
        """The oldest whole pages are dropped; ``overflow.drop_pages`` sees to the full-precision slots."""
        tokens = pages * PAGE_TOKENS
        gone, self.pages = self.pages[:pages], self.pages[pages:]
        del self.token_ids[:tokens]
        self.length, self.packed, self.dropped = self.length - tokens, self.packed - tokens, self.dropped + tokens
        self.logits = None
        self._write_row()
        for page in gone:
            self.setup.arena.release(page)

    def commit(self, token_ids: Sequence[int]) -> None:
        """The step is over in every layer: these tokens are cached now."""
        self.packed = self.packed_after(len(token_ids))
        self.length += len(token_ids)
        self.token_ids.extend(token_ids)
        self.pending, self.logits = [], None
        self.changes += 1

    def share(self, pages: Sequence[int], token_ids: Sequence[int]) -> None:
        """Make an empty sequence one of ``token_ids`` that fill ``pages``, others hold them; the caller sets retained slots."""
        assert self.total_tokens == 0 and len(token_ids) == len(pages) * PAGE_TOKENS, (self.length, len(token_ids), len(pages))
        for page in pages:
            self.setup.arena.share(page)
        for page in self.pages:  # what a step that was broken off had reserved
            self.setup.arena.release(page)
        self.pages = list(pages)
        self.length = self.packed = len(token_ids)
        self.token_ids = list(token_ids)
        self.setup.arena.slot(self.slot)["full_positions"].fill_(-1)  # and the slots that it had marked
        self._write_row()

    @property
    def method(self) -> CacheMethod:
        """The cache method as it applies after what was dropped."""
        return self.setup.method.at(self.dropped)

    @property
    def origin(self) -> int:
        """RoPE position of the first cached token: those of the others follow it."""
        return self.setup.method.origin(self.dropped)

    @property
    def orphans(self) -> int:
        """Leading retained slots that hold tokens of dropped pages: they stand for no packed token."""
        return self.setup.regions.sinks if self.dropped else 0

    @property
    def page_row(self) -> Tensor:
        """This sequence's row of the page table, int32."""
        return self.setup.arena.page_table[self.slot]

    def _write_row(self) -> None:
        self.page_row[: len(self.pages)] = sent(self.pages, self.device)

    # --- what it holds ------------------------------------------------------------------------------------------------------

    def window(self, layer: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [T, KH, D] and attention mass [T] of the window's tokens ``packed .. end-1``, in order."""
        full = self.setup.arena.full(layer)
        slots = self.setup.regions.slot(torch.arange(self.packed, end, device=full.keys.device))
        keys, values = (t[self.slot][:, slots].transpose(0, 1) for t in (full.keys, full.values))
        return keys, values, self.setup.arena.mass[layer, self.slot, slots]

    def put(self, layer: int, first: int, keys: Tensor, values: Tensor) -> Tensor:
        """Write tokens ``first ..``, [T, KH, D], into their slots of the window's ring, which are returned, int64 [T]."""
        full = self.setup.arena.full(layer)
        at = torch.arange(first, first + len(keys), device=keys.device)
        slots = self.setup.regions.slot(at)
        full.positions[self.slot, slots] = at.int()
        full.keys[self.slot][:, slots] = keys.transpose(0, 1).to(full.keys.dtype)
        full.values[self.slot][:, slots] = values.transpose(0, 1).to(full.values.dtype)
        return slots

    def stage(self, layer: int, first: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Packed tokens ``first .. first+count-1`` of a layer as attention should see them, [T, KH, D] of ``dtype``.

        Retained tokens stand in their place as they are held, so the caller needs no mask.
        """
        keys, values = self.method.unpack(layer, self.page_row, first, count, dtype)
        regions, full = self.setup.regions, self.setup.arena.full(layer)
        if first >= regions.sinks == regions.retained:  # sinks are the first tokens
            return keys, values
        held = full.positions[self.slot, : regions.retained].long()
        packed = torch.arange(len(held), device=held.device) >= self.orphans
        here = (packed & (held >= first) & (held < first + count))[:, None, None]
        at = (held - first).clamp(0, count - 1)
        for unpacked, slots in ((keys, full.keys), (values, full.values)):  # exact, and without asking how many are here
            kept = slots[self.slot, :, : len(held)].transpose(0, 1).to(dtype)
            unpacked.index_add_(0, at, torch.where(here, -unpacked[at], 0.0))
            unpacked.index_add_(0, at, torch.where(here, kept, 0.0))
        return keys, values

    def sinks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [S, KH, D] of the attention sinks whose pages are gone, in order of position."""
        full = self.setup.arena.full(layer)
        held = (full.positions[self.slot, : self.orphans] >= 0).nonzero()[:, 0]
        order = held[full.positions[self.slot, held].argsort()]
        return full.keys[self.slot][:, order].transpose(0, 1), full.values[self.slot][:, order].transpose(0, 1)

    # --- life -----------------------------------------------------------------------------------------------------------------

    @names_options()
    @computes
    @uninterrupted()
    def fork(self) -> SequenceCache:
        """A second sequence with the same past. Pages are shared; full-precision slots are copied."""
        self.require_whole()
        twin = SequenceCache(self.setup)
        for page in self.pages[: pages_for(self.packed)]:  # without what a step that was broken off has reserved
            self.setup.arena.share(page)
            twin.pages.append(page)
        twin.length, twin.packed, twin.dropped, twin.filled = self.length, self.packed, self.dropped, self.filled
        twin.token_ids, twin.pending, twin.logits = list(self.token_ids), list(self.pending), self.logits
        twin.asked = self.asked
        twin.changes = self.changes
        twin._write_row()
        self.setup.arena.copy_slot(self.slot, twin.slot)
        return twin

    @names_options()
    @computes
    @uninterrupted()
    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``, dropped ones not counted.

        Tokens of the window are forgotten exactly, but for the attention mass that they gave to others. Where the cut lies in
        packed pages, tokens of its last, now partial, tile go back into the window as they were packed, without mass: the
        window is then shorter than usual until new tokens fill it.
        """
        self.require_whole()
        if not is_whole(length):
            raise OptionError(f"length must be a whole number of tokens, got {length!r}")
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot truncate a sequence of {self.length:,} tokens to {length:,}")
        if not length:
            self.dropped, self.filled = 0, False  # nothing is left, orphans neither
        self._cut(int(length))  # a number of numpy would go into what is saved

    def _cut(self, length: int) -> None:
        """``truncate``, but what was dropped stays counted, and its sinks are kept, where nothing else is."""
        setup, arena = self.setup, self.setup.arena
        packed = min(self.packed, length // setup.regions.tile * setup.regions.tile)
        if length < self.packed:
            self._reopen(packed, length)
        positions = arena.slot(self.slot)["full_positions"]
        positions[:, : self.orphans].clamp_(max=length)  # sinks stay visible from the next token on
        held = positions[:, self.orphans :]
        held.masked_fill_(held >= length, -1)
        if length < self.length:
            self.logits = None
        self.packed, self.length = packed, length
        del self.token_ids[length:]
        self.pending = []
        self.changes += 1
        while len(self.pages) > pages_for(packed):
            arena.release(self.pages.pop())

    @uninterrupted()
    def take_back(self) -> None:
        """Make the last token pending again: read once more, it gives the logits of what may follow."""
        if not self.length:
            raise OptionError("the sequence is empty: there is nothing to go on from")
        last = self.token_ids[-1]
        self._cut(self.length - 1)
        self.pending = [last]

    def _reopen(self, packed: int, length: int) -> None:
        """Bring tokens ``packed .. length-1`` back from their tile into the ring; retained ones leave their slots for it.

        What needs memory comes first, in all layers: if there is none, nothing has changed.
        """
        regions, arena = self.setup.regions, self.setup.arena
        layers, dtype = range(arena.shape.layers), arena.full(0).keys.dtype
        tiles = [self.stage(layer, packed, regions.tile, dtype) for layer in layers] if length > packed else []
        arena.slot(self.slot)["full_positions"][:, regions.retained :] = -1
        for layer, (keys, values) in enumerate(tiles):
            held = arena.full(layer).positions[self.slot, self.orphans : regions.retained]
            held[(held >= packed) & (held < length)] = -1
            slots = self.put(layer, packed, keys[: length - packed], values[: length - packed])
            arena.mass[layer, self.slot, slots] = 0

    @names_options()
    @computes
    def save(self, file: str | Path) -> None:
        """Write the sequence to a file, whole or not at all; ``Engine.restore`` brings it back. Raises SkvqError."""
        self.require_whole()
        save_session(self, path_of("file", file))

    @names_options()
    @computes
    @uninterrupted()
    def free(self) -> None:
        """Give pages and slot back; the sequence cannot be used any more."""
        if self.alive:
            self.require_whole()
            pages, self.pages, self.alive = self.pages, [], False  # first: broken off, nothing is released twice
            for page in pages:
                self.setup.arena.release(page)
            self.setup.arena.release_sequence(self.slot)
            self.logits = None
            del self.setup  # it keeps no arena in memory

    # --- size -----------------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes its tokens occupy: packed codes and metadata, and 16 bits for tokens in the window and retained."""
        self.require_alive()
        shape = self.setup.arena.shape
        packed = self.packed * self.setup.packed_token_bytes
        positions, retained = self.setup.arena.slot(self.slot)["full_positions"], self.setup.regions.retained
        window = positions[:, retained:]  # where a step that was broken off may have marked the slot of its token
        held = int((positions[:, :retained] >= 0).sum() + ((window >= 0) & (window < self.length)).sum())
        return int(packed + held * shape.slot_bytes / shape.layers)

    @property
    def bits_per_element(self) -> float:
        """Average bits per cached number of the model's own, everything counted."""
        return 8 * self.nbytes / (self.setup.token_elements * max(1, self.length))
