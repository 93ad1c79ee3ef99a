"""A step broken off in the middle of its layers leaves the sequence as it was, and usable."""

from __future__ import annotations

import contextlib
import gc
import signal
from typing import Any

import pytest
import torch
from tiny import arena_of, bytes_of, random_ids, steps, tiny_cache, tiny_engine, tiny_folder

from skvq.engine import prefill as prefill_module
from skvq.engine.arena_shape import SLOT_TENSORS
from skvq.engine.cache import SequenceCache
from skvq.engine.filters import AttentionSinks, HeavyHitters, KeyOutliers
from skvq.engine.generate import Engine
from skvq.engine.interrupts import uninterrupted
from skvq.engine.methods import CacheMethod

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = (AttentionSinks(3), KeyOutliers(threshold=3.0), HeavyHitters(threshold=2.0))
CACHES = {"rotate": tiny_cache(filters=RULES), "reorder": tiny_cache(method="reorder"), "fp": tiny_cache(method="fp")}


@pytest.fixture(scope="module", params=CACHES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tiny_folder(tmp_path_factory.mktemp("model")), CACHES[request.param])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_module, "CHUNK_TOKENS", 200)


def break_off(engine: Engine, after: int, call: Any) -> None:
    """``call``, interrupted as by Ctrl-C in the model's layer number ``after``."""
    layer, calls = engine.parts.model.layer, [0]

    def breaking(*args: Any) -> torch.Tensor:
        if calls[0] == after:
            raise KeyboardInterrupt
        calls[0] += 1
        return layer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.model, "layer", breaking)
        with pytest.raises(KeyboardInterrupt):
            call()


def state(sequence: SequenceCache) -> list[Any]:
    """Everything a sequence consists of."""
    tensors = sequence.setup.arena.tensors
    held = tensors["full_positions"][:, sequence.slot] >= 0
    slots = [tensors[name][:, sequence.slot].clone() for name in SLOT_TENSORS]
    slots = [t.masked_fill(~(held if t.dim() == 2 else held[:, None, :, None]), 0) for t in slots]
    lengths = [sequence.length, sequence.packed, list(sequence.token_ids), list(sequence.pending)]
    return [*lengths, *slots, *bytes_of(sequence, sequence.packed)]


def free(*sequences: SequenceCache) -> None:
    for sequence in sequences:
        sequence.free()


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_streaming_read_keeps_the_chunks_that_were_finished(engine: Engine, after: int) -> None:
    """Chunks of 200 tokens in two layers: the third call is the second chunk's first layer."""
    sequence, twin = (engine.prefill(random_ids(450)) for _ in range(2))
    more = random_ids(450, seed=5)
    break_off(engine, after, lambda: engine.read(sequence, more))
    done = after // 2 * 200
    if done:
        engine.read(twin, more[:done])
    assert same(state(sequence), state(twin))
    assert torch.equal(engine.read(sequence, more[done:]), engine.read(twin, more[done:]))
    assert same(state(sequence), state(twin))
    engine.parts.setup.arena.check(arena_of(sequence, twin))
    free(sequence, twin)


def test_an_exact_read_leaves_an_empty_sequence(engine: Engine) -> None:
    sequence, twin = engine.new_sequence(), engine.new_sequence()
    ids = random_ids(450)
    break_off(engine, 4, lambda: engine.read(sequence, ids))
    assert sequence.length == 0 and not (engine.parts.setup.arena.positions[:, sequence.slot] >= 0).any()
    assert torch.equal(engine.read(sequence, ids), engine.read(twin, ids))
    assert same(state(sequence), state(twin))
    free(sequence, twin)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_step_of_several_is_one(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Packing the second sequence's window fails, after the first one's: none has the token."""
    tile = engine.parts.setup.regions.tile
    lengths = (16 + 2 * tile - 1, 16 + 2 * tile - 1)  # the next token of both fills a tile
    ours, twins = ([engine.prefill(random_ids(n)) for n in lengths] for _ in range(2))
    method, calls = type(engine.parts.setup.method), [0]
    pack = method.pack

    def breaking(self: CacheMethod, *args: Any) -> None:
        pack(self, *args)
        calls[0] += 1
        if calls[0] == 3:  # of two layers each
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(method, "pack", breaking)
        with pytest.raises(error):
            engine.decode_step(ours, [7, 8])
    assert [s.length for s in ours] == list(lengths)
    for _ in range(2):
        assert torch.equal(*(engine.decode_step(group, [7, 8]) for group in (ours, twins)))
    assert all(same(state(a), state(b)) for a, b in zip(ours, twins, strict=True))
    free(*ours, *twins)


def test_ctrl_c_is_not_lost_beside_an_error() -> None:
    @uninterrupted()
    def failing() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        failing()
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("what", ["take_back", "fork", "free", "new_sequence"])
def test_ctrl_c_comes_after_what_moves_pages(engine: Engine, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Interrupted at each call of a method of the arena: no page, place or token is lost."""
    arena = engine.parts.setup.arena
    for at in range(1, 9):
        sequence, calls = engine.new_sequence(), [0]
        engine.fill(sequence, 1500)
        ids = list(sequence.token_ids)

        def counted(method: Any, at: int = at, calls: list[int] = calls) -> Any:
            def call(*args: Any) -> Any:
                calls[0] += 1
                if calls[0] == at:
                    signal.raise_signal(signal.SIGINT)
                return method(*args)

            return call

        with monkeypatch.context() as patch:
            for name in ("share", "release", "release_sequence", "new_sequence", "copy_slot", "full"):
                patch.setattr(arena, name, counted(getattr(arena, name)))
            with contextlib.suppress(KeyboardInterrupt):
                (engine.new_sequence if what == "new_sequence" else getattr(sequence, what))()
        if sequence.alive:
            assert [*sequence.token_ids, *sequence.pending] == ids
            sequence.free()
        gc.collect()
        arena.check({})
        assert arena.free_sequences == arena.shape.sequences


@pytest.mark.parametrize("where", ["layer", "packing"])
def test_a_decode_step_can_be_taken_again(engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    tile = engine.parts.setup.regions.tile
    sequence, twin = (engine.prefill(random_ids(16 + 2 * tile - 1)) for _ in range(2))  # the next token fills a tile
    if where == "layer":
        break_off(engine, 1, lambda: steps(engine, [sequence], [[7]]))
    else:
        method = type(engine.parts.setup.method)
        pack = method.pack

        def breaking(self: CacheMethod, layer: int, *args: Any) -> None:
            pack(self, layer, *args)
            if layer == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(method, "pack", breaking)
            with pytest.raises(KeyboardInterrupt):
                steps(engine, [sequence], [[7]])
    assert torch.equal(steps(engine, [sequence], [[7, 8, 9]]), steps(engine, [twin], [[7, 8, 9]]))
    assert same(state(sequence), state(twin))
    free(sequence, twin)


def test_a_cut_for_which_there_is_no_memory_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = engine.prefill(random_ids(700))
    before, method = state(sequence), engine.parts.setup.method
    unpack = method.unpack

    def short(layer: int, *args: Any) -> Any:
        if layer == 1:
            raise torch.OutOfMemoryError("no memory left")
        return unpack(layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(method, "unpack", short)
        with pytest.raises(torch.OutOfMemoryError):
            sequence.truncate(300)
    assert same(before, state(sequence))
    sequence.truncate(300)
    assert sequence.length == 300
    free(sequence)
