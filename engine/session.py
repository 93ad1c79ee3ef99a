"""A sequence on disk: its packed tiles in order of position, full-precision slots, tokens, and whose they are.

Tensors of the file, L layers, KH kv heads, F full-precision slots, D head size, n packed tiles:

    page tensors of each layer ("key_codes.0", ...) [n, KH, bytes or words of a tile]
    full_keys, full_values                          [L, KH, F, D]     zeros in slots that hold nothing
    full_positions int32, full_mass float32         [L, F]
    token_ids int32                                 [length]
    logits float32                                  [V]               where reading gave them last, of what follows

Tiles are not pages: a file can be restored into any arena of the same identity, whatever its pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skvq.engine.config import CacheConfig
from skvq.engine.container import Container, Entry, open_container, read_header, whole, write_container
from skvq.engine.errors import CapacityError, SessionError
from skvq.engine.filters import rule_texts
from skvq.engine.identity import SAME_BITS, Identity, options_of, require_same
from skvq.engine.interrupts import uninterrupted
from skvq.kernels.layout import PAGE_TOKENS, pages_for

if TYPE_CHECKING:
    from skvq.engine.cache import SequenceCache

SCHEMA = 2
KIND = "session"
MOST_TOKENS = 2**31 - 1
PIECE_TILES = 512
"""Tiles moved at once: bounds what saving and restoring need beside the arena."""


def save_session(sequence: SequenceCache, path: Path) -> None:
    """Write a sequence to ``path`` atomically. Same sequence, same bytes."""
    layers = range(sequence.setup.arena.shape.layers)
    entries = [*tile_entries(sequence, layers, sequence.packed), *slot_entries(sequence), ids_entry(sequence.token_ids)]
    if sequence.logits is not None:
        entries.append(whole("logits", sequence.logits))
    write_container(path, KIND, header_of(sequence), entries)


def open_session(identity: Identity, path: Path) -> Container:
    """A verified session file, for ``fill_from``. Nothing in the arena is touched before this has returned.

    Raises SessionError if the file is broken or belongs to another model, calibration or other options.
    """
    file = open_container(path, KIND)
    check_header(identity, file, KIND)
    return file


def session_header(path: Path) -> dict[str, Any]:
    """What a session says of itself: to be looked at before a model is loaded and calibrated to resume from it."""
    header = read_header(path, KIND)
    _require_schema(header, path, KIND)
    if not {field.name for field in fields(Identity)} <= header.keys() or type(header.get("length")) is not int:
        raise SessionError(
            f"{KIND} {path} is damaged, its header lacks what a session says of itself: delete it and start again"
        )
    return header


def saved_options(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a session was made with, by the names of ``skvq run``'s options: what a header can tell. Rules of other packages are
    not named: a file would say what is imported."""
    names = ("method", "window") if header["method"] == "fp" else ("method", "window", "key_bits", "value_bits", "group_size")
    told = {name: header[name] for name in names}
    told |= {name: header[name] for name in ("bits_budget", "rope_scaling") if header.get(name) is not None}
    if type(header.get("max_context")) is int:  # files of before have none
        told["ctx"] = header["max_context"]
    filters = str(header["filters"])
    if sinks := re.match(r"AttentionSinks\(n=(\d+)\)", filters):
        told["sinks"] = int(sinks[1])
    elif type(header.get("sinks")) is int:  # of 16 bits, where no rule is asked
        told["sinks"] = header["sinks"]
    if (rules := rule_texts(filters)) is not None:
        told["filters"] = tuple(rules[bool(sinks) :])
    return told


def require_options(header: Mapping[str, Any], path: Path, cache: CacheConfig, kind: str = KIND) -> None:
    """Raise SessionError if the session (or checkpoint) at ``path`` is of other cache options."""
    require_same(options_of(cache), header, f"{kind} {path}")
    if cache.is_packed and (header.get("layer_bits") == SAME_BITS) != (cache.bits_budget is None):
        made = "without" if header.get("layer_bits") == SAME_BITS else "with"
        raise SessionError(
            f"{kind} {path} was made {made} a budget of bits (--bits-budget): use the same options, or another file"
        )


def require_fits(length: int, max_context: int) -> None:
    """Raise CapacityError unless a saved sequence of so many tokens fits a context."""
    if length > max_context:
        raise CapacityError(
            f"a saved sequence of {length:,} tokens does not fit a context of {max_context:,}: load with a max_context (--ctx) "
            f"of more than {length:,}"
        )


def header_of(sequence: SequenceCache) -> dict[str, Any]:
    """Whose the tensors are and how long the sequence is."""
    lengths = {"length": sequence.length, "packed": sequence.packed, "dropped": sequence.dropped, "pending": sequence.pending}
    setup = sequence.setup
    flags = {"filled": sequence.filled, "asked": sequence.asked, "sinks": setup.regions.sinks}
    loaded = {"bits_budget": setup.bits_budget, "rope_scaling": setup.rope_scaling, "max_context": setup.max_context}
    return {"schema": SCHEMA, **setup.identity.as_dict(), **loaded, **lengths, **flags}


def check_header(identity: Identity, file: Container, kind: str) -> None:
    """Raise SessionError unless the file was written by this schema for this identity."""
    _require_schema(file.header, file.path, kind)
    require_same(identity.as_dict(), file.header, f"{kind} {file.path}")


def _require_schema(header: Mapping[str, Any], path: Path, kind: str) -> None:
    if header.get("schema") != SCHEMA:
        raise SessionError(f"{kind} {path} has schema {header.get('schema')}, this skvq reads {SCHEMA}: start again")


def fill_from(sequence: SequenceCache, file: Container) -> None:
    """Make a sequence, whatever it holds, that of a verified file, in time proportional to its bytes; Ctrl-C comes after it.

    It is as it was if the file is of other shapes (SessionError) or does not fit (CapacityError), empty after any other error.
    """
    length, dropped = (file.number(name, MOST_TOKENS) for name in ("length", "dropped"))
    packed, pending, regions = file.number("packed", length), _pending(file), sequence.setup.regions
    if packed % regions.tile or length - packed >= regions.ring:
        raise SessionError(f"{file.path} is damaged: of {length:,} tokens {packed:,} cannot be packed: start again")
    layers = range(sequence.setup.arena.shape.layers)
    tiles = expect_tiles(sequence, file, layers, packed)
    slots = expect_slots(sequence, file)
    ids = file.expect("token_ids", torch.int32, (length,)).tolist()
    logits = file.tensors.get("logits")  # of files of before, or after an answer, none
    arena = sequence.setup.arena
    require_fits(length, sequence.setup.max_context)
    arena.require_pages(max(0, pages_for(packed) - sum(not arena.is_shared(page) for page in sequence.pages)))
    with uninterrupted():
        sequence.truncate(0)
        try:
            sequence.adopt(ids, packed, dropped, pending)
            sequence.filled, sequence.asked = (bool(file.header.get(name)) for name in ("filled", "asked"))
            write_tiles(sequence, tiles, layers)
            write_slots(sequence, slots)
            sequence.logits = None if logits is None else logits.to(sequence.device, copy=True)
        except BaseException:
            sequence.truncate(0)
            raise


def _pending(file: Container) -> list[int]:
    found = file.header.get("pending")
    if not isinstance(found, list) or any(type(token) is not int for token in found):
        raise SessionError(f"{file.path} is damaged: its pending tokens are {str(found)[:40]}: start again")
    return found


# --- tiles ----------------------------------------------------------------------------------------------------------------


def tile_entries(sequence: SequenceCache, layers: Sequence[int], packed: int) -> list[Entry]:
    """The packed tiles of some layers, as they lie in the file."""
    entries = []
    for name, pages in _pages_by_tile(sequence, layers):
        stored = (packed // sequence.setup.regions.tile, pages.shape[1], pages.shape[3])
        entries.append(Entry(name, pages.dtype, stored, partial(_read_tiles, sequence, pages, stored[0])))
    return entries


def expect_tiles(sequence: SequenceCache, file: Container, layers: Sequence[int], packed: int) -> dict[str, Tensor]:
    """The file's tiles by name, of the types and shapes this arena has."""
    count = packed // sequence.setup.regions.tile
    return {
        name: file.expect(name, pages.dtype, (count, pages.shape[1], pages.shape[3]))
        for name, pages in _pages_by_tile(sequence, layers)
    }


def write_tiles(sequence: SequenceCache, tiles: dict[str, Tensor], layers: Sequence[int]) -> None:
    """Copy tiles of the file into the sequence's pages."""
    for name, pages in _pages_by_tile(sequence, layers):
        for first in range(0, len(tiles[name]), PIECE_TILES):
            block = tiles[name][first : first + PIECE_TILES]
            page, within = _places(sequence, first, len(block))
            pages[page, :, within] = block.to(pages.device)


def _read_tiles(sequence: SequenceCache, pages: Tensor, count: int) -> Iterator[Tensor]:
    for first in range(0, count, PIECE_TILES):
        page, within = _places(sequence, first, min(PIECE_TILES, count - first))
        yield pages[page, :, within]  # [tiles, KH, width]


def _pages_by_tile(sequence: SequenceCache, layers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Page tensors of some layers, named as in the file, as [pages, KH, tiles of a page, width]: every layout is tile-major."""
    tiles = PAGE_TOKENS // sequence.setup.regions.tile
    for layer in layers:
        for name, pages in sequence.setup.arena.layer(layer).items():
            yield f"{name}.{layer}", pages.view(*pages.shape[:2], tiles, -1)  # 16-bit pages: the width holds [tile, D]


def _places(sequence: SequenceCache, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Page and tile in it of tiles ``first .. first+count-1`` of the sequence."""
    per_page = PAGE_TOKENS // sequence.setup.regions.tile
    at = torch.arange(first, first + count, device=sequence.page_row.device)
    return sequence.page_row[at // per_page].long(), at % per_page


# --- full-precision slots ---------------------------------------------------------------------------------------------------


def slot_entries(sequence: SequenceCache) -> list[Entry]:
    """Full-precision slots with zeros where nothing is held, whatever lay there before."""
    slots = sequence.setup.arena.slot(sequence.slot)
    empty = slots["full_positions"] < 0
    slots |= {name: slots[name].masked_fill(empty[:, None, :, None], 0) for name in ("full_keys", "full_values")}
    slots["full_mass"] = slots["full_mass"].masked_fill(empty, 0)
    return [whole(name, tensor) for name, tensor in slots.items()]


def expect_slots(sequence: SequenceCache, file: Container) -> dict[str, Tensor]:
    """The file's full-precision slots by name, of the types and shapes this arena has: with as many for attention sinks."""
    ours = sequence.setup.regions.sinks
    if (theirs := file.header.get("sinks", ours)) != ours:
        raise SessionError(
            f"{file.path} was made with {theirs} attention sinks (--sinks), this run has {ours}: use the same, or another file"
        )
    slots = sequence.setup.arena.slot(sequence.slot)
    return {name: file.expect(name, tensor.dtype, tensor.shape) for name, tensor in slots.items()}


def write_slots(sequence: SequenceCache, slots: dict[str, Tensor]) -> None:
    """Copy the file's full-precision slots into the sequence's."""
    for name, target in sequence.setup.arena.slot(sequence.slot).items():
        target.copy_(slots[name])


def ids_entry(token_ids: Sequence[int]) -> Entry:
    """Token ids as they lie in a file."""
    return whole("token_ids", torch.tensor(token_ids, dtype=torch.int32))
