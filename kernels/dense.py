"""Dense attention over 16- or 32-bit keys and values that returns the log-sum-exp, so that parts can be merged.

Torch's own kernels do the work; a chunk of queries against everything before it is calls without a mask (query heads that
share a kv head are folded into the query axis: one of flash attention, or on Hopper one of cuDNN for each of ``blocks``) and
one causal square of flash attention, merged by log-sum-exp: on a card by a kernel, for torch would take a tenth of the time
that attention over 32,768 tokens takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skvq.kernels.cudnn import blocks, cudnn_on, flash_attention
from skvq.kernels.reference import masked_attention, merge


def kv_buffer(kv_heads: int, tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for keys, or values, [KH, T, D] of a text that is read chunk by chunk; ``attend_causal`` sees its beginnings.

    On a card they lie by token, so that strides, and with them cuDNN's plans, are those of any other text.
    """
    if device.type == "cpu":
        return torch.empty(kv_heads, tokens, size, dtype=dtype, device=device)
    return torch.empty(tokens, kv_heads, size, dtype=dtype, device=device).transpose(0, 1)


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every query of ``q`` [N, H, D] sees every token of k, v [KH, T, D]; output [N, H, D], log-sum-exp [N, H] float32."""
    return _merged(*_attend_parts(q, k, v), q.dtype)


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
    own, own_lse = (torch.unflatten(t, 0, (kv_heads, repeat)) for t in (out, lse))  # [KH, rep, N, D], [KH, rep, N]
    outs, lses = _attend_parts(q, k[:, :past], v[:, :past]) if past else ([], [])
    return _merged([own, *outs], [own_lse, *lses], q.dtype)


def _attend_parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """``attend_all`` not merged yet: outputs [KH, rep, N, D] and log-sum-exps [KH, rep, N] over runs of the tokens."""
    count, heads, size = q.shape
    kv_heads, tokens, _ = k.shape
    folded = q.view(count, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)
    in_blocks = q.is_cuda and cudnn_on(q.device).takes(folded, count)
    outs, lses = [], []
    for start, stop in blocks(tokens) if in_blocks else [(0, tokens)]:
        keys, values = (t[:, start:stop].to(q.dtype) for t in (k, v))
        if in_blocks and cudnn_on(q.device).takes_block(keys):
            out, lse = cudnn_on(q.device).attend(folded, keys, values)  # [KH, rep * N, D]
        else:
            out, lse = _flash(folded, keys, values, causal=False)
        outs.append(torch.unflatten(out, 1, (-1, count)))
        lses.append(torch.unflatten(lse, 1, (-1, count)))
    return outs, lses


def _merged(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One softmax of those parts: output [N, H, D], log-sum-exp [N, H]."""
    if len(outs) > 1 and outs[0].is_cuda:
        return merge_on_card(outs, lses, dtype)
    outs, lses = ([t.flatten(0, 1).transpose(0, 1) for t in part] for part in (outs, lses))
    return (outs[0], lses[0]) if len(outs) == 1 else merge_runs(outs, lses, dtype)


def merge_runs(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One softmax of partial ones over disjoint runs of tokens: outputs [N, H, D], here of ``dtype``, log-sum-exps [N, H]."""
    if outs[0].is_cuda:
        return merge_on_card([t.transpose(0, 1)[:, None] for t in outs], [t.T[:, None] for t in lses], dtype)
    out, lse = merge(outs, lses)
    return out.to(dtype), lse


def merge_on_card(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``merge_parts``; Triton is imported only where there is a card."""
    from skvq.kernels.triton_gpu.merge import merge_parts

    return merge_parts(outs, lses, dtype)


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
    k, v = k.to(q.dtype), v.to(q.dtype)
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], 0.0, causal)
    elif q.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q[None], k[None], v[None], None, True, 0.0, causal)
        lse = lse[..., : q.shape[1]]
    else:
        return flash_attention(q, k, v, causal=causal)
    return out[0], lse[0].float()
