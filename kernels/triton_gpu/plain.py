# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806
"""Decode attention over the 16-bit pages of method ``fp``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.interface import PlainPages, Step
from skvq.kernels.layout import PAGE_TOKENS
from skvq.kernels.triton_gpu.card import Card
from skvq.kernels.triton_gpu.forms import PAGE_BLOCK, VARYING, Columns
from skvq.kernels.triton_gpu.overlap import overlapping, wait_for_inputs
from skvq.kernels.triton_gpu.pages import in_page
from skvq.kernels.triton_gpu.slots import dense_step, load_columns
from skvq.kernels.triton_gpu.softmax import LOG2E, NEVER, steps_of, store_partial
from skvq.kernels.triton_gpu.workspace import Partials


@triton.jit(**VARYING)
def attend_plain_kernel(
    q_ptr, key_ptr, value_ptr, pages_ptr, slots_ptr, packed_ptr, positions_ptr, part_ptr, stat_ptr,
    stride_page, stride_head, stride_pages_slot, heads, chunks, queries, repeat, span, columns,
    D: tl.constexpr, NH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial attention of one kv head, one chunk of NH columns and one split of a sequence's 16-bit pages.

    Reads 4 D bytes a token once, writes NH rows of D + 2 floats.
    """
    BLOCKS: tl.constexpr = in_page(BLOCK)
    wait_for_inputs(PDL)
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) // chunks
    chunk = tl.program_id(2) % chunks
    splits = tl.num_programs(1)
    column = chunk * NH + tl.arange(0, NH)
    d = tl.arange(0, D)
    b = tl.arange(0, BLOCK)
    q = load_columns(q_ptr, column, row, head, heads, queries, repeat, D)
    now = tl.load(positions_ptr + row * queries + tl.minimum(column // repeat, queries - 1))
    oldest = now - span + 1
    packed = tl.load(packed_ptr + row)
    row_ptr = pages_ptr + tl.load(slots_ptr + row) * stride_pages_slot
    start, stop = steps_of(split, splits, tl.cdiv(packed, BLOCK), oldest, BLOCK, True)
    scale = LOG2E / D**0.5
    m_i = tl.full([NH], NEVER, tl.float32)
    l_i = tl.zeros([NH], tl.float32)
    acc = tl.zeros([D, NH], tl.float32)
    page = tl.load(row_ptr + start // BLOCKS, mask=start < stop, other=0).to(tl.int64)
    for i in range(start, stop):
        place = page * stride_page + head * stride_head + ((i % BLOCKS) * BLOCK + b)[:, None] * D + d[None, :]
        page = tl.load(row_ptr + tl.minimum(i + 1, stop - 1) // BLOCKS).to(tl.int64)
        at = (i * BLOCK + b)[:, None]
        k = tl.load(key_ptr + place, mask=at < packed, other=0.0)
        v = tl.load(value_ptr + place, mask=at < packed, other=0.0)
        seen = (at < packed) & (at >= oldest[None, :])
        m_i, l_i, acc = dense_step(q, k, v, seen, m_i, l_i, acc, scale, WIDE)
    store_partial(part_ptr, stat_ptr, acc, m_i, l_i, row, head, heads, column, columns, split, splits, D)


def launch_plain(card: Card, q: Tensor, pages: PlainPages, step: Step, columns: Columns, packed: Partials) -> None:
    """Partial softmaxes over the 16-bit pages to ``packed``."""
    size = q.shape[3]
    assert pages.keys.shape[2] == PAGE_TOKENS and pages.keys.stride()[2:] == (size, 1), pages.keys.stride()
    assert pages.values.stride() == pages.keys.stride(), (pages.values.stride(), pages.keys.stride())
    attend_plain_kernel[(columns.heads, packed.splits, q.shape[0] * columns.chunks)](
        q, pages.keys, pages.values, step.page_table, step.slots, step.packed, step.positions,
        packed.sums, packed.statistics,
        pages.keys.stride(0), pages.keys.stride(1), step.page_table.stride(0), columns.heads, columns.chunks,
        columns.queries, columns.repeat, step.span, columns.total,
        D=size, NH=max(columns.width, 8), BLOCK=PAGE_BLOCK, WIDE=card.interpreted, num_warps=4, num_stages=3,
        **overlapping(card.pdl),
    )  # fmt: skip
