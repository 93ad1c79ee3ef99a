"""Where the numbers of sixteen rows of a block lie in memory here (``linear_pack.py``).

Memory is that of the file, but for factors of 6 bits, which take a byte here: Q4_K has 4.5 bits a weight there and 4.625 here,
Q5_K 5.5 and 5.625; Q6_K, whose factors are bytes, 6.5625 in both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from skvq.kernels.ggml import formats
from skvq.kernels.ggml.formats import BLOCK, BlockFormat

LANES = 16


@dataclass(frozen=True, slots=True)
class LaneFormat(BlockFormat):
    """A block format, and the bytes that sixteen rows of it take."""

    @property
    def high_at(self) -> int:
        """Bytes before the high bits of the codes of a block."""
        return BLOCK * LANES * (8 if self.bits == 8 else 4) // 8

    @property
    def factors_at(self) -> int:
        """Bytes before the factors of a block."""
        return BLOCK * LANES * self.bits // 8

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, without d and m."""
        return self.factors_at + LANES * self.factors

    @property
    def heads_at(self) -> int:
        """Bytes before d of the blocks that share it."""
        return self.span * self.block_bytes

    @property
    def span_bytes(self) -> int:
        """Bytes of the blocks that share d and m."""
        return self.heads_at + LANES * self.head_bytes


FORMATS = {kind: LaneFormat(**asdict(form)) for kind, form in formats.FORMATS.items()}
