# mypy: ignore-errors
# ruff: noqa: N803, N806, RET505, RUF005
"""Scales brought to their channels by dots with one-hot matrices, in the lanes where the tensor core wants them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def first_channel(n, planes, blocks, each):
    """First channel of entry ``n`` when the planes of a block follow each other, then those of the next block."""
    return (n % planes * blocks + n // planes) * each


@triton.jit
def inverse(x):
    """1 / x of a power of two."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def one_hot(label, weight, G: tl.constexpr):
    """[channels, G] fp16: ``weight`` where a channel's label is the column, else 0; a power of two, hence exact."""
    return tl.where(tl.arange(0, G)[None, :] == label[:, None], weight, 0.0).to(tl.float16)


@triton.jit
def raw_place(i, ASM: tl.constexpr):
    """Where ``in_place`` finds the number of place ``i``: a dot that brings it out there needs no exchange of lanes."""
    if ASM:
        return (i & -16) | (((i >> 1) & 3) << 2) | (((i >> 3) & 1) << 1) | (i & 1)
    else:
        return i


@triton.jit
def in_place(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """``x`` [ROWS, COLUMNS] with its columns, made in the order of ``raw_place``, in their own order.

    A lane of a sum of the tensor core holds columns (2c, 2c+1) and (8+2c, 9+2c) of sixteen, of an operand made from bytes
    4c .. 4c+3. Columns exchanged accordingly, the sum is an operand where it stands.
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
    """``a b`` in fp16, one term of each sum not zero."""
    if ASM:
        return in_place(tl.dot(a, b, out_dtype=tl.float16), ROWS, COLUMNS, ASM)
    else:
        return tl.dot(a, b).to(tl.float16)


@triton.jit
def turn_back(q_blocks, base, FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, NH: tl.constexpr):
    """Queries at COUNT channels from FIRST on and at those D / 2 further, turned back by the angles at ``base``.

    In parts of 16 channels, all a warp holds without an exchange of lanes.
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
    """One tensor [ROWS, NH] of one or two parts."""
    if len(parts) == 1:
        return parts[0]
    else:
        return tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (2, 0, 1)), [ROWS, NH])


@triton.jit
def twice(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x`` [ROWS, COLUMNS] above itself. No join: of those the compiler would make another order of channels."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, 0), [2, ROWS, COLUMNS]), [2 * ROWS, COLUMNS])
