"""Groups inside each head (methods ``rotate`` and ``plain``): what ``interface.HeadCodec`` says, in torch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from skvq.kernels.interface import FullSlots, HeadCodec, HeadSide, PackedPages, Step
from skvq.kernels.layout import LEVELS
from skvq.kernels.reference.attention import attend_packed
from skvq.kernels.reference.lattice import quantize_lattice
from skvq.kernels.reference.page import pack_meta, read_tiles, unpack_meta, write_tiles
from skvq.kernels.reference.quantizer import dequantize, quantize
from skvq.kernels.reference.rope import rotary


def encode_heads(codec: HeadCodec, first: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values [T, KH, D], of tokens ``first ..``, to the stored basis; float32."""
    k, v = keys.float(), values.float()
    if not codec.has_basis:
        return k, v
    if codec.has_key_mean:
        k = k - _turned_mean(codec, first, len(k))
    k = torch.einsum("hij,thj->thi", codec.key_basis, k)
    return k, torch.einsum("hij,thj->thi", codec.value_basis, v - codec.value_mean)


def _turned_mean(codec: HeadCodec, first: int, count: int) -> Tensor:
    positions = torch.arange(first, first + count, device=codec.key_mean.device)
    return rotary(codec.key_mean.expand(count, -1, -1), positions, codec.rope)


def quantize_heads(y: Tensor, bits: float, side: HeadSide) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, KH, D] and scale and mid bytes [T, KH, G] of ``y`` [T, KH, D]."""
    tokens, heads, size = y.shape
    groups = side.unit.shape[1]
    if side.has_metric:
        return quantize_lattice(y, LEVELS[bits], side)
    codes, scale, mid = quantize(y.view(tokens, heads, groups, size // groups), LEVELS[bits], side.unit, side.clip)
    return codes.view(tokens, heads, size), scale, mid


def pack_heads(
    pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
) -> None:
    """See ``interface.PackedKernels``."""
    layout = pages.layout
    y_keys, y_values = encode_heads(codec, first, keys, values)
    key_codes, key_scale, key_mid = quantize_heads(y_keys, layout.key_bits, codec.keys)
    value_codes, value_scale, value_mid = quantize_heads(y_values, layout.value_bits, codec.values)
    words = pack_meta(key_scale, key_mid, value_scale, value_mid, retained, layout.tile)
    write_tiles(pages, page_row, first, key_codes, value_codes, words)


def read_heads(pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stored keys and values [T, KH, D] float32 in the stored basis, and the retained flags bool [T]."""
    layout = pages.layout
    key_codes, value_codes, words = read_tiles(pages, page_row, first, count)
    key_scale, key_mid, value_scale, value_mid, retained = unpack_meta(words, layout.tile)
    shape = (count, layout.kv_heads, layout.groups, layout.group_size)
    y_keys, y_values = (
        dequantize(codes.view(shape), scale * side.unit, mid * side.unit, LEVELS[bits]).view(
            count, layout.kv_heads, layout.head_size
        )
        for codes, scale, mid, side, bits in (
            (key_codes, key_scale, key_mid, codec.keys, layout.key_bits),
            (value_codes, value_scale, value_mid, codec.values, layout.value_bits),
        )
    )
    return y_keys, y_values, retained


def decode_heads(codec: HeadCodec, first: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [T, KH, D] in the stored basis, of tokens ``first ..``, to keys after RoPE and values; float32."""
    if codec.has_basis:
        keys = torch.einsum("hij,thi->thj", codec.query_basis, keys)  # query_basis^T x
        if codec.has_key_mean:
            keys = keys + _turned_mean(codec, first, len(keys))
        values = torch.einsum("hij,thj->thi", codec.output_basis, values) + codec.value_mean
    return keys, values


def unpack_heads(
    pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """See ``interface.PackedKernels``."""
    keys, values, _ = read_heads(pages, codec, page_row, first, count)
    keys, values = decode_heads(codec, first, keys, values)
    return keys.to(dtype), values.to(dtype)


def attend_heads(q: Tensor, pages: PackedPages, codec: HeadCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
    """See ``interface.PackedKernels``."""
    return attend_packed(q, full, step, partial(read_heads, pages, codec), partial(decode_heads, codec))
