"""Places for the requests of a batch: each has a sequence, and may take pages until its answer is as long as it may be."""

from __future__ import annotations

from collections.abc import Iterator

from skvq.engine.cache import SequenceCache
from skvq.engine.request import Request
from skvq.engine.token_engine import TokenEngine
from skvq.kernels.layout import PAGE_TOKENS, pages_for


class Places:
    """Requests that have begun, in that order, and whether there is room for another beside them."""

    def __init__(self, engine: TokenEngine) -> None:
        self._engine, self._setup = engine, engine.parts.setup
        self._taken: dict[Request, tuple[SequenceCache, int]] = {}  # and the pages that it may come to have

    def __len__(self) -> int:
        return len(self._taken)

    def __iter__(self) -> Iterator[Request]:
        return iter([*self._taken])

    def __contains__(self, request: Request) -> bool:
        return request in self._taken

    def take(self, request: Request) -> SequenceCache:
        """A sequence to read the prompt into: a new one, or the one it continues, or a fork of that. Raises CapacityError."""
        if request.given is None:
            return self._taken_by(request, self._engine.new_sequence())
        return self.take_fork(request, request.given) if request.fork else self._taken_by(request, request.given)

    def take_fork(self, request: Request, read: SequenceCache) -> SequenceCache:
        """A fork of a sequence that holds its prompt. Raises CapacityError."""
        return self._taken_by(request, read.fork())

    def _taken_by(self, request: Request, sequence: SequenceCache) -> SequenceCache:
        self._taken[request] = sequence, self._pages(request)
        return sequence

    def sequence(self, request: Request) -> SequenceCache:
        """That of a request."""
        return self._taken[request][0]

    def give_back(self, request: Request) -> None:
        """Its answer is over, or never begun: its sequence is freed, unless it was given with the request."""
        if request in self._taken:
            sequence, _ = self._taken.pop(request)
            if sequence is not request.given:
                sequence.free()

    def has_room(self, request: Request, read: SequenceCache | None = None) -> bool:
        """Whether it can be answered to its end beside the others, which have yet to take their pages; in a fork of ``read``,
        if there is a sequence that holds its prompt.

        Pages that another sequence holds are not needed again, except a last one that is partly filled. An answer that outgrows
        the context needs all of its own: it drops shared pages, which frees none.
        """
        given = read or request.given
        in_place = read is None and given is not None and not request.fork
        needed = self._pages(request)
        if not self._outgrows(request):
            needed -= given.packed // PAGE_TOKENS if given else sum(map(self._setup.arena.is_shared, request.known))
        return self._fits(needed, in_place=in_place)

    def has_room_for(self, count: int) -> bool:
        """Whether a sequence of ``count`` tokens that is none of them has room beside them."""
        return self._fits(self._setup.regions.pages(count), in_place=False)

    def _fits(self, needed: int, *, in_place: bool) -> bool:
        """Whether there are so many pages beside those that others have yet to take, and, but ``in_place``, a sequence."""
        arena = self._setup.arena
        with self._setup.lock:  # others change what sequences and the store of prefixes hold
            for going, (sequence, most) in self._taken.items():
                kept = 0 if self._outgrows(going) else sequence.packed // PAGE_TOKENS
                pages = sequence.pages[kept : pages_for(sequence.packed)] if sequence.alive else []
                needed += max(0, most - len(sequence.pages)) + arena.shared_by_sequences(pages)
            return arena.free_pages >= needed and (arena.free_sequences > 0 or in_place)

    def _pages(self, request: Request) -> int:
        """Pages of its sequence when it has been answered, if the answer is as long as it may be."""
        return self._setup.regions.pages(min(request.most_tokens, self._setup.max_context))

    def _outgrows(self, request: Request) -> bool:
        """Whether its answer may drop pages, for the context is full before it is over."""
        return request.most_tokens > self._setup.max_context and self._setup.room(0) > self._setup.max_context
