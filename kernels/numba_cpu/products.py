"""Small matrix products, 32 lanes at a time with accumulators in registers: codes by two-limb integers, and float32.

Only ``_multiply_add`` names instructions: ``vpdpbusd`` (AVX-512 or AVX VNNI), ``vpmaddubsw`` + ``vpmaddwd`` (AVX2), or plain
integer arithmetic. All three give the same integers, because no caller lets ``vpmaddubsw`` saturate.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.simd import (
    F32,
    FLOATS,
    I8,
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
    prefetch,
)  # fmt: skip
from skvq.kernels.numba_cpu.tiles import CALLED, LANE_BLOCK


def _multiply_add(builder, features, total, codes, limbs):
    """``total[i] + sum_k codes[4 i + k] * limbs[4 i + k]``: unsigned bytes times signed bytes, all as WORDS."""
    module = builder.module
    if {"+avx512vnni", "+avx512f"} <= features:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return builder.call(_intrinsic(module, name, WORDS, [WORDS] * 3), [total, codes, limbs])
    if "+avx2" not in features:
        for k in range(4):
            unsigned = builder.and_(builder.lshr(codes, _all(8 * k)), _all(255))
            signed = builder.ashr(builder.shl(limbs, _all(24 - 8 * k)), _all(24))
            total = builder.add(total, builder.mul(unsigned, signed))
        return total
    half, bytes32, shorts = ir.VectorType(I32, 8), ir.VectorType(I8, 32), ir.VectorType(I16, 16)
    parts = []
    for start in (0, 8):
        t, c, w = (_pick(builder, x, x, range(start, start + 8)) for x in (total, codes, limbs))
        if "+avxvnni" in features:
            parts.append(builder.call(_intrinsic(module, "llvm.x86.avx512.vpdpbusd.256", half, [half] * 3), [t, c, w]))
            continue
        pairs = _intrinsic(module, "llvm.x86.avx2.pmadd.ub.sw", shorts, [bytes32, bytes32])
        fours = _intrinsic(module, "llvm.x86.avx2.pmadd.wd", half, [shorts, shorts])
        products = builder.call(pairs, [builder.bitcast(c, bytes32), builder.bitcast(w, bytes32)])
        parts.append(builder.add(t, builder.call(fours, [products, ir.Constant(shorts, [1] * 16)])))
    return _pick(builder, parts[0], parts[1], range(16))


def _make_dot(rows):
    """Intrinsic: dot products of ``rows`` two-limb vectors with 32 lanes of codes. Four rows need 16 vector registers."""
    unroll = 1 if rows > 2 else 2  # enough independent chains to hide the latency

    def dot(typingctx, codes, step, count, limbs, limb_stride, row_stride, out, out_stride, shift):
        def codegen(context, builder, signature, args):
            codes, step, count, limbs, limb_stride, row_stride, out, out_stride, shift = args
            features = host_features(context)
            keys = [(u, r, limb, v) for u in range(unroll) for r in range(rows) for limb in (0, 1) for v in (0, 1)]
            acc = {key: cgutils.alloca_once_value(builder, ir.Constant(WORDS, None)) for key in keys}
            base = [
                [builder.add(limbs, builder.add(builder.mul(ir.Constant(I64, r), row_stride), extra)) for extra in pair]
                for r, pair in ((r, (ir.Constant(I64, 0), limb_stride)) for r in range(rows))
            ]

            def contract(j, u):
                at = builder.add(codes, builder.mul(j, step))
                block = [builder.load(_at(builder, at, 64 * v, WORDS), align=4) for v in (0, 1)]
                word = builder.mul(j, ir.Constant(I64, 4))
                for r in range(rows):
                    for limb in (0, 1):
                        weight = _splat(builder, builder.load(_at(builder, base[r][limb], word, I32), align=4))
                        for v in (0, 1):
                            slot = acc[u, r, limb, v]
                            builder.store(_multiply_add(builder, features, builder.load(slot), block[v], weight), slot)

            turns = builder.sdiv(count, ir.Constant(I64, unroll))
            done = builder.mul(turns, ir.Constant(I64, unroll))
            with cgutils.for_range(builder, turns) as loop:
                first = builder.mul(loop.index, ir.Constant(I64, unroll))
                for u in range(unroll):
                    contract(builder.add(first, ir.Constant(I64, u)), u)
            with cgutils.for_range(builder, builder.sub(count, done)) as loop:
                contract(builder.add(done, loop.index), 0)
            places = _splat(builder, builder.trunc(shift, I32))
            for r in range(rows):
                for v in (0, 1):
                    low, high = (_sum(builder, [builder.load(acc[u, r, limb, v]) for u in range(unroll)]) for limb in (0, 1))
                    whole = builder.add(builder.shl(high, places), low)
                    target = builder.add(out, builder.mul(ir.Constant(I64, r), out_stride))
                    builder.store(builder.sitofp(whole, FLOATS), _at(builder, target, 64 * v, FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    dot.__name__ = f"dot_{rows}"
    return intrinsic(dot)


dot_1, dot_2, dot_3, dot_4 = (_make_dot(rows) for rows in (1, 2, 3, 4))


def _make_product(rows, vectors):
    """``product`` of a fixed number of rows, and of 16 or 32 lanes."""

    def product(typingctx, table, step, count, coefs, coef_stride, coef_step, out, out_stride, add):
        def codegen(context, builder, signature, args):
            table, step, count, coefs, coef_stride, coef_step, out, out_stride, add = args
            fma = _intrinsic(builder.module, "llvm.fmuladd.v16f32", FLOATS, [FLOATS] * 3)
            acc, targets, weights = {}, {}, []
            for r in range(rows):
                weights.append(builder.add(coefs, builder.mul(ir.Constant(I64, r), coef_stride)))
                line = builder.add(out, builder.mul(ir.Constant(I64, r), out_stride))
                for v in range(vectors):
                    targets[r, v] = _at(builder, line, 64 * v, FLOATS)
                    acc[r, v] = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None))
            with cgutils.for_range(builder, count) as loop:
                at = builder.add(table, builder.mul(loop.index, step))
                place = builder.mul(loop.index, coef_step)
                block = [builder.load(_at(builder, at, 64 * v, FLOATS), align=4) for v in range(vectors)]
                for r in range(rows):
                    weight = _splat(builder, builder.load(_at(builder, weights[r], place, F32), align=4))
                    for v in range(vectors):
                        builder.store(builder.call(fma, [block[v], weight, builder.load(acc[r, v])]), acc[r, v])
            with builder.if_then(add):  # at the end: sums of sums round less
                for key, slot in acc.items():
                    builder.store(builder.fadd(builder.load(slot), builder.load(targets[key], align=4)), slot)
            for key, slot in acc.items():
                builder.store(builder.load(slot), targets[key], align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8, types.boolean), codegen

    product.__name__ = f"product_{rows}_{vectors}"
    return intrinsic(product)


product_8, product_4, product_2, product_1 = (_make_product(rows, 2) for rows in (8, 4, 2, 1))
product_6_half, product_3_half, product_1_half = (_make_product(rows, 1) for rows in (6, 3, 1))


@intrinsic
def has_wide_registers(typingctx):
    """Whether the CPU that is compiled for has 32 registers of 512 bits."""

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), int("+avx512f" in host_features(context)))

    return types.boolean(), codegen


@njit(**CALLED)
def dots(rows, codes, step, count, limbs, limb_stride, row_stride, out, out_stride, shift, lanes, ahead, ahead_bytes):
    """``out[row, lane] = sum_j codes[j][lane] . limbs[row][j]`` as float32, ``lanes`` a multiple of 32.

    Meanwhile ``ahead_bytes`` at ``ahead`` are prefetched, a part with each block: all at once they would stall the loads.
    """
    part = ahead_bytes * LANE_BLOCK // lanes
    for lane in range(0, 4 * lanes, 4 * LANE_BLOCK):
        prefetch(ahead, part)
        ahead += part
        for m in range(0, rows, 4):
            left = rows - m
            a, o = limbs + m * row_stride, out + m * out_stride + lane
            if left >= 4:
                dot_4(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)
            elif left == 3:
                dot_3(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)
            elif left == 2:
                dot_2(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)
            else:
                dot_1(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)


@njit(**CALLED)
def product(rows, table, step, count, coefs, coef_stride, coef_step, out, out_stride, add):
    """``out[row, lane] = sum_j coefs[row, j] * table[j, lane]`` for 32 lanes; with ``add``, added to what is there.

    Steps and strides in bytes, those of coefs from row to row and from j to j. Sums stay in registers: eight rows of 32 lanes
    where there are 32 registers of 512 bits, else six of 16, which is what 16 registers of 256 bits hold.
    """
    if has_wide_registers():
        while rows >= 8:
            product_8(table, step, count, coefs, coef_stride, coef_step, out, out_stride, add)
            rows, coefs, out = rows - 8, coefs + 8 * coef_stride, out + 8 * out_stride
        if rows >= 4:
            product_4(table, step, count, coefs, coef_stride, coef_step, out, out_stride, add)
            rows, coefs, out = rows - 4, coefs + 4 * coef_stride, out + 4 * out_stride
        if rows >= 2:
            product_2(table, step, count, coefs, coef_stride, coef_step, out, out_stride, add)
            rows, coefs, out = rows - 2, coefs + 2 * coef_stride, out + 2 * out_stride
        if rows > 0:
            product_1(table, step, count, coefs, coef_stride, coef_step, out, out_stride, add)
        return
    for half in range(0, 128, 64):
        left, a, o = rows, coefs, out + half
        while left >= 6:
            product_6_half(table + half, step, count, a, coef_stride, coef_step, o, out_stride, add)
            left, a, o = left - 6, a + 6 * coef_stride, o + 6 * out_stride
        if left >= 3:
            product_3_half(table + half, step, count, a, coef_stride, coef_step, o, out_stride, add)
            left, a, o = left - 3, a + 3 * coef_stride, o + 3 * out_stride
        while left > 0:
            product_1_half(table + half, step, count, a, coef_stride, coef_step, o, out_stride, add)
            left, a, o = left - 1, a + coef_stride, o + out_stride


@njit(**CALLED)
def mix(rows, table, step, count, coefs, coef_stride, out, out_stride, lanes):
    """``out[row, lane] += sum_j coefs[row, j] * table[j, lane]``, ``lanes`` a multiple of 32, strides in bytes."""
    for lane in range(0, 4 * lanes, 4 * LANE_BLOCK):
        product(rows, table + lane, step, count, coefs, coef_stride, 4, out + lane, out_stride, True)
