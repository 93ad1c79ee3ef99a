"""Fused kernels of the small operations of a decode step (``kernels.ops``): one pass over memory each, float32."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.job import record
from skvq.kernels.numba_cpu.numeric import FLOAT16, FLOAT32, exp2
from skvq.kernels.numba_cpu.simd import as_bits, as_float, f32, f64, fetch_add, i64, record_at, u16
from skvq.kernels.numba_cpu.tiles import FAST

ADD_FIELDS = ("x", "delta", "total", "count")
NORM_FIELDS = ("counter", "x", "delta", "total", "weight", "out", "rows", "columns", "chunk", "eps")  # eps: bits of a float64
SWIGLU_FIELDS = ("counter", "x", "out", "rows", "columns", "chunk")
TURN_FIELDS = (
    "counter", "q", "q_row", "k", "k_row", "v", "v_row", "cos", "sin", "out", "rows", "heads", "kv_heads", "size", "slots",
    "places", "keys", "values", "slot_stride", "head_stride", "place_stride", "kind", "chunk",  # rows and strides in bytes
)  # fmt: skip
MERGE_FIELDS = ("out", "lse", "more", "more_lse", "rows", "size")
add_job, norm_job, swiglu_job, turn_job, merge_job = (
    record_at(record(*fields)) for fields in (ADD_FIELDS, NORM_FIELDS, SWIGLU_FIELDS, TURN_FIELDS, MERGE_FIELDS)
)
EPS = NORM_FIELDS.index("eps")
LOG2_E = np.float32(1.4426950408889634)


@njit(**FAST)
def norm_row(x, weight, out, columns, eps):
    """RMS norm of one row."""
    row, scale, to = f32(x), f32(weight), f32(out)
    squares = np.float32(0)
    for i in range(columns):
        squares += row[i] * row[i]
    factor = np.float32(1) / np.sqrt(squares / np.float32(columns) + eps)
    for i in range(columns):
        to[i] = scale[i] * (row[i] * factor)


@njit(**FAST)
def add_row(x, delta, total, columns):
    """Sum of two rows."""
    a, b, to = f32(x), f32(delta), f32(total)
    for i in range(columns):
        to[i] = a[i] + b[i]


@njit(**FAST)
def swiglu_row(gate_up, out, columns):
    """``silu(gate) * up``; the logistic function from exp(-|gate|), which cannot overflow."""
    gates, ups, to = f32(gate_up), f32(gate_up + 4 * columns), f32(out)
    for i in range(columns):
        gate = gates[i]
        e = exp2(-abs(gate) * LOG2_E)
        part = np.float32(1) / (np.float32(1) + e)
        to[i] = gate * (part if gate >= np.float32(0) else e * part) * ups[i]


def build_add(stamp):
    """Kernel of ``total = x + delta``, for one thread."""

    def add(address):
        if stamp == 0:
            return
        job = add_job(address)
        add_row(job.x, job.delta, job.total, job.count)

    return add


def build_norm(stamp):
    """Kernel of ``out = norm(x)``, or with ``delta`` of ``total = x + delta; out = norm(total)``."""

    def norm(address):
        if stamp == 0:
            return
        job = norm_job(address)
        step = 4 * job.columns
        eps = np.float32(f64(address + 8 * EPS)[0])
        while True:
            first = fetch_add(address, job.chunk)
            if first >= job.rows:
                break
            for r in range(first, min(first + job.chunk, job.rows)):
                x = job.x + r * step
                if job.delta:
                    add_row(x, job.delta + r * step, job.total + r * step, job.columns)
                    x = job.total + r * step
                norm_row(x, job.weight, job.out + r * step, job.columns, eps)

    return norm


def build_swiglu(stamp):
    """Kernel of ``out = silu(gate) * up``."""

    def swiglu(address):
        if stamp == 0:
            return
        job = swiglu_job(address)
        step = 4 * job.columns
        while True:
            first = fetch_add(address, job.chunk)
            if first >= job.rows:
                break
            for r in range(first, min(first + job.chunk, job.rows)):
                swiglu_row(job.x + 2 * r * step, job.out + r * step, job.columns)

    return swiglu


def build_merge(stamp):
    """Kernel that adds a partial softmax to another whose log-sum-exps are finite, for one thread."""

    def merge(address):
        if stamp == 0:
            return
        job = merge_job(address)
        lses, more_lses = f32(job.lse), f32(job.more_lse)
        for r in range(job.rows):
            apart = (more_lses[r] - lses[r]) * LOG2_E  # minus infinity if there is nothing
            e = exp2(-abs(apart))
            less, total = (np.float32(1), e) if apart < np.float32(0) else (e, np.float32(1)), np.float32(1) + e
            ours, theirs = less[0] / total, less[1] / total
            out, more = f32(job.out + 4 * job.size * r), f32(job.more + 4 * job.size * r)
            for i in range(job.size):
                out[i] = ours * out[i] + theirs * more[i]
            lses[r] = max(lses[r], more_lses[r]) + np.log(total)

    return merge


# --- RoPE and the window ------------------------------------------------------------------------------------------------


@njit(**FAST)
def half_bits(value):
    """Bits of a float32 as float16, to nearest even, whatever the CPU."""
    bits = as_bits(value)
    size = bits & np.int32(0x7FFFFFFF)
    normal = (size - np.int32(112 << 23) + np.int32(0xFFF) + ((size >> 13) & np.int32(1))) >> 13
    small = as_bits(as_float(size) + np.float32(0.5)) - np.int32(126 << 23)
    special = np.int32(0x7E00) if size > np.int32(255 << 23) else np.int32(0x7C00)
    found = small if size < np.int32(113 << 23) else normal
    found = special if size >= np.int32(143 << 23) else found
    return np.uint16(found | ((bits >> 16) & np.int32(0x8000)))


@njit(**FAST)
def bfloat_bits(value):
    """Bits of a float32 as bfloat16, to nearest even."""
    bits = as_bits(value)
    rounded = (bits + np.int32(0x7FFF) + ((bits >> 16) & np.int32(1))) >> 16
    broken = (bits & np.int32(0x7FFFFFFF)) > np.int32(255 << 23)
    return np.uint16((np.int32(0x7FC0) if broken else rounded) & np.int32(0xFFFF))


@njit(**FAST)
def turn_row(source, target, cos, sin, half, kind):
    """RoPE of one head, written in the dtype ``kind``."""
    x, c, s = f32(source), f32(cos), f32(sin)
    if kind == FLOAT32:
        floats = f32(target)
        for j in range(half):
            a, b = x[j], x[half + j]
            floats[j] = a * c[j] - b * s[j]
            floats[half + j] = b * c[j] + a * s[j]
        return
    halves = u16(target)
    for j in range(half):
        a, b = x[j], x[half + j]
        first, second = a * c[j] - b * s[j], b * c[j] + a * s[j]
        halves[j] = half_bits(first) if kind == FLOAT16 else bfloat_bits(first)
        halves[half + j] = half_bits(second) if kind == FLOAT16 else bfloat_bits(second)


@njit(**FAST)
def store_row(source, target, count, kind):
    """Write a float32 row in the dtype ``kind``."""
    values, floats, halves = f32(source), f32(target), u16(target)
    for i in range(count):
        if kind == FLOAT32:
            floats[i] = values[i]
        else:
            halves[i] = half_bits(values[i]) if kind == FLOAT16 else bfloat_bits(values[i])


def build_turn(stamp):
    """Kernel of ``interface.Ops.rope_to_slots`` and ``rope_to_buffer``."""

    def turn(address):
        if stamp == 0:
            return
        job = turn_job(address)
        size, half = job.size, job.size // 2
        while True:
            first = fetch_add(address, job.chunk)
            if first >= job.rows:
                break
            for row in range(first, min(first + job.chunk, job.rows)):
                cos, sin = job.cos + 4 * half * row, job.sin + 4 * half * row
                for head in range(job.heads):
                    out = job.out + 4 * size * (row * job.heads + head)
                    turn_row(job.q + row * job.q_row + 4 * size * head, out, cos, sin, half, FLOAT32)
                place = i64(job.slots)[row] * job.slot_stride + i64(job.places)[row] * job.place_stride
                for head in range(job.kv_heads):
                    at = place + head * job.head_stride
                    turn_row(job.k + row * job.k_row + 4 * size * head, job.keys + at, cos, sin, half, job.kind)
                    store_row(job.v + row * job.v_row + 4 * size * head, job.values + at, size, job.kind)

    return turn
