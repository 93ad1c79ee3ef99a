"""What pages really hold: numbers packed and read back by the backend itself, so that calibration fits what will happen."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.interface import Backend, HeadCodec, HeadSide, PackedPages, RopeFrequencies
from skvq.kernels.layout import PageLayout, pages_for


def read_back(x: Tensor, bits: float, side: HeadSide, rope: RopeFrequencies, backend: Backend) -> Tensor:
    """``x`` [T, KH, D] in a side's stored basis, packed into pages of its own and read back, float32."""
    tokens, heads, size = x.shape
    layout = PageLayout(head_size=size, kv_heads=heads, key_bits=bits, value_bits=bits, group_size=size // side.unit.shape[1])
    count = -(-tokens // layout.tile) * layout.tile
    rows = torch.zeros(count, heads, size, dtype=torch.float16, device=x.device)
    rows[:tokens] = x
    pages = pages_for(count)
    store = PackedPages(
        layout=layout,
        key_codes=torch.empty(pages, heads, layout.key_bytes, dtype=torch.uint8, device=x.device),
        value_codes=torch.empty(pages, heads, layout.value_bytes, dtype=torch.uint8, device=x.device),
        meta=torch.empty(pages, heads, layout.meta_words, dtype=torch.int32, device=x.device),
    )
    codec = _as_stored(side, rope, size)
    row = torch.arange(pages, dtype=torch.int32, device=x.device)
    backend.pack_heads(store, codec, row, 0, rows, rows, torch.zeros(count, dtype=torch.bool, device=x.device))
    return backend.unpack_heads(store, codec, row, 0, count)[1][:tokens]


def _as_stored(side: HeadSide, rope: RopeFrequencies, size: int) -> HeadCodec:
    """A codec without means and bases: what is packed is in the stored basis already."""
    heads, device = side.unit.shape[0], side.unit.device
    eye = torch.eye(size, device=device).expand(heads, size, size).contiguous()
    zero = torch.zeros(heads, size, device=device)
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
