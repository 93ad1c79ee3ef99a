"""What pages really hold: numbers packed and read back by the backend itself, so that calibration fits what will be stored."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from skvq.kernels.interface import Backend, HeadCodec, HeadSide, PackedKernels, PackedPages, RopeFrequencies
from skvq.kernels.layout import PageLayout, pages_for

Codec = TypeVar("Codec")


def through_pages(
    keys: Tensor,
    values: Tensor,
    layout: PageLayout,
    codec: Codec,
    kernels: PackedKernels[Codec],
) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values [T, KH, D] of positions 0 .. T-1, packed into pages of their own and read back, float32."""
    tokens, device = len(keys), keys.device
    count = -(-tokens // layout.tile) * layout.tile
    rows = torch.zeros(2, count, *keys.shape[1:], dtype=torch.float16, device=device)
    rows[0, :tokens], rows[1, :tokens] = keys, values
    pages = pages_for(count)
    store = PackedPages(
        layout=layout,
        key_codes=torch.empty(pages, layout.kv_heads, layout.key_bytes, dtype=torch.uint8, device=device),
        value_codes=torch.empty(pages, layout.kv_heads, layout.value_bytes, dtype=torch.uint8, device=device),
        meta=torch.empty(pages, layout.kv_heads, layout.meta_words, dtype=torch.int32, device=device),
    )
    row = torch.arange(pages, dtype=torch.int32, device=device)
    kernels.pack(store, codec, row, 0, rows[0], rows[1], torch.zeros(count, dtype=torch.bool, device=device))
    stored_keys, stored_values = kernels.unpack(store, codec, row, 0, count)
    return stored_keys[:tokens], stored_values[:tokens]


def read_back(x: Tensor, bits: float, side: HeadSide, rope: RopeFrequencies, backend: Backend) -> Tensor:
    """``x`` [T, KH, D] in a side's stored basis, packed into pages of its own and read back, float32."""
    _, heads, size = x.shape
    layout = PageLayout(head_size=size, kv_heads=heads, key_bits=bits, value_bits=bits, group_size=size // side.unit.shape[1])
    return through_pages(x, x, layout, _as_stored(side, rope, size), backend.heads)[1]


def _as_stored(side: HeadSide, rope: RopeFrequencies, size: int) -> HeadCodec:
    """A codec without means and bases: what is packed is in the stored basis already."""
    heads, device = side.unit.shape[0], side.unit.device
    eye = torch.eye(size, dtype=torch.float32, device=device).expand(heads, size, size).contiguous()
    zero = torch.zeros(heads, size, dtype=torch.float32, device=device)
    return HeadCodec(
        keys=side,
        values=side,
        key_mean=zero,
        key_basis=eye,
        query_basis=eye,
        value_mean=zero,
        value_basis=eye,
        output_basis=eye,
        rope=rope,
        has_key_mean=False,
        has_basis=False,
    )
