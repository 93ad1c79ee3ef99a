"""Pages, slots and a sequence's life: what is shared, what is copied, what is given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attending import SAME, SINKS, WINDOW, Engines, apart, decode, defined, exact, stream, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import arena_of, bytes_of, random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.errors import CapacityError, OptionError
from skvq.engine.filters import AttentionSinks, TokenIds
from skvq.engine.generate import Engine
from skvq.engine.stress import append
from skvq.kernels.layout import PAGE_TOKENS, pages_for

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["fp", "rotate K2V2", "reorder K2V1.5"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _no_test_inherits_sequences(engines: Engines) -> Iterator[None]:
    """A test that failed may have left sequences alive: their engine is made anew."""
    yield
    for name, engine in list(engines.items()):
        if len(engine.parts.setup.arena._free_sequences) < 4:
            del engines[name]


def all_free(engine: Engine) -> bool:
    arena = engine.parts.setup.arena
    arena.check({})
    return arena.free_pages == arena.shape.pages and len(arena._free_sequences) == arena.shape.sequences


# --- a sequence without a model: tokens that can be recognized --------------------------------------------------------------


def numbers(ids: list[int], start: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Keys and values [layers, T, KH, D] that say which token they are of and where it stands, exact in 16 bits."""
    layers, heads, size = shape
    at = torch.arange(start, start + len(ids))
    x = torch.stack([torch.tensor(ids, dtype=torch.int64), at % 2048], 1).float()[None, :, None].expand(layers, -1, heads, -1)
    return x[..., :1].expand(-1, -1, -1, size), x[..., 1:].expand(-1, -1, -1, size)


def feed(sequence: SequenceCache, ids: list[int]) -> None:
    """Cache tokens as a forward pass would."""
    shape = sequence.setup.arena.shape
    append(sequence, *numbers(ids, sequence.length, (shape.layers, shape.kv_heads, shape.head_size)), ids)


def holds(sequence: SequenceCache, ids: list[int]) -> None:
    """Assert that the sequence caches exactly these tokens, each in its place, in every layer."""
    shape = sequence.setup.arena.shape
    assert (sequence.length, sequence.token_ids) == (len(ids), ids)
    assert len(sequence.pages) >= pages_for(sequence.packed)
    wanted = numbers(ids, 0, (shape.layers, shape.kv_heads, shape.head_size))
    for layer in range(shape.layers):
        near = sequence.window(layer, sequence.length)[:2]
        far = sequence.stage(layer, 0, sequence.packed) if sequence.packed else [t[:0] for t in near]
        for side in (0, 1):
            assert torch.equal(torch.cat([far[side].float(), near[side].float()]), wanted[side][layer])


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["new", "feed", "feed", "feed", "fork", "truncate", "free"]),
        st.integers(0, 3),
        st.integers(1, 400),
        st.integers(0, 100),
    ),
    min_size=5,
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(actions=ACTIONS)
def test_any_life_keeps_every_token_and_loses_no_page(engines: Engines, actions: list[tuple[str, int, int, int]]) -> None:
    """Forks, truncations and steps in any order: each sequence holds its own text, pages balance, errors change nothing."""
    engine = engines["fp"]
    setup = engine.parts.setup
    alive: list[tuple[SequenceCache, list[int]]] = []
    try:
        for action, which, count, share in actions:
            try:
                if action == "new" or not alive:
                    alive.append((SequenceCache(setup), []))
                    continue
                sequence, ids = alive[which % len(alive)]
                if action == "feed":
                    more = random_ids(count, seed=share)
                    feed(sequence, more)
                    ids.extend(more)
                elif action == "fork":
                    alive.append((sequence.fork(), list(ids)))
                elif action == "truncate":
                    del ids[len(ids) * share // 100 :]
                    sequence.truncate(len(ids))
                else:
                    sequence.free()
                    alive.remove((sequence, ids))
            except CapacityError:
                pass
            setup.arena.check(arena_of(*(s for s, _ in alive)))
        for sequence, ids in alive:
            holds(sequence, ids)
    finally:
        for sequence, _ in alive:
            sequence.free()
    assert all_free(engine)


# --- forks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count", [*((n, c) for n in METHODS for c in (7, WINDOW + 160 + 157)), (METHODS[1], 1280 + WINDOW + 120)]
)
def test_a_fork_goes_on_as_a_fresh_prefill_would(engines: Engines, name: str, count: int) -> None:
    engine = engines[name]
    text, left, right = trace(engine, count), trace(engine, 23, seed=1), trace(engine, 23, seed=2)
    parent = engine.new_sequence()
    exact(engine, parent, text)
    free = engine.parts.setup.arena.free_pages
    twin = parent.fork()
    assert engine.parts.setup.arena.free_pages == free, "a fork takes no page before it writes"
    packed = parent.packed
    kept = bytes_of(parent, packed)
    ours = stream(engine, twin, right), decode(engine, [parent], [left])
    for sequence in (parent, twin):
        assert all(torch.equal(a, b) for a, b in zip(kept, bytes_of(sequence, packed), strict=True))
    engine.parts.setup.arena.check(arena_of(parent, twin))
    for old, new in ((parent, left), (twin, right)):
        assert old.token_ids == text.ids + new.ids
    parent.free(), twin.free()
    for read, new, found in ((stream, right, ours[0]), (None, left, ours[1])):
        fresh = engine.new_sequence()
        exact(engine, fresh, text)
        again = stream(engine, fresh, new) if read else decode(engine, [fresh], [new])
        assert torch.equal(again, found)
        fresh.free()
    assert all_free(engine)


def test_copy_on_write_copies_one_page_and_leaves_the_twin(engines: Engines) -> None:
    engine = engines["rotate K2V2"]
    text = trace(engine, 1280 + WINDOW + 128 + 120)
    parent = engine.new_sequence()
    exact(engine, parent, text)
    twin = parent.fork()
    before = bytes_of(parent, parent.packed)
    decode(engine, [twin], [trace(engine, 20, seed=3)])
    assert twin.packed == parent.packed + 128
    assert twin.pages[0] == parent.pages[0] and twin.pages[1] != parent.pages[1]
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of(parent, parent.packed), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of(twin, parent.packed), strict=True))
    parent.free()
    engine.parts.setup.arena.check(arena_of(twin))
    twin.free()
    assert all_free(engine)


def test_a_whole_shared_page_is_never_copied(engines: Engines) -> None:
    engine = engines["rotate K2V2"]
    parent = engine.new_sequence()
    exact(engine, parent, trace(engine, 1280 + WINDOW + 127))
    assert parent.packed == 1280
    twin = parent.fork()
    decode(engine, [twin], [trace(engine, 1)])
    assert twin.pages[0] == parent.pages[0] and len(twin.pages) == 2 and len(parent.pages) == 1
    parent.free(), twin.free()


# --- truncation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, SINKS, WINDOW, 127, 128, 129, 255, 300, 384, 390, 413, 414])
@pytest.mark.parametrize("name", ["fp", "rotate K2V2"])
def test_truncation_equals_a_fresh_prefill(engines: Engines, name: str, length: int) -> None:
    """Packed tiles that stay keep their bytes. Tokens of the window go on exactly, those of a cut tile as they were packed."""
    engine = engines[name]
    text, more = trace(engine, WINDOW + 3 * 128 + 14), trace(engine, 200, seed=1)
    sequence, fresh = engine.new_sequence(), engine.new_sequence()
    exact(engine, sequence, text)
    packed = sequence.packed
    assert (packed, len(text)) == (384, 414)
    stored = sequence.stage(0, 0, packed)
    sequence.truncate(length)
    assert sequence.length == length and sequence.token_ids == text.ids[:length]
    assert sequence.packed == min(packed, length // 128 * 128)
    if length:
        exact(engine, fresh, text[:length])
    kept = min(sequence.packed, fresh.packed)
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(sequence, kept), bytes_of(fresh, kept), strict=True))
    keys, values, _ = sequence.window(0, length)
    cut = slice(sequence.packed, min(length, packed))
    assert torch.equal(keys[: cut.stop - cut.start], stored[0][cut].half())
    assert torch.equal(values[: cut.stop - cut.start], stored[1][cut].half())
    if name == "fp":
        assert apart(decode(engine, [sequence], [more])[0], decode(engine, [fresh], [more])[0]) <= SAME
    if length == len(text):
        assert torch.equal(decode(engine, [sequence], [more]), decode(engine, [fresh], [more]))
    sequence.free(), fresh.free()
    assert all_free(engine)


def test_tokens_of_a_cut_tile_are_rounded_at_most_twice(engines: Engines) -> None:
    """They go back into the window as they were packed and are packed again: at most twice the square error."""
    engine = engines["rotate K2V2"]
    text = trace(engine, 460)
    precise = defined(engines["fp"], text, [], 0)
    uncut = engine.new_sequence()
    exact(engine, uncut, text[:414])
    twin = uncut.fork()
    twin.truncate(340)
    assert (uncut.packed, twin.packed) == (384, 256)
    a, b = (decode(engine, [s], [text[s.length :]])[0][-46:] for s in (uncut, twin))
    error, twice = ((x - precise[-46:]).square().mean() for x in (a, b))
    assert twin.packed == 384 and twice <= 2 * error
    uncut.free(), twin.free()


def test_a_cut_gives_retained_slots_back_to_later_tokens(tmp_path: Path) -> None:
    rules = (AttentionSinks(3), TokenIds(frozenset({7}), budget=4))
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(filters=rules))
    ids = [8] * 600
    for at in (50, 200, 201, 202, 300):
        ids[at] = 7
    sequence = engine.new_sequence()
    engine.read(sequence, ids)

    def retained() -> list[int]:
        held = sequence.setup.arena.full(0).positions[sequence.slot, :7]
        return sorted(held[held >= 0].tolist())

    assert retained() == [0, 1, 2, 50, 200, 201, 202], "the budget of 4 ends before 300"
    sequence.truncate(201)
    assert sequence.packed == 128 and retained() == [0, 1, 2, 50]
    steps(engine, [sequence], [[7 if at == 230 else 8 for at in range(201, 500)]])
    assert retained() == [0, 1, 2, 50, 200, 230]
    sequence.truncate(0)
    assert retained() == [] and sequence.nbytes == 0
    sequence.free()


@pytest.mark.parametrize("length", [-1, 31])
def test_truncation_to_where_there_is_nothing_is_refused(engines: Engines, length: int) -> None:
    sequence = engines["fp"].new_sequence()
    exact(engines["fp"], sequence, trace(engines["fp"], 30))
    with pytest.raises(OptionError, match="30 tokens"):
        sequence.truncate(length)
    sequence.free()


# --- limits ------------------------------------------------------------------------------------------------------------------


def test_no_page_left_is_said_before_anything_changes(tmp_path: Path) -> None:
    """Four pages for the longest sequence and two for each other: seven are in use and two more are asked for."""
    engine = tiny_engine(tiny_folder(tmp_path, num_layers=1), tiny_cache(), max_context=4000, max_sequences=3)
    arena = engine.parts.setup.arena
    sequences = [engine.new_sequence() for _ in range(3)]
    for sequence, count in zip(sequences, (1500, 1500, 2800), strict=True):
        feed(sequence, random_ids(count))
    pages, free = list(sequences[0].pages), arena.free_pages
    before = {name: t.clone() for name, t in arena.tensors.items()}
    lengths = [s.length for s in sequences]
    assert free == 1
    with pytest.raises(CapacityError, match=f"of {arena.shape.pages} pages"):
        sequences[0].reserve(2500)
    assert sequences[0].pages == pages and arena.free_pages == free and [s.length for s in sequences] == lengths
    assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in arena.tensors.items())
    arena.check(arena_of(*sequences))


def test_a_sequence_too_many_is_refused_and_a_freed_slot_is_used_again(engines: Engines) -> None:
    engine = engines["fp"]
    sequences = [engine.new_sequence() for _ in range(4)]
    with pytest.raises(CapacityError, match="all 4 sequence slots"):
        sequences[0].fork()
    sequences[1].free()
    sequences[1].free()  # twice is once
    engine.new_sequence().free()
    for sequence in sequences:
        sequence.free()
    assert all_free(engine)


def test_a_new_sequence_sees_nothing_of_the_one_before_it_in_its_slot(engines: Engines) -> None:
    engine = engines["rotate K2V2"]
    text = trace(engine, 170)
    first = engine.new_sequence()
    exact(engine, first, trace(engine, 333, seed=9))
    slot = first.slot
    first.free()
    second = engine.new_sequence()
    assert second.slot == slot and second.nbytes == 0
    assert apart(decode(engine, [second], [text])[0], defined(engine, text, [], SINKS)) <= SAME
    second.free()


def test_nbytes_counts_packed_tokens_window_and_retained(engines: Engines) -> None:
    engine = engines["rotate K2V2"]
    shape, layout = engine.parts.setup.arena.shape, engine.parts.setup.method._runs[0][0].pages.layout
    sequence = engine.new_sequence()
    exact(engine, sequence, trace(engine, WINDOW + 256 + 19))
    token = 2 * shape.kv_heads * shape.head_size  # elements
    assert sequence.nbytes == shape.layers * (256 * layout.bytes_per_token + (WINDOW + 19 + SINKS) * 2 * token)
    assert sequence.bits_per_element == pytest.approx(8 * sequence.nbytes / (shape.layers * token * sequence.length))
    sequence.free()


def test_six_thousand_tokens_of_smollm2_are_packed_as_small_as_promised(tmp_path: Path) -> None:
    """30 layers, 3 kv heads of 64, groups of 64, window 128, 5 sinks: 5.5 times at K2V2, 6 at K2V1.5, all counted."""
    smollm = {"num_layers": 30, "num_heads": 3, "num_kv_heads": 3, "head_size": 64, "trained_context": 8192}
    folder = tiny_folder(tmp_path, **smollm)
    for value_bits, least in ((2.0, 5.5), (1.5, 6.0)):
        cache = tiny_cache(method="plain", value_bits=value_bits, group_size=64, window=128, filters=(AttentionSinks(5),))
        engine = tiny_engine(folder, cache, max_context=6000, max_sequences=1)
        sequence = engine.new_sequence()
        feed(sequence, random_ids(6000))
        assert 16 / sequence.bits_per_element >= least
        assert sequence.length == 6000 and PAGE_TOKENS * len(sequence.pages) >= sequence.packed
