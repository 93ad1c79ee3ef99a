"""Intrinsics that numba lacks: typed pointers, bits of floats, atomics, vector reductions; and helpers that emit LLVM IR.

Vectors have 512 bits; LLVM splits them to what the CPU has. Addresses are int64.
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
FLOATS = ir.VectorType(F32, LANES)
BYTES = ir.VectorType(I8, 4 * LANES)


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


def record_at(dtype):
    """For jitted code: the record of that dtype at an address, whose fields it reads by name."""
    record = numba.from_dtype(dtype)

    def build(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    build.__name__ = "record_at"
    return intrinsic(build)


job_at = record_at(ATTEND)
pack_job_at = record_at(PACK)


@intrinsic
def prefetch(typingctx, address, nbytes):
    """Prefetch ``nbytes`` bytes: tiles lie far apart, and the hardware prefetcher stops at 4 KiB boundaries."""

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


def _splat(builder, value):
    """Sixteen times a word or a float."""
    vector = builder.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(WORDS, [0] * LANES))


def _all(value):
    return ir.Constant(WORDS, [value] * LANES)


def _pick(builder, first, second, lanes):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def _sum(builder, vectors):
    """Sum of vectors of integers."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = builder.add(total, vector)
    return total


def host_features(context):
    """Features of the CPU that is compiled for, numba's overrides included: ``{"+avx2", "-avx512f", ...}``."""
    return frozenset(context.codegen().magic_tuple()[2].split(","))


def _intrinsic(module, name, result, arguments):
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


# --- 16-bit numbers ----------------------------------------------------------------------------------------------------


def _load_halves(context, builder, address):
    """Sixteen float16 at an address as FLOATS: one instruction where the CPU has it, else by their bits."""
    triple = context.codegen().magic_tuple()[0]
    if "+f16c" in host_features(context) or triple.startswith(("aarch64", "arm64")):
        return builder.fpext(builder.load(_at(builder, address, 0, ir.VectorType(ir.HalfType(), LANES)), align=2), FLOATS)
    halves = builder.zext(builder.load(_at(builder, address, 0, ir.VectorType(I16, LANES)), align=2), WORDS)
    sign = builder.shl(builder.and_(halves, _all(0x8000)), _all(16))
    size = builder.bitcast(builder.shl(builder.and_(halves, _all(0x7FFF)), _all(13)), FLOATS)
    size = builder.bitcast(builder.fmul(size, ir.Constant(FLOATS, [2.0**112] * LANES)), WORDS)
    endless = builder.icmp_unsigned("==", builder.and_(halves, _all(0x7C00)), _all(0x7C00))  # infinite or NaN
    size = builder.select(endless, builder.or_(size, _all(0x7F800000)), size)
    return builder.bitcast(builder.or_(size, sign), FLOATS)


@intrinsic
def half_to_float(typingctx, source, target):
    """Sixteen float16 at ``source`` to float32 at ``target``."""

    def codegen(context, builder, signature, args):
        builder.store(_load_halves(context, builder, args[0]), _at(builder, args[1], 0, FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


# --- reductions ---------------------------------------------------------------------------------------------------------


def _make_extreme(name, better):
    """Intrinsic: largest (or smallest) of ``count`` > 0 float32 at an address. LLVM does not vectorize a loop over fmax."""

    def extreme(typingctx, address, count):
        def codegen(context, builder, signature, args):
            address, count = args

            def choose(slot, value):
                held = builder.load(slot)
                builder.store(builder.select(builder.fcmp_ordered(better, value, held), value, held), slot)

            first = builder.load(_at(builder, address, 0, F32), align=4)
            best = cgutils.alloca_once_value(builder, _splat(builder, first))
            turns = builder.sdiv(count, ir.Constant(I64, LANES))
            with cgutils.for_range(builder, turns) as loop:
                at = builder.mul(loop.index, ir.Constant(I64, 4 * LANES))
                choose(best, builder.load(_at(builder, address, at, FLOATS), align=4))
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
