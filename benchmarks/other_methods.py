"""Other ways to quantize a KV cache, simulated as their papers do it: numbers rounded and put back, nothing packed.

Each query sees the last WINDOW tokens and the first SINKS in full precision, whatever the method, so that only the rounding is
compared. Bits count codes and metadata of far tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skvq.calibrate.reorder import fill_empty
from skvq.calibrate.rotate import spread_matrix
from skvq.calibrate.run import TEXT_TOKENS
from skvq.engine.comparison import compare
from skvq.engine.generate import Engine
from skvq.engine.model import LayerCache, Model
from skvq.engine.rope import ModelRope, StepRope, at_positions
from skvq.engine.whole_text import dense_layers, text_in_full
from skvq.kernels.reference import masked_attention

WINDOW, SINKS = 128, 5
GROUP = 64
CLIP = 0.92
"""SKVQ's constant, of its published evaluation scripts."""

QUAROT_RATIO = 0.95
"""QuaRot's constant for caches, of its paper's setup."""

OSCAR_CLIPS = (0.96, 0.92)
"""OSCAR's quantiles of keys and of values, of its published command line."""


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


class TurboQuant:
    """TurboQuant (arXiv 2504.19874, algorithm 1): a random rotation, the best levels for normal numbers, a 16-bit norm a head.

    Keys after RoPE and values alike. As vLLM keeps keys: what was rounded is brought to its norm, and there is no QJL (there it
    was found to harm). Unlike vLLM's, every layer is quantized.
    """

    def __init__(self, bits: int, head_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._levels = normal_levels(bits)
        self._rotation = torch.linalg.qr(torch.randn(head_size, head_size, generator=generator))[0]

    def round(self, keys: Tensor, values: Tensor, rope: StepRope) -> tuple[Tensor, Tensor]:
        return self.stored(rope.apply(keys[None])[0]), self.stored(values)

    def stored(self, x: Tensor) -> Tensor:
        """What is left of heads [..., D]."""
        norm = x.norm(dim=-1, keepdim=True).half().float()
        normal = x @ self._rotation * (math.sqrt(x.shape[-1]) / norm.clamp_min(1e-20))
        found = self._levels[torch.bucketize(normal, (self._levels[1:] + self._levels[:-1]) / 2)]
        return found / found.norm(dim=-1, keepdim=True) * norm @ self._rotation.T


def normal_levels(bits: int) -> Tensor:
    """The 2**bits levels that quantize a standard normal distribution with the least squared error (Lloyd-Max)."""
    levels, end = torch.linspace(-2, 2, 2**bits, dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(1000):
        edges = torch.cat([-end, (levels[1:] + levels[:-1]) / 2, end])
        density, below = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi), torch.special.ndtr(edges)
        levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return levels.float()


@dataclass(frozen=True, slots=True)
class Rotated:
    """Keys after RoPE and values, each head rotated, cut off at a quantile of its magnitudes and rounded by min and max.

    With a Hadamard matrix and QUAROT_RATIO it is what QuaRot (arXiv 2404.00456) does to a cache; with OSCAR_CLIPS and the
    rotations of ``oscar_schemes`` it is OSCAR (arXiv 2605.17757). ratio: of minimum and maximum, which is used of them.
    """

    key_rotation: Tensor  # [KH, D, D] or [D, D]
    value_rotation: Tensor
    clips: tuple[float, float] = (1.0, 1.0)
    ratio: float = 1.0
    levels: int = 4

    def round(self, keys: Tensor, values: Tensor, rope: StepRope) -> tuple[Tensor, Tensor]:
        turned = rope.apply(keys[None])[0]
        return self._stored(turned, self.key_rotation, self.clips[0]), self._stored(values, self.value_rotation, self.clips[1])

    def _stored(self, x: Tensor, rotation: Tensor, clip: float) -> Tensor:
        rotated = (x[..., None, :] @ rotation)[..., 0, :]
        size = x.shape[-1]
        most = rotated.abs().sort(-1).values[..., min(int(clip * size), size - 1), None]
        groups = rotated.clamp(-most, most).unflatten(-1, (-1, min(GROUP, size)))
        return (rounded(groups, self.levels, self.ratio, late_fp8=False).flatten(-2)[..., None, :] @ rotation.mT)[..., 0, :]


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


class Observed:
    """Dense attention that remembers what the schemes are calibrated on, of one text."""

    def __init__(self, layer: LayerCache) -> None:
        self._layer = layer
        self.ranges: list[tuple[Tensor, Tensor]] = []  # of each channel of keys before RoPE and of values
        self.queries = torch.empty(0)  # after RoPE, the sum of their outer products [KH, D, D]
        self.keys = self.values = torch.empty(0)  # [T, KH, D], keys after RoPE

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        self.ranges = [torch.aminmax(x[0].flatten(1), dim=0) for x in (k, v)]
        self.keys, self.values = rope.apply(k)[0], v[0]
        by_head = rope.apply(q)[0].unflatten(1, (k.shape[2], -1)).transpose(0, 1).flatten(1, 2)  # [KH, T * H / KH, D]
        self.queries = by_head.mT @ by_head
        return self._layer.attend(q, k, v, rope)


def observe(engine: Engine, corpus: Tensor) -> list[list[Observed]]:
    """For each layer what it shows of each text of ``corpus`` int64 [N]."""
    model, rope = engine.parts.model, engine.parts.rope
    found: list[list[Observed]] = [[] for _ in range(model.config.num_layers)]
    for text in corpus.split(TEXT_TOKENS):
        dense = dense_layers(model, len(text))
        for i, texts in enumerate(found):
            texts.append(Observed(dense(i)))
        text_hidden(model, rope, text, lambda i: found[i][-1])
    return found


def published_schemes(observed: list[list[Observed]]) -> list[Scheme]:
    """Each layer's groups, by K-means on the extremes of all channels."""
    from sklearn.cluster import KMeans

    def labels(texts: list[Observed], side: int) -> Tensor:
        low = torch.stack([text.ranges[side][0] for text in texts]).amin(0)
        high = torch.stack([text.ranges[side][1] for text in texts]).amax(0)
        groups = len(low) // GROUP
        clusters = KMeans(groups, n_init=10, random_state=0).fit(torch.stack([low, high], 1).numpy()).labels_
        return fill_empty(torch.from_numpy(clusters).long(), groups)

    return [PublishedSkvq(labels(texts, 0), labels(texts, 1)) for texts in observed]


def oscar_schemes(observed: list[list[Observed]]) -> list[Scheme]:
    """Each layer's rotations, of each head: eigenvectors of what queries weigh, spread by the Hadamard matrix.

    A value counts by its key's mean squared score. The permutation that follows in OSCAR moves channels between groups: it has
    no effect where a group is a head.
    """

    def rotation(second_moment: Tensor) -> Tensor:
        vectors = torch.linalg.eigh(second_moment.double())[1]
        return (vectors @ spread_matrix(vectors.shape[-1])).float()

    schemes: list[Scheme] = []
    for texts in observed:
        queries = torch.stack([text.queries for text in texts]).sum(0)
        keys, values = (torch.cat([getattr(text, side) for text in texts]) for side in ("keys", "values"))
        weights = torch.einsum("thd,hde,the->th", keys, queries, keys)
        schemes.append(
            Rotated(rotation(queries), rotation(torch.einsum("th,thd,the->hde", weights, values, values)), OSCAR_CLIPS)
        )
    return schemes


@torch.no_grad()
def simulate(engine: Engine, ids: Tensor, scheme: Callable[[int], Scheme]) -> dict[str, float]:
    """Perplexity, KL and top-1 agreement of a scheme for each layer against full precision."""
    model, rope, spans = engine.parts.model, engine.parts.rope, engine.parts.model.config.attention_spans
    exact = text_in_full(model, rope, ids)
    other = text_hidden(model, rope, ids, lambda i: SimulatedLayer(scheme(i), spans[i]))
    return compare(model, exact, other, ids).summary()
