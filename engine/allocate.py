"""Which bits for which layer: only the choice, given what each would cost. A pure function, exact and deterministic."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from skvq.engine.config import LayerWidths
from skvq.kernels.layout import stored_bits

STEPS = 5
"""Stored widths (1.6, 2, 3, 4, 8) are whole multiples of a fifth of a bit."""


def in_steps(bits: float) -> int:
    """Stored width in fifths of a bit.

    >>> in_steps(1.5), in_steps(3.0)
    (8, 15)
    """
    return round(STEPS * stored_bits(bits))


def choose_bits(losses: Sequence[Sequence[float]], widths: Sequence[float], code_bits: float) -> tuple[float, ...]:
    """Width of every item such that the sum of its losses is least and stored widths average at most ``code_bits``.

    ``losses[i][j]`` is what item i at ``widths[j]`` costs; all items have the same number of elements. The exact optimum of a
    multiple-choice knapsack, by dynamic programming over fifths of a bit; of equals, the narrower width of the later item.

    >>> choose_bits([[9.0, 1.0], [2.0, 1.0]], [1.5, 2.0], 1.8)
    (2.0, 1.5)
    """
    sizes = [in_steps(bits) for bits in widths]
    room = min(int(code_bits * STEPS * len(losses) + 1e-6), max(sizes) * len(losses))
    assert min(sizes) * len(losses) <= room, (code_bits, list(widths), "nothing fits: check the budget before")
    best = np.zeros(room + 1)  # least loss of the items so far by the room they may take
    picks = np.zeros((len(losses), room + 1), dtype=np.int64)
    for item, row in enumerate(losses):
        options = np.full((len(widths), room + 1), np.inf)
        for j, size in enumerate(sizes):
            options[j, size:] = best[: max(0, room + 1 - size)] + row[j]
        picks[item] = options.argmin(0)
        best = options.min(0)
    chosen, left = [], room
    for item in range(len(losses) - 1, -1, -1):
        pick = int(picks[item, left])
        chosen.append(float(widths[pick]))
        left -= sizes[pick]
    return tuple(reversed(chosen))


def as_layer_bits(chosen: Sequence[float], heads: int) -> tuple[LayerWidths, ...]:
    """``CacheConfig.layer_bits`` from widths item by item: keys and values of the first of ``heads`` heads, of the second, ...

    >>> as_layer_bits([2.0, 1.5, 3.0, 2.0], 2), as_layer_bits([2.0, 1.5, 3.0, 2.0], 1)
    ((((2.0, 1.5), (3.0, 2.0)),), ((2.0, 1.5), (3.0, 2.0)))
    """
    pairs = tuple(zip(chosen[::2], chosen[1::2], strict=True))
    layers = (pairs[at : at + heads] for at in range(0, len(pairs), heads))
    return tuple(layer[0] if len(set(layer)) == 1 else layer for layer in layers)


@functools.cache
def fullest(items: int, widths: tuple[float, ...], code_bits: float) -> tuple[float, ...]:
    """Widths of ``items`` items that together store as much as any choice within ``code_bits`` on average.

    Every plan of a search for the largest context asks for the same.

    >>> fullest(4, (2.0, 3.0), 2.6)
    (3.0, 3.0, 2.0, 2.0)
    """
    return choose_bits([[-float(in_steps(bits)) for bits in widths]] * items, widths, code_bits)
