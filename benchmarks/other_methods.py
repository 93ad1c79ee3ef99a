"""Other ways to quantize a KV cache, simulated as their papers do it: numbers rounded and put back, nothing packed.

Each query sees the last WINDOW tokens and the first SINKS in full precision, whatever the method, so that only the rounding is
compared. Bits count codes and metadata of far tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from skvq.calibrate.reorder import fill_empty
from skvq.calibrate.run import TEXT_TOKENS
from skvq.engine.evaluate import compare, dense_layers, text_in_full
from skvq.engine.generate import Engine
from skvq.engine.model import LayerCache, Model
from skvq.engine.rope import ModelRope, StepRope, at_positions
from skvq.kernels.reference import masked_attention

WINDOW, SINKS = 128, 5
GROUP = 64
CLIP = 0.92
"""SKVQ's constant, of its published evaluation scripts."""


def rounded(x: Tensor, levels: int, clip: float, late_fp8: bool) -> Tensor:
    """``x`` [..., g] by min and max times ``clip``; ``late_fp8`` rounds scale and zero point once the codes are chosen."""
    low, high = (clip * t for t in torch.aminmax(x, dim=-1, keepdim=True))
    scale = ((high - low) / (levels - 1)).clamp_min(1e-5)
    codes = ((x - low) / scale).round().clamp(0, levels - 1)
    if late_fp8:
        scale, low = (t.to(torch.float8_e4m3fn).float() for t in (scale, low))
    return codes * scale + low


def text_hidden(model: Model, model_rope: ModelRope, ids: Tensor, cache: Callable[[int], LayerCache]) -> Tensor:
    """Last hidden states [N, d] of a text, layer by layer against ``cache(layer)``, which attends all of it at once."""
    rope = at_positions(model_rope, torch.arange(len(ids), device=ids.device)[None])
    x = model.embed(ids[None])
    for layer in range(model.config.num_layers):
        x = model.layer(layer, x, rope, cache(layer))
    return x[0]


class Scheme(Protocol):
    """One layer's rounding."""

    def round(self, keys: Tensor, values: Tensor, rope: StepRope) -> tuple[Tensor, Tensor]:
        """What is left of keys (before RoPE) and values, [T, KH, D]; keys come back after RoPE."""


@dataclass(frozen=True, slots=True)
class Kivi:
    """KIVI (arXiv 2402.02750): keys after RoPE by channel in groups of GROUP tokens, values by token, 16-bit metadata."""

    levels: int = 4

    def round(self, keys: Tensor, values: Tensor, rope: StepRope) -> tuple[Tensor, Tensor]:
        turned = rope.apply(keys[None])[0]
        whole = len(turned) // GROUP * GROUP
        groups = turned[:whole].unflatten(0, (-1, GROUP)).movedim(1, -1)  # [T / g, KH, D, g]
        far = rounded(groups, self.levels, 1.0, late_fp8=False).movedim(-1, 1).flatten(0, 1)
        heads = values.unflatten(-1, (-1, GROUP))
        return torch.cat([far, turned[whole:]]), rounded(heads, self.levels, 1.0, late_fp8=False).flatten(-2)


@dataclass(frozen=True, slots=True)
class PublishedSkvq:
    """SKVQ as its authors' code does it: groups by extreme ranges, a constant clip, FP8 after the codes are chosen."""

    key_labels: Tensor  # int64 [KH * D]
    value_labels: Tensor
    levels: int = 4

    def round(self, keys: Tensor, values: Tensor, rope: StepRope) -> tuple[Tensor, Tensor]:
        far = self._by_label(keys, self.key_labels)
        return rope.apply(far[None])[0], self._by_label(values, self.value_labels)

    def _by_label(self, x: Tensor, labels: Tensor) -> Tensor:
        flat, out = x.flatten(1), torch.empty_like(x.flatten(1))
        for label in range(int(labels.max()) + 1):
            out[:, labels == label] = rounded(flat[:, labels == label], self.levels, CLIP, late_fp8=True)
        return out.view_as(x)


class SimulatedLayer:
    """A whole text of one sequence; far tokens are what the scheme leaves of them."""

    def __init__(self, scheme: Scheme, span: int) -> None:
        self._scheme, self._span = scheme, span

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        far_k, far_v = self._scheme.round(k[0], v[0], rope)
        q, k, v = rope.apply(q)[0], rope.apply(k)[0], v[0]
        i, j = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
        visible, near = (j <= i) & (i - j < self._span), (i - j < WINDOW) | (j < SINKS)
        seen = torch.cat([visible & near, visible & ~near], 1)
        return masked_attention(q, torch.cat([k, far_k]), torch.cat([v, far_v]), seen)[0][None]


class Extremes:
    """Dense attention that remembers the range of each channel of keys before RoPE and of values."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.ranges: list[tuple[Tensor, Tensor]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        self.ranges = [torch.aminmax(x[0].flatten(1), dim=0) for x in (k, v)]
        return self._layer.attend(q, k, v, rope)  # type: ignore[no-any-return]


def published_schemes(engine: Engine, corpus: Tensor) -> list[Scheme]:
    """Each layer's groups, by K-means on the extremes of all channels over ``corpus`` int64 [N]."""
    from sklearn.cluster import KMeans

    model, rope = engine.parts.model, engine.parts.rope
    config, texts = model.config, corpus.split(TEXT_TOKENS)
    found: list[list[Extremes]] = []
    for text in texts:
        dense = dense_layers(model, len(text))
        layers = [Extremes(dense(i)) for i in range(config.num_layers)]
        text_hidden(model, rope, text, lambda i, layers=layers: layers[i])  # type: ignore[misc]
        found.append(layers)
    groups = config.num_kv_heads * config.head_size // GROUP

    def labels(layer: int, side: int) -> Tensor:
        low = torch.stack([text[layer].ranges[side][0] for text in found]).amin(0)
        high = torch.stack([text[layer].ranges[side][1] for text in found]).amax(0)
        clusters = KMeans(groups, n_init=10, random_state=0).fit(torch.stack([low, high], 1).numpy()).labels_
        return fill_empty(torch.from_numpy(clusters).long(), groups)

    return [PublishedSkvq(labels(layer, 0), labels(layer, 1)) for layer in range(config.num_layers)]


@torch.no_grad()
def simulate(engine: Engine, ids: Tensor, scheme: Callable[[int], Scheme]) -> dict[str, float]:
    """Perplexity, KL and top-1 agreement of a scheme for each layer against full precision."""
    model, rope, spans = engine.parts.model, engine.parts.rope, engine.parts.model.config.attention_spans
    exact = text_in_full(model, rope, ids)
    other = text_hidden(model, rope, ids, lambda i: SimulatedLayer(scheme(i), spans[i]))
    return compare(model, exact, other, ids).summary()
