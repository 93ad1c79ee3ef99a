"""The backend: shapes checked, grids computed, kernels launched. Nothing here waits for the device."""

from __future__ import annotations

import sys

import torch
import triton
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import FullSlots, HeadCodec, LabelCodec, PackedPages, PlainPages, Step
from skvq.kernels.layout import LEVELS, PAGE_TOKENS
from skvq.kernels.registry import TRITON_HEAD_SIZES, BackendUnavailable
from skvq.kernels.triton_gpu.combine import combine_kernel
from skvq.kernels.triton_gpu.encode import encode_heads
from skvq.kernels.triton_gpu.forms import (
    FULL_SPLITS,
    LABEL_NUMBERS,
    LABEL_STAGES,
    LABEL_WARPS,
    MAX_SPLITS,
    PAGE_BLOCK,
    SLOT_BLOCK,
    WARPS_PER_SM,
    Columns,
    PackedForm,
    Partials,
    label_programs,
    packed_form,
    rows_by_column,
)
from skvq.kernels.triton_gpu.label_blocks import attend_labels_blocks_kernel
from skvq.kernels.triton_gpu.labels import attend_labels_kernel
from skvq.kernels.triton_gpu.lattice import quantize_lattice
from skvq.kernels.triton_gpu.overlap import overlapping, overlaps
from skvq.kernels.triton_gpu.packed import attend_packed_kernel
from skvq.kernels.triton_gpu.packing import bits_code, decode_heads, launch_pack, launch_unpack, page_strides
from skvq.kernels.triton_gpu.plain import attend_plain_kernel
from skvq.kernels.triton_gpu.prepare import prepare_heads_kernel
from skvq.kernels.triton_gpu.quantize import quantize_kernel
from skvq.kernels.triton_gpu.slots import attend_slots_kernel
from skvq.kernels.triton_gpu.workspace import Scratch, Tables


class TritonGpu:
    """Kernels for one device. Scratch is taken on the first step of a shape; warm up before capturing a CUDA graph."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.interpreted = not isinstance(attend_packed_kernel, triton.JITFunction)
        if device.type != "cuda" and not self.interpreted:
            raise BackendUnavailable(
                f"backend 'triton' needs an NVIDIA GPU, not {device}; TRITON_INTERPRET=1 runs it on the CPU, for tests only"
            )
        self.fp8, self.pdl, processors, self.shared_bytes = False, False, 1, 164 << 10
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):
                raise BackendUnavailable(f"backend 'triton' needs compute capability 8.0 or later, {device} has {capability}")
            self.fp8 = capability >= (8, 9)
            self.pdl = overlaps(device)
            properties = torch.cuda.get_device_properties(device)
            processors, self.shared_bytes = properties.multi_processor_count, properties.shared_memory_per_multiprocessor
        self.programs = processors * WARPS_PER_SM
        self.form_of = packed_form
        self.lanes = 128 if self.interpreted else 32  # tokens of a program of the lattice quantizer
        self.scratch = Scratch(device)
        self.tables = Tables()
        self._told: set[str] = set()

    # --- attention ----------------------------------------------------------------------------------------------------

    def attend_heads(
        self, q: Tensor, pages: PackedPages, codec: HeadCodec, full: FullSlots, step: Step
    ) -> tuple[Tensor, Tensor]:
        layout = pages.layout
        if self._is_odd(layout.head_size, layout.group_size):
            return reference.attend_heads(q, pages, codec, full, step)
        columns = self._check(q, layout.kv_heads, layout.head_size, full, step)
        form = self.form_of(layout, has_mean=codec.has_key_mean, shared_bytes=self.shared_bytes)
        packed = self._partials("packed", columns, q, self._splits(columns, step, layout.tile, form.programs))
        held = self._partials("full", columns, q, self._full_splits(full))
        if packed.splits:
            self._attend_packed(q, pages, codec, full, step, columns, form, packed, held)
        else:
            self._attend_slots(q, full, step, columns, held)
        return self._combine(q, columns, packed, held, codec)

    def _attend_packed(
        self,
        q: Tensor,
        pages: PackedPages,
        codec: HeadCodec,
        full: FullSlots,
        step: Step,
        columns: Columns,
        form: PackedForm,
        packed: Partials,
        held: Partials,
    ) -> None:
        """Packed tiles and 16-bit slots in one launch."""
        layout = pages.layout
        size, groups, width = layout.head_size, layout.groups, columns.width
        programs = q.shape[0] * columns.chunks * columns.heads
        pad = 2 if width == 4 else 1
        part = form.part
        key_bits, value_bits = bits_code(layout.key_bits), bits_code(layout.value_bits)
        by_column = rows_by_column(layout.tile, groups, has_mean=codec.has_key_mean, has_span=_is_limited(step))
        rows = self.scratch.take("rows", programs * (2 if key_bits == 3 else 1) * size * width * pad, torch.float16)
        qsum = self.scratch.take("qsum", programs * groups * width, torch.float32)
        scale = self.scratch.take("scale", programs * 2, torch.float32)
        coefficient = turn = table = scale
        rope_scale = 1.0
        if codec.has_key_mean:
            tables = self.tables.rope(codec.rope, part, step.page_table.shape[1] * (PAGE_TOKENS // part))
            turn, table, rope_scale = tables.turn, tables.table, tables.scale
            coefficient = self.scratch.take("coefficient", programs * size * width, torch.float32)
        prepare_heads_kernel[(columns.heads, q.shape[0] * columns.chunks)](
            q, codec.query_basis, codec.keys.unit, codec.key_mean, rows, qsum, scale, coefficient,
            columns.chunks, columns.queries, columns.repeat, rope_scale,
            D=size, BITS=key_bits, G=groups, NH=width, META=1.0 if self.fp8 else 256.0,
            HAS_BASIS=codec.has_basis, HAS_MEAN=codec.has_key_mean,
            BY_COLUMN=by_column, ASM=not self.interpreted, num_warps=8, **overlapping(self.pdl),
        )  # fmt: skip
        attend_packed_kernel[(columns.heads, held.splits + packed.splits, q.shape[0] * columns.chunks)](
            rows, qsum, scale, coefficient, turn, table, pages.key_codes, pages.value_codes, pages.meta, codec.values.unit,
            packed.sums, packed.statistics, step.page_table, step.slots, step.packed, step.positions,
            *page_strides(pages), step.page_table.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
            step.span, packed.splits,
            q, full.keys, full.values, full.positions, held.sums, held.statistics, *full.keys.stride()[:3],
            full.positions.stride(0), full.positions.shape[1], held.splits,
            D=size, KEY_BITS=key_bits, VALUE_BITS=value_bits, G=groups, NH=width, TILE=layout.tile, PART=part,
            HAS_SPAN=_is_limited(step), HAS_MEAN=codec.has_key_mean,
            BY_COLUMN=by_column, BLOCK=SLOT_BLOCK, ASM=not self.interpreted, FP8=self.fp8, num_warps=1, num_stages=form.stages,
            **overlapping(self.pdl), **self._registers(form),
        )  # fmt: skip

    def attend_plain(self, q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        kv_heads, size = pages.keys.shape[1], pages.keys.shape[3]
        if self._is_odd(size, 64):
            return reference.attend_plain(q, pages, full, step)
        columns = self._check(q, kv_heads, size, full, step)
        assert pages.keys.shape[2] == PAGE_TOKENS and pages.keys.stride()[2:] == (size, 1), pages.keys.stride()
        assert pages.values.stride() == pages.keys.stride(), (pages.values.stride(), pages.keys.stride())
        packed = self._partials("packed", columns, q, self._splits(columns, step, PAGE_BLOCK, WARPS_PER_SM / 4))
        held = self._partials("full", columns, q, self._full_splits(full))
        if packed.splits:
            attend_plain_kernel[(kv_heads, packed.splits, q.shape[0] * columns.chunks)](
                q, pages.keys, pages.values, step.page_table, step.slots, step.packed, step.positions,
                packed.sums, packed.statistics,
                pages.keys.stride(0), pages.keys.stride(1), step.page_table.stride(0), kv_heads, columns.chunks,
                columns.queries,
                columns.repeat, step.span, columns.total,
                D=size, NH=max(columns.width, 8), BLOCK=PAGE_BLOCK, WIDE=self.interpreted, num_warps=4, num_stages=3,
                **overlapping(self.pdl),
            )  # fmt: skip
        self._attend_slots(q, full, step, columns, held)
        return self._combine(q, columns, packed, held, None)

    def attend_labels(
        self, q: Tensor, pages: PackedPages, codec: LabelCodec, full: FullSlots, step: Step
    ) -> tuple[Tensor, Tensor]:
        layout = pages.layout
        if self._is_odd(layout.head_size, layout.group_size):
            return reference.attend_labels(q, pages, codec, full, step)
        columns = self._check(q, layout.kv_heads, layout.head_size, full, step)
        bits = {"KEY_BITS": bits_code(layout.key_bits), "VALUE_BITS": bits_code(layout.value_bits)}
        # keys of 8 bits want float32
        fast = layout.tile == 128 and bits["KEY_BITS"] in (2, 4) and bits["VALUE_BITS"] in (2, 4, 8)
        groups = layout.kv_heads * layout.groups
        warps = (2 if groups > 16 else 1) if fast else 4  # two share the matrices of many labels
        room = label_programs(layout, groups, warps, LABEL_STAGES, self.shared_bytes) if fast else LABEL_WARPS / warps
        packed = self._partials("packed", columns, q, self._splits(columns, step, layout.tile, room))
        held = self._partials("full", columns, q, self._full_splits(full))
        if packed.splits:
            labels = self.tables.labels(codec, codec.key_labels, codec.value_labels, groups)
            places = LABEL_NUMBERS // layout.head_size if fast else layout.tile
            tables = self.tables.rope(codec.rope, places, step.page_table.shape[1] * (PAGE_TOKENS // places))
            shared = (
                pages.key_codes, pages.value_codes, pages.meta, codec.keys.unit, codec.values.unit,
                labels.key_labels, labels.value_labels, packed.sums, packed.statistics,
                step.page_table, step.slots, step.packed, step.positions,
                *page_strides(pages), step.page_table.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
                step.span, columns.total, tables.scale,
            )  # fmt: skip
            grid = (columns.heads, packed.splits, q.shape[0] * columns.chunks)
            forms = {"D": layout.head_size, "G": layout.groups} | bits
            if fast:
                attend_labels_blocks_kernel[grid](
                    q, tables.bases, tables.table, *shared, groups, **forms,
                    NH=columns.width,
                    GROUPS=max(16, triton.next_power_of_2(groups)), SHARE=places,
                    HAS_SPAN=_is_limited(step), ASM=not self.interpreted, num_warps=warps, num_stages=LABEL_STAGES,
                )  # fmt: skip
            else:
                attend_labels_kernel[grid](
                    q, tables.turn[6:], tables.places, *shared, **forms, NH=max(columns.width, 8), TILE=layout.tile,
                    num_warps=warps, num_stages=1,
                )  # fmt: skip
        self._attend_slots(q, full, step, columns, held)
        return self._combine(q, columns, packed, held, None)

    def _attend_slots(self, q: Tensor, full: FullSlots, step: Step, columns: Columns, held: Partials) -> None:
        """The 16-bit slots in a launch of their own."""
        attend_slots_kernel[(columns.heads, held.splits, q.shape[0] * columns.chunks)](
            q, full.keys, full.values, full.positions, step.slots, step.positions, held.sums, held.statistics,
            *full.keys.stride()[:3], full.positions.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
            full.positions.shape[1], step.span, columns.total,
            D=q.shape[3], NH=8, BLOCK=SLOT_BLOCK, WIDE=self.interpreted, num_warps=1, num_stages=1, **overlapping(self.pdl),
        )  # fmt: skip

    def _combine(
        self, q: Tensor, columns: Columns, packed: Partials, held: Partials, codec: HeadCodec | None
    ) -> tuple[Tensor, Tensor]:
        """One softmax of all partial ones."""
        batch, queries, heads, size = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
        has_basis = codec is not None and codec.has_basis
        basis, mean = (codec.output_basis, codec.value_mean) if codec is not None else (packed.sums, packed.sums)
        combine_kernel[(batch * queries * heads,)](
            packed.sums, packed.statistics, held.sums, held.statistics, basis, mean, out, lse, packed.splits, held.splits,
            columns.total, queries, columns.heads, columns.repeat,
            D=size, BLOCK=64 if packed.splits <= 64 else 128, MOST=MAX_SPLITS, FULL=FULL_SPLITS, HAS_BASIS=has_basis,
            num_warps=8, **overlapping(self.pdl),
        )  # fmt: skip
        return out, lse

    # --- packing ------------------------------------------------------------------------------------------------------

    def pack_heads(
        self, pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, keys: Tensor, values: Tensor, retained: Tensor
    ) -> None:
        layout = pages.layout
        if self._is_odd(layout.head_size, layout.group_size):
            reference.pack_heads(pages, codec, page_row, first, keys, values, retained)
            return
        if codec.has_basis:
            tables = self.tables.rope(codec.rope, layout.tile, page_row.shape[0] * layout.tiles) if codec.has_key_mean else None
            y_keys, y_values = encode_heads(codec, first, keys, values, tables, layout.tile, self.interpreted)
        else:
            y_keys, y_values = keys.float().contiguous(), values.float().contiguous()
        sides = (codec.keys.unit, codec.keys.clip, codec.values.unit, codec.values.clip)
        if not (codec.keys.has_metric or codec.values.has_metric):
            launch_pack(pages, page_row, first, y_keys, y_values, sides, (y_keys,) * 4, retained, quantized=False)
            return
        (key, ks, km), (value, vs, vm) = (
            quantize_lattice(y, LEVELS[bits], side, self.tables.metric(side), self.lanes)
            if side.has_metric
            else reference.quantize_heads(y, bits, side)
            for y, bits, side in ((y_keys, layout.key_bits, codec.keys), (y_values, layout.value_bits, codec.values))
        )
        launch_pack(pages, page_row, first, key, value, sides, (ks, km, vs, vm), retained, quantized=True)

    def pack_labels(
        self,
        pages: PackedPages,
        codec: LabelCodec,
        page_row: Tensor,
        first: int,
        keys: Tensor,
        values: Tensor,
        retained: Tensor,
    ) -> None:
        layout, count = pages.layout, len(keys)
        if self._is_odd(layout.head_size, layout.group_size):
            reference.pack_labels(pages, codec, page_row, first, keys, values, retained)
            return
        groups = layout.kv_heads * layout.groups
        labels = self.tables.labels(codec, codec.key_labels, codec.value_labels, groups)
        positions = torch.arange(first, first + count, device=keys.device)
        turned = reference.rotary(keys, positions, codec.rope, inverse=True)
        done = []
        for y, side, bits, members, sizes in (
            (turned, codec.keys, layout.key_bits, labels.key_members, labels.key_sizes),
            (values.float(), codec.values, layout.value_bits, labels.value_members, labels.value_sizes),
        ):
            y = y.reshape(count, -1).contiguous()
            codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
            scale, mid = (torch.empty(count, groups, dtype=torch.uint8, device=y.device) for _ in range(2))
            widest = members.shape[1]
            quantize_kernel[(-(-count // 16), groups)](
                y, side.unit, side.clip, members, sizes, codes, scale, mid, count, groups, y.shape[1], widest,
                LEVELS=LEVELS[bits], WIDTH=triton.next_power_of_2(widest), BLOCK=16, num_warps=8,
            )  # fmt: skip
            done.append((codes, scale, mid))
        (key, ks, km), (value, vs, vm) = done
        sides = (codec.keys.unit, codec.keys.clip, codec.values.unit, codec.values.clip)
        launch_pack(pages, page_row, first, key, value, sides, (ks, km, vs, vm), retained, quantized=True)

    def unpack_heads(
        self, pages: PackedPages, codec: HeadCodec, page_row: Tensor, first: int, count: int
    ) -> tuple[Tensor, Tensor]:
        layout = pages.layout
        if self._is_odd(layout.head_size, layout.group_size):
            return reference.unpack_heads(pages, codec, page_row, first, count)
        channels = torch.arange(layout.kv_heads * layout.head_size, device=page_row.device)
        label = torch.div(channels, layout.group_size, rounding_mode="floor").to(torch.int32)
        keys, values = launch_unpack(pages, page_row, first, count, codec, label, label)
        return decode_heads(codec, first, keys, values)

    def unpack_labels(
        self, pages: PackedPages, codec: LabelCodec, page_row: Tensor, first: int, count: int
    ) -> tuple[Tensor, Tensor]:
        layout = pages.layout
        if self._is_odd(layout.head_size, layout.group_size):
            return reference.unpack_labels(pages, codec, page_row, first, count)
        keys, values = launch_unpack(
            pages, page_row, first, count, codec, codec.key_labels.to(torch.int32), codec.value_labels.to(torch.int32)
        )
        positions = torch.arange(first, first + count, device=keys.device)
        return reference.rotary(keys, positions, codec.rope), values

    # --- shapes -------------------------------------------------------------------------------------------------------

    def _check(self, q: Tensor, kv_heads: int, size: int, full: FullSlots, step: Step) -> Columns:
        assert q.ndim == 4 and q.is_contiguous() and q.shape[3] == size and q.shape[2] % kv_heads == 0, (q.shape, q.stride())
        assert step.positions.shape == q.shape[:2] and step.positions.dtype == torch.int32, step.positions
        assert step.packed.dtype == torch.int32 and step.page_table.dtype == torch.int32, (
            step.packed.dtype,
            step.page_table.dtype,
        )
        assert step.slots.dtype == torch.int64 and step.page_table.stride(1) == 1, step.page_table.stride()
        assert full.keys.stride() == full.values.stride() and full.keys.stride(3) == 1, (
            full.keys.stride(),
            full.values.stride(),
        )
        assert full.positions.stride(1) == 1 and full.positions.dtype == torch.int32, full.positions.dtype
        return Columns.of(q, kv_heads)

    def _splits(self, columns: Columns, step: Step, tile: int, programs: float) -> int:
        """Splits that fill the device once, of at least two tiles; known to the host, whatever the lengths turn out.

        ``programs``: those that a multiprocessor holds. A few more would take as long again.
        """
        tiles = -(-step.max_packed // tile)
        rows = columns.heads * columns.chunks * len(step.slots)
        wanted = max(1, int(self.programs * programs / (WARPS_PER_SM * rows) + 1e-6))
        return min(wanted, -(-tiles // 2), MAX_SPLITS)

    def _registers(self, form: PackedForm) -> dict[str, int]:
        """Launch options; Triton's interpreter has no registers."""
        return {} if self.interpreted or not form.registers else {"maxnreg": form.registers}

    def _full_splits(self, full: FullSlots) -> int:
        """Programs that share the 16-bit slots of a kv head and chunk."""
        return min(max(-(-full.positions.shape[1] // SLOT_BLOCK), 1), FULL_SPLITS)

    def _partials(self, name: str, columns: Columns, q: Tensor, splits: int) -> Partials:
        rows = q.shape[0] * columns.heads * columns.total * splits
        sums = self.scratch.take(f"{name} sums", rows * q.shape[3], torch.float32)
        return Partials(sums, self.scratch.take(f"{name} statistics", rows * 2, torch.float32), splits)

    def _is_odd(self, head_size: int, group_size: int) -> bool:
        """Whether the kernels do not know a shape; the specification then computes it, and says so once."""
        if head_size in TRITON_HEAD_SIZES and group_size in (32, 64, 128):
            return False
        self._say_once(f"head size {head_size}, group size {group_size}")
        return True

    def _say_once(self, what: str) -> None:
        """Nothing is slower than it might be without a word."""
        if what not in self._told:
            self._told.add(what)
            print(f"skvq: no Triton kernel for {what}; torch computes it, correct and slow", file=sys.stderr)


def _is_limited(step: Step) -> bool:
    """Whether the span can hide a token."""
    return step.span < 2**31 - 1
