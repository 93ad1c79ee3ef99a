# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RUF005
"""A 16-bit matrix times the few vectors of a decode step, at the speed of memory: one launch with what comes before and after.

    norm_linear   W rms_norm(x) + b
    linear_add    x + (W h + b)
    norm_swiglu   silu(gate) * up of [gate; up] = W rms_norm(x) + b

and, where tokens have experts of their own (``kernels.experts``), each vector times the matrix of its expert:

    each_linear   W_i x
    each_swiglu   silu(gate) * up of [gate; up] = W_i rms_norm(x)

Results are rounded wherever torch rounds: they differ from the operations one by one in the order of sums alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.triton_gpu.overlap import overlaps

HALVES = (torch.float16, torch.bfloat16)
MOST_VECTORS = 4
"""Vectors that one launch multiplies. Each costs a multiply-add a weight; a tensor core is the better means for more."""
FASTER_VECTORS = 1
"""Vectors that a decode step gives to one launch: on an H200 four take up to 2.3 times as long as by cuBLAS with the rest."""

FEW_PROGRAMS = 512
"""With fewer a card of 100 multiprocessors has too few loads on their way."""

LONG = 8192
"""A row, or a column, long enough for programs of 8 warps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a launch is divided. A thread has 16 bytes of each of a tile's rows."""

    rows: int  # of the output that a program owns, of the gate and of up alike
    warps: int
    depth: int  # tiles on their way at once
    early: bool = False  # weights are asked for before the launch before has ended, where launches overlap


def tiling_of(vectors: int, outs: int, width: int, *, gated: bool) -> Tiling:
    """The tiling for ``vectors`` (1 .. MOST_VECTORS) of ``width`` and ``outs`` numbers of output each.

    For one vector the fastest of 14 on an H200 at the shapes of Mistral-7B: 82 to 103 % of a copy's bandwidth, where cuBLAS has
    62 to 98 %. Rows for more vectors are what registers allow.
    """
    if vectors == 1 and not gated and (width > LONG or outs > LONG):
        return Tiling(rows=4, warps=8, depth=4 if width > LONG else 2, early=True)
    rows = 2 if vectors == 1 or not gated else 1
    while rows > 1 and outs < FEW_PROGRAMS * rows:
        rows //= 2
    return Tiling(rows=rows, warps=4, depth=2, early=True)


@triton.jit
def load_tile(ptrs, start, c, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns ``start + c`` of the weights, which nobody reads again."""
    if EVEN:
        return tl.load(ptrs + start, eviction_policy="evict_first")
    return tl.load(ptrs + start, mask=start + c < WIDTH, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_vectors(x_ptrs, norm_ptrs, scale, inside, NORM: tl.constexpr):
    """Columns of the vectors in float32, zeros where not ``inside``; with NORM after their norm."""
    x = tl.load(x_ptrs, mask=inside, other=0.0)
    if NORM:
        normed = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
        x = (normed * tl.load(norm_ptrs, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def finish(total, M: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, dtype: tl.constexpr):
    """The sums [M, ROWS] rounded; of [M, 2 ROWS] with GATED silu(gate) * up."""
    out = total.to(dtype)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(out, (M, 2, ROWS)), (0, 2, 1)))
        gate = gate.to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
        out = (silu.to(tl.float32) * up.to(tl.float32)).to(dtype)
    return out


@triton.jit
def matvec_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, id_ptr, out_ptr, vectors, outs, eps, share,
    WIDTH: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """ROWS numbers of the output of each vector: of ``x`` [vectors, WIDTH], or with NORM of its norm, times ``weight``
    [outs, WIDTH], or with GATED [2 outs, WIDTH], gates first; ADD: and the residual [vectors, outs].

    Reads its rows of the weights once, DEPTH tiles of BLOCK columns ahead of their use; all of x once, with NORM twice, which
    the L1 cache serves. M is the power of two at or above ``vectors``. EACH: of one vector, ``p // share`` for the p-th program
    along the grid's second axis, whose matrix is the ``id[p]``-th of those that lie one above the other.
    """
    HELD: tl.constexpr = 2 * ROWS if GATED else ROWS
    STRIDE: tl.constexpr = DEPTH * BLOCK
    EVEN: tl.constexpr = WIDTH % STRIDE == 0
    LAST: tl.constexpr = (WIDTH - 1) // STRIDE * STRIDE
    dtype = out_ptr.dtype.element_ty
    first = tl.program_id(0) * ROWS
    r = tl.arange(0, HELD)
    row = tl.minimum(first + r % ROWS, outs - 1)
    if GATED:
        row += r // ROWS * outs
    if EACH:
        pair = tl.program_id(1)
        weight_ptr += tl.load(id_ptr + pair) * ((2 if GATED else 1) * outs * WIDTH)
        x_ptr += pair // share * WIDTH
        out_ptr += pair.to(tl.int64) * outs
    # three dimensions throughout: a change of shape between loads and sum would be a change of layout, through shared memory
    c = tl.arange(0, BLOCK)[None, None, :]
    weight_ptrs = weight_ptr + row.to(tl.int64)[None, :, None] * WIDTH + c
    m = tl.minimum(tl.arange(0, M), vectors - 1)
    x_ptrs = x_ptr + m[:, None, None] * WIDTH + c
    if BIAS:
        bias = tl.load(bias_ptr + row)
    tiles = ()
    for d in tl.static_range(DEPTH):
        tiles = tiles + (load_tile(weight_ptrs, d * BLOCK, c, WIDTH, EVEN),)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()  # from here on what other launches wrote is read
    elif NORM:
        tl.debug_barrier()  # else the compiler asks for weights after the norm
    o = first + tl.arange(0, ROWS)[None, :]
    inside = (tl.arange(0, M)[:, None] < vectors) & (o < outs)
    place = m.to(tl.int64)[:, None] * outs + o
    if ADD:
        residual = tl.load(residual_ptr + place, mask=inside)
    scale = 1.0
    if NORM:
        square = tl.zeros((M, 1, BLOCK), tl.float32)
        for start in tl.static_range(0, WIDTH, BLOCK):
            x = tl.load(x_ptrs + start, mask=start + c < WIDTH, other=0.0).to(tl.float32)
            square += x * x
        scale = (1.0 / tl.sqrt(tl.sum(square, 2) / WIDTH + eps))[:, :, None]
    acc = tl.zeros((M, HELD, BLOCK), tl.float32)
    for start in tl.range(0, LAST, STRIDE, num_stages=1):
        later = ()
        for d in tl.static_range(DEPTH):
            at = start + d * BLOCK
            x = load_vectors(x_ptrs + at, norm_ptr + at + c, scale, True if EVEN else at + c < WIDTH, NORM)
            acc += tiles[d].to(tl.float32) * x
            later = later + (load_tile(weight_ptrs, start + (DEPTH + d) * BLOCK, c, WIDTH, EVEN),)
        tiles = later
    for d in tl.static_range(DEPTH):
        at = LAST + d * BLOCK
        x = load_vectors(x_ptrs + at, norm_ptr + at + c, scale, True if EVEN else at + c < WIDTH, NORM)
        acc += tiles[d].to(tl.float32) * x
    total = tl.sum(acc, 2)  # [M, HELD]
    if BIAS:
        total += bias.to(tl.float32)[None, :]
    out = finish(total, M, ROWS, GATED, dtype)
    if ADD:
        out = (residual.to(tl.float32) + out.to(tl.float32)).to(dtype)
    tl.store(out_ptr + place, out, mask=inside)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """``W rms_norm(x) + b`` of x [..., in] and weight [out, in]."""
    assert norm.shape == x.shape[-1:] and norm.dtype == x.dtype and norm.is_contiguous(), (norm.shape, norm.dtype)
    return _launch(x, norm, weight, bias, x, weight.shape[0], eps, tiling, norm=True, gated=False, add=False)


def norm_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """``silu(gate) * up`` of ``W rms_norm(x) + b``; x [..., in], weight [2 f, in] with the gates first; the result [..., f]."""
    assert norm.shape == x.shape[-1:] and norm.dtype == x.dtype and norm.is_contiguous(), (norm.shape, norm.dtype)
    return _launch(x, norm, weight, bias, x, weight.shape[0] // 2, eps, tiling, norm=True, gated=True, add=False)


def linear_add(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """``x + (W h + b)`` of x [..., out], h [..., in] and weight [out, in]."""
    assert x.shape == (*h.shape[:-1], weight.shape[0]) and x.dtype == h.dtype, (x.shape, h.shape, weight.shape, x.dtype)
    return _launch(h, h, weight, bias, x.contiguous(), weight.shape[0], 0.0, tiling, norm=False, gated=False, add=True)


def each_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor, ids: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``W_i rms_norm(x[p // (P / N)])``, ``i = ids[p]``: x [N, in], weight [experts, 2 f, in] with the
    gates first, ids int64 [P]; the result [P, f]."""
    assert norm.shape == x.shape[-1:] and norm.dtype == x.dtype and norm.is_contiguous(), (norm.shape, norm.dtype)
    return _launch_each(x, norm, weight, ids, weight.shape[1] // 2, eps, gated=True)


def each_linear(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """``W_i x[p // (P / N)]``, ``i = ids[p]``: x [N, in], weight [experts, out, in], ids int64 [P]; the result [P, out]."""
    return _launch_each(x, x, weight, ids, weight.shape[1], 0.0, gated=False)


def _launch_each(x: Tensor, norm: Tensor, weight: Tensor, ids: Tensor, outs: int, eps: float, *, gated: bool) -> Tensor:
    """``matvec_kernel`` with EACH; gated: of the norm of x, times gates and ups."""
    (vectors, width), pairs = x.shape, len(ids)
    assert weight.shape[1:] == ((2 if gated else 1) * outs, width) and weight.is_contiguous(), (weight.shape, weight.stride())
    assert x.dtype == weight.dtype and x.dtype in HALVES and pairs % vectors == 0, (x.dtype, weight.dtype, pairs, vectors)
    assert ids.dtype == torch.int64 and ids.dim() == 1 and ids.is_contiguous(), (ids.dtype, ids.shape)
    x, out = x.contiguous(), torch.empty(pairs, outs, dtype=x.dtype, device=x.device)
    tiling = tiling_of(1, outs * pairs, width, gated=gated)
    block = min(triton.next_power_of_2(width), 256 * tiling.warps)
    matvec_kernel[(triton.cdiv(outs, tiling.rows), pairs)](
        x, norm, weight, weight, x, ids, out, 1, outs, eps, pairs // vectors, WIDTH=width, M=1, ROWS=tiling.rows, BLOCK=block,
        DEPTH=tiling.depth, NORM=gated, GATED=gated, BIAS=False, ADD=False, EARLY=False, EACH=True,
        num_warps=min(tiling.warps, max(block // 256, 1)), num_stages=1,
    )  # fmt: skip
    return out


def _launch(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, outs: int, eps: float,
    tiling: Tiling, *, norm: bool, gated: bool, add: bool,
) -> Tensor:  # fmt: skip
    width = x.shape[-1]
    vectors = x.numel() // width
    assert 1 <= vectors <= MOST_VECTORS, f"{vectors} vectors: this kernel multiplies up to {MOST_VECTORS}"
    assert weight.shape == ((2 if gated else 1) * outs, width) and weight.is_contiguous(), (weight.shape, weight.stride())
    assert x.dtype == weight.dtype and x.dtype in HALVES, (x.dtype, weight.dtype)
    assert bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous()), weight.shape
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], outs), dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(width), 256 * tiling.warps)
    early = tiling.early and overlaps(x.device)
    matvec_kernel[(triton.cdiv(outs, tiling.rows),)](
        x, norm_weight, weight, weight if bias is None else bias, residual, x, out, vectors, outs, eps, 1, WIDTH=width,
        M=triton.next_power_of_2(vectors), ROWS=tiling.rows, BLOCK=block, DEPTH=tiling.depth, NORM=norm, GATED=gated,
        BIAS=bias is not None, ADD=add, EARLY=early, EACH=False, num_warps=min(tiling.warps, max(block // 256, 1)),
        num_stages=1, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
