"""Products with 16-bit matrices in float32 arithmetic: weights are widened in registers and never written back."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.job import record
from skvq.kernels.numba_cpu.linear_simd import CHAINS
from skvq.kernels.numba_cpu.numeric import BFLOAT16
from skvq.kernels.numba_cpu.simd import (
    F32,
    FLOATS,
    I16,
    I64,
    LANES,
    WORDS,
    _all,
    _at,
    _intrinsic,
    _load_halves,
    f32,
    fetch_add,
    record_at,
)
from skvq.kernels.numba_cpu.tiles import FAST

FIELDS = (
    "counter", "matrix", "kind", "rows", "columns", "x", "count", "bias", "out", "out_stride", "chunk",  # stride in bytes
)  # fmt: skip
multiply_job = record_at(record(*FIELDS))


def _brain(context, builder, address):
    """Sixteen bfloat16 as float32."""
    halves = builder.load(_at(builder, address, 0, ir.VectorType(I16, LANES)), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, WORDS), _all(16)), FLOATS)


def make_dot(name, widen, item):
    """Intrinsic that multiplies ``columns`` numbers of ``item`` bytes, ``widen``-ed sixteen at a time, by as many float32."""

    def dot(typingctx, weights, x, columns):
        def codegen(context, builder, signature, args):
            weights, x, columns = args
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            acc = [cgutils.alloca_once_value(builder, zero) for _ in range(CHAINS)]

            def contract(step, slot):
                w = widen(context, builder, builder.add(weights, builder.mul(step, ir.Constant(I64, item * LANES))))
                v = builder.load(_at(builder, x, builder.mul(step, ir.Constant(I64, 4 * LANES)), FLOATS), align=4)
                total = builder.fadd(builder.load(slot), builder.fmul(w, v, flags=("contract",)), flags=("contract",))
                builder.store(total, slot)

            steps = builder.sdiv(columns, ir.Constant(I64, LANES))
            turns = builder.sdiv(steps, ir.Constant(I64, CHAINS))
            done = builder.mul(turns, ir.Constant(I64, CHAINS))
            with cgutils.for_range(builder, turns) as loop:
                first = builder.mul(loop.index, ir.Constant(I64, CHAINS))
                for k in range(CHAINS):
                    contract(builder.add(first, ir.Constant(I64, k)), acc[k])
            with cgutils.for_range(builder, builder.sub(steps, done)) as loop:
                contract(builder.add(done, loop.index), acc[0])
            a, b, c, d = (builder.load(slot) for slot in acc)
            total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
            reduce = _intrinsic(builder.module, "llvm.vector.reduce.fadd.v16f32", F32, [F32, FLOATS])
            return builder.call(reduce, [ir.Constant(F32, 0.0), total], fastmath=("reassoc",))

        return types.float32(types.int64, types.int64, types.int64), codegen

    dot.__name__ = name
    return intrinsic(dot)


dot_bfloat16, dot_float16 = make_dot("dot_bfloat16", _brain, 2), make_dot("dot_float16", _load_halves, 2)


@njit(**FAST)
def product(kind, weights, x, columns):
    """A row of 16-bit weights times a vector."""
    if kind == BFLOAT16:
        return dot_bfloat16(weights, x, columns)
    return dot_float16(weights, x, columns)


def build_multiply_halves(stamp):
    """Kernel of ``out[n] = W x[n] + bias``. Threads take ``chunk`` rows at a time."""

    def multiply_halves(address):
        if stamp == 0:
            return
        job = multiply_job(address)
        while True:
            first = fetch_add(address, job.chunk)
            if first >= job.rows:
                break
            for row in range(first, min(first + job.chunk, job.rows)):
                for n in range(job.count):
                    weights, x = job.matrix + 2 * row * job.columns, job.x + 4 * n * job.columns
                    value = product(job.kind, weights, x, job.columns)
                    if job.bias:
                        value += f32(job.bias)[row]
                    f32(job.out + n * job.out_stride)[row] = value

    return multiply_halves
