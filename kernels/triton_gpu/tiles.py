# mypy: ignore-errors
# ruff: noqa: B007, N803, N806, RUF005, SIM102
"""Attention of one program over packed tiles. Products are taken of the codes themselves; nothing is dequantized."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.fragments import first_of_pairs, load_rows, weight_columns, zero_rows
from skvq.kernels.triton_gpu.loaders import has_normal_planes, perm4
from skvq.kernels.triton_gpu.metadata import metadata
from skvq.kernels.triton_gpu.overlap import prefetch, wait_for_inputs
from skvq.kernels.triton_gpu.pages import block_rows, code_bytes, in_page, middle
from skvq.kernels.triton_gpu.scores import key_scores, key_scores_trits, mean_scores
from skvq.kernels.triton_gpu.softmax import NEVER, exp2
from skvq.kernels.triton_gpu.sums import store_sums, value_share, value_trits


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
    KEY_HALF: tl.constexpr = middle(KEY_BITS)
    HALF: tl.constexpr = -0.5 if has_normal_planes(VALUE_BITS) else middle(VALUE_BITS)
    # weights are 2^SHIFT times too large, for fp16's sake: up to 2^15 * 448 / 256, three times that for trits
    SHIFT: tl.constexpr = (7.0 if FP8 else 15.0) - (2.0 if VALUE_BITS == 15 else 0.0)
    N: tl.constexpr = NH * KEY_PAD
    Q_ROWS: tl.constexpr = 2 * D if KEY_BITS == 3 else D

    program = (row * chunks + chunk) * heads + head
    h = tl.arange(0, NH)
    t = perm4(tl.arange(0, SHARE), ASM)
    if HAS_MEAN:
        j = tl.arange(0, D // 2)
        place = table_ptr + perm4(tl.arange(0, 32), ASM)[:, None] * D + j[None, :]
        place_cos, place_sin = tl.load(place), tl.load(place + D // 2)
        STEPS: tl.constexpr = SHARE // 32 if SHARES == 1 else 2
        step_cos = ()
        step_sin = ()
        for n in tl.static_range(1 if SHARES == 1 else 3):
            step = turn_ptr + (n * STEPS + tl.arange(0, STEPS))[None, :] * D + j[:, None]
            step_cos = step_cos + (tl.load(step),)
            step_sin = step_sin + (tl.load(step + D // 2),)

    query = tl.minimum((chunk * NH + h) // repeat, queries - 1)
    oldest = tl.load(positions_ptr + row * queries + query) - span + 1
    parts = tl.load(packed_ptr + row) // PART
    begin = 0
    if HAS_SPAN:
        begin = tl.minimum(tl.maximum(tl.min(oldest, 0), 0) // PART, parts)
    per_split = tl.cdiv(parts - begin, splits)
    start = begin + split * per_split
    stop = tl.minimum(start + per_split, parts)
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
        at = program * (D * NH) + j[:, None] * NH + h[None, :]
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

        # before or after the scores: whichever leaves the registers (counted ahead of time)
        if HAS_MEAN and (SHARES == 5 or G > 1):
            mean = mean_scores(
                turn_ptr + (6 + i) * D, place_cos, place_sin, step_cos, step_sin, cosines, sines, SHARES, STEPS, D, NH
            )
        raw = ()
        if KEY_BITS == 15:
            raw = key_scores_trits(key, q_low, N, D, G, ASM)
        else:
            for s in tl.static_range(SHARES):
                share = key_scores(key, s, q_low, q_high, D, KEY_BITS, G, TILE, SHARE, ASM)
                raw = raw + (share,)
        if HAS_MEAN and SHARES == 1 and G == 1:
            mean = mean_scores(
                turn_ptr + (6 + i) * D, place_cos, place_sin, step_cos, step_sin, cosines, sines, SHARES, STEPS, D, NH
            )
        words = ()
        for s in tl.static_range(SHARES):
            for g in tl.static_range(G):
                words = words + (tl.load(meta + g * TILE + s * SHARE + t),)
        scores = ()
        for s in tl.static_range(SHARES):
            word = words[s * G]
            ks, km = metadata(word, False, ASM, FP8)
            retained = (word & 0x80) != 0
            x = first_of_pairs(raw[s][0], SHARE, NH, KEY_PAD) * ks[:, None] + qsum[0][None, :] * (km - KEY_HALF * ks)[:, None]
            for g in tl.static_range(1, G):
                ks, km = metadata(words[s * G + g], False, ASM, FP8)
                x += (
                    first_of_pairs(raw[s][g], SHARE, NH, KEY_PAD) * ks[:, None]
                    + qsum[g][None, :] * (km - KEY_HALF * ks)[:, None]
                )
            if HAS_MEAN:
                x += mean[s] * mean_scale
            x = tl.where(retained[:, None], NEVER, x)
            if HAS_SPAN:
                x = tl.where(t[:, None] < (oldest - (i * PART + s * SHARE))[None, :], NEVER, x)
            scores = scores + (x,)

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
        scales = ()
        zeros = ()
        for s in tl.static_range(SHARES):
            for g in tl.static_range(G):
                vs, vm = metadata(words[s * G + g], True, ASM, FP8)
                scales = scales + (vs,)
                zeros = zeros + (vm - HALF * vs,)
        new_mids = ()
        for g in tl.static_range(G):
            mid = weights[0] * zeros[g][:, None]
            for s in tl.static_range(1, SHARES):
                mid += weights[s] * zeros[s * G + g][:, None]
            new_mids = new_mids + (mids[g] * alpha + tl.sum(mid, 0),)
        mids = new_mids
        factor = alpha
        if VALUE_PAD == 2:
            factor = tl.reshape(tl.join(alpha, alpha), [NH * 2])

        if VALUE_BITS == 15:
            low_sums = value_trits(value, weights, scales, factor[None, :], low_sums, D, G, NH, VALUE_PAD, ASM)
        else:
            for s in tl.static_range(SHARES):
                by_group = ()
                for g in tl.static_range(G):
                    w = weights[s] * scales[s * G + g][:, None]
                    by_group = by_group + (weight_columns(w, False, SHARE, NH, VALUE_PAD),)
                low_sums, high_sums = value_share(
                    value, s, by_group, factor[None, :] if s == 0 else 1.0, low_sums, high_sums, D, VALUE_BITS, G, TILE,
                    SHARE, ASM,
                )  # fmt: skip

    columns = chunks * NH
    out = ((row * heads + head) * columns + chunk * NH).to(tl.int64) * splits + split
    store_sums(
        part_ptr + out * D, low_sums, high_sums, mids, unit_ptr + head * G, D, VALUE_BITS, G, VALUE_EACH, NH, VALUE_PAD,
        1.0 if FP8 else 256.0, splits * D,
    )  # fmt: skip
    tl.store(stat_ptr + (out + h * splits) * 2, tl.where(m_i > NEVER * 0.5, m_i * scale - SHIFT, NEVER))
    tl.store(stat_ptr + (out + h * splits) * 2 + 1, l_i)
