"""Reading sixteen rows of a block: codes as pairs of 16-bit integers, scales and minima as float32, in LLVM IR.

Addresses are int64. How a block lies in memory: ``linear_pack.py``.
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import types

from skvq.kernels.numba_cpu.block_format import LANES, LaneFormat
from skvq.kernels.numba_cpu.simd import FLOATS, I8, I16, I64, WORDS, _all, _at, _load_halves

PAIRS = ir.VectorType(I16, 2 * LANES)


def by_kind(bodies, arguments):
    """Signature and codegen of an intrinsic ``(kind, *arguments)`` of int64: a switch over ``kind``, cases ``bodies``."""

    def codegen(context, builder, signature, args):
        end = builder.append_basic_block("end")
        switch = builder.switch(args[0], end)
        for number, body in enumerate(bodies):
            case = builder.append_basic_block(f"kind.{number}")
            switch.add_case(ir.Constant(I64, number), case)
            builder.position_at_end(case)
            body(context, builder, *args[1:])
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.int64] * (1 + arguments)), codegen


def places_of(builder, form: LaneFormat, matrix, index):
    """Addresses of block ``index`` of a group of sixteen rows, and of the scales d it uses.

    With eight blocks that share d, block 21 is the sixth of the third span: ``2 * span_bytes + 5 * block_bytes``.
    """
    if form.span == 1:
        block = builder.add(matrix, builder.mul(index, ir.Constant(I64, form.span_bytes)))
        return block, builder.add(block, ir.Constant(I64, form.heads_at))
    assert form.span == 8
    span = builder.mul(builder.lshr(index, ir.Constant(I64, 3)), ir.Constant(I64, form.span_bytes))
    inside = builder.mul(builder.and_(index, ir.Constant(I64, 7)), ir.Constant(I64, form.block_bytes))
    start = builder.add(matrix, span)
    return builder.add(start, inside), builder.add(start, ir.Constant(I64, form.heads_at))


def code_pairs(builder, form: LaneFormat, block):
    """Codes of sixteen rows as pairs of 16-bit integers: sixteen WORDS, columns ``2 p`` and ``2 p + 1`` in the p-th."""
    if form.bits == 8:
        for v in range(8):
            words = builder.load(_at(builder, block, 64 * v, WORDS), align=4)
            yield _signed_bytes(builder, words, 8)
            yield _signed_bytes(builder, words, 0)
        return
    bits = form.high_bits
    high = [builder.load(_at(builder, block, form.high_at + 64 * w, WORDS), align=4) for w in range(bits)]
    for v in range(4):
        words = builder.load(_at(builder, block, 64 * v, WORDS), align=4)
        for k in range(4):
            codes = builder.and_(builder.lshr(words, _all(4 * k)), _all(0x000F000F))
            if bits:
                word, place = divmod(bits * (4 * v + k), 16)
                top = builder.and_(builder.lshr(high[word], _all(place)), _all(0x00010001 * ((1 << bits) - 1)))
                codes = builder.or_(codes, builder.shl(top, _all(4)))
            yield codes


def _signed_bytes(builder, words, shift):
    """Bytes 0 and 2 (shift 8), or 1 and 3 (shift 0), of every word, as two 16-bit integers."""
    eights = ir.Constant(PAIRS, [8] * 32)
    shorts = builder.bitcast(words, PAIRS)
    if shift:
        shorts = builder.shl(shorts, eights)
    return builder.bitcast(builder.ashr(shorts, eights), WORDS)


def scales_of(context, builder, form: LaneFormat, block, heads):
    """Of sixteen rows, as FLOATS: a list of the scales of a block's parts, and the minimum to add, or None."""
    scales, low = [_load_halves(context, builder, heads)] * form.parts, None
    if form.has_min:
        low = _load_halves(context, builder, builder.add(heads, ir.Constant(I64, 2 * LANES)))
    if form.factors:
        at = form.factors_at
        scales = [_times_factor(builder, scale, block, at + LANES * part) for part, scale in enumerate(scales)]
        if form.has_min:
            low = _times_factor(builder, low, block, at + LANES * form.parts)
    return scales, low


def _times_factor(builder, values, block, at):
    """float32 times int8, rounded as one product."""
    factors = builder.load(_at(builder, block, at, ir.VectorType(I8, LANES)), align=1)
    return builder.fmul(values, builder.sitofp(builder.sext(factors, WORDS), FLOATS), flags=("contract",))
