"""A few tokens appended to a sequence are decode steps of several tokens: the same answer as by streaming, much sooner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import arena_of, random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine import reading
from skvq.engine.cache import SequenceCache
from skvq.engine.filters import AttentionSinks, HeavyHitters
from skvq.engine.generate import Engine
from skvq.engine.prefill_form import SEGMENT_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")
CACHES = {
    "fp": {"method": "fp"},
    "rotate": {},
    "reorder": {"method": "reorder"},
    "mass": {"filters": (AttentionSinks(3), HeavyHitters(threshold=2.0))},
}


@pytest.fixture(scope="module", params=CACHES)
def engine(request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tiny_folder(tmp_path_factory.mktemp("model"), attention_spans=(2**31 - 1, 200), family="mistral")
    return tiny_engine(folder, tiny_cache(**CACHES[request.param]), backend=backend)


def streamed(engine: Engine, sequence: SequenceCache, ids: Sequence[int]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SHORT_TOKENS", 0)
        return engine.read(sequence, ids)


@pytest.mark.parametrize("length", [1, 100, 16 + 3 * 128 - 5, 1431])
@pytest.mark.parametrize("count", [1, 11, 128])
def test_it_says_what_streaming_says(engine: Engine, length: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of new keys and values to 16 bits, which streaming does after a chunk; where a tile is packed in the
    middle of the read, streaming gets the same chunks."""
    first, second = (engine.prefill(random_ids(length)) for _ in range(2))
    ids, room = random_ids(count, seed=1), first.ring_room
    found = engine.read(first, ids)
    for part in (ids[:room], ids[room:]):
        if part:
            wanted = streamed(engine, second, part)
    flips = 10 if count > room else 1  # a code may flip when a tile is packed in between
    assert (found - wanted).abs().max() < 5e-3 * flips
    assert (first.length, first.packed, first.token_ids) == (second.length, second.packed, second.token_ids)
    more = random_ids(3, seed=21)
    assert (steps(engine, [first], [more]) - steps(engine, [second], [more])).abs().max() < 5e-2
    engine.parts.setup.arena.check(arena_of(first, second))
    first.free()
    second.free()


@pytest.mark.parametrize("method", ["rotate", "reorder"])
@pytest.mark.parametrize("bits", [2.0, 1.5])
def test_streaming_behind_many_pages_says_what_a_step_says(backend: str, tmp_path: Path, method: str, bits: float) -> None:
    """More than one segment is unpacked, of tiles of either size."""
    folder = tiny_folder(tmp_path, num_layers=1, trained_context=20000)
    cache = tiny_cache(method=method, value_bits=bits)
    engine = tiny_engine(folder, cache, max_context=SEGMENT_TOKENS + 2000, max_sequences=2, backend=backend)
    sequence = engine.new_sequence()
    engine.fill(sequence, SEGMENT_TOKENS + 1400)
    assert sequence.packed > SEGMENT_TOKENS
    with sequence.fork() as fork:
        wanted = engine.decode_step([fork], [7])[0]
    found = streamed(engine, sequence, [7])
    assert (found - wanted).norm() < 5e-3 * wanted.norm() and sequence.timing.prefill == "streaming"


def test_it_is_what_single_steps_are(engine: Engine) -> None:
    """In one layer's arithmetic nothing differs but the order of sums."""
    first, second = (engine.prefill(random_ids(700)) for _ in range(2))
    ids = random_ids(30, seed=4)
    assert (engine.read(first, ids) - steps(engine, [second], [ids])[0, -1]).abs().max() < 1e-3
    first.free()
    second.free()


def test_long_texts_and_empty_sequences_are_read_as_before(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "short_prefill", lambda *args: pytest.fail("read as a short text"))
    sequence = engine.prefill(random_ids(5))
    engine.read(sequence, random_ids(reading.SHORT_TOKENS + 1))
    sequence.free()
