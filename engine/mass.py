"""The attention that tokens of the window get, for filter rules that ask for it (H2O, arXiv 2306.14048)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_QUERIES = 256
MOST_NUMBERS = 1 << 21
"""Scores computed at once, 8 MB: a long window is seen by fewer queries at a time."""


def add_mass(mass: Tensor, q: Tensor, lse: Tensor, keys: Tensor, window: int) -> None:
    """Add to ``mass`` [T] the attention that tokens get from those of the last N queries that follow them within ``window``.

    q [N, H, D] (the last N of the T tokens), lse [N, H] over all they see, keys [KH, T, D]; all after RoPE.
    """
    count, heads, size = q.shape
    kv_heads, tokens, _ = keys.shape
    repeat = heads // kv_heads
    step = queries_at_once(repeat, window)
    for start in range(0, count, step):
        stop = min(start + step, count)
        last = tokens - count + stop
        first = max(0, last - (stop - start) - window)
        t = torch.arange(last - (stop - start), last, device=q.device)[:, None]
        behind = t - torch.arange(first, last, device=q.device)[None]
        seen = (behind > 0) & (behind <= window)
        for head in range(kv_heads):
            of_head = slice(head * repeat, (head + 1) * repeat)
            score = torch.einsum("nrd,td->rnt", q[start:stop, of_head].float(), keys[head, first:last].float())
            weight = (score / math.sqrt(size) - lse[start:stop, of_head].T[:, :, None]).exp_()
            mass[first:last] += weight.mul_(seen).sum((0, 1))


def queries_at_once(repeat: int, window: int) -> int:
    """
    >>> queries_at_once(4, 128), queries_at_once(4, 131072)
    (256, 2)
    """
    count = MOST_QUERIES
    while count > 1 and repeat * count * (count + window) > MOST_NUMBERS:
        count //= 2
    return count


def mass_bytes(repeat: int, window: int, size: int) -> int:
    """What ``add_mass`` computes with at the most: scores three times, and a head's keys, in float32."""
    count = queries_at_once(repeat, window)
    return 4 * (count + window) * (3 * repeat * count + size)
