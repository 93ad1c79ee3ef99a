"""Dense attention over 16- or 32-bit keys and values that returns the log-sum-exp, so that parts can be merged.

On a CPU in float32 a kernel of ours does all of it (``numba_cpu.flash``). Else torch's own kernels do the work; a chunk of
queries against everything before it is calls without a mask (query heads that share a kv head are folded into the query axis:
one of flash attention, or on Hopper one of cuDNN for each of ``blocks``) and one causal square of flash attention, merged by
log-sum-exp: on a card by a kernel, for torch would take a tenth of the time that attention over 32,768 tokens takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.kernels.cudnn import blocks, cudnn_on, flash_attention
from skvq.kernels.interface import MOST_PARTS
from skvq.kernels.reference import merge


def kv_buffer(kv_heads: int, tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for keys, or values, [KH, T, D] of a text that is read chunk by chunk; ``attend_causal`` sees its beginnings.

    On a card they lie by token, so that strides, and with them cuDNN's plans, are those of any other text.
    """
    if device.type == "cpu":
        return torch.empty(kv_heads, tokens, size, dtype=dtype, device=device)
    return torch.empty(tokens, kv_heads, size, dtype=dtype, device=device).transpose(0, 1)


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every query of ``q`` [N, H, D] sees every token of k, v [KH, T, D]; output [N, H, D], log-sum-exp [N, H] float32."""
    if _is_ours(q):
        return flash_on_cpu(q, k, v, -len(q), k.shape[1])
    return _merged(*_attend_parts(q, k, v), q.dtype)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """``q`` [N, H, D] are the last N of the T tokens of k, v [KH, T, D]; each sees the ``span`` tokens up to itself."""
    past = k.shape[1] - len(q)
    if _is_ours(q):
        return flash_on_cpu(q, k, v, max(past + 1 - span, -len(q)), past + 1)
    if past + len(q) > span:
        return _attend_window(q, k, v, span)
    own, own_lse = _square(q, k[:, past:], v[:, past:])
    outs, lses = _attend_parts(q, k[:, :past], v[:, :past]) if past else ([], [])
    return _merged([own, *outs], [own_lse, *lses], q.dtype)


def _is_ours(q: Tensor) -> bool:
    """Whether the kernel for CPUs takes queries."""
    return q.device.type == "cpu" and q.dtype == torch.float32


def flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """``flash`` of float32 queries; numba is imported only where a CPU computes."""
    from skvq.kernels.numba_cpu.flash import flash

    return flash(q, k.float(), v.float(), low, high)


def _attend_window(q: Tensor, k: Tensor, v: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """``attend_causal`` of a sliding window: at most ``span`` queries at a time, their own tokens apart from those before."""
    past = k.shape[1] - len(q)
    found = []
    for start in range(0, len(q), span):
        block = q[start : start + span]
        first, own = max(0, past + start - span + 1), slice(past + start, past + start + len(block))
        out, lse = _attend_square(block, k[:, own], v[:, own])
        if first < own.start:
            before = slice(first, own.start)
            part, part_lse = attend_behind(block, k[:, before], v[:, before], past + start - span + 1 - first)
            out, lse = merge_runs([out, part], [lse, part_lse], q.dtype)
        found.append((out, lse))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _attend_square(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Query i of ``q`` [N, H, D] sees tokens 0 .. i of k, v [KH, N, D]; output [N, H, D], log-sum-exp [N, H]."""
    out, lse = _square(q, k, v)
    return _merged([out], [lse], q.dtype)


def _square(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a part: output [KH, rep, N, D], log-sum-exp [KH, rep, N]."""
    kv_heads, repeat = len(k), q.shape[1] // len(k)
    out, lse = _flash(q.transpose(0, 1), *(t.repeat_interleave(repeat, 0) for t in (k, v)), causal=True)
    return torch.unflatten(out, 0, (kv_heads, repeat)), torch.unflatten(lse, 0, (kv_heads, repeat))


def attend_behind(q: Tensor, k: Tensor, v: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """A sliding window over tokens before the queries: query i of ``q`` [N, H, D] does not see the first ``hidden + i`` tokens
    of k, v [KH, T, D] (a negative number hides none). Output [N, H, D], log-sum-exp [N, H]: zeros and -inf of a blind query.
    """
    count, tokens = len(q), k.shape[1]
    assert tokens > 0
    if _is_ours(q):
        return flash_on_cpu(q, k, v, max(hidden, -count), tokens)
    whole, some = min(max(0, 1 - hidden), count), min(max(0, tokens - hidden), count)  # queries that see all, anything
    if whole == count:
        return attend_all(q, k, v)
    found = [attend_all(q[:whole], k, v)] if whole else []
    if some > whole:
        found.append(_attend_sliding(q[whole:some], k[:, hidden + whole :], v[:, hidden + whole :]))
    if some < count:
        blind = q[some:]
        found.append((torch.zeros_like(blind), torch.full(blind.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _attend_sliding(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Query i sees all but the first i tokens; each sees at least one.

    What the last query sees, all see: a rectangle. The edge that slides is a causal square when queries and tokens are taken in
    reverse order. So there is no mask, and nothing of N x T numbers.
    """
    last = len(q) - 1
    out, lse = attend_all(q, k[:, last:], v[:, last:])
    if last == 0:
        return out, lse
    edge, edge_lse = _attend_square(q[:last].flip(0), *(t[:, :last].flip(1) for t in (k, v)))
    edge, edge_lse = F.pad(edge.flip(0), (0, 0, 0, 0, 0, 1)), F.pad(edge_lse.flip(0), (0, 0, 0, 1), value=-torch.inf)
    return merge_runs([out, edge], [lse, edge_lse], q.dtype)


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


class SoftmaxParts:
    """Partial softmaxes over disjoint runs of tokens; they are merged on the way, so memory does not grow with their number."""

    def __init__(self) -> None:
        self._outs: list[Tensor] = []
        self._lses: list[Tensor] = []

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Output [N, H, D] and log-sum-exp [N, H] of one run."""
        if len(self._outs) == MOST_PARTS:
            merged, total = merge_runs(self._outs, self._lses, torch.float32)
            self._outs, self._lses = [merged], [total]
        self._outs.append(out)
        self._lses.append(lse)

    def merged(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One softmax of them all: output [N, H, D] of ``dtype``, log-sum-exp [N, H]."""
        return merge_runs(self._outs, self._lses, dtype)


def merge_on_card(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``merge_parts``; Triton is imported only where there is a card."""
    from skvq.kernels.triton_gpu.merge import merge_parts

    return merge_parts(outs, lses, dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention of one batch, [heads, tokens, D]: output and natural log-sum-exp [heads, tokens]."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.device.type != "cpu":
        return flash_attention(q, k, v, causal=causal)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], 0.0, causal)
    return out[0], lse[0].float()
