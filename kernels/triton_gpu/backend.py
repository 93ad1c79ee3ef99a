"""The backend: which kernels a call takes, on what scratch memory and tables. Launches are next to their kernels.

Nothing waits for the device, except for shapes without a kernel, which the specification computes in torch, and the first call
with a codec or a shape, when tables are made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import FullSlots, HeadCodec, HeadSide, LabelCodec, Ops, PackedKernels, PackedPages, PlainPages, Step
from skvq.kernels.layout import LEVELS, PAGE_TOKENS, gpu_head_size
from skvq.kernels.notices import notice
from skvq.kernels.ops import Unfused
from skvq.kernels.triton_gpu.card import Card, Tuning
from skvq.kernels.triton_gpu.combine import launch_combine
from skvq.kernels.triton_gpu.encode import encode_heads
from skvq.kernels.triton_gpu.forms import (
    GROUP_SIZES,
    HEAD_SIZES,
    PAGE_BLOCK,
    PAGE_PROGRAMS,
    Columns,
    full_splits,
    has_span,
    label_form,
    rows_by_column,
    splits_of,
)
from skvq.kernels.triton_gpu.label_blocks import launch_label_blocks
from skvq.kernels.triton_gpu.labels import launch_labels
from skvq.kernels.triton_gpu.lattice import quantize_lattice
from skvq.kernels.triton_gpu.ops import TritonOps
from skvq.kernels.triton_gpu.pack import launch_pack
from skvq.kernels.triton_gpu.packed import launch_packed
from skvq.kernels.triton_gpu.plain import launch_plain
from skvq.kernels.triton_gpu.prepare import launch_prepare
from skvq.kernels.triton_gpu.quantize import quantize_labels
from skvq.kernels.triton_gpu.slots import launch_slots
from skvq.kernels.triton_gpu.unpack import unpack_heads, unpack_labels
from skvq.kernels.triton_gpu.workspace import Partials, RopeTables, Scratch, Tables


class Resources:
    """What launches of all kinds of pages share: the card, scratch memory, tables, and what has been said."""

    def __init__(self, device: torch.device, card: Card | None, tuning: Tuning | None) -> None:
        self.card = card or Card.of(device)
        self.tuning = tuning or Tuning(lanes=128 if self.card.interpreted else 32)
        self.scratch = Scratch(device)
        self.tables = Tables()
        self._told: set[str] = set()

    def partials(self, q: Tensor, columns: Columns, full: FullSlots, splits: int) -> tuple[Partials, Partials]:
        """Room for partial softmaxes over packed pages, of ``splits`` programs, and over full-precision slots."""
        held = self.scratch.partials("full", q, columns, full_splits(full))
        return self.scratch.partials("packed", q, columns, splits), held

    def rope(self, codec: HeadCodec | LabelCodec, tile: int, pages: int) -> RopeTables:
        """Tables for tiles of ``tile`` tokens, for sequences of up to ``pages`` pages."""
        return self.tables.rope(codec.rope, tile, pages * (PAGE_TOKENS // tile))

    def falls_back(self, head_size: int, group_size: int) -> bool:
        """Whether the kernels do not know a shape; the specification then computes it, and says so once."""
        if head_size in HEAD_SIZES and group_size in GROUP_SIZES:
            return False
        shape = f"head size {head_size}, group size {group_size}"
        self.say_once(f"no Triton kernel for {shape}; torch computes it, correctly but slowly")
        return True

    def say_once(self, what: str) -> None:
        """Say why something is slower than it could be, once."""
        if what not in self._told:
            self._told.add(what)
            notice(what)


class TritonHeads:
    """``interface.PackedKernels`` of ``HeadCodec``."""

    def __init__(self, shared: Resources) -> None:
        self._shared = shared

    def pack(
        self, pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
    ) -> None:
        shared, layout = self._shared, pages.layout
        if shared.falls_back(layout.head_size, layout.group_size):
            reference.pack_heads(pages, codec, page_row, first, keys, values, retained)
            return
        if codec.has_basis:
            rope = shared.rope(codec, layout.tile, len(page_row)) if codec.has_key_mean else None
            y_keys, y_values = encode_heads(codec, first, keys, values, rope, layout.tile, shared.card.interpreted)
        else:
            y_keys, y_values = keys.float().contiguous(), values.float().contiguous()
        if not (codec.keys.has_metric or codec.values.has_metric):
            unread = (y_keys, y_keys, y_keys, y_keys)
            launch_pack(pages, codec, page_row, first, y_keys, y_values, unread, retained, quantized=False)
            return
        key, ks, km = self._quantize(y_keys, layout.key_bits, codec.keys)
        value, vs, vm = self._quantize(y_values, layout.value_bits, codec.values)
        launch_pack(pages, codec, page_row, first, key, value, (ks, km, vs, vm), retained, quantized=True)

    def _quantize(self, y: Tensor, bits: float, side: HeadSide) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8, bytes of scales and of mids of ``y`` float32 [T, KH, D]: a head's codes together or each on its own."""
        tables, (_, heads, size) = self._shared.tables, y.shape
        if side.has_metric:
            return quantize_lattice(y, LEVELS[bits], side, tables.metric(side), self._shared.tuning.lanes)
        members, sizes = tables.neighbours(heads * size, size // side.unit.shape[1], y.device)
        return quantize_labels(y.flatten(1), LEVELS[bits], side, members, sizes)

    def unpack(
        self,
        pages: PackedPages,
        codec: HeadCodec,
        page_row: Tensor,
        first: int,
        count: int,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        shared, layout = self._shared, pages.layout
        if shared.falls_back(layout.head_size, layout.group_size):
            return reference.unpack_heads(pages, codec, page_row, first, count, dtype)
        rope = shared.rope(codec, layout.tile, len(page_row)) if codec.has_key_mean else None
        label = shared.tables.groups(layout.kv_heads * layout.head_size, layout.group_size, page_row.device)
        return unpack_heads(pages, codec, page_row, first, count, dtype, label, rope, shared.card.interpreted)

    def attend(self, q: Tensor, pages: PackedPages, codec: HeadCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        shared, card, layout, mean = self._shared, self._shared.card, pages.layout, codec.has_key_mean
        if shared.falls_back(layout.head_size, layout.group_size):
            return reference.attend_heads(q, pages, codec, full, step)
        columns = Columns.of(q, layout.kv_heads, layout.head_size, full, step)
        form = shared.tuning.form_of(layout, has_mean=mean, shared_bytes=card.shared_bytes)
        splits = splits_of(columns, step, layout.tile, card.processors * form.programs)
        packed, held = shared.partials(q, columns, full, splits)
        if packed.splits:
            turn = table = packed.sums  # not read
            if mean:  # before the launch that the next one overlaps with: tables may have to be made
                rope = shared.rope(codec, form.part, step.page_table.shape[1])
                turn, table = rope.turn, rope.table
            by_column = rows_by_column(layout.tile, layout.groups, has_mean=mean, has_span=has_span(step))
            prepared = launch_prepare(card, shared.scratch, q, codec, layout, columns, by_column=by_column)
            launch_packed(card, form, q, prepared, turn, table, pages, codec, full, step, columns, packed, held)
        else:
            launch_slots(card, q, full, step, columns, held)
        return launch_combine(
            card, q, columns, packed, held, codec.output_basis, codec.value_mean, has_basis=codec.has_basis
        )  # fmt: skip


class TritonLabels:
    """``interface.PackedKernels`` of ``LabelCodec``."""

    def __init__(self, shared: Resources) -> None:
        self._shared = shared

    def pack(
        self,
        pages: PackedPages,
        codec: LabelCodec,
        page_row: Tensor,
        first: int,
        keys: Tensor,
        values: Tensor,
        retained: Tensor,
    ) -> None:
        shared, layout, count = self._shared, pages.layout, len(keys)
        if shared.falls_back(layout.head_size, layout.group_size):
            reference.pack_labels(pages, codec, page_row, first, keys, values, retained)
            return
        labels = shared.tables.labels(codec, layout.kv_heads * layout.groups)
        positions = torch.arange(first, first + count, device=keys.device)
        before_rope = reference.rotary(keys, positions, codec.rope, inverse=True)
        y_keys, y_values = (y.reshape(count, -1).contiguous() for y in (before_rope, values.float()))  # [T, KH * D]
        key_levels, value_levels = LEVELS[layout.key_bits], LEVELS[layout.value_bits]
        key, ks, km = quantize_labels(y_keys, key_levels, codec.keys, labels.key_members, labels.key_sizes)
        value, vs, vm = quantize_labels(y_values, value_levels, codec.values, labels.value_members, labels.value_sizes)
        launch_pack(pages, codec, page_row, first, key, value, (ks, km, vs, vm), retained, quantized=True)

    def unpack(
        self,
        pages: PackedPages,
        codec: LabelCodec,
        page_row: Tensor,
        first: int,
        count: int,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        shared, layout = self._shared, pages.layout
        if shared.falls_back(layout.head_size, layout.group_size):
            return reference.unpack_labels(pages, codec, page_row, first, count, dtype)
        labels = shared.tables.labels(codec, layout.kv_heads * layout.groups)
        return unpack_labels(pages, codec, page_row, first, count, dtype, labels)

    def attend(self, q: Tensor, pages: PackedPages, codec: LabelCodec, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        shared, card, layout = self._shared, self._shared.card, pages.layout
        if shared.falls_back(layout.head_size, layout.group_size):
            return reference.attend_labels(q, pages, codec, full, step)
        columns = Columns.of(q, layout.kv_heads, layout.head_size, full, step)
        form = label_form(layout, shared_bytes=card.shared_bytes, block_bytes=card.block_bytes)
        if form.crowded:
            groups, room = layout.kv_heads * layout.groups, card.block_bytes >> 10
            shared.say_once(f"{groups} groups do not fit in the {room} KB of a block's shared memory; a slower kernel is used")
        splits = splits_of(columns, step, layout.tile, card.processors * form.programs)
        packed, held = shared.partials(q, columns, full, splits)
        if packed.splits:
            labels = shared.tables.labels(codec, layout.kv_heads * layout.groups)
            rope = shared.rope(codec, form.places, step.page_table.shape[1])
            if form.blocks:
                launch_label_blocks(card, form, q, pages, codec, labels, rope, step, columns, packed)
            else:
                launch_labels(form, q, pages, codec, labels, rope, step, columns, packed)
        launch_slots(card, q, full, step, columns, held)
        return launch_combine(card, q, columns, packed, held, packed.sums, packed.sums, has_basis=False)


class TritonGpu(Unfused):
    """Kernels for one device. Scratch is taken on the first step of a shape; warm up before capturing a CUDA graph."""

    name = "triton"

    def __init__(self, device: torch.device, *, card: Card | None = None, tuning: Tuning | None = None) -> None:
        """``card`` and ``tuning``: in place of what the device is and what is best for it; for tests and benchmarks."""
        self.shared = Resources(device, card, tuning)
        self.ops: Ops = TritonOps()
        self.heads: PackedKernels[HeadCodec] = TritonHeads(self.shared)
        self.labels: PackedKernels[LabelCodec] = TritonLabels(self.shared)

    def head_size_for(self, head_size: int) -> int:
        return gpu_head_size(head_size)

    def captures(self, head_size: int) -> bool:
        return head_size in HEAD_SIZES and self.shared.scratch.device.type == "cuda"

    def attend_plain(self, q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        shared, card, kv_heads, size = self.shared, self.shared.card, pages.keys.shape[1], pages.keys.shape[3]
        if shared.falls_back(size, 64):
            return reference.attend_plain(q, pages, full, step)
        columns = Columns.of(q, kv_heads, size, full, step)
        splits = splits_of(columns, step, PAGE_BLOCK, card.processors * PAGE_PROGRAMS)
        packed, held = shared.partials(q, columns, full, splits)
        if packed.splits:
            launch_plain(card, q, pages, step, columns, packed)
        launch_slots(card, q, full, step, columns, held)
        return launch_combine(card, q, columns, packed, held, packed.sums, packed.sums, has_basis=False)
