# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: B007, N803, N806, RET505, RUF005, SIM108, SIM300
"""Queries made ready for packed pages, once a step: the basis applied, scaled to float16, stored in the order of the planes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import HeadCodec
from skvq.kernels.layout import PageLayout
from skvq.kernels.triton_gpu.card import Card
from skvq.kernels.triton_gpu.forms import VARYING, Columns
from skvq.kernels.triton_gpu.loaders import perm4
from skvq.kernels.triton_gpu.overlap import overlapping, wait_for_inputs
from skvq.kernels.triton_gpu.pages import bits_code, block_rows, low_bits, row_bytes
from skvq.kernels.triton_gpu.softmax import LOG2E
from skvq.kernels.triton_gpu.workspace import Scratch


@triton.jit
def power_of_two_scale(top):
    """(2^e, 2^-e), of which the first brings ``top`` into [2^11, 2^12)."""
    exponent = tl.minimum(tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 15), 250)
    return ((265 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 11) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_query(q_ptr, channel, column, real, row, head, queries, repeat, heads, D: tl.constexpr):
    """q float32 [channels, columns], zero where not ``real``.

    Column c is query head ``c % repeat`` of kv head ``head`` at query ``c // repeat``.
    """
    query = ((row * queries + column // repeat) * heads + head) * repeat + column % repeat
    return tl.load(q_ptr + query[None, :] * D + channel[:, None], mask=real[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_matrix(matrix_ptr, rows, D: tl.constexpr):
    """Rows ``rows`` of a matrix [D, D]."""
    return tl.load(matrix_ptr + rows[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def bfloat_parts(x, COUNT: tl.constexpr):
    """float32 numbers as a sum of COUNT bfloat16 numbers, the largest first: 8 bits each, cut off and not rounded."""
    out = ()
    for _ in tl.static_range(COUNT):
        bits = x.to(tl.uint32, bitcast=True)
        out = out + ((bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),)
        x = x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return out


@triton.jit
def near_dot(a, b, B_PARTS: tl.constexpr, WIDE: tl.constexpr):
    """``a b`` of float32 numbers of any range, on tensor cores by way of bfloat16: a to 16 bits, b to 8 * B_PARTS bits.

    Enough where the result is rounded to float16, which has 11. b needs as many bits as it came with: one part for bfloat16,
    two for float16.
    """
    if WIDE:
        return tl.dot(a, b, input_precision="ieee")
    else:
        a_parts = bfloat_parts(a, 2)
        b_parts = bfloat_parts(b, B_PARTS)
        y = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
        for j in tl.static_range(B_PARTS):
            for i in tl.static_range(2):
                y = tl.dot(a_parts[1 - i], b_parts[B_PARTS - 1 - j], y)  # the smallest products first
        return y


@triton.jit
def quarters(y, D: tl.constexpr, N: tl.constexpr):
    """The four quarters [D / 4, N] of the rows of y [D, N]."""
    first, second = tl.split(tl.permute(tl.reshape(y, [2, D // 2, N]), (1, 2, 0)))
    a, b = tl.split(tl.permute(tl.reshape(first, [2, D // 4, N]), (1, 2, 0)))
    c, d = tl.split(tl.permute(tl.reshape(second, [2, D // 4, N]), (1, 2, 0)))
    return (a, b, c, d)


@triton.jit
def fragment_places(r, c, EACH: tl.constexpr, N: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Where row ``r`` and column ``c`` of fragments of EACH rows and N columns are stored (``fragments.load_rows``)."""
    if BY_COLUMN:
        return (r // EACH * EACH * N + r % EACH)[:, None] + c[None, :] * EACH
    else:
        return r[:, None] * N + c[None, :]


@triton.jit(**VARYING)
def prepare_heads_kernel(
    q_ptr, basis_ptr, unit_ptr, mean_ptr, out_ptr, qsum_ptr, scale_ptr, coefficient_ptr,
    chunks, queries, repeat, rope_scale,
    D: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, NH: tl.constexpr, META: tl.constexpr,
    HAS_BASIS: tl.constexpr, HAS_MEAN: tl.constexpr, BY_COLUMN: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``query_basis q * unit`` in float16 for ``attend_tiles``, with its sums by group and its scales: one kv head and chunk.

    All NH columns of a program are scaled by one power of two, so that float16's exponent keeps 11 bits of every channel. Sums
    are those of the rounded numbers, so that a constant added to all codes cancels exactly. Rows are written a quarter of the
    head at a time: planes of 2 bits are quarters, so what belongs to one plane is done at once. With HAS_MEAN also the
    coefficients of ``scores.mean_scores``. META is ``Card.meta``. Reads NH rows of q and one [D, D] matrix, writes D rows of N
    halves, for keys of 3 bits 2 D.
    """
    PAD: tl.constexpr = 2 if NH == 4 else 1
    WIDE: tl.constexpr = 8 if NH == 4 else NH
    CUMULATIVE: tl.constexpr = BITS == 2 and G == 1
    LOW: tl.constexpr = low_bits(BITS)
    STEP: tl.constexpr = row_bytes(BITS, D)  # channels of a plane
    ROWS: tl.constexpr = 2 * D if BITS == 3 else D
    EACH: tl.constexpr = block_rows(BITS, D, G)
    BLOCK: tl.constexpr = D // 4
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    PARTS: tl.constexpr = 1 if DTYPE == tl.bfloat16 else (2 if DTYPE == tl.float16 else 3)
    head, heads, outer = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = outer // chunks
    program = outer * heads + head
    r = tl.arange(0, BLOCK)
    c = tl.arange(0, WIDE)
    column = (outer % chunks) * NH + c
    real = (c < NH) & (column < queries * repeat)
    used = (c < NH)[None, :]
    basis = basis_ptr + head * (D * D)
    channel = perm4(tl.arange(0, D), ASM)
    unit = tl.load(unit_ptr + head * G + channel // (D // G))[:, None]
    if HAS_BASIS:
        matrix = load_matrix(basis, channel, D)
    wait_for_inputs(PDL)
    if HAS_BASIS:
        every = load_query(q_ptr, tl.arange(0, D), column, real, row, head, queries, repeat, heads, D)
        y = near_dot(matrix, every, PARTS, not ASM) * unit
    else:
        y = load_query(q_ptr, channel, column, real, row, head, queries, repeat, heads, D) * unit
    up, down = power_of_two_scale(tl.max(tl.max(tl.abs(y), 1), 0))
    blocks = quarters(y, D, WIDE)
    one: tl.constexpr = 2.0**-24  # what the last bit of a subnormal half stands for
    sums = ()
    for g in tl.static_range(G):
        sums = sums + (tl.zeros([WIDE], tl.float32),)
    for i in tl.static_range(4):
        place = 2.0 ** -(i * BLOCK // STEP * LOW)
        fragment = blocks[i] * (up * place)
        weight = one / place
        if CUMULATIVE:
            # a field with all below it, x_p: code_p 4^p = x_p - x_(p-1), so row p takes q_p 4^-p - q_(p+1) 4^-(p+1)
            weight = one * (4.0 / place - 1.0) / 3.0
            if i < 3:
                fragment -= blocks[i + 1] * (up * 0.25 * place)
        rounded = fragment.to(tl.float16)
        at = fragment_places(i * BLOCK + r, c * PAD, EACH, NH * PAD, BY_COLUMN)
        tl.store(out_ptr + program * (ROWS * NH * PAD) + at, rounded, mask=used)
        weighted = rounded.to(tl.float32) * weight
        new = ()
        for g in tl.static_range(G):
            if i * BLOCK < (g + 1) * (D // G) and g * (D // G) < (i + 1) * BLOCK:
                of_group = ((i * BLOCK + r) // (D // G) == g)[:, None]
                new = new + (sums[g] + tl.sum(tl.where(of_group, weighted, 0.0), 0),)
            else:
                new = new + (sums[g],)
        sums = new
    for g in tl.static_range(G):
        tl.store(qsum_ptr + (program * G + g) * NH + c, sums[g], mask=c < NH)
    if BITS == 3:
        at_row = tl.arange(0, D)
        if D == 64:
            channel = (at_row // 16 * 2 + at_row % 2) * 8 + at_row % 16 // 2
        else:
            channel = perm4(at_row, ASM)
        unit = tl.load(unit_ptr + head * G + channel // (D // G))[:, None]
        if HAS_BASIS:
            y = near_dot(load_matrix(basis, channel, D), every, PARTS, not ASM) * unit
        else:
            y = load_query(q_ptr, channel, column, real, row, head, queries, repeat, heads, D) * unit
        at = fragment_places(at_row, c * PAD, 16, NH * PAD, BY_COLUMN)
        high = y * (up * 4.0 / tl.exp2((channel // (D // 8)).to(tl.float32)))[:, None]
        tl.store(out_ptr + program * (ROWS * NH * PAD) + D * NH * PAD + at, high.to(tl.float16), mask=used)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Queries of every kv head and chunk of columns as ``attend_tiles`` contracts them. In scratch memory."""

    rows: Tensor  # float16, D rows of a program, of keys of 3 bits 2 D
    sums: Tensor  # float32 [programs, G, columns]
    scales: Tensor  # float32 [programs, 2]: of the rows, and of the coefficients in units of it
    coefficients: Tensor  # float32 [programs, D, columns]: cosines and sines of the key mean; not written where there is none
    by_column: bool  # how rows are stored (``fragments.load_rows``)


def launch_prepare(
    card: Card, scratch: Scratch, q: Tensor, codec: HeadCodec, layout: PageLayout, columns: Columns, *, by_column: bool
) -> Prepared:
    """Queries [B, N, H, D] made ready for pages of this layout, in scratch memory: the next step overwrites them."""
    size, groups, width, bits = layout.head_size, layout.groups, columns.width, bits_code(layout.key_bits)
    programs = q.shape[0] * columns.chunks * columns.heads
    wide = max(width, 8)  # columns of the tensor core
    scales = scratch.take("scale", programs * 2, torch.float32)
    done = Prepared(
        rows=scratch.take("rows", programs * (2 if bits == 3 else 1) * size * wide, torch.float16),
        sums=scratch.take("qsum", programs * groups * width, torch.float32),
        scales=scales,
        coefficients=scratch.take("coefficient", programs * size * width, torch.float32) if codec.has_key_mean else scales,
        by_column=by_column,
    )
    prepare_heads_kernel[(columns.heads, q.shape[0] * columns.chunks)](
        q, codec.query_basis, codec.keys.unit, codec.key_mean, done.rows, done.sums, done.scales, done.coefficients,
        columns.chunks, columns.queries, columns.repeat, float(codec.rope.scale),
        D=size, BITS=bits, G=groups, NH=width, META=card.meta, HAS_BASIS=codec.has_basis, HAS_MEAN=codec.has_key_mean,
        BY_COLUMN=by_column, ASM=not card.interpreted, num_warps=8, **overlapping(card.pdl),
    )  # fmt: skip
    return done
