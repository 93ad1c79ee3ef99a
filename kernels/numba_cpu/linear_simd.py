"""Vector code of the block-quantized matrices: sixteen rows side by side, one block of 32 columns at a time.

Only ``_multiply_pairs`` names instructions: ``vpdpwssd`` (AVX-512 VNNI), ``vpmaddwd`` (AVX2), or plain integer arithmetic. All
three give the same integers. Addresses are int64. How a block lies in memory: ``linear_pack.py``.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.linear_pack import BLOCK, FORMATS, LANES, BlockFormat
from skvq.kernels.numba_cpu.simd import F32, I16, I32, I64, WORDS, _all, _at, _intrinsic, _pick, _splat, host_features

FLOATS = ir.VectorType(F32, LANES)
PAIRS = ir.VectorType(I16, 2 * LANES)
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


def _signed_bytes(builder, words, shift):
    """Bytes 0 and 2 (shift 8), or 1 and 3 (shift 0), of every word, as two 16-bit integers."""
    eights = ir.Constant(PAIRS, [8] * 32)
    shorts = builder.bitcast(words, PAIRS)
    if shift:
        shorts = builder.shl(shorts, eights)
    return builder.bitcast(builder.ashr(shorts, eights), WORDS)


def _code_pairs(builder, form, block):
    """Codes of sixteen rows as pairs of 16-bit integers: sixteen WORDS, columns ``2 p`` and ``2 p + 1`` in the p-th."""
    if form.bits == 8:
        for v in range(8):
            words = builder.load(_at(builder, block, 64 * v, WORDS), align=4)
            yield _signed_bytes(builder, words, 8)
            yield _signed_bytes(builder, words, 0)
        return
    high = builder.load(_at(builder, block, form.high_at, WORDS), align=4) if form.bits == 5 else None
    for v in range(4):
        words = builder.load(_at(builder, block, 64 * v, WORDS), align=4)
        for k in range(4):
            codes = builder.and_(builder.lshr(words, _all(4 * k)), _all(0x000F000F))
            if high is not None:
                top = builder.and_(builder.lshr(high, _all(4 * v + k)), _all(0x00010001))
                codes = builder.or_(codes, builder.shl(top, _all(4)))
            yield codes


def _halves(context, builder, address):
    """Sixteen float16 as float32."""
    triple = context.codegen().magic_tuple()[0]
    if "+f16c" in host_features(context) or triple.startswith(("aarch64", "arm64")):
        return builder.fpext(builder.load(_at(builder, address, 0, ir.VectorType(ir.HalfType(), LANES)), align=2), FLOATS)
    halves = builder.zext(builder.load(_at(builder, address, 0, ir.VectorType(I16, LANES)), align=2), WORDS)
    sign = builder.shl(builder.and_(halves, _all(0x8000)), _all(16))
    size = builder.bitcast(builder.shl(builder.and_(halves, _all(0x7FFF)), _all(13)), FLOATS)
    size = builder.fmul(size, ir.Constant(FLOATS, [2.0**112] * LANES))
    return builder.bitcast(builder.or_(builder.bitcast(size, WORDS), sign), FLOATS)


def _sum(builder, vectors):
    total = vectors[0]
    for vector in vectors[1:]:
        total = builder.add(total, vector)
    return total


def _splat_float(builder, value):
    vector = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(WORDS, [0] * LANES))


def make_dot(form: BlockFormat, vectors: int):
    """``dot(matrix, blocks, rounded, step, out)``: sixteen rows times rounded vectors, float32 [vectors, 16] to ``out``.

    A rounded vector is ``[blocks][32]`` 16-bit integers, ``[blocks]`` scales, ``[blocks]`` sums; the next is ``step`` bytes on.
    Codes are unpacked once for all of them.
    """
    chains = CHAINS if vectors == 1 else 1

    def dot(typingctx, matrix, blocks, rounded, step, out):
        def codegen(context, builder, signature, args):
            matrix, blocks, rounded, step, out = args
            features = host_features(context)
            starts = [builder.add(rounded, builder.mul(ir.Constant(I64, n), step)) for n in range(vectors)]
            scales_at = builder.mul(blocks, ir.Constant(I64, 2 * BLOCK))
            sums_at = builder.add(scales_at, builder.mul(blocks, ir.Constant(I64, 4)))
            acc = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES)) for _ in range(vectors)]
            with cgutils.for_range(builder, blocks) as loop:
                at = builder.add(matrix, builder.mul(loop.index, ir.Constant(I64, form.block_bytes)))
                place = builder.mul(loop.index, ir.Constant(I64, 2 * BLOCK))
                four = builder.mul(loop.index, ir.Constant(I64, 4))
                x = [builder.add(start, place) for start in starts]
                scales = [builder.load(_at(builder, builder.add(s, scales_at), four, F32), align=4) for s in starts]
                sums = [builder.load(_at(builder, builder.add(s, sums_at), four, I32), align=4) for s in starts]
                totals = [[ir.Constant(WORDS, None)] * chains for _ in starts]
                if form.offset:
                    for total, whole in zip(totals, sums, strict=True):
                        total[0] = _splat(builder, builder.mul(whole, ir.Constant(I32, -form.offset)))
                for p, codes in enumerate(_code_pairs(builder, form, at)):
                    for total, source in zip(totals, x, strict=True):
                        pair = _splat(builder, builder.load(_at(builder, source, 4 * p, I32), align=4))
                        total[p % chains] = _multiply_pairs(builder, features, total[p % chains], codes, pair)
                unit = _halves(context, builder, builder.add(at, ir.Constant(I64, form.scale_at)))
                low = _halves(context, builder, builder.add(at, ir.Constant(I64, form.min_at))) if form.has_min else None
                for slot, total, scale, whole in zip(acc, totals, scales, sums, strict=True):
                    term = builder.fmul(builder.sitofp(_sum(builder, total), FLOATS), _splat_float(builder, scale))
                    product = builder.fmul(term, unit, flags=("contract",))
                    result = builder.fadd(builder.load(slot), product, flags=("contract",))
                    if low is not None:
                        sum_x = _splat_float(builder, builder.fmul(scale, builder.sitofp(whole, F32)))
                        result = builder.fadd(result, builder.fmul(low, sum_x, flags=("contract",)), flags=("contract",))
                    builder.store(result, slot)
            for n, slot in enumerate(acc):
                builder.store(builder.load(slot), _at(builder, out, 4 * LANES * n, FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    dot.__name__ = f"dot_{form.kind}_{vectors}"
    return intrinsic(dot)


def make_expand(form: BlockFormat):
    """``expand(block, row, out)``: the 32 weights of a row (0 to 15) of a block in float32, rounded as the format says."""
    order = (0, 16, 8, 24) if form.bits == 8 else (0, 16, 4, 20, 8, 24, 12, 28)
    per_vector = LANES // len(order)

    def expand(typingctx, block, row, out):
        def codegen(context, builder, signature, args):
            block, row, out = args
            word, half = (builder.mul(row, ir.Constant(I64, n)) for n in (4, 2))
            triple = _halves_of_row(context, builder, form, block, half)
            for v in range(2):
                vector = ir.Constant(WORDS, ir.Undefined)
                for j in range(per_vector):
                    at = builder.add(word, ir.Constant(I64, 64 * (v * per_vector + j)))
                    value = builder.load(_at(builder, builder.add(block, at), 0, I32), align=4)
                    vector = builder.insert_element(vector, value, ir.Constant(I32, j))
                vector = _pick(builder, vector, vector, [lane // len(order) for lane in range(LANES)])
                shifts = ir.Constant(WORDS, [order[lane % len(order)] for lane in range(LANES)])
                if form.bits == 8:
                    left = ir.Constant(WORDS, [24 - order[lane % len(order)] for lane in range(LANES)])
                    codes = builder.ashr(builder.shl(vector, left), _all(24))
                else:
                    codes = builder.and_(builder.lshr(vector, shifts), _all(15))
                if form.bits == 5:
                    at = builder.add(word, ir.Constant(I64, form.high_at))
                    high = _splat(builder, builder.load(_at(builder, builder.add(block, at), 0, I32), align=4))
                    places = [8 * v + lane // 2 + 16 * (lane % 2) for lane in range(LANES)]
                    top = builder.and_(builder.lshr(high, ir.Constant(WORDS, places)), _all(1))
                    codes = builder.or_(codes, builder.shl(top, _all(4)))
                if form.offset:
                    codes = builder.sub(codes, _all(form.offset))
                values = builder.fmul(builder.sitofp(codes, FLOATS), triple[0])
                if form.has_min:
                    values = builder.fadd(values, triple[1])
                builder.store(values, _at(builder, out, 64 * v, FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    expand.__name__ = f"expand_{form.kind}"
    return intrinsic(expand)


def _halves_of_row(context, builder, form, block, half):
    """Scale (and smallest value) of one row, in all lanes."""
    found = []
    for start in (form.scale_at, form.min_at) if form.has_min else (form.scale_at,):
        # all sixteen are converted: one instruction, and no need of a scalar conversion that old CPUs lack
        vector = _halves(context, builder, builder.add(block, ir.Constant(I64, start)))
        lane = builder.trunc(builder.lshr(half, ir.Constant(I64, 1)), I32)
        found.append(_splat_float(builder, builder.extract_element(vector, lane)))
    return found


@intrinsic
def round_block(typingctx, source, pairs, scale_to, sum_to):
    """Round 32 float32 to 16-bit integers ``x / scale`` with ``scale = max |x| / 32767``; store them, the scale, their sum.

    NaN and infinity turn the scale into NaN or infinity, so that they show in the result.
    """

    def codegen(context, builder, signature, args):
        source, pairs, scale_to, sum_to = args
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
            rounded = builder.call(rint, [builder.fmul(x[v], _splat_float(builder, inverse))])
            whole.append(builder.fptosi(rounded, WORDS))
            builder.store(builder.trunc(whole[v], shorts), _at(builder, pairs, 32 * v, shorts), align=2)
        add = _intrinsic(module, "llvm.vector.reduce.add.v16i32", I32, [WORDS])
        builder.store(scale, _at(builder, scale_to, 0, F32), align=4)
        builder.store(builder.call(add, [builder.add(*whole)]), _at(builder, sum_to, 0, I32), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


dot_q4_0, dot_q4_1, dot_q5_0, dot_q5_1, dot_q8_0 = (make_dot(form, 1) for form in FORMATS.values())
dots_q4_0, dots_q4_1, dots_q5_0, dots_q5_1, dots_q8_0 = (make_dot(form, TOGETHER) for form in FORMATS.values())
expand_q4_0, expand_q4_1, expand_q5_0, expand_q5_1, expand_q8_0 = (make_expand(form) for form in FORMATS.values())
