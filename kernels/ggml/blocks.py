"""Blocks as a GGUF file holds them, taken apart: codes by column, factors, scales and minima (ggml's ``ggml-quants.c``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.kernels.ggml.formats import BLOCK, BlockFormat


@dataclass(frozen=True, slots=True)
class Parts:
    """Blocks taken apart, all uint8, any dimensions before."""

    codes: Tensor  # [..., span, 32] by column
    factors: Tensor  # [..., span, factors of a block]: those of d, then that of m; two's complement
    heads: Tensor  # [..., 2 or 4]: d, and what is added, in float16


def scales_of(blocks: Tensor, form: BlockFormat) -> Tensor:
    """Scales and minima float16 of rows of blocks uint8 [rows, bytes]: the only numbers in them that can be infinite or NaN."""
    return heads_of(split_last(blocks, -1, form.file_bytes), form).contiguous().view(torch.float16)


def heads_of(blocks: Tensor, form: BlockFormat) -> Tensor:
    """d, and m as the file has it, of blocks uint8 [..., file_bytes]: uint8 [..., 2 or 4]."""
    return blocks[..., -2:] if form.kind == "Q6_K" else blocks[..., : form.head_bytes]


def take_apart(blocks: Tensor, form: BlockFormat) -> Parts:
    """Blocks uint8 [..., file_bytes]."""
    assert blocks.dtype == torch.uint8 and blocks.shape[-1] == form.file_bytes, (blocks.dtype, blocks.shape)
    if form.kind == "Q6_K":
        return _sixes(blocks, form)
    return _with_minima(blocks, form) if form.span > 1 else _plain(blocks, form)


def _plain(blocks: Tensor, form: BlockFormat) -> Parts:
    """d, m, fifth bits of columns 0 to 31 in 4 bytes, codes: byte i holds columns i (low) and 16 + i."""
    at = form.head_bytes + 4 * form.high_bits
    codes = blocks[..., at:]
    if form.bits < 8:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    if form.high_bits:
        codes = codes | fields(blocks[..., form.head_bytes : at], 1).flatten(-2) << 4
    return Parts(codes[..., None, :], blocks[..., None, :0], heads_of(blocks, form))


def _with_minima(blocks: Tensor, form: BlockFormat) -> Parts:
    """Q4_K and Q5_K: d, m, factors, fifth bits (bit j of byte i is column i of block j), codes (32 bytes for two blocks).

    m is subtracted: its sign is turned, so that it is added like that of the other formats.
    """
    at = 16 + BLOCK * form.high_bits
    codes = split_last(blocks[..., at:], -1, BLOCK)  # [..., 4, 32]
    codes = torch.stack([codes & 15, codes >> 4], -2).flatten(-3, -2)  # [..., 8, 32]
    if form.high_bits:
        codes = codes | fields(blocks[..., 16:at], 1).transpose(-1, -2) << 4
    heads = heads_of(blocks, form).clone()
    heads[..., 3] ^= 0x80
    return Parts(codes, _six_bit_factors(blocks[..., 4:16]), heads)


def _six_bit_factors(packed: Tensor) -> Tensor:
    """12 bytes to [..., 8, 2]. Blocks 0 to 3: low six bits of bytes 0 to 7; 4 to 7: bytes 8 to 11, top bits of bytes 0 to 7."""
    d, m, low = split_last(packed, 3, 4).unbind(-2)
    scales = torch.cat([d & 63, low & 15 | d >> 2 & 48], -1)
    minima = torch.cat([m & 63, low >> 4 | m >> 2 & 48], -1)
    return torch.stack([scales, minima], -1)


def _sixes(blocks: Tensor, form: BlockFormat) -> Parts:
    """Q6_K: for each half, 64 bytes of low fours (blocks 0 and 1, then 2 and 3); 32 bytes of high twos; factors; d."""
    low = split_last(blocks[..., :128], 2, 64)
    low = split_last(torch.stack([low & 15, low >> 4], -2).flatten(-3), 8, BLOCK)
    high = fields(split_last(blocks[..., 128:192], 2, BLOCK), 2).transpose(-1, -2).flatten(-3, -2)  # [..., 8, 32]
    return Parts(low | high << 4, split_last(blocks[..., 192:208], form.span, form.parts), heads_of(blocks, form))


def fields(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., n] as [..., n, 8 / bits] numbers, lowest first."""
    return packed[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device) & (1 << bits) - 1


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return x.reshape(*x.shape[:-1], *sizes)
