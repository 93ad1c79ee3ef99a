# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005
"""Decode attention over packed pages whose groups cross heads and whose keys are stored before RoPE (method ``reorder``)."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.dense import load_columns
from skvq.kernels.triton_gpu.pack import e4m3_decode
from skvq.kernels.triton_gpu.prepare import LOG2E
from skvq.kernels.triton_gpu.tiles import NEVER, load_planes, zero_rows
from skvq.kernels.triton_gpu.unpack import load_codes, load_meta


@triton.jit
def attend_labels_kernel(
    q_ptr, turn_ptr, table_ptr, key_ptr, value_ptr, meta_ptr, key_unit_ptr, value_unit_ptr, key_label_ptr, value_label_ptr,
    part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    stride_pages_slot, heads, chunks, queries, repeat, span, columns, rope_scale,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Partial attention of one kv head, one chunk of NH columns and one split of tiles, dequantized in registers.

    A key is turned by its place in the tile (a fixed table), the queries back by the tile's base: ``q . RoPE_(b+j)(k) =
    (RoPE_-b q) . RoPE_j(k)``. Reads the codes of its kv head and the metadata of all, which the other heads read too.
    """
    TILES: tl.constexpr = 1280 // TILE
    H: tl.constexpr = D // 2
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) // chunks
    chunk = tl.program_id(2) % chunks
    column = chunk * NH + tl.arange(0, NH)
    j = tl.arange(0, H)
    d = tl.arange(0, D)[None, :]
    s = tl.arange(0, 32)[:, None]
    q = load_columns(q_ptr, column, row, head, heads, queries, repeat, D).to(tl.float32) * (rope_scale * LOG2E / D**0.5)
    qa, qb = tl.split(tl.permute(tl.reshape(q, [2, H, NH]), (1, 2, 0)))
    now = tl.load(positions_ptr + row * queries + tl.minimum(column // repeat, queries - 1))
    oldest = now - span + 1
    tiles = tl.load(packed_ptr + row) // TILE
    begin = tl.minimum(tl.maximum(tl.min(oldest, 0), 0) // TILE, tiles)
    per_split = tl.cdiv(tiles - begin, tl.num_programs(1))
    start = begin + split * per_split
    stop = tl.minimum(start + per_split, tiles)
    row_ptr = pages_ptr + tl.load(slots_ptr + row) * stride_pages_slot
    label_a = tl.load(key_label_ptr + head * D + j)[None, :]
    label_b = tl.load(key_label_ptr + head * D + H + j)[None, :]
    label_v = tl.load(value_label_ptr + head * D + d)
    unit_a, unit_b, unit_v = tl.load(key_unit_ptr + label_a), tl.load(key_unit_ptr + label_b), tl.load(value_unit_ptr + label_v)
    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    acc = tl.zeros([D, NH], tl.float32)
    for i in range(start, stop):
        page = tl.load(row_ptr + i // TILES).to(tl.int64)
        key = key_ptr + page * stride_key_page + head * stride_key_head
        key += (i % TILES) * (32 * D if KEY_BITS == 15 else TILE * D * KEY_BITS // 8)
        value = value_ptr + page * stride_value_page + head * stride_value_head
        value += (i % TILES) * (32 * D if VALUE_BITS == 15 else TILE * D * VALUE_BITS // 8)
        meta = meta_ptr + page * stride_meta_page + (i % TILES) * (G * TILE)
        base_cos, base_sin = tl.load(turn_ptr + i * D + j)[:, None], tl.load(turn_ptr + i * D + H + j)[:, None]
        ra, rb = (qa * base_cos + qb * base_sin).to(tl.float16), (qb * base_cos - qa * base_sin).to(tl.float16)
        for share in range(TILE // 32):
            t = share * 32 + s
            cos = tl.load(table_ptr + t * D + j[None, :]).to(tl.float32)
            sin = tl.load(table_ptr + t * D + H + j[None, :]).to(tl.float32)
            ka = key_channels(key, meta, label_a, unit_a, share, s, t, j[None, :], stride_meta_head, D, KEY_BITS, G, TILE)
            kb = key_channels(key, meta, label_b, unit_b, share, s, t, H + j[None, :], stride_meta_head, D, KEY_BITS, G, TILE)
            x = tl.dot((ka * cos - kb * sin).to(tl.float16), ra)
            x = tl.dot((kb * cos + ka * sin).to(tl.float16), rb, x)
            flag = tl.load(meta + share * 32 + s) & 0x80
            at = i * TILE + t
            x = tl.where((flag == 0) & (at >= oldest[None, :]), x, NEVER)
            word = load_meta(meta, label_v, t, stride_meta_head, G, TILE) >> 16
            code = load_codes(value, share, s, d, D, VALUE_BITS, TILE, False).to(tl.float32)
            code -= ((3 if VALUE_BITS == 15 else 2**VALUE_BITS) - 1) / 2
            v = e4m3_decode((word >> 8) & 0xFF) * unit_v + e4m3_decode(word & 0xFF) * unit_v * code
            m_new = tl.maximum(m_i, tl.max(x, 0))
            alpha = tl.exp2(m_i - m_new)
            p = tl.exp2(x - tl.where(m_new > NEVER * 0.5, m_new, 0.0)[None, :])
            l_i = l_i * alpha + tl.sum(p, 0)
            acc = tl.dot(tl.trans(v.to(tl.float16)), p.to(tl.float16), acc * alpha[None, :])
            m_i = m_new
    out = ((row * heads + head) * columns + column).to(tl.int64) * tl.num_programs(1) + split
    inside = column < columns
    tl.store(part_ptr + out[None, :] * D + tl.arange(0, D)[:, None], acc, mask=inside[None, :])
    tl.store(stat_ptr + out * 2, m_i, mask=inside)
    tl.store(stat_ptr + out * 2 + 1, l_i, mask=inside)


@triton.jit
def key_channels(
    key, meta, label, unit, share, s, t, d, stride_meta_head, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Keys before RoPE of 32 tokens at the channels ``d`` [1, n], float32."""
    word = load_meta(meta, label, t, stride_meta_head, G, TILE)
    code = load_codes(key, share, s, d, D, BITS, TILE, True).to(tl.float32) - ((3 if BITS == 15 else 2**BITS) - 1) / 2
    return e4m3_decode((word >> 8) & 0xFF) * unit + e4m3_decode(word & 0x7F) * unit * code


@triton.jit
def one_hot(label, G: tl.constexpr, unit, WIDE: tl.constexpr):
    """[G, channels]: ``unit`` where a channel's label is the row, else 0; exact in bfloat16, as are bytes of metadata."""
    hot = tl.where(tl.arange(0, G)[:, None] == label[None, :], unit[None, :], 0.0)
    return hot if WIDE else hot.to(tl.bfloat16)


@triton.jit
def group_bytes(words, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """One byte of each metadata word as a number, exactly; the sign bit of a key scale is a flag and dropped by the caller."""
    value = e4m3_decode((words >> SHIFT) & 0xFF)
    return value if WIDE else value.to(tl.bfloat16)


@triton.jit
def attend_labels_blocks_kernel(
    q_ptr, turn_ptr, table_ptr, key_ptr, value_ptr, meta_ptr, key_unit_ptr, value_unit_ptr, key_label_ptr, value_label_ptr,
    part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    stride_pages_slot, heads, chunks, queries, repeat, span, columns, rope_scale, all_groups,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """``attend_labels_kernel`` for whole-bit codes of 2, 4 and 8 bits in tiles of 128, 32 tokens at a time.

    Scales and mids reach their channels through a dot with a one-hot matrix of the labels (units folded in), so each metadata
    byte is decoded once a token and group, not once a channel. GROUPS: groups of all kv heads, rounded up to a power of two.
    """
    TILE: tl.constexpr = 128
    H: tl.constexpr = D // 2
    KEY_ROW: tl.constexpr = D * KEY_BITS // 8
    VALUE_ROW: tl.constexpr = D * VALUE_BITS // 8
    KEY_EACH: tl.constexpr = KEY_ROW if KEY_ROW < 32 else 32
    VALUE_EACH: tl.constexpr = VALUE_ROW if VALUE_ROW < 32 else 32
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) // chunks
    chunk = tl.program_id(2) % chunks
    column = chunk * NH + tl.arange(0, NH)
    query = ((row * queries + column // repeat) * heads + head) * repeat + column % repeat
    real = column < queries * repeat
    now = tl.load(positions_ptr + row * queries + tl.minimum(column // repeat, queries - 1))
    oldest = now - span + 1
    tiles = tl.load(packed_ptr + row) // TILE
    begin = tl.minimum(tl.maximum(tl.min(oldest, 0), 0) // TILE, tiles)
    per_split = tl.cdiv(tiles - begin, tl.num_programs(1))
    start = begin + split * per_split
    stop = tl.minimum(start + per_split, tiles)
    row_ptr = pages_ptr + tl.load(slots_ptr + row) * stride_pages_slot
    e = tl.arange(0, KEY_EACH)
    t = tl.arange(0, 32)
    group = tl.arange(0, GROUPS)
    key_hot = ()
    q_blocks = ()
    for b in tl.static_range(D // KEY_EACH):
        label = tl.load(key_label_ptr + head * D + b * KEY_EACH + e)
        key_hot = key_hot + (one_hot(label, GROUPS, tl.load(key_unit_ptr + label), WIDE),)
        q = tl.load(q_ptr + query[None, :] * D + (b * KEY_EACH + e)[:, None], mask=real[None, :], other=0.0)
        q_blocks = q_blocks + (q.to(tl.float32) * (rope_scale * LOG2E / D**0.5),)
    value_hot = ()
    for b in tl.static_range(D // VALUE_EACH):
        label = tl.load(value_label_ptr + head * D + b * VALUE_EACH + tl.arange(0, VALUE_EACH))
        value_hot = value_hot + (tl.trans(one_hot(label, GROUPS, tl.load(value_unit_ptr + label), WIDE)),)
    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    sums = zero_rows(D // VALUE_EACH, VALUE_EACH, NH)
    for step in range(start * 4, stop * 4):
        i = step // 4
        share = step % 4
        page = tl.load(row_ptr + i // 10).to(tl.int64)
        key = key_ptr + page * stride_key_page + head * stride_key_head + (i % 10) * (TILE * KEY_ROW) + share * 32 * KEY_ROW
        value = value_ptr + page * stride_value_page + head * stride_value_head + (i % 10) * (TILE * VALUE_ROW) + share * 32
        meta = meta_ptr + page * stride_meta_page + (i % 10) * (G * TILE) + share * 32
        place = (group // G) * stride_meta_head + (group % G) * TILE
        words = tl.load(meta + place[None, :] + t[:, None], mask=(group < all_groups)[None, :], other=0)  # [32, GROUPS]
        flag = tl.load(meta + t) & 0x80
        ks, km = group_bytes(words & 0x7F, 0, WIDE), group_bytes(words, 8, WIDE)
        code = load_planes(
            key,
            0,
            32,
            KEY_EACH,
            KEY_ROW,
            1,
            KEY_ROW // KEY_EACH,
            KEY_EACH,
            KEY_BITS,
            2 ** (KEY_BITS - 1),
            False,
            True,
            False,
            False,
        )
        x = tl.zeros([32, NH], tl.float32)
        for b in tl.static_range(H // KEY_EACH):
            ka = label_channels(code[b], ks, km, key_hot[b], KEY_BITS, b * KEY_EACH // KEY_ROW)
            kb = label_channels(
                code[b + H // KEY_EACH], ks, km, key_hot[b + H // KEY_EACH], KEY_BITS, (b * KEY_EACH + H) // KEY_ROW
            )
            angle = table_ptr + (share * 32 + t)[:, None] * D + (b * KEY_EACH + e)[None, :]
            cos, sin = tl.load(angle).to(tl.float32), tl.load(angle + H).to(tl.float32)
            base_cos = tl.load(turn_ptr + i * D + b * KEY_EACH + e)[:, None]
            base_sin = tl.load(turn_ptr + i * D + H + b * KEY_EACH + e)[:, None]
            qa, qb = q_blocks[b], q_blocks[b + H // KEY_EACH]
            x = tl.dot((ka * cos - kb * sin).to(tl.float16), (qa * base_cos + qb * base_sin).to(tl.float16), x)
            x = tl.dot((kb * cos + ka * sin).to(tl.float16), (qb * base_cos - qa * base_sin).to(tl.float16), x)
        x = tl.where((flag == 0)[:, None] & (t[:, None] >= (oldest - step * 32)[None, :]), x, NEVER)
        m_new = tl.maximum(m_i, tl.max(x, 0))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(x - tl.where(m_new > NEVER * 0.5, m_new, 0.0)[None, :])
        l_i = l_i * alpha + tl.sum(p, 0)
        m_i = m_new
        words = tl.trans(words)
        vs, vm = group_bytes(words, 16, WIDE), group_bytes(words, 24, WIDE)
        code = load_planes(
            value,
            0,
            VALUE_EACH,
            32,
            TILE,
            1,
            VALUE_ROW // VALUE_EACH,
            VALUE_EACH * TILE,
            VALUE_BITS,
            2 ** (VALUE_BITS - 1),
            False,
            True,
            False,
            False,
        )
        weights = p.to(tl.float16)
        new = ()
        for b in tl.static_range(D // VALUE_EACH):
            scale, mid = tl.dot(value_hot[b], vs), tl.dot(value_hot[b], vm)
            v = (code[b].to(tl.float32) * (1.0 / 2 ** (VALUE_BITS * (b * VALUE_EACH // VALUE_ROW))) + 0.5) * scale + mid
            new = new + (tl.dot(v.to(tl.float16), weights, sums[b] * alpha[None, :]),)
        sums = new
    out = ((row * heads + head) * columns + column).to(tl.int64) * tl.num_programs(1) + split
    inside = column < columns
    for b in tl.static_range(D // VALUE_EACH):
        d = b * VALUE_EACH + tl.arange(0, VALUE_EACH)
        tl.store(part_ptr + out[None, :] * D + d[:, None], sums[b], mask=inside[None, :])
    tl.store(stat_ptr + out * 2, m_i, mask=inside)
    tl.store(stat_ptr + out * 2 + 1, l_i, mask=inside)


@triton.jit
def label_channels(code, scales, mids, hot, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Keys before RoPE of 32 tokens and one block of channels, float32, from centred codes times ``2^(BITS PLANE)``."""
    return (code.to(tl.float32) * (1.0 / 2 ** (BITS * PLANE)) + 0.5) * tl.dot(scales, hot) + tl.dot(mids, hot)
