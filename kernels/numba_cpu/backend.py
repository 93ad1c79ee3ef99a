"""``interface.Backend`` on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from skvq.kernels.interface import FullSlots, HeadCodec, LabelCodec, Ops, PackedKernels, PackedPages, PlainPages, Step
from skvq.kernels.layout import PageLayout
from skvq.kernels.numba_cpu import attend
from skvq.kernels.numba_cpu.channels import channels_of, contiguous_channels
from skvq.kernels.numba_cpu.compiled import Build
from skvq.kernels.numba_cpu.entry import process_kernels
from skvq.kernels.numba_cpu.heads import build_attend_heads
from skvq.kernels.numba_cpu.labels import build_attend_labels
from skvq.kernels.numba_cpu.ops import NumbaOps
from skvq.kernels.numba_cpu.pack import build_pack
from skvq.kernels.numba_cpu.packer import STRETCH, Packing, heads_packing, labels_packing, pack_job
from skvq.kernels.numba_cpu.plain import build_attend_plain
from skvq.kernels.numba_cpu.tapes import Tapes
from skvq.kernels.numba_cpu.turns import all_turns, mean_tables
from skvq.kernels.numba_cpu.unpack import build_unpack

Found = TypeVar("Found")
Codec = TypeVar("Codec")


class Launcher:
    """What kernels of all kinds of pages share: compiled functions, the team that runs them, and what follows from codecs."""

    def __init__(self) -> None:
        self._kernels, self._team = process_kernels()
        self._derived: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def attend(self, build: Build, q: Tensor, full: FullSlots, step: Step, fields: attend.CallFields) -> tuple[Tensor, Tensor]:
        job, kept, threads = attend.attend_job(q.float().contiguous(), full, step, fields, torch.get_num_threads())
        self._team.run(self._kernels.function(build), job, threads)
        return kept[0].to(q.dtype), kept[1]

    def pack(
        self, pages: PackedPages, packing: Packing, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
    ) -> None:
        layout, count = pages.layout, len(keys)
        shape = (count, layout.kv_heads, layout.head_size)
        assert keys.shape == values.shape == shape and retained.shape == (count,), (keys.shape, values.shape, retained.shape)
        assert retained.dtype == torch.bool and keys.device.type == "cpu", (retained.dtype, keys.device)
        assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
        for at in range(0, count, STRETCH):
            part = slice(at, min(at + STRETCH, count))
            rows = packing.encode(first + at, keys[part], values[part])
            self._run(build_pack, pages, packing, page_row, first + at, rows, retained[part])

    def unpack(
        self, pages: PackedPages, packing: Packing, page_row: Tensor, first: int, count: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        layout = pages.layout
        assert first % layout.tile == 0 and count % layout.tile == 0, (first, count, layout.tile)
        keys, values = (torch.empty(count, layout.kv_heads, layout.head_size, dtype=torch.float32) for _ in range(2))
        for at in range(0, count, STRETCH):
            part = slice(at, min(at + STRETCH, count))
            self._run(build_unpack, pages, packing, page_row, first + at, (keys[part], values[part]), torch.empty(0))
            decoded = packing.decode(first + at, keys[part], values[part])
            for target, found in zip((keys[part], values[part]), decoded, strict=True):
                if found is not target:
                    target.copy_(found)
        return keys.to(dtype), values.to(dtype)

    def _run(
        self,
        build: Build,
        pages: PackedPages,
        packing: Packing,
        row: Tensor,
        first: int,
        rows: tuple[Tensor, Tensor],
        flags: Tensor,
    ) -> None:
        threads = torch.get_num_threads()
        job, kept = pack_job(pages, packing, row, first, rows, flags, threads)
        attends = build_attend_labels if packing.crossing else build_attend_heads
        self._team.run(self._kernels.function(build, soon=attends), job, threads)
        del kept  # the job holds addresses only

    def derive(self, owner: Tensor, key: object, make: Callable[[], Found]) -> Found:
        """``make()``, cached under ``key`` until the tensor ``owner`` dies or is written to. All threads are given the same
        one: kernels know it by its address."""
        version, derived = self._derived.setdefault(owner, (owner._version, {}))  # type: ignore[no-untyped-call]
        if version != owner._version:
            derived = {}
            self._derived[owner] = (owner._version, derived)
        found: Found = derived[key] if key in derived else derived.setdefault(key, make())
        return found


class NumbaPages(Generic[Codec]):
    """``interface.PackedKernels`` of one kind of codec, but for attention."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def _packing(self, codec: Codec, layout: PageLayout) -> Packing:
        """What packing needs to know of a codec."""
        raise NotImplementedError

    def pack(
        self, pages: PackedPages, codec: Codec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
    ) -> None:
        self._launcher.pack(pages, self._packing(codec, pages.layout), page_row, first, keys, values, retained)

    def unpack(
        self,
        pages: PackedPages,
        codec: Codec,
        page_row: Tensor,
        first: int,
        count: int,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        return self._launcher.unpack(pages, self._packing(codec, pages.layout), page_row, first, count, dtype)


class NumbaHeads(NumbaPages[HeadCodec]):
    """``interface.PackedKernels`` of ``HeadCodec``."""

    def attend(self, q: Tensor, pages: PackedPages, codec: HeadCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        layout, tables = pages.layout, attend.NO_TABLES
        if codec.has_basis and codec.has_key_mean:
            tables = self._launcher.derive(
                codec.key_mean, layout.tile, lambda: mean_tables(codec.rope, codec.key_mean, layout.tile)
            ).fields
        fields = attend.page_fields(pages), attend.head_fields(codec), tables, attend.layout_fields(layout)
        return self._launcher.attend(build_attend_heads, q, full, step, fields)

    def _packing(self, codec: HeadCodec, layout: PageLayout) -> Packing:
        channels = self._launcher.derive(codec.keys.unit, layout, lambda: contiguous_channels(layout))
        return heads_packing(codec, channels, layout.tile)


class NumbaLabels(NumbaPages[LabelCodec]):
    """``interface.PackedKernels`` of ``LabelCodec``."""

    def attend(self, q: Tensor, pages: PackedPages, codec: LabelCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        layout, rope = pages.layout, codec.rope
        key, size, tile = (rope.scale, layout.tile), layout.head_size, layout.tile
        tables = self._launcher.derive(rope.inv_freq, key, lambda: all_turns(rope, size, tile)).fields
        fields = attend.page_fields(pages), attend.label_fields(codec), tables, attend.layout_fields(layout)
        return self._launcher.attend(build_attend_labels, q, full, step, fields)

    def _packing(self, codec: LabelCodec, layout: PageLayout) -> Packing:
        groups, derive = layout.kv_heads * layout.groups, self._launcher.derive
        keys = derive(codec.key_labels, groups, lambda: channels_of(codec.key_labels, groups))
        values = derive(codec.value_labels, groups, lambda: channels_of(codec.value_labels, groups))
        return labels_packing(codec, (keys, values), layout.tile)


class NumbaCpu:
    """Kernels are compiled when first called, once per installation. One instance may serve several threads."""

    name = "numba"

    def __init__(self) -> None:
        self._launcher = Launcher()
        self.ops: Ops = NumbaOps()
        self.heads: PackedKernels[HeadCodec] = NumbaHeads(self._launcher)
        self.labels: PackedKernels[LabelCodec] = NumbaLabels(self._launcher)

    def head_size_for(self, head_size: int) -> int:
        return head_size

    def captures(self, head_size: int) -> bool:
        return True

    def graphs(self, device: torch.device, max_packed: int) -> Tapes:
        return Tapes()

    def attend_plain(self, q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        fields = attend.plain_fields(pages), attend.NO_CODEC, attend.NO_TABLES, attend.plain_layout_fields(pages)
        return self._launcher.attend(build_attend_plain, q, full, step, fields)
