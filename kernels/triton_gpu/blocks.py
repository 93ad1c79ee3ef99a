# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806
"""A matrix of quantized blocks (``ggml.words``) times the few vectors of a decode step; and its rows in 16 bits.

As ``matvec``, one launch with what comes before and after; a thread has a block, 32 columns, of each of a program's rows. A
code is read as 1 + code / 2^bits (``block_words``). So a block's sum is

    scale 2^bits (sum (1 + code / 2^bits) x - sum x) + offset sum x

and a weight costs a shift, a logical operation and a multiply-add; no conversion.
"""

from __future__ import annotations

from copy import copy

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.ggml.words import EXPANDED_BYTES, to_words
from skvq.kernels.triton_gpu.block_words import code_of, load_words, scales_of
from skvq.kernels.triton_gpu.matvec import FEW_PROGRAMS, HALVES, MOST_VECTORS, finish, load_vectors
from skvq.kernels.triton_gpu.overlap import overlaps

MOST_LAUNCHES = 7
"""More vectors than as many launches take are multiplied by the matrix expanded to 16 bits: that reads and writes seven times
the bytes."""
EXPANDED_BLOCKS = 128
"""Blocks of a row that a program expands."""


@triton.jit
def dot_blocks(
    words, x_ptrs, norm_ptr, scale, b, BLOCKS: tl.constexpr, BITS: tl.constexpr, TWO: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums over blocks b, [M, R, NB, 1]; TWO: a block has a scale for each half. x_ptrs [M, 1, 1, 1]."""
    low, more, high, higher, pair = words
    UNIT: tl.constexpr = 2**BITS
    inside = True if EVEN else b < BLOCKS
    c = 32 * b + tl.arange(0, 4)[None, None, None, :]
    acc, plain = 0.0, 0.0
    for k in tl.static_range(4):
        x = load_vectors(x_ptrs + c + 4 * k, norm_ptr + c + 4 * k, scale, inside, NORM)
        acc += code_of(low, more, high, higher, k, BITS, ASM) * x
        plain += x
    if TWO:
        first, first_plain = tl.sum(acc, 3, keep_dims=True), tl.sum(plain, 3, keep_dims=True)
        acc, plain = 0.0, 0.0
    for k in tl.static_range(4, 8):
        x = load_vectors(x_ptrs + c + 4 * k, norm_ptr + c + 4 * k, scale, inside, NORM)
        acc += code_of(low, more, high, higher, k, BITS, ASM) * x
        plain += x
    last, last_plain = tl.sum(acc, 3, keep_dims=True), tl.sum(plain, 3, keep_dims=True)
    one, other = scales_of(pair)
    if TWO:
        total = one * (UNIT * (first - first_plain) - UNIT // 2 * first_plain)
        return total + other * (UNIT * (last - last_plain) - UNIT // 2 * last_plain)
    return one * (UNIT * (last - last_plain)) + other * last_plain


@triton.jit
def block_matvec_kernel(
    x_ptr, norm_ptr, code_ptr, high_ptr, pair_ptr, bias_ptr, residual_ptr, id_ptr, out_ptr, vectors, outs, stride_out, eps,
    share,
    BLOCKS: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr, TWO: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
    EACH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``matvec_kernel`` for a matrix of blocks; rows of the output lie ``stride_out`` apart.

    Reads its rows of the matrix once, NB blocks ahead of their use.
    """
    HELD: tl.constexpr = 2 * ROWS if GATED else ROWS
    EVEN: tl.constexpr = BLOCKS % NB == 0
    LAST: tl.constexpr = (BLOCKS - 1) // NB * NB
    WIDTH: tl.constexpr = 32 * BLOCKS
    WHOLE: tl.constexpr = WIDTH % (32 * NB) == 0
    first = tl.program_id(0) * ROWS
    r = tl.arange(0, HELD)
    row = tl.minimum(first + r % ROWS, outs - 1)
    if GATED:
        row += r // ROWS * outs
    if EACH:
        pair = tl.program_id(1)
        row += tl.load(id_ptr + pair).to(tl.int32) * ((2 if GATED else 1) * outs)
        x_ptr += pair // share * WIDTH
        out_ptr += pair.to(tl.int64) * stride_out
    rows = row[None, :, None, None]
    b = tl.arange(0, NB)[None, None, :, None]
    m = tl.minimum(tl.arange(0, M), vectors - 1)
    x_ptrs = x_ptr + m[:, None, None, None] * WIDTH
    if BIAS:
        bias = tl.load(bias_ptr + row)
    words = load_words(code_ptr, high_ptr, pair_ptr, rows, b, BLOCKS, BITS, EVEN)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()  # from here on what other launches wrote is read
    elif NORM:
        tl.debug_barrier()  # else the compiler asks for blocks after the norm
    scale = 1.0
    if NORM:
        c = (tl.arange(0, NB)[:, None] * 32 + tl.arange(0, 32)[None, :])[None, None]
        square = tl.zeros((M, 1, NB, 32), tl.float32)
        for start in tl.static_range(0, WIDTH, 32 * NB):
            x = tl.load(x_ptrs + start + c, mask=start + c < WIDTH, other=0.0).to(tl.float32)
            square += x * x
        scale = (1.0 / tl.sqrt(tl.sum(tl.sum(square, 3), 2) / WIDTH + eps))[:, :, None, None]
    acc = tl.zeros((M, HELD, NB, 1), tl.float32)
    for start in tl.range(0, LAST, NB, num_stages=1):
        later = load_words(code_ptr, high_ptr, pair_ptr, rows, b + start + NB, BLOCKS, BITS, EVEN)
        acc += dot_blocks(words, x_ptrs, norm_ptr, scale, b + start, BLOCKS, BITS, TWO, True, NORM, ASM)
        words = later
    acc += dot_blocks(words, x_ptrs, norm_ptr, scale, b + LAST, BLOCKS, BITS, TWO, WHOLE, NORM, ASM)
    total = tl.sum(tl.reshape(acc, (M, HELD, NB)), 2)
    o = first + tl.arange(0, ROWS)[None, :]
    inside = (tl.arange(0, M)[:, None] < vectors) & (o < outs)
    n = m.to(tl.int64)[:, None]
    if BIAS:
        total += bias.to(tl.float32)[None, :]
    out = finish(total, M, ROWS, GATED, out_ptr.dtype.element_ty)
    if ADD:
        residual = tl.load(residual_ptr + n * outs + o, mask=inside)
        out = (residual.to(tl.float32) + out.to(tl.float32)).to(out.dtype)
    tl.store(out_ptr + n * stride_out + o, out, mask=inside)


@triton.jit
def expand_kernel(
    id_ptr, code_ptr, high_ptr, pair_ptr, out_ptr, first, BLOCKS: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr,
    TWO: tl.constexpr, IDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """NB blocks of one row, rounded to the dtype of ``out`` [rows, columns]: row ``first`` and those behind, or with IDS those
    of the ids."""
    at = tl.program_id(0)
    row = tl.load(id_ptr + at) if IDS else first + at
    b = tl.program_id(1) * NB + tl.arange(0, NB)[None, None, :, None]
    inside = b < BLOCKS
    rows = tl.full((1, 1, 1, 1), 0, tl.int64) + row
    low, more, high, higher, pair = load_words(code_ptr, high_ptr, pair_ptr, rows, b, BLOCKS, BITS, False)
    one, other = scales_of(pair)
    UNIT: tl.constexpr = 2**BITS
    j = tl.arange(0, 4)[None, None, None, :]
    out_ptrs = out_ptr + at.to(tl.int64) * 32 * BLOCKS + 32 * b + j
    for k in tl.static_range(8):
        code = UNIT * code_of(low, more, high, higher, k, BITS, ASM) - UNIT  # exact
        value = (one if k < 4 else other) * (code - UNIT // 2) if TWO else one * code + other
        tl.store(out_ptrs + 4 * k, value.to(out_ptr.dtype.element_ty), mask=inside)


COMPILED = isinstance(expand_kernel, triton.JITFunction)
"""False under Triton's interpreter, which knows no assembly."""


WARPS = 4
"""Of a program that multiplies. A thread has a block of each of the program's rows."""


def rows_of(vectors: int, outs: int, *, gated: bool, bits: int) -> int:
    """Rows of the output that a program owns, of the gate and of up alike, for ``vectors`` (1 .. MOST_VECTORS) and ``outs``
    numbers of output each: as many as registers suffice for."""
    rows = 2 if vectors > 2 or bits == 5 else 4
    rows = max(rows // 2, 1) if gated else rows
    while rows > 1 and outs < FEW_PROGRAMS * rows:
        rows //= 2
    return rows


class BlockMatrix:
    """A matrix of quantized blocks on a GPU: ``linear.StoredMatrix``, in 16 bits. Immutable."""

    def __init__(self, blocks: Tensor, kind: str, device: torch.device) -> None:
        """``blocks`` uint8 [rows, bytes of a row] as a GGUF file holds them."""
        words = to_words(blocks, kind, device)
        self.words, self.shape, self.data = words, words.shape, words.data
        self.parts = words.codes, words.high, words.pairs

    def part(self, first: int, rows: int) -> BlockMatrix:
        """``rows`` rows from ``first`` on, a view."""
        part, (codes, high, pairs) = copy(self), (t[first : first + rows] for t in self.parts)
        part.shape, part.parts = (rows, self.shape[1]), (codes, high, pairs)
        return part

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out[n] = W x[n] + bias``; x [N, columns] contiguous, out [N, rows] of its dtype, of which only rows may be
        strided."""
        count = len(x)
        if count <= MOST_LAUNCHES * MOST_VECTORS:
            for start in range(0, count, MOST_VECTORS):
                part = slice(start, start + MOST_VECTORS)
                multiply(x[part], self, bias, out[part])
            return
        step = max(1, EXPANDED_BYTES // (x.itemsize * self.shape[1]))
        for start in range(0, self.shape[0], step):
            weight = self.expanded(start, min(step, self.shape[0] - start), x.dtype)
            part = slice(start, start + step)
            if bias is None:
                torch.mm(x, weight.T, out=out[:, part])
            else:
                torch.addmm(bias[part], x, weight.T, out=out[:, part])
            del weight  # before the next part is expanded

    def expanded(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first .. first+count-1``."""
        return self._expand(None, first, count, dtype)

    def multiply_each(self, x: Tensor, ids: Tensor, out: Tensor) -> None:
        """``out[p] = W_i x[p // (P / N)]``, W_i the ``ids[p]``-th of matrices one above the other; x [N, columns] and out
        [P, rows], ids int64 [P]."""
        multiply_each(x, self, ids, out)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``ids`` int64 [N], of which none is out of range."""
        assert ids.dtype == torch.int64 and ids.dim() == 1, (ids.dtype, ids.shape)
        return self._expand(ids.contiguous(), 0, len(ids), dtype)

    def _expand(self, ids: Tensor | None, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first .. first+count-1``, or those of ``ids`` [count]."""
        form, blocks = self.words.form, self.words.blocks
        out = torch.empty(count, self.shape[1], dtype=dtype, device=self.data.device)
        together = min(triton.next_power_of_2(max(blocks, 2)), EXPANDED_BLOCKS)  # of one block the compiler makes nothing
        if count:
            expand_kernel[(count, triton.cdiv(blocks, together))](
                self.data if ids is None else ids, *self.parts, out, first, BLOCKS=blocks, NB=together, BITS=form.bits,
                TWO=self.words.halves, IDS=ids is not None, ASM=COMPILED, num_warps=max(together // 32, 1),
            )  # fmt: skip
        return out


def multiply(
    x: Tensor, matrix: BlockMatrix, bias: Tensor | None, out: Tensor | None = None, *, norm: Tensor | None = None,
    eps: float = 0.0, residual: Tensor | None = None, gated: bool = False,
) -> Tensor:  # fmt: skip
    """``W x + b`` of up to MOST_VECTORS vectors [N, columns], or of their ``norm``; of ``gated`` [2 f, columns] ``silu(gate) *
    up``, [N, f]; added to ``residual``. To ``out``, of which rows may be strided, or to a new tensor."""
    x = x.contiguous()
    vectors, columns = x.shape
    outs = matrix.shape[0] // (2 if gated else 1)
    if out is None:
        out = torch.empty(vectors, outs, dtype=x.dtype, device=x.device)
    assert 1 <= vectors <= MOST_VECTORS and columns == matrix.shape[1] and x.dtype in HALVES, (x.shape, x.dtype, matrix.shape)
    assert out.dtype == x.dtype and out.shape == (vectors, outs) and out.stride(1) == 1, (out.shape, out.stride(), out.dtype)
    for part, shape in ((norm, (columns,)), (bias, matrix.shape[:1]), (residual, out.shape)):
        assert part is None or (part.shape == shape and part.dtype == x.dtype and part.is_contiguous()), (part, shape)
    form, count = matrix.words.form, matrix.words.blocks
    rows = rows_of(vectors, outs, gated=gated, bits=form.bits)
    early = overlaps(x.device)
    together = min(triton.next_power_of_2(count), 32 * WARPS)
    block_matvec_kernel[(triton.cdiv(outs, rows),)](
        x, x if norm is None else norm, *matrix.parts, x if bias is None else bias, x if residual is None else residual, x, out,
        vectors, outs, out.stride(0), eps, 1, BLOCKS=count, M=triton.next_power_of_2(vectors), ROWS=rows, NB=together,
        BITS=form.bits, TWO=matrix.words.halves, NORM=norm is not None, GATED=gated, BIAS=bias is not None,
        ADD=residual is not None, EARLY=early, EACH=False, ASM=COMPILED, num_warps=max(together // 32, 1), num_stages=1,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def multiply_each(
    x: Tensor, matrix: BlockMatrix, ids: Tensor, out: Tensor, *, norm: Tensor | None = None, eps: float = 0.0,
    gated: bool = False,
) -> None:  # fmt: skip
    """``out[p] = W_i x[p // (P / N)]`` of vectors [N, columns], or of their ``norm``; ``gated``: ``silu(gate) * up`` of that.

    W_i is the ``i = ids[p]``-th of matrices one above the other, of as many rows as ``out`` [P, rows] has columns, or with
    ``gated`` of twice as many; ids int64 [P].
    """
    x, (pairs, outs) = x.contiguous(), out.shape
    assert x.shape[1] == matrix.shape[1] and pairs % len(x) == 0, (x.shape, matrix.shape, pairs)
    assert x.dtype == out.dtype in HALVES and out.is_contiguous(), (x.dtype, out.dtype, out.stride())
    assert ids.shape == (pairs,) and ids.dtype == torch.int64 and ids.is_contiguous(), (ids.shape, ids.dtype)
    assert norm is None or (norm.shape == x.shape[1:] and norm.dtype == x.dtype and norm.is_contiguous()), norm.shape
    form, count = matrix.words.form, matrix.words.blocks
    rows = rows_of(1, outs * pairs, gated=gated, bits=form.bits)
    together = min(triton.next_power_of_2(count), 32 * WARPS)
    block_matvec_kernel[(triton.cdiv(outs, rows), pairs)](
        x, x if norm is None else norm, *matrix.parts, x, x, ids, out, 1, outs, outs, eps, pairs // len(x), BLOCKS=count,
        M=1, ROWS=rows, NB=together, BITS=form.bits, TWO=matrix.words.halves, NORM=norm is not None, GATED=gated,
        BIAS=False, ADD=False, EARLY=False, EACH=True, ASM=COMPILED, num_warps=max(together // 32, 1), num_stages=1,
    )  # fmt: skip
