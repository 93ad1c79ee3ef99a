"""Packing wrappers: into the stored basis with torch's matrix products, a bounded stretch of tokens at a time, then the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skvq.kernels.interface import HeadCodec, HeadSide, LabelCodec, RopeFrequencies, Side
from skvq.kernels.layout import PageLayout
from skvq.kernels.numba_cpu.attend import Fields
from skvq.kernels.numba_cpu.job import PACK, PACK_FIELDS
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


def metric_fields(name: str, side: Side) -> Fields:
    """Addresses of a side's metric and its factor; none where every code is rounded on its own."""
    if not (isinstance(side, HeadSide) and side.has_metric):
        return {}
    for matrix in (side.metric, side.factor):
        assert matrix.dtype == torch.float32 and matrix.is_contiguous(), (matrix.dtype, matrix.stride())
    return {f"{name}_metric": side.metric.data_ptr(), f"{name}_factor": side.factor.data_ptr()}


def pack_job(
    fields: Fields, layout: PageLayout, sides: tuple[Side, Side], channels: tuple[Channels, Channels], crossing: bool, threads: int
) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """The job and what must live as long as it. ``fields`` names keys, values, retained, page_row, first, count and the pages."""
    lanes = -(-layout.head_size // LANE_BLOCK) * LANE_BLOCK
    together = layout.kv_heads if crossing else 1
    flat = layout.kv_heads * layout.head_size
    sizes = {
        "w_codes": together * lanes * layout.tile, "w_group": max(5 * flat, 4 * layout.tile),
        "w_meta": 16 * layout.kv_heads * layout.groups * layout.tile,
        "w_lattice": int(lattice_bytes(layout.head_size, layout.groups)),
    }  # fmt: skip
    f = {name: int(value) for name, value in fields.items()}
    f |= {"kv_heads": layout.kv_heads, "size": layout.head_size, "heads_together": together}
    for name, side, group in zip(("key", "value"), sides, channels, strict=True):
        assert side.unit.dtype == side.clip.dtype == torch.float32 and side.unit.is_contiguous() and side.clip.is_contiguous()
        assert side.unit.numel() == side.clip.numel() == layout.kv_heads * layout.groups, side.unit.shape
        f |= {
            f"{name}_unit": side.unit.data_ptr(), f"{name}_clip": side.clip.data_ptr(), f"{name}_starts": group.starts.data_ptr(),
            f"{name}_channels": group.order.data_ptr(), f"{name}_labels": group.labels.data_ptr(), **metric_fields(name, side),
        }  # fmt: skip
    work_bytes = 0
    for name, nbytes in sizes.items():
        f[name] = work_bytes
        work_bytes += -(-nbytes // 64) * 64
    work = np.empty(threads * work_bytes + 64, np.uint8)
    counters = np.zeros(2, np.int64)
    f |= {"counters": counters.ctypes.data, "work": -(-work.ctypes.data // 64) * 64, "work_bytes": work_bytes}
    return np.array([tuple(f.get(name, 0) for name in PACK_FIELDS)], PACK), [work, counters]
