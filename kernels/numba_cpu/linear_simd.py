"""Vector code of the block-quantized matrices: sixteen rows side by side, one block of 32 columns at a time.

Only ``_multiply_pairs`` names instructions: ``vpdpwssd`` (AVX-512 VNNI), ``vpmaddwd`` (AVX2), or plain integer arithmetic. All
three give the same integers. Addresses are int64. How a block lies in memory: ``linear_pack.py``.
"""

# mypy: ignore-errors
from __future__ import annotations

from itertools import islice

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.ggml.formats import BLOCK
from skvq.kernels.numba_cpu.block_format import FORMATS, LANES, LaneFormat
from skvq.kernels.numba_cpu.block_parts import PAIRS, by_kind, code_pairs, places_of, scales_of
from skvq.kernels.numba_cpu.simd import (
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    WORDS,
    _all,
    _at,
    _intrinsic,
    _pick,
    _splat,
    _sum,
    host_features,
)

TOGETHER = 4  # vectors that share one unpacking
CHAINS = 4  # integer sums in flight, to hide the latency of a multiply-add


def _multiply_pairs(builder, features, total, codes, pair):
    """``total[i] + codes[2 i] * pair[2 i] + codes[2 i + 1] * pair[2 i + 1]``: 16-bit integers in WORDS."""
    module = builder.module
    if {"+avx512vnni", "+avx512f"} <= features:
        name = "llvm.x86.avx512.vpdpwssd.512"
        return builder.call(_intrinsic(module, name, WORDS, [WORDS] * 3), [total, codes, pair])
    if "+avx512bw" in features:
        product = _intrinsic(module, "llvm.x86.avx512.pmaddw.d.512", WORDS, [PAIRS] * 2)
        return builder.add(total, builder.call(product, [builder.bitcast(codes, PAIRS), builder.bitcast(pair, PAIRS)]))
    if "+avx2" in features:
        half, shorts = ir.VectorType(I32, 8), ir.VectorType(I16, 16)
        product = _intrinsic(module, "llvm.x86.avx2.pmadd.wd", half, [shorts, shorts])
        parts = []
        for start in (0, 8):
            lanes = range(start, start + 8)
            c, x = (builder.bitcast(_pick(builder, v, v, lanes), shorts) for v in (codes, pair))
            parts.append(builder.call(product, [c, x]))
        return builder.add(total, _pick(builder, parts[0], parts[1], range(16)))
    for shift in (16, 0):
        c, x = (builder.ashr(builder.shl(v, _all(shift)), _all(16)) for v in (codes, pair))
        total = builder.add(total, builder.mul(c, x))
    return total


def dot_body(form: LaneFormat, vectors: int):
    """``(matrix, blocks, rounded, step, out)``: sixteen rows times rounded vectors, float32 [vectors, 16] to ``out``.

    A rounded vector is ``[blocks][32]`` 16-bit integers, ``[blocks]`` scales, ``[blocks]`` sums, ``[blocks]`` sums of the first
    half; the next is ``step`` bytes on. Codes are unpacked once for all of them.
    """
    chains = CHAINS if vectors == 1 else 1

    def body(context, builder, matrix, blocks, rounded, step, out):
        features = host_features(context)
        starts = [builder.add(rounded, builder.mul(ir.Constant(I64, n), step)) for n in range(vectors)]
        scales_at, sums_at, firsts_at = (builder.mul(blocks, ir.Constant(I64, 2 * BLOCK + n)) for n in (0, 4, 8))
        acc = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES)) for _ in range(vectors)]
        with cgutils.for_range(builder, blocks) as loop:
            block, heads = places_of(builder, form, matrix, loop.index)
            place = builder.mul(loop.index, ir.Constant(I64, 2 * BLOCK))
            four = builder.mul(loop.index, ir.Constant(I64, 4))
            x = [builder.add(start, place) for start in starts]
            scales = [builder.load(_at(builder, builder.add(s, scales_at), four, F32), align=4) for s in starts]
            sums = [builder.load(_at(builder, builder.add(s, sums_at), four, I32), align=4) for s in starts]
            sums_of_parts = [sums]
            if form.parts == 2:
                firsts = [builder.load(_at(builder, builder.add(s, firsts_at), four, I32), align=4) for s in starts]
                sums_of_parts = [firsts, [builder.sub(whole, first) for whole, first in zip(sums, firsts, strict=True)]]
            pairs = enumerate(code_pairs(builder, form, block))
            parts = []
            for sums_of_part in sums_of_parts:
                totals = [[_from_offset(builder, form, s), *[ir.Constant(WORDS, None)] * (chains - 1)] for s in sums_of_part]
                for p, codes in islice(pairs, BLOCK // 2 // form.parts):
                    for total, source in zip(totals, x, strict=True):
                        pair = _splat(builder, builder.load(_at(builder, source, 4 * p, I32), align=4))
                        total[p % chains] = _multiply_pairs(builder, features, total[p % chains], codes, pair)
                parts.append([_sum(builder, total) for total in totals])
            units, low = scales_of(context, builder, form, block, heads)
            for n, (slot, scale, whole) in enumerate(zip(acc, scales, sums, strict=True)):
                result = builder.load(slot)
                for totals, unit in zip(parts, units, strict=True):
                    term = builder.fmul(builder.sitofp(totals[n], FLOATS), _splat(builder, scale))
                    result = builder.fadd(result, builder.fmul(term, unit, flags=("contract",)), flags=("contract",))
                if low is not None:
                    sum_x = _splat(builder, builder.fmul(scale, builder.sitofp(whole, F32)))
                    result = builder.fadd(result, builder.fmul(low, sum_x, flags=("contract",)), flags=("contract",))
                builder.store(result, slot)
        for n, slot in enumerate(acc):
            builder.store(builder.load(slot), _at(builder, out, 4 * LANES * n, FLOATS), align=4)

    return body


def _from_offset(builder, form, sum_x):
    """Start of the sum over ``code * x``: ``-offset * sum(x)``, which subtracts ``offset`` from every code."""
    if not form.offset:
        return ir.Constant(WORDS, None)
    return _splat(builder, builder.mul(sum_x, ir.Constant(I32, -form.offset)))


@intrinsic
def round_block(typingctx, source, pairs, scale_to, sum_to, first_to):
    """Round 32 float32 to 16-bit integers ``x / scale`` with ``scale = max |x| / 32767``.

    Stores them, the scale, their sum, and the sum of the first sixteen. NaN and infinity turn the scale into NaN or infinity,
    so that they show in the result.
    """

    def codegen(context, builder, signature, args):
        source, pairs, scale_to, sum_to, first_to = args
        module, shorts = builder.module, ir.VectorType(I16, LANES)
        x = [builder.load(_at(builder, source, 64 * v, FLOATS), align=4) for v in (0, 1)]
        sizes = [builder.and_(builder.bitcast(v, WORDS), _all(0x7FFFFFFF)) for v in x]
        larger = builder.select(builder.icmp_unsigned(">", *sizes), *sizes)  # ordered as integers, NaN above all
        reduce = _intrinsic(module, "llvm.vector.reduce.umax.v16i32", I32, [WORDS])
        bits = builder.call(reduce, [larger])
        most = builder.bitcast(bits, F32)
        tiny = builder.icmp_unsigned("<", bits, ir.Constant(I32, 0x0DA24260))  # 1e-30: nothing, and 1 / scale stays finite
        scale = builder.fmul(most, ir.Constant(F32, 1.0 / 32767))
        inverse = builder.fdiv(ir.Constant(F32, 32767.0), most)
        zero = ir.Constant(F32, 0.0)
        scale, inverse = builder.select(tiny, zero, scale), builder.select(tiny, zero, inverse)
        rint = _intrinsic(module, "llvm.rint.v16f32", FLOATS, [FLOATS])
        whole = []
        for v in (0, 1):
            rounded = builder.call(rint, [builder.fmul(x[v], _splat(builder, inverse))])
            whole.append(builder.fptosi(rounded, WORDS))
            builder.store(builder.trunc(whole[v], shorts), _at(builder, pairs, 32 * v, shorts), align=2)
        add = _intrinsic(module, "llvm.vector.reduce.add.v16i32", I32, [WORDS])
        builder.store(scale, _at(builder, scale_to, 0, F32), align=4)
        builder.store(builder.call(add, [builder.add(*whole)]), _at(builder, sum_to, 0, I32), align=4)
        builder.store(builder.call(add, [whole[0]]), _at(builder, first_to, 0, I32), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


DOT = [dot_body(form, 1) for form in FORMATS.values()]
DOTS = [dot_body(form, TOGETHER) for form in FORMATS.values()]


@intrinsic
def dot(typingctx, kind, matrix, blocks, rounded, step, out):
    """``dot_body`` of the ``kind``-th of FORMATS, for one vector."""
    return by_kind(DOT, 5)


@intrinsic
def dots(typingctx, kind, matrix, blocks, rounded, step, out):
    """``dot_body`` of the ``kind``-th of FORMATS, for TOGETHER vectors."""
    return by_kind(DOTS, 5)
