"""Launches of the kernels that write and read packed tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import HeadCodec, LabelCodec, PackedPages
from skvq.kernels.triton_gpu.pack import pack_kernel
from skvq.kernels.triton_gpu.unpack import unpack_kernel


def bits_code(bits: float) -> int:
    """Bits as kernels name them: 15 for 1.5."""
    return 15 if bits == 1.5 else int(bits)


def page_strides(pages: PackedPages) -> tuple[int, ...]:
    """Page and head strides of key codes, value codes and metadata."""
    parts = (pages.key_codes, pages.value_codes, pages.meta)
    for part, dtype in zip(parts, (torch.uint8, torch.uint8, torch.int32), strict=True):
        assert part.dtype == dtype and part.stride(2) == 1, (part.dtype, part.stride())
    return tuple(stride for part in parts for stride in part.stride()[:2])


def launch_pack(
    pages: PackedPages, page_row: Tensor, first: int, keys: Tensor, values: Tensor,
    sides: tuple[Tensor, Tensor, Tensor, Tensor], meta: tuple[Tensor, ...], retained: Tensor, *, quantized: bool,
) -> None:  # fmt: skip
    layout, count = pages.layout, len(retained)
    assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
    assert page_row.dtype == torch.int32 and page_row.is_contiguous(), page_row.dtype
    if not count:
        return
    pack_kernel[(count // layout.tile, layout.kv_heads)](
        keys, values, *sides, *meta, retained.view(torch.uint8), pages.key_codes, pages.value_codes, pages.meta, page_row,
        first // layout.tile, *page_strides(pages),
        D=layout.head_size, KEY_BITS=bits_code(layout.key_bits), VALUE_BITS=bits_code(layout.value_bits), G=layout.groups,
        TILE=layout.tile, QUANTIZED=quantized, num_warps=4,
    )  # fmt: skip


def launch_unpack(
    pages: PackedPages, page_row: Tensor, first: int, count: int, codec: HeadCodec | LabelCodec,
    key_label: Tensor, value_label: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values [T, KH, D] float32 in the stored basis."""
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


def decode_heads(codec: HeadCodec, first: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Undo bases and means of stored keys and values [T, KH, D], as ``reference.unpack_heads`` does."""
    if codec.has_basis:
        keys = torch.einsum("hij,thi->thj", codec.query_basis, keys)
        if codec.has_key_mean:
            count = len(keys)
            positions = torch.arange(first, first + count, device=keys.device)
            keys = keys + reference.rotary(codec.key_mean.expand(count, -1, -1), positions, codec.rope)
        values = torch.einsum("hij,thj->thi", codec.output_basis, values) + codec.value_mean
    return keys, values
