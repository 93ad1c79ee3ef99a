"""Thirty-two float32 as one value of jitted code, one for each token: ``load(a) * scale + load(b)`` is a few instructions.

A loop ``for t in range(32)`` would say the same, but LLVM unrolls it into 32 scalars before it looks for vectors, and leaves
sums in memory, not knowing what else lies at the addresses. An operand may be a float32, for all lanes alike; a comparison
makes a mask, for ``where``.
"""

# mypy: ignore-errors
from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from skvq.kernels.numba_cpu.simd import F32, I32, _at, _intrinsic
from skvq.kernels.numba_cpu.tiles import FAST

LANES = 32
NUMBERS, BITS = ir.VectorType(F32, LANES), ir.VectorType(ir.IntType(1), LANES)


class LanesType(types.Type):
    """LANES numbers of one kind."""

    def __init__(self, kind, vector):
        self.vector = vector
        super().__init__(name=f"{LANES} x {kind}")


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, lanes.vector)


lanes, mask = LanesType("float32", NUMBERS), LanesType("bool", BITS)


def _spread(builder, value):
    """A number in all lanes; lanes as they are."""
    if value.type == NUMBERS:
        return value
    single = builder.insert_element(ir.Constant(NUMBERS, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def _define(function, result, build):
    """``function(a, b)`` of jitted code, where one of both may be a float32."""

    @type_callable(function)
    def typer(context):
        return lambda a, b: result if lanes in (a, b) and {a, b} <= {lanes, types.float32} else None

    def lower(context, builder, signature, args):
        return build(builder, *(_spread(builder, value) for value in args))

    for pair in ((lanes, lanes), (lanes, types.float32), (types.float32, lanes)):
        lower_builtin(function, *pair)(lower)


def _comparing(sign):
    return lambda builder, a, b: builder.fcmp_ordered(sign, a, b)


def _choosing(sign):
    """The smaller or the larger of two; b where a is no number."""
    return lambda builder, a, b: builder.select(builder.fcmp_ordered(sign, a, b), a, b)


for _names, _result, _build in (
    ((operator.add, operator.iadd), lanes, ir.IRBuilder.fadd),
    ((operator.sub, operator.isub), lanes, ir.IRBuilder.fsub),
    ((operator.mul, operator.imul), lanes, ir.IRBuilder.fmul),
    ((operator.truediv,), lanes, ir.IRBuilder.fdiv),
    ((min,), lanes, _choosing("<")),
    ((max,), lanes, _choosing(">")),
    ((operator.gt,), mask, _comparing(">")),
):
    for _name in _names:
        _define(_name, _result, _build)


@intrinsic
def load(typingctx, address):
    """The numbers at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_at(builder, args[0], 0, NUMBERS), align=4)

    return lanes(types.int64), codegen


@intrinsic
def store(typingctx, address, numbers):
    def codegen(context, builder, signature, args):
        builder.store(args[1], _at(builder, args[0], 0, NUMBERS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, lanes), codegen


@intrinsic
def spread(typingctx, number):
    """A float32 in all lanes."""

    def codegen(context, builder, signature, args):
        return _spread(builder, args[0])

    return lanes(types.float32), codegen


@njit(**FAST)
def zeros():
    return spread(np.float32(0))


@intrinsic
def rint(typingctx, numbers):
    """To the nearest whole number, halves to the even one."""

    def codegen(context, builder, signature, args):
        return builder.call(_intrinsic(builder.module, f"llvm.rint.v{LANES}f32", NUMBERS, [NUMBERS]), args)

    return lanes(lanes), codegen


@intrinsic
def where(typingctx, chosen, numbers, others):
    """``numbers`` where the mask is set, else ``others``."""

    def codegen(context, builder, signature, args):
        return builder.select(*args)

    return lanes(mask, lanes, lanes), codegen


@intrinsic
def both(typingctx, one, other):
    """Where two masks are set."""

    def codegen(context, builder, signature, args):
        return builder.and_(*args)

    return mask(mask, mask), codegen
