"""What it costs the model to hold keys or values of one kv head, or of a whole layer, at some width, measured on a text.

They are really packed and read back; everything else stays exact. The cost is the KL divergence of the model's answers, in
nats per token. It is run to the end with one side of all heads at REFERENCE_BITS only. The change of the layer's own output
shares it among heads and gives other widths: small errors add to the KL in proportion to their square, so the ratio of squares
carries over, and those of different heads add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skvq.calibrate.stats import SINKS
from skvq.engine.model import Model
from skvq.engine.rope import ModelRope, StepRope, at_positions
from skvq.engine.whole_text import dense_layers, text_in_full
from skvq.kernels.reference import masked_attention, merge

PROBE_TOKENS, PROBE_STEP = 1024, 2
"""Tokens of the text, and every how many of them answers are compared."""

REFERENCE_BITS = 2.0
"""Width at which the KL itself is measured."""

ROWS = 256
"""Queries attended at once."""

Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What pages hold of keys after RoPE and values, [T, KH, D] each."""

Seen = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Keys and values of a layer, from one side of them."""


@dataclass(frozen=True, slots=True)
class DisturbedLayer:
    """A whole text in which tokens ``window`` away or more, but for the first few, are seen as ``keys`` and ``values`` say."""

    keys: Tensor  # [T, KH, D], after RoPE
    values: Tensor
    window: int
    span: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        """One whole text: q [1, T, H, D], k and v [1, T, KH, D]."""
        q, k, v = rope.apply(q)[0], rope.apply(k)[0], v[0]
        return torch.cat([self._rows(q, k, v, a, min(a + ROWS, len(q))) for a in range(0, len(q), ROWS)])[None]

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, a: int, b: int) -> Tensor:
        t = torch.arange(a, b, device=q.device)[:, None]
        at = torch.arange(b, device=q.device)[None]
        visible = (at <= t) & (t - at < self.span)
        near = (t - at < self.window) | (at < SINKS)
        exact = masked_attention(q[a:b], k[:b], v[:b], visible & near)
        stored = masked_attention(q[a:b], self.keys[:b], self.values[:b], visible & ~near)
        return merge([exact[0], stored[0]], [exact[1], stored[1]])[0].to(q.dtype)


class Probe:
    """One text on its way through the exact model; ``losses`` of a layer, then ``advance`` to the next."""

    def __init__(self, model: Model, model_rope: ModelRope, ids: Tensor, window: int) -> None:
        """``ids`` int64 [T], up to PROBE_TOKENS; the window is never more than a quarter of them."""
        tokens = len(ids)
        self.window = min(window, tokens // 4)
        self._model = model
        self._dense = dense_layers(model, tokens)
        self._rope = at_positions(model_rope, torch.arange(tokens, device=ids.device)[None])
        self._rows = torch.arange(min(2 * self.window, tokens - 1), tokens, PROBE_STEP, device=ids.device)
        self._layer, self._hidden = 0, model.embed(ids[None])  # [1, T, d], what the layer is given
        self._answer = self._answers(text_in_full(model, model_rope, ids))

    def advance(self) -> None:
        """Move to the next layer."""
        self._hidden = self._model.layer(self._layer, self._hidden, self._rope, self._dense(self._layer))
        self._layer += 1

    def losses(self, stores: Mapping[float, Store], parts: Sequence[slice]) -> list[list[float]]:
        """KL in nats per token of keys, then values, of the first part of this layer's kv heads, of the second, ..., each at
        the widths of ``stores``, in order."""
        exact = self._dense(self._layer)
        output = self._model.layer(self._layer, self._hidden, self._rope, exact)
        keys, values = (t.transpose(0, 1).float().clone() for t in (exact.keys, exact.values))  # [T, KH, D]
        stored = {bits: store(keys, values) for bits, store in stores.items()}
        of_keys = self._side(output, parts, keys, {b: k for b, (k, _) in stored.items()}, lambda k: (k, values))
        of_values = self._side(output, parts, values, {b: v for b, (_, v) in stored.items()}, lambda v: (keys, v))
        return [row for pair in zip(of_keys, of_values, strict=True) for row in pair]

    def _side(
        self, exact: Tensor, parts: Sequence[slice], side: Tensor, stored: Mapping[float, Tensor], seen: Seen
    ) -> list[list[float]]:
        """KL by part and width: that of the whole side at REFERENCE_BITS, in proportion to the change of the layer's output."""
        kl = self._kl(self._output(*seen(stored[REFERENCE_BITS])))
        changes = []
        for part in parts:
            row = []
            for found in stored.values():
                disturbed = side.clone()
                disturbed[:, part] = found[:, part]
                row.append(self._change(exact, self._output(*seen(disturbed))))
            changes.append(row)
        reference = list(stored).index(REFERENCE_BITS)
        total = sum(row[reference] for row in changes)
        return [[kl * change / total if total else 0.0 for change in row] for row in changes]

    def _output(self, keys: Tensor, values: Tensor) -> Tensor:
        """What this layer gives, [1, T, d], when far tokens are seen as these keys and values."""
        layer = DisturbedLayer(keys, values, self.window, self._model.config.attention_spans[self._layer])
        return self._model.layer(self._layer, self._hidden, self._rope, layer)

    def _change(self, exact: Tensor, output: Tensor) -> float:
        """Mean over tokens of the squared change of the layer's output, relative to its square."""
        change, size = ((t[0, self._rows].float()).square().sum(-1) for t in (output - exact, exact))
        return float((change / size.clamp_min(1e-30)).mean())

    def _kl(self, hidden: Tensor) -> float:
        """Mean KL of the answers when this layer has given ``hidden``."""
        for layer in range(self._layer + 1, self._model.config.num_layers):
            hidden = self._model.layer(layer, hidden, self._rope, self._dense(layer))
        answer = self._answers(hidden[0])
        return float((self._answer.exp() * (self._answer - answer)).sum(-1).mean())

    def _answers(self, hidden: Tensor) -> Tensor:
        """Log-probabilities float32 [rows, V]."""
        return self._model.head(hidden[self._rows]).log_softmax(-1)
