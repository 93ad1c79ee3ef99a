"""A text scored in full precision and as decode would see it, and caches measured against the 16-bit one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.calibration import needs_none
from skvq.engine.comparison import compare, evaluation_row
from skvq.engine.config import CacheConfig
from skvq.engine.decode_regime import DecodeRegimeLayer, StrictWindowLayer
from skvq.engine.dual_chunks import TrueDistances
from skvq.engine.errors import CapacityError, OptionError, counted
from skvq.engine.likelihoods import Likelihoods, likelihoods_of, nll_of
from skvq.engine.loading import EngineParts, planner_beside, with_cache
from skvq.engine.machine import available_memory
from skvq.engine.options import is_whole, require_type
from skvq.engine.pieces import Pieces, finished
from skvq.engine.regions import Regions
from skvq.engine.report import Reporter
from skvq.engine.sizes import gib, widest_regions
from skvq.engine.whole_text import text_as_decoded, text_in_full
from skvq.loaders.text import first_tokens


def dense_hidden(parts: EngineParts, ids: Tensor, *, more: int = 0) -> Tensor:
    """Last hidden states [N, d] of a text in full precision: what a cache is measured against. Memory must be there for
    ``more`` bytes that they become.
    """
    _require_memory(parts, len(ids), parts.model.dtype.itemsize, more)
    return text_in_full(parts.model, parts.rope, ids)


def regime_hidden(
    parts: EngineParts, ids: Tensor, report: Reporter, layer_class: type[DecodeRegimeLayer] = DecodeRegimeLayer
) -> Pieces[Tensor]:
    """Last hidden states [N, d] of a text whose every position sees what decode would see."""
    model = parts.model
    with SequenceCache(parts.setup) as sequence:
        sequence.reserve(len(ids))
        size = model.dtype.itemsize + sequence.setup.arena.shape.dtype.itemsize
        _require_memory(parts, len(ids), size, layer_class.more_bytes(model.config, len(ids), model.dtype.itemsize))
        with report.bar(f"scoring {len(ids):,} tokens", model.config.num_layers) as bar:
            layers = partial(layer_class, sequence, ids=ids)
            return (yield from text_as_decoded(model, parts.rope, ids, layers, bar.advance))


def _require_memory(parts: EngineParts, count: int, size: int, more: int) -> None:
    """Raise CapacityError unless there is memory for the hidden states of ``count`` tokens, a layer's keys and values, of
    ``size`` bytes a number, and ``more`` bytes."""
    config, dtype = parts.model.config, parts.model.dtype
    each = config.hidden_size * dtype.itemsize + 2 * config.num_kv_heads * config.head_size * size
    needed, left = count * each + parts.plan.parts["workspace"] + more, available_memory(parts.model.device)
    if needed > left:
        raise CapacityError(
            f"scoring {count:,} tokens at once needs {gib(needed)} beside what is held, only {gib(left)} is available: score a "
            "shorter text, or stretches of it"
        )


def nll(parts: EngineParts, token_ids: Sequence[int], report: Reporter) -> Tensor:
    """See ``Engine.nll``."""
    ids = parts.model.ids(token_ids)
    return nll_of(parts.model, finished(regime_hidden(parts, ids, report)), ids)


def likelihoods(parts: EngineParts, token_ids: Sequence[int], count: int, report: Reporter) -> Pieces[Likelihoods]:
    """See ``Engine.likelihoods``."""
    vocab = parts.model.config.vocab_size
    if not is_whole(count) or not 1 <= count <= vocab:
        raise OptionError(f"count must be from 1 to the vocabulary's {vocab:,}, got {count!r}")
    ids = parts.model.ids(token_ids)
    hidden = yield from regime_hidden(parts, ids, report)
    return (yield from likelihoods_of(parts.model, hidden, ids, int(count)))


def evaluate(
    parts: EngineParts,
    text: str,
    caches: Sequence[CacheConfig],
    report: Reporter,
    *,
    tokens: int,
    stride: int,
    calibration: Path | None,
    exact_window: bool,
) -> list[dict[str, Any]]:
    """See ``Engine.evaluate``: one row a cache, over the same weights and the same full-precision hidden states."""
    for name, value in (("tokens", tokens), ("stride", stride)):
        if not is_whole(value) or value < 2:
            raise OptionError(f"{name} must be a whole number of tokens, 2 or more, got {value!r}")
    require_type("caches", caches, list, tuple)
    for cache in caches:
        require_type("each of caches", cache, CacheConfig)
    if exact_window and not isinstance(parts.rope.distances, TrueDistances):
        raise OptionError(
            "a window of exactly W tokens (--exact-window) is not simulated in chunks: score shorter stretches (--stride)"
        )
    if calibration is not None and caches and not any(cache.is_packed for cache in caches):
        raise needs_none(calibration)
    token_ids = first_tokens(parts.tokenizer, text, tokens)
    if len(token_ids) < 2:
        raise OptionError(f"the text has {counted(len(token_ids), 'token')}: at least 2 are needed to score it")
    if len(token_ids) < tokens:
        report.message(f"the text has {len(token_ids):,} of the {tokens:,} tokens asked for")
    ids = parts.model.ids(token_ids)
    stretches = [s for s in torch.split(ids, min(stride, tokens)) if len(s) > 1]
    longest = max(map(len, stretches))
    parts.setup.require(0, longest)
    files = [calibration if cache.is_packed else None for cache in caches]
    for cache, file in zip(caches, files, strict=True):  # all are refused before any is scored
        planner_beside(parts, cache, 1, file)
        if cache.is_packed:
            _require_quantized(widest_regions(cache.fitted(parts.model.config), parts.model.config), longest, exact_window)
    references = [dense_hidden(parts, s) for s in stretches]
    layer_class = StrictWindowLayer if exact_window else DecodeRegimeLayer
    rows = []
    for cache, file in zip(caches, files, strict=True):
        other = with_cache(parts, cache, 1, file, report)
        found = [
            compare(parts.model, reference, finished(regime_hidden(other, s, report, layer_class)), s)
            for reference, s in zip(references, stretches, strict=True)
        ]
        rows.append(evaluation_row(other.cache, parts.model.config, found))
        del other  # its arena makes room for the next
    return rows


def _require_quantized(regions: Regions, tokens: int, exact_window: bool) -> None:
    """Raise OptionError unless the last of so many tokens is predicted from some that are quantized."""
    packed = min(regions.packed(tokens), tokens - 1 - regions.window) if exact_window else regions.packed(tokens - 1)
    if packed <= regions.sinks:
        held = regions.window + regions.tile + regions.sinks
        raise OptionError(
            f"in {tokens:,} tokens nothing is quantized before the last is read, for window, tile and sinks hold {held:,}: "
            "score longer stretches (--stride, --tokens) of a longer text"
        )
