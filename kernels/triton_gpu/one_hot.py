# mypy: ignore-errors
# ruff: noqa: N803, N806, RET505, RUF005
"""Scales and mids of groups brought to their channels by products with one-hot matrices; RoPE in the same order of lanes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def first_channel(n, planes, blocks, each):
    """First channel of entry ``n`` of a tuple that has all ``planes`` of the first of ``blocks`` blocks, then of the next.

    ``each``: channels of an entry.
    """
    return (n % planes * blocks + n // planes) * each


@triton.jit
def inverse(x):
    """1 / x where x is a power of two."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def one_hot(label, weight, G: tl.constexpr):
    """[channels, G] float16: ``weight`` where the column is the channel's label, else 0. Exact: weights are powers of two."""
    return tl.where(tl.arange(0, G)[None, :] == label[:, None], weight, 0.0).to(tl.float16)


@triton.jit
def raw_place(i, ASM: tl.constexpr):
    """Which number a product must have as column ``i``, so that ``in_place`` needs no exchange between lanes."""
    if ASM:
        return (i & -16) | (((i >> 1) & 3) << 2) | (((i >> 3) & 1) << 1) | (i & 1)
    else:
        return i


@triton.jit
def in_place(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """``x`` [ROWS, COLUMNS], whose columns come in the order of ``raw_place``, with its columns in order.

    Of every sixteen columns, lane c of the four that share a row holds columns (2c, 2c+1) and (8+2c, 9+2c) of a tensor core's
    sum, but 4c .. 4c+3 of an operand made from bytes. With columns exchanged accordingly the sum is an operand where it
    stands.
    """
    if ASM:
        x = tl.reshape(x, [ROWS, COLUMNS // 16, 2, 4, 2])
        return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), [ROWS, COLUMNS])
    else:
        return x


@triton.jit
def in_raw(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """The inverse of ``in_place``."""
    if ASM:
        x = tl.reshape(x, [ROWS, COLUMNS // 16, 4, 2, 2])
        return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), [ROWS, COLUMNS])
    else:
        return x


@triton.jit
def spread(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """``a b`` in float16, where one factor is one-hot: each sum has a single term that is not zero."""
    if ASM:
        return in_place(tl.dot(a, b, out_dtype=tl.float16), ROWS, COLUMNS, ASM)
    else:
        return tl.dot(a, b).to(tl.float16)


@triton.jit
def turn_back(q_blocks, base, FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, NH: tl.constexpr):
    """The queries at COUNT channels from FIRST on, and at those D / 2 further, turned back by the angles at ``base``.

    Two tensors [COUNT, NH]. ``q_blocks`` has 16 channels an entry, as many as a warp can put side by side without an exchange
    between lanes.
    """
    H: tl.constexpr = D // 2
    at = base + FIRST + tl.arange(0, 16)
    a = ()
    b = ()
    for n in tl.static_range(COUNT // 16):
        cos, sin = tl.load(at + n * 16)[:, None], tl.load(at + n * 16 + H)[:, None]
        qa, qb = q_blocks[FIRST // 16 + n], q_blocks[(FIRST + H) // 16 + n]
        a = a + (qa * cos + qb * sin,)
        b = b + (qb * cos - qa * sin,)
    return one_above(a, COUNT, NH), one_above(b, COUNT, NH)


@triton.jit
def one_above(parts, ROWS: tl.constexpr, NH: tl.constexpr):
    """One tensor [ROWS, NH] of one part, or of two, the first above the second."""
    if len(parts) == 1:
        return parts[0]
    else:
        return tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (2, 0, 1)), [ROWS, NH])


@triton.jit
def twice(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x`` [ROWS, COLUMNS] above itself. Not by a join: the compiler would put the channels of a join in another order."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, 0), [2, ROWS, COLUMNS]), [2 * ROWS, COLUMNS])
