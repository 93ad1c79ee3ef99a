"""Which token lies where: pure integer arithmetic on one sequence's three regions.

    0 ............ packed(length) ............ length
    packed pages (some tokens retained)  |  window, a ring

Full-precision slots of a sequence: first ``retained`` slots that filter rules fill, then a ring of ``window + tile``
slots in which the token at position p has the slot ``retained + p % ring``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from skvq.kernels.layout import packed_tokens, pages_for

Positions = TypeVar("Positions", int, Tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """Sizes of the regions, in tokens.

    >>> r = Regions(window=128, tile=128, retained=5)
    >>> r.ring, r.slots, r.packed(300), r.slot(300), r.pages(3000)
    (256, 261, 128, 49, 3)
    """

    window: int
    tile: int
    retained: int
    sinks: int = 0  # the first of the retained slots: they belong to the attention sinks

    @property
    def ring(self) -> int:
        """Slots of the window: one tile more than the window, so that packing can wait for a whole tile."""
        return self.window + self.tile

    @property
    def slots(self) -> int:
        """Full-precision slots of a sequence."""
        return self.retained + self.ring

    def packed(self, length: int) -> int:
        """Tokens of a sequence of ``length`` that lie in packed pages."""
        return packed_tokens(length, self.window, self.tile)

    def slot(self, position: Positions) -> Positions:
        """Full-precision slot of a token in the window, or of each of several."""
        return self.retained + position % self.ring

    def pages(self, length: int) -> int:
        """Pages a sequence of ``length`` tokens needs."""
        return pages_for(self.packed(length))
