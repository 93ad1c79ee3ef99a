"""``skvq bench decode`` and ``prefill``: how fast, beside what this machine could do at most, measured in the same run.

Decode: a cache of random tokens, packed by the real kernel; the whole step and its attention apart. No figure is given unless
attention over a sample agrees with the specification first. Prefill: random tokens read as any prompt is.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.decode import graphs_of
from skvq.engine.errors import SkvqError
from skvq.engine.generate import Engine
from skvq.engine.guard import own_settings
from skvq.engine.machine import available_memory
from skvq.engine.measure import copy_bandwidth, device_name, peak_bytes, reset_peak, timed
from skvq.engine.model_config import FULL_SPAN, ModelConfig
from skvq.engine.prefill import chunks
from skvq.engine.prefill_form import CHUNK_TOKENS
from skvq.engine.report import Reporter
from skvq.engine.stress import fill_fast, last_token_step
from skvq.kernels.dense import attend_causal, kv_buffer

STEPS = 24
"""Decode steps timed at each context."""

WARM_UP = 4
"""Calls before the first that counts."""

WARM_TOKENS = 8 * CHUNK_TOKENS
"""Of the prompt that is read before those that count: all but the longest runs of keys that attention is asked about."""

SPARE = WARM_UP + STEPS
"""Tokens written beyond a context while it is measured."""

GATE_TOKENS = 3000
GATE_ERROR = 0.02
"""Largest relative error of attention against float32 over what the cache holds; 16-bit kernels have about 0.003."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow(ABC):
    """Figures of one context. Times are medians; nan is what was not measured."""

    ctx: int
    ms_per_token: float
    attention_ms: float  # all layers
    tokens_per_s: float
    gbps: float  # bytes of the cache over the time it takes
    share_of_copy: float
    peak_bytes: int

    @abstractmethod
    def line(self) -> str:
        """For people."""

    def as_dict(self) -> dict[str, Any]:
        """For programs: nan becomes null."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow(BenchRow):
    """A step: ``gbps`` is what attention reads of the cache over its time; without a model there is no step, only attention."""

    sdpa_ms: float  # torch's attention over unpacked keys and values of this length, where they fit
    sdpa_dtype: str  # of these (``sdpa_dtype``)

    def line(self) -> str:
        """For people."""
        step = "" if math.isnan(self.ms_per_token) else f"{self.ms_per_token:9.2f} ms a token ({self.tokens_per_s:,.1f}/s), "
        times = self.sdpa_ms / self.attention_ms
        beside = "" if math.isnan(times) else f"; torch SDPA in {self.sdpa_dtype} {self.sdpa_ms:,.2f} ms, {times:.1f}x"
        return (
            f"{self.ctx:>9,} tokens: {step}attention {self.attention_ms:8.2f} ms, {self.gbps:.1f} GB/s, "
            f"{self.share_of_copy:.0%} of copy{beside}; peak {self.peak_bytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRow(BenchRow):
    """A prompt: ``attention_ms`` is dense attention's share of ``ms_per_token``, of exact prefill only; ``gbps`` the cache
    written over the time."""

    def line(self) -> str:
        """For people."""
        attended = "" if math.isnan(self.attention_ms) else f", of which attention {self.attention_ms:.3f}"
        return (
            f"{self.ctx:>9,} tokens: {self.ms_per_token:8.3f} ms a token ({self.tokens_per_s:,.1f}/s){attended}; "
            f"peak {self.peak_bytes / 1e9:.2f} GB"
        )


def random_query(setup: CacheSetup, heads: int) -> Tensor:
    """[1, 1, H, D] in the cache's dtype."""
    shape = setup.arena.shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, heads, shape.head_size, dtype=torch.float32, generator=generator).to(shape.dtype).to(setup.device)


def gate(setup: CacheSetup, heads: int, tokens: int, report: Reporter) -> float:
    """Error of the first layer's attention against float32 over the cache as it unpacks. Raises SkvqError if it is wrong."""
    sequence = SequenceCache(setup)
    try:
        fill_fast(sequence, tokens, seed=1, vocab=256, report=report)
        q = random_query(setup, heads)
        out, _ = setup.method.attend(0, q, last_token_step(sequence))
        keys, values, _ = (t.float() for t in sequence.window(0, sequence.length))
        if sequence.packed:
            old_keys, old_values = sequence.stage(0, 0, sequence.packed)
            keys, values = torch.cat([old_keys, keys]), torch.cat([old_values, values])
        keys, values = (t.transpose(0, 1) for t in (keys, values))
        expected, _ = setup.rope.distances.attend(q[0].float(), sequence.length - 1, keys, values, 0, FULL_SPAN)
        error = float((out[0].float() - expected).norm() / expected.norm())
    finally:
        sequence.free()
    if not error < GATE_ERROR:
        raise SkvqError(
            f"attention is off by {error:.2%} from float32 over {tokens:,} tokens: nothing is measured; please report it"
        )
    return error


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
    sequence = SequenceCache(setup)
    try:
        fill_fast(sequence, context, seed=0, vocab=256, report=report)
        yield sequence
    finally:
        sequence.free()


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
        with own_settings(device):
            yield from rows(copy)

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
    is_dense = engine.parts.prefill == "exact"
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
