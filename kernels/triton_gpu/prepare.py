# mypy: ignore-errors
# ruff: noqa: N803, N806, RET505
"""Queries made ready for the packed pages: basis, scale and the order of the planes, once a step."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.loaders import perm4

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def power_of_two_scale(top):
    """(2^e, 2^-e) that brings ``top`` into [2^11, 2^12)."""
    exponent = tl.minimum(tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 15), 250)
    return ((265 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 11) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_query(q_ptr, channel, column, real, row, head, queries, repeat, heads, D: tl.constexpr):
    """q [channels, columns] float32: column c is query head ``c % repeat`` of kv head ``head`` at query ``c // repeat``."""
    query = ((row * queries + column // repeat) * heads + head) * repeat + column % repeat
    return tl.load(q_ptr + query[None, :] * D + channel[:, None], mask=real[None, :], other=0.0).to(tl.float32)


@triton.jit
def in_basis(q_ptr, basis, channel, column, real, row, head, queries, repeat, heads, D: tl.constexpr, HAS_BASIS: tl.constexpr):
    """Rows ``channel`` of ``basis q`` [channels, columns], float32; rows past D are zero."""
    inside = channel < D
    if HAS_BASIS:
        y = tl.zeros([channel.shape[0], column.shape[0]], tl.float32)
        for start in range(0, D, 32):
            d = start + tl.arange(0, 32)
            matrix = tl.load(basis + channel[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            q = load_query(q_ptr, d, column, real, row, head, queries, repeat, heads, D)
            y = tl.dot(matrix, q, y, input_precision="ieee")
        return y
    else:
        y = load_query(q_ptr, channel % D, column, real, row, head, queries, repeat, heads, D)
        return tl.where(inside[:, None], y, 0.0)


@triton.jit
def fragment_places(r, c, EACH: tl.constexpr, N: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Places of rows ``r`` and columns ``c`` in fragments of EACH rows and N columns."""
    if BY_COLUMN:
        return (r // EACH * EACH * N + r % EACH)[:, None] + c[None, :] * EACH
    else:
        return r[:, None] * N + c[None, :]


@triton.jit
def prepare_heads_kernel(
    q_ptr, basis_ptr, unit_ptr, mean_ptr, out_ptr, qsum_ptr, scale_ptr, coefficient_ptr,
    chunks, queries, repeat, rope_scale,
    D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, NORMAL: tl.constexpr, META: tl.constexpr,
    HAS_BASIS: tl.constexpr, HAS_MEAN: tl.constexpr, BY_COLUMN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows of ``query_basis q * unit`` in fp16 as ``attend_packed_kernel`` contracts them, their sums and scales.

    A program owns one kv head and one chunk of NH columns; all its columns share a power of two, so that fp16's exponents
    keep every channel at 11 bits. Sums are taken over the rounded rows: a constant code cancels exactly. Reads NH rows of q
    and one [D, D] matrix, writes D (3 bits: 2 D) rows of N halves.
    """
    PAD: tl.constexpr = 2 if NH == 4 else 1
    WIDE: tl.constexpr = 8 if NH == 4 else NH
    CUMULATIVE: tl.constexpr = BITS == 2 and G == 1 and not NORMAL
    LOW: tl.constexpr = 8 if BITS == 15 else (2 if BITS == 3 else BITS)
    STEP: tl.constexpr = D * LOW // 8
    ROWS: tl.constexpr = 2 * D if BITS == 3 else D
    EACH: tl.constexpr = 32 if BITS == 15 else (STEP if STEP < D // G else D // G)
    head, heads, outer = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = outer // chunks
    program = outer * heads + head
    r = tl.arange(0, D)
    c = tl.arange(0, WIDE)
    column = (outer % chunks) * NH + c
    real = (c < NH) & (column < queries * repeat)
    channel = perm4(r, ASM)
    unit = tl.load(unit_ptr + head * G + channel // (D // G))[:, None]
    basis = basis_ptr + head * (D * D)
    y = in_basis(q_ptr, basis, channel, column, real, row, head, queries, repeat, heads, D, HAS_BASIS) * unit
    up, down = power_of_two_scale(tl.max(tl.max(tl.abs(y), 1), 0))
    place = 1.0 / tl.exp2((channel // STEP * LOW).to(tl.float32))
    fragment = y * (up * place[:, None])
    weight = 1.0 / place
    if CUMULATIVE:
        # a field with all below it, x_p: code_p 4^p = x_p - x_(p-1), so row p takes q_p 4^-p - q_(p+1) 4^-(p+1)
        above = channel + STEP
        above = in_basis(q_ptr, basis, above, column, real, row, head, queries, repeat, heads, D, HAS_BASIS) * unit
        fragment -= above * (up * 0.25 * place[:, None])
        weight = (4.0 / place - 1.0) / 3.0
    rounded = fragment.to(tl.float16)
    at = fragment_places(r, c * PAD, EACH, NH * PAD, BY_COLUMN)
    used = (c < NH)[None, :]
    tl.store(out_ptr + program * (ROWS * NH * PAD) + at, rounded, mask=used)
    if BITS == 3:
        if D == 64:
            place_high = r % 16
            channel = (r // 16 * 2 + place_high % 2) * 8 + place_high // 2
        plane = channel // (D // 8)
        unit = tl.load(unit_ptr + head * G + channel // (D // G))[:, None]
        y = in_basis(q_ptr, basis, channel, column, real, row, head, queries, repeat, heads, D, HAS_BASIS) * unit
        at = fragment_places(r, c * PAD, 16, NH * PAD, BY_COLUMN)
        high = y * (up * 4.0 / tl.exp2(plane.to(tl.float32)))[:, None]
        tl.store(out_ptr + program * (ROWS * NH * PAD) + D * NH * PAD + at, high.to(tl.float16), mask=used)
    one: tl.constexpr = 1.0 if NORMAL else 2.0**-24
    weighted = rounded.to(tl.float32) * (weight * one)[:, None]
    for g in tl.static_range(G):
        total = tl.sum(tl.where((r // (D // G) == g)[:, None], weighted, 0.0), 0)
        tl.store(qsum_ptr + (program * G + g) * NH + c, total, mask=c < NH)
    scale = down * (LOG2E / D**0.5 * META / one)
    tl.store(scale_ptr + program * 2, scale)
    if HAS_MEAN:
        j = tl.arange(0, D // 2)
        qa = load_query(q_ptr, j, column, real, row, head, queries, repeat, heads, D)
        qb = load_query(q_ptr, j + D // 2, column, real, row, head, queries, repeat, heads, D)
        ma = (tl.load(mean_ptr + head * D + j) * rope_scale)[:, None]
        mb = (tl.load(mean_ptr + head * D + D // 2 + j) * rope_scale)[:, None]
        cos, sin = qa * ma + qb * mb, qb * ma - qa * mb
        up, down = power_of_two_scale(tl.max(tl.max(tl.maximum(tl.abs(cos), tl.abs(sin)), 1), 0))
        at = program * (D * NH) + j[:, None] * NH + c[None, :]
        tl.store(coefficient_ptr + at, cos * up, mask=used)
        tl.store(coefficient_ptr + at + D // 2 * NH, sin * up, mask=used)
        tl.store(scale_ptr + program * 2 + 1, down * (LOG2E / D**0.5) / scale)
