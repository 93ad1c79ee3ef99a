# mypy: ignore-errors
# ruff: noqa: N803
"""Decode attention over packed pages and full-precision slots, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.slots import attend_slots
from skvq.kernels.triton_gpu.tiles import attend_tiles


@triton.jit(do_not_specialize=["splits", "full_splits"])
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
    """Both kinds of a sequence's regions in one launch: ``full_splits`` programs of a kv head and chunk take its 16-bit slots,
    BLOCK at a time, ``splits`` its packed tiles.

    The kernel before this one is ``prepare_heads_kernel``, which waits for all that was launched before it. So only what that
    kernel writes has to be waited for: q, slots, tables of pages and positions are there.
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
