"""Vector code of dense attention (``flash.py``), on blocks of 32 queries that lie side by side: a query is a lane."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.numeric import EXP2, HIDDEN, LARGEST_BITS, NOT_A_NUMBER
from skvq.kernels.numba_cpu.simd import FLOATS, I32, I64, LANES, WORDS, _all, _at, _intrinsic, _splat

BLOCK = 32  # queries
STEP = 4 * BLOCK  # bytes from one row of a block to the next


def polynomial(builder, f, coefficients):
    """Of sixteen numbers, the highest power first."""
    fma = _intrinsic(builder.module, "llvm.fmuladd.v16f32", FLOATS, [FLOATS] * 3)
    p = ir.Constant(FLOATS, [coefficients[0]] * LANES)
    for coefficient in coefficients[1:]:
        p = builder.call(fma, [p, f, ir.Constant(FLOATS, [coefficient] * LANES)])
    return p


def exp2(builder, x):
    """2^x of sixteen x <= 0 within 2e-7, 0 below 2^-126."""
    module, least = builder.module, ir.Constant(FLOATS, [-126.0] * LANES)
    seen = builder.fcmp_ordered(">=", x, least)
    x = builder.select(seen, x, least)
    whole = builder.call(_intrinsic(module, "llvm.rint.v16f32", FLOATS, [FLOATS]), [x])
    p = polynomial(builder, builder.fsub(x, whole), EXP2)
    power = builder.shl(builder.add(builder.fptosi(whole, WORDS), _all(127)), _all(23))
    value = builder.fmul(p, builder.bitcast(power, FLOATS))
    return builder.select(seen, value, ir.Constant(FLOATS, None))


@intrinsic
def soften(typingctx, scores, count, tops, totals, acc, size):
    """Turn ``count`` rows of scores, in units of log2, into weights, in place; rescale ``size`` rows of ``acc``.

    ``tops`` and ``totals``, 32 numbers each: running maxima and sums of weights. The sums of a query with a score that is no
    number, or infinite, become NaN (``softmax.take``).
    """

    def codegen(context, builder, signature, args):
        scores, count, tops, totals, acc, size = args
        for v in range(0, STEP, 4 * LANES):
            top, total = (_at(builder, address, v, FLOATS) for address in (tops, totals))
            before = builder.load(top, align=4)
            best = cgutils.alloca_once_value(builder, before)
            most = cgutils.alloca_once_value(builder, ir.Constant(WORDS, None))  # bits of the largest magnitude
            with cgutils.for_range(builder, count) as loop:
                row = builder.add(scores, builder.mul(loop.index, ir.Constant(I64, STEP)))
                score, held = builder.load(_at(builder, row, v, FLOATS), align=4), builder.load(best)
                builder.store(builder.select(builder.fcmp_ordered(">", score, held), score, held), best)
                bits = builder.and_(builder.load(_at(builder, row, v, WORDS), align=4), _all(0x7FFFFFFF))
                builder.store(
                    builder.select(builder.icmp_unsigned(">", bits, builder.load(most)), bits, builder.load(most)), most
                )
            broken = builder.icmp_unsigned(">", builder.load(most), _all(int(LARGEST_BITS)))
            m_i = builder.load(best)
            alpha = exp2(builder, builder.fsub(before, m_i))
            builder.store(m_i, top, align=4)
            l_i = cgutils.alloca_once_value(builder, builder.fmul(builder.load(total, align=4), alpha))
            with cgutils.for_range(builder, count) as loop:
                row = builder.add(scores, builder.mul(loop.index, ir.Constant(I64, STEP)))
                place = _at(builder, row, v, FLOATS)
                p = exp2(builder, builder.fsub(builder.load(place, align=4), m_i))
                builder.store(p, place, align=4)
                builder.store(builder.fadd(builder.load(l_i), p), l_i)
            builder.store(builder.select(broken, ir.Constant(FLOATS, [1.0] * LANES), builder.load(l_i)), total, align=4)
            with cgutils.for_range(builder, size) as loop:
                row = builder.add(acc, builder.mul(loop.index, ir.Constant(I64, STEP)))
                place = _at(builder, row, v, FLOATS)
                scaled = builder.bitcast(builder.fmul(builder.load(place, align=4), alpha), WORDS)
                to = _at(builder, row, v, WORDS)
                builder.store(builder.select(broken, _all(int(NOT_A_NUMBER)), scaled), to, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def hide(typingctx, scores, first, count, lows, highs):
    """Hide scores of tokens ``first .. first+count-1`` from queries that do not see them: query ``i`` sees ``lows[i]`` to
    ``highs[i] - 1``, int32."""

    def codegen(context, builder, signature, args):
        scores, first, count, lows, highs = args
        hidden = ir.Constant(FLOATS, [float(HIDDEN)] * LANES)
        for v in range(0, STEP, 4 * LANES):
            low, high = (builder.load(_at(builder, address, v, WORDS), align=4) for address in (lows, highs))
            with cgutils.for_range(builder, count) as loop:
                token = _splat(builder, builder.trunc(builder.add(first, loop.index), I32))
                seen = builder.and_(builder.icmp_signed(">=", token, low), builder.icmp_signed("<", token, high))
                row = builder.add(scores, builder.mul(loop.index, ir.Constant(I64, STEP)))
                place = _at(builder, row, v, FLOATS)
                builder.store(builder.select(seen, builder.load(place, align=4), hidden), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
