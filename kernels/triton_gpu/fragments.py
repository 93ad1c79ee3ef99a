# mypy: ignore-errors
# ruff: noqa: N803, RET505, RUF005
"""Operands and sums of the tensor cores, as tuples of pieces: loaded, multiplied, put in order."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.loaders import perm4, planes


@triton.jit
def first_of_pairs(x, ROWS: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr):
    """Real columns of ``x`` [ROWS, NH * PAD]; with PAD 2 every other column is idle."""
    if PAD == 2:
        real, _ = tl.split(tl.reshape(x, [ROWS, NH, 2]))
        return real
    else:
        return x


@triton.jit
def weight_columns(w, TRITS: tl.constexpr, ROWS: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr):
    """fp16 columns of the weights ``w`` [ROWS, NH] for the second dot; for trits a high and a low half of each."""
    high = w.to(tl.float16)
    if TRITS:
        low = (w - high.to(tl.float32)).to(tl.float16)
        return tl.reshape(tl.join(high, low), [ROWS, NH * PAD])
    elif PAD == 2:
        return tl.reshape(tl.join(high, tl.zeros_like(high)), [ROWS, NH * PAD])
    else:
        return high


@triton.jit
def load_planes(
    base, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, BLOCKS: tl.constexpr,
    SKIP: tl.constexpr, WIDTH: tl.constexpr, CUMULATIVE: tl.constexpr, NORMAL: tl.constexpr,
    PERMUTED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Planes of BLOCKS byte blocks [ROWS, COLUMNS] in channel order: plane p, block j is entry ``p * BLOCKS + j``.

    Byte (r, c) of block j lies at ``base + first + j * SKIP + r * ROW + c * COLUMN``. PERMUTED: rows in ``perm4`` order.
    """
    r = perm4(tl.arange(0, ROWS), PERMUTED)
    at = first + r[:, None] * ROW + tl.arange(0, COLUMNS)[None, :] * COLUMN
    by_block = ()
    for j in tl.static_range(BLOCKS):
        raw = tl.load(base + (at + j * SKIP))
        by_block = by_block + (planes(raw, WIDTH, CUMULATIVE, NORMAL, ASM),)
    out = ()
    for p in tl.static_range(len(by_block[0])):
        for j in tl.static_range(BLOCKS):
            out = out + (by_block[j][p],)
    return out


@triton.jit
def load_rows(base, ROWS: tl.constexpr, EACH: tl.constexpr, N: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Tuple of the fragments [EACH, N] of q, ROWS / EACH of them, stored by column or by row.

    By column they come as the tensor core's second operand wants them, and stay in registers; by row they stay in shared
    memory, at the cost of register moves: better where five shares of a tile need the registers.
    """
    at = tl.arange(0, EACH)[:, None] * (1 if BY_COLUMN else N) + tl.arange(0, N)[None, :] * (EACH if BY_COLUMN else 1)
    out = ()
    for i in tl.static_range(ROWS // EACH):
        out = out + (tl.load(base + i * EACH * N + at),)
    return out


@triton.jit
def zero_rows(COUNT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([ROWS, N], tl.float32),)
    return out


@triton.jit
def dots(a, b, sums):
    """``sums`` plus the dots of ``a`` with ``b``; each group's sum takes an equal share of them, in order."""
    each: tl.constexpr = len(a) // len(sums)
    out = ()
    for g in tl.static_range(len(sums)):
        s = sums[g]
        for i in tl.static_range(each):
            s = tl.dot(a[g * each + i], b[g * each + i], s)
        out = out + (s,)
    return out


@triton.jit
def dots_each(a, weights, scale, accumulators):
    """``accumulators * scale + a . weights`` entry by entry; the entries of ``weights`` serve equal shares of ``a``."""
    each: tl.constexpr = len(a) // len(weights)
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.dot(a[i], weights[i // each], accumulators[i] * scale),)
    return out
