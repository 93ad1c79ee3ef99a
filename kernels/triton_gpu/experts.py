# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""Mixture of experts in a decode step: which experts each token goes through, and its products with their matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.experts import DenseStack, Experts, Stack, StoredStack
from skvq.kernels.triton_gpu import blocks, matvec


@triton.jit
def route_kernel(
    logit_ptr, id_ptr, weight_ptr, experts, E: tl.constexpr, K: tl.constexpr, CHOSEN: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """``experts.route`` of one row: the CHOSEN largest of its logits, largest first, of equal ones the first; E and K are the
    powers of two at or above the number of experts and CHOSEN.

    A logit that is not a number is never chosen; ids stay in range whatever the logits are.
    """
    row = tl.program_id(0).to(tl.int64)
    c, place = tl.arange(0, E), tl.arange(0, K)
    logits = tl.load(logit_ptr + row * experts + c, mask=c < experts, other=float("-inf")).to(tl.float32)
    left = tl.where(logits == logits, logits, float("-inf"))
    top = tl.max(left, 0)
    weights, ids = tl.zeros([K], tl.float32), tl.zeros([K], tl.int32)
    for k in range(CHOSEN):
        best = tl.max(left, 0)
        at = tl.minimum(tl.min(tl.where(left == best, c, E), 0), experts - 1)
        weights, ids = tl.where(place == k, tl.exp(best - top), weights), tl.where(place == k, at, ids)
        left = tl.where(c == at, float("-inf"), left)
    total = tl.sum(weights, 0) if NORMED else tl.sum(tl.exp(logits - top), 0)
    inside = place < CHOSEN
    tl.store(id_ptr + row * CHOSEN + place, ids.to(tl.int64), mask=inside)
    tl.store(weight_ptr + row * CHOSEN + place, (weights / total).to(weight_ptr.dtype.element_ty), mask=inside)


def route(logits: Tensor, chosen: int, *, normed: bool) -> tuple[Tensor, Tensor]:
    """``kernels.experts.route`` of logits [N, experts]: ids int64 [N, chosen], weights of the dtype of the logits."""
    rows, experts = logits.shape
    ids = torch.empty(rows, chosen, dtype=torch.int64, device=logits.device)
    weights = torch.empty(rows, chosen, dtype=logits.dtype, device=logits.device)
    route_kernel[(rows,)](
        logits.contiguous(), ids, weights, experts, E=triton.next_power_of_2(experts), K=triton.next_power_of_2(chosen),
        CHOSEN=chosen, NORMED=normed, num_warps=1,
    )  # fmt: skip
    return ids, weights


BLOCK_SHARE = 8
"""To multiply many tokens, a matrix in blocks is expanded: as many bytes as this times what it takes itself."""


def is_each(stack: Stack, x: Tensor) -> bool:
    """Whether kernels multiply x by the matrices of a stack that its tokens choose: both of one 16-bit dtype, or blocks."""
    if isinstance(stack, DenseStack):
        return stack.weight.dtype == x.dtype and x.dtype in matvec.HALVES
    return isinstance(stack, StoredStack) and isinstance(stack.matrix, blocks.BlockMatrix) and x.dtype in matvec.HALVES


def most_pairs(experts: Experts) -> int:
    """Pairs of a token and an expert up to which each reads its matrix for itself; of more, a matrix is read once for all."""
    return experts.count * (BLOCK_SHARE if isinstance(experts.gate_up, StoredStack) else 1)


def each_swiglu(stack: Stack, x: Tensor, norm: Tensor, eps: float, ids: Tensor) -> Tensor:
    """``silu(gate) * up`` of each of the norm of x, [P, f]; letters as in ``TorchOps.each``."""
    if isinstance(stack, DenseStack):
        return matvec.each_swiglu(x, norm, eps, stack.weight, ids)
    assert isinstance(stack, StoredStack) and isinstance(stack.matrix, blocks.BlockMatrix)
    out = torch.empty(len(ids), stack.outs // 2, dtype=x.dtype, device=x.device)
    blocks.multiply_each(x, stack.matrix, ids, out, norm=norm, eps=eps, gated=True)
    return out


def each_linear(stack: Stack, x: Tensor, ids: Tensor) -> Tensor:
    """``TorchOps.each``; the host reads nothing."""
    if isinstance(stack, DenseStack):
        return matvec.each_linear(x, stack.weight, ids)
    assert isinstance(stack, StoredStack)
    out = torch.empty(len(ids), stack.outs, dtype=x.dtype, device=x.device)
    stack.matrix.multiply_each(x, ids, out)
    return out
