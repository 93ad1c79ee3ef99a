# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""Decode attention over the full-precision slots; ``dense_step`` and ``load_columns`` serve the 16-bit pages too."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import FullSlots, Step
from skvq.kernels.triton_gpu.card import Card
from skvq.kernels.triton_gpu.forms import SLOT_BLOCK, VARYING, Columns
from skvq.kernels.triton_gpu.overlap import overlapping, wait_for_inputs
from skvq.kernels.triton_gpu.softmax import LOG2E, NEVER, softmax_step, store_partial
from skvq.kernels.triton_gpu.workspace import Partials


@triton.jit
def dense_step(q, k, v, seen, m_i, l_i, acc, scale, WIDE: tl.constexpr):
    """The running softmax (maximum, weight, sum) after one more block of 16-bit tokens.

    k and v [T, D], q [D, N], ``seen`` bool [T, N], sum [D, N]; ``scale`` includes the log2 of e.
    """
    if WIDE:
        k, v = k.to(tl.float32), v.to(tl.float32)
    x = tl.where(seen, tl.dot(k, q.to(k.dtype)) * scale, NEVER)
    return softmax_step(x, v, m_i, l_i, acc)


@triton.jit
def load_columns(q_ptr, column, row, head, heads, queries, repeat, D: tl.constexpr):
    """q [D, N] in its own dtype, column c of one kv head; zero past the last query head."""
    query = ((row * queries + column // repeat) * heads + head) * repeat + column % repeat
    d = tl.arange(0, D)
    return tl.load(q_ptr + query[None, :] * D + d[:, None], mask=(column < queries * repeat)[None, :], other=0.0)


@triton.jit
def attend_slots(
    q_ptr, key_ptr, value_ptr, held_ptr, slots_ptr, positions_ptr, part_ptr, stat_ptr,
    stride_slot, stride_head, stride_token, stride_held, heads, queries, repeat, count, span, columns,
    head, row, chunk, split, splits,
    D: tl.constexpr, NH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial attention of one kv head and one chunk of NH columns over every ``splits``-th block of a sequence's slots.

    A slot that holds position ``held`` is seen from position t if ``0 <= held <= t`` and ``t - held < span``. An empty slot
    may hold anything, NaN included, and is read as zeros. Reads 4 D bytes a slot, writes NH rows of D + 2 floats.
    """
    column = chunk * NH + tl.arange(0, NH)
    d = tl.arange(0, D)
    b = tl.arange(0, BLOCK)
    q = load_columns(q_ptr, column, row, head, heads, queries, repeat, D)
    now = tl.load(positions_ptr + row * queries + tl.minimum(column // repeat, queries - 1))
    slot = tl.load(slots_ptr + row)
    scale = LOG2E / D**0.5
    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    acc = tl.zeros([D, NH], tl.float32)
    for start in range(split * BLOCK, count, splits * BLOCK):
        at = start + b
        held = tl.load(held_ptr + slot * stride_held + at, mask=at < count, other=-1)
        place = slot * stride_slot + head.to(tl.int64) * stride_head + at[:, None].to(tl.int64) * stride_token + d[None, :]
        k = tl.load(key_ptr + place, mask=(held >= 0)[:, None], other=0.0)
        v = tl.load(value_ptr + place, mask=(held >= 0)[:, None], other=0.0)
        age = now[None, :] - held[:, None]
        seen = (held >= 0)[:, None] & (age >= 0) & (age < span)
        m_i, l_i, acc = dense_step(q, k, v, seen, m_i, l_i, acc, scale, WIDE)
    store_partial(part_ptr, stat_ptr, acc, m_i, l_i, row, head, heads, column, columns, split, splits, D)


@triton.jit(**VARYING)
def attend_slots_kernel(
    q_ptr, key_ptr, value_ptr, held_ptr, slots_ptr, positions_ptr, part_ptr, stat_ptr,
    stride_slot, stride_head, stride_token, stride_held, heads, chunks, queries, repeat, count, span, columns,
    D: tl.constexpr, NH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``attend_slots`` by itself: a program a kv head, split and chunk."""
    wait_for_inputs(PDL)
    attend_slots(
        q_ptr, key_ptr, value_ptr, held_ptr, slots_ptr, positions_ptr, part_ptr, stat_ptr,
        stride_slot, stride_head, stride_token, stride_held, heads, queries, repeat, count, span, columns,
        tl.program_id(0), tl.program_id(2) // chunks, tl.program_id(2) % chunks, tl.program_id(1), tl.num_programs(1),
        D, NH, BLOCK, WIDE,
    )  # fmt: skip


def launch_slots(card: Card, q: Tensor, full: FullSlots, step: Step, columns: Columns, held: Partials) -> None:
    """Partial softmaxes over the full-precision slots to ``held``."""
    attend_slots_kernel[(columns.heads, held.splits, q.shape[0] * columns.chunks)](
        q, full.keys, full.values, full.positions, step.slots, step.positions, held.sums, held.statistics,
        *full.keys.stride()[:3], full.positions.stride(0), columns.heads, columns.chunks, columns.queries, columns.repeat,
        full.positions.shape[1], step.span, columns.total,
        D=q.shape[3], NH=8, BLOCK=SLOT_BLOCK, WIDE=card.interpreted, num_warps=1, num_stages=1, **overlapping(card.pdl),
    )  # fmt: skip
