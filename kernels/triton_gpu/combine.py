# mypy: ignore-errors
# ruff: noqa: N803
"""One softmax from partial ones: packed splits, the output basis, full-precision splits."""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_splits(part, stat, splits, D: tl.constexpr, BLOCK: tl.constexpr):
    """Sum [D], weight and log2 of the maximum of ``splits`` partial sums."""
    d = tl.arange(0, D)
    s = tl.arange(0, BLOCK)
    top = NEVER
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(0, splits, BLOCK):
        there = start + s < splits
        m = tl.load(stat + (start + s) * 2, mask=there, other=NEVER)
        weight = tl.load(stat + (start + s) * 2 + 1, mask=there, other=0.0)
        block = tl.load(part + (start + s)[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        old = tl.exp2(top - new)
        # a split that saw nothing holds sums of nothing: its weight is zero whatever its maximum
        factor = tl.where(m > NEVER * 0.5, tl.exp2(m - new), 0.0)
        total = total * old + tl.sum(weight * factor, 0)
        acc = acc * old + tl.sum(block * factor[:, None], 0)
        top = new
    return acc, total, top


@triton.jit(do_not_specialize=["splits", "full_splits"])  # varies: one compilation serves all
def combine_kernel(
    part_ptr, stat_ptr, full_part_ptr, full_stat_ptr, basis_ptr, mean_ptr, out_ptr, lse_ptr,
    splits, full_splits, columns, queries, heads, repeat,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_BASIS: tl.constexpr,
):  # fmt: skip
    """``out = (w_p (B sum_p + l_p mean) + w_f sum_f) / (w_p l_p + w_f l_f)`` and the log-sum-exp of one query and head.

    B is the output basis: packed splits are in the stored basis, full-precision ones in that of the model. Reads
    ``(splits + full_splits) (D + 2)`` floats and one [D, D] matrix, writes D numbers.
    """
    program = tl.program_id(0)  # ((row * queries) + query) * heads * repeat + head * repeat + r
    r = program % repeat
    head = (program // repeat) % heads
    query = (program // (repeat * heads)) % queries
    row = program // (repeat * heads * queries)
    at = ((row * heads + head) * columns + query * repeat + r).to(tl.int64)
    d = tl.arange(0, D)
    acc, weight, top = merge_splits(part_ptr + at * splits * D, stat_ptr + at * splits * 2, splits, D, BLOCK)
    if HAS_BASIS:
        matrix = tl.load(basis_ptr + head * (D * D) + d[:, None] * D + d[None, :])
        acc = tl.sum(matrix * acc[None, :], 1) + weight * tl.load(mean_ptr + head * D + d)
    full, full_weight, full_top = merge_splits(
        full_part_ptr + at * full_splits * D, full_stat_ptr + at * full_splits * 2, full_splits, D, BLOCK
    )
    new = tl.maximum(top, full_top)
    a = tl.exp2(top - new)
    b = tl.exp2(full_top - new)
    total = weight * a + full_weight * b
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    result = (acc * a + full * b) / safe
    tl.store(out_ptr + program.to(tl.int64) * D + d, tl.where(seen, result, 0.0).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + program, tl.where(seen, (new + tl.log2(safe)) * LN2, float("-inf")))
