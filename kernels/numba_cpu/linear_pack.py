"""Block-quantized matrices in memory: sixteen rows side by side.

A file stores a row as blocks of 32 columns (``block_format.py``). Here the blocks of sixteen rows that cover the same 32
columns lie together:

    codes    4 bits: 4 vectors [16 rows] of 32-bit words; nibble k of word v is column 8 v + 2 k (k < 4) or 8 v + 2 (k - 4) + 1
             8 bits: 8 vectors of words, bytes in the column order 0, 2, 1, 3
    high     fifth bits: one word a row, bit p is column 2 p (p < 16) or 2 (p - 16) + 1
             fifth and sixth: two words a row, each of 16 columns, field p of two bits is column 2 p (p < 8) or 2 (p - 8) + 1
    factors  of d: int8 [16] for each part of the block; of m: int8 [16]

so that ``(word >> 4 k) & 0x000f000f`` is a pair of neighbouring columns as two 16-bit integers, in every lane that of its row.
After one block, or after eight that share them: d, and what is added, float16 [16] each. Rows are filled up with zeros to a
multiple of sixteen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.ggml.blocks import split_last, take_apart
from skvq.kernels.numba_cpu.block_format import LANES, LaneFormat

GROUPS_AT_A_TIME = 256
"""Groups of sixteen rows repacked at a time, which bounds temporary memory (several bytes per weight)."""


def pack_blocks(data: Tensor, form: LaneFormat) -> Tensor:
    """Rows of ggml blocks uint8 [rows, bytes] as uint8 [rows / 16 rounded up, spans, span_bytes]."""
    assert data.dtype == torch.uint8 and data.dim() == 2 and data.shape[1] % form.file_bytes == 0, data.shape
    rows = len(data)
    groups, step = -(-rows // LANES), LANES * GROUPS_AT_A_TIME
    out = data.new_empty(groups, data.shape[1] // form.file_bytes, form.span_bytes)
    for start in range(0, rows, step):
        part = data[start : start + step]
        if len(part) % LANES:
            part = torch.cat([part, part.new_zeros(-len(part) % LANES, part.shape[1])])
        _pack(part, form, out[start // LANES : start // LANES + GROUPS_AT_A_TIME])
    return out


def _pack(data: Tensor, form: LaneFormat, out: Tensor) -> None:
    blocks = data.view(-1, LANES, out.shape[1], form.file_bytes).transpose(1, 2)  # [groups, spans, 16, bytes]
    parts = take_apart(blocks, form)
    codes = parts.codes.transpose(-3, -2)  # [groups, spans, span, 16, 32]
    whole = out[..., : form.heads_at].view(*out.shape[:-1], form.span, form.block_bytes)
    whole[..., : form.high_at] = (_bytes(codes) if form.bits == 8 else _nibbles(codes & 15)).flatten(-3)
    if form.high_bits:
        whole[..., form.high_at : form.factors_at] = _high(codes >> 4, form.high_bits).flatten(-3)
    if form.factors:
        whole[..., form.factors_at :] = parts.factors.permute(0, 1, 3, 4, 2).flatten(-2)  # [groups, spans, span, factors, 16]
    out[..., form.heads_at :] = split_last(parts.heads, -1, 2).transpose(2, 3).flatten(2)


def _bytes(codes: Tensor) -> Tensor:
    """[..., 16, 32] bytes to [..., 8, 16, 4] in the column order 0, 2, 1, 3."""
    return split_last(codes, 8, 4)[..., [0, 2, 1, 3]].transpose(-3, -2)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes [..., 16, 32] below 16 to [..., 4, 16, 4] bytes of words."""
    even, odd = split_last(codes, 4, 4, 2).unbind(-1)  # [..., 16, word, pair]: nibbles 0 to 3, and 4 to 7
    low, high = (part[..., 0::2] | part[..., 1::2] << 4 for part in (even, odd))
    return torch.cat([low, high], -1).transpose(-3, -2)


def _high(fields: Tensor, bits: int) -> Tensor:
    """Fields [..., 16, 32] of some bits to [..., bits, 16, 4] bytes of words: low halves even columns, high halves odd."""
    even, odd = split_last(fields, bits, 16 // bits, 2).unbind(-1)  # [..., 16, word, pair]
    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    order = split_last(torch.cat([even, odd], -1), 4, 8 // bits)
    return (order << places).sum(-1, dtype=torch.uint8).transpose(-3, -2)
