"""A whole text through the model at once: in full precision, or with every position seeing what decode would see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skvq.engine.decode_regime import DecodeRegimeLayer
from skvq.engine.layer_caches import DenseLayer
from skvq.engine.model import Model
from skvq.engine.pieces import Pieces
from skvq.engine.prefill import chunks
from skvq.engine.rope import ModelRope, StepRope, at_positions
from skvq.kernels.dense import kv_buffer

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


def dense_layers(model: Model, count: int) -> Callable[[int], DenseLayer]:
    """Full-precision caches of a text of ``count`` tokens, which attend all of it at once."""
    config = model.config
    shape = (config.num_kv_heads, count, config.head_size, model.dtype, model.device)
    keys, values = kv_buffer(*shape), kv_buffer(*shape)
    return lambda layer: DenseLayer(keys, values, config.attention_spans[layer])
