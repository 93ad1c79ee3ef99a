"""Block formats of GGUF files: which numbers make a weight.

A block is 32 columns. Q4_0 to Q8_0 hold a float16 scale ``d``, perhaps a float16 minimum ``m``, for each. In Q4_K, Q5_K and
Q6_K eight blocks share ``d`` and ``m``, and every block, or every half of one, has small integer factors of them.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 32


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A weight is ``d * (code - offset)``, or ``d * code + m``; codes of 8 bits are signed.

    Where blocks share d and m, read ``(d * factor)`` for d and ``(m * factor)`` for m: ``parts`` factors of d a block, each for
    as many columns, and one of m.
    """

    kind: str  # ggml type
    bits: int  # of a code: 4, 5, 6 or 8
    has_min: bool
    offset: int
    span: int = 1  # blocks that share d and m
    parts: int = 1
    factor_bits: int = 0  # in the file

    def __post_init__(self) -> None:
        assert (self.span > 1) == (self.factor_bits > 0) and not (self.offset and self.has_min), self.kind

    @property
    def high_bits(self) -> int:
        """Bits of a code beyond four, which lie apart."""
        return 0 if self.bits == 8 else self.bits - 4

    @property
    def head_bytes(self) -> int:
        """Bytes of d and m."""
        return 4 if self.has_min else 2

    @property
    def factors(self) -> int:
        """Integer factors of a block."""
        return self.parts + self.has_min if self.factor_bits else 0

    @property
    def file_bytes(self) -> int:
        """Bytes in the file of the blocks of a row that share d.

        >>> [(kind, form.file_bytes) for kind, form in FORMATS.items() if form.span > 1]
        [('Q4_K', 144), ('Q5_K', 176), ('Q6_K', 210)]
        """
        return self.head_bytes + self.span * (BLOCK * self.bits + self.factors * self.factor_bits) // 8


FORMATS = {
    form.kind: form
    for form in (
        BlockFormat("Q4_0", 4, False, 8),
        BlockFormat("Q4_1", 4, True, 0),
        BlockFormat("Q5_0", 5, False, 16),
        BlockFormat("Q5_1", 5, True, 0),
        BlockFormat("Q8_0", 8, False, 0),
        BlockFormat("Q4_K", 4, True, 0, span=8, factor_bits=6),
        BlockFormat("Q5_K", 5, True, 0, span=8, factor_bits=6),
        BlockFormat("Q6_K", 6, False, 32, span=8, parts=2, factor_bits=8),
    )
}
