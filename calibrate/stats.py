"""What one layer's queries, keys and values look like on the corpus: one more cache, a recorder, and no hooks.

Sums, means, second moments and extremes are over every token and are kept as such; fits that search need numbers themselves and
get those of a sample of at most SAMPLE_TEXTS texts. So for texts of T tokens a layer's statistics take, whatever the corpus,

    8 (T - SINKS) KH D + 16 KH D^2                                      bytes of sums, and, with S' = min(S, SAMPLE_TEXTS),
    8 S' T KH D + 4 min(S, READING_TEXTS) ceil(T / READING_STEP) H D    bytes of sample,

the small terms left out: 165 MB for a model of Mistral-7B's shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.calibrate.threads import one_thread
from skvq.engine.layer_caches import DenseLayer
from skvq.engine.rope import StepRope

SINKS = 5
"""First tokens of a text that take no part in means and moments: the cache keeps them in full precision."""

SAMPLE_TEXTS = 8
"""Texts, evenly spaced, whose keys and values are held: 16,384 tokens, all of ``skvq calibrate``'s default."""

READING_TEXTS, READING_STEP = 3, 8
"""Texts of the sample, and every how many queries of them, on which the reading of values is fitted."""

STRETCH = 16
"""Tokens over which a channel's extremes are taken before they are averaged. Extremes over the whole corpus are those of a few
odd tokens: groups made for them have 1.8 times the error of these, and a KL twice as large (docs/accuracy.md)."""


def sample_of(texts: int) -> list[int]:
    """Indices of the texts whose numbers are held; never the last of more than SAMPLE_TEXTS.

    >>> sample_of(3), sample_of(20)
    ([0, 1, 2], [0, 2, 5, 7, 10, 12, 15, 17])
    """
    count = min(texts, SAMPLE_TEXTS)
    return [i * texts // count for i in range(count)]


def reading_of(sample: int) -> list[int]:
    """Which texts of a sample the reading of values is fitted on.

    >>> reading_of(8), reading_of(2)
    ([0, 2, 4], [0, 1])
    """
    return list(range(sample))[:: max(1, sample // READING_TEXTS)][:READING_TEXTS]


def reading_queries(tokens: int) -> range:
    """Positions of the queries it is fitted on, all with packed tokens behind them."""
    return range(min(2 * reading_gap(tokens), tokens - 1), tokens, READING_STEP)


def reading_gap(tokens: int) -> int:
    """Tokens before a query that count as its window."""
    return min(128, tokens // 4)


@dataclass(frozen=True, slots=True)
class SideStats:
    """Keys before RoPE, or values, over every token."""

    mean: Tensor  # [KH, D], sinks aside
    covariance: Tensor  # [KH, D, D], sinks aside, of what is left without the mean; of keys after RoPE
    top: Tensor  # [KH, D], largest magnitude
    typical: Tensor  # [KH * D, 2], smallest and largest over STRETCH tokens, on average


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """One layer over S texts of T tokens each; only one layer's are ever held. Means, moments and ranges float64."""

    keys: SideStats
    values: SideStats
    turned_top: Tensor  # [KH, D], largest magnitude of keys after RoPE
    query_energy: Tensor  # [H, D], mean square of queries after RoPE, sinks aside
    output_gram: Tensor  # [KH, D, D], float32, W_o^T W_o of each kv head, summed over its query heads
    rope: StepRope  # of positions 0 .. T-1
    sample_keys: Tensor  # float32 [S', T, KH, D], before RoPE, of the texts ``sample_of(S)``
    sample_values: Tensor  # as sample_keys
    sample_queries: Tensor  # float32 [S'', Q, H, D], after RoPE, at ``reading_queries(T)`` of texts ``reading_of(S')`` of these


def first_of(tokens: int) -> int:
    """First token of a text of this length that takes part in means and moments."""
    return min(SINKS, tokens // 2)


def typical_range(x: Tensor) -> Tensor:
    """Minimum and maximum of each channel of ``x`` [T, C] over STRETCH tokens, on average; float64 [C, 2]."""
    whole = x[: max(1, len(x) // STRETCH) * STRETCH]
    stretches = whole.view(-1, min(STRETCH, len(x)), x.shape[1])
    return torch.stack([stretches.amin(1).double().mean(0), stretches.amax(1).double().mean(0)], 1)


class _Sums:
    """Running figures of one side."""

    def __init__(self, kv_heads: int, size: int, device: torch.device) -> None:
        self.total = torch.zeros(kv_heads, size, dtype=torch.float64, device=device)
        self.gram = torch.zeros(kv_heads, size, size, dtype=torch.float64, device=device)
        self.top = torch.zeros(kv_heads, size, dtype=torch.float32, device=device)
        self.typical = torch.zeros(kv_heads * size, 2, dtype=torch.float64, device=device)

    def add(self, x: Tensor, turned: Tensor, first: int) -> None:
        """One text: ``x`` [T, KH, D], and in the gram ``turned`` [T - first, KH, D], float64."""
        self.total += x[first:].double().sum(0)
        self.gram += torch.einsum("thi,thj->hij", turned, turned)
        self.top = torch.maximum(self.top, x.abs().amax(0))
        self.typical += typical_range(x.flatten(1))

    def stats(self, covariance: Tensor, tokens: int, texts: int) -> SideStats:
        return SideStats(self.total / tokens, covariance, self.top, self.typical / texts)


class Recorder:
    """Dense attention over one text of T tokens at a time, S in all, that remembers what ``LayerStats`` say."""

    def __init__(self, texts: int, rope: StepRope, heads: int, kv_heads: int, size: int, span: int) -> None:
        """``rope``: the turns of positions 0 .. T-1, [1, T]."""
        self.span, self._rope, self._texts = span, rope, texts
        tokens, device = rope.cos.shape[1], rope.cos.device
        self._first = first_of(tokens)
        self._sample = sample_of(texts)
        self._reading = [self._sample[i] for i in reading_of(len(self._sample))]
        self._queries = torch.tensor(reading_queries(tokens), device=device)
        self._keys, self._values = (_Sums(kv_heads, size, device) for _ in range(2))
        # with it the mean, which is known at the end only, is taken out of the second moment of turned keys
        self._turned_total = torch.zeros(tokens - self._first, kv_heads, size, dtype=torch.float64, device=device)
        self._turned_top = torch.zeros(kv_heads, size, dtype=torch.float32, device=device)
        self._energy = torch.zeros(heads, size, dtype=torch.float64, device=device)
        self._sample_keys = torch.empty(len(self._sample), tokens, kv_heads, size, dtype=torch.float32, device=device)
        self._sample_values = torch.empty_like(self._sample_keys)
        self._sample_queries = torch.empty(
            len(self._reading), len(self._queries), heads, size, dtype=torch.float32, device=device
        )
        self._seen = 0
        self.key_norms = torch.empty(tokens, dtype=torch.float32, device=device)
        """Norm of each token's keys in the last text, mean over kv heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        """One whole text: q [1, T, H, D], k and v [1, T, KH, D]."""
        with one_thread():
            self._see(rope.apply(q)[0].float(), k[0].float(), rope.apply(k)[0].float(), v[0].float())
        self._seen += 1
        buffer = torch.empty(k.shape[2], k.shape[1], k.shape[3], dtype=k.dtype, device=k.device)
        return DenseLayer(buffer, torch.empty_like(buffer), self.span).attend(q, k, v, rope)

    def _see(self, q: Tensor, k: Tensor, turned: Tensor, v: Tensor) -> None:
        first, far = self._first, turned[self._first :].double()
        self._keys.add(k, far, first)
        self._values.add(v, v[first:].double(), first)
        self._turned_total += far
        self._turned_top = torch.maximum(self._turned_top, turned.abs().amax(0))
        self._energy += q[first:].double().square().sum(0)
        self.key_norms = turned.norm(dim=-1).mean(-1)
        if self._seen in self._sample:
            at = self._sample.index(self._seen)
            self._sample_keys[at], self._sample_values[at] = k, v
        if self._seen in self._reading:
            self._sample_queries[self._reading.index(self._seen)] = q[self._queries]

    def stats(self, output_weight: Tensor) -> LayerStats:
        """What was seen of all texts; ``output_weight`` is W_o [d, H D]."""
        assert self._seen == self._texts, (self._seen, self._texts)
        kv_heads, size = self._keys.total.shape
        w = output_weight.float().view(output_weight.shape[0], kv_heads, -1, size)  # [d, KH, rep, D]
        with one_thread():
            tokens = self._texts * len(self._turned_total)
            value_mean = self._values.total / tokens
            return LayerStats(
                keys=self._keys.stats(self._key_covariance(tokens), tokens, self._texts),
                values=self._values.stats(
                    self._values.gram / tokens - value_mean[:, :, None] * value_mean[:, None], tokens, self._texts
                ),
                turned_top=self._turned_top,
                query_energy=self._energy / tokens,
                output_gram=torch.einsum("okre,okrf->kef", w, w),
                rope=self._rope,
                sample_keys=self._sample_keys,
                sample_values=self._sample_values,
                sample_queries=self._sample_queries,
            )

    def _key_covariance(self, tokens: int) -> Tensor:
        """For R_t (k - mean) over all tokens: the sum of (R_t k - m_t)(R_t k - m_t)^T multiplied out, m_t = R_t mean."""
        mean = (self._keys.total / tokens).float()
        m = turned_mean(mean, self._rope)[self._first :].double()  # [T - first, KH, D]
        crossed = torch.einsum("thi,thj->hij", self._turned_total, m)
        own = self._texts * torch.einsum("thi,thj->hij", m, m)
        return torch.div(self._keys.gram - crossed - crossed.transpose(1, 2) + own, tokens)


def turned_mean(mean: Tensor, rope: StepRope) -> Tensor:
    """What the mean [KH, D] of keys before RoPE is at each position: [T, KH, D]."""
    return rope.apply(mean.expand(1, rope.cos.shape[1], -1, -1))[0]
