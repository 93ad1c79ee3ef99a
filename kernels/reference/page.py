"""Codes and metadata to the bytes of a page and back (``kernels/layout.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.interface import PackedPages
from skvq.kernels.layout import BIT_PLANES, RETAINED_FLAG, TRIT_PLANES, TRIT_SLOTS, PageLayout
from skvq.kernels.reference.e4m3 import e4m3_decode


def pack_codes(codes: Tensor, bits: float, tile: int, *, token_major: bool) -> Tensor:
    """Bytes of ``codes`` uint8 [T, KH, D], T whole tiles: uint8 [T / tile, KH, bytes of a tile] (``layout.py``)."""
    tokens, heads, size = codes.shape
    rows = codes.view(tokens // tile, tile, heads, size).transpose(1, 2)  # [tiles, KH, tile, D]
    if bits == 1.5:
        trits = rows.reshape(-1, heads, TRIT_PLANES, TRIT_SLOTS, size).to(torch.int32)
        weights = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=codes.device)
        value = (trits * weights.view(1, 1, -1, 1, 1)).sum(2)  # [tiles, KH, slots, D]
        parts = [(256 * value + 242) // 243]
    else:
        parts = []
        shift = 0
        for width in BIT_PLANES[bits]:
            planes = 8 // width
            part = ((rows >> shift) & (2**width - 1)).reshape(*rows.shape[:3], planes, size // planes).to(torch.int32)
            places = torch.arange(planes, device=codes.device, dtype=torch.int32) * width
            parts.append((part << places[:, None]).sum(3))  # [tiles, KH, tile, D / planes]
            shift += width
    parts = parts if token_major else [p.transpose(2, 3) for p in parts]
    return torch.cat([p.reshape(*p.shape[:2], -1) for p in parts], -1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: float, tile: int, size: int, *, token_major: bool) -> Tensor:
    """Inverse of ``pack_codes``: uint8 [tiles, KH, bytes of a tile] -> uint8 [tiles * tile, KH, D]."""
    tiles, heads, _ = packed.shape
    if bits == 1.5:
        shape = (TRIT_SLOTS, size) if token_major else (size, TRIT_SLOTS)
        x = packed.view(tiles, heads, *shape).to(torch.int32)
        x = x if token_major else x.transpose(2, 3)
        trits = []
        for _ in range(TRIT_PLANES):
            x = x * 3
            trits.append(x >> 8)
            x = x & 0xFF
        rows = torch.stack(trits, 2).reshape(tiles, heads, tile, size)
    else:
        rows = torch.zeros(tiles, heads, tile, size, dtype=torch.int32, device=packed.device)
        start = shift = 0
        for width in BIT_PLANES[bits]:
            planes = 8 // width
            count = tile * size // planes
            part = packed[..., start : start + count].to(torch.int32)
            shape = (tile, size // planes) if token_major else (size // planes, tile)
            part = part.view(tiles, heads, *shape)
            part = part if token_major else part.transpose(2, 3)
            places = torch.arange(planes, device=packed.device, dtype=torch.int32) * width
            codes = (part[..., None, :] >> places[:, None]) & (2**width - 1)  # [tiles, KH, tile, planes, D / planes]
            rows |= codes.reshape(tiles, heads, tile, size) << shift
            start, shift = start + count, shift + width
    return rows.transpose(1, 2).reshape(tiles * tile, heads, size).to(torch.uint8)


def pack_meta(
    key_scale: Tensor, key_mid: Tensor, value_scale: Tensor, value_mid: Tensor, retained: Tensor, tile: int
) -> Tensor:
    """Metadata words int32 [T / tile, KH, G * tile] from bytes uint8 [T, KH, G] and retained flags bool [T]."""
    flag = torch.zeros_like(key_scale)
    flag[..., 0] = retained[:, None].to(torch.uint8) * RETAINED_FLAG
    words = torch.stack([key_scale | flag, key_mid, value_scale, value_mid], -1).view(torch.int32)[..., 0]  # [T, KH, G]
    tokens, heads, groups = words.shape
    return words.view(tokens // tile, tile, heads, groups).permute(0, 2, 3, 1).reshape(tokens // tile, heads, groups * tile)


def unpack_meta(words: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inverse of ``pack_meta``, but scales and mids are decoded: float32 [T, KH, G] in units; and the flags bool [T]."""
    tiles, heads, count = words.shape
    rows = words.view(tiles, heads, count // tile, tile).permute(0, 3, 1, 2).reshape(tiles * tile, heads, count // tile)
    parts = rows.flatten().view(torch.uint8).view(*rows.shape, 4)  # flat: of a size of 1 any stride counts as contiguous
    retained = (parts[:, 0, 0, 0] & RETAINED_FLAG) != 0
    key_scale = e4m3_decode((parts[..., 0] & 0x7F).contiguous())
    key_mid, value_scale, value_mid = (e4m3_decode(parts[..., i].contiguous()) for i in (1, 2, 3))
    return key_scale, key_mid, value_scale, value_mid, retained


def tile_index(layout: PageLayout, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Page and tile within the page of each tile of tokens ``first .. first+count-1``, int64 [count / tile] each."""
    assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
    tiles = torch.arange(first // layout.tile, (first + count) // layout.tile, device=page_row.device)
    return page_row[tiles // layout.tiles].long(), tiles % layout.tiles


def write_tiles(
    pages: PackedPages, page_row: Tensor, first: int, key_codes: Tensor, value_codes: Tensor, words: Tensor
) -> None:
    layout, count = pages.layout, key_codes.shape[0]
    page, tile = tile_index(layout, page_row, first, count)
    blocks = (
        (pages.key_codes, pack_codes(key_codes, layout.key_bits, layout.tile, token_major=True)),
        (pages.value_codes, pack_codes(value_codes, layout.value_bits, layout.tile, token_major=False)),
        (pages.meta, words),
    )
    for target, block in blocks:
        target.view(*target.shape[:2], layout.tiles, -1)[page, :, tile] = block


def read_tiles(pages: PackedPages, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of ``write_tiles``: codes of keys and of values, words of metadata."""
    layout, size = pages.layout, pages.layout.head_size
    page, tile = tile_index(layout, page_row, first, count)
    key, value, words = (
        t.view(*t.shape[:2], layout.tiles, -1)[page, :, tile] for t in (pages.key_codes, pages.value_codes, pages.meta)
    )
    return (
        unpack_codes(key, layout.key_bits, layout.tile, size, token_major=True),
        unpack_codes(value, layout.value_bits, layout.tile, size, token_major=False),
        words,
    )
