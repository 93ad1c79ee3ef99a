# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""Decode attention over packed pages and full-precision slots, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import FullSlots, HeadCodec, PackedPages, Step
from skvq.kernels.triton_gpu.card import Card
from skvq.kernels.triton_gpu.forms import SLOT_BLOCK, VARYING, Columns, PackedForm, has_span
from skvq.kernels.triton_gpu.overlap import overlapping
from skvq.kernels.triton_gpu.pages import bits_code, page_strides
from skvq.kernels.triton_gpu.prepare import Prepared
from skvq.kernels.triton_gpu.slots import attend_slots
from skvq.kernels.triton_gpu.tiles import attend_tiles
from skvq.kernels.triton_gpu.workspace import Partials


@triton.jit(**VARYING)
def attend_packed_kernel(
    q_ptr, qsum_ptr, scale_ptr, coefficient_ptr, turn_ptr, table_ptr, key_ptr, value_ptr, meta_ptr, unit_ptr,
    part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    stride_pages_slot, heads, chunks, queries, repeat, span, splits,
    half_q_ptr, half_key_ptr, half_value_ptr, held_ptr, full_part_ptr, full_stat_ptr,
    stride_slot, stride_head, stride_token, stride_held, count, full_splits,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr, HAS_SPAN: tl.constexpr, HAS_MEAN: tl.constexpr,
    BY_COLUMN: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention over both regions of a sequence in one launch. For each kv head and chunk, ``full_splits`` programs take its
    full-precision slots, BLOCK at a time, and ``splits`` programs its packed tiles.

    Must follow ``prepare_heads_kernel`` in the stream: that kernel waits for all launched before it. So q, slots, page tables
    and positions are there, and ``attend_tiles`` has to wait only for what that kernel itself writes.
    """
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) // chunks
    chunk = tl.program_id(2) % chunks
    if split < full_splits:
        attend_slots(
            half_q_ptr, half_key_ptr, half_value_ptr, held_ptr, slots_ptr, positions_ptr, full_part_ptr, full_stat_ptr,
            stride_slot, stride_head, stride_token, stride_held, heads, queries, repeat, count, span, chunks * NH,
            head, row, chunk, split, full_splits, D, 8, BLOCK, not ASM,
        )  # fmt: skip
    else:
        attend_tiles(
            q_ptr, qsum_ptr, scale_ptr, coefficient_ptr, turn_ptr, table_ptr, key_ptr, value_ptr, meta_ptr, unit_ptr,
            part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
            stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
            stride_pages_slot, heads, chunks, queries, repeat, span, head, row, chunk, split - full_splits, splits,
            D, KEY_BITS, VALUE_BITS, G, NH, TILE, PART, HAS_SPAN, HAS_MEAN, BY_COLUMN, ASM, FP8,
            PDL,
        )  # fmt: skip


def launch_packed(
    card: Card, form: PackedForm, q: Tensor, prepared: Prepared, turn: Tensor, table: Tensor, pages: PackedPages,
    codec: HeadCodec, full: FullSlots, step: Step, columns: Columns, packed: Partials, held: Partials,
) -> None:  # fmt: skip
    """Partial softmaxes over packed tiles to ``packed``, in the stored basis, and over full-precision slots to ``held``.

    ``prepared`` is what ``launch_prepare`` made of this q. ``turn`` and ``table`` are those of ``RopeTables`` for parts of
    ``form.part`` tokens, or any tensor where the codec has no key mean.
    """
    layout = pages.layout
    options = {"maxnreg": form.registers} if form.registers and not card.interpreted else {}
    attend_packed_kernel[(columns.heads, held.splits + packed.splits, q.shape[0] * columns.chunks)](
        prepared.rows, prepared.sums, prepared.scales, prepared.coefficients, turn, table, pages.key_codes, pages.value_codes,
        pages.meta, codec.values.unit,
        packed.sums, packed.statistics, step.page_table, step.slots, step.packed, step.positions,
        *page_strides(pages), step.page_table.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
        step.span, packed.splits,
        q, full.keys, full.values, full.positions, held.sums, held.statistics, *full.keys.stride()[:3],
        full.positions.stride(0), full.positions.shape[1], held.splits,
        D=layout.head_size, KEY_BITS=bits_code(layout.key_bits), VALUE_BITS=bits_code(layout.value_bits), G=layout.groups,
        NH=columns.width, TILE=layout.tile, PART=form.part, HAS_SPAN=has_span(step), HAS_MEAN=codec.has_key_mean,
        BY_COLUMN=prepared.by_column, BLOCK=SLOT_BLOCK, ASM=not card.interpreted, FP8=card.fp8,
        num_warps=1, num_stages=form.stages, **overlapping(card.pdl), **options,
    )  # fmt: skip
