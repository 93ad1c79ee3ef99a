# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""The last kernel of attention: partial softmaxes become one, and the output basis is applied to the packed part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.triton_gpu.card import Card
from skvq.kernels.triton_gpu.forms import FULL_SPLITS, MAX_SPLITS, VARYING, Columns
from skvq.kernels.triton_gpu.overlap import overlapping, wait_for_inputs
from skvq.kernels.triton_gpu.prepare import load_matrix
from skvq.kernels.triton_gpu.softmax import LN2, NEVER
from skvq.kernels.triton_gpu.workspace import Partials


@triton.jit
def load_sums(part, splits, start, D: tl.constexpr, BLOCK: tl.constexpr):
    """Sums [BLOCK, D] of the splits from ``start`` on; zeros past the last split."""
    s = start + tl.arange(0, BLOCK)
    return tl.load(part + s[:, None] * D + tl.arange(0, D)[None, :], mask=(s < splits)[:, None], other=0.0)


@triton.jit
def load_maxima(stat, splits, start, BLOCK: tl.constexpr):
    """Maxima of the scores [BLOCK], log2, of the splits from ``start`` on; NEVER past the last split."""
    s = start + tl.arange(0, BLOCK)
    return tl.load(stat + s * 2, mask=s < splits, other=NEVER)


@triton.jit
def factors(maxima, top):
    """What each split's sum is multiplied by when ``top`` is the common maximum.

    Zero where a split saw no token: what it left counts for nothing, whatever its maximum.
    """
    return tl.where(maxima > NEVER * 0.5, tl.exp2(maxima - top), 0.0)


@triton.jit
def total_weight(stat, splits, MOST: tl.constexpr):
    """Sum of the softmax weights of up to MOST splits, and the common maximum (log2) that it is relative to."""
    maxima = load_maxima(stat, splits, 0, MOST)
    s = tl.arange(0, MOST)
    weight = tl.load(stat + s * 2 + 1, mask=s < splits, other=0.0)
    top = tl.max(maxima, 0)
    return tl.sum(weight * factors(maxima, top), 0), top


@triton.jit(**VARYING)
def combine_kernel(
    part_ptr, stat_ptr, full_part_ptr, full_stat_ptr, basis_ptr, mean_ptr, out_ptr, lse_ptr,
    splits, full_splits, columns, queries, heads, repeat,
    D: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, FULL: tl.constexpr, HAS_BASIS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one query head at one query position.

    ``out = (w_p (B sum_p + l_p mean) + w_f sum_f) / (w_p l_p + w_f l_f)``, where p stands for the packed tokens, f for those
    in full precision, l is a sum of weights and w brings it to the common maximum. B is the output basis: sums over packed
    tokens are in the stored basis, those over full-precision ones in the model's own. At most MOST splits of p and FULL of f.
    Reads (splits + full_splits) (D + 2) floats and one [D, D] matrix, writes D numbers.
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
    # all that can be asked for at once is, before anything of it is waited for
    part, stat = part_ptr + at * splits * D, stat_ptr + at * splits * 2
    full_part, full_stat = full_part_ptr + at * full_splits * D, full_stat_ptr + at * full_splits * 2
    sums, maxima = load_sums(part, splits, 0, D, BLOCK), load_maxima(stat, splits, 0, BLOCK)
    full_sums, full_maxima = load_sums(full_part, full_splits, 0, D, FULL), load_maxima(full_stat, full_splits, 0, FULL)
    weight, top = total_weight(stat, splits, MOST)
    full_weight, full_top = total_weight(full_stat, full_splits, FULL)
    full = tl.sum(full_sums * factors(full_maxima, full_top)[:, None], 0)
    acc = tl.sum(sums * factors(maxima, top)[:, None], 0)
    for start in range(BLOCK, splits, BLOCK):
        more = factors(load_maxima(stat, splits, start, BLOCK), top)
        acc += tl.sum(load_sums(part, splits, start, D, BLOCK) * more[:, None], 0)
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


def launch_combine(
    card: Card, q: Tensor, columns: Columns, packed: Partials, held: Partials, basis: Tensor, mean: Tensor, *, has_basis: bool
) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, D] in q's dtype and the log-sum-exp float32 [B, N, H], both new.

    ``packed`` and ``held`` are the partial softmaxes over packed pages and over full-precision slots. ``basis`` [KH, D, D] and
    ``mean`` [KH, D] are not read unless ``has_basis``.
    """
    batch, queries, heads, size = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    combine_kernel[(batch * queries * heads,)](
        packed.sums, packed.statistics, held.sums, held.statistics, basis, mean, out, lse, packed.splits, held.splits,
        columns.total, queries, columns.heads, columns.repeat,
        D=size, BLOCK=64 if packed.splits <= 64 else 128, MOST=MAX_SPLITS, FULL=FULL_SPLITS, HAS_BASIS=has_basis,
        num_warps=8, **overlapping(card.pdl),
    )  # fmt: skip
    return out, lse
