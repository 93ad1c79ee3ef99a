"""The contract of ``interface.Backend`` on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from skvq.kernels.interface import FullSlots, HeadCodec, LabelCodec, PackedPages, PlainPages, RopeFrequencies, Side, Step
from skvq.kernels.layout import PageLayout
from skvq.kernels.numba_cpu import attend, pack
from skvq.kernels.numba_cpu.heads import build_attend_heads
from skvq.kernels.numba_cpu.labels import build_attend_labels
from skvq.kernels.numba_cpu.launch import Build, Kernels, Team
from skvq.kernels.numba_cpu.mean import MeanTables, all_turns, mean_tables
from skvq.kernels.numba_cpu.packing import build_pack, build_unpack
from skvq.kernels.numba_cpu.plain import build_attend_plain

Found = TypeVar("Found")
Encode = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class NumbaCpu:
    """Kernels are compiled when first called, once per machine. One instance may serve several threads."""

    name = "numba"

    def __init__(self) -> None:
        self._kernels = Kernels()
        self._team = Team()
        self._derived: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # --- attention ---

    def attend_heads(
        self, q: Tensor, pages: PackedPages, codec: HeadCodec, full: FullSlots, step: Step
    ) -> tuple[Tensor, Tensor]:
        mean = self._tables(codec.rope, codec.key_mean, pages.layout.tile) if codec.has_basis and codec.has_key_mean else None
        return self._attend(build_attend_heads, q, attend.page_fields(pages) | attend.head_fields(codec, mean), full, step)

    def attend_labels(
        self, q: Tensor, pages: PackedPages, codec: LabelCodec, full: FullSlots, step: Step
    ) -> tuple[Tensor, Tensor]:
        table = self._derive(
            codec.rope.inv_freq,
            ("turns", pages.layout.tile),
            lambda: all_turns(codec.rope, pages.layout.head_size, pages.layout.tile),
        )
        return self._attend(build_attend_labels, q, attend.page_fields(pages) | attend.label_fields(codec, table), full, step)

    def attend_plain(self, q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        return self._attend(build_attend_plain, q, attend.plain_fields(pages), full, step)

    def _attend(self, build: Build, q: Tensor, fields: attend.Fields, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        attend.check_call(q, full, step)
        queries = q.float().contiguous()
        out = torch.empty(q.shape, dtype=torch.float32)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        fields = fields | attend.call_fields(queries, out, lse, full, step)
        job, kept, threads = attend.divide(fields, step.max_packed, torch.get_num_threads())
        self._team.run(self._kernels.address(build), job, threads)
        del kept
        return out.to(q.dtype), lse

    # --- packing ---

    def pack_heads(
        self, pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
    ) -> None:
        tile = pages.layout.tile
        self._pack(
            pages, (codec.keys, codec.values), self._contiguous(codec.keys.unit, pages.layout), False, page_row, first, keys, values,
            retained, lambda start, k, v: pack.encode_heads(codec, start, tile, k, v),
        )  # fmt: skip

    def pack_labels(
        self, pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
    ) -> None:
        tile = pages.layout.tile
        self._pack(
            pages, (codec.keys, codec.values), self._labelled(codec, pages.layout), True, page_row, first, keys, values, retained,
            lambda start, k, v: pack.encode_labels(codec, start, tile, k, v),
        )  # fmt: skip

    def unpack_heads(
        self, pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int
    ) -> tuple[Tensor, Tensor]:
        tile, channels = pages.layout.tile, self._contiguous(codec.keys.unit, pages.layout)
        return self._unpack(
            pages, (codec.keys, codec.values), channels, False, page_row, first, count,
            lambda start, k, v: pack.decode_heads(codec, start, tile, k, v),
        )  # fmt: skip

    def unpack_labels(
        self, pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int
    ) -> tuple[Tensor, Tensor]:
        tile, channels = pages.layout.tile, self._labelled(codec, pages.layout)
        return self._unpack(
            pages, (codec.keys, codec.values), channels, True, page_row, first, count,
            lambda start, k, v: pack.decode_labels(codec, start, tile, k, v),
        )  # fmt: skip

    def _pack(
        self, pages: PackedPages, sides: tuple[Side, Side], channels: tuple[pack.Channels, pack.Channels], crossing: bool,
        page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor, encode: Encode,
    ) -> None:  # fmt: skip
        layout, count = pages.layout, len(keys)
        shape = (count, layout.kv_heads, layout.head_size)
        assert keys.shape == values.shape == shape and retained.shape == (count,), (keys.shape, values.shape, retained.shape)
        assert retained.dtype == torch.bool and keys.device.type == "cpu", (retained.dtype, keys.device)
        assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
        for at in range(0, count, pack.STRETCH):
            stretch = slice(at, min(at + pack.STRETCH, count))
            rows = encode(first + at, keys[stretch], values[stretch])
            self._run_pack(build_pack, pages, sides, channels, crossing, page_row, first + at, rows, retained[stretch])

    def _unpack(
        self, pages: PackedPages, sides: tuple[Side, Side], channels: tuple[pack.Channels, pack.Channels], crossing: bool,
        page_row: Tensor, first: int, count: int, decode: Encode,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        layout = pages.layout
        assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
        keys, values = (torch.empty(count, layout.kv_heads, layout.head_size) for _ in range(2))
        for at in range(0, count, pack.STRETCH):
            stretch = slice(at, min(at + pack.STRETCH, count))
            rows = (keys[stretch], values[stretch])
            self._run_pack(build_unpack, pages, sides, channels, crossing, page_row, first + at, rows, torch.empty(0))
            for target, decoded in zip(rows, decode(first + at, *rows), strict=True):
                target.copy_(decoded)
        return keys, values

    def _run_pack(
        self, build: Build, pages: PackedPages, sides: tuple[Side, Side], channels: tuple[pack.Channels, pack.Channels],
        crossing: bool, page_row: Tensor, first: int, rows: tuple[Tensor, Tensor], retained: Tensor,
    ) -> None:  # fmt: skip
        flags, table = retained.contiguous(), page_row.to(torch.int32).contiguous()
        assert all(r.dtype == torch.float32 and r.is_contiguous() for r in rows)
        fields = attend.page_fields(pages) | {
            "keys": rows[0].data_ptr(), "values": rows[1].data_ptr(), "retained": flags.data_ptr(), "page_row": table.data_ptr(),
            "first": first, "count": len(rows[0]),
        }  # fmt: skip
        threads = torch.get_num_threads()
        job, kept = pack.pack_job(fields, pages.layout, sides, channels, crossing, threads)
        self._team.run(self._kernels.address(build), job, threads)
        del kept

    # --- what follows from a codec, computed once ---

    def _tables(self, rope: RopeFrequencies, mean: Tensor, tile: int) -> MeanTables:
        return self._derive(mean, ("mean", tile), lambda: mean_tables(rope, mean, tile))

    def _contiguous(self, owner: Tensor, layout: PageLayout) -> tuple[pack.Channels, pack.Channels]:
        channels = self._derive(owner, (layout.kv_heads, layout.groups), lambda: pack.contiguous_channels(layout))
        return channels, channels

    def _labelled(self, codec: LabelCodec, layout: PageLayout) -> tuple[pack.Channels, pack.Channels]:
        groups = layout.kv_heads * layout.groups
        keys, values = (
            self._derive(labels, groups, lambda labels=labels: pack.channels_of(labels, groups))
            for labels in (codec.key_labels, codec.value_labels)
        )
        return keys, values

    def _derive(self, owner: Tensor, key: Any, make: Callable[[], Found]) -> Found:
        """``make()``, kept as long as ``owner`` lives and is not written to."""
        found = self._derived.get(owner)
        if found is None or found[0] != owner._version:
            found = (owner._version, {})
            self._derived[owner] = found
        if key not in found[1]:
            found[1][key] = make()
        derived: Found = found[1][key]
        return derived
