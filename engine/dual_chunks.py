"""Dual chunk attention (arXiv 2402.17463): no query and token seem farther apart than a model was trained for.

A text is cut into chunks of ``length`` tokens, and RoPE turns every key by its place in its chunk. A query at place p of its
own chunk is turned by p where it meets that chunk, by ``min(p + length, reach)`` where it meets the chunk before, so that
neighbours across the border are as far apart as they are, and by ``reach`` where it meets any chunk before that. All of it is
one softmax. Keys are cached once; the pages of a chunk are read as if they were a text of their own.

``Distances`` is what attention asks: ``TrueDistances`` where a context is within what a model was trained for, else ``Chunks``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from skvq.engine.config import CacheConfig
from skvq.engine.errors import OptionError
from skvq.engine.model_config import FULL_SPAN, ChunkConfig
from skvq.kernels.dense import attend_all, attend_behind, attend_causal, merge_runs
from skvq.kernels.interface import RopeFrequencies, Step
from skvq.kernels.layout import PAGE_TOKENS
from skvq.kernels.ops import apply_rope, rope_turns


class Distances(Protocol):
    """How far apart queries and tokens seem to be, and dense attention with that."""

    def places(self, positions: Tensor) -> Tensor:
        """What keys at these positions are turned by, and queries where they meet tokens near them."""

    def gain(self, positions: Tensor) -> Tensor | None:
        """What queries there are multiplied by, float32 of the same shape; None for all ones."""

    def attend(self, q: Tensor, first: int, k: Tensor, v: Tensor, start: int, span: int) -> tuple[Tensor, Tensor]:
        """Queries [N, H, D] at positions ``first ..`` see the tokens from ``start`` on, k and v [KH, T, D], up to themselves:
        all of those are before them, or the last N are their own. Both are turned by their places.

        Output [N, H, D] and log-sum-exp [N, H] float32.
        """


class TrueDistances:
    """As far apart as they are."""

    def places(self, positions: Tensor) -> Tensor:
        return positions

    def gain(self, positions: Tensor) -> Tensor | None:
        return None

    def attend(self, q: Tensor, first: int, k: Tensor, v: Tensor, start: int, span: int) -> tuple[Tensor, Tensor]:
        if start + k.shape[1] > first:
            return attend_causal(q, k, v, span)
        return attend_behind(q, k, v, first - span + 1 - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """Chunks of ``length`` tokens, whole pages, and ``reach``, ``length`` or more: the largest distance there is.

    gain_from: 0, or queries at position t are longer by ``(0.1 ln((t + 1) / gain_from) + 1)^2`` from there on (Qwen2.5-1M,
        arXiv 2501.15383, after YaRN's equation 22). vLLM has that of a prompt's length for all its tokens, in keys and scale.
    frequencies: RoPE's, without its scale.
    """

    length: int
    reach: int
    gain_from: int
    frequencies: RopeFrequencies

    def __str__(self) -> str:
        return f"in chunks of {self.length:,} tokens, distances up to {self.reach:,}, gain from {self.gain_from:,} on"

    def places(self, positions: Tensor) -> Tensor:
        return positions % self.length

    def gain(self, positions: Tensor) -> Tensor | None:
        if not self.gain_from:
            return None
        return ((positions + 1).float() / self.gain_from).log().mul(0.1).add(1).clamp_min(1).square()

    def attend(self, q: Tensor, first: int, k: Tensor, v: Tensor, start: int, span: int) -> tuple[Tensor, Tensor]:
        assert span == FULL_SPAN, span
        found = [self._attend_run(q[a - first : b - first], a, k, v, start) for a, b in self.runs(first, len(q))]
        outs, lses = zip(*found, strict=True)
        return (outs[0], lses[0]) if len(found) == 1 else (torch.cat(outs), torch.cat(lses))

    def _attend_run(self, q: Tensor, a: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """``attend`` of queries of one chunk, from position ``a`` on."""
        b, stop = a + len(q), start + k.shape[1]
        own = a // self.length * self.length
        before, rest = max(start, own - self.length), self.reach - self.places(torch.arange(a, b, device=q.device))
        parts = []
        if max(start, own) < stop:
            keys, values = (t[:, max(start, own) - start : b - start] for t in (k, v))
            parts.append(attend_causal(q, keys, values, FULL_SPAN) if stop > a else attend_all(q, keys, values))
        for further, lo, hi in ((rest.clamp_max(self.length), before, min(stop, own)), (rest, start, before)):
            if lo < hi:
                query = apply_rope(q, *rope_turns(self.frequencies, further))
                parts.append(attend_all(query, *(t[:, lo - start : hi - start] for t in (k, v))))
        outs, lses = zip(*parts, strict=True)
        return parts[0] if len(parts) == 1 else merge_runs(list(outs), list(lses), q.dtype)

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Start and stop of the parts of ``count`` tokens from ``first`` on that lie in one chunk.

        >>> list(Chunks(length=1280, reach=2560, gain_from=0, frequencies=None).runs(1000, 2000))
        [(1000, 1280), (1280, 2560), (2560, 3000)]
        """
        last = first + count
        while first < last:
            stop = min(last, (first // self.length + 1) * self.length)
            yield first, stop
            first = stop

    def further(self, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [count, B, N, 1, D/2] of what queries at ``positions`` [B, N] are turned by, beyond their places,
        where they meet each of the first ``count`` chunks."""
        rest = self.reach - self.places(positions)
        apart = positions // self.length - torch.arange(count, device=positions.device)[:, None, None]
        near = torch.where(apart == 1, rest.clamp_max(self.length), 0)
        return rope_turns(self.frequencies, torch.where(apart > 1, rest, near))


def require_chunkable(cut: ChunkConfig | None, cache: CacheConfig, *, shift: bool) -> None:
    """Raise OptionError for what cannot be had where a context is ``cut``: rules that need attention mass, and ``shift``."""
    others = [repr(rule) for rule in cache.rules if rule.needs_attention_mass] + ["on_full 'shift'"] * shift
    if cut and others:
        raise OptionError(
            f"{' and '.join(others)} cannot be used with dual chunk attention, which contexts above {cut.reach:,} tokens have "
            "here: leave that out, or choose a shorter context (--ctx; of what is scored --stride)"
        )


def chunk_steps(step: Step, chunks: Chunks, ring: int) -> list[Step]:
    """The step as each chunk sees it that may hold anything, packed tokens or some of the ``ring`` tokens behind them: as if
    its tokens were all there are."""
    pages, found = chunks.length // PAGE_TOKENS, []
    for number in range((step.max_packed + ring - 1) // chunks.length + 1):
        first = number * chunks.length
        found.append(
            replace(
                step,
                positions=step.positions.clamp_max(first + chunks.length - 1) - first,
                packed=(step.packed - first).clamp(0, chunks.length),
                page_table=step.page_table[:, number * pages : (number + 1) * pages],
                max_packed=min(max(step.max_packed - first, 0), chunks.length),
            )
        )
    return found
