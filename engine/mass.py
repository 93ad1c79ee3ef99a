"""The attention that tokens of the window get, for filter rules that ask for it (H2O, arXiv 2306.14048)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_QUERIES = 256
MOST_NUMBERS = 1 << 21
"""Scores computed at once, 8 MB: a long window is seen by fewer queries at a time."""


def add_mass(mass: Tensor, q: Tensor, lse: Tensor, keys: Tensor, window: int, span: int) -> None:
    """Add to ``mass`` [T] the attention that tokens get from those of the last N queries that follow them within ``window`` and
    see them: a query sees ``span`` tokens, itself among them.

    q [N, H, D] (the last N of the T tokens), lse [N, H] over all they see, keys [KH, T, D]; all after RoPE.
    """
    count, heads, size = q.shape
    kv_heads, tokens, _ = keys.shape
    repeat, window = heads // kv_heads, min(window, span - 1)
    step = queries_at_once(repeat, min(window, tokens))
    each = max(1, MOST_NUMBERS // (repeat * min(step, count) * min(step + window, tokens)))  # kv heads at once
    for start in range(0, count, step):
        stop = min(start + step, count)
        last = tokens - count + stop
        first = max(0, last - (stop - start) - window)
        t, at = (torch.arange(a, last, dtype=torch.int32, device=q.device) for a in (last - (stop - start), first))
        seen = (at < t[:, None]) & (at >= t[:, None] - window)
        for head in range(0, kv_heads, each):
            of_heads = slice(head * repeat, (head + each) * repeat)
            query = q[start:stop, of_heads].float().reshape(stop - start, -1, repeat, size)
            total = lse[start:stop, of_heads].reshape(stop - start, -1, repeat)
            score = torch.einsum("nhrd,htd->hrnt", query, keys[head : head + each, first:last].float())
            weight = (score / math.sqrt(size) - total.permute(1, 2, 0)[..., None]).exp_()
            mass[first:last] += weight.mul_(seen).sum((0, 1, 2))


def queries_at_once(repeat: int, window: int) -> int:
    """
    >>> queries_at_once(4, 128), queries_at_once(4, 131072)
    (256, 2)
    """
    count = MOST_QUERIES
    while count > 1 and repeat * count * (count + window) > MOST_NUMBERS:
        count //= 2
    return count


def mass_bytes(heads: int, kv_heads: int, window: int, size: int) -> int:
    """What ``add_mass`` computes with at the most: scores three times and keys, in float32, and who sees whom."""
    repeat = heads // kv_heads
    count = queries_at_once(repeat, window)
    pairs = count * (count + window)
    each = min(kv_heads, max(1, MOST_NUMBERS // (repeat * pairs)))
    return 4 * each * (3 * repeat * pairs + (count + window) * size) + 3 * pairs
