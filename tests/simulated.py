"""What decode and prefill should see, by definition: no pages, no ring; one masked softmax over fake-quantized tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import nll_of
from torch import Tensor

from skvq.engine.dual_chunk_method import ChunkedMethod
from skvq.engine.dual_chunks import Chunks
from skvq.engine.generate import Engine
from skvq.engine.rope import StepRope, at_positions
from skvq.kernels.interface import HeadCodec, LabelCodec
from skvq.kernels.layout import LEVELS, PageLayout
from skvq.kernels.reference import (
    dequantize,
    e4m3_decode,
    encode_heads,
    masked_attention,
    merge,
    quantize_heads,
    quantize_labels,
    rotary,
)


class SimulatedLayer:
    """A whole text in one call. Position i is computed when ``cached[i]`` tokens were cached, alone or in a chunk.

    It sees tokens that are packed by then as quantization leaves them, but for the first ``sinks``; other cached tokens in 16
    bits; and those of its own chunk as they are, unless it is a decode step (``alone``), which reads its own token back.
    """

    def __init__(self, engine: Engine, layer: int, sinks: int, cached: Tensor, alone: Tensor) -> None:
        self.engine, self.layer, self.sinks, self.cached, self.alone = engine, layer, sinks, cached[:, None], alone[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        setup, span = self.engine.parts.setup, self.engine.parts.setup.spans[self.layer]
        unturned, q, k, v = q[0], rope.apply(q)[0], rope.apply(k)[0], v[0]
        half_k, half_v = (t.to(setup.arena.shape.dtype) for t in (k, v))
        far_k, far_v = self._rounded(half_k, half_v)
        i, j = torch.arange(len(k))[:, None], torch.arange(len(k))[None]
        window, tile = setup.regions.window, setup.regions.tile
        packed = (self.cached - window).clamp_min(0) // tile * tile
        visible = (j <= i) & (i - j < span)
        far = (j < packed) & (j >= self.sinks)
        own = (j >= self.cached) & ~self.alone
        keys = torch.cat([k, half_k.float(), far_k])
        values = torch.cat([v, half_v.float(), far_v])
        seen = torch.cat([visible & own, visible & ~own & ~far, visible & far], 1)
        if not isinstance(rope.distances, Chunks):
            return masked_attention(q, keys, values, seen)[0][None]
        chunk, parts = (torch.arange(len(k)) // rope.distances.length)[:, None], []
        apart = (chunk - chunk.T).repeat(1, 3)
        for query, pairs in zip((q, *_further(rope.distances, unturned)), (apart == 0, apart == 1, apart > 1), strict=True):
            parts.append(masked_attention(query, keys, values, seen & pairs))
        return merge([out for out, _ in parts], [lse for _, lse in parts])[0][None]

    def _rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, KH, D] after quantization, float32."""
        method, length = self.engine.parts.setup.method, len(k)
        if self.engine.parts.cache.method == "fp":
            return k.float(), v.float()
        if isinstance(method, ChunkedMethod):
            method, length = method._methods[0], method._chunks.length
        (run,) = method._runs[self.layer]
        codec, layout = run.codec, run.pages.layout
        rounded = _by_label if isinstance(codec, LabelCodec) else _by_head
        found = [rounded(codec, layout, *part) for part in zip(k.split(length), v.split(length), strict=True)]
        keys, values = zip(*found, strict=True)
        return torch.cat(keys), torch.cat(values)


def _further(chunks: Chunks, q: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [T, H, D] not turned yet, turned as they meet the chunk before theirs, and those before that."""
    place = torch.arange(len(q)) % chunks.length
    behind = (place + chunks.length).clamp_max(chunks.reach)
    return rotary(q, behind, chunks.frequencies), rotary(q, torch.full_like(place, chunks.reach), chunks.frequencies)


def _by_head(codec: HeadCodec, layout: PageLayout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for y, bits, side in zip(
        encode_heads(codec, 0, k, v), (layout.key_bits, layout.value_bits), (codec.keys, codec.values), strict=True
    ):
        codes, scale, mid = quantize_heads(y, bits, side)
        groups = codes.view(*y.shape[:2], layout.groups, layout.group_size)
        found.append(
            dequantize(groups, e4m3_decode(scale) * side.unit, e4m3_decode(mid) * side.unit, LEVELS[bits]).view(y.shape)
        )
    mean = rotary(codec.key_mean.expand(len(k), -1, -1), torch.arange(len(k)), codec.rope)
    keys = torch.einsum("hij,thi->thj", codec.query_basis, found[0]) + mean
    return keys, torch.einsum("hij,thj->thi", codec.output_basis, found[1]) + codec.value_mean


def _by_label(codec: LabelCodec, layout: PageLayout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(len(k))
    found = []
    for y, bits, side, labels in (
        (rotary(k, at, codec.rope, inverse=True), layout.key_bits, codec.keys, codec.key_labels),
        (v.float(), layout.value_bits, codec.values, codec.value_labels),
    ):
        codes, scale, mid = quantize_labels(y.reshape(len(y), -1), bits, side, labels)
        scale, mid = (e4m3_decode(t) * side.unit for t in (scale, mid))
        found.append(dequantize(codes[..., None], scale[:, labels], mid[:, labels], LEVELS[bits]).view(y.shape))
    return rotary(found[0], at, codec.rope), found[1]


def schedule(count: int, chunks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``cached`` and ``alone`` of SimulatedLayer for a text whose first chunks, of these lengths, are prefilled."""
    cached = torch.arange(count)
    start = 0
    for length in chunks:
        cached[start : start + length] = start
        start += length
    return cached, torch.arange(count) >= start


@torch.no_grad()
def simulated_nll(engine: Engine, ids: Sequence[int], sinks: int) -> Tensor:
    """What ``Engine.nll`` should be, by definition."""
    parts = engine.parts
    at = torch.tensor(ids)
    times = schedule(len(ids), [])
    rope, x = at_positions(parts.rope, torch.arange(len(ids))[None]), parts.model.embed(at[None])
    for layer in range(parts.model.config.num_layers):
        x = parts.model.layer(layer, x, rope, SimulatedLayer(engine, layer, sinks, *times))
    return nll_of(parts.model.head(x[0])[:-1], ids)
