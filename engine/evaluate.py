"""What decode would see at every position of a text, computed at once, and how far it is from the 16-bit cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skvq.engine.absorb import absorb
from skvq.engine.cache import SequenceCache
from skvq.engine.chunks import Distances, TrueDistances
from skvq.engine.config import CacheConfig
from skvq.engine.errors import ModelError
from skvq.engine.mass import add_mass
from skvq.engine.model import LayerCache, Model
from skvq.engine.model_config import ModelConfig
from skvq.engine.pieces import Pieces
from skvq.engine.prefill import chunks
from skvq.engine.rope import ModelRope, StepRope, at_positions
from skvq.engine.sizes import bits_per_element
from skvq.engine.steps import DenseLayer
from skvq.kernels.dense import attend_causal, kv_buffer
from skvq.kernels.reference import masked_attention, merge

ROWS, LOGITS_BYTES = 256, 16 << 20
"""Positions whose logits are held at once, at most, and bytes of these."""
DEPTHS = 8


class DecodeRegimeLayer:
    """One layer of a whole text of one sequence, each query seeing exactly what decode would: retained, packed and window.

    ``take`` all of the text, chunk by chunk: its tokens are really packed and read back. Then ``attend``, chunk by chunk in any
    order: a query at position i sees ``packed(i)`` of them from the pages, the rest in the cache's 16 bits. Queries that share
    ``packed(i)`` are one dense call.
    """

    def __init__(self, sequence: SequenceCache, layer: int, ids: Tensor) -> None:
        setup, device = sequence.setup, ids.device
        shape = len(ids), setup.arena.shape.kv_heads, setup.arena.shape.head_size
        self.sequence, self.layer, self.ids, self.span = sequence, layer, ids, setup.spans[layer]
        self.keys, self.values = (torch.empty(shape, dtype=setup.arena.shape.dtype, device=device) for _ in range(2))
        self.mass = torch.zeros(len(ids), dtype=torch.float32, device=device)

    @classmethod
    def more_bytes(cls, config: ModelConfig, count: int, size: int) -> int:
        """What a text of ``count`` tokens takes beside its hidden states, keys and values; numbers have ``size`` bytes."""
        return 0

    def take(self, start: int, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> None:
        """Queries [1, N, H, D], keys and values [1, N, KH, D] of the tokens from ``start`` on, before RoPE."""
        stop = start + k.shape[1]
        self.keys[start:stop], self.values[start:stop] = rope.apply(k)[0], v[0]
        regions = self.sequence.setup.regions
        if self.sequence.setup.needs_mass:
            q = rope.apply(q)[0]
            keys, values = (t[:stop].transpose(0, 1) for t in (self.keys, self.values))
            _, lse = attend_causal(q, keys, values, self.span)
            add_mass(self.mass[:stop], q, lse, keys, regions.window, self.span)
        if stop < len(self.ids):
            return
        absorb(self.sequence, self.layer, self.keys, self.values, self.mass, self.ids)
        packed = regions.packed(stop)
        nothing = k[0, :0]
        self.stored_keys, self.stored_values = (
            self.sequence.stage(self.layer, 0, packed, k.dtype) if packed else (nothing, nothing)
        )

    def attend(self, start: int, q: Tensor, rope: StepRope) -> Tensor:
        """What the queries [1, N, H, D] of the tokens from ``start`` on read, [1, N, H, D]."""
        q = rope.apply(q)[0]
        stretches = self._stretches(start, start + len(q))
        outs = [self._attend_stretch(q[a - start : b - start], a, b, rope.distances) for a, b in stretches]
        return torch.cat(outs)[None]

    def _stretches(self, first: int, last: int) -> list[tuple[int, int]]:
        """Runs of positions whose queries see the same packed tokens."""
        regions = self.sequence.setup.regions
        cuts = (at for at in range(regions.window + regions.tile, last, regions.tile) if at > first)
        return list(pairwise([first, *cuts, last]))

    def _attend_stretch(self, q: Tensor, a: int, b: int, distances: Distances) -> Tensor:
        """What queries at positions ``a .. b-1`` read, [N, H, D]."""
        packed = self.sequence.setup.regions.packed(a)
        if b > self.span:
            first = max(0, a + 1 - self.span)
            keys = torch.cat([self.stored_keys[first:packed], self.keys[max(first, packed) : b].to(q.dtype)])
            values = torch.cat([self.stored_values[first:packed], self.values[max(first, packed) : b].to(q.dtype)])
            return attend_causal(q, keys.transpose(0, 1), values.transpose(0, 1), self.span)[0]
        keys, values = (t[packed:b].transpose(0, 1).to(q.dtype) for t in (self.keys, self.values))
        out, lse = distances.attend(q, a, keys, values, packed, self.span)
        if not packed:
            return out
        keys, values = (t[:packed].transpose(0, 1) for t in (self.stored_keys, self.stored_values))
        before = distances.attend(q, a, keys, values, 0, self.span)
        return merge([out.float(), before[0].float()], [lse, before[1]])[0].to(q.dtype)


class StrictWindowLayer(DecodeRegimeLayer):
    """The same with a window of exactly W tokens, the query's own included: what papers simulate, never what decode does."""

    @classmethod
    def more_bytes(cls, config: ModelConfig, count: int, size: int) -> int:
        """Scores of ROWS queries, their weights and a mask of them, and keys and values in the compute dtype."""
        return 3 * 4 * ROWS * config.num_heads * count + 2 * config.num_kv_heads * config.head_size * size * count

    def _stretches(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(a, min(a + ROWS, last)) for a in range(first, last, ROWS)]

    def _attend_stretch(self, q: Tensor, a: int, b: int, distances: Distances) -> Tensor:
        assert isinstance(distances, TrueDistances), distances  # ``scoring.evaluate`` has refused others
        t = torch.arange(a, b, device=q.device)[:, None]
        at = torch.arange(b, device=q.device)[None]
        near = (t - at < self.sequence.setup.regions.window) | (at >= len(self.stored_keys))
        visible = (at <= t) & (t - at < self.span)
        stored = min(b, len(self.stored_keys))
        parts = [masked_attention(q, self.keys[:b].to(q.dtype), self.values[:b].to(q.dtype), visible & near)]
        if stored:
            far = (visible & ~near)[:, :stored]
            parts.append(masked_attention(q, self.stored_keys[:stored], self.stored_values[:stored], far))
        return merge([p[0] for p in parts], [p[1] for p in parts])[0].to(q.dtype)


Steps = list[tuple[int, int, StepRope]]
"""Start, stop and RoPE of the chunks of a text."""


def _steps(model_rope: ModelRope, ids: Tensor) -> Steps:
    pieces = chunks(len(ids))
    return [(a, b, at_positions(model_rope, torch.arange(a, b, device=ids.device)[None])) for a, b in pieces]


def text_in_full(model: Model, model_rope: ModelRope, ids: Tensor) -> Tensor:
    """Last hidden states [N, d] of a text in full precision. Memory holds them and one layer's keys and values of all of it."""
    steps, x, config = _steps(model_rope, ids), model.embed(ids), model.config
    shape = (config.num_kv_heads, len(ids), config.head_size, model.dtype, model.device)
    keys, values = kv_buffer(*shape), kv_buffer(*shape)
    for layer in range(config.num_layers):
        for start, stop, rope in steps:
            cache = DenseLayer(keys, values, config.attention_spans[layer], start)
            x[start:stop] = model.layer(layer, x[None, start:stop], rope, cache)[0]
    return x


def text_as_decoded(
    model: Model,
    model_rope: ModelRope,
    ids: Tensor,
    layers: Callable[[int], DecodeRegimeLayer],
    advance: Callable[[float], None],
) -> Pieces[Tensor]:
    """Last hidden states [N, d] of a text whose every position sees what ``layers(layer)`` says; ``advance(1)`` after each.
    A piece is a chunk of tokens on its way in or out of a layer.

    Memory holds them and one layer's keys and values of all of it, as they are and as they are read back. Queries of all would
    take as much again: they are computed once more when the layer has been packed, but for the last chunk's.
    """
    steps, x = _steps(model_rope, ids), model.embed(ids)
    for layer in range(model.config.num_layers):
        cache = layers(layer)
        for start, stop, rope in steps:
            q, k, v = model.heads(layer, x[None, start:stop], rope.of(layer))
            cache.take(start, q, k, v, rope.of(layer))
            yield
        for start, stop, rope in reversed(steps):
            part = x[None, start:stop]
            if stop < len(ids):
                q = model.heads(layer, part, rope.of(layer))[0]
            x[start:stop] = model.after_attention(layer, part, cache.attend(start, q, rope.of(layer)))[0]
            yield
        advance(1)
    return x


def dense_layers(model: Model, count: int) -> Callable[[int], LayerCache]:
    """Full-precision caches of a text of ``count`` tokens, which attend all of it at once."""
    config = model.config
    shape = (config.num_kv_heads, count, config.head_size, model.dtype, model.device)
    keys, values = kv_buffer(*shape), kv_buffer(*shape)
    return lambda layer: DenseLayer(keys, values, config.attention_spans[layer])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A cache against the 16-bit one on the same text. KL in nats per token; all per position, length N - 1 or N."""

    nll_fp: Tensor
    nll: Tensor
    kl: Tensor
    same_top: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """Those of several stretches as one."""
        return cls(
            nll_fp=torch.cat([part.nll_fp for part in parts]),
            nll=torch.cat([part.nll for part in parts]),
            kl=torch.cat([part.kl for part in parts]),
            same_top=torch.cat([part.same_top for part in parts]),
        )

    def summary(self) -> dict[str, float]:
        """Perplexities, mean KL and top-1 agreement."""
        return {
            "ppl_fp": perplexity(self.nll_fp),
            "ppl": perplexity(self.nll),
            "kl": float(self.kl.mean()),
            "top1": float(self.same_top.float().mean()),
        }


def perplexity(nll: Tensor) -> float:
    """exp of the mean loss. Raises ModelError where no number is so large: nothing was modelled then."""
    mean = float(nll.mean())
    if not mean < 700:
        raise ModelError(f"the mean loss is {mean:,.0f} nats per token: the weights are damaged, or made up")
    return math.exp(mean)


def compare(model: Model, reference: Tensor, other: Tensor, ids: Tensor) -> Comparison:
    """Compare last hidden states [N, d] of two caches over the same ids [N], some rows of logits at a time."""
    parts: list[tuple[Tensor, ...]] = []
    for (p, chosen), (q, chosen_q) in zip(*(_scored(model, x, ids) for x in (reference, other)), strict=True):
        parts.append((-chosen, -chosen_q, (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)))
    nll_fp, nll, kl, same = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Comparison(nll_fp=nll_fp, nll=nll, kl=kl, same_top=same)


def evaluation_row(cache: CacheConfig, model: ModelConfig, found: Sequence[Comparison]) -> dict[str, Any]:
    """One cache's figures over several stretches of text; key_bits and value_bits are means over layers and heads."""
    whole = Comparison.joined(found)
    pairs = [(16.0, 16.0)] if not cache.is_packed else [pair for heads in cache.bits_of_heads(model) for pair in heads]
    key_bits, value_bits = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return {
        "name": cache.name,
        "method": cache.method,
        "key_bits": key_bits,
        "value_bits": value_bits,
        "bits_budget": cache.bits_budget if cache.is_packed else None,
        "layer_bits": cache.layer_bits,
        "group_size": cache.group_size,
        "window": cache.window,
        "bits_per_element": bits_per_element(cache, model),
        **whole.summary(),
        "tokens": len(whole.kl),
        "by_position": error_by_position(found),
    }


def error_by_position(found: Sequence[Comparison]) -> list[dict[str, float]]:
    """Mean KL and top-1 agreement by depth, in DEPTHS equal parts, of the stretches that have the first one's length."""
    whole = [c for c in found if len(c.kl) == len(found[0].kl)]
    kl = torch.stack([c.kl for c in whole]).mean(0)
    same = torch.stack([c.same_top.float() for c in whole]).mean(0)
    edges = [round(i * len(kl) / DEPTHS) for i in range(DEPTHS + 1)]
    return [
        {"first": a, "last": b - 1, "kl": float(kl[a:b].mean()), "top1": float(same[a:b].mean())}
        for a, b in pairwise(edges)
        if b > a
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """Log probabilities float32 after each token of a text: of the one that follows it [N - 1], and of the K likeliest [N, K],
    whose ids are int64 [N, K]."""

    following: Tensor
    likeliest: Tensor
    ids: Tensor


def likelihoods_of(model: Model, hidden: Tensor, ids: Tensor, count: int) -> Pieces[Likelihoods]:
    """Those of a text from its last hidden states [N, d]; ``count`` likeliest. A piece is some rows of logits."""
    found = []
    for rows, following in _scored(model, hidden, ids):
        found.append((following, *rows.topk(count)))
        yield
    following, values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Likelihoods(following=following, likeliest=values, ids=indices)


def nll_of(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood float32 [N - 1] of each next token."""
    parts = [-following for _, following in _scored(model, hidden[:-1], ids)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _scored(model: Model, hidden: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of some rows of a text's hidden states after others: log probabilities [R, V] of what follows, and of what did."""
    count = max(1, min(ROWS, LOGITS_BYTES // (4 * model.config.vocab_size)))
    for start in range(0, len(hidden), count):
        rows = model.head(hidden[start : start + count]).log_softmax(-1)
        target = ids[start + 1 : start + len(rows) + 1, None]
        yield rows, rows[: len(target)].gather(1, target)[:, 0]
