"""Reading a prompt. Exact: layers outside, chunks inside, one layer's full-precision keys and values at a time.
Streaming: chunks outside, layers inside, against the packed cache. The model's code is the same for both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import Checkpoint, ExactState
from skvq.engine.evaluate import as_ids
from skvq.engine.graph import last_hidden
from skvq.engine.model import Model
from skvq.engine.planner import CHUNK_TOKENS
from skvq.engine.report import Reporter
from skvq.engine.rollback import all_or_nothing
from skvq.engine.rope import at_positions
from skvq.engine.steps import DecodeBatch, ExactLayer, StreamingLayer
from skvq.kernels.interface import RopeFrequencies


def chunks(count: int, first: int = 0) -> list[tuple[int, int]]:
    """Start and stop of each chunk of ``count`` tokens from position ``first``.

    >>> chunks(1500)
    [(0, 1024), (1024, 1500)]
    """
    last = first + count
    return [(start, min(start + CHUNK_TOKENS, last)) for start in range(first, last, CHUNK_TOKENS)]


def chunk_work(model: Model, start: int, stop: int) -> float:
    """Multiply-adds of one layer over tokens ``start .. stop-1``, attention over all before them included."""
    config = model.config
    kv = config.num_kv_heads * config.head_size
    q = config.num_heads * config.head_size
    linear = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    return (stop - start) * (linear + q * (start + stop))


def short_prefill(model: Model, rope: RopeFrequencies, sequence: SequenceCache, ids: Sequence[int]) -> Tensor:
    """Append a few ``ids`` to a sequence as decode steps of several tokens; hidden state [d] of the last.

    The fused attention reads packed pages once for all of them, where streaming stages every page to 16 bits first.
    """
    rest = list(ids)
    while rest:
        count = min(len(rest), sequence.ring_room)
        piece, rest = rest[:count], rest[count:]
        batch = DecodeBatch([sequence], model.config.attention_spans, count)
        with all_or_nothing(sequence):
            batch.begin(piece)
            x = last_hidden(model, rope, batch, batch.max_packed)
            batch.commit(piece)
    return x[0]


def exact_prefill(
    model: Model,
    rope: RopeFrequencies,
    sequence: SequenceCache,
    ids: Sequence[int],
    report: Reporter,
    checkpoint: Checkpoint,
) -> Tensor:
    """Read ``ids`` into an empty sequence; hidden state [d] of the last token after all layers. Broken off, it is empty."""
    embedding = model.weights.embedding
    config, count = model.config, len(ids)
    sequence.reserve(count)
    tokens = as_ids(ids, embedding.device)
    x = model.embed(tokens)  # [T, d], overwritten layer by layer
    shape = (config.num_kv_heads, count, config.head_size)
    keys, values = (torch.empty(shape, dtype=embedding.dtype, device=embedding.device) for _ in range(2))
    pieces = chunks(count)
    mass = torch.zeros(count, device=embedding.device)
    state = ExactState(hidden=x, keys=keys, values=values, mass=mass, chunk_tokens=CHUNK_TOKENS)
    with checkpoint.watch(), all_or_nothing(sequence):
        checkpoint.resume_exact(sequence, ids, state)
        work = [chunk_work(model, *piece) for piece in pieces]
        total = (config.num_layers - state.layer) * sum(work) - sum(work[: state.chunk])
        with report.bar(f"reading {count:,} tokens", total) as bar:
            for layer in range(state.layer, config.num_layers):
                cache = ExactLayer(sequence, layer, keys, values, config.attention_spans[layer])
                cache.resume(state.filled, mass)
                for start, stop in pieces[state.chunk :]:
                    turn = at_positions(rope, torch.arange(start, stop, device=x.device)[None])
                    x[start:stop] = model.layer(layer, x[None, start:stop], turn, cache)[0]
                    bar.advance(chunk_work(model, start, stop))
                    state.chunk += 1
                    checkpoint.exact_point(sequence, state)
                cache.finish(tokens)
                mass.zero_()
                state.layer, state.chunk = layer + 1, 0
        sequence.commit(ids)
    checkpoint.done()
    return x[-1]


def streaming_prefill(
    model: Model,
    rope: RopeFrequencies,
    sequence: SequenceCache,
    ids: Sequence[int],
    report: Reporter,
    checkpoint: Checkpoint,
) -> Tensor:
    """Append ``ids`` to a sequence, whatever it holds; hidden state [d] of the last token after all layers.

    Broken off, the sequence holds the chunks that were finished and can be used.
    """
    config = model.config
    device = model.weights.embedding.device
    begin = sequence.length + sequence.dropped
    pieces = chunks(len(ids), begin)
    checkpoint.resume_streaming(sequence, ids)
    pieces = [piece for piece in pieces if piece[0] >= sequence.length + sequence.dropped]
    total = config.num_layers * sum(chunk_work(model, *piece) for piece in pieces)
    x = model.weights.norm  # replaced: there is at least one token
    with report.bar(f"reading {len(ids):,} tokens", total) as bar, checkpoint.watch():
        for start, stop in pieces:
            piece = ids[start - begin : stop - begin]
            sequence.reserve(len(piece))
            tokens = as_ids(piece, device)
            first = sequence.origin + sequence.length
            turn = at_positions(rope, torch.arange(first, first + len(piece), device=device)[None])
            with all_or_nothing(sequence):
                x = model.embed(tokens)[None]
                for layer in range(config.num_layers):
                    x = model.layer(layer, x, turn, StreamingLayer(sequence, layer, config.attention_spans[layer], tokens))
                    bar.advance(chunk_work(model, start, stop))
                sequence.commit(piece)
            if stop < begin + len(ids):
                checkpoint.streaming_point(sequence)
    checkpoint.done()
    return x[0, -1]
