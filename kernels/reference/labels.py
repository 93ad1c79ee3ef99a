"""Groups over all channels of a layer (method ``reorder``): what ``interface.LabelCodec`` says, in torch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from skvq.kernels.interface import FullSlots, LabelCodec, PackedPages, Side, Step
from skvq.kernels.layout import LEVELS
from skvq.kernels.reference.attention import attend_packed
from skvq.kernels.reference.page import pack_meta, read_tiles, unpack_meta, write_tiles
from skvq.kernels.reference.quantizer import dequantize, quantize
from skvq.kernels.reference.rope import rotary


def quantize_labels(y: Tensor, bits: float, side: Side, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, C] and scale and mid bytes [T, groups] of ``y`` [T, C]; ``labels`` [C] are the channels' groups."""
    tokens = len(y)
    groups = len(side.unit)
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    scale, mid = (torch.empty(tokens, groups, dtype=torch.uint8, device=y.device) for _ in range(2))
    for group in range(groups):
        channels = (labels == group).nonzero()[:, 0]
        assert len(channels), f"group {group} has no channel"
        codes[:, channels], scale[:, group], mid[:, group] = quantize(
            y[:, channels], LEVELS[bits], side.unit[group], side.clip[group]
        )
    return codes, scale, mid


def pack_labels(
    pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
) -> None:
    """See ``interface.PackedKernels``."""
    layout, count = pages.layout, len(keys)
    positions = torch.arange(first, first + count, device=keys.device)
    flat_keys = rotary(keys, positions, codec.rope, inverse=True).reshape(count, -1)
    key_codes, key_scale, key_mid = quantize_labels(flat_keys, layout.key_bits, codec.keys, codec.key_labels)
    value_codes, value_scale, value_mid = quantize_labels(
        values.float().reshape(count, -1), layout.value_bits, codec.values, codec.value_labels
    )
    by_head = (count, layout.kv_heads, layout.groups)
    key_scale, key_mid, value_scale, value_mid = (t.view(by_head) for t in (key_scale, key_mid, value_scale, value_mid))
    words = pack_meta(key_scale, key_mid, value_scale, value_mid, retained, layout.tile)
    shape = (count, layout.kv_heads, layout.head_size)
    write_tiles(pages, page_row, first, key_codes.view(shape), value_codes.view(shape), words)


def read_labels(
    pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys before RoPE and values [T, KH, D] float32, and the retained flags bool [T]."""
    layout = pages.layout
    key_codes, value_codes, words = read_tiles(pages, page_row, first, count)
    key_scale, key_mid, value_scale, value_mid, retained = unpack_meta(words, layout.tile)
    y_keys, y_values = (
        dequantize(
            codes.reshape(count, len(labels), 1),
            (scale.reshape(count, len(side.unit)) * side.unit)[:, labels],
            (mid.reshape(count, len(side.unit)) * side.unit)[:, labels],
            LEVELS[bits],
        ).view(count, layout.kv_heads, layout.head_size)
        for codes, scale, mid, side, labels, bits in (
            (key_codes, key_scale, key_mid, codec.keys, codec.key_labels, layout.key_bits),
            (value_codes, value_scale, value_mid, codec.values, codec.value_labels, layout.value_bits),
        )
    )
    return y_keys, y_values, retained


def decode_labels(codec: LabelCodec, first: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys before RoPE [T, KH, D], of tokens ``first ..``, to keys after RoPE; float32. Values are as stored."""
    positions = torch.arange(first, first + len(keys), device=keys.device)
    return rotary(keys, positions, codec.rope), values


def unpack_labels(
    pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """See ``interface.PackedKernels``."""
    keys, values, _ = read_labels(pages, codec, page_row, first, count)
    keys, values = decode_labels(codec, first, keys, values)
    return keys.to(dtype), values.to(dtype)


def attend_labels(q: Tensor, pages: PackedPages, codec: LabelCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
    """See ``interface.PackedKernels``."""
    return attend_packed(q, full, step, partial(read_labels, pages, codec), partial(decode_labels, codec))
