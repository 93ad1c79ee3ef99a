# mypy: ignore-errors
# ruff: noqa: N803, RET505
"""What every softmax here needs: it is taken in base 2, and a score of NEVER stands for a token that is not seen."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1.0e30)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """2^x. One instruction with ASM; ``tl.exp2`` takes three more, for results that are subnormal."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def steps_of(split, splits, count, oldest, STEP: tl.constexpr, HAS_SPAN: tl.constexpr):
    """First and last of the ``count`` steps of STEP tokens that a split takes; none before the first that a query sees.

    ``oldest`` int32 [N]: the first position that each query's span reaches.
    """
    begin = 0
    if HAS_SPAN:
        begin = tl.minimum(tl.maximum(tl.min(oldest, 0), 0) // STEP, count)
    per_split = tl.cdiv(count - begin, splits)
    start = begin + split * per_split
    return start, tl.minimum(start + per_split, count)


@triton.jit
def softmax_step(x, v, m_i, l_i, acc):
    """The running softmax (maxima and weights [N], sum [D, N]) after T more tokens: scores x [T, N], values v [T, D].

    Scores include the log2 of e; one that is NEVER counts for nothing. Tokens are the rows of the product, of which tensor
    cores have more than columns.
    """
    m_new = tl.maximum(m_i, tl.max(x, 0))
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(x - tl.where(m_new > NEVER * 0.5, m_new, 0.0)[None, :])
    l_i = l_i * alpha + tl.sum(p, 0)
    acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * alpha[None, :])
    return m_new, l_i, acc


@triton.jit
def store_partial(part_ptr, stat_ptr, acc, m_i, l_i, row, head, heads, column, columns, split, splits, D: tl.constexpr):
    """A split's sum [D, N], maxima and weights [N], of those of its columns that are there."""
    out = ((row * heads + head) * columns + column).to(tl.int64) * splits + split
    inside = column < columns
    tl.store(part_ptr + out[None, :] * D + tl.arange(0, D)[:, None], acc, mask=inside[None, :])
    tl.store(stat_ptr + out * 2, m_i, mask=inside)
    tl.store(stat_ptr + out * 2 + 1, l_i, mask=inside)
