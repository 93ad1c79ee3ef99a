"""What dense attention (``flash.py``) puts into AMX's tiles: its products are ``K q`` and ``V^T p`` of 32 queries at a time.

Keys, and values the other way round, are taken apart into the two parts that tiles hold (``amx.py``) once for all queries of a
task. Tokens there are not are zeros.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.amx import DEPTH, ROW, SIDE, STEP, TILE, clear, split_row, store_pairs, turn_tile
from skvq.kernels.numba_cpu.flash_simd import BLOCK, exp2, polynomial
from skvq.kernels.numba_cpu.flash_simd import STEP as LINE
from skvq.kernels.numba_cpu.numeric import HIDDEN, LARGEST_BITS, NOT_A_NUMBER
from skvq.kernels.numba_cpu.simd import FLOATS, I16, I32, I64, LANES, WORDS, _all, _at, _intrinsic, f32, host_features
from skvq.kernels.numba_cpu.tiles import FAST

PAIRS = DEPTH // 2
CHAINS = 4  # maxima in flight, to hide the latency of a comparison
EXP2 = (  # coefficients of a polynomial for 2^f, |f| <= 1/2, the highest power first
    1.3264726838369734e-3, 9.67151266532213e-3, 5.550733744445191e-2, 2.4022242084815493e-1, 6.931469775983331e-1, 1.0,
)  # fmt: skip


@njit(**FAST)
def queries_to_tiles(job, work, head, first, here, share, blocks):
    """Write the queries times log2(e)/sqrt(D) to ``w_q`` as tiles of B, ``[block][D / 32]``; empty lanes are zeros."""
    size = job.size
    factor = np.float32(1.4426950408889634 / np.sqrt(size))
    scaled = f32(work + job.w_row)
    for lane in range(blocks * BLOCK):
        at = work + job.w_turn + ROW * (lane % LANES)
        if lane < here * share:
            given = f32(job.q + (first + lane // share) * job.q_row + 4 * size * (head * share + lane % share))
            for d in range(size):
                scaled[d] = given[d] * factor
        else:
            for d in range(size):
                scaled[d] = np.float32(0)
        for s in range(size // DEPTH):
            split_row(work + job.w_row + 4 * DEPTH * s, at + 2 * TILE * s, at + 2 * TILE * s + TILE)
        if lane % LANES == LANES - 1:
            to = work + job.w_q + lane // BLOCK * size * LINE + TILE * (lane % BLOCK // LANES)
            for s in range(size // DEPTH):
                turn_tile(work + job.w_turn + 2 * TILE * s, ROW, to + STEP * s)
                turn_tile(work + job.w_turn + 2 * TILE * s + TILE, ROW, to + STEP * s + 2 * TILE)


@njit(**FAST)
def keys_to_tiles(keys, step, size, count, to):
    """``count`` keys ``step`` bytes apart as tiles of A, ``[count / 32][D / 32]``."""
    for token in range((count + SIDE - 1) // SIDE * SIDE):
        at = to + token // SIDE * (size // DEPTH) * STEP + ROW * (token % SIDE)
        for s in range(size // DEPTH):
            if token < count:
                split_row(keys + token * step + 4 * DEPTH * s, at + STEP * s, at + STEP * s + 2 * TILE)
            else:
                clear(at + STEP * s, ROW)
                clear(at + STEP * s + 2 * TILE, ROW)


@intrinsic
def pair_rows(typingctx, even, odd, large_to, small_to):
    """Numbers of two rows of sixteen float32 as the words of a row of two tiles: those of ``even`` in the low halves."""

    def codegen(context, builder, signature, args):
        even, odd, large_to, small_to = args
        rows = (builder.load(_at(builder, source, 0, FLOATS), align=4) for source in (even, odd))
        store_pairs(builder, *rows, *(_at(builder, to, 0, WORDS) for to in (large_to, small_to)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@njit(**FAST)
def values_to_tiles(job, work, values, count, to):
    """``count`` values, turned round, as tiles of A: channels are rows, ``[D / 32][count / 32]``."""
    size, steps = job.size, (count + DEPTH - 1) // DEPTH
    turn = work + job.w_turn
    for s in range(steps):
        for d in range(0, size, LANES):
            for p in range(PAIRS):
                even = values + (DEPTH * s + 2 * p) * job.value_row + 4 * d
                odd = even + job.value_row
                if DEPTH * s + 2 * p + 1 >= count:
                    odd = work + job.w_none
                    even = odd if DEPTH * s + 2 * p >= count else even
                pair_rows(even, odd, turn + ROW * p, turn + TILE + ROW * p)
            at = to + (d // SIDE * steps + s) * STEP + TILE * (d % SIDE // LANES)
            turn_tile(turn, ROW, at)
            turn_tile(turn + TILE, ROW, at + 2 * TILE)


def _exp2(context, builder, x):
    """2^x of sixteen finite x <= 0 within 2e-7; 0 far below."""
    if "+avx512f" not in host_features(context):
        return exp2(builder, x)
    module, zero = builder.module, ir.Constant(FLOATS, None)
    whole = builder.call(_intrinsic(module, "llvm.rint.v16f32", FLOATS, [FLOATS]), [x])
    p = polynomial(builder, builder.fsub(x, whole), EXP2)
    scale = _intrinsic(module, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, [FLOATS, FLOATS, FLOATS, I16, I32])
    return builder.call(scale, [p, whole, zero, ir.Constant(I16, -1), ir.Constant(I32, 4)])


def _larger(builder, a, b):
    """Of two FLOATS, or of two WORDS without a sign; b where a float is no number."""
    more = builder.fcmp_ordered(">", a, b) if a.type == FLOATS else builder.icmp_unsigned(">", a, b)
    return builder.select(more, a, b)


def _largest(builder, slots):
    values = [builder.load(slot) for slot in slots]
    while len(values) > 1:
        values = [_larger(builder, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@intrinsic
def soften_to_tiles(typingctx, scores, steps, tops, totals, acc, size, tiles):
    """As ``flash_simd.soften``, of ``steps`` times DEPTH rows of scores: weights are stored as tiles of B, ``[steps]``.

    Where no maximum has risen ``acc`` stays as it is.
    """

    def codegen(context, builder, signature, args):
        scores, steps, tops, totals, acc, size, tiles = args
        before, (best, most) = [builder.load(_at(builder, tops, ROW * half, FLOATS), align=4) for half in range(2)], [[], []]
        for half in range(2):
            for _ in range(CHAINS):
                best.append(cgutils.alloca_once_value(builder, before[half]))
                most.append(cgutils.alloca_once_value(builder, ir.Constant(WORDS, None)))  # bits of the largest magnitude
        with cgutils.for_range(builder, builder.mul(steps, ir.Constant(I64, DEPTH // CHAINS))) as loop:
            row = builder.add(scores, builder.mul(loop.index, ir.Constant(I64, CHAINS * LINE)))
            for n, (top, largest) in enumerate(zip(best, most, strict=True)):
                score = builder.load(_at(builder, row, LINE * (n % CHAINS) + ROW * (n // CHAINS), FLOATS), align=4)
                builder.store(_larger(builder, score, builder.load(top)), top)
                bits = builder.and_(builder.bitcast(score, WORDS), _all(0x7FFFFFFF))
                builder.store(_larger(builder, bits, builder.load(largest)), largest)
        for half in range(2):
            ours = slice(CHAINS * half, CHAINS * (half + 1))
            m_i, largest = (_largest(builder, slots[ours]) for slots in (best, most))
            broken = builder.icmp_unsigned(">", largest, _all(int(LARGEST_BITS)))
            alpha = _exp2(context, builder, builder.fsub(before[half], m_i))
            builder.store(m_i, _at(builder, tops, ROW * half, FLOATS), align=4)
            total = _at(builder, totals, ROW * half, FLOATS)
            l_i = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None))
            builder.store(builder.fmul(builder.load(total, align=4), alpha), l_i)
            with cgutils.for_range(builder, steps) as step:
                source = builder.add(scores, builder.mul(step.index, ir.Constant(I64, LINE * DEPTH)))
                target = builder.add(tiles, builder.mul(step.index, ir.Constant(I64, STEP)))
                with cgutils.for_range(builder, ir.Constant(I64, PAIRS)) as loop:
                    row = builder.add(source, builder.mul(loop.index, ir.Constant(I64, 2 * LINE)))
                    to = builder.add(target, builder.mul(loop.index, ir.Constant(I64, ROW)))
                    pair = [builder.load(_at(builder, row, LINE * i + ROW * half, FLOATS), align=4) for i in range(2)]
                    pair = [_exp2(context, builder, builder.fsub(score, m_i)) for score in pair]
                    builder.store(builder.fadd(builder.load(l_i), builder.fadd(*pair)), l_i)
                    store_pairs(builder, *pair, *(_at(builder, to, TILE * (half + part), WORDS) for part in (0, 2)))
            builder.store(builder.select(broken, ir.Constant(FLOATS, [1.0] * LANES), builder.load(l_i)), total, align=4)
            risen = builder.or_(broken, builder.fcmp_unordered("!=", alpha, ir.Constant(FLOATS, [1.0] * LANES)))
            some = builder.icmp_unsigned("!=", builder.bitcast(risen, I16), ir.Constant(I16, 0))
            with cgutils.for_range(builder, builder.select(some, size, ir.Constant(I64, 0))) as loop:
                row = builder.add(acc, builder.mul(loop.index, ir.Constant(I64, LINE)))
                scaled = builder.fmul(builder.load(_at(builder, row, ROW * half, FLOATS), align=4), alpha)
                scaled = builder.select(broken, _all(int(NOT_A_NUMBER)), builder.bitcast(scaled, WORDS))
                builder.store(scaled, _at(builder, row, ROW * half, WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@njit(**FAST)
def hide_rows(scores, count, steps):
    """Scores of tokens there are not, behind ``count`` that there are."""
    hidden = f32(scores + LINE * count)
    for i in range(BLOCK * (DEPTH * steps - count)):
        hidden[i] = HIDDEN
