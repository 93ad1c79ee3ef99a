"""What a cache takes, from the model's shape and the options alone: bytes of a token, sizes of regions, the arena."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from skvq.engine.allocate import as_layer_bits, fullest
from skvq.engine.arena_shape import ArenaShape, packed_page, plain_page
from skvq.engine.codecs import layouts_of, tensor_shapes
from skvq.engine.config import BITS, MOST_GUESSES, CacheConfig
from skvq.engine.filters import AttentionSinks
from skvq.engine.model_config import ModelConfig
from skvq.engine.regions import Regions
from skvq.kernels.layout import PlainLayout, pages_for, stored_bits

SPARE_PAGES = 2
"""Pages for each sequence beyond the first: a fork copies its last page on write and grows into the next."""


def tile_of(cache: CacheConfig, model: ModelConfig) -> int:
    """Tokens that leave the window at once."""
    return (_plain_layout(model) if not cache.is_packed else layouts_of(cache, model)[0][0]).tile


def layer_token_bytes(cache: CacheConfig, model: ModelConfig) -> list[float]:
    """Bytes of a packed token in each layer, codes and metadata."""
    if not cache.is_packed:
        return [_plain_layout(model).bytes_per_token] * model.num_layers
    return [sum(run.bytes_per_token for run in runs) for runs in layouts_of(cache, model)]


def _plain_layout(model: ModelConfig) -> PlainLayout:
    return PlainLayout(head_size=model.head_size, kv_heads=model.num_kv_heads)


def token_bytes(cache: CacheConfig, model: ModelConfig) -> float:
    """Bytes of a packed token over all layers, codes and metadata."""
    return sum(layer_token_bytes(cache, model))


def bits_per_element(cache: CacheConfig, model: ModelConfig) -> float:
    """Bits per packed number over all layers, everything counted."""
    return 8 * token_bytes(cache, model) / model.kv_elements_per_token


def fullest_choices(cache: CacheConfig, model: ModelConfig) -> tuple[CacheConfig, ...]:
    """The cache itself; while its bits are open, the fullest choices within its budget: with a side of 1.5 bits, and without.

    No choice that calibration may make takes more bytes than the larger of them.
    """
    if not cache.is_open:
        return (cache,)
    heads = model.num_kv_heads if cache.by_head else 1
    items, trits = 2 * model.num_layers * heads, BITS[0]
    rest = (cache.code_bits * items - stored_bits(trits)) / (items - 1)
    choices = [(trits, *fullest(items - 1, BITS, rest))]
    if cache.code_bits >= stored_bits(BITS[1]) - 1e-9:
        choices.append(fullest(items, BITS[1:], cache.code_bits))
    return tuple(replace(cache, layer_bits=as_layer_bits(c, heads)) for c in choices)


def with_longest_tile(cache: CacheConfig, model: ModelConfig) -> CacheConfig:
    """Of ``fullest_choices`` the one whose tile is longest: that of 1.5 bits."""
    return fullest_choices(cache, model)[0]


def regions_of(cache: CacheConfig, model: ModelConfig) -> Regions:
    """Sizes of a sequence's three regions. A 16-bit cache has slots for the sinks too: they may outlive their page."""
    sinks = sum(rule.budget for rule in cache.filters if type(rule) is AttentionSinks)
    others = sum(rule.budget for rule in cache.rules if type(rule) is not AttentionSinks)
    return Regions(window=cache.window, tile=tile_of(cache, model), retained=sinks + others, sinks=sinks)


def widest_regions(cache: CacheConfig, model: ModelConfig) -> Regions:
    """Those of the longest tile, where bits are not chosen yet."""
    return regions_of(with_longest_tile(cache, model), model)


GUESSED_ROWS = 64
"""Tokens of one step at most where some are guessed (``engine.lookup``): with more answers each has fewer guesses."""
HELD_ROWS = 128


def step_rows(sequences: int) -> int:
    """Tokens of one step at most: one of each sequence, and those that are guessed."""
    return max(sequences, min(GUESSED_ROWS, (1 + MOST_GUESSES) * sequences))


def held_rows(sequences: int) -> int:
    """Rows of logits at most that graphs hold for their next use, beside those of the step that is done: 15 graphs of one
    sequence, fewer of many."""
    return max(min(15 * sequences, HELD_ROWS), step_rows(sequences))


def cache_dtype(compute: torch.dtype) -> torch.dtype:
    """16-bit dtype of full-precision slots: the compute dtype, float16 where that is float32."""
    return torch.float16 if compute == torch.float32 else compute


def arena_shape(
    model: ModelConfig,
    cache: CacheConfig,
    *,
    max_context: int,
    max_sequences: int,
    dtype: torch.dtype,
    total_tokens: int | None = None,
) -> ArenaShape:
    """The arena of an engine: pages for ``total_tokens``, by default one sequence of ``max_context``, and for each sequence
    beyond the first spare pages and slots."""
    regions = regions_of(cache, model)
    half = cache_dtype(dtype)
    if not cache.is_packed:
        pages = (plain_page(_plain_layout(model), half),) * model.num_layers
    else:
        pages = tuple(map(packed_page, layouts_of(cache, model)))
    pages_in_all = max(1, regions.pages(max_context if total_tokens is None else total_tokens))
    return ArenaShape(
        layers=model.num_layers,
        kv_heads=model.num_kv_heads,
        head_size=model.head_size,
        pages=pages_in_all + SPARE_PAGES * (max_sequences - 1),
        sequences=max_sequences,
        pages_per_sequence=max(1, pages_for(max_context)),  # one that was cut may have packed more than another of its length
        full_slots=regions.slots,
        dtype=half,
        layer_pages=pages,
        chunks=_chunks(model, max_context, regions.ring),
    )


def _chunks(model: ModelConfig, max_context: int, ring: int) -> int:
    """Chunks that a sequence may lie in, the tokens of its window counted from the last packed one on."""
    cut = model.cut_at(max_context)
    return (max_context + ring - 1) // cut.length + 1 if cut else 1


def gib(count: int) -> str:
    """Bytes for people.

    >>> gib(3 * 2**30)
    '3.00 GiB'
    """
    return f"{count / 2**30:,.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def computed_numbers(model: ModelConfig) -> int:
    """Of each token that goes through a layer, at a time, keys and values left out; with experts what each of its own computes,
    or one of them after another and in float32 what all give."""
    d, f = model.hidden_size, model.intermediate_size
    experts = max(model.experts.chosen * (f + d), 8 * d) if model.experts else 0
    return 2 * f + 4 * d + 2 * model.num_heads * model.head_size + experts


def calibration_bytes(cache: CacheConfig, model: ModelConfig, *, on_gpu: bool) -> int:
    """Bases, means, scales, metrics and their factors of all layers in float32; on a GPU also what packing multiplies by, both
    matrices of a side as two halves a number and their diagonal blocks in float32 (``triton_gpu.metric``)."""
    if not cache.is_packed:
        return 0
    held = 4 * sum(math.prod(shape) for shape in tensor_shapes(cache, model).values())
    if cache.method != "rotate":
        return held
    heads, size = model.num_layers * model.num_kv_heads, model.head_size
    return held + 2 * heads * (4 * size * size + on_gpu * (8 * size * size + 128 * size))
