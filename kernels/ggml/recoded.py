"""Blocks of GGUF that no kernel multiplies, as blocks of more bits that one does, which hold the same numbers; those of IQ4_XS
within 1/2048, up to 65,504.

    Q3_K    d * scale * (code - 4), scales of 16 columns      Q6_K: d * scale * (code - 32)
    IQ4_NL  d * table[code]                                   Q8_0: d * code, the table's numbers are int8
    IQ4_XS  d * scale * table[code], scales of 32 columns     Q8_0, d * scale rounded to float16

Layouts: ``dequantize_row_q3_K``, ``..._iq4_nl``, ``..._iq4_xs`` of ggml.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.ggml.blocks import fields, split_last
from skvq.kernels.ggml.formats import BLOCK, FORMATS

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
RECODED = {"Q3_K": "Q6_K", "IQ4_NL": "Q8_0", "IQ4_XS": "Q8_0"}
"""Types that are given out as another."""
ROWS_AT_A_TIME = 1024
"""Which bounds temporary memory: about ten bytes a weight."""
_FILE_BYTES = {"Q3_K": 110, "IQ4_NL": 18, "IQ4_XS": 136}


def recoded_bytes(kind: str, nbytes: int) -> int:
    """Bytes that so many of these blocks come to."""
    columns = BLOCK if kind == "IQ4_NL" else 8 * BLOCK
    form = FORMATS[RECODED[kind]]
    return nbytes // _FILE_BYTES[kind] * (columns // (BLOCK * form.span)) * form.file_bytes


def recoded(data: Tensor, kind: str) -> Tensor:
    """Rows of blocks uint8 [rows, bytes] as rows of blocks of ``RECODED[kind]``."""
    recode = {"Q3_K": _q3_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs}[kind]
    out = torch.empty(len(data), recoded_bytes(kind, data.shape[1]), dtype=torch.uint8)
    for start in range(0, len(data), ROWS_AT_A_TIME):
        blocks = split_last(data[start : start + ROWS_AT_A_TIME], -1, _FILE_BYTES[kind])
        out[start : start + ROWS_AT_A_TIME] = recode(blocks).flatten(1)
    return out


def _iq4_nl(blocks: Tensor) -> Tensor:
    """d, then 16 bytes: byte i holds columns i (low) and 16 + i."""
    return torch.cat([blocks[..., :2], _looked_up(blocks[..., 2:])], -1)


def _iq4_xs(blocks: Tensor) -> Tensor:
    """d, upper two bits of eight scales, their lower fours, then as IQ4_NL for every 32 columns."""
    d = blocks[..., :2].contiguous().view(torch.float16).float()  # [..., 1]
    low = fields(blocks[..., 4:8], 4).flatten(-2)
    high = fields(blocks[..., 2:4], 2).flatten(-2)
    scales = (d * ((low | high << 4).float() - 32)).half()  # [..., 8]
    codes = _looked_up(split_last(blocks[..., 8:], 8, BLOCK // 2))
    return torch.cat([scales[..., None].contiguous().view(torch.uint8), codes], -1)


def _q3_k(blocks: Tensor) -> Tensor:
    """Third bits (bit b of byte i: column i of block b), lower twos (byte i of a half: column i of its four blocks), 16 scales,
    d."""
    third = fields(blocks[..., :32], 1).transpose(-1, -2)  # [..., 8, 32]
    twos = fields(split_last(blocks[..., 32:96], 2, BLOCK), 2).transpose(-1, -2).flatten(-3, -2)
    codes = (twos | third << 2) + 28
    codes = codes.view(*codes.shape[:-2], 2, 2, 2, BLOCK)  # [..., half, 2, 2, 32]; 4 of three bits is 32 of six
    low = codes[..., 0, :, :] & 15 | (codes[..., 1, :, :] & 15) << 4  # [..., half, 2, 32]: blocks 0 and 2, then 1 and 3
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (codes.flatten(-3, -2) >> 4 << shifts).sum(-2, dtype=torch.uint8)
    factors = _six_bit_scales(blocks[..., 96:108]) - 32  # two's complement
    return torch.cat([low.flatten(-3), high.flatten(-2), factors, blocks[..., 108:]], -1)


def _six_bit_scales(packed: Tensor) -> Tensor:
    """12 bytes as 16 scales: lower fours in the first eight (scales 0 to 7, then 8 to 15), upper twos in the last four."""
    lower = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], -1)
    upper = fields(packed[..., 8:], 2).transpose(-1, -2).flatten(-2)
    return lower | upper << 4


def _looked_up(packed: Tensor) -> Tensor:
    """Two codes a byte as the table's numbers, int8 in uint8."""
    table = torch.tensor(IQ4_TABLE, dtype=torch.int8).view(torch.uint8)
    return table[torch.cat([packed & 15, packed >> 4], -1).long()]
