"""Block formats of GGUF files, and their order in memory here: sixteen rows side by side.

A file stores a row as blocks of 32 columns: float16 scale ``d``, perhaps float16 minimum ``m``, then codes. Here the blocks of
sixteen rows that cover the same 32 columns lie together, in as many bytes as before:

    codes   4 bits: 4 vectors [16 rows] of 32-bit words; nibble k of word v is column 8 v + 2 k (k < 4) or 8 v + 2 (k - 4) + 1
            8 bits: 8 vectors of words, bytes in the column order 0, 2, 1, 3
    high    fifth bits: one word a row, bit p is column 2 p (p < 16) or 2 (p - 16) + 1
    d, m    float16 [16] each

so that ``(word >> 4 k) & 0x000f000f`` is a pair of neighbouring columns as two 16-bit integers, in every lane that of its row.
Rows are filled up with zeros to a multiple of sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, LANES = 32, 16


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A weight is ``d * (code - offset)``, or ``d * code + m``; codes of 8 bits are signed."""

    kind: str  # ggml type
    bits: int  # of a code: 4, 5 or 8
    has_min: bool
    offset: int

    @property
    def high_at(self) -> int:
        """Bytes before the fifth bits."""
        return BLOCK * LANES * (8 if self.bits == 8 else 4) // 8

    @property
    def scale_at(self) -> int:
        """Bytes before the scales."""
        return BLOCK * LANES * self.bits // 8

    @property
    def min_at(self) -> int:
        """Bytes before the minima."""
        return self.scale_at + 2 * LANES

    @property
    def block_bytes(self) -> int:
        """Bytes of sixteen rows of a block."""
        return self.min_at + (2 * LANES if self.has_min else 0)


FORMATS = {
    form.kind: form
    for form in (
        BlockFormat("Q4_0", 4, False, 8),
        BlockFormat("Q4_1", 4, True, 0),
        BlockFormat("Q5_0", 5, False, 16),
        BlockFormat("Q5_1", 5, True, 0),
        BlockFormat("Q8_0", 8, False, 0),
    )
}


def pack_blocks(data: Tensor, form: BlockFormat) -> Tensor:
    """Rows of ggml blocks uint8 [rows, bytes] as uint8 [rows / 16 rounded up, blocks, block_bytes]."""
    assert data.dtype == torch.uint8 and data.dim() == 2 and data.shape[1] % (form.block_bytes // LANES) == 0, data.shape
    rows = len(data)
    groups = -(-rows // LANES)
    parts = data.view(rows, -1, form.block_bytes // LANES)  # [rows, blocks, bytes of a block]
    if groups * LANES > rows:
        parts = torch.cat([parts, parts.new_zeros(groups * LANES - rows, *parts.shape[1:])])
    parts = parts.view(groups, LANES, *parts.shape[1:]).transpose(1, 2)  # [groups, blocks, 16, bytes]
    heads = 4 if form.has_min else 2
    at = heads + (4 if form.bits == 5 else 0)
    out = parts.new_empty(groups, parts.shape[1], form.block_bytes)
    codes = _bytes(parts[..., at:]) if form.bits == 8 else _nibbles(parts[..., at:])
    out[..., : form.high_at] = codes.flatten(2)
    if form.bits == 5:
        out[..., form.high_at : form.scale_at] = _high_bits(parts[..., heads:at]).flatten(2)
    out[..., form.scale_at :] = _last(parts[..., :heads], heads // 2, 2).transpose(2, 3).flatten(2)
    return out


def _bytes(codes: Tensor) -> Tensor:
    """[..., 16, 32] bytes to [..., 8, 16, 4] in the column order 0, 2, 1, 3."""
    return _last(codes, 8, 4)[..., [0, 2, 1, 3]].transpose(-3, -2)


def _nibbles(codes: Tensor) -> Tensor:
    """[..., 16, 16] bytes, byte i holding columns i (low) and 16 + i, to [..., 4, 16, 4] bytes of words."""
    columns = _last(torch.cat([codes & 15, codes >> 4], -1), 4, 4, 2)  # [..., 16, word, pair, 2]
    even, odd = columns.unbind(-1)  # nibbles 0 to 3, and 4 to 7
    low, high = (part[..., 0::2] | part[..., 1::2] << 4 for part in (even, odd))
    return torch.cat([low, high], -1).transpose(-3, -2)


def _high_bits(words: Tensor) -> Tensor:
    """[..., 16, 4] bytes, bit i being column i, to the same with bit p being column 2 p, bit 16 + p column 2 p + 1."""
    places = torch.arange(8, dtype=torch.uint8)
    bits = (words[..., None] >> places & 1).flatten(-2)  # [..., 16, 32 columns]
    order = _last(torch.cat([bits[..., 0::2], bits[..., 1::2]], -1), 4, 8)
    return (order << places).sum(-1, dtype=torch.uint8)


def _last(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return x.reshape(*x.shape[:-1], *sizes)
