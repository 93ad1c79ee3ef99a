"""Vector instructions that numba has no words for, built as LLVM IR on 512-bit vectors that LLVM splits to what the CPU has.

Only ``_multiply_add`` names instructions: ``vpdpbusd`` (AVX-512 or AVX VNNI), ``vpmaddubsw`` + ``vpmaddwd`` (AVX2), or plain
integer arithmetic. All three give the same integers, because no caller lets ``vpmaddubsw`` saturate. Addresses are int64.
"""

# mypy: ignore-errors
from __future__ import annotations

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.job import ATTEND, PACK

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
LANES = 16
WORDS = ir.VectorType(I32, LANES)  # sixteen words of four bytes
BYTES = ir.VectorType(I8, 4 * LANES)
BLOCK = 2 * LANES  # lanes of a dot block


# --- pointers, bits, atomics ------------------------------------------------------------------------------------------


def _pointer_to(numba_type, name):
    def build(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(numba_type)(types.int64), codegen

    build.__name__ = name
    return intrinsic(build)


i8 = _pointer_to(types.int8, "i8")
u8 = _pointer_to(types.uint8, "u8")
u16 = _pointer_to(types.uint16, "u16")
i32 = _pointer_to(types.int32, "i32")
i64 = _pointer_to(types.int64, "i64")
f32 = _pointer_to(types.float32, "f32")
f64 = _pointer_to(types.float64, "f64")


@intrinsic
def as_float(typingctx, bits):
    """The float32 whose bits are the low 32 of an integer."""

    def codegen(context, builder, signature, args):
        word = args[0] if args[0].type == I32 else builder.trunc(args[0], I32)
        return builder.bitcast(word, F32)

    return types.float32(bits), codegen


@intrinsic
def as_bits(typingctx, value):
    """The bits of a float32, as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def fetch_add(typingctx, address, amount):
    """Add to the int64 at an address as one step between threads; returns what was there."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def _record_at(dtype):
    """The record at an address: jitted code reads its fields by name."""
    record = numba.from_dtype(dtype)

    def build(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    build.__name__ = "record_at"
    return intrinsic(build)


job_at = _record_at(ATTEND)
pack_job_at = _record_at(PACK)


@intrinsic
def prefetch(typingctx, address, nbytes):
    """Ask for the lines of ``nbytes`` bytes ahead of their use: tiles are far apart, and hardware stops at a 4 KiB border."""

    def codegen(context, builder, signature, args):
        byte = I8.as_pointer()
        function = _intrinsic(builder.module, "llvm.prefetch.p0", ir.VoidType(), [byte, I32, I32, I32])
        lines = builder.sdiv(builder.add(args[1], ir.Constant(I64, 63)), ir.Constant(I64, 64))
        with cgutils.for_range(builder, lines) as loop:
            at = _at(builder, args[0], builder.mul(loop.index, ir.Constant(I64, 64)), I8)
            builder.call(function, [at, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


# --- pieces of IR -----------------------------------------------------------------------------------------------------


def _at(builder, address, offset, kind):
    if isinstance(offset, int):
        offset = ir.Constant(I64, offset)
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _splat(builder, word):
    vector = builder.insert_element(ir.Constant(WORDS, ir.Undefined), word, ir.Constant(I32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(WORDS, [0] * LANES))


def _all(value):
    return ir.Constant(WORDS, [value] * LANES)


def _pick(builder, first, second, lanes):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def host_features(context):
    """Features of the CPU that is compiled for, numba's overrides included: ``{"+avx2", "-avx512f", ...}``."""
    return frozenset(context.codegen().magic_tuple()[2].split(","))


def _intrinsic(module, name, result, arguments):
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


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


# --- dot products -----------------------------------------------------------------------------------------------------


def _make_dot(rows):
    """``rows`` two-limb vectors against 32 lanes of codes; the accumulators stay in registers (16 for four rows)."""
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
                            builder.store(
                                _multiply_add(builder, features, builder.load(slot), block[v], weight), slot
                            )

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
                    low, high = (
                        _sum(builder, [builder.load(acc[u, r, limb, v]) for u in range(unroll)]) for limb in (0, 1)
                    )
                    whole = builder.add(builder.shl(high, places), low)
                    target = builder.add(out, builder.mul(ir.Constant(I64, r), out_stride))
                    floats = builder.sitofp(whole, ir.VectorType(F32, LANES))
                    builder.store(floats, _at(builder, target, 64 * v, ir.VectorType(F32, LANES)), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    dot.__name__ = f"dot_{rows}"
    return intrinsic(dot)


def _sum(builder, vectors):
    total = vectors[0]
    for vector in vectors[1:]:
        total = builder.add(total, vector)
    return total


dot_1, dot_2, dot_3, dot_4 = (_make_dot(rows) for rows in (1, 2, 3, 4))


def _make_mix(rows):
    """``out[r, lane] += sum_j coefs[r, j] * table[j, lane]`` for 32 lanes of float32."""

    def mix(typingctx, table, step, count, coefs, coef_stride, out, out_stride):
        def codegen(context, builder, signature, args):
            table, step, count, coefs, coef_stride, out, out_stride = args
            floats = ir.VectorType(F32, LANES)
            fma = _intrinsic(builder.module, "llvm.fmuladd.v16f32", floats, [floats] * 3)
            acc, targets, weights = {}, {}, []
            for r in range(rows):
                weights.append(builder.add(coefs, builder.mul(ir.Constant(I64, r), coef_stride)))
                for v in (0, 1):
                    at = builder.add(out, builder.mul(ir.Constant(I64, r), out_stride))
                    targets[r, v] = _at(builder, at, 64 * v, floats)
                    acc[r, v] = cgutils.alloca_once_value(builder, builder.load(targets[r, v], align=4))
            with cgutils.for_range(builder, count) as loop:
                at, word = builder.add(table, builder.mul(loop.index, step)), builder.mul(loop.index, ir.Constant(I64, 4))
                block = [builder.load(_at(builder, at, 64 * v, floats), align=4) for v in (0, 1)]
                for r in range(rows):
                    number = builder.load(_at(builder, weights[r], word, I32), align=4)
                    weight = builder.bitcast(_splat(builder, number), floats)
                    for v in (0, 1):
                        builder.store(builder.call(fma, [block[v], weight, builder.load(acc[r, v])]), acc[r, v])
            for key, slot in acc.items():
                builder.store(builder.load(slot), targets[key], align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    mix.__name__ = f"mix_{rows}"
    return intrinsic(mix)


mix_1, mix_2, mix_3, mix_4 = (_make_mix(rows) for rows in (1, 2, 3, 4))


@intrinsic
def add_outer(typingctx, lanes, coefs, count, out, step):
    """``out[j, lane] += coefs[j] * lanes[lane]`` for 32 lanes of float32 and ``count`` rows ``step`` bytes apart."""

    def codegen(context, builder, signature, args):
        lanes, coefs, count, out, step = args
        floats = ir.VectorType(F32, LANES)
        fma = _intrinsic(builder.module, "llvm.fmuladd.v16f32", floats, [floats] * 3)
        given = [builder.load(_at(builder, lanes, 64 * v, floats), align=4) for v in (0, 1)]
        with cgutils.for_range(builder, count) as loop:
            number = builder.load(_at(builder, coefs, builder.mul(loop.index, ir.Constant(I64, 4)), I32), align=4)
            weight = builder.bitcast(_splat(builder, number), floats)
            row = builder.add(out, builder.mul(loop.index, step))
            for v in (0, 1):
                place = _at(builder, row, 64 * v, floats)
                builder.store(builder.call(fma, [given[v], weight, builder.load(place, align=4)]), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def transpose(typingctx, source, stride, target, step):
    """Sixteen rows of eight float32 at ``source`` to eight rows of sixteen at ``target``."""

    def codegen(context, builder, signature, args):
        source, stride, target, step = args
        for j, words in enumerate(_columns(builder, source, stride, 8, 16)):
            builder.store(words, _at(builder, target, builder.mul(ir.Constant(I64, j), step), WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


# --- spreading packed bytes --------------------------------------------------------------------------------------------


def _columns(builder, source, stride, columns, rows):
    """Word j of sixteen rows, one vector a word. ``rows`` contiguous: 0, else that many rows at ``stride``, repeated."""
    if rows == 0:
        grid = [builder.load(_at(builder, source, 64 * i, WORDS), align=1) for i in range(columns)]
    else:
        part = ir.VectorType(I32, columns)
        lines = [
            builder.load(_at(builder, source, builder.mul(ir.Constant(I64, r), stride), part), align=1)
            for r in range(rows)
        ]
        lines = [lines[r % rows] for r in range(LANES)]
        while len(lines) > columns:
            count = lines[0].type.count
            lines = [_pick(builder, a, b, range(2 * count)) for a, b in zip(lines[::2], lines[1::2], strict=True)]
        grid = lines
    stage = columns
    while stage > 1:  # each round moves the lowest bit of the word's number to the top
        even = [_pick(builder, a, b, range(0, 32, 2)) for a, b in zip(grid[::2], grid[1::2], strict=True)]
        odd = [_pick(builder, a, b, range(1, 32, 2)) for a, b in zip(grid[::2], grid[1::2], strict=True)]
        grid, stage = even + odd, stage // 2
    return grid


def _make_spread(name, width, columns, rows):
    """Planes of ``width`` bits of 16 rows x ``columns`` words to one byte a code, words across lanes.

    Plane p of word j goes to ``target + p * plane_step + j * word_step``, shifted left by ``place``; a place above 0 adds to
    what lies there. With 8 rows, lanes 8 to 15 hold the next plane, and planes go out in pairs.
    """
    planes, together = 8 // width, 2 if rows == 8 else 1
    place = 2 if width == 1 else 0
    mask = (2**width - 1) * 0x01010101

    def spread(typingctx, source, stride, target, plane_step, word_step):
        def codegen(context, builder, signature, args):
            source, stride, target, plane_step, word_step = args
            grid = _columns(builder, source, stride, columns, rows)
            for p in range(0, planes, together):
                at = builder.add(target, builder.mul(ir.Constant(I64, p // together), plane_step))
                shifts = [width * (p + (lane >= 8 and together == 2)) for lane in range(LANES)]
                for j in range(columns):
                    codes = builder.and_(builder.lshr(grid[j], ir.Constant(WORDS, shifts)), _all(mask))
                    to = _at(builder, at, builder.mul(ir.Constant(I64, j), word_step), WORDS)
                    if place:
                        codes = builder.or_(builder.shl(codes, _all(place)), builder.load(to, align=4))
                    builder.store(codes, to, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    spread.__name__ = name
    return intrinsic(spread)


spread_1x2, spread_1x4, spread_2x4, spread_2x8, spread_4x8 = (
    _make_spread(f"spread_{width}x{columns}", width, columns, 0)
    for width, columns in ((1, 2), (1, 4), (2, 4), (2, 8), (4, 8))
)
spread_1_rows, spread_2_rows, spread_4_rows, spread_8_rows = (
    _make_spread(f"spread_{width}_rows", width, 8, 16) for width in (1, 2, 4, 8)
)
spread_1_half = _make_spread("spread_1_half", 1, 8, 8)


@intrinsic
def spread_trits(typingctx, source, stride, target, plane_step, word_step):
    """Five trits a byte of 16 rows x 8 words: a digit is how many thirds of 256 the byte passes, then the byte triples."""

    def codegen(context, builder, signature, args):
        source, stride, target, plane_step, word_step = args
        for j, words in enumerate(_columns(builder, source, stride, 8, 16)):
            value = builder.bitcast(words, BYTES)
            for p in range(5):
                digit = [
                    builder.zext(builder.icmp_unsigned(">=", value, ir.Constant(BYTES, [bound] * 64)), BYTES)
                    for bound in (86, 171)
                ]
                offset = builder.add(
                    builder.mul(ir.Constant(I64, p), plane_step), builder.mul(ir.Constant(I64, j), word_step)
                )
                builder.store(builder.add(*digit), _at(builder, target, offset, BYTES), align=4)
                value = builder.add(builder.add(value, value), value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


# --- 16-bit numbers ----------------------------------------------------------------------------------------------------


@intrinsic
def half_to_float(typingctx, source, target):
    """Sixteen float16 at ``source`` to float32 at ``target``, in one instruction where the CPU has it."""

    def codegen(context, builder, signature, args):
        floats, triple = ir.VectorType(F32, LANES), context.codegen().magic_tuple()[0]
        target = _at(builder, args[1], 0, floats)
        if "+f16c" in host_features(context) or triple.startswith(("aarch64", "arm64")):
            halves = builder.load(_at(builder, args[0], 0, ir.VectorType(ir.HalfType(), LANES)), align=2)
            builder.store(builder.fpext(halves, floats), target, align=4)
            return context.get_dummy_value()
        halves = builder.zext(builder.load(_at(builder, args[0], 0, ir.VectorType(I16, LANES)), align=2), WORDS)
        sign = builder.shl(builder.and_(halves, _all(0x8000)), _all(16))
        bits = builder.shl(builder.and_(halves, _all(0x7FFF)), _all(13))
        size = builder.fmul(builder.bitcast(bits, floats), ir.Constant(floats, [2.0**112] * LANES))
        builder.store(builder.or_(builder.bitcast(size, WORDS), sign), builder.bitcast(target, WORDS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


# --- reductions ---------------------------------------------------------------------------------------------------------


def _make_extreme(name, better):
    """Largest (or smallest) of ``count`` > 0 float32 at an address: LLVM leaves a loop over fmax scalar."""

    def extreme(typingctx, address, count):
        def codegen(context, builder, signature, args):
            address, count = args
            floats = ir.VectorType(F32, LANES)

            def choose(slot, value):
                held = builder.load(slot)
                builder.store(builder.select(builder.fcmp_ordered(better, value, held), value, held), slot)

            first = builder.load(_at(builder, address, 0, F32), align=4)
            zero = builder.insert_element(ir.Constant(floats, ir.Undefined), first, ir.Constant(I32, 0))
            best = cgutils.alloca_once_value(builder, builder.shuffle_vector(zero, zero, ir.Constant(WORDS, [0] * LANES)))
            turns = builder.sdiv(count, ir.Constant(I64, LANES))
            with cgutils.for_range(builder, turns) as loop:
                at = builder.mul(loop.index, ir.Constant(I64, 4 * LANES))
                choose(best, builder.load(_at(builder, address, at, floats), align=4))
            vector = builder.load(best)
            while vector.type.count > 1:
                half = vector.type.count // 2
                a, b = _pick(builder, vector, vector, range(half)), _pick(builder, vector, vector, range(half, 2 * half))
                vector = builder.select(builder.fcmp_ordered(better, a, b), a, b)
            single = cgutils.alloca_once_value(builder, builder.extract_element(vector, ir.Constant(I32, 0)))
            done = builder.mul(turns, ir.Constant(I64, LANES))
            with cgutils.for_range(builder, builder.sub(count, done)) as loop:
                at = builder.mul(builder.add(done, loop.index), ir.Constant(I64, 4))
                choose(single, builder.load(_at(builder, address, at, F32), align=4))
            return builder.load(single)

        return types.float32(types.int64, types.int64), codegen

    extreme.__name__ = name
    return intrinsic(extreme)


largest = _make_extreme("largest", ">")
smallest = _make_extreme("smallest", "<")
