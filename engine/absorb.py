"""Tokens of a step on their way into a sequence: into the window's ring, and out of it into retained slots and pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.filters import LeavingTokens
from skvq.engine.prefill_form import PIECE_TOKENS
from skvq.engine.retained import retain
from skvq.engine.streams import sent


def absorb(sequence: SequenceCache, layer: int, keys: Tensor, values: Tensor, mass: Tensor, new_ids: Tensor) -> None:
    """Take the tokens from ``packed`` to the end of this step: what leaves the window is packed, the rest fills the ring.

    keys (after RoPE), values [T, KH, D]; mass float32 [T]; new_ids int64, the ids of this step's tokens. Call once a layer
    between reserve and commit.
    """
    for start in range(0, len(keys), PIECE_TOKENS):
        piece = slice(start, start + PIECE_TOKENS)
        absorb_piece(sequence, layer, sequence.packed + start, keys[piece], values[piece], mass[piece], new_ids)


def absorb_piece(
    sequence: SequenceCache, layer: int, start: int, keys: Tensor, values: Tensor, mass: Tensor, new_ids: Tensor
) -> None:
    """``absorb`` of some of the tokens, which begin at position ``start``: all pieces one after another, the first at
    ``packed``, each a multiple of PIECE_TOKENS but the last."""
    regions, full = sequence.setup.regions, sequence.setup.arena.full(layer)
    end = start + len(keys)
    if start == sequence.packed:
        full.positions[sequence.slot, regions.retained :] = -1
    target = min(max(start, sequence.packed_after(len(new_ids))), end)
    keys, values, leaves = keys.to(full.keys.dtype), values.to(full.values.dtype), target - start
    if leaves:
        ids = _ids(sequence, start, target, new_ids)
        retained = _retain(sequence, layer, start, ids, keys[:leaves], values[:leaves], mass[:leaves])
        sequence.method.pack(layer, sequence.page_row, start, keys[:leaves], values[:leaves], retained)
    slots = sequence.put(layer, target, keys[leaves:], values[leaves:])
    sequence.setup.arena.mass[layer, sequence.slot, slots] = mass[leaves:]


def pack_window(sequence: SequenceCache, new_ids: Tensor) -> None:
    """Once this step's tokens are in the ring of every layer: pack those that leave it; the others stay where they are.

    new_ids: int64, ids of this step's tokens. Call between reserve and commit. Writes pages, retained slots and positions.
    """
    arena, regions = sequence.setup.arena, sequence.setup.regions
    target = sequence.packed_after(len(new_ids))
    ids = _ids(sequence, sequence.packed, target, new_ids)
    slots = regions.slot(torch.arange(sequence.packed, target, device=ids.device))
    mass = arena.mass

    def pack(layer: int) -> None:
        full = arena.full(layer)
        keys, values = (t[sequence.slot][:, slots].transpose(0, 1) for t in (full.keys, full.values))
        retained = _retain(sequence, layer, sequence.packed, ids, keys, values, mass[layer, sequence.slot, slots])
        sequence.method.pack(layer, sequence.page_row, sequence.packed, keys, values, retained)

    sequence.setup.streams.each(arena.shape.layers, pack)
    arena.slot(sequence.slot)["full_positions"].index_fill_(1, slots, -1)


def pack_zeros(sequence: SequenceCache, layouts: Sequence[object]) -> None:
    """Pack a tile of zeros, which nobody reads, in one layer of each of ``layouts``: to have packing compiled. The sequence has
    none packed yet, and will have none."""
    setup, tile = sequence.setup, sequence.setup.regions.tile
    if not setup.regions.packed(setup.max_context):
        return
    full = setup.arena.full(0)
    zeros = full.keys.new_zeros(tile, *full.keys.shape[1::2])  # [T, KH, D]
    sequence.grow(tile)
    for layer in {layout: index for index, layout in enumerate(layouts)}.values():
        setup.method.pack(layer, sequence.page_row, 0, zeros, zeros, torch.zeros(tile, dtype=torch.bool, device=zeros.device))


def _ids(sequence: SequenceCache, start: int, stop: int, new_ids: Tensor) -> Tensor:
    """Token ids of positions ``start .. stop-1``, of which those from ``length`` on are this step's."""
    old = sent(sequence.token_ids[start:stop], new_ids.device)
    return torch.cat([old, new_ids[max(0, start - sequence.length) : max(0, stop - sequence.length)]])


def _retain(sequence: SequenceCache, layer: int, first: int, ids: Tensor, keys: Tensor, values: Tensor, mass: Tensor) -> Tensor:
    """Let the rules keep some of the tokens that leave the window, ``first ..``; bool [T]: the tokens retained."""
    leaving = LeavingTokens(
        layer=layer,
        tile=sequence.setup.regions.tile,
        positions=torch.arange(first, first + len(keys), device=keys.device) + sequence.dropped,
        token_ids=ids,
        keys=keys,
        values=values,
        attention_mass=mass,
    )
    return retain(sequence.setup.rules, sequence.setup.arena.full(layer), sequence.slot, leaving, first, sequence.dropped)
