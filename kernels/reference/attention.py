"""Attention over what a cache holds: packed tokens and full-precision slots in one softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from skvq.kernels.interface import FullSlots, PlainPages, Step

Tokens = tuple[Tensor, Tensor, Tensor]
"""Keys and values [T, KH, D] float32, and retained flags bool [T]: those tokens are seen in full-precision slots instead."""

Read = Callable[[Tensor, int, int], Tokens]
"""(page_row, first, count) -> the tokens as they are stored."""

Decode = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(first, keys, values) as stored -> keys after RoPE and values."""


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v of ``q`` [N, H, D] over k, v [T, KH, D] where ``visible`` bool [N, T]; float32.

    Returns the output [N, H, D] and the log-sum-exp [N, H]; zeros and -inf where a query sees nothing.
    """
    count, heads, size = q.shape
    q = q.float().view(count, k.shape[1], heads // k.shape[1], size)
    score = torch.einsum("nhrd,thd->nhrt", q, k.float()) / math.sqrt(size)
    score = score.masked_fill(~visible[:, None, None, :], -torch.inf)
    lse = score.logsumexp(-1)
    weight = torch.exp(score - lse.clamp_min(torch.finfo(torch.float32).min)[..., None])
    out = torch.einsum("nhrt,thd->nhrd", weight, v.float())
    return out.reshape(count, heads, size), lse.reshape(count, heads)


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax from partial ones: outputs [..., D] and float32 log-sum-exps [...] over disjoint sets of tokens; float32."""
    total = torch.stack(lses).logsumexp(0)
    finite = total.clamp_min(torch.finfo(torch.float32).min)
    out = sum(out * torch.exp(lse - finite)[..., None] for out, lse in zip(outs, lses, strict=True))
    assert isinstance(out, Tensor)
    return out, total


def attend_packed(q: Tensor, full: FullSlots, step: Step, read: Read, decode: Decode) -> tuple[Tensor, Tensor]:
    """See ``interface.PackedKernels``; packed tokens come from ``read`` and then ``decode``, once for each row of the batch."""

    def tokens(slot: int, count: int) -> Tokens:
        keys, values, retained = read(step.page_table[slot], 0, count)
        return *decode(0, keys, values), retained

    return attend_rows(q, full, step, tokens)


def attend_plain(q: Tensor, pages: PlainPages, full: FullSlots, step: Step) -> tuple[Tensor, Tensor]:
    """See ``interface.Backend``."""

    def tokens(slot: int, count: int) -> Tokens:
        used = step.page_table[slot, : -(-count // pages.keys.shape[2])].long()
        keys, values = (t[used].transpose(1, 2).flatten(0, 1)[:count].float() for t in (pages.keys, pages.values))
        return keys, values, torch.zeros(count, dtype=torch.bool, device=q.device)

    return attend_rows(q, full, step, tokens)


def attend_rows(q: Tensor, full: FullSlots, step: Step, tokens: Callable[[int, int], Tokens]) -> tuple[Tensor, Tensor]:
    """Attend row by row of the batch; ``tokens(slot, count)`` are the packed tokens of a sequence, with keys after RoPE."""
    outs, lses = [], []
    for row, (slot, count) in enumerate(zip(step.slots.tolist(), step.packed.tolist(), strict=True)):
        keys, values, retained = tokens(slot, count)
        t = step.positions[row][:, None].long()  # [N, 1]
        at = torch.arange(count, device=q.device)[None]
        held = full.positions[slot].long()[None]  # [1, F]
        visible = torch.cat([~retained[None] & (t - at < step.span), (held >= 0) & (held <= t) & (t - held < step.span)], 1)
        k = torch.cat([keys, full.keys[slot].transpose(0, 1).float()])
        v = torch.cat([values, full.values[slot].transpose(0, 1).float()])
        # an empty slot may hold anything, and 0 * inf is not 0
        seen = visible.any(0)
        out, lse = masked_attention(q[row], k[seen], v[seen], visible[:, seen])
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs).to(q.dtype), torch.stack(lses)
