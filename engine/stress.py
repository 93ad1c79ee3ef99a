"""Caches without a model: an arena of any shape, filled with random tokens through the real packing path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor

from skvq.engine.absorb import absorb
from skvq.engine.arena import Arena
from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.codecs import MATRICES, SIDES, tensor_shapes
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CapacityError
from skvq.engine.loading import cache_setup
from skvq.engine.machine import available_memory
from skvq.engine.model_config import FULL_SPAN, ModelConfig
from skvq.engine.overflow import on_full_of
from skvq.engine.prefill_form import PIECE_TOKENS
from skvq.engine.report import Reporter
from skvq.engine.rollback import all_or_nothing
from skvq.engine.rope import model_rope
from skvq.engine.sizes import arena_shape, gib, regions_of, with_longest_tile
from skvq.kernels.interface import Backend, Step
from skvq.kernels.layout import PAGE_TOKENS, pages_for

RANDOM_UNIT = 0.25
"""Unit of metadata for numbers of order one: scales from 3 levels to 256 are normal E4M3 numbers in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """A token that stands out among random ones, the same in every layer."""

    position: int
    key: Tensor  # [KH, D], after RoPE
    value: Tensor  # [KH, D]


def bare_setup(
    config: ModelConfig,
    cache: CacheConfig,
    *,
    max_context: int,
    max_sequences: int,
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    on_full: str = "stop",
) -> CacheSetup:
    """What sequences share, without weights: a calibration is made up. Raises CapacityError if the arena does not fit."""
    cache = with_longest_tile(cache.fitted(config), config)
    shape = arena_shape(config, cache, max_context=max_context, max_sequences=max_sequences, dtype=dtype)
    memory = available_memory(device)
    if shape.nbytes > memory:
        raise CapacityError(
            f"the arena for {max_context:,} tokens needs {gib(shape.nbytes)}, only {gib(memory)} is available: "
            "choose a smaller --ctx, fewer --layers or fewer bits"
        )
    rope = model_rope(config, max_context, device)
    return cache_setup(
        Arena(shape, device),
        config,
        cache,
        made_up_calibration(config, cache),
        rope=rope,
        backend=backend,
        max_context=max_context,
        on_full=on_full_of(on_full, regions_of(cache, config), max_context),
        fingerprint="no model",
        lock=RLock(),
        rope_scaling=None,
    )


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for any whole number."""
    return torch.Generator(device).manual_seed(int(seed) % 2**64)


def made_up_calibration(config: ModelConfig, cache: CacheConfig) -> Mapping[str, Tensor]:
    """A valid calibration for normal numbers: random orthogonal bases and small means for ``rotate``, labels in order."""
    if not cache.is_packed:
        return {}
    generator = seeded(0)
    shapes = tensor_shapes(cache, config)
    tensors = {name: torch.ones(shape, dtype=torch.float32) for name, shape in shapes.items()}
    for side in SIDES:
        tensors[f"{side}_unit"] *= RANDOM_UNIT
        if cache.method == "reorder":
            labels = torch.arange(config.num_kv_heads * config.head_size) // cache.group_size
            tensors[f"{side}_labels"] = labels.expand(config.num_layers, -1).contiguous()
    if cache.method == "rotate":
        size = config.head_size
        turns = torch.linalg.qr(torch.randn(shapes["key_basis"], dtype=torch.float32, generator=generator)).Q
        tensors |= {
            name: torch.eye(size, dtype=torch.float32).expand(shapes[name]).contiguous()
            for name in MATRICES
            if name.endswith("metric")
        }
        tensors |= dict.fromkeys(("key_basis", "query_basis", "value_basis"), turns)
        tensors["output_basis"] = turns.transpose(2, 3).contiguous()
        tensors |= {
            f"{s}_mean": 0.1 * torch.randn(shapes[f"{s}_mean"], dtype=torch.float32, generator=generator) for s in SIDES
        }
    return tensors


def append(sequence: SequenceCache, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Sequence[int]) -> None:
    """Cache tokens whose keys (after RoPE) and values are given, [T, KH, D] a layer, as a forward pass would."""
    setup = sequence.setup
    sequence.reserve(len(ids))
    new_ids = torch.tensor(ids, dtype=torch.int64, device=sequence.page_row.device)
    for layer, (new_keys, new_values) in enumerate(zip(keys, values, strict=True)):
        old_keys, old_values, old_mass = sequence.window(layer, sequence.length)
        absorb(
            sequence,
            layer,
            torch.cat([old_keys, new_keys.to(setup.arena.shape.dtype)]),
            torch.cat([old_values, new_values.to(setup.arena.shape.dtype)]),
            torch.cat([old_mass, old_mass.new_zeros(len(ids))]),
            new_ids,
        )
    sequence.commit(ids)


def fill(sequence: SequenceCache, count: int, *, seed: int, vocab: int, report: Reporter, plants: Sequence[Plant] = ()) -> None:
    """Append ``count`` random tokens: normal keys and values, packed by the real kernel; layers differ by a shift.

    A plant takes the place of the random token at its position. Raises CapacityError before anything is written. Numbers depend
    on the seed and the kind of device.
    """
    shape, device = sequence.setup.arena.shape, sequence.page_row.device
    last = sequence.length + count
    held, most = sequence.length, sequence.setup.max_context
    if held + count > most:
        raise CapacityError(
            f"{count:,} random tokens after {held:,} do not fit a context of {most:,}: fill with at most {most - held:,}, or "
            f"load with a max_context (--ctx) of at least {held + count:,}"
        )
    sequence.setup.arena.require_pages(max(0, pages_for(sequence.packed_after(count)) - len(sequence.pages)))
    sequence.filled |= count > 0
    generator = seeded(seed)
    numbers = seeded(seed + 1, device)  # where they are packed: a host draws a hundredth as fast as a card
    size = (min(count, PIECE_TOKENS), shape.kv_heads, shape.head_size)
    with report.bar(f"filling {count:,} random tokens", count) as bar:
        for start in range(sequence.length, last, PIECE_TOKENS):
            stop = min(start + PIECE_TOKENS, last)
            ids = torch.randint(vocab, (stop - start,), generator=generator).tolist()
            both = [
                torch.randn(size, dtype=torch.float32, generator=numbers, device=device)[: stop - start].to(shape.dtype)
                for _ in range(2)
            ]
            here = [p for p in plants if start <= p.position < stop]
            keys, values = (_Layers(t, shape.layers, start, here, name) for t, name in zip(both, ("key", "value"), strict=True))
            sequence.reserve(len(ids))
            with all_or_nothing(sequence):
                append(sequence, keys, values, ids)
            bar.advance(stop - start)


def fill_fast(sequence: SequenceCache, count: int, *, seed: int, vocab: int, report: Reporter) -> None:
    """``fill``, where a long run of an empty sequence repeats the packed bytes of its second piece: as fast as memory is.

    The same bytes are read and the same work is done when it is attended to; as a text it makes even less sense.
    """
    regions = sequence.setup.regions
    lead = 2 * PIECE_TOKENS
    tail = lead + regions.ring + PAGE_TOKENS
    if sequence.length or count < lead + tail or count > sequence.setup.max_context:
        fill(sequence, count, seed=seed, vocab=vocab, report=report)
        return
    fill(sequence, lead + regions.ring, seed=seed, vocab=vocab, report=report)
    sequence.truncate(lead)  # to whole pages: nothing is left in the window
    middle = (count - tail) // PAGE_TOKENS * PAGE_TOKENS
    ids = torch.randint(vocab, (middle,), generator=seeded(seed + 1)).tolist()
    pages = PIECE_TOKENS // PAGE_TOKENS
    _repeat(sequence, pages, pages, ids)
    fill(sequence, count - sequence.length, seed=seed + 2, vocab=vocab, report=report)


def _repeat(sequence: SequenceCache, first: int, count: int, token_ids: Sequence[int]) -> None:
    """Append whole pages of ``token_ids``, byte copies of the sequence's pages ``first .. first+count-1`` again and again.

    What is cached then is not what the ids say. The window must be empty.
    """
    start, length = pages_for(sequence.packed), sequence.packed + len(token_ids)
    assert sequence.length == sequence.packed and not (sequence.packed % PAGE_TOKENS or len(token_ids) % PAGE_TOKENS)
    sequence.grow(length)
    for at, page in enumerate(sequence.pages[start:]):
        sequence.setup.arena.overwrite(page, sequence.pages[first + at % count])
    sequence.packed = sequence.length = length
    sequence.token_ids.extend(token_ids)


class _Layers(Sequence[Tensor]):
    """The same random tokens for every layer, shifted by its number, with plants in place: made when asked for."""

    def __init__(self, tokens: Tensor, layers: int, first: int, plants: Sequence[Plant], name: str) -> None:
        self._tokens, self._layers, self._first, self._plants, self._name = tokens, layers, first, plants, name

    def __len__(self) -> int:
        return self._layers

    def __getitem__(self, layer: int) -> Tensor:  # type: ignore[override]
        if layer >= self._layers:
            raise IndexError(layer)
        tokens = self._tokens.roll(layer, 0)
        for plant in self._plants:
            tokens[plant.position - self._first] = getattr(plant, self._name).to(tokens)
        return tokens


def last_token_step(sequence: SequenceCache) -> Step:
    """A step that asks again for what the last token of a sequence sees, in a layer without a span."""
    device = sequence.device
    return Step(
        slots=torch.tensor([sequence.slot], device=device),
        positions=torch.tensor([[sequence.length - 1]], dtype=torch.int32, device=device),
        packed=torch.tensor([sequence.packed], dtype=torch.int32, device=device),
        page_table=sequence.setup.arena.page_table,
        max_packed=sequence.packed,
        span=FULL_SPAN,
    )
