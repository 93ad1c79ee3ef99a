# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""Many tokens by the matrices of their experts: all that an expert has been given at once, with tensor cores.

Pairs of a token and an expert are sorted by expert. Blocks of BM of them, none across two experts, are dealt to programs, each
of which finds its own from the bounds of the experts in that order: the host knows none of them and need not wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.experts import DenseStack, Stack, StoredStack
from skvq.kernels.ggml.words import EXPANDED_BYTES
from skvq.kernels.triton_gpu.blocks import BlockMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """A program's share of a product: ``pairs`` rows and ``outs`` columns of its result, ``depth`` columns of x at a time."""

    pairs: int
    outs: int
    depth: int
    warps: int
    stages: int


BLOCKING = Blocking(pairs=64, outs=128, depth=64, warps=4, stages=3)
"""Not yet tuned on a GPU."""


@triton.jit
def load_weights(ptrs, held, EVEN: tl.constexpr):
    """Columns of the weights that are ``held``, [BK, BN]; EVEN: all of them."""
    if EVEN:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=held[:, None], other=0.0)


@triton.jit
def grouped_kernel(
    x_ptr, order_ptr, bound_ptr, weight_ptr, out_ptr, experts, outs, width, share,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """BN columns of the output of BM pairs of one expert, in the order of ``order``: of x [tokens, width] at ``pair // share``,
    GATED ``silu(gate) * up`` [pairs, outs] in that order; else of x [pairs, width] in that order, to rows ``pair`` of ``out``.

    ``weight`` [experts, outs, width], or with GATED [experts, 2 outs, width], gates first; ``bound`` [experts + 1]: where each
    expert's pairs begin. E is the power of two at or above ``experts``; EVEN: BK divides ``width``. Rounds as torch does.
    """
    block = tl.program_id(0)
    e = tl.arange(0, E)
    begin = tl.load(bound_ptr + e, mask=e < experts, other=0).to(tl.int32)
    end = tl.load(bound_ptr + e + 1, mask=e < experts, other=0).to(tl.int32)
    blocks = (end - begin + BM - 1) // BM
    before = tl.cumsum(blocks, 0) - blocks
    own = (before <= block) & (block < before + blocks)
    if tl.sum(own.to(tl.int32), 0) == 0:
        return
    expert = tl.sum(tl.where(own, e, 0), 0)
    last = tl.sum(tl.where(own, end, 0), 0)
    place = tl.sum(tl.where(own, begin + (block - before) * BM, 0), 0) + tl.arange(0, BM)
    inside = (place < last)[:, None]
    pair = tl.load(order_ptr + place, mask=place < last, other=0)
    row = pair // share if GATED else place.to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    wanted = (n < outs)[None, :]
    x_ptrs = x_ptr + row[:, None] * width + k[None, :]
    weight_ptrs = weight_ptr + expert.to(tl.int64) * ((2 if GATED else 1) * outs * width)
    weight_ptrs = weight_ptrs + tl.minimum(n, outs - 1).to(tl.int64)[None, :] * width + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    up = acc
    for start in range(0, width, BK):
        held = start + k < width
        x = tl.load(x_ptrs + start, mask=inside if EVEN else inside & held[None, :], other=0.0)
        acc = tl.dot(x, load_weights(weight_ptrs + start, held, EVEN), acc)
        if GATED:
            up = tl.dot(x, load_weights(weight_ptrs + start + outs * width, held, EVEN), up)
    dtype = out_ptr.dtype.element_ty
    out = acc.to(dtype)
    if GATED:
        gate = out.to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
        out = (silu.to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    target = place.to(tl.int64) if GATED else pair
    tl.store(out_ptr + target[:, None] * outs + n[None, :], out, mask=inside & wanted)


def mlps(h: Tensor, ids: Tensor, gate_up: Stack, down: Stack, count: int) -> Tensor:
    """What expert ``ids[n, j]`` of ``count`` makes of h [N, d], for ids int64 [N, k]: [N, k, d]."""
    order = ids.flatten().argsort(stable=True)
    bounds = torch.searchsorted(ids.flatten()[order], torch.arange(count + 1, device=h.device))
    inner = _grouped(h, order, bounds, gate_up, count, gated=True)  # [N k, f], expert by expert
    return _grouped(inner, order, bounds, down, count, gated=False).view(*ids.shape, -1)


def _grouped(x: Tensor, order: Tensor, bounds: Tensor, stack: Stack, count: int, *, gated: bool) -> Tensor:
    """``grouped_kernel`` with all matrices of a stack; of blocks some are expanded at a time."""
    if isinstance(stack, DenseStack):
        outs = stack.weight.shape[1] // (2 if gated else 1)
        out = torch.empty(len(order), outs, dtype=x.dtype, device=x.device)
        _launch(x, order, bounds, stack.weight, out, gated=gated)
        return out
    assert isinstance(stack, StoredStack) and isinstance(stack.matrix, BlockMatrix)
    rows, columns = stack.outs, stack.matrix.shape[1]
    out = torch.empty(len(order), rows // (2 if gated else 1), dtype=x.dtype, device=x.device)
    together = min(count, max(1, EXPANDED_BYTES // (x.itemsize * rows * columns)))
    for first in range(0, count, together):
        some = min(together, count - first)
        weight = stack.matrix.expanded(first * rows, some * rows, x.dtype).view(some, rows, columns)
        _launch(x, order, bounds[first : first + some + 1], weight, out, gated=gated)
        del weight  # before the next are expanded
    return out


def _launch(x: Tensor, order: Tensor, bounds: Tensor, weight: Tensor, out: Tensor, *, gated: bool) -> None:
    experts, rows, width = weight.shape
    pairs, outs = out.shape
    assert rows == (2 if gated else 1) * outs and x.shape[1] == width, (weight.shape, x.shape, out.shape)
    assert x.dtype == weight.dtype == out.dtype and order.dtype == bounds.dtype == torch.int64, (x.dtype, weight.dtype)
    assert x.is_contiguous() and weight.is_contiguous() and bounds.shape == (experts + 1,), (x.stride(), weight.stride())
    form = BLOCKING
    columns = form.outs // 2 if gated else form.outs  # a program's gates, and as many ups
    blocks = triton.cdiv(pairs, form.pairs) + experts  # of each expert the last may not be full
    grouped_kernel[(blocks, triton.cdiv(outs, columns))](
        x, order, bounds, weight, out, experts, outs, width, pairs // len(x) if gated else 1,
        E=triton.next_power_of_2(experts), BM=form.pairs, BN=columns, BK=form.depth, EVEN=width % form.depth == 0,
        GATED=gated, num_warps=form.warps, num_stages=form.stages,
    )  # fmt: skip
