"""The backend: shapes checked, grids computed, kernels launched. Nothing here waits for the device."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import FullSlots, HeadCodec, LabelCodec, PackedPages, PlainPages, Step
from skvq.kernels.layout import LEVELS, PAGE_TOKENS, PageLayout
from skvq.kernels.registry import TRITON_HEAD_SIZES, BackendUnavailable
from skvq.kernels.triton_gpu.combine import combine_kernel
from skvq.kernels.triton_gpu.dense import attend_plain_kernel, attend_slots_kernel
from skvq.kernels.triton_gpu.label_blocks import attend_labels_blocks_kernel
from skvq.kernels.triton_gpu.labels import attend_labels_kernel
from skvq.kernels.triton_gpu.lattice import quantize_side
from skvq.kernels.triton_gpu.pack import quantize_kernel
from skvq.kernels.triton_gpu.packed import attend_packed_kernel
from skvq.kernels.triton_gpu.packing import bits_code, decode_heads, launch_pack, launch_unpack, page_strides
from skvq.kernels.triton_gpu.prepare import prepare_heads_kernel
from skvq.kernels.triton_gpu.workspace import Scratch, Tables

WARPS_PER_SM = 12  # one warp a program at up to 168 registers
MAX_SPLITS = 512
SLOT_BLOCK = 64
LABEL_NUMBERS = 4096  # keys at a time, 32 tokens of 128: more would spill
LABEL_WARPS = 8  # of 255 registers, that a multiprocessor holds


@dataclass(frozen=True, slots=True)
class Columns:
    """How the query columns of one kv head, N * H / KH of them, are cut: ``chunks`` of ``width``."""

    heads: int  # kv heads
    queries: int
    repeat: int
    width: int
    chunks: int

    @classmethod
    def of(cls, q: Tensor, kv_heads: int) -> Columns:
        """Four columns take half a tensor-core tile and the other half idles; more columns take whole ones."""
        queries, repeat = q.shape[1], q.shape[2] // kv_heads
        width = 4 if queries * repeat <= 4 else 8
        return cls(kv_heads, queries, repeat, width, -(-queries * repeat // width))

    @property
    def total(self) -> int:
        """Columns of a kv head, the idle ones of the last chunk included."""
        return self.width * self.chunks


def rows_by_column(tile: int, groups: int, *, has_mean: bool, has_span: bool) -> bool:
    """How fragments of q are stored (``packed.load_rows``): as the registers allow, counted ahead of time."""
    return tile == 128 and not has_span and not (has_mean and groups > 1)


def label_programs(layout: PageLayout, groups: int, warps: int, stages: int, shared_bytes: int) -> int:
    """Programs of ``attend_labels_blocks_kernel`` that a multiprocessor with ``shared_bytes`` of shared memory holds.

    Shared memory of one: three one-hot matrices, what a share of tokens reads, a stage ahead or more, and its weights.

    >>> page = PageLayout(head_size=128, kv_heads=8, key_bits=2.0, value_bits=2.0, group_size=64)
    >>> label_programs(page, 16, 1, 3, 228 << 10), label_programs(page, 16, 1, 3, 164 << 10)
    (8, 7)
    """
    size, tokens = layout.head_size, LABEL_NUMBERS // layout.head_size
    columns = max(16, int(triton.next_power_of_2(groups)))
    codes = tokens * size * int(layout.key_bits + layout.value_bits) // 8
    read = codes + 4 * tokens * (columns + 1) + 2 * size
    shared = 6 * columns * size + max(1, stages - 1) * read + 16 * tokens + 1024
    return max(1, min(LABEL_WARPS // warps, shared_bytes // shared))


class TritonGpu:
    """Kernels for one device. Scratch is taken on the first step of a shape; warm up before capturing a CUDA graph."""

    name = "triton"

    def __init__(self, device: torch.device, *, subnormals: bool = True) -> None:
        """``subnormals`` False: for tensor cores that flush fp16 subnormals (none since V100 is known to)."""
        self.interpreted = not isinstance(attend_packed_kernel, triton.JITFunction)
        if device.type != "cuda" and not self.interpreted:
            raise BackendUnavailable(
                f"backend 'triton' needs an NVIDIA GPU, not {device}; TRITON_INTERPRET=1 runs it on the CPU, for tests only"
            )
        self.fp8, processors, self.shared_bytes = False, 1, 164 << 10
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):
                raise BackendUnavailable(f"backend 'triton' needs compute capability 8.0 or later, {device} has {capability}")
            self.fp8 = capability >= (8, 9)
            properties = torch.cuda.get_device_properties(device)
            processors, self.shared_bytes = properties.multi_processor_count, properties.shared_memory_per_multiprocessor
        self.programs = processors * WARPS_PER_SM
        self.stages = 2
        self.label_stages = 3
        self.label_warps = 2  # a program where there are more than 16 labels
        self.label_waves = 1.0  # programs of `reorder`, as a share of those that the device holds at once
        self.subnormals = subnormals
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
        splits = self._splits(columns, step, layout.tile)
        part, stat = self._partials("packed", columns, q, splits)
        if splits:
            self._attend_packed(q, pages, codec, step, columns, splits, part, stat)
        return self._finish(q, columns, full, step, (part, stat, splits), codec)

    def _attend_packed(
        self,
        q: Tensor,
        pages: PackedPages,
        codec: HeadCodec,
        step: Step,
        columns: Columns,
        splits: int,
        part: Tensor,
        stat: Tensor,
    ) -> None:
        layout = pages.layout
        size, groups, width = layout.head_size, layout.groups, columns.width
        programs = q.shape[0] * columns.chunks * columns.heads
        pad = 2 if width == 4 else 1
        key_bits, value_bits = bits_code(layout.key_bits), bits_code(layout.value_bits)
        key_normal, value_normal = not self.subnormals, not self.subnormals or value_bits in (4, 8)
        by_column = rows_by_column(layout.tile, groups, has_mean=codec.has_key_mean, has_span=_is_limited(step))
        rows = self.scratch.take("rows", programs * (2 if key_bits == 3 else 1) * size * width * pad, torch.float16)
        qsum = self.scratch.take("qsum", programs * groups * width, torch.float32)
        scale = self.scratch.take("scale", programs * 2, torch.float32)
        coefficient = turn = table = scale
        rope_scale = 1.0
        if codec.has_key_mean:
            tables = self.tables.rope(codec.rope, layout.tile, step.page_table.shape[1] * layout.tiles)
            turn, table, rope_scale = tables.turn, tables.table, tables.scale
            coefficient = self.scratch.take("coefficient", programs * size * width, torch.float32)
        prepare_heads_kernel[(columns.heads, q.shape[0] * columns.chunks)](
            q, codec.query_basis, codec.keys.unit, codec.key_mean, rows, qsum, scale, coefficient,
            columns.chunks, columns.queries, columns.repeat, rope_scale,
            D=size, BITS=key_bits, G=groups, NH=width, NORMAL=key_normal, META=1.0 if self.fp8 else 256.0,
            HAS_BASIS=codec.has_basis, HAS_MEAN=codec.has_key_mean,
            BY_COLUMN=by_column, ASM=not self.interpreted, num_warps=4,
        )  # fmt: skip
        attend_packed_kernel[(columns.heads, splits, q.shape[0] * columns.chunks)](
            rows, qsum, scale, coefficient, turn, table, pages.key_codes, pages.value_codes, pages.meta, codec.values.unit,
            part, stat, step.page_table, step.slots, step.packed, step.positions,
            *page_strides(pages), step.page_table.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
            step.span,
            D=size, KEY_BITS=key_bits, VALUE_BITS=value_bits, G=groups, NH=width, TILE=layout.tile, KEY_NORMAL=key_normal,
            VALUE_NORMAL=value_normal, HAS_SPAN=_is_limited(step), HAS_MEAN=codec.has_key_mean,
            BY_COLUMN=by_column, ASM=not self.interpreted, FP8=self.fp8, num_warps=1, num_stages=self.stages,
        )  # fmt: skip

    def attend_plain(self, q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
        kv_heads, size = pages.keys.shape[1], pages.keys.shape[3]
        if self._is_odd(size, 64):
            return reference.attend_plain(q, pages, full, step)
        columns = self._check(q, kv_heads, size, full, step)
        assert pages.keys.shape[2] == PAGE_TOKENS and pages.keys.stride()[2:] == (size, 1), pages.keys.stride()
        assert pages.values.stride() == pages.keys.stride(), (pages.values.stride(), pages.keys.stride())
        splits = self._splits(columns, step, SLOT_BLOCK, warps=4)
        part, stat = self._partials("packed", columns, q, splits)
        if splits:
            attend_plain_kernel[(kv_heads, splits, q.shape[0] * columns.chunks)](
                q, pages.keys, pages.values, step.page_table, step.slots, step.packed, step.positions, part, stat,
                pages.keys.stride(0), pages.keys.stride(1), step.page_table.stride(0), kv_heads, columns.chunks,
                columns.queries,
                columns.repeat, step.span, columns.total,
                D=size, NH=max(columns.width, 8), BLOCK=SLOT_BLOCK, WIDE=self.interpreted, num_warps=4, num_stages=3,
            )  # fmt: skip
        return self._finish(q, columns, full, step, (part, stat, splits), None)

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
        warps = (self.label_warps if groups > 16 else 1) if fast else 4
        held = label_programs(layout, groups, warps, self.label_stages, self.shared_bytes) if fast else LABEL_WARPS / warps
        splits = self._splits(columns, step, layout.tile, WARPS_PER_SM / (held * self.label_waves), whole=fast)
        part, stat = self._partials("packed", columns, q, splits)
        if splits:
            labels = self.tables.labels(codec, codec.key_labels, codec.value_labels, groups)
            places = LABEL_NUMBERS // layout.head_size if fast else layout.tile
            tables = self.tables.rope(codec.rope, places, step.page_table.shape[1] * (PAGE_TOKENS // places))
            shared = (
                pages.key_codes, pages.value_codes, pages.meta, codec.keys.unit, codec.values.unit,
                labels.key_labels, labels.value_labels, part, stat, step.page_table, step.slots, step.packed, step.positions,
                *page_strides(pages), step.page_table.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
                step.span, columns.total, tables.scale,
            )  # fmt: skip
            grid = (columns.heads, splits, q.shape[0] * columns.chunks)
            forms = {"D": layout.head_size, "G": layout.groups} | bits
            if fast:
                attend_labels_blocks_kernel[grid](
                    q, tables.bases, tables.table, *shared, groups, **forms,
                    NH=columns.width,
                    GROUPS=max(16, triton.next_power_of_2(groups)), SHARE=places,
                    HAS_SPAN=_is_limited(step), ASM=not self.interpreted, num_warps=warps, num_stages=self.label_stages,
                )  # fmt: skip
            else:
                attend_labels_kernel[grid](
                    q, tables.turn[6:], tables.places, *shared, **forms, NH=max(columns.width, 8), TILE=layout.tile,
                    num_warps=warps, num_stages=1,
                )  # fmt: skip
        return self._finish(q, columns, full, step, (part, stat, splits), None)

    def _finish(
        self,
        q: Tensor,
        columns: Columns,
        full: FullSlots,
        step: Step,
        packed: tuple[Tensor, Tensor, int],
        codec: HeadCodec | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend the full-precision slots and merge them with the packed partial sums."""
        batch, queries, heads, size = q.shape
        part, stat, splits = packed
        slots = full.positions.shape[1]
        full_splits = min(-(-slots // SLOT_BLOCK), 8)
        full_part, full_stat = self._partials("full", columns, q, full_splits)
        if full_splits:
            attend_slots_kernel[(columns.heads, full_splits, batch * columns.chunks)](
                q, full.keys, full.values, full.positions, step.slots, step.positions, full_part, full_stat,
                *full.keys.stride()[:3], full.positions.stride(0), columns.heads, columns.chunks, queries,
                columns.repeat, slots,
                step.span, columns.total,
                D=size, NH=max(columns.width, 8), BLOCK=SLOT_BLOCK, WIDE=self.interpreted, num_warps=4, num_stages=1,
            )  # fmt: skip
        out = torch.empty_like(q)
        lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
        has_basis = codec is not None and codec.has_basis
        basis, mean = (codec.output_basis, codec.value_mean) if codec is not None else (part, part)
        combine_kernel[(batch * queries * heads,)](
            part, stat, full_part, full_stat, basis, mean, out, lse, splits, full_splits, columns.total, queries, columns.heads,
            columns.repeat, D=size, BLOCK=16, HAS_BASIS=has_basis, num_warps=4,
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
        y_keys, y_values = (y.contiguous() for y in reference.encode_heads(codec, first, keys, values))
        sides = (codec.keys.unit, codec.keys.clip, codec.values.unit, codec.values.clip)
        if not (codec.keys.has_metric or codec.values.has_metric):
            launch_pack(pages, page_row, first, y_keys, y_values, sides, (y_keys,) * 4, retained, quantized=False)
            return
        (key, ks, km), (value, vs, vm) = (
            quantize_side(y, bits, side)
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

    def _splits(self, columns: Columns, step: Step, tile: int, warps: float = 1, *, whole: bool = False) -> int:
        """Splits that fill the device once, of at least two tiles; known to the host, whatever the lengths turn out.

        ``whole``: rather fewer than more, where a few programs left over would take as long again.
        """
        tiles = -(-step.max_packed // tile)
        wanted = self.programs / (warps * columns.heads * columns.chunks * len(step.slots))
        wanted = max(1, math.floor(wanted + 1e-6)) if whole else math.ceil(wanted)
        return min(wanted, -(-tiles // 2), MAX_SPLITS)

    def _partials(self, name: str, columns: Columns, q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
        """Sums [B, KH, columns, splits, D] and their maxima and weights [..., 2], float32."""
        rows = q.shape[0] * columns.heads * columns.total * splits
        part = self.scratch.take(f"{name} sums", rows * q.shape[3], torch.float32)
        return part, self.scratch.take(f"{name} statistics", rows * 2, torch.float32)

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
