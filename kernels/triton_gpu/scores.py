# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005, SIM108
"""Scores of packed keys: products of the queries with the codes themselves, scales and mids, what the mean of the keys adds."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.fragments import dots, first_of_pairs, load_planes, zero_rows
from skvq.kernels.triton_gpu.loaders import perm4
from skvq.kernels.triton_gpu.metadata import metadata
from skvq.kernels.triton_gpu.pages import block_rows, low_bits, middle, row_bytes
from skvq.kernels.triton_gpu.softmax import NEVER


@triton.jit
def bit_rows(base, ROWS: tl.constexpr, PERMUTED: tl.constexpr):
    """Planes of single bits, eight bytes a row, two planes to a tensor [ROWS, 16] float16.

    Column ``2 b + i`` of entry p is bit ``2 p + i`` of byte b. Every byte is loaded twice: ``pair_rows`` would avoid that, but
    of such operands Triton 3.7 multiplies one half twice.
    """
    r = perm4(tl.arange(0, ROWS), PERMUTED)
    c = tl.arange(0, 16)
    raw = tl.load(base + r[:, None] * 8 + (c // 2)[None, :])
    out = ()
    for p in tl.static_range(4):
        mask = ((1 << 2 * p) << (c % 2)).to(tl.uint8)[None, :]
        out = out + ((raw & mask).to(tl.uint16).to(tl.float16, bitcast=True),)
    return out


@triton.jit
def key_scores(
    base, SUB: tl.constexpr, q_low, q_high, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
    SHARE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``q . code`` of SHARE tokens, share SUB of a tile, before scales and mids: a tensor [SHARE, N] for each group."""
    low: tl.constexpr = low_bits(BITS)
    row: tl.constexpr = row_bytes(BITS, D)
    wide: tl.constexpr = block_rows(BITS, D, G)
    cumulative: tl.constexpr = BITS == 2 and G == 1
    part = load_planes(base, SUB * SHARE * row, SHARE, wide, row, row // wide, wide, low, cumulative, False, ASM, ASM)
    s = dots(part, q_low, zero_rows(G, SHARE, q_low[0].shape[1]))
    if BITS == 3:
        first: tl.constexpr = TILE * row + SUB * SHARE * (D // 8)
        if D == 64:
            part = bit_rows(base + first, SHARE, ASM)
        else:
            part = load_planes(base, first, SHARE, D // 8, D // 8, 1, 0, 1, False, False, ASM, ASM)
        s = dots(part, q_high, s)
    return s


@triton.jit
def key_scores_trits(base, q_low, N: tl.constexpr, D: tl.constexpr, G: tl.constexpr, ASM: tl.constexpr):
    """``q . code`` of a whole tile of trits, before scales and mids: for each of five shares a tensor [32, N] for each
    group.
    """
    prefix = zero_rows(5 * G, 32, N)
    for i in tl.static_range(D // 32):
        part = load_planes(base, i * 32, 32, 32, D, 1, 0, 15, False, False, ASM, ASM)
        new = ()
        for j in tl.static_range(5 * G):
            if j // 5 == i * G // (D // 32):
                new = new + (tl.dot(part[j % 5], q_low[i], prefix[j]),)
            else:
                new = new + (prefix[j],)
        prefix = new
    out = ()
    for k in tl.static_range(5):
        score = ()
        for g in tl.static_range(G):
            score = score + ((prefix[g * 5 + k] - 3.0 * prefix[g * 5 + k - 1]) if k > 0 else prefix[g * 5],)
        out = out + (score,)
    return out


@triton.jit
def load_turns(turn_ptr, table_ptr, D: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr, ASM: tl.constexpr):
    """What ``mean_scores`` needs of RoPE for every part: cosines and sines of 32 places [32, D/2], and tuples of those of
    steps of 32 tokens [D/2, steps].
    """
    STEPS: tl.constexpr = SHARE // 32 if SHARES == 1 else 2
    j = tl.arange(0, D // 2)
    place = table_ptr + perm4(tl.arange(0, 32), ASM)[:, None] * D + j[None, :]
    place_cos, place_sin = tl.load(place), tl.load(place + D // 2)
    step_cos = ()
    step_sin = ()
    for n in tl.static_range(1 if SHARES == 1 else 3):
        step = turn_ptr + (n * STEPS + tl.arange(0, STEPS))[None, :] * D + j[:, None]
        step_cos = step_cos + (tl.load(step),)
        step_sin = step_sin + (tl.load(step + D // 2),)
    return place_cos, place_sin, step_cos, step_sin


@triton.jit
def mean_scores(
    turn, turns, cosines, sines, SHARES: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, NH: tl.constexpr
):  # fmt: skip
    """``q . RoPE_t(mean)`` of the tokens of a part, up to a scale: a tuple of SHARES tensors [tokens, NH].

    With ``A`` and ``B`` [D/2, NH] (``cosines``, ``sines``, from ``prepare``) it is ``sum_j A_j cos(w_j t) + B_j sin(w_j t)``.
    Let t = base + 32 a + place: A and B are turned by the angle of ``base + 32 a``, for each step a, and multiplied with one
    table of 32 places (``turns``, as ``load_turns`` returns it). Pairs of steps share the columns of a product.
    """
    place_cos, place_sin, step_cos, step_sin = turns
    j = tl.arange(0, D // 2)
    base_cos, base_sin = tl.load(turn + j)[:, None], tl.load(turn + D // 2 + j)[:, None]
    out = ()
    if SHARES == 1 and SHARE == 128:
        cos = base_cos * step_cos[0] - base_sin * step_sin[0]  # [D/2, 4]
        sin = base_sin * step_cos[0] + base_cos * step_sin[0]
        cos = tl.expand_dims(tl.reshape(cos, [D // 2, 2, 2]), 2)  # [D/2, 2, 1, 2]
        sin = tl.expand_dims(tl.reshape(sin, [D // 2, 2, 2]), 2)
        a = tl.expand_dims(tl.expand_dims(cosines, 1), 3)  # [D/2, 1, NH, 1]
        b = tl.expand_dims(tl.expand_dims(sines, 1), 3)
        with_cos = tl.reshape((a * cos + b * sin).to(tl.float16), [D // 2, 4 * NH])
        with_sin = tl.reshape((b * cos - a * sin).to(tl.float16), [D // 2, 4 * NH])
        z = tl.dot(place_sin, with_sin, tl.dot(place_cos, with_cos))
        out = (tl.reshape(tl.permute(tl.reshape(z, [32, 2, NH, 2]), (1, 3, 0, 2)), [128, NH]),)
    else:
        for n in tl.static_range(3 if SHARES == 5 else 1):
            cos = tl.expand_dims(base_cos * step_cos[n] - base_sin * step_sin[n], 1)  # [D/2, 1, 2]
            sin = tl.expand_dims(base_sin * step_cos[n] + base_cos * step_sin[n], 1)
            a = tl.expand_dims(cosines, 2)  # [D/2, NH, 1]
            b = tl.expand_dims(sines, 2)
            with_cos = tl.reshape((a * cos + b * sin).to(tl.float16), [D // 2, 2 * NH])
            with_sin = tl.reshape((b * cos - a * sin).to(tl.float16), [D // 2, 2 * NH])
            z = tl.dot(place_sin, with_sin, tl.dot(place_cos, with_cos))
            first, second = tl.split(tl.reshape(z, [32, NH, 2]))
            out = out + (first, second)
        if SHARES == 1:
            out = (tl.reshape(tl.permute(tl.join(out[0], out[1]), (2, 0, 1)), [64, NH]),)
    return out


@triton.jit
def dequantized_scores(
    raw, words, qsum, mean, mean_scale, SHARES: tl.constexpr, SHARE: tl.constexpr, G: tl.constexpr, NH: tl.constexpr,
    BITS: tl.constexpr, HAS_MEAN: tl.constexpr, ASM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Scores of a part from its products with the codes, ``raw``, and its metadata ``words``: for each share a tensor [SHARE,
    NH], in which tokens that are retained elsewhere have NEVER.
    """
    PAD: tl.constexpr = 2 if NH == 4 else 1
    HALF: tl.constexpr = middle(BITS)
    out = ()
    for s in tl.static_range(SHARES):
        word = words[s * G]
        ks, km = metadata(word, False, ASM, FP8)
        retained = (word & 0x80) != 0
        x = first_of_pairs(raw[s][0], SHARE, NH, PAD) * ks[:, None] + qsum[0][None, :] * (km - HALF * ks)[:, None]
        for g in tl.static_range(1, G):
            ks, km = metadata(words[s * G + g], False, ASM, FP8)
            x += first_of_pairs(raw[s][g], SHARE, NH, PAD) * ks[:, None] + qsum[g][None, :] * (km - HALF * ks)[:, None]
        if HAS_MEAN:
            x += mean[s] * mean_scale
        out = out + (tl.where(retained[:, None], NEVER, x),)
    return out


@triton.jit
def within_span(scores, t, oldest, SHARES: tl.constexpr, SHARE: tl.constexpr):
    """Scores of a part with NEVER for tokens before ``oldest`` [NH], which is counted from its first token."""
    out = ()
    for s in tl.static_range(SHARES):
        out = out + (tl.where(t[:, None] < (oldest - s * SHARE)[None, :], NEVER, scores[s]),)
    return out
