"""Intel AMX: products of tiles of bfloat16 with sums in float32, by LLVM's intrinsics.

A tile is 1 KB: sixteen rows of 64 bytes. One instruction adds A B to a tile C of 16 x 16 float32, A 16 x 32 bfloat16 and B
32 x 16, whose rows lie in pairs: word (k, n) of the tile holds B[2 k, n] in its low half and B[2 k + 1, n] in its high one. A
float32 is the sum of two bfloat16 within 2^-16 of itself (``store_pairs``), so three such products, the one of both small parts
left out, are a product of float32 numbers within 2^-15, and 2^-18 on average; two where B's numbers are bfloat16.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.simd import (
    FLOATS,
    I8,
    I32,
    I64,
    WORDS,
    _all,
    _at,
    _intrinsic,
    _pick,
    _splat,
    host_features,
    i64,
)
from skvq.kernels.numba_cpu.spread import _columns
from skvq.kernels.numba_cpu.tiles import FAST

TILE = 1024  # bytes
ROW = 64  # bytes of a row of a tile
DEPTH = 32  # bfloat16 of it: rows of A, in pairs columns of B
SIDE = 32  # rows and columns of what ``multiply_tiles`` computes: two tiles by two
STEP = 4 * TILE
"""Bytes of A or B for DEPTH numbers of SIDE rows: two tiles of large parts, then two of small ones. B of bfloat16: half."""


def has_tiles(context):
    """Whether the CPU that is compiled for has tiles of bfloat16."""
    return {"+amx-tile", "+amx-bf16", "+avx512f"} <= host_features(context)


def _call(builder, name, *arguments):
    function = _intrinsic(builder.module, f"llvm.x86.{name}", ir.VoidType(), [argument.type for argument in arguments])
    builder.call(function, arguments)


def _byte(value):
    return ir.Constant(I8, value)


@intrinsic
def open_tiles(typingctx):
    """Set this thread's eight tiles up, sixteen rows of 64 bytes each. ``close_tiles`` gives them up."""

    def codegen(context, builder, signature, args):
        if not has_tiles(context):
            return context.get_dummy_value()
        settings = bytearray(64)
        settings[0] = 1  # the palette
        for tile in range(8):
            settings[16 + 2 * tile], settings[48 + tile] = ROW, 16
        words = [int.from_bytes(settings[at : at + 8], "little") for at in range(0, 64, 8)]
        slot = cgutils.alloca_once_value(builder, ir.Constant(ir.ArrayType(I64, len(words)), words))
        _call(builder, "ldtilecfg", builder.bitcast(slot, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def close_tiles(typingctx):
    """Give this thread's tiles up, so that the system need not save them."""

    def codegen(context, builder, signature, args):
        if has_tiles(context):
            _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def _by_tiles(builder, a, b, steps, c, stride, add, exact):
    """``multiply_tiles`` in the CPU's tiles: 0 to 3 of C, 4 and 5 of A, 6 and 7 of B."""
    row = ir.Constant(I64, ROW)
    halves = (c, builder.add(c, builder.mul(stride, ir.Constant(I64, 16))))
    places = [_at(builder, half, ROW * j, I8) for half in halves for j in range(2)]

    def load(first, address, offset):
        for tile in range(2):
            _call(builder, "tileloadd64", _byte(first + tile), _at(builder, address, offset + TILE * tile, I8), row)

    def multiply_four():
        for tile in range(4):
            _call(builder, "tdpbf16ps", _byte(tile), _byte(4 + tile // 2), _byte(6 + tile % 2))

    with builder.if_else(add) as (then, otherwise):
        with then:
            for tile, place in enumerate(places):
                _call(builder, "tileloadd64", _byte(tile), place, stride)
        with otherwise:
            for tile in range(4):
                _call(builder, "tilezero", _byte(tile))
    with cgutils.for_range(builder, steps) as loop:
        left, right = _step_of(builder, a, b, loop.index, exact)
        load(4, left, 0)
        if not exact:
            load(6, right, 2 * TILE)
            multiply_four()
        load(6, right, 0)
        multiply_four()
        load(4, left, 2 * TILE)
        multiply_four()
    for tile, place in enumerate(places):
        _call(builder, "tilestored64", _byte(tile), place, stride)


def _without_tiles(builder, a, b, steps, c, stride, add, exact):
    """The same where the CPU has no tiles, a row of C at a time: slow, for tests."""
    fma = _intrinsic(builder.module, "llvm.fmuladd.v16f32", FLOATS, [FLOATS] * 3)

    def both(words):
        return [builder.bitcast(bits, FLOATS) for bits in (builder.shl(words, _all(16)), builder.and_(words, _all(-65536)))]

    with cgutils.for_range(builder, ir.Constant(I64, SIDE)) as line:
        out = builder.add(c, builder.mul(line.index, stride))
        places = [_at(builder, out, ROW * j, FLOATS) for j in range(2)]
        acc = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None)) for _ in places]
        for slot, place in zip(acc, places, strict=True):
            builder.store(ir.Constant(FLOATS, None), slot)
            with builder.if_then(add):
                builder.store(builder.load(place, align=4), slot)
        with cgutils.for_range(builder, steps) as loop:
            left, right = _step_of(builder, a, b, loop.index, exact)
            left = builder.add(left, builder.mul(line.index, ir.Constant(I64, ROW)))  # the second tile lies behind the first
            with cgutils.for_range(builder, ir.Constant(I64, DEPTH // 2)) as pair:
                word, words = (builder.mul(pair.index, ir.Constant(I64, size)) for size in (4, ROW))
                for part, other in ((0, 0), (2, 0)) if exact else ((0, 2), (0, 0), (2, 0)):
                    value = _splat(
                        builder, builder.load(_at(builder, left, builder.add(word, ir.Constant(I64, TILE * part)), I32))
                    )
                    for j, slot in enumerate(acc):
                        at = builder.add(words, ir.Constant(I64, TILE * (other + j)))
                        column = builder.load(_at(builder, right, at, WORDS), align=4)
                        for x, y in zip(both(value), both(column), strict=True):
                            builder.store(builder.call(fma, [x, y, builder.load(slot)]), slot)
        for slot, place in zip(acc, places, strict=True):
            builder.store(builder.load(slot), place, align=4)


def _step_of(builder, a, b, step, exact):
    return (builder.add(start, builder.mul(step, ir.Constant(I64, size))) for start, size in ((a, STEP), (b, STEP >> exact)))


def _make_multiply(name, exact):
    """Intrinsic ``multiply_tiles``; with ``exact`` B's numbers are bfloat16, and there are no small parts of them."""

    def multiply(typingctx, a, b, steps, c, stride, add):
        def codegen(context, builder, signature, args):
            (_by_tiles if has_tiles(context) else _without_tiles)(builder, *args, exact)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.boolean), codegen

    multiply.__name__ = multiply.__qualname__ = name
    multiply.__doc__ = """SIDE x SIDE products of float32: ``c[i, j] = sum_k a[i, k] b[k, j]``; with ``add``, added to it.

    ``steps`` times DEPTH numbers are summed. c float32 with rows ``stride`` bytes apart.
    """
    return intrinsic(multiply)


multiply_tiles = _make_multiply("multiply_tiles", exact=False)
multiply_exact = _make_multiply("multiply_exact", exact=True)


@njit(**FAST)
def clear(address, nbytes):
    """Zeros, eight bytes at a time."""
    words = i64(address)
    for i in range(nbytes // 8):
        words[i] = 0


def store_pairs(builder, even, odd, large_to, small_to):
    """Store the two parts of two FLOATS side by side, as a row of a tile: 64 bytes of large parts, 64 of small ones.

    Large parts are rounded to the nearest, small ones towards zero, so that NaN stays NaN. Infinity has the small part NaN.
    """
    top = _all(-65536)
    bits = [builder.bitcast(floats, WORDS) for floats in (even, odd)]
    large = [builder.and_(builder.add(word, _all(0x8000)), top) for word in bits]
    small = [builder.fsub(f, builder.bitcast(word, FLOATS)) for f, word in zip((even, odd), large, strict=True)]
    small = [builder.and_(builder.bitcast(floats, WORDS), top) for floats in small]
    for (low, high), to in ((large, large_to), (small, small_to)):
        builder.store(builder.or_(builder.lshr(low, _all(16)), high), to, align=4)


@intrinsic
def split_row(typingctx, source, large_to, small_to):
    """DEPTH float32 at ``source`` as rows of two tiles."""

    def codegen(context, builder, signature, args):
        source, large_to, small_to = args
        low, high = (builder.load(_at(builder, source, 64 * v, FLOATS), align=4) for v in range(2))
        even, odd = (_pick(builder, low, high, range(first, 32, 2)) for first in range(2))
        store_pairs(builder, even, odd, *(_at(builder, to, 0, WORDS) for to in (large_to, small_to)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def turn_tile(typingctx, source, stride, target):
    """Sixteen rows of sixteen words, ``stride`` bytes apart, as a tile the other way round: rows become columns of B."""

    def codegen(context, builder, signature, args):
        source, stride, target = args
        for j, words in enumerate(_columns(builder, source, stride, 16, 16)):
            builder.store(words, _at(builder, target, ROW * j, WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen
