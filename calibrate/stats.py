"""What one layer's queries, keys and values look like on the corpus: one more cache, a recorder, and no hooks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.engine.rope import StepRope
from skvq.engine.steps import DenseLayer

SINKS = 5
"""First tokens of a text that take no part in the statistics: the cache keeps them in full precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """One layer over S texts of T tokens each. Everything float32; only one layer's are ever held."""

    queries: Tensor  # [S, T, H, D], after RoPE
    keys: Tensor  # [S, T, KH, D], before RoPE
    turned_keys: Tensor  # [S, T, KH, D], after RoPE
    values: Tensor  # [S, T, KH, D]
    output_gram: Tensor  # [KH, D, D], W_o^T W_o of each kv head, summed over its query heads


class Recorder:
    """Dense attention over one text at a time that remembers what it was given."""

    def __init__(self, texts: int, tokens: int, heads: int, kv_heads: int, size: int, span: int, device: torch.device) -> None:
        self.span = span
        self.queries = torch.empty(texts, tokens, heads, size, device=device)
        self.keys = torch.empty(texts, tokens, kv_heads, size, device=device)
        self.turned_keys = torch.empty_like(self.keys)
        self.values = torch.empty_like(self.keys)
        self._text = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        """One whole text: q [1, T, H, D], k and v [1, T, KH, D]."""
        at = self._text
        self._text += 1
        self.queries[at], self.keys[at], self.turned_keys[at], self.values[at] = rope.turn(q)[0], k[0], rope.turn(k)[0], v[0]
        buffer = torch.empty(k.shape[2], k.shape[1], k.shape[3], dtype=k.dtype, device=k.device)
        return DenseLayer(buffer, torch.empty_like(buffer), self.span).attend(q, k, v, rope)

    def stats(self, output_weight: Tensor) -> LayerStats:
        """What was seen; ``output_weight`` is W_o [d, H D]."""
        kv_heads, size = self.keys.shape[2:]
        w = output_weight.float().view(output_weight.shape[0], kv_heads, -1, size)  # [d, KH, rep, D]
        return LayerStats(
            queries=self.queries,
            keys=self.keys,
            turned_keys=self.turned_keys,
            values=self.values,
            output_gram=torch.einsum("okre,okrf->kef", w, w),
        )
