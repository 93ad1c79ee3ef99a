"""Keys and values to the stored basis and back, in torch: as ``reference.encode_heads`` and its kin, with fewer sines."""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.interface import HeadCodec, LabelCodec, RopeFrequencies


def turns(first: int, count: int, tile: int, rope: RopeFrequencies) -> Tensor:
    """``exp(i t w)`` of tokens first .. first+count-1: complex64 [count, D/2], from a table in a tile and one angle a tile."""
    inside = torch.arange(tile, dtype=torch.float64)[:, None] * rope.inv_freq
    base = torch.arange(first, first + count, tile, dtype=torch.float64)[:, None] * rope.inv_freq
    one = torch.ones((), dtype=torch.float64)
    table = torch.polar(one, base)[:, None] * torch.polar(one, inside)  # [tiles, tile, D/2]
    return table.flatten(0, 1)[:count].to(torch.complex64)


def turn(x: Tensor, table: Tensor, scale: float) -> Tensor:
    """``x`` [T, KH, D] turned by ``table`` [T, D/2] times ``scale``, float32; a [KH, D] mean is spread over T."""
    a, b = x.float().chunk(2, -1)
    turned = torch.complex(a, b) * table[:, None] * scale
    return torch.cat([turned.real, turned.imag], -1)


def encode_heads(codec: HeadCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Stored basis, float32 [T, KH, D] (``interface.HeadCodec``)."""
    k, v = keys.float(), values.float()
    if not codec.has_basis:
        return k.contiguous(), v.contiguous()
    if codec.has_key_mean:
        k = k - turn(codec.key_mean, turns(first, len(k), tile, codec.rope), codec.rope.scale)
    return apply(codec.key_basis, k), apply(codec.value_basis, v - codec.value_mean)


def apply(matrices: Tensor, rows: Tensor) -> Tensor:
    """``matrices[h] @ rows[t, h]``: [KH, D, D] and [T, KH, D] -> [T, KH, D], contiguous."""
    return torch.bmm(rows.transpose(0, 1), matrices.transpose(1, 2)).transpose(0, 1).contiguous()


def decode_heads(codec: HeadCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``encode_heads``."""
    if not codec.has_basis:
        return keys, values
    keys = apply(codec.query_basis.transpose(1, 2), keys)
    if codec.has_key_mean:
        keys += turn(codec.key_mean, turns(first, len(keys), tile, codec.rope), codec.rope.scale)
    return keys, apply(codec.output_basis, values) + codec.value_mean


def encode_labels(codec: LabelCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and values, float32 [T, KH, D]."""
    back = turns(first, len(keys), tile, codec.rope).conj()
    return turn(keys, back, 1 / codec.rope.scale).contiguous(), values.float().contiguous()


def decode_labels(codec: LabelCodec, first: int, tile: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values."""
    return turn(keys, turns(first, len(keys), tile, codec.rope), codec.rope.scale), values
