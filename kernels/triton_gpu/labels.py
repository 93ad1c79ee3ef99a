# mypy: ignore-errors
# ruff: noqa: N803, N806, RET505, RUF005
"""Decode attention over packed pages whose groups cross heads and whose keys are stored before RoPE (method ``reorder``)."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.dense import load_columns
from skvq.kernels.triton_gpu.loaders import IN_ORDER, meta_halves
from skvq.kernels.triton_gpu.pack import e4m3_decode
from skvq.kernels.triton_gpu.prepare import LOG2E
from skvq.kernels.triton_gpu.tiles import NEVER, load_planes, zero_rows
from skvq.kernels.triton_gpu.unpack import load_codes, load_meta


@triton.jit
def attend_labels_kernel(
    q_ptr, turn_ptr, place_ptr, key_ptr, value_ptr, meta_ptr, key_unit_ptr, value_unit_ptr, key_label_ptr, value_label_ptr,
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
        ra, rb = qa * base_cos + qb * base_sin, qb * base_cos - qa * base_sin
        for share in range(TILE // 32):
            t = share * 32 + s
            cos = tl.load(place_ptr + t * D + j[None, :])
            sin = tl.load(place_ptr + t * D + H + j[None, :])
            ka = key_channels(key, meta, label_a, unit_a, share, s, t, j[None, :], stride_meta_head, D, KEY_BITS, G, TILE)
            kb = key_channels(key, meta, label_b, unit_b, share, s, t, H + j[None, :], stride_meta_head, D, KEY_BITS, G, TILE)
            ta, tb = ka * cos - kb * sin, kb * cos + ka * sin
            if KEY_BITS == 8:  # fp16 would cut off what their last bits say
                x = tl.dot(ta, ra, input_precision="tf32x3")
                x = tl.dot(tb, rb, x, input_precision="tf32x3")
            else:
                x = tl.dot(ta.to(tl.float16), ra.to(tl.float16))
                x = tl.dot(tb.to(tl.float16), rb.to(tl.float16), x)
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
def one_hot(label, G: tl.constexpr, unit):
    """[G, channels] fp16: ``unit`` where a channel's label is the row, else 0; a power of two, hence exact."""
    return tl.where(tl.arange(0, G)[:, None] == label[None, :], unit[None, :], 0.0).to(tl.float16)


@triton.jit
def raw_place(i, ASM: tl.constexpr):
    """Where ``in_place`` finds the number of place ``i``: a dot that brings it out there needs no exchange of lanes."""
    if ASM:
        return (i & -16) | (((i >> 1) & 3) << 2) | (((i >> 3) & 1) << 1) | (i & 1)
    else:
        return i


@triton.jit
def in_place(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """``x`` [ROWS, COLUMNS] with its columns, made in the order of ``raw_place``, in their own order.

    A lane of a sum of the tensor core holds columns (2c, 2c+1) and (8+2c, 9+2c) of sixteen, of an operand made from bytes
    4c .. 4c+3. Columns exchanged accordingly, the sum is an operand where it stands.
    """
    if ASM:
        x = tl.reshape(x, [ROWS, COLUMNS // 16, 2, 4, 2])
        return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), [ROWS, COLUMNS])
    else:
        return x


@triton.jit
def spread(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """``a b`` in fp16, one term of each sum not zero."""
    if ASM:
        return in_place(tl.dot(a, b, out_dtype=tl.float16), ROWS, COLUMNS, ASM)
    else:
        return tl.dot(a, b).to(tl.float16)


@triton.jit
def attend_labels_blocks_kernel(
    q_ptr, turn_ptr, table_ptr, key_ptr, value_ptr, meta_ptr, key_unit_ptr, value_unit_ptr, key_label_ptr, value_label_ptr,
    part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    stride_pages_slot, heads, chunks, queries, repeat, span, columns, rope_scale, all_groups,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, GROUPS: tl.constexpr,
    SHARE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``attend_labels_kernel`` for codes of 2 and 4 bits, values also of 8, in tiles of 128, SHARE tokens at a time.

    A dot with a one-hot matrix of the labels (units folded in) brings scales and mids to their channels, already in the lanes
    where the tensor core wants the codes (``in_place``), so that a pair of codes takes a fused multiply-add for its scale and
    mid and two for its turn, all in half precision: keys of 8 bits would lose their last. GROUPS: groups of all kv heads,
    rounded up to a power of two, at least 16.
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
    raw_e = raw_place(tl.arange(0, KEY_EACH), ASM)
    t = tl.arange(0, SHARE)
    raw_t = raw_place(tl.arange(0, SHARE), ASM)
    CODES: tl.constexpr = IN_ORDER if ASM else False  # registers follow ``in_place``, bytes are no neighbours there
    group = tl.minimum(tl.arange(0, GROUPS), all_groups - 1)  # the last again for those that no label names
    key_hot = ()
    q_blocks = ()
    for b in tl.static_range(D // KEY_EACH):
        label = tl.load(key_label_ptr + head * D + b * KEY_EACH + raw_e)
        unit = tl.load(key_unit_ptr + label)
        key_hot = key_hot + (one_hot(label, GROUPS, unit * 256.0),)
        q = tl.load(q_ptr + query[None, :] * D + (b * KEY_EACH + e)[:, None], mask=real[None, :], other=0.0)
        q_blocks = q_blocks + ((q.to(tl.float32) * (rope_scale * LOG2E / D**0.5)).to(tl.float16),)
    value_hot = ()
    mid_hot = ()
    for b in tl.static_range(D // VALUE_EACH):
        label = tl.load(value_label_ptr + head * D + b * VALUE_EACH + tl.arange(0, VALUE_EACH))
        unit = tl.load(value_unit_ptr + label)
        value_hot = value_hot + (tl.trans(one_hot(label, GROUPS, unit)),)
        unit = unit * 2 ** (VALUE_BITS * (b * VALUE_EACH // VALUE_ROW))
        mid_hot = mid_hot + (tl.trans(one_hot(label, GROUPS, unit)),)
    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    sums = zero_rows(D // VALUE_EACH, VALUE_EACH, NH)
    for step in range(start * (TILE // SHARE), stop * (TILE // SHARE)):
        i = step // (TILE // SHARE)
        share = step % (TILE // SHARE)
        page = tl.load(row_ptr + i // 10).to(tl.int64)
        key = key_ptr + page * stride_key_page + head * stride_key_head + (i % 10) * (TILE * KEY_ROW) + share * SHARE * KEY_ROW
        value = value_ptr + page * stride_value_page + head * stride_value_head + (i % 10) * (TILE * VALUE_ROW) + share * SHARE
        meta = meta_ptr + page * stride_meta_page + (i % 10) * (G * TILE) + share * SHARE
        place = (group // G) * stride_meta_head + (group % G) * TILE
        flag = tl.load(meta + t) & 0x80
        turned = tl.load(meta + place[None, :] + t[:, None])  # [SHARE, GROUPS]
        ks, km = meta_halves(turned, False, ASM)
        km += 0.5 * ks
        code = load_planes(
            key, 0, SHARE, KEY_EACH, KEY_ROW, 1, KEY_ROW // KEY_EACH, KEY_EACH, KEY_BITS, 2 ** (KEY_BITS - 1), False, True,
            False, CODES,
        )  # fmt: skip
        x = tl.zeros([SHARE, NH], tl.float32)
        for b in tl.static_range(H // KEY_EACH):
            ka = label_channels(
                code[b], ks, km, key_hot[b], 1.0 / 2 ** (KEY_BITS * (b * KEY_EACH // KEY_ROW)), SHARE, KEY_EACH, ASM
            )
            kb = label_channels(
                code[b + H // KEY_EACH],
                ks,
                km,
                key_hot[b + H // KEY_EACH],
                1.0 / 2 ** (KEY_BITS * ((b * KEY_EACH + H) // KEY_ROW)),
                SHARE,
                KEY_EACH,
                ASM,
            )
            angle = table_ptr + (share * SHARE + t)[:, None] * D + (b * KEY_EACH + tl.arange(0, KEY_EACH))[None, :]
            cos, sin = tl.load(angle), tl.load(angle + H)
            base_cos = tl.load(turn_ptr + i * D + b * KEY_EACH + e).to(tl.float16)[:, None]
            base_sin = tl.load(turn_ptr + i * D + H + b * KEY_EACH + e).to(tl.float16)[:, None]
            qa, qb = q_blocks[b], q_blocks[b + H // KEY_EACH]
            x = tl.dot(ka * cos - kb * sin, qa * base_cos + qb * base_sin, x)
            x = tl.dot(kb * cos + ka * sin, qb * base_cos - qa * base_sin, x)
        x = tl.where((flag == 0)[:, None] & (t[:, None] >= (oldest - step * SHARE)[None, :]), x, NEVER)
        m_new = tl.maximum(m_i, tl.max(x, 0))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(x - tl.where(m_new > NEVER * 0.5, m_new, 0.0)[None, :])
        l_i = l_i * alpha + tl.sum(p, 0)
        m_i = m_new
        weights = p.to(tl.float16)
        words = tl.load(meta + place[:, None] + raw_t[None, :])  # [GROUPS, SHARE]
        vs, vm = meta_halves(words, True, ASM)
        vm += 0.5 * vs
        code = load_planes(
            value, 0, VALUE_EACH, SHARE, TILE, 1, VALUE_ROW // VALUE_EACH, VALUE_EACH * TILE, VALUE_BITS,
            2 ** (VALUE_BITS - 1), False, True, False, CODES,
        )  # fmt: skip
        new = ()
        for b in tl.static_range(D // VALUE_EACH):
            v = code[b] * spread(value_hot[b], vs, VALUE_EACH, SHARE, ASM) + spread(mid_hot[b], vm, VALUE_EACH, SHARE, ASM)
            new = new + (tl.dot(v, weights, sums[b] * alpha[None, :]),)
        sums = new
    out = ((row * heads + head) * columns + column).to(tl.int64) * tl.num_programs(1) + split
    inside = column < columns
    for b in tl.static_range(D // VALUE_EACH):
        d = b * VALUE_EACH + tl.arange(0, VALUE_EACH)
        y = sums[b] * (256.0 / 2 ** (VALUE_BITS * (b * VALUE_EACH // VALUE_ROW)))  # bytes were read 2^-8 times too small
        tl.store(part_ptr + out[None, :] * D + d[:, None], y, mask=inside[None, :])
    tl.store(stat_ptr + out * 2, m_i, mask=inside)
    tl.store(stat_ptr + out * 2 + 1, l_i, mask=inside)


@triton.jit
def label_channels(code, scales, mids, hot, PLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """Keys before RoPE of one block of channels, fp16."""
    return code * spread(scales * PLACE, hot, ROWS, COLUMNS, ASM) + spread(mids, hot, ROWS, COLUMNS, ASM)
