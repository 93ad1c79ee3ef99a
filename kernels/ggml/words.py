"""Quantized weights as a GPU multiplies them: codes in words, two float16 numbers a block of 32 columns.

A weight is ``scale * code + offset``, codes from 0 on. Of row r, block b (columns 32 b + c):

    codes  int32 [rows, planes, blocks, 4]: nibble k of word j holds the low four bits of column c = 4 k + j; codes of 8 bits
           have two planes, byte i of word j of plane p is column 16 p + 4 i + j
    high   int32 [rows, bits - 4, blocks]: fifth bits, bit c of column c; fifth and sixth bits, field c of plane p, of two bits,
           of column 16 p + c
    pairs  int32 [rows, blocks]: the scale in the low half, the offset in the high one. Q6_K has a scale for each half of a
           block instead, and its offset is -32 scales

Where blocks share d and m, the products of these and their factors are rounded to float16: a GPU computes in 16 bits anyway.
Q4_K has 4.5 bits a weight in the file and 5 here, Q4_0 4.5 and 5, Q5_K 5.5 and 6, Q6_K 6.56 and 7, Q8_0 8.5 and 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.kernels.ggml.blocks import split_last, take_apart
from skvq.kernels.ggml.formats import BLOCK, FORMATS, BlockFormat

EXPANDED_BYTES = 64 << 20
"""Bytes of a matrix that are expanded at a time, to multiply many vectors."""
ROWS_AT_A_TIME = 1024
"""Rows taken apart at a time, which bounds temporary memory (a few bytes a weight)."""


@dataclass(frozen=True, slots=True)
class Words:
    """A matrix of ``shape`` (rows, columns) as words, all in one int32 ``data`` [words of a row * rows]."""

    form: BlockFormat
    shape: tuple[int, int]
    data: Tensor

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.shape[1] // BLOCK

    @property
    def halves(self) -> bool:
        """Whether a block has two scales and no offset of its own."""
        return self.form.parts == 2

    @property
    def codes(self) -> Tensor:
        """int32 [rows, planes, blocks, 4]."""
        return self._part(0, planes_of(self.form), self.blocks, 4)

    @property
    def high(self) -> Tensor:
        """int32 [rows, high bits, blocks]."""
        return self._part(4 * planes_of(self.form), self.form.high_bits, self.blocks)

    @property
    def pairs(self) -> Tensor:
        """int32 [rows, blocks]."""
        return self._part(4 * planes_of(self.form) + self.form.high_bits, self.blocks)

    def dense(self) -> Tensor:
        """The weights, float32 [rows, columns]: what kernels are held to."""
        shifts = torch.arange(0, 32, 4 * planes_of(self.form), dtype=torch.int32, device=self.data.device)
        codes = self.codes[..., None, :] >> shifts[:, None]  # [rows, planes, blocks, fields of a word, 4]
        codes = codes.transpose(1, 2).reshape(self.shape[0], self.blocks, BLOCK) & (255 if self.form.bits == 8 else 15)
        if bits := self.form.high_bits:
            shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=self.data.device)
            high = self.high[..., None] >> shifts & (1 << bits) - 1  # [rows, bits, blocks, 32 / bits]
            codes |= high.transpose(1, 2).reshape(codes.shape) << 4
        first, second = self.pairs.view(torch.float16).view(self.shape[0], self.blocks, 2).float().unbind(-1)
        if self.halves:
            scales = torch.stack([first, second], -1).repeat_interleave(BLOCK // 2, -1)
            return ((codes - (1 << self.form.bits - 1)) * scales).view(self.shape)
        return torch.addcmul(second[..., None], codes.float(), first[..., None]).view(self.shape)

    def _part(self, words: int, *sizes: int) -> Tensor:
        """What begins after so many words of every block of the matrix."""
        rows = self.shape[0]
        start = rows * self.blocks * words
        return self.data[start : start + rows * torch.Size(sizes).numel()].view(rows, *sizes)


def planes_of(form: BlockFormat) -> int:
    """Planes of codes: 16 bytes of a block each."""
    return 2 if form.bits == 8 else 1


def words_of(form: BlockFormat) -> int:
    """Words of a block.

    >>> {kind: words_of(form) * 32 / 32 for kind, form in FORMATS.items() if form.span > 1}
    {'Q4_K': 5.0, 'Q5_K': 6.0, 'Q6_K': 7.0}
    """
    return 4 * planes_of(form) + form.high_bits + 1


def words_bytes(kind: str, rows: int, columns: int) -> int:
    """What a matrix takes."""
    return 4 * rows * (columns // BLOCK) * words_of(FORMATS[kind])


def to_words(blocks: Tensor, kind: str, device: torch.device) -> Words:
    """Rows of ggml blocks uint8 [rows, bytes of a row] as words on a device, where they are taken apart."""
    form = FORMATS[kind]
    assert blocks.dtype == torch.uint8 and blocks.dim() == 2 and blocks.shape[1] % form.file_bytes == 0, blocks.shape
    rows, count = len(blocks), blocks.shape[1] // form.file_bytes * form.span
    words = Words(form, (rows, count * BLOCK), torch.empty(rows * count * words_of(form), dtype=torch.int32, device=device))
    for start in range(0, rows, ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, rows)
        part = blocks[start:stop].to(device)
        codes, pairs = _apart(split_last(part, -1, form.file_bytes), form)
        words.codes[start:stop] = _codes(codes, form)
        if form.high_bits:
            words.high[start:stop] = _high(codes >> 4, form.high_bits)
        words.pairs[start:stop] = pairs
    return words


def _apart(blocks: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes int32 from 0 on, [rows, blocks, 32], and pairs int32 [rows, blocks] of blocks uint8 [rows, spans, file bytes]."""
    parts = take_apart(blocks, form)
    codes = parts.codes.flatten(1, 2).int()
    heads = parts.heads.contiguous().view(torch.float16).float()  # [rows, spans, 1 or 2]
    factors = parts.factors.view(torch.int8).float() if form.factors else torch.ones(1, device=blocks.device)
    if form.has_min or form.parts == 2:  # [rows, spans, span, 2]
        pair = heads[:, :, None] * factors
    else:
        zero = 128 if form.bits == 8 else form.offset
        pair = (heads * torch.tensor([1.0, -zero], device=blocks.device))[:, :, None]
    if form.bits == 8:
        codes = codes ^ 128  # from two's complement to an offset
    pairs = pair.half().expand(*pair.shape[:2], form.span, 2).contiguous().view(torch.int32)
    return codes, pairs.flatten(1)


def _codes(codes: Tensor, form: BlockFormat) -> Tensor:
    """int32 [rows, planes, blocks, 4] of codes [rows, blocks, 32]."""
    planes = planes_of(form)
    fields = split_last(codes & (255 if planes == 2 else 15), planes, 8 // planes, 4)  # [rows, blocks, planes, field, word]
    return _joined(fields.movedim(3, -1), 4 * planes).transpose(1, 2)


def _high(fields: Tensor, bits: int) -> Tensor:
    """int32 [rows, bits, blocks] of fields of some bits, [rows, blocks, 32]."""
    return _joined(split_last(fields, bits, 32 // bits), bits).transpose(1, 2)


def _joined(fields: Tensor, bits: int) -> Tensor:
    """Words of their fields [..., 32 / bits], the lowest first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=fields.device)
    return (fields << shifts).sum(-1, dtype=torch.int32)
