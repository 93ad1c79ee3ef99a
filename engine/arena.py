"""The arena: every byte of every cache, allocated once. It owns bytes, pages and the free list, not their meaning."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from skvq.engine.arena_shape import SLOT_TENSORS, ArenaShape, TensorSpec, spec_bytes
from skvq.engine.errors import CapacityError
from skvq.kernels.interface import FullSlots
from skvq.kernels.layout import PAGE_TOKENS


class Lender(Protocol):
    """Holds pages that it can do without."""

    def give_back(self, count: int) -> None:
        """Release pages until ``count`` are free, or all that are held."""

    @property
    def pages(self) -> Sequence[int]:
        """Those that it holds."""

    @property
    def spare_pages(self) -> int:
        """Pages that ``give_back`` would free: nobody else reads them."""


class Arena:
    """Pages with reference counts and sequence slots, over tensors that are never grown.

    A page id is valid in every layer. A new page is owned by its one user; a shared page must not be written.
    """

    def __init__(self, shape: ArenaShape, device: torch.device) -> None:
        self.shape = shape
        try:
            self.tensors = _allocate(shape.tensors(), device)
            pages = torch.empty(shape.pages * shape.page_bytes, dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(
                f"the arena of {shape.nbytes:,} bytes cannot be allocated on {device}: choose a smaller context or fewer bits"
            ) from error
        self._pages = _carved(pages, [shape.page_tensors(layer) for layer in range(shape.layers)])
        layers = zip(*(self.tensors[f"full_{part}"] for part in ("keys", "values", "positions")), strict=True)
        self._full = [FullSlots(keys=keys, values=values, positions=positions) for keys, values, positions in layers]
        self.positions.fill_(-1)
        self.page_table.zero_()
        self._lenders: WeakSet[Lender] = WeakSet()  # weak: they know the arena, which would outlive its engine
        self._references = [0] * shape.pages
        self._free_pages = list(range(shape.pages - 1, -1, -1))
        self._free_sequences = list(range(shape.sequences - 1, -1, -1))
        self._abandoned: deque[tuple[int, list[int]]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for tensors in (self.tensors, *self._pages) for t in tensors.values())

    @property
    def free_pages(self) -> int:
        """Pages that can be had: nobody uses them, or only a lender."""
        self._reclaim()
        return len(self._free_pages) + sum(lender.spare_pages for lender in self._lenders)

    @property
    def free_sequences(self) -> int:
        """Sequence slots that can be had."""
        self._reclaim()
        return len(self._free_sequences)

    @property
    def unused_pages(self) -> int:
        """Pages nobody holds."""
        return len(self._free_pages)

    @property
    def page_table(self) -> Tensor:
        """int32 [sequences, pages of the longest sequence]."""
        return self.tensors["page_table"]

    @property
    def positions(self) -> Tensor:
        """int32 [L, S, F]: what every full-precision slot holds (``FullSlots.positions``)."""
        return self.tensors["full_positions"]

    @property
    def mass(self) -> Tensor:
        """float32 [L, S, F]: the attention that it has got."""
        return self.tensors["full_mass"]

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Page tensors of a layer, [pages, ...], by name."""
        return self._pages[layer]

    def full(self, layer: int) -> FullSlots:
        """Full-precision slots of a layer."""
        return self._full[layer]

    def slot(self, slot: int) -> dict[str, Tensor]:
        """Full-precision slots of a sequence in all layers, [L, ...] by the names of SLOT_TENSORS."""
        return {name: self.tensors[name][:, slot] for name in SLOT_TENSORS}

    def when_short(self, lender: Lender) -> None:
        """Ask ``lender`` for pages, as long as it lives, before a request is refused."""
        self._lenders.add(lender)

    def collect(self, count: int) -> None:
        """Ask lenders for pages where fewer than ``count`` are unused. What they shared may be nobody else's afterwards."""
        self._reclaim()
        for lender in list(self._lenders):
            if count > len(self._free_pages):
                lender.give_back(count)

    def require_pages(self, count: int) -> None:
        """Raise CapacityError unless ``count`` pages can be had."""
        self.collect(count)
        if count > len(self._free_pages):
            used = self.shape.pages - len(self._free_pages)
            raise CapacityError(
                f"{used} of {self.shape.pages} pages of {PAGE_TOKENS} tokens are in use, {count} more are needed: free a "
                "sequence or load with a larger max_context or max_sequences"
            )

    def new_page(self) -> int:
        """A page of one's own. Raises CapacityError when none is left."""
        self.require_pages(1)
        page = self._free_pages.pop()
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more sequence reads this page."""
        assert self._references[page] > 0, page
        self._references[page] += 1

    def shared_by_sequences(self, pages: Iterable[int]) -> int:
        """How many of a sequence's pages another one holds too: what only a lender has besides can be had once it lets go."""
        lent = {page for lender in self._lenders for page in lender.pages}
        return sum(self._references[page] - (page in lent) > 1 for page in pages)

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence reads this page, so that it must be copied before it is written."""
        return self._references[page] > 1

    def release(self, page: int) -> None:
        """One sequence less reads this page; the last one gives it back."""
        assert self._references[page] > 0, page
        self._references[page] -= 1
        if not self._references[page]:
            self._free_pages.append(page)

    def copy_page(self, page: int) -> int:
        """A page of one's own with the bytes of ``page``, in every layer."""
        copy = self.new_page()
        self.overwrite(copy, page)
        return copy

    def overwrite(self, target: int, source: int) -> None:
        """Copy the bytes of a page into another, in every layer."""
        assert self._references[target] == 1, "a shared page must not be written"
        for tensors in self._pages:
            for tensor in tensors.values():
                tensor[target] = tensor[source]

    def new_sequence(self) -> int:
        """A sequence slot with empty full-precision slots. Raises CapacityError when none is left."""
        self._reclaim()
        if not self._free_sequences:
            raise CapacityError(
                f"all {self.shape.sequences} sequence slots are in use: free a sequence or load with a larger max_sequences"
            )
        slot = self._free_sequences.pop()
        slots = self.slot(slot)
        slots["full_positions"].fill_(-1)
        slots["full_mass"].zero_()
        return slot

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the full-precision tokens of a sequence slot."""
        held = self.slot(source)
        for name, copy in self.slot(target).items():
            copy.copy_(held[name])

    def release_sequence(self, slot: int) -> None:
        """Give a sequence slot back."""
        assert slot not in self._free_sequences, slot
        self._free_sequences.append(slot)

    def abandon(self, slot: int, pages: list[int]) -> None:
        """A sequence that nothing refers to any more: its slot and pages are given back before anybody goes without.

        Called by the garbage collector, at any moment and on any thread: what it leaves is taken up later.
        """
        self._abandoned.append((slot, pages))

    def _reclaim(self) -> None:
        while self._abandoned:
            slot, pages = self._abandoned.popleft()
            for page in pages:
                self.release(page)
            self.release_sequence(slot)

    def check(self, rows: Mapping[int, list[int]]) -> None:
        """Assert that reference counts are those of ``rows`` (pages by sequence slot): no page lost, none shared wrongly."""
        self._reclaim()
        count = [0] * self.shape.pages
        for pages in rows.values():
            for page in pages:
                count[page] += 1
        assert count == self._references, "reference counts differ from the sequences' pages"
        assert sorted(self._free_pages) == [p for p, n in enumerate(count) if n == 0], "free list differs from unused pages"


def _carved(memory: Tensor, layers: Sequence[Mapping[str, TensorSpec]]) -> list[dict[str, Tensor]]:
    """Page tensors one after another in one allocation: of many, torch rounds each up on a card, which with a budget of bits is
    11 % in all. What a page has of a tensor is a multiple of 16 bytes, so all begin at one.
    """
    found, start = [], 0
    for specs in layers:
        tensors = {}
        for name, (shape, dtype) in specs.items():
            stop = start + spec_bytes((shape, dtype))
            tensors[name] = memory[start:stop].view(dtype).view(shape)
            start = stop
        found.append(tensors)
    return found


def _allocate(specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in specs.items()}
