# mypy: ignore-errors
# ruff: noqa: N803, N806, RET505, RUF005
"""Weighted sums of packed values: products of softmax weights with the codes themselves, in the end sums of channels."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.fragments import dots_each, first_of_pairs, load_planes, weight_columns
from skvq.kernels.triton_gpu.loaders import has_normal_planes, pair_rows
from skvq.kernels.triton_gpu.metadata import metadata
from skvq.kernels.triton_gpu.pages import block_rows, low_bits, middle, row_bytes


@triton.jit
def value_share(
    base, SUB: tl.constexpr, weights, scale, low_sums, high_sums, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
    TILE: tl.constexpr, SHARE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The sums of every plane, times ``scale``, plus ``codes weights`` of share SUB of a tile: (low_sums, high_sums).

    ``high_sums`` are those of the single bits of values of 3 bits, else ().
    """
    low: tl.constexpr = low_bits(BITS)
    rows: tl.constexpr = row_bytes(BITS, D)
    wide: tl.constexpr = block_rows(BITS, D, G)
    cumulative: tl.constexpr = BITS == 2 and G == 1
    normal: tl.constexpr = has_normal_planes(BITS)
    part = load_planes(base, SUB * SHARE, wide, SHARE, TILE, rows // wide, wide * TILE, low, cumulative, normal, False, ASM)
    low_sums = dots_each(part, weights, scale, low_sums)
    if BITS == 3:
        part = load_planes(base, rows * TILE + SUB * SHARE, D // 8, SHARE, TILE, 1, 0, 1, False, False, False, ASM)
        if D == 64:
            part = pair_rows(part)
        high_sums = dots_each(part, weights, scale, high_sums)
    return low_sums, high_sums


@triton.jit
def value_trits(
    base, weights, scales, factor, sums, D: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The sums after one more tile of trits.

    Planes are prefixes D_k, so ``sum_k P_k (D_k - 3 D_(k-1)) = sum_k (P_k - 3 P_(k+1)) D_k`` with the weights P of share k.
    Those differences cancel, so they are given as two halves.
    """
    columns = ()
    for g in tl.static_range(G):
        for k in tl.static_range(5):
            w = weights[k] * scales[k * G + g][:, None]
            if k < 4:
                w -= 3.0 * (weights[k + 1] * scales[(k + 1) * G + g][:, None])
            columns = columns + (weight_columns(w, True, 32, NH, PAD),)
    out = ()
    for i in tl.static_range(D // 32):
        codes = load_planes(base, i * 1024, 32, 32, 32, 1, 0, 15, False, False, False, ASM)
        acc = sums[i] * factor
        for k in tl.static_range(5):
            acc = tl.dot(codes[k], columns[i * G // (D // 32) * 5 + k], acc)
        out = out + (acc,)
    return out


@triton.jit
def add_values(
    value, words, weights, alpha, mids, low_sums, high_sums, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
    NH: tl.constexpr, TILE: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr, ASM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Sums after the values of one more part, with ``weights`` [SHARE, NH] of each share: those of mids, ``mids`` [NH] by
    group, and those of codes. ``alpha`` [NH] is what the sums before are worth now.
    """
    PAD: tl.constexpr = 2 if NH == 4 or BITS == 15 else 1
    HALF: tl.constexpr = -0.5 if has_normal_planes(BITS) else middle(BITS)
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
    factor = alpha
    if PAD == 2:
        factor = tl.reshape(tl.join(alpha, alpha), [NH * 2])
    if BITS == 15:
        low_sums = value_trits(value, weights, scales, factor[None, :], low_sums, D, G, NH, PAD, ASM)
    else:
        for s in tl.static_range(SHARES):
            by_group = ()
            for g in tl.static_range(G):
                w = weights[s] * scales[s * G + g][:, None]
                by_group = by_group + (weight_columns(w, False, SHARE, NH, PAD),)
            low_sums, high_sums = value_share(
                value, s, by_group, factor[None, :] if s == 0 else 1.0, low_sums, high_sums, D, BITS, G, TILE, SHARE, ASM
            )
    return new_mids, low_sums, high_sums


@triton.jit
def high_rows(y, PLANE: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr):
    """Sums [16, NH] over the single bits of values of 3 bits, by channel, times 4, which is what that bit is worth."""
    y = first_of_pairs(y, 16, NH, PAD)
    if D == 64:
        a, b = tl.split(tl.permute(tl.reshape(y, [8, 2, NH]), (0, 2, 1)))
        a, b = a * (4.0 / 4**PLANE), b * (2.0 / 4**PLANE)
        return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), [16, NH])
    else:
        return y * (4.0 / 2**PLANE)


@triton.jit
def store_sums(
    out, low_sums, high_sums, mids, unit_ptr, D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    NH: tl.constexpr, PAD: tl.constexpr, META: tl.constexpr, stride_column,
):  # fmt: skip
    """Write ``(sum p vs (code - half) + p vm) * unit`` of every channel to ``out``: NH rows of D, ``stride_column`` apart.

    Takes what the loop has summed: ``low_sums`` and ``high_sums`` by plane, of codes as loaded, and ``mids`` [NH] by group.
    """
    low: tl.constexpr = low_bits(BITS)
    blocks: tl.constexpr = row_bytes(BITS, D) // EACH
    cumulative: tl.constexpr = BITS == 2 and G == 1
    one: tl.constexpr = 1.0 if has_normal_planes(BITS) else 16777216.0
    h = tl.arange(0, NH)
    r = tl.arange(0, EACH)
    for i in tl.static_range(len(low_sums)):
        x = low_sums[i]
        if cumulative and i > 0:
            x = x - low_sums[i - 1]
        if BITS == 15:
            x, rest = tl.split(tl.reshape(x, [EACH, NH, 2]))
            x += rest
        else:
            x = first_of_pairs(x, EACH, NH, PAD)
        x = x * (one / (1 if BITS == 15 else 2 ** (low * (i // blocks))))
        if BITS == 3:
            if EACH == 32:
                above = high_rows(high_sums[2 * i], 2 * i, NH, PAD, D), high_rows(high_sums[2 * i + 1], 2 * i + 1, NH, PAD, D)
                x += one * tl.reshape(tl.permute(tl.join(above[0], above[1]), (2, 0, 1)), [32, NH])
            else:
                x += one * high_rows(high_sums[i], i, NH, PAD, D)
        x = (x + mids[i * EACH // (D // G)][None, :]) * (tl.load(unit_ptr + i * EACH // (D // G)) * META)
        tl.store(out + h[None, :] * stride_column + (i * EACH + r)[:, None], x)
