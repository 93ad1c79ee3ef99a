# mypy: ignore-errors
# ruff: noqa: N803
"""One softmax from partial ones: packed splits, the output basis, full-precision splits."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.overlap import wait_for_inputs
from skvq.kernels.triton_gpu.prepare import load_matrix

NEVER = tl.constexpr(-1.0e30)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_splits(part, stat, splits, D: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """Sum [D], weight and log2 of the maximum of up to MOST partial sums, BLOCK of them at a time.

    Maxima come first, all at once, so that no block waits for the one before it.
    """
    d = tl.arange(0, D)
    all_splits = tl.arange(0, MOST)
    m = tl.load(stat + all_splits * 2, mask=all_splits < splits, other=NEVER)
    weight = tl.load(stat + all_splits * 2 + 1, mask=all_splits < splits, other=0.0)
    top = tl.max(m, 0)
    # a split that saw nothing holds sums of nothing: its weight is zero whatever its maximum
    total = tl.sum(tl.where(m > NEVER * 0.5, weight * tl.exp2(m - top), 0.0), 0)
    s = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, splits, BLOCK):
        there = start + s < splits
        top_here = tl.load(stat + (start + s) * 2, mask=there, other=NEVER)
        block = tl.load(part + (start + s)[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        acc += block * tl.where(top_here > NEVER * 0.5, tl.exp2(top_here - top), 0.0)[:, None]
    return tl.sum(acc, 0), total, top


@triton.jit(do_not_specialize=["splits", "full_splits"])  # varies: one compilation serves all
def combine_kernel(
    part_ptr, stat_ptr, full_part_ptr, full_stat_ptr, basis_ptr, mean_ptr, out_ptr, lse_ptr,
    splits, full_splits, columns, queries, heads, repeat,
    D: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, FULL: tl.constexpr, HAS_BASIS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out = (w_p (B sum_p + l_p mean) + w_f sum_f) / (w_p l_p + w_f l_f)`` and the log-sum-exp of one query and head.

    B is the output basis: packed splits are in the stored basis, full-precision ones in that of the model. There are up to
    MOST of the former and FULL of the latter. Reads ``(splits + full_splits) (D + 2)`` floats and one [D, D] matrix, writes D
    numbers.
    """
    program = tl.program_id(0)  # ((row * queries) + query) * heads * repeat + head * repeat + r
    r = program % repeat
    head = (program // repeat) % heads
    query = (program // (repeat * heads)) % queries
    row = program // (repeat * heads * queries)
    at = ((row * heads + head) * columns + query * repeat + r).to(tl.int64)
    d = tl.arange(0, D)
    if HAS_BASIS:
        matrix = load_matrix(basis_ptr + head * (D * D), d, D)
        mean = tl.load(mean_ptr + head * D + d)
    wait_for_inputs(PDL)
    full, full_weight, full_top = merge_splits(
        full_part_ptr + at * full_splits * D, full_stat_ptr + at * full_splits * 2, full_splits, D, FULL, FULL
    )
    acc, weight, top = merge_splits(part_ptr + at * splits * D, stat_ptr + at * splits * 2, splits, D, BLOCK, MOST)
    if HAS_BASIS:
        acc = tl.sum(matrix * acc[None, :], 1) + weight * mean
    new = tl.maximum(top, full_top)
    a = tl.exp2(top - new)
    b = tl.exp2(full_top - new)
    total = weight * a + full_weight * b
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    result = (acc * a + full * b) / safe
    tl.store(out_ptr + program.to(tl.int64) * D + d, tl.where(seen, result, 0.0).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + program, tl.where(seen, (new + tl.log2(safe)) * LN2, float("-inf")))
