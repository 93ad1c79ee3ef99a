"""Packing wrappers: into the stored basis by torch, a bounded stretch of tokens at a time, then the kernels; and back."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.kernels.interface import HeadCodec, HeadSide, LabelCodec, PackedPages, RopeFrequencies, Side
from skvq.kernels.layout import PageLayout
from skvq.kernels.numba_cpu.attend import layout_fields, page_fields
from skvq.kernels.numba_cpu.job import Job, offsets
from skvq.kernels.numba_cpu.lattice import LANES as LATTICE_LANES
from skvq.kernels.numba_cpu.lattice import lattice_bytes
from skvq.kernels.numba_cpu.tiles import LANE_BLOCK

STRETCH = 1280
"""Tokens that are held in float32 at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """Which channels a group holds: labels int64 [KH * D], and channels sorted by label with where each group starts."""

    labels: Tensor
    order: Tensor
    starts: Tensor


def channels_of(labels: Tensor, groups: int) -> Channels:
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels, minlength=groups)
    assert len(counts) == groups and bool((counts > 0).all()), f"a group has no channel: {counts.tolist()}"
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Channels(labels=labels.contiguous(), order=order, starts=starts)


def contiguous_channels(layout: PageLayout) -> Channels:
    """Groups that lie side by side inside each head."""
    labels = torch.arange(layout.kv_heads * layout.head_size) // layout.group_size
    return channels_of(labels, layout.kv_heads * layout.groups)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """All that packing asks of a codec: sides, groups, and the way to the stored basis and back.

    ``encode`` and ``decode`` take the first position, keys and values [T, KH, D], and return float32.
    """

    sides: tuple[Side, Side]
    channels: tuple[Channels, Channels]
    crossing: bool  # groups hold channels of several heads
    encode: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def heads_packing(codec: HeadCodec, channels: Channels, tile: int) -> Packing:
    return Packing(
        sides=(codec.keys, codec.values),
        channels=(channels, channels),
        crossing=False,
        encode=lambda first, keys, values: encode_heads(codec, first, tile, keys, values),
        decode=lambda first, keys, values: decode_heads(codec, first, tile, keys, values),
    )


def labels_packing(codec: LabelCodec, channels: tuple[Channels, Channels], tile: int) -> Packing:
    return Packing(
        sides=(codec.keys, codec.values),
        channels=channels,
        crossing=True,
        encode=lambda first, keys, values: encode_labels(codec, first, tile, keys, values),
        decode=lambda first, keys, values: decode_labels(codec, first, tile, keys, values),
    )


def side_fields(side: Side, channels: Channels, layout: PageLayout) -> tuple[int, ...]:
    """Unit, clip, channels by group, and the metric and its factor, 0 where every code is rounded on its own."""
    tensors, matrices, heads, size = [side.unit, side.clip], list[Tensor](), layout.kv_heads, layout.head_size
    if isinstance(side, HeadSide) and side.has_metric:
        matrices = [side.metric, side.factor]
        assert side.metric.shape == side.factor.shape == (heads, size, size), (side.metric.shape, side.factor.shape)
    for t in tensors + matrices:
        assert t.dtype == torch.float32 and t.is_contiguous(), (t.dtype, t.stride())
    assert side.unit.numel() == side.clip.numel() == heads * layout.groups, (side.unit.shape, side.clip.shape)
    tensors += [channels.starts, channels.order, channels.labels]
    return (*(t.data_ptr() for t in tensors), *([t.data_ptr() for t in matrices] or (0, 0)))


def pack_job(
    pages: PackedPages,
    packing: Packing,
    page_row: Tensor,
    first: int,
    rows: tuple[Tensor, Tensor],
    retained: Tensor,
    threads: int,
) -> tuple[Job, tuple[Tensor, ...]]:
    """The job of packing ``rows`` or unpacking into them, and tensors that must live as long as it."""
    layout = pages.layout
    keys, values = rows
    assert keys.dtype == values.dtype == torch.float32 and keys.is_contiguous() and values.is_contiguous(), keys.dtype
    flags, table = retained.contiguous(), page_row.to(torch.int32).contiguous()
    together = layout.kv_heads if packing.crossing else 1
    lanes = -(-layout.head_size // LANE_BLOCK) * LANE_BLOCK
    sizes = {
        "w_codes": together * lanes * layout.tile,
        "w_group": max(9 * layout.kv_heads * layout.head_size, 4 * layout.tile, 4 * LATTICE_LANES * layout.groups),
        "w_meta": 16 * layout.kv_heads * layout.groups * layout.tile,
        "w_lattice": lattice_bytes(layout.head_size, layout.groups),
        "w_rows": 4 * layout.head_size * layout.tile,
    }
    where, work_bytes = offsets(sizes, ("w_codes", "w_group", "w_meta", "w_lattice", "w_rows"))
    work, counters = torch.empty(threads * work_bytes, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    job = array("q", (
        keys.data_ptr(), values.data_ptr(), flags.data_ptr(), table.data_ptr(), first, len(keys), layout.kv_heads,
        layout.head_size, *page_fields(pages), *layout_fields(layout)[:5], layout.tile, layout.tiles, together,
        *side_fields(packing.sides[0], packing.channels[0], layout),
        *side_fields(packing.sides[1], packing.channels[1], layout),
        counters.data_ptr(), work.data_ptr(), work_bytes, *where,
    ))  # fmt: skip
    return job, (flags, table, work, counters)
