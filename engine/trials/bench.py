"""``skvq bench decode`` and ``prefill``: how fast, beside what this machine could do at most, measured in the same run.

Decode: a cache of random tokens, packed by the real kernel; the whole step and its attention apart. No figure is given unless
attention over a sample agrees with the specification first. Prefill: random tokens read as any prompt is.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.decode import graphs_of
from skvq.engine.generate import Engine
from skvq.engine.guard import own_settings
from skvq.engine.machine import available_memory
from skvq.engine.measure import copy_bandwidth, device_name, peak_bytes, reset_peak, timed
from skvq.engine.model_config import ModelConfig
from skvq.engine.prefill import chunks
from skvq.engine.prefill_form import CHUNK_TOKENS
from skvq.engine.report import Reporter
from skvq.engine.stress import fill_fast, last_token_step
from skvq.engine.trials.bench_gate import GATE_TOKENS, gate, random_query
from skvq.engine.trials.bench_rows import BenchRow, DecodeRow, PrefillRow
from skvq.kernels.dense import attend_causal, kv_buffer

STEPS = 24
"""Decode steps timed at each context."""

WARM_UP = 4
"""Calls before the first that counts."""

WARM_TOKENS = 8 * CHUNK_TOKENS
"""Of the prompt that is read before those that count: all but the longest runs of keys that attention is asked about."""

SPARE = WARM_UP + STEPS
"""Tokens written beyond a context while it is measured."""


def sdpa_dtype(setup: CacheSetup) -> torch.dtype:
    """What torch's attention is fastest in: 16 bits on a GPU; on a CPU float32, which 16 bits take several times as long as."""
    return setup.arena.shape.dtype if setup.device.type == "cuda" else torch.float32


def sdpa_seconds(config: ModelConfig, tokens: int, setup: CacheSetup) -> float:
    """Seconds of one step's attention through torch's SDPA over keys and values in ``sdpa_dtype``; nan where they do not fit.

    One layer's are read again and again: where they fit a processor's cache that is in SDPA's favour. A layer with a span is
    asked about the tokens in it.
    """
    device, dtype = setup.device, sdpa_dtype(setup)
    shape = (1, config.num_kv_heads, min(tokens, max(config.attention_spans)), config.head_size)
    if 2 * math.prod(shape) * dtype.itemsize > available_memory(device) / 2:
        return math.nan
    keys, values = (torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(2))
    q = random_query(setup, config.num_heads).transpose(1, 2).to(dtype)  # [1, H, 1, D]
    shared = config.num_heads != config.num_kv_heads

    def attention() -> Tensor:
        spans = config.attention_spans
        outs = [F.scaled_dot_product_attention(q, keys[:, :, :n], values[:, :, :n], enable_gqa=shared) for n in spans]
        return outs[-1]

    work = as_replayed(attention, setup) if device.type == "cuda" else attention
    return statistics.median(timed(work, device, WARM_UP + 5)[WARM_UP:])


@contextmanager
def filled(setup: CacheSetup, context: int, report: Reporter) -> Iterator[SequenceCache]:
    """A sequence of ``context`` random tokens."""
    with SequenceCache(setup) as sequence:
        fill_fast(sequence, context, seed=0, vocab=256, report=report)
        yield sequence


def _attention_row(sequence: SequenceCache, config: ModelConfig, copy: float) -> DecodeRow:
    """Attention alone, over a filled sequence."""
    setup, spans = sequence.setup, config.attention_spans
    device = setup.device
    q = random_query(setup, config.num_heads)
    bound = launched_for(setup, sequence.packed)
    steps = [replace(last_token_step(sequence), span=span, max_packed=bound) for span in spans]
    read = sequence.nbytes * sum(min(span, sequence.length) for span in spans) / (sequence.length * len(spans))

    def attention() -> Tensor:
        attends = setup.method.begun(steps[0])
        outs = [attends.attend(layer, q, step)[0] for layer, step in enumerate(steps)]
        return outs[-1]

    seconds = statistics.median(timed(as_replayed(attention, setup), device, WARM_UP + STEPS)[WARM_UP:])
    return DecodeRow(
        ctx=sequence.length,
        ms_per_token=math.nan,
        attention_ms=1e3 * seconds,
        sdpa_ms=math.nan,
        sdpa_dtype=str(sdpa_dtype(setup)).removeprefix("torch."),
        tokens_per_s=math.nan,
        gbps=read / seconds / 1e9,
        share_of_copy=read / seconds / copy,
        peak_bytes=0,
    )


def _compared(row: DecodeRow, setup: CacheSetup, config: ModelConfig) -> DecodeRow:
    """With the peak since ``reset_peak``, and then torch's attention, whose memory is no part of it."""
    peak = peak_bytes(setup.device)
    return replace(row, peak_bytes=peak, sdpa_ms=1e3 * sdpa_seconds(config, row.ctx, setup))


def step_seconds(engine: Engine, sequence: SequenceCache) -> float:
    """Median seconds of the next decode steps of a sequence."""
    token = [0]

    def step() -> None:
        token[0] = int(engine.decode_step([sequence], token)[0].argmax())

    return statistics.median(timed(step, sequence.page_row.device, WARM_UP + STEPS)[WARM_UP:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A measurement under way: the ceiling is known, rows come one by one."""

    device: str
    copy: float  # bytes read and written a second by a copy
    rows: Iterator[BenchRow]

    def ceiling(self) -> str:
        """For people, before the first row."""
        return f"ceiling: a copy reads and writes {self.copy / 1e9:.1f} GB/s on {self.device}"

    def as_dict(self, rows: Sequence[BenchRow]) -> dict[str, Any]:
        """For programs, when the rows have come."""
        told = {"device": self.device, "torch": torch.__version__, "copy_gbps": self.copy / 1e9}
        return {**told, "results": [row.as_dict() for row in rows]}


def _bench(device: torch.device, rows: Callable[[float], Iterator[BenchRow]]) -> Bench:
    """Measure the ceiling, then ``rows`` of it one by one, all on ``device``."""
    with own_settings(device):
        copy = copy_bandwidth(device)

    def measured() -> Iterator[BenchRow]:
        found = rows(copy)
        while True:
            with own_settings(device):  # the caller's apply to what is done between rows
                row = next(found, None)
            if row is None:
                return
            yield row

    return Bench(device=device_name(device), copy=copy, rows=measured())


def bench_attention(setup: CacheSetup, config: ModelConfig, contexts: Sequence[int], report: Reporter) -> Bench:
    """Attention alone at each context, without a model."""
    return _bench(setup.device, lambda copy: _attention_rows(setup, config, contexts, copy, report))


def bench_decode(engine: Engine, contexts: Sequence[int]) -> Bench:
    """Attention and the whole step at each context; the engine has room for the longest and ``SPARE`` more tokens."""
    return _bench(engine.device, lambda copy: _decode_rows(engine, contexts, copy))


def bench_prefill(engine: Engine, contexts: Sequence[int]) -> Bench:
    """Prompts of each length, after one that is not counted: kernels get compiled, torch plans its matrices."""
    engine.prefill([0] * min(max(contexts), WARM_TOKENS)).free()
    return _bench(engine.device, lambda copy: (_prefill_row(engine, context, copy) for context in contexts))


def _attention_rows(
    setup: CacheSetup, config: ModelConfig, contexts: Sequence[int], copy: float, report: Reporter
) -> Iterator[DecodeRow]:
    gate(setup, config.num_heads, min(GATE_TOKENS, max(contexts)), report)
    for context in contexts:
        reset_peak(setup.device)
        with filled(setup, context, report) as sequence:
            yield _compared(_attention_row(sequence, config, copy), setup, config)


def _decode_rows(engine: Engine, contexts: Sequence[int], copy: float) -> Iterator[DecodeRow]:
    setup, config = engine.parts.setup, engine.parts.model.config
    gate(setup, config.num_heads, min(GATE_TOKENS, max(contexts)), engine.report)
    for context in contexts:
        reset_peak(setup.device)
        with filled(setup, context, engine.report) as sequence:
            row = _attention_row(sequence, config, copy)
            seconds = step_seconds(engine, sequence)
            if row.attention_ms > 1e3 * seconds:  # it is a part of the step: something disturbed it
                row = min(row, _attention_row(sequence, config, copy), key=lambda one: one.attention_ms)
            # the steps have written SPARE tokens more
            yield _compared(replace(row, ctx=context, ms_per_token=1e3 * seconds, tokens_per_s=1 / seconds), setup, config)


def dense_seconds(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of causal attention over a prompt in chunks, as exact prefill does it, over all layers; nan where a layer's keys
    and values do not fit. One layer of each span is measured."""
    shape = (config.num_kv_heads, tokens, config.head_size)
    if 2 * math.prod(shape) * dtype.itemsize > available_memory(device) / 2:
        return math.nan
    keys, values = (kv_buffer(*shape, dtype, device).normal_() for _ in range(2))
    q = torch.empty(CHUNK_TOKENS, config.num_heads, config.head_size, dtype=dtype, device=device).normal_()

    def attend(span: int) -> None:
        for start, stop in chunks(tokens):
            attend_causal(q[: stop - start], keys[:, :stop], values[:, :stop], span)

    layers = Counter(config.attention_spans)
    return sum(count * min(timed(partial(attend, span), device, 1)) for span, count in layers.items())


def _prefill_row(engine: Engine, context: int, copy: float) -> PrefillRow:
    """Read ``context`` random tokens into an empty sequence, and one layer's dense attention at that length apart."""
    config, setup = engine.parts.model.config, engine.parts.setup
    device = setup.device
    ids = torch.randint(config.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    reset_peak(device)
    with engine.new_sequence() as sequence:
        (seconds,) = timed(lambda: engine.read(sequence, ids), device, 1)
        written, peak = sequence.nbytes, peak_bytes(device)
    is_dense = engine.parts.options.prefill == "exact"
    attended = dense_seconds(config, context, engine.parts.model.dtype, device) if is_dense else math.nan
    return PrefillRow(
        ctx=context,
        ms_per_token=1e3 * seconds / context,
        attention_ms=1e3 * attended / context,
        tokens_per_s=context / seconds,
        gbps=written / seconds / 1e9,
        share_of_copy=written / seconds / copy,
        peak_bytes=peak,
    )


def as_replayed(work: Callable[[], Tensor], setup: CacheSetup) -> Callable[[], object]:
    """``work`` of the device alone, to be done again and again as a decode step does it: as a graph where that is one."""
    if not setup.backend.captures(setup.arena.shape.head_size):
        return work
    return graphs_of(setup).capture(work).replay


def launched_for(setup: CacheSetup, packed: int) -> int:
    """Packed tokens that a step at ``packed`` is launched for (``Graphs.bound``)."""
    if not setup.backend.captures(setup.arena.shape.head_size):
        return packed
    return graphs_of(setup).bound(packed)
