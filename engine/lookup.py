"""Prompt lookup: guess what follows from what followed before (LLMA, arXiv 2304.04487).

An answer that quotes its text, or repeats itself, says again what is there. So the tokens that came after the latest earlier
occurrence of the last MATCH tokens are decoded together with the pending one, in one step, and kept as far as they are what is
drawn. Weights and cache are read once for all of them; what is drawn follows from logits, seed and position as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MATCH = 3
"""Tokens that must have occurred before, in this order, for a guess."""


MOST_MISSES = 5
"""Misses that are counted: after so many 31 steps go without a guess."""


class Lookup:
    """A growing text, its stretches of MATCH tokens by where each ends: finding one takes microseconds at a million tokens."""

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._ids, self._vocab = list(ids), vocab_size
        keys = np.zeros(max(0, len(ids) - MATCH + 1), dtype=np.int64)
        text = np.asarray(self._ids, dtype=np.int64)
        for i in range(MATCH):
            keys = keys * vocab_size + text[i : i + len(keys)]
        self._ends = np.argsort(keys, kind="stable").astype(np.int32)  # equal ones in order of position
        self._keys = keys[self._ends]
        self._later: dict[int, int] = {}  # of the stretches since; the last is told by the next ``push``
        self._misses = self._rest = 0  # wrong guesses not made up for, and steps to go without one
        self._guessed = False  # the last time it was asked

    def push(self, token: int) -> None:
        """The text goes on."""
        if len(self._ids) >= MATCH:
            self._later[self._key()] = len(self._ids)
        self._ids.append(token)

    def guess(self, count: int) -> list[int]:
        """``find``, or none while it waits."""
        self._rest -= 1
        found = self.find(count) if self._rest < 0 else []
        self._guessed = bool(found)
        return found

    def find(self, count: int) -> list[int]:
        """The next ``count`` tokens if the text repeats itself, or none if its last MATCH tokens have not occurred before.

        >>> text = Lookup([5, 1, 2, 3, 4], vocab_size=9)
        >>> [text.push(token) for token in (1, 2, 3)] and text.find(2), text.find(6)
        ([4, 1], [4, 1, 2, 3, 4, 1])
        """
        at = self._found()
        if at is None:
            return []
        period = len(self._ids) - at
        return [self._ids[at + i % period] for i in range(count)]

    def tell(self, right: int) -> None:
        """So many of the last guess were right. A miss costs half a step: after each the next guess waits twice as long, until
        tokens that were right have made up for the misses. Nothing is learnt from guesses that were not its own.
        """
        if not self._guessed:
            return
        self._misses = max(0, self._misses - right) if right else min(self._misses + 1, MOST_MISSES)
        self._rest = 2**self._misses - 1

    def _found(self) -> int | None:
        """Where the text went on when it last ended as it does now."""
        if len(self._ids) <= MATCH:
            return None
        key = self._key()
        if key in self._later:
            return self._later[key]
        place = int(np.searchsorted(self._keys, key, side="right")) - 1
        if place < 0 or self._keys[place] != key:
            return None
        at = int(self._ends[place]) + MATCH
        return at if at < len(self._ids) else None

    def _key(self) -> int:
        """The last MATCH tokens as one number."""
        key = 0
        for token in self._ids[-MATCH:]:
            key = key * self._vocab + token
        return key
