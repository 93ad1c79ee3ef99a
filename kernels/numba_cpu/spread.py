"""Vector shuffles of sixteen rows at a time: transposing words, and spreading packed codes to one byte each."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.simd import BYTES, I32, I64, LANES, WORDS, _all, _at, _pick


def _columns(builder, source, stride, columns, rows):
    """``columns`` vectors of sixteen lanes, the j-th of word j of each row.

    ``rows``: how many rows lie ``stride`` bytes apart, repeated to fill the lanes; 0 for sixteen contiguous ones.
    """
    if rows == 0:
        grid = [builder.load(_at(builder, source, 64 * i, WORDS), align=1) for i in range(columns)]
    else:
        part = ir.VectorType(I32, columns)
        lines = [
            builder.load(_at(builder, source, builder.mul(ir.Constant(I64, r), stride), part), align=1) for r in range(rows)
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


@intrinsic
def transpose(typingctx, source, stride, target, step):
    """Sixteen rows of eight float32 at ``source`` to eight rows of sixteen at ``target``."""

    def codegen(context, builder, signature, args):
        source, stride, target, step = args
        for j, words in enumerate(_columns(builder, source, stride, 8, 16)):
            builder.store(words, _at(builder, target, builder.mul(ir.Constant(I64, j), step), WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _make_spread(name, width, columns, rows):
    """Intrinsic: planes of ``width`` bits of 16 rows x ``columns`` words to one byte per code, a row in each lane.

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
    _make_spread(f"spread_{width}x{columns}", width, columns, 0) for width, columns in ((1, 2), (1, 4), (2, 4), (2, 8), (4, 8))
)
spread_1_rows, spread_2_rows, spread_4_rows, spread_8_rows = (
    _make_spread(f"spread_{width}_rows", width, 8, 16) for width in (1, 2, 4, 8)
)
spread_1_four, spread_2_four, spread_4_four = (_make_spread(f"spread_{width}_four", width, 4, 16) for width in (1, 2, 4))
spread_1_half = _make_spread("spread_1_half", 1, 8, 8)


@intrinsic
def spread_trits(typingctx, source, stride, target, plane_step, word_step):
    """As ``_make_spread``, for five trits a byte: a trit is the byte's third of 0..255, and times 3 brings up the next."""

    def codegen(context, builder, signature, args):
        source, stride, target, plane_step, word_step = args
        for j, words in enumerate(_columns(builder, source, stride, 8, 16)):
            value = builder.bitcast(words, BYTES)
            for p in range(5):
                digit = [
                    builder.zext(builder.icmp_unsigned(">=", value, ir.Constant(BYTES, [bound] * 64)), BYTES)
                    for bound in (86, 171)
                ]
                offset = builder.add(builder.mul(ir.Constant(I64, p), plane_step), builder.mul(ir.Constant(I64, j), word_step))
                builder.store(builder.add(*digit), _at(builder, target, offset, BYTES), align=4)
                value = builder.add(builder.add(value, value), value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
