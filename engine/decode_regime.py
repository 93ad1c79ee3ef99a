"""One layer of a whole text as decode would see it, at every position, computed at once."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from skvq.engine.absorb import absorb
from skvq.engine.cache import SequenceCache
from skvq.engine.dual_chunks import Distances, TrueDistances
from skvq.engine.mass import add_mass
from skvq.engine.model_config import ModelConfig
from skvq.engine.rope import StepRope
from skvq.kernels.dense import attend_causal
from skvq.kernels.reference import masked_attention, merge

QUERIES = 256
"""Of which a strict window holds the scores at once."""


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
        """Scores of QUERIES queries, their weights and a mask of them, and keys and values in the compute dtype."""
        return 3 * 4 * QUERIES * config.num_heads * count + 2 * config.num_kv_heads * config.head_size * size * count

    def _stretches(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(a, min(a + QUERIES, last)) for a in range(first, last, QUERIES)]

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
