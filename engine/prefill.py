"""Streaming prefill: by chunk, then by layer, attending to the packed cache; a few tokens are read as decode steps.
Exact prefill has the same chunks inside its layers (``exact``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import Checkpoint
from skvq.engine.decode import hidden_states
from skvq.engine.errors import counted
from skvq.engine.layer_caches import DecodeBatch, StreamingLayer
from skvq.engine.model import Model
from skvq.engine.model_config import ModelConfig
from skvq.engine.pieces import Pieces
from skvq.engine.prefill_form import CHUNK_TOKENS
from skvq.engine.report import Reporter
from skvq.engine.rollback import RING_MARKS, all_or_nothing
from skvq.engine.rope import ModelRope, at_positions
from skvq.engine.streams import sent

Work = npt.NDArray[np.float64]
"""Multiply-adds in matrices and in attention: a machine is not equally fast at both."""

NO_WORK: Work = np.zeros(2)


def chunks(count: int, first: int = 0) -> list[tuple[int, int]]:
    """Start and stop of each chunk of ``count`` tokens from position ``first``.

    >>> chunks(1500)
    [(0, 1024), (1024, 1500)]
    """
    last = first + count
    return [(start, min(start + CHUNK_TOKENS, last)) for start in range(first, last, CHUNK_TOKENS)]


def chunk_work(config: ModelConfig, start: int, stop: int) -> Work:
    """Multiply-adds of one layer over tokens ``start .. stop-1``: in its matrices, and in attention over all before them."""
    projected = (2 * config.num_heads + 2 * config.num_kv_heads) * config.own_head_size
    linear = config.hidden_size * (projected + 3 * config.active_mlps * config.intermediate_size)
    attention = config.num_heads * config.head_size * (start + stop)
    return np.array([(stop - start) * linear, (stop - start) * attention], dtype=float)


def short_prefill(model: Model, rope: ModelRope, sequence: SequenceCache, ids: Sequence[int]) -> Tensor:
    """Append a few ``ids`` to a sequence as decode steps of several tokens; hidden state [d] of the last.

    The fused attention reads packed pages once for all of them, where streaming stages every page to 16 bits first.
    """
    rest = list(ids)
    while rest:
        count = min(len(rest), sequence.ring_room)
        piece, rest = rest[:count], rest[count:]
        batch = DecodeBatch(sequence.setup, 1, count)
        sequence.reserve(count)  # may drop pages, which cannot be taken back
        with all_or_nothing(sequence, RING_MARKS), batch.step([sequence], piece):
            x = hidden_states(model, rope, batch, batch.max_packed)
    return x[-1]


def reading_label(count: int, *, resumed: bool) -> str:
    """What a progress bar says: it shows what is still to do."""
    return f"reading {'the rest of ' if resumed else ''}{counted(count, 'token')}"


def streaming_prefill(
    model: Model,
    rope: ModelRope,
    sequence: SequenceCache,
    ids: Sequence[int],
    report: Reporter,
    checkpoint: Checkpoint,
) -> Pieces[Tensor]:
    """Append ``ids`` to a sequence, whatever it holds; hidden state [d] of the last token after all layers.

    A piece is a chunk in a layer. Broken off, the sequence holds the chunks that were finished and can be used.
    """
    config = model.config
    device = model.device
    begin = sequence.total_tokens
    last = begin + len(ids)
    checkpoint.resume_streaming(sequence, ids)
    pieces = chunks(last - sequence.total_tokens, sequence.total_tokens)
    total = config.num_layers * sum((chunk_work(config, *piece) for piece in pieces), NO_WORK)
    with report.bar(reading_label(len(ids), resumed=sequence.total_tokens > begin), *total) as bar, checkpoint.watch():
        for start, stop in pieces:
            piece = ids[start - begin : stop - begin]
            sequence.reserve(len(piece))
            tokens = sent(piece, device)
            first = sequence.origin + sequence.length
            step_rope = at_positions(rope, torch.arange(first, first + len(piece), device=device)[None])
            with all_or_nothing(sequence):
                x = model.embed(tokens)[None]
                for layer in range(config.num_layers):
                    x = model.layer(layer, x, step_rope, StreamingLayer(sequence, layer, tokens))
                    bar.advance(*chunk_work(config, start, stop))
                    yield
                sequence.commit(piece)
            if stop < last:
                checkpoint.streaming_point(sequence)
    checkpoint.done()
    return x[0, -1]
