# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RET505
"""Packed tiles back to numbers in the stored basis: what streaming prefill reads, 32 tokens a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import HeadCodec, LabelCodec, PackedPages
from skvq.kernels.triton_gpu.e4m3 import e4m3_decode
from skvq.kernels.triton_gpu.forms import VARYING
from skvq.kernels.triton_gpu.pages import bits_code, code_bytes, in_page, low_bits, middle, page_strides


@triton.jit
def load_field(base, t, d, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """One field (int32) of channels ``d`` [1, D] and tokens ``t`` [T, 1] of a tile, from one plane set of WIDTH bits."""
    size: tl.constexpr = D * WIDTH // 8
    row: tl.constexpr = size if BY_TOKEN else 1
    column: tl.constexpr = 1 if BY_TOKEN else TILE
    byte = tl.load(base + t * row + (d % size) * column).to(tl.int32)
    return (byte >> (d // size * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def load_codes(base, share, s, d, D: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Codes (int32) of tokens ``32 share + s`` [T, 1] and channels ``d`` [1, D] of one tile; for trits too."""
    if BITS == 15:
        byte = tl.load(base + (s * D + d if BY_TOKEN else d * 32 + s)).to(tl.int32)
        for _ in range(share):
            byte = (byte * 3) & 0xFF
        return (byte * 3) >> 8
    else:
        t = share * 32 + s
        low: tl.constexpr = low_bits(BITS)
        code = load_field(base, t, d, D, low, TILE, BY_TOKEN)
        if BITS == 3:
            code |= load_field(base + TILE * D // 4, t, d, D, 1, TILE, BY_TOKEN) << 2
        return code


@triton.jit
def load_meta(meta, label, t, stride_head, G: tl.constexpr, TILE: tl.constexpr):
    """Metadata words of tokens ``t`` [T, 1] and groups ``label`` [1, D] of all kv heads; ``meta`` is the tile of the first."""
    return tl.load(meta + (label // G) * stride_head + (label % G) * TILE + t)


@triton.jit(**VARYING)
def unpack_kernel(
    key_out_ptr, value_out_ptr, key_code_ptr, value_code_ptr, meta_ptr, page_ptr, key_unit_ptr, value_unit_ptr,
    key_label_ptr, value_label_ptr, first_tile,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``mid + scale * (code - (levels - 1) / 2)`` of 32 tokens of one kv head, keys and values, to float32 [T, KH, D].

    A channel's group is its label, also where groups are contiguous. Every bit equals that of the reference, for scale times
    code is exact in float32. Reads its share of a tile once, writes 8 bytes a channel and token.
    """
    TILES: tl.constexpr = in_page(TILE)
    tile, share = tl.program_id(0) // (TILE // 32), tl.program_id(0) % (TILE // 32)
    head, heads = tl.program_id(1), tl.num_programs(1)
    page = tl.load(page_ptr + (first_tile + tile) // TILES).to(tl.int64)
    place = (first_tile + tile) % TILES
    s = tl.arange(0, 32)[:, None]
    d = tl.arange(0, D)[None, :]
    out = ((tl.program_id(0) * 32 + s).to(tl.int64) * heads + head) * D + d
    meta = meta_ptr + page * stride_meta_page + place * (G * TILE)

    base = key_code_ptr + page * stride_key_page + head * stride_key_head
    base += place * code_bytes(KEY_BITS, D, TILE)
    label = tl.load(key_label_ptr + head * D + d)
    unit = tl.load(key_unit_ptr + label)
    word = load_meta(meta, label, share * 32 + s, stride_meta_head, G, TILE)
    code = load_codes(base, share, s, d, D, KEY_BITS, TILE, True).to(tl.float32) - middle(KEY_BITS)
    tl.store(key_out_ptr + out, e4m3_decode((word >> 8) & 0xFF) * unit + e4m3_decode(word & 0x7F) * unit * code)

    base = value_code_ptr + page * stride_value_page + head * stride_value_head
    base += place * code_bytes(VALUE_BITS, D, TILE)
    label = tl.load(value_label_ptr + head * D + d)
    unit = tl.load(value_unit_ptr + label)
    word = load_meta(meta, label, share * 32 + s, stride_meta_head, G, TILE)
    code = load_codes(base, share, s, d, D, VALUE_BITS, TILE, False).to(tl.float32) - middle(VALUE_BITS)
    tl.store(value_out_ptr + out, e4m3_decode((word >> 24) & 0xFF) * unit + e4m3_decode((word >> 16) & 0xFF) * unit * code)


def launch_unpack(
    pages: PackedPages, codec: HeadCodec | LabelCodec, page_row: Tensor, first: int, count: int,
    key_label: Tensor, value_label: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values of tokens ``first .. first+count-1``, whole tiles, in the stored basis: new, float32 [T, KH, D].

    Labels int32 [KH * D]: the group of each channel, counted over all kv heads, as ``LabelCodec`` has them.
    """
    layout = pages.layout
    assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
    shape = (count, layout.kv_heads, layout.head_size)
    keys, values = (torch.empty(shape, dtype=torch.float32, device=page_row.device) for _ in range(2))
    if count:
        unpack_kernel[(count // 32, layout.kv_heads)](
            keys, values, pages.key_codes, pages.value_codes, pages.meta, page_row, codec.keys.unit, codec.values.unit,
            key_label, value_label, first // layout.tile, *page_strides(pages),
            D=layout.head_size, KEY_BITS=bits_code(layout.key_bits), VALUE_BITS=bits_code(layout.value_bits), G=layout.groups,
            TILE=layout.tile, num_warps=4,
        )  # fmt: skip
    return keys, values


def unpack_heads(pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """``Backend.unpack_heads``: keys after RoPE and values, float32 [T, KH, D], new. Bases and means are undone by torch."""
    layout = pages.layout
    channels = torch.arange(layout.kv_heads * layout.head_size, device=page_row.device)
    label = torch.div(channels, layout.group_size, rounding_mode="floor").to(torch.int32)
    return reference.decode_heads(codec, first, *launch_unpack(pages, codec, page_row, first, count, label, label))


def unpack_labels(pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """``Backend.unpack_labels``: keys after RoPE, which torch does, and values, float32 [T, KH, D], new."""
    key_labels, value_labels = codec.key_labels.to(torch.int32), codec.value_labels.to(torch.int32)
    keys, values = launch_unpack(pages, codec, page_row, first, count, key_labels, value_labels)
    positions = torch.arange(first, first + count, device=keys.device)
    return reference.rotary(keys, positions, codec.rope), values
