# mypy: ignore-errors
# ruff: noqa: B007, N803, N806, RUF005, SIM102
"""Attention of one program over packed tiles. Products are taken of the codes themselves; nothing is dequantized."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.fragments import load_rows, zero_rows
from skvq.kernels.triton_gpu.loaders import perm4
from skvq.kernels.triton_gpu.overlap import prefetch, wait_for_inputs
from skvq.kernels.triton_gpu.pages import block_rows, code_bytes, in_page
from skvq.kernels.triton_gpu.scores import (
    dequantized_scores,
    key_scores,
    key_scores_trits,
    load_turns,
    mean_scores,
    within_span,
)
from skvq.kernels.triton_gpu.softmax import NEVER, exp2, steps_of
from skvq.kernels.triton_gpu.sums import add_values, store_sums


@triton.jit
def attend_tiles(
    q_ptr, qsum_ptr, scale_ptr, coefficient_ptr, turn_ptr, table_ptr, key_ptr, value_ptr, meta_ptr, unit_ptr,
    part_ptr, stat_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr,
    stride_key_page, stride_key_head, stride_value_page, stride_value_head, stride_meta_page, stride_meta_head,
    stride_pages_slot, heads, chunks, queries, repeat, span, head, row, chunk, split, splits,
    D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr, HAS_SPAN: tl.constexpr, HAS_MEAN: tl.constexpr,
    BY_COLUMN: tl.constexpr, ASM: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial softmax(q k^T) v of one kv head, one chunk of NH columns and one split of a sequence's tiles.

    With ks, km, vs, vm scales and mids of keys and values and ``half`` the middle of the codes, the score of token t, up to
    the scale of ``prepare``, is ``sum_g ks_g (q_g . code) + (km_g - half ks_g) sum q_g [+ q . RoPE_t(mean)]`` over groups g.
    The weighted sum is ``sum_t p vs (code - half) + p vm``. Tokens are the rows of both products, columns their N = NH * PAD
    columns.

    One warp owns a program and takes PART tokens at a time: a tile, or half of one where keys have no single bits apart. Reads
    the codes and metadata of its tiles once, (key_bits + value_bits) D / 8 + 4 G bytes a token; writes NH rows of D + 2
    floats.
    """
    SHARES: tl.constexpr = 5 if TILE == 160 else 1
    SHARE: tl.constexpr = PART // SHARES
    PARTS: tl.constexpr = in_page(PART)
    KEY_PAD: tl.constexpr = 2 if NH == 4 else 1
    VALUE_PAD: tl.constexpr = 2 if NH == 4 or VALUE_BITS == 15 else 1
    KEY_EACH: tl.constexpr = block_rows(KEY_BITS, D, G)
    VALUE_EACH: tl.constexpr = block_rows(VALUE_BITS, D, G)
    KEY_PART: tl.constexpr = code_bytes(KEY_BITS, D, PART)
    VALUE_TILE: tl.constexpr = code_bytes(VALUE_BITS, D, TILE)
    # weights are 2^SHIFT times too large, for fp16's sake: up to 2^15 * 448 / 256, three times that for trits
    SHIFT: tl.constexpr = (7.0 if FP8 else 15.0) - (2.0 if VALUE_BITS == 15 else 0.0)
    N: tl.constexpr = NH * KEY_PAD
    Q_ROWS: tl.constexpr = 2 * D if KEY_BITS == 3 else D

    program = (row * chunks + chunk) * heads + head
    h = tl.arange(0, NH)
    t = perm4(tl.arange(0, SHARE), ASM)
    mean_scale = 0.0
    if HAS_MEAN:
        turns = load_turns(turn_ptr, table_ptr, D, SHARES, SHARE, ASM)

    query = tl.minimum((chunk * NH + h) // repeat, queries - 1)
    oldest = tl.load(positions_ptr + row * queries + query) - span + 1
    start, stop = steps_of(split, splits, tl.load(packed_ptr + row) // PART, oldest, PART, HAS_SPAN)
    row_ptr = pages_ptr + tl.load(slots_ptr + row) * stride_pages_slot
    page = tl.load(row_ptr + start // PARTS, mask=start < stop, other=0).to(tl.int64)
    if PDL:
        if start < stop:  # the first of what is read comes while the queries are prepared
            tile = start % PARTS // (TILE // PART)
            count = tl.minimum(in_page(TILE) - tile, 2)
            KEY_TILE: tl.constexpr = KEY_PART * (TILE // PART)
            prefetch(key_ptr + page * stride_key_page + head * stride_key_head + tile * KEY_TILE, count * KEY_TILE)
            prefetch(value_ptr + page * stride_value_page + head * stride_value_head + tile * VALUE_TILE, count * VALUE_TILE)
            prefetch(meta_ptr + page * stride_meta_page + head * stride_meta_head + tile * (G * TILE), count * (G * TILE * 4))

    wait_for_inputs(PDL)
    q_low = load_rows(q_ptr + program * (Q_ROWS * N), D, KEY_EACH, N, BY_COLUMN)
    q_high = ()
    if KEY_BITS == 3:
        q_high = load_rows(q_ptr + (program * Q_ROWS + D) * N, D, 16, N, BY_COLUMN)
    qsum = ()
    for g in tl.static_range(G):
        qsum = qsum + (tl.load(qsum_ptr + (program * G + g) * NH + h),)
    scale = tl.load(scale_ptr + program * 2)
    if HAS_MEAN:
        at = program * (D * NH) + tl.arange(0, D // 2)[:, None] * NH + h[None, :]
        cosines, sines = tl.load(coefficient_ptr + at), tl.load(coefficient_ptr + at + D // 2 * NH)
        mean_scale = tl.load(scale_ptr + program * 2 + 1)

    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    mids = ()
    for g in tl.static_range(G):
        mids = mids + (tl.zeros([NH], tl.float32),)
    low_sums = zero_rows(D // VALUE_EACH, VALUE_EACH, NH * VALUE_PAD)
    high_sums = zero_rows(D // 16 if VALUE_BITS == 3 else 0, 16, NH * VALUE_PAD)

    for i in range(start, stop):
        tile, first = i % PARTS // (TILE // PART), i % (TILE // PART) * PART
        key = key_ptr + page * stride_key_page + head * stride_key_head + (i % PARTS) * KEY_PART
        value = value_ptr + page * stride_value_page + head * stride_value_head + tile * VALUE_TILE + first
        meta = meta_ptr + page * stride_meta_page + head * stride_meta_head + tile * (G * TILE) + first
        # the next page is looked up a part ahead, so that no load waits for it
        page = tl.load(row_ptr + tl.minimum(i + 1, stop - 1) // PARTS).to(tl.int64)

        mean = ()  # before or after the scores: whichever leaves the registers (counted ahead of time)
        if HAS_MEAN and (SHARES == 5 or G > 1):
            mean = mean_scores(turn_ptr + (6 + i) * D, turns, cosines, sines, SHARES, SHARE, D, NH)
        raw = ()
        if KEY_BITS == 15:
            raw = key_scores_trits(key, q_low, N, D, G, ASM)
        else:
            for s in tl.static_range(SHARES):
                share = key_scores(key, s, q_low, q_high, D, KEY_BITS, G, TILE, SHARE, ASM)
                raw = raw + (share,)
        if HAS_MEAN and SHARES == 1 and G == 1:
            mean = mean_scores(turn_ptr + (6 + i) * D, turns, cosines, sines, SHARES, SHARE, D, NH)
        words = ()
        for s in tl.static_range(SHARES):
            for g in tl.static_range(G):
                words = words + (tl.load(meta + g * TILE + s * SHARE + t),)
        scores = dequantized_scores(raw, words, qsum, mean, mean_scale, SHARES, SHARE, G, NH, KEY_BITS, HAS_MEAN, ASM, FP8)
        if HAS_SPAN:
            scores = within_span(scores, t, oldest - i * PART, SHARES, SHARE)

        top = scores[0]
        for s in tl.static_range(1, SHARES):
            top = tl.maximum(top, scores[s])
        m_new = tl.maximum(m_i, tl.max(top, 0))
        alpha = exp2((m_i - m_new) * scale, ASM)
        base = SHIFT - tl.where(m_new > NEVER * 0.5, m_new, 0.0) * scale
        m_i = m_new
        weights = (exp2(scores[0] * scale + base[None, :], ASM),)
        total = weights[0]
        for s in tl.static_range(1, SHARES):
            p = exp2(scores[s] * scale + base[None, :], ASM)
            weights = weights + (p,)
            total += p
        l_i = l_i * alpha + tl.sum(total, 0)
        mids, low_sums, high_sums = add_values(
            value, words, weights, alpha, mids, low_sums, high_sums, D, VALUE_BITS, G, NH, TILE, SHARES, SHARE, ASM, FP8
        )

    columns = chunks * NH
    out = ((row * heads + head) * columns + chunk * NH).to(tl.int64) * splits + split
    store_sums(
        part_ptr + out * D, low_sums, high_sums, mids, unit_ptr + head * G, D, VALUE_BITS, G, VALUE_EACH, NH, VALUE_PAD,
        1.0 if FP8 else 256.0, splits * D,
    )  # fmt: skip
    tl.store(stat_ptr + (out + h * splits) * 2, tl.where(m_i > NEVER * 0.5, m_i * scale - SHIFT, NEVER))
    tl.store(stat_ptr + (out + h * splits) * 2 + 1, l_i)
