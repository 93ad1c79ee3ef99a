"""What the kernels need beside their arguments: scratch memory that never moves, and tables computed once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.kernels.interface import HeadSide, LabelCodec, RopeFrequencies
from skvq.kernels.triton_gpu.forms import Columns
from skvq.kernels.triton_gpu.metric import MetricTables


@dataclass(frozen=True, slots=True)
class Partials:
    """Partial softmaxes of every column, of ``splits`` programs: sums [B, KH, columns, splits, D], and their maxima (log2) and
    weights [..., 2]. float32."""

    sums: Tensor
    statistics: Tensor
    splits: int


class Scratch:
    """Named buffers that grow when a step needs more and are never freed: a captured CUDA graph keeps their addresses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: list[Tensor] = []
        self._by_name: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """A buffer of at least ``count`` numbers; zeros when new, then whatever the last step left."""
        buffer = self._by_name.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = torch.zeros(max(count, 1), dtype=dtype, device=self.device)
            self._by_name[name, dtype] = buffer
            self._held.append(buffer)
        return buffer

    def partials(self, name: str, q: Tensor, columns: Columns, splits: int) -> Partials:
        """Room for what ``splits`` programs of every kv head and chunk of columns write."""
        rows = q.shape[0] * columns.heads * columns.total * splits
        sums = self.take(f"{name} sums", rows * q.shape[3], torch.float32)
        return Partials(sums, self.take(f"{name} statistics", rows * 2, torch.float32), splits)


class RopeTables:
    """Sines and cosines for kernels, cos then sin in each row of D.

    ``turn`` float32 [6 + tiles, D]: of 0, 32, .. 160 tokens, then of the base of every tile; ``places`` float32 [tile, D]: of
    every place in a tile; ``bases``, ``table``: those of the tiles and of the places in float16.
    """

    def __init__(self, rope: RopeFrequencies, tile: int, tiles: int) -> None:
        self.rope = rope  # held, so that its identity stays its own
        self.scale = float(rope.scale)
        count = torch.arange(max(6, tile, tiles), dtype=torch.float64, device=rope.inv_freq.device)
        base = torch.cat([count[:6] * 32, count[:tiles] * tile])[:, None] * rope.inv_freq
        self.turn = torch.cat([base.cos(), base.sin()], 1).float().contiguous()
        self.bases = self.turn[6:].half()
        place = count[:tile, None] * rope.inv_freq
        self.places = torch.cat([place.cos(), place.sin()], 1).float().contiguous()
        self.table = self.places.half()


class Tables:
    """Tables by the identity of what they were made from; the maker is held, so an identity is never reused.

    None is ever freed: a captured CUDA graph keeps their addresses. Those of metrics, which no graph reads, live as long as the
    metric: calibration makes many.
    """

    def __init__(self) -> None:
        self._metrics: dict[int, tuple[weakref.ref[Tensor], MetricTables]] = {}
        self._ropes: dict[tuple[int, int, int], RopeTables] = {}
        self._labels: dict[int, tuple[object, LabelTables]] = {}

    def rope(self, rope: RopeFrequencies, tile: int, tiles: int) -> RopeTables:
        """Tables that cover ``tiles`` tiles."""
        key = (id(rope.inv_freq), tile, tiles)
        known = self._ropes.get(key)
        if known is None:
            known = RopeTables(rope, tile, tiles)
            self._ropes[key] = known
        return known

    def metric(self, side: HeadSide) -> MetricTables:
        """What the lattice quantizer needs of a side."""
        key, metrics = id(side.metric), self._metrics
        known = metrics.get(key)
        if known is None:
            known = (weakref.ref(side.metric, lambda _: metrics.pop(key, None)), MetricTables(side))
            metrics[key] = known
        return known[1]

    def labels(self, codec: LabelCodec, groups: int) -> LabelTables:
        """Channels by group of a codec."""
        known = self._labels.get(id(codec))
        if known is None:
            known = (codec, LabelTables(codec.key_labels, codec.value_labels, groups))
            self._labels[id(codec)] = known
        return known[1]


class LabelTables:
    """Labels of one codec, and the members of every group, for keys and values."""

    def __init__(self, key_labels: Tensor, value_labels: Tensor, groups: int) -> None:
        self.key_labels, self.value_labels = key_labels.to(torch.int32), value_labels.to(torch.int32)
        self.key_members, self.key_sizes = _members(key_labels, groups)
        self.value_members, self.value_sizes = _members(value_labels, groups)


def _members(labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Channels of each group, int32 [groups, size of the largest], and sizes, int32 [groups]."""
    sizes = torch.bincount(labels, minlength=groups)
    assert int(sizes.min()) > 0, f"a group has no channel: {sizes.tolist()}"
    order = torch.argsort(labels, stable=True)
    members = torch.zeros(groups, int(sizes.max()), dtype=torch.int32, device=labels.device)
    start = 0
    for group, size in enumerate(sizes.tolist()):
        members[group, :size] = order[start : start + size].to(torch.int32)
        start += size
    return members, sizes.to(torch.int32)
