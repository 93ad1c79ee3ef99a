"""Vector code that expands a row of a block to float32. How a block lies in memory: ``linear_pack.py``."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.block_format import FORMATS, LANES, LaneFormat
from skvq.kernels.numba_cpu.block_parts import FLOATS, by_kind, places_of, scales_of
from skvq.kernels.numba_cpu.simd import I32, I64, WORDS, _all, _at, _pick, _splat


def expand_body(form: LaneFormat):
    """``(matrix, index, row, out)``: the 32 weights of a row (0 to 15) of a block in float32, rounded as the format says."""

    def body(context, builder, matrix, index, row, out):
        block, heads = places_of(builder, form, matrix, index)
        units, low = scales_of(context, builder, form, block, heads)
        # all sixteen are converted: one instruction, and no need of a scalar conversion that old CPUs lack
        units, lows = ([_of_row(builder, v, row) for v in found] for found in (units, [] if low is None else [low]))
        word = builder.add(block, builder.mul(row, ir.Constant(I64, 4)))
        for v in range(2):
            codes = _codes(builder, form, word, v)
            if form.offset:
                codes = builder.sub(codes, _all(form.offset))
            values = builder.fmul(builder.sitofp(codes, FLOATS), units[v * form.parts // 2], flags=("contract",))
            for low_of_row in lows:
                values = builder.fadd(values, low_of_row, flags=("contract",))
            builder.store(values, _at(builder, out, 64 * v, FLOATS), align=4)

    return body


def _codes(builder, form, word, v):
    """Codes of columns ``16 v`` to ``16 v + 15`` of the row whose first word is at ``word``."""
    order = (0, 16, 8, 24) if form.bits == 8 else (0, 16, 4, 20, 8, 24, 12, 28)
    per_vector = LANES // len(order)
    vector = ir.Constant(WORDS, ir.Undefined)
    for j in range(per_vector):
        value = builder.load(_at(builder, word, 64 * (v * per_vector + j), I32), align=4)
        vector = builder.insert_element(vector, value, ir.Constant(I32, j))
    vector = _pick(builder, vector, vector, [lane // len(order) for lane in range(LANES)])
    if form.bits == 8:
        left = ir.Constant(WORDS, [24 - order[lane % len(order)] for lane in range(LANES)])
        return builder.ashr(builder.shl(vector, left), _all(24))
    shifts = ir.Constant(WORDS, [order[lane % len(order)] for lane in range(LANES)])
    codes = builder.and_(builder.lshr(vector, shifts), _all(15))
    bits = form.high_bits
    if not bits:
        return codes
    first, place = divmod(8 * v * bits, 16)
    high = _splat(builder, builder.load(_at(builder, word, form.high_at + 64 * first, I32), align=4))
    places = ir.Constant(WORDS, [place + bits * (lane // 2) + 16 * (lane % 2) for lane in range(LANES)])
    top = builder.and_(builder.lshr(high, places), _all((1 << bits) - 1))
    return builder.or_(codes, builder.shl(top, _all(4)))


def _of_row(builder, vector, row):
    """Lane ``row`` of a vector, in all lanes."""
    return _splat(builder, builder.extract_element(vector, builder.trunc(row, I32)))


EXPAND = [expand_body(form) for form in FORMATS.values()]


@intrinsic
def expand_block(typingctx, kind, matrix, index, row, out):
    """``expand_body`` of the ``kind``-th of FORMATS."""
    return by_kind(EXPAND, 4)
