"""What kernels need besides their arguments: scratch memory that never moves, and tables that are made once."""

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
    """Partial softmaxes of every column, left by ``splits`` programs, float32, in scratch memory.

    ``sums`` [B, KH, columns, splits, D]; ``statistics`` [B, KH, columns, splits, 2]: maximum of the scores (log2), sum of
    weights.
    """

    sums: Tensor
    statistics: Tensor
    splits: int


class Scratch:
    """Buffers by name, which at least double when a step needs more. None is freed or moved: a captured CUDA graph keeps their
    addresses.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: list[Tensor] = []
        self._by_name: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """A buffer of at least ``count`` numbers: zeros when it is new, else what the step before left there."""
        buffer = self._by_name.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            room = max(count, 2 * buffer.numel() if buffer is not None else 1)
            buffer = torch.zeros(room, dtype=dtype, device=self.device)
            self._by_name[name, dtype] = buffer
            self._held.append(buffer)
        return buffer

    def partials(self, name: str, q: Tensor, columns: Columns, splits: int) -> Partials:
        """Room for the partial softmaxes of ``splits`` programs of every row, kv head and chunk of columns."""
        rows = q.shape[0] * columns.heads * columns.total * splits
        sums = self.take(f"{name} sums", rows * q.shape[3], torch.float32)
        return Partials(sums, self.take(f"{name} statistics", rows * 2, torch.float32), splits)


class RopeTables:
    """Cosines, then sines, of RoPE in rows of D, for tiles of ``tile`` tokens (or parts of one, or places: any stretch).

    ``turn`` float32 [6 + tiles, D]: rows 0 .. 5 are the angles of 0, 32, .. 160 tokens, the others of the first token of each
    tile. ``places`` float32 [tile, D]: of each place in a tile. ``bases`` and ``table``: float16 of ``turn[6:]`` and
    ``places``.
    """

    def __init__(self, rope: RopeFrequencies, tile: int, tiles: int) -> None:
        self.rope = rope  # held, so that its identity stays its own
        self.scale, self.tiles = float(rope.scale), tiles
        count = torch.arange(max(6, tile, tiles), dtype=torch.float64, device=rope.inv_freq.device)
        base = torch.cat([count[:6] * 32, count[:tiles] * tile])[:, None] * rope.inv_freq
        self.turn = torch.cat([base.cos(), base.sin()], 1).float().contiguous()
        self.bases = self.turn[6:].half()
        place = count[:tile, None] * rope.inv_freq
        self.places = torch.cat([place.cos(), place.sin()], 1).float().contiguous()
        self.table = self.places.half()


class Tables:
    """Tables by the identity of the object that they were made from. It is held, so that no other object can get its identity.

    No table is ever freed: a captured CUDA graph keeps their addresses. Those of metrics are the exception, for no graph reads
    them and calibration makes many: they live as long as their metric.
    """

    def __init__(self) -> None:
        self._metrics: dict[int, tuple[weakref.ref[Tensor], MetricTables]] = {}
        self._ropes: dict[tuple[int, float, int], list[RopeTables]] = {}  # each longer than the one before
        self._labels: dict[int, tuple[object, LabelTables]] = {}
        self._groups: dict[tuple[int, int], Tensor] = {}
        self._neighbours: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def rope(self, rope: RopeFrequencies, tile: int, tiles: int) -> RopeTables:
        """Tables of at least ``tiles`` tiles of ``tile`` tokens.

        Shorter ones than are known are parts of those: made on a side stream, they could be read before they are done.
        """
        known = self._ropes.setdefault((id(rope.inv_freq), rope.scale, tile), [])
        if not known or known[-1].tiles < tiles:
            known.append(RopeTables(rope, tile, tiles))
        return known[-1]

    def metric(self, side: HeadSide) -> MetricTables:
        """What the lattice quantizer needs of a side that has a metric."""
        key, metrics = id(side.metric), self._metrics
        known = metrics.get(key)
        if known is None:
            known = (weakref.ref(side.metric, lambda _: metrics.pop(key, None)), MetricTables(side))
            metrics[key] = known
        return known[1]

    def groups(self, channels: int, size: int, device: torch.device) -> Tensor:
        """int32 [channels]: the group of each channel where groups are ``size`` neighbours."""
        if (channels, size) not in self._groups:
            self._groups[channels, size] = torch.arange(channels, dtype=torch.int32, device=device) // size
        return self._groups[channels, size]

    def neighbours(self, channels: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same as ``quantize_labels`` takes it: members int32 [groups, size], and how many they are, int32 [groups]."""
        if (channels, size) not in self._neighbours:
            members = torch.arange(channels, dtype=torch.int32, device=device).view(-1, size)
            self._neighbours[channels, size] = members, torch.full_like(members[:, 0], size)
        return self._neighbours[channels, size]

    def labels(self, codec: LabelCodec, groups: int) -> LabelTables:
        """Labels and members of the ``groups`` groups of a codec. The first call for a codec waits for the device."""
        known = self._labels.get(id(codec))
        if known is None:
            known = (codec, LabelTables(codec.key_labels, codec.value_labels, groups))
            self._labels[id(codec)] = known
        return known[1]


class LabelTables:
    """Labels int32 [KH * D] of keys and values, and the members of every group as ``quantize_labels`` takes them."""

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
