"""Host side of packing and unpacking: what they need of a codec, and their job."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.kernels.interface import HeadCodec, HeadSide, LabelCodec, PackedPages, Side
from skvq.kernels.layout import PageLayout
from skvq.kernels.numba_cpu.attend import layout_fields, page_fields
from skvq.kernels.numba_cpu.basis import decode_heads, decode_labels, encode_heads, encode_labels
from skvq.kernels.numba_cpu.channels import Channels
from skvq.kernels.numba_cpu.job import Job, offsets
from skvq.kernels.numba_cpu.lanes import LANES
from skvq.kernels.numba_cpu.lattice import lattice_bytes
from skvq.kernels.numba_cpu.tiles import LANE_BLOCK

STRETCH = 1280
"""Tokens packed or unpacked per launch: bounds the float32 copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What packing needs to know of a codec, of either kind.

    ``encode(first, keys, values)`` takes [T, KH, D] to the stored basis, float32; ``decode`` takes them back.
    """

    sides: tuple[Side, Side]  # keys, values
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
    """Addresses of a side in the order of PACK_FIELDS; metric and factor are 0 where every code is rounded on its own."""
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
    """The job of packing ``rows`` (keys, values) or of unpacking into them, and tensors that must outlive it."""
    layout = pages.layout
    keys, values = rows
    assert keys.dtype == values.dtype == torch.float32 and keys.is_contiguous() and values.is_contiguous(), keys.dtype
    flags, table = retained.contiguous(), page_row.to(torch.int32).contiguous()
    together = layout.kv_heads if packing.crossing else 1
    lanes = -(-layout.head_size // LANE_BLOCK) * LANE_BLOCK
    sizes = {
        "w_codes": together * lanes * layout.tile,
        "w_group": max(9 * layout.kv_heads * layout.head_size, 4 * layout.tile, 4 * LANES * layout.groups),
        "w_meta": 16 * layout.kv_heads * layout.groups * layout.tile,
        "w_lattice": lattice_bytes(layout.head_size, layout.groups),
        "w_pulls": 4 * layout.groups * layout.head_size,
        "w_rows": 4 * layout.head_size * layout.tile,
    }
    where, work_bytes = offsets(sizes, ("w_codes", "w_group", "w_meta", "w_lattice", "w_pulls", "w_rows"))
    work, counters = torch.empty(threads * work_bytes, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    job = array("q", (
        keys.data_ptr(), values.data_ptr(), flags.data_ptr(), table.data_ptr(), first, len(keys), layout.kv_heads,
        layout.head_size, *page_fields(pages), *layout_fields(layout)[:5], layout.tile, layout.tiles, together,
        *side_fields(packing.sides[0], packing.channels[0], layout),
        *side_fields(packing.sides[1], packing.channels[1], layout),
        counters.data_ptr(), work.data_ptr(), work_bytes, *where,
    ))  # fmt: skip
    return job, (flags, table, work, counters)
