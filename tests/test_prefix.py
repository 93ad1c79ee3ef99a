"""Prefix reuse: pages of a common beginning are shared, what follows them is right, memory is given back when short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import arena_of, random_ids, steps, tiny_cache, tiny_engine, tiny_folder

from skvq.engine.config import SamplingConfig
from skvq.engine.filters import AttentionSinks, HeavyHitters, TokenIds
from skvq.engine.generate import Engine

RULES = (AttentionSinks(3), TokenIds(frozenset({5, 6}), 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def engine_of(folder: Path, **options: object) -> Engine:
    given = {"max_context": 4000, "max_sequences": 3, "prefix_cache": True, "prefill": "streaming"}
    return tiny_engine(folder, tiny_cache(filters=RULES), **(given | options))


def check(engine: Engine, *sequences: object) -> None:
    engine.parts.setup.arena.check({-1: engine.prefixes.pages, **arena_of(*sequences)})  # type: ignore[arg-type]


def test_a_common_beginning_is_read_once(folder: Path) -> None:
    engine = engine_of(folder)
    book = random_ids(3000)
    first = engine.prefill([*book, 1, 2, 3])
    assert engine.timing.reused_tokens == 0
    second = engine.prefill([*book, 7, 8])
    assert engine.timing.reused_tokens == 2560
    assert engine.timing.prompt_tokens == 442
    assert "reused 2,560 tokens, read 442" in engine.summary(second).line()
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    check(engine, first, second)
    more = random_ids(3, seed=4)
    assert steps(engine, [second], [more]).isfinite().all()
    assert second.token_ids == [*book, 7, 8, *more]


def test_a_reused_beginning_holds_the_same_bytes_and_retained_tokens(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder)
    book = random_ids(2800)
    whole = engine.prefill(book)
    donor_pages = list(whole.pages)
    whole.free()
    again = engine.prefill(book[:1500])
    assert engine.timing.reused_tokens == 1280
    assert again.pages[0] == donor_pages[0]
    fresh = engine_of(folder, prefix_cache=False)
    reference = fresh.prefill(book[:1500])
    held, wanted = (s.setup.arena.tensors["full_positions"][:, s.slot, :15] for s in (again, reference))
    assert torch.equal(held, wanted)
    keys, expected = (s.setup.arena.tensors["full_keys"][:, s.slot, :, :15] for s in (again, reference))
    seen = wanted < 1280
    assert torch.equal(keys.transpose(1, 2)[seen], expected.transpose(1, 2)[seen])
    for layer in range(2):
        stored, right = (s.stage(layer, 0, 1280) for s in (again, reference))
        assert all(torch.equal(a, b) for a, b in zip(stored, right, strict=True))
    check(engine, again)


def test_what_must_lie_in_the_window_is_not_reused(folder: Path) -> None:
    engine = engine_of(folder)
    book = random_ids(1500)
    engine.prefill(book).free()
    engine.prefill(book[:1295]).free()
    assert engine.timing.reused_tokens == 0
    engine.prefill(book[:1296]).free()
    assert engine.timing.reused_tokens == 1280


def test_another_beginning_shares_nothing(folder: Path) -> None:
    engine = engine_of(folder)
    book = random_ids(2700)
    engine.prefill(book).free()
    changed = [(book[0] + 1) % 320, *book[1:]]
    engine.prefill(changed).free()
    assert engine.timing.reused_tokens == 0
    late = [*book[:2000], (book[2000] + 1) % 320, *book[2001:]]
    engine.prefill(late).free()
    assert engine.timing.reused_tokens == 1280


def test_pages_are_given_back_when_the_arena_runs_short(folder: Path) -> None:
    engine = engine_of(folder, max_sequences=1)  # pages for one sequence of 4,000 tokens
    for seed in range(4):
        sequence = engine.prefill(random_ids(3900, seed=seed))
        check(engine, sequence)
        sequence.free()
        check(engine)
    engine.prefill(random_ids(3900, seed=3)).free()
    assert engine.timing.reused_tokens == 3840


def test_writing_after_a_reused_beginning_leaves_it_as_it_was(folder: Path) -> None:
    engine = engine_of(folder)
    book = random_ids(1400)
    first = engine.prefill(book)
    second = engine.prefill(book)
    before = [t.clone() for t in first.stage(0, 0, 1280)]
    second.truncate(700)
    engine.read(second, random_ids(900, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(before, first.stage(0, 0, 1280), strict=True))
    check(engine, first, second)


def test_the_next_turn_reuses_question_and_answer(folder: Path) -> None:
    engine = engine_of(folder)
    text = random_ids(1270)
    sequence = engine.new_sequence()
    list(engine.stream(text, SamplingConfig(max_new_tokens=40, ignore_eos=True), sequence=sequence))
    answer = [*sequence.token_ids, *sequence.pending]
    sequence.free()
    engine.prefill([*answer, 9]).free()
    assert engine.timing.reused_tokens == 1280


def test_it_is_off_by_default_and_where_a_rule_looks_ahead(folder: Path) -> None:
    default = engine_of(folder, prefix_cache=False)
    looking = tiny_engine(folder, tiny_cache(filters=(HeavyHitters(),)), max_context=2000, prefix_cache=True)
    for engine in (default, looking):
        for _ in range(2):
            engine.prefill(random_ids(1400)).free()
        assert engine.timing.reused_tokens == 0
        assert "reused" not in engine.summary(engine.new_sequence()).line()
        assert engine.prefixes.pages == []
