# mypy: ignore-errors
# ruff: noqa: N803, RET505, RUF005
"""What tensor cores are fed and give back, as tuples of tensors small enough for registers: loads, products, padded columns."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.loaders import perm4, planes


@triton.jit
def first_of_pairs(x, ROWS: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr):
    """The real columns [ROWS, NH] of ``x`` [ROWS, NH * PAD]: with PAD 2 every other column only fills the tensor core."""
    if PAD == 2:
        real, _ = tl.split(tl.reshape(x, [ROWS, NH, 2]))
        return real
    else:
        return x


@triton.jit
def weight_columns(w, TRITS: tl.constexpr, ROWS: tl.constexpr, NH: tl.constexpr, PAD: tl.constexpr):
    """The weights ``w`` [ROWS, NH] as float16 columns [ROWS, NH * PAD] of the second product.

    With PAD 2 zeros fill the odd columns, or with TRITS what float16 lost of the weights: the sum of both columns is exact
    enough.
    """
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
    base, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW: tl.constexpr, BLOCKS: tl.constexpr, SKIP: tl.constexpr,
    WIDTH: tl.constexpr, CUMULATIVE: tl.constexpr, NORMAL: tl.constexpr, PERMUTED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Planes of BLOCKS byte blocks [ROWS, COLUMNS] in the order of the channels: plane p of block j is entry ``p * BLOCKS +
    j``.

    Byte (r, c) of block j lies at ``base + first + j * SKIP + r * ROW + c``. PERMUTED: rows are loaded in the order
    of ``perm4``. The other constants are those of ``loaders.planes``.
    """
    r = perm4(tl.arange(0, ROWS), PERMUTED)
    at = first + r[:, None] * ROW + tl.arange(0, COLUMNS)[None, :]
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
    """The queries as a tuple of ROWS / EACH fragments [EACH, N] float16, which ``prepare`` stored by column or by row.

    Stored by column they come in the order of the tensor core's second operand and stay in registers. By row they stay in
    shared memory and take a few moves more: better where five shares of a tile need the registers.
    """
    at = tl.arange(0, EACH)[:, None] * (1 if BY_COLUMN else N) + tl.arange(0, N)[None, :] * (EACH if BY_COLUMN else 1)
    out = ()
    for i in tl.static_range(ROWS // EACH):
        out = out + (tl.load(base + i * EACH * N + at),)
    return out


@triton.jit
def zero_rows(COUNT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """COUNT sums [ROWS, N] of zeros, float32."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([ROWS, N], tl.float32),)
    return out


@triton.jit
def dots(a, b, sums):
    """``sums`` plus the products of tuples ``a`` and ``b``: each sum takes len(a) / len(sums) of them, in order."""
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
    """``accumulators[i] * scale + a[i] weights[j]`` for every i: each j serves len(a) / len(weights) of them, in order."""
    each: tl.constexpr = len(a) // len(weights)
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.dot(a[i], weights[i // each], accumulators[i] * scale),)
    return out
