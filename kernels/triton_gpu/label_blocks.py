# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RUF005
"""Decode attention of method ``reorder`` in half precision, for the bit widths and the tile that matter.

Why it is as fast as it is. Lane-instructions per cached number, K2V2 with 16 groups, counted on sm_90: 4.31 in all.

    0.75  bytes to codes
    0.6   metadata of all groups: every kv head reads them all
    0.5   scales applied to the codes
    0.5   RoPE of the keys
    0.38  scales and mids of keys, scales of values brought to their channels, on the tensor core
    0.3   softmax
    0.25  RoPE of the queries, backwards
    0.13  the two products of attention
    0.1   one-hot matrices read
    0.8   addresses, copies, moves

The limit of 2.6, which keys before RoPE could keep otherwise, is out of reach where a group may have any channel. Sines and
cosines of half a share stay in registers; for the other half it is the queries that are turned, in columns that would idle
otherwise. A program takes 243 registers and 22 KB of shared memory, so an H100's multiprocessor holds eight and an A100's
seven. Every 16 groups more cost 1.6 instructions and 17 KB; with 64 a program is two warps (10.9 instructions), three a
multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import LabelCodec, PackedPages, Step
from skvq.kernels.triton_gpu.card import Card
from skvq.kernels.triton_gpu.forms import LABEL_STAGES, VARYING, Columns, LabelForm, has_span
from skvq.kernels.triton_gpu.fragments import weight_columns, zero_rows
from skvq.kernels.triton_gpu.label_parts import (
    channel_turns,
    key_one_hot,
    label_scores,
    store_label_sums,
    turned_queries,
    value_one_hot,
)
from skvq.kernels.triton_gpu.metadata import meta_halves
from skvq.kernels.triton_gpu.one_hot import in_raw, spread
from skvq.kernels.triton_gpu.pages import bits_code, in_page, page_strides
from skvq.kernels.triton_gpu.raised import load_raised
from skvq.kernels.triton_gpu.softmax import LOG2E, NEVER, exp2
from skvq.kernels.triton_gpu.workspace import LabelTables, Partials, RopeTables


@triton.jit(**VARYING)
def attend_labels_blocks_kernel(
    q_ptr, turn_ptr, table_ptr, key_ptr, value_ptr, meta_ptr, key_unit_ptr, value_unit_ptr, key_label_ptr, value_label_ptr,
    part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    stride_pages_slot, heads, chunks, queries, repeat, span, columns, rope_scale, all_groups,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, GROUPS: tl.constexpr,
    SHARE: tl.constexpr, HAS_SPAN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``attend_labels_kernel`` for codes of 2 and 4 bits, values also of 8, in tiles of 128 tokens. One warp owns a program.

    A program takes SHARE tokens at a time. A product with a one-hot matrix of the labels brings the scales and mids of all
    groups to their channels, already in the lanes where the tensor core wants the codes (``one_hot.in_place``). Two codes then
    cost one fused multiply-add for scale and mid, and two keys another two for RoPE, all in half precision. Mids of values are
    not brought to channels: they are weighted and summed by group.

    Every column of q comes twice, the second time turned back by SHARE / 2 tokens, so a table of PLACES = SHARE / 2 places
    serves all SHARE tokens. To keep what E4M3 holds within 16 bits, keys are counted in 2^13 times the larger unit of the two
    channels that RoPE pairs, and values in their own units; q and the final sums make up for it.

    GROUPS is the number of groups of all kv heads, rounded up to a power of two, at least 16; ``all_groups`` the number
    itself. Reads and writes what ``attend_labels_kernel`` does.
    """
    TILE: tl.constexpr = 128
    TILES: tl.constexpr = in_page(TILE)
    PLACES: tl.constexpr = SHARE // 2
    SHARES: tl.constexpr = TILE // SHARE
    PAD: tl.constexpr = 2 if NH == 4 else 1
    KEY_ROW: tl.constexpr = D * KEY_BITS // 8
    VALUE_ROW: tl.constexpr = D * VALUE_BITS // 8
    VALUE_EACH: tl.constexpr = VALUE_ROW if VALUE_ROW < 32 else 32
    PLANES: tl.constexpr = 8 // VALUE_BITS
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) // chunks
    chunk = tl.program_id(2) % chunks
    column = chunk * NH + tl.arange(0, NH)
    half = tl.arange(0, 2 * NH) % 2
    column_2 = chunk * NH + tl.arange(0, 2 * NH) // 2
    query_2 = ((row * queries + column_2 // repeat) * heads + head) * repeat + column_2 % repeat
    real_2 = column_2 < queries * repeat
    now = tl.load(positions_ptr + row * queries + tl.minimum(column // repeat, queries - 1))
    oldest = now - span + 1
    tiles = tl.load(packed_ptr + row) // TILE
    begin = 0  # as ``steps_of``; a call of it costs registers here, and on sm_90 spills
    if HAS_SPAN:
        begin = tl.minimum(tl.maximum(tl.min(oldest, 0), 0) // TILE, tiles)
    per_split = tl.cdiv(tiles - begin, tl.num_programs(1))
    start = begin + split * per_split
    stop = tl.minimum(start + per_split, tiles)
    row_ptr = pages_ptr + tl.load(slots_ptr + row) * stride_pages_slot
    t = tl.arange(0, SHARE)
    group = tl.minimum(tl.arange(0, GROUPS), all_groups - 1)  # the last again for those that no label names
    group_place = (group // G) * stride_meta_head + (group % G) * TILE
    unit = tl.max(tl.load(key_unit_ptr + tl.load(key_label_ptr + head * D + tl.arange(0, D))), 0)
    scale = unit * 8192.0
    key_labels, value_labels = key_label_ptr + head * D, value_label_ptr + head * D
    scale_hot, mid_hot = key_one_hot(key_labels, key_unit_ptr, D, KEY_BITS, GROUPS, ASM)
    q_blocks = turned_queries(
        q_ptr + query_2[None, :] * D, real_2, table_ptr + half[None, :] * (PLACES * D), key_labels, key_unit_ptr,
        rope_scale * LOG2E / D**0.5, unit, D,
    )  # fmt: skip
    value_hot = value_one_hot(value_labels, D, VALUE_BITS, GROUPS)
    cosines, sines = channel_turns(table_ptr, D, KEY_BITS, PLACES)
    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    sums = zero_rows(D // VALUE_EACH, VALUE_EACH, NH * PAD)
    mids = tl.zeros([GROUPS, NH * PAD], tl.float32)
    place_in_page = start % TILES * SHARES
    page_place, last_page = start // TILES, (stop - 1) // TILES
    page = tl.load(row_ptr + page_place, mask=start < stop, other=0).to(tl.int64)
    for step in range(start * SHARES, stop * SHARES):
        key = key_ptr + page * stride_key_page + (head * stride_key_head + place_in_page * (SHARE * KEY_ROW))
        tile, share = place_in_page // SHARES, place_in_page % SHARES
        value = value_ptr + page * stride_value_page + (head * stride_value_head + tile * (TILE * VALUE_ROW) + share * SHARE)
        meta = meta_ptr + page * stride_meta_page + (tile * (G * TILE) + share * SHARE)
        # the next page is looked up a share ahead, so that the loads of the next share are on their way meanwhile
        place_in_page += 1
        if place_in_page == TILES * SHARES:
            place_in_page = 0
            page_place = tl.minimum(page_place + 1, last_page)
        page = tl.load(row_ptr + page_place).to(tl.int64)
        flag = tl.load(meta + t) & 0x80
        words = tl.load(meta + group_place[:, None] + t[None, :])  # [GROUPS, SHARE]
        ks, km = meta_halves(tl.trans(words), False, ASM)  # times 2^-8
        km += ks * (0.5 - 2 ** (KEY_BITS - 1))
        x = label_scores(
            key, ks, km, scale_hot, mid_hot, q_blocks, turn_ptr + step * D, cosines, sines, SHARE, D, KEY_BITS, NH, ASM
        )
        near, far = tl.split(tl.reshape(x, [SHARE, NH, 2]))
        x = tl.where((t < PLACES)[:, None], near, far)
        x = tl.where((flag != 0)[:, None], NEVER, x)
        if HAS_SPAN:
            x = tl.where(t[:, None] < (oldest - step * SHARE)[None, :], NEVER, x)
        m_new = tl.maximum(m_i, tl.max(x, 0))
        alpha = exp2((m_i - m_new) * scale, ASM)
        weights = exp2(x * scale - (tl.where(m_new > NEVER * 0.5, m_new, 0.0) * scale)[None, :], ASM)
        l_i = l_i * alpha + tl.sum(weights, 0)
        m_i = m_new
        weights = weight_columns(weights, False, SHARE, NH, PAD)
        factor = alpha
        if PAD == 2:
            factor = tl.reshape(tl.join(alpha, tl.full([NH], 1.0, tl.float32)), [2 * NH])
        vs, vm = meta_halves(words, True, ASM)
        vm += vs * (0.5 - 2 ** (VALUE_BITS - 1))
        mids = tl.dot(vm, weights, mids * factor[None, :])
        vs = in_raw(vs, GROUPS, SHARE, ASM)
        new = ()
        for n in tl.static_range(D // VALUE_EACH):
            if n % PLANES == 0:
                code = load_raised(value + n // PLANES * (VALUE_EACH * TILE), VALUE_EACH, SHARE, TILE, VALUE_BITS, ASM)
            v = code[n % PLANES] * spread(value_hot[n], vs, VALUE_EACH, SHARE, ASM)
            new = new + (tl.dot(v, weights, sums[n] * factor[None, :]),)
        sums = new
    out = ((row * heads + head) * columns + column).to(tl.int64) * tl.num_programs(1) + split
    inside = column < columns
    store_label_sums(
        part_ptr + out[None, :] * D, sums, mids, inside, value_labels, value_unit_ptr, D, VALUE_BITS, GROUPS, NH, PAD
    )
    tl.store(stat_ptr + out * 2, tl.where(m_i > NEVER * 0.5, m_i * scale, NEVER), mask=inside)
    tl.store(stat_ptr + out * 2 + 1, l_i, mask=inside)


def launch_label_blocks(
    card: Card, form: LabelForm, q: Tensor, pages: PackedPages, codec: LabelCodec, labels: LabelTables, rope: RopeTables,
    step: Step, columns: Columns, packed: Partials,
) -> None:  # fmt: skip
    """Partial softmaxes over the packed tiles, in the model's own basis, to ``packed``.

    ``rope``: tables of stretches of ``form.places`` tokens.
    """
    layout, groups = pages.layout, pages.layout.kv_heads * pages.layout.groups
    attend_labels_blocks_kernel[(columns.heads, packed.splits, q.shape[0] * columns.chunks)](
        q, rope.bases, rope.table, pages.key_codes, pages.value_codes, pages.meta, codec.keys.unit, codec.values.unit,
        labels.key_labels, labels.value_labels, packed.sums, packed.statistics,
        step.page_table, step.slots, step.packed, step.positions,
        *page_strides(pages), step.page_table.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
        step.span, columns.total, rope.scale, groups,
        D=layout.head_size, KEY_BITS=bits_code(layout.key_bits), VALUE_BITS=bits_code(layout.value_bits), G=layout.groups,
        NH=columns.width, GROUPS=max(16, triton.next_power_of_2(groups)), SHARE=form.places,
        HAS_SPAN=has_span(step), ASM=not card.interpreted, num_warps=form.warps, num_stages=LABEL_STAGES,
    )  # fmt: skip
