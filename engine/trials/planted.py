"""``skvq bench planted``: keys planted among random tokens must be found by attention at every depth; the answer is known.

Query q has entries +-1 (norm sqrt(D)), so its score with a random normal key is normal with deviation one, and T of them
add up to a log-sum-exp of about log(T) + 1/2. A planted key is a multiple of q with score SCORE, far above that: the
output of attention is the planted value, and the log-sum-exp is its score, both as they were stored. What is compared:

    lse     against q . k' / sqrt(D), k' the planted key as read back by ``unpack``
    output  against v', the planted value as read back; and v' against the v that was planted (the quantizer's error)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.cache_setup import CacheSetup
from skvq.engine.errors import OptionError, SkvqError, counted
from skvq.engine.guard import own_settings
from skvq.engine.measure import wait_for
from skvq.engine.report import Reporter
from skvq.engine.stress import Plant, fill, last_token_step, seeded

SCORE = 30.0
LSE_TOLERANCE = 0.1
OUTPUT_TOLERANCE = 0.02
STORED_TOLERANCE = 0.75
"""Largest relative error of a stored value: an unrelated token has 1.4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How one planted token fared, the worst over layers and heads."""

    context: int
    depth: float
    position: int
    region: str
    lse_error: float
    output_error: float
    stored_error: float
    ms: float  # of one layer's attention, median over layers

    @property
    def good(self) -> bool:
        """Whether attention found the token."""
        return self.lse_error < LSE_TOLERANCE and self.output_error < OUTPUT_TOLERANCE and self.stored_error < STORED_TOLERANCE

    def line(self) -> str:
        """For people."""
        return (
            f"{self.context:>9,} tokens  depth {self.depth:5.1f} %  {self.region:8}  {'found' if self.good else 'LOST '}  "
            f"errors: lse {self.lse_error:.4f}, output against stored {self.output_error:.2%}, stored against planted "
            f"{self.stored_error:.1%}; {self.ms:.1f} ms per layer"
        )


def plants_at(depths: Sequence[float], context: int, kv_heads: int, size: int, seed: int) -> list[Plant]:
    """A token for each depth in percent, each in a direction of its own."""
    places = require_places(depths, context)
    generator = seeded(seed + 1)
    plants = []
    for place in places:
        query, value = (torch.randint(2, (kv_heads, size), generator=generator).float() * 2 - 1 for _ in range(2))
        plants.append(Plant(position=place, key=query * SCORE / math.sqrt(size), value=2 * value))
    return plants


def require_places(depths: Sequence[float], context: int) -> list[int]:
    """Where in a context these percentages of it are. Raises OptionError unless each has a place of its own."""
    if not all(0 <= d <= 100 for d in depths) or not depths:
        raise OptionError(f"depths are percentages from 0 to 100, got {', '.join(f'{d:g}' for d in depths)}")
    places = [round(depth / 100 * (context - 1)) for depth in depths]
    if len(set(places)) < len(places):
        raise OptionError(
            f"{len(places)} depths are not as many places in {counted(context, 'token')}: give others, or a longer --ctx"
        )
    return places


def planted(
    setup: CacheSetup, heads: int, context: int, depths: Sequence[float], *, seed: int, report: Reporter
) -> list[Found]:
    """Fill a sequence of ``context`` tokens, plant at ``depths``, attend with each plant's query in every layer."""
    shape = setup.arena.shape
    plants = plants_at(depths, context, shape.kv_heads, shape.head_size, seed)
    with own_settings(setup.device), SequenceCache(setup) as sequence:
        fill(sequence, context, seed=seed, vocab=256, report=report, plants=plants)
        return [_look(sequence, plant, depth, heads) for plant, depth in zip(plants, depths, strict=True)]


def _look(sequence: SequenceCache, plant: Plant, depth: float, heads: int) -> Found:
    setup, device = sequence.setup, sequence.page_row.device
    size = setup.arena.shape.head_size
    query = plant.key.to(device) * math.sqrt(size) / SCORE  # [KH, D], entries +-1
    step = last_token_step(sequence)
    q = query.repeat_interleave(heads // len(query), 0)[None, None].to(setup.arena.shape.dtype)  # [1, 1, H, D]
    errors, times = [], []
    setup.method.attend(0, q, step)  # compiled: part of nobody's time
    for layer in range(setup.arena.shape.layers):
        key, value = stored(sequence, layer, plant.position)
        wait_for(device)
        start = time.perf_counter()
        out, lse = setup.method.attend(layer, q, step)
        wait_for(device)
        times.append(time.perf_counter() - start)
        out, lse = (t[0, 0].float().reshape(len(query), -1, *t.shape[3:]) for t in (out, lse))  # [KH, H / KH, ...]
        score = (query * key).sum(-1, keepdim=True) / math.sqrt(size)
        far = [_relative(out, value[:, None]), _relative(value, plant.value.to(device))]
        errors.append([float((lse - score).abs().max()), *far])
    worst = torch.tensor(errors, dtype=torch.float32).nan_to_num(torch.inf).amax(0).tolist()
    return Found(
        context=sequence.length,
        depth=depth,
        position=plant.position,
        region=_region(sequence, plant.position),
        lse_error=worst[0],
        output_error=worst[1],
        stored_error=worst[2],
        ms=1000 * sorted(times)[len(times) // 2],
    )


def stored(sequence: SequenceCache, layer: int, position: int) -> tuple[Tensor, Tensor]:
    """Key and value [KH, D] float32 of one token as the cache holds them."""
    if position >= sequence.packed:
        keys, values, _ = sequence.window(layer, sequence.length)
        at = position - sequence.packed
    else:
        tile = sequence.setup.regions.tile
        keys, values = sequence.stage(layer, position // tile * tile, tile)
        at = position % tile
    return keys[at].float(), values[at].float()


def _region(sequence: SequenceCache, position: int) -> str:
    if position >= sequence.packed:
        return "window"
    held = sequence.setup.arena.positions[0, sequence.slot, : sequence.setup.regions.retained]
    return "retained" if bool((held == position).any()) else "packed"


def _relative(x: Tensor, target: Tensor) -> float:
    return float(((x - target).norm(dim=-1) / target.norm(dim=-1)).max())


def require_found(found: Sequence[Found]) -> None:
    """Raise SkvqError if a planted token was lost."""
    lost = [f for f in found if not f.good]
    if lost:
        worst = lost[0]
        raise SkvqError(
            f"{len(lost)} of {len(found)} planted tokens were lost, the first at position {worst.position:,} of "
            f"{worst.context:,} ({worst.region}): attention over this cache is wrong here; please report it"
        )


def rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """For programs."""
    return [{**asdict(f), "found": f.good} for f in found]
