"""Dense attention over 16- or 32-bit keys and values that returns the log-sum-exp, so that parts can be merged.

Torch's own flash kernels do the work; a chunk of queries against everything before it is one call without a mask (query
heads that share a kv head are folded into the query axis) and one causal square, merged by log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.reference import masked_attention, merge


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every query of ``q`` [N, H, D] sees every token of k, v [KH, T, D]; output [N, H, D], log-sum-exp [N, H] float32."""
    count, heads, size = q.shape
    kv_heads = k.shape[0]
    folded = q.view(count, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)
    out, lse = _flash(folded, k, v, causal=False)  # [KH, rep * N, D]
    out = out.reshape(heads, count, size).transpose(0, 1)
    return out, lse.reshape(heads, count).transpose(0, 1)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """``q`` [N, H, D] are the last N of the T tokens of k, v [KH, T, D]; each sees the ``span`` tokens up to itself."""
    count, heads, _ = q.shape
    kv_heads, tokens, _ = k.shape
    past = tokens - count
    if tokens > span:
        return _attend_span(q, k, v, span)
    repeat = heads // kv_heads
    k_new, v_new = (t[:, past:].repeat_interleave(repeat, 0) for t in (k, v))
    out, lse = _flash(q.transpose(0, 1), k_new, v_new, causal=True)
    out, lse = out.transpose(0, 1), lse.transpose(0, 1)
    if not past:
        return out, lse
    before, before_lse = attend_all(q, k[:, :past], v[:, :past])
    merged, total = merge([out.float(), before.float()], [lse, before_lse])
    return merged.to(q.dtype), total


def _attend_span(q: Tensor, k: Tensor, v: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Sliding window: only the last N + span tokens matter, a block of queries at a time, with an explicit mask."""
    count, tokens = len(q), k.shape[1]
    outs, lses = [], []
    block = 256
    for start in range(0, count, block):
        stop = min(start + block, count)
        last = tokens - count + stop
        first = max(0, last - (stop - start) - span + 1)
        t = torch.arange(last - (stop - start), last, device=q.device)[:, None]
        at = torch.arange(first, last, device=q.device)[None]
        visible = (at <= t) & (t - at < span)
        part = masked_attention(q[start:stop], k[:, first:last].transpose(0, 1), v[:, first:last].transpose(0, 1), visible)
        outs.append(part[0].to(q.dtype))
        lses.append(part[1])
    return torch.cat(outs), torch.cat(lses)


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention of one batch, [heads, tokens, D]: output and natural log-sum-exp [heads, tokens]."""
    q, k, v = q[None], k[None].to(q.dtype), v[None].to(q.dtype)
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        lse = lse[..., : q.shape[2]]
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out[0], lse[0].float()
