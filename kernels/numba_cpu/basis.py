"""Keys and values to the stored basis and back, in torch.

The same as ``encode_heads``, ``decode_heads`` and ``decode_labels`` of the reference, but with far fewer sines: RoPE of a token
is that of its place in the tile times that of the tile's start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.interface import HeadCodec, LabelCodec, RopeFrequencies


def turns(first: int, count: int, tile: int, rope: RopeFrequencies) -> Tensor:
    """``exp(i t inv_freq)`` for the positions t = first .. first+count-1: complex64 [count, D/2]."""
    inside = torch.arange(tile, dtype=torch.float64)[:, None] * rope.inv_freq
    base = torch.arange(first, first + count, tile, dtype=torch.float64)[:, None] * rope.inv_freq
    one = torch.ones((), dtype=torch.float64)
    table = torch.polar(one, base)[:, None] * torch.polar(one, inside)  # [tiles, tile, D/2]
    return table.flatten(0, 1)[:count].to(torch.complex64)


def turn(x: Tensor, table: Tensor, scale: float) -> Tensor:
    """RoPE of ``x`` [T, KH, D], or of a mean [KH, D], by ``table`` [T, D/2], times ``scale``: float32 [T, KH, D]."""
    a, b = x.float().chunk(2, -1)
    turned = torch.complex(a, b) * table[:, None] * scale
    return torch.cat([turned.real, turned.imag], -1)


def encode_heads(codec: HeadCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values [T, KH, D] to the stored basis, float32, contiguous (``interface.HeadCodec``)."""
    k, v = keys.float(), values.float()
    if not codec.has_basis:
        return k.contiguous(), v.contiguous()
    y_keys = apply(codec.key_basis, k)
    if codec.has_key_mean:
        table = torch.view_as_real(turns(first, len(k), tile, codec.rope)).transpose(1, 2).flatten(1)  # [T, D] cosines, sines
        y_keys -= apply(turned_mean(codec), table[:, None].expand(k.shape))
    return y_keys, apply(codec.value_basis, v - codec.value_mean)


def turned_mean(codec: HeadCodec) -> Tensor:
    """[KH, D, D]: what RoPE makes of a head's mean key, in the stored basis, from the cosines and sines of a position."""
    left, right = codec.key_basis.chunk(2, -1)  # [KH, D, D/2]
    a, b = codec.key_mean[:, None].chunk(2, -1)  # [KH, 1, D/2]
    return torch.cat([left * a + right * b, right * a - left * b], -1) * codec.rope.scale


def apply(matrices: Tensor, rows: Tensor) -> Tensor:
    """``matrices[h] @ rows[t, h]``: [KH, D, D] and [T, KH, D] -> [T, KH, D], contiguous."""
    return torch.bmm(rows.transpose(0, 1), matrices.transpose(1, 2)).transpose(0, 1).contiguous()


def decode_heads(codec: HeadCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stored keys and values [T, KH, D] to keys after RoPE and values. May write to ``keys``."""
    if not codec.has_basis:
        return keys, values
    keys = apply(codec.query_basis.transpose(1, 2), keys)
    if codec.has_key_mean:
        keys += turn(codec.key_mean, turns(first, len(keys), tile, codec.rope), codec.rope.scale)
    return keys, apply(codec.output_basis, values) + codec.value_mean


def encode_labels(codec: LabelCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values [T, KH, D] to what is stored: keys before RoPE and values, float32, contiguous."""
    back = turns(first, len(keys), tile, codec.rope).conj()
    return turn(keys, back, 1 / codec.rope.scale).contiguous(), values.float().contiguous()


def decode_labels(codec: LabelCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stored keys and values [T, KH, D] to keys after RoPE and values."""
    return turn(keys, turns(first, len(keys), tile, codec.rope), codec.rope.scale), values
