"""Exact prefill: by layer, then by chunk; a layer's keys and values stay in full precision while it is read, then are packed.

``AllHeads`` holds a layer's keys and values of all heads. ``HeadGroups`` holds those of a group of kv heads and goes over the
prompt once per group; then, piece by piece, it packs what it computes once more. ``PrefillForm`` says which, and where hidden
states lie. Both give the same bytes. Where the prompt stands is in ``ExactState`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from skvq.engine.absorb import absorb_piece
from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import Checkpoint
from skvq.engine.exact_state import ExactState
from skvq.engine.layer_caches import ExactLayer
from skvq.engine.model import Model
from skvq.engine.model_config import ModelConfig
from skvq.engine.pieces import Pieces
from skvq.engine.prefill import NO_WORK, Work, chunk_work, chunks, reading_label
from skvq.engine.prefill_form import KEPT_ROPE_TOKENS, PIECE_TOKENS, PrefillForm
from skvq.engine.report import Reporter
from skvq.engine.rollback import all_or_nothing
from skvq.engine.rope import ModelRope, StepRope, at_positions
from skvq.kernels.dense import kv_buffer


def exact_prefill(
    model: Model,
    rope: ModelRope,
    sequence: SequenceCache,
    ids: Sequence[int],
    form: PrefillForm,
    report: Reporter,
    checkpoint: Checkpoint,
) -> Pieces[Tensor]:
    """Read ``ids`` into an empty sequence; hidden state [d] of the last token after all layers.

    A piece is a chunk in a layer, or PIECE_TOKENS of it packed. Broken off, the sequence is empty.
    """
    sequence.reserve(len(ids))
    tokens = model.ids(ids)
    state = new_state(model, len(ids), form, sequence.setup.max_context)
    reader = (AllHeads if form.head_groups == 1 else HeadGroups)(model, rope, sequence, tokens, state)
    pieces = chunks(len(ids))
    with all_or_nothing(sequence), checkpoint.watch():
        for start, stop in pieces:
            state.hidden[start:stop] = model.embed(tokens[start:stop])
        checkpoint.resume_exact(sequence, ids, state)
        label = reading_label(len(ids), resumed=bool(state.layer or state.group or state.chunk))
        with report.bar(label, *work_left(model.config, form, state, reader)) as bar:
            while state.layer < model.config.num_layers:
                for start, stop in pieces[state.chunk :]:
                    reader.read(start, stop)
                    bar.advance(*reader.work(start, stop))
                    state.chunk += 1
                    checkpoint.exact_point(sequence, state)
                    yield
                if state.group < form.head_groups - 1:
                    state.group, state.chunk = state.group + 1, 0
                else:
                    yield from reader.finish()
                    bar.advance(*reader.last_work())
                    state.next_layer()
        sequence.commit(ids)
    checkpoint.done()
    return state.hidden[-1].to(tokens.device)


def new_state(model: Model, count: int, form: PrefillForm, most: int) -> ExactState:
    """Room for a prompt of ``count`` tokens, as ``PrefillForm`` counts it; in host memory for one of ``most``, for torch keeps
    what it has pinned and every prompt of an engine can have the same.
    """
    config, groups, device, dtype = model.config, form.head_groups, model.device, model.dtype

    def room(*shape: int) -> Tensor:
        if not form.host_states:
            return torch.empty(shape, dtype=dtype, device=device)
        numbers = prod(shape)
        pin = device.type == "cuda" and numbers > 0
        return torch.empty(numbers // count * most, dtype=dtype, pin_memory=pin)[:numbers].view(shape)

    held = (config.num_kv_heads // groups, count, config.head_size, dtype, device)
    return ExactState(
        hidden=room(count, config.hidden_size),
        attended=room(groups if groups > 1 else 0, count, config.num_heads * config.head_size // groups),
        keys=kv_buffer(*held),
        values=kv_buffer(*held),
        mass=torch.zeros(count, dtype=torch.float32, device=device),
        chunk_tokens=chunks(count)[0][1],
    )


def work_left(config: ModelConfig, form: PrefillForm, state: ExactState, reader: AllHeads) -> Work:
    """What remains to be done from a state on."""
    each = [reader.work(*piece) for piece in chunks(len(state.hidden))]
    group = sum(each, NO_WORK)
    layers = (config.num_layers - state.layer) * (form.head_groups * group + reader.last_work())
    return layers - state.group * group - sum(each[: state.chunk], NO_WORK)


class AllHeads:
    """Does a layer of the state: ``read`` its chunks in order, then ``finish`` it.

    It holds the layer's keys and values of all heads; a chunk's output replaces its input.
    """

    def __init__(self, model: Model, rope: ModelRope, sequence: SequenceCache, tokens: Tensor, state: ExactState) -> None:
        self.model, self.rope, self.sequence, self.tokens, self.state = model, rope, sequence, tokens, state
        self._ropes: dict[tuple[int, int], StepRope] = {}  # of the chunks in the first KEPT_ROPE_TOKENS

    def read(self, start: int, stop: int) -> None:
        """A chunk, of the state's group of heads."""
        x, step_rope = self._chunk(start, stop)
        x = self.model.layer(self.state.layer, x, step_rope, self._cache(start))
        self.state.hidden[start:stop].copy_(x[0], non_blocking=True)

    def finish(self) -> Pieces[None]:
        """Pack the layer; hidden states are its output then."""
        count, layer, mass = len(self.tokens), self.state.layer, self.state.mass
        for first in range(0, count, PIECE_TOKENS):
            last = min(first + PIECE_TOKENS, count)
            keys, values = (t.transpose(0, 1) for t in self._piece(first, last))
            absorb_piece(self.sequence, layer, first, keys, values, mass[first:last], self.tokens)
            yield

    def _piece(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values [KH, T, D] of tokens ``first .. last-1``."""
        return self.state.keys[:, first:last], self.state.values[:, first:last]

    def work(self, start: int, stop: int) -> Work:
        """What ``read`` takes."""
        return chunk_work(self.model.config, start, stop)

    def last_work(self) -> Work:
        """What ``finish`` takes besides packing."""
        return NO_WORK

    def _cache(self, start: int) -> ExactLayer:
        state = self.state
        return ExactLayer(self.sequence.setup, state.layer, state.keys, state.values, state.mass, start)

    def _chunk(self, start: int, stop: int) -> tuple[Tensor, StepRope]:
        """Hidden states [1, N, d] of a chunk on the device, and the RoPE of its positions in this layer."""
        device = self.tokens.device
        x = self.state.hidden[None, start:stop].to(device, non_blocking=True)
        chunk = (start, stop)
        if chunk not in self._ropes:
            step_rope = at_positions(self.rope, torch.arange(start, stop, device=device)[None])
            if stop > KEPT_ROPE_TOKENS:
                return x, step_rope.of(self.state.layer)
            self._ropes[chunk] = step_rope
        return x, self._ropes[chunk].of(self.state.layer)


class HeadGroups(AllHeads):
    """A layer's keys and values of some kv heads at a time. Its input stays until ``finish``, which packs all heads."""

    def __init__(self, model: Model, rope: ModelRope, sequence: SequenceCache, tokens: Tensor, state: ExactState) -> None:
        super().__init__(model, rope, sequence, tokens, state)
        config, self.groups = model.config, len(state.attended)
        shape = (config.num_kv_heads, min(PIECE_TOKENS, len(tokens)), config.head_size)
        self.keys, self.values = (torch.empty(shape, dtype=state.keys.dtype, device=tokens.device) for _ in range(2))

    def read(self, start: int, stop: int) -> None:
        x, step_rope = self._chunk(start, stop)
        group = self.state.group
        q, k, v = (t.chunk(self.groups, dim=2)[group] for t in self.model.heads(self.state.layer, x, step_rope))
        attended = self._cache(start).attend(q, k, v, step_rope)[0].flatten(1)
        self.state.attended[group, start:stop].copy_(attended, non_blocking=True)

    def _piece(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """They are computed once more, and hidden states become the layer's output."""
        for start, stop in chunks(last - first, first):
            self._finish_chunk(start, stop, start - first)
        return self.keys[:, : last - first], self.values[:, : last - first]

    def _finish_chunk(self, start: int, stop: int, place: int) -> None:
        """Keys and values of a chunk again, to their place in the piece; then the chunk's output replaces its input."""
        layer, config = self.state.layer, self.model.config
        x, step_rope = self._chunk(start, stop)
        q, k, v = self.model.heads(layer, x, step_rope)
        ops = self.sequence.setup.backend.ops
        ops.rope_to_buffer(q[:, :, :0], k, v, step_rope.cos, step_rope.sin, self.keys, self.values, place)
        parts = [part[None, start:stop].to(x.device, non_blocking=True) for part in self.state.attended]
        attended = torch.cat(parts, 2).view(1, stop - start, config.num_heads, config.head_size)
        self.state.hidden[start:stop].copy_(self.model.after_attention(layer, x, attended)[0], non_blocking=True)

    def work(self, start: int, stop: int) -> Work:
        return self._projections(stop - start) + chunk_work(self.model.config, start, stop) * (0, 1 / self.groups)

    def last_work(self) -> Work:
        return chunk_work(self.model.config, 0, len(self.tokens)) * (1, 0)

    def _projections(self, count: int) -> Work:
        config = self.model.config
        width = (config.num_heads + 2 * config.num_kv_heads) * config.own_head_size
        return np.array([count * config.hidden_size * width, 0.0])
