"""Prefix reuse: pages of a common beginning are shared, what follows them is right, memory is given back when short."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import arena_of, random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine.arena import Arena
from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError
from skvq.engine.filters import AttentionSinks, HeavyHitters, KeyOutliers, TokenIds
from skvq.engine.generate import Engine
from skvq.engine.layer_caches import DecodeBatch
from skvq.engine.report import Quiet
from skvq.kernels import reference

RULES = (AttentionSinks(3), TokenIds(frozenset({5, 6}), 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def engine_of(folder: Path, **options: object) -> Engine:
    given = {"max_context": 4000, "max_sequences": 3, "prefill": "streaming", "prefix_cache": True}
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
    held, wanted = (s.setup.arena.positions[:, s.slot, :15] for s in (again, reference))
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


def test_it_is_off_where_asked_and_where_a_rule_looks_ahead(folder: Path) -> None:
    off = engine_of(folder, prefix_cache=False)
    looking = tiny_engine(folder, tiny_cache(filters=(HeavyHitters(),)), max_context=2000, prefix_cache=True)
    again = off.with_cache(tiny_cache(filters=RULES))
    for engine in (off, looking, again):
        for _ in range(2):
            engine.prefill(random_ids(1400)).free()
        assert engine.timing.reused_tokens == 0
        assert "reused" not in engine.summary(engine.new_sequence()).line()
        assert engine.prefixes.pages == []


def test_it_is_on_by_default_for_texts_of_one_call_too(folder: Path) -> None:
    engine = Engine.load(
        folder, cache=tiny_cache(), max_context=2000, dummy_weights=True, backend="reference", device="cpu", report=Quiet()
    )
    book = random_ids(1400)
    engine.generate([book, [*book, 1], [*book, 2]], SamplingConfig(max_new_tokens=2))
    assert engine.timing.reused_tokens == 2 * 1280
    check(engine)


def filled_arena(folder: Path) -> tuple[Engine, SequenceCache]:
    """An engine whose pages are all in use by one sequence and by the prefix store beside it."""
    engine = engine_of(folder, max_sequences=2, max_context=3000)  # 3 + 2 pages
    engine.prefill(random_ids(2900, seed=9)).free()
    sequence = engine.prefill(random_ids(2900, seed=1))
    assert engine.parts.setup.arena.unused_pages == 0
    return engine, sequence


def test_what_only_the_store_holds_counts_as_free(folder: Path) -> None:
    engine, sequence = filled_arena(folder)
    arena = engine.parts.setup.arena
    assert arena.free_pages == arena.shape.pages - len(sequence.pages)
    twin = sequence.fork()
    assert arena.free_pages == arena.shape.pages - len(sequence.pages)
    twin.free()
    sequence.free()
    assert arena.free_pages == arena.shape.pages
    check(engine)


def test_a_fork_and_a_restored_session_get_pages_of_the_store(folder: Path, tmp_path: Path) -> None:
    engine, sequence = filled_arena(folder)
    twin = sequence.fork()
    engine.read(twin, random_ids(90, seed=5))  # copies the shared last page
    check(engine, sequence, twin)
    twin.truncate(1200)
    twin.save(tmp_path / "s")
    twin.free()
    engine.prefill(random_ids(1700, seed=6)).free()
    restored = engine.restore(tmp_path / "s")
    assert restored.length == 1200
    check(engine, sequence, restored)


def test_a_page_shared_with_the_store_alone_is_written_where_there_is_none_to_copy_to(folder: Path) -> None:
    """Without the store nothing would be copied: a full arena must not refuse what it would have granted."""
    engine = engine_of(folder, max_sequences=1, max_context=3000)
    sequence = engine.prefill(random_ids(2990))
    sequence.truncate(2000)  # into a page that the store holds; one page is free, one is needed
    engine.read(sequence, random_ids(990, seed=3))
    assert sequence.length == 2990
    check(engine, sequence)


def test_a_read_that_is_broken_off_or_refused_leaves_the_sequence_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder, prefill="exact")
    book = random_ids(3900)
    engine.prefill(book[:1500]).free()
    sequence, layer, calls = engine.new_sequence(), engine.parts.model.layer, []

    def breaking(*given: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return layer(*given)

    with monkeypatch.context() as patched:
        patched.setattr(engine.parts.model, "layer", breaking)
        with pytest.raises(KeyboardInterrupt):
            engine.read(sequence, book)
    assert (sequence.length, sequence.pages, sequence.token_ids) == (0, [], [])
    check(engine, sequence)
    with pytest.raises(CapacityError):
        engine.read(sequence, random_ids(4001))
    assert sequence.length == 0
    engine.read(sequence, book)
    assert engine.timing.reused_tokens >= 1280 and sequence.token_ids == book


def test_prompts_about_one_text_are_answered_together(folder: Path) -> None:
    """Whole pages that another holds are not needed again, whether it was forked or found by its tokens."""
    engine = tiny_engine(folder, tiny_cache(method="plain"), max_context=10_000, prefix_cache=True, backend="numba")
    book, sampling = random_ids(9400), SamplingConfig(max_new_tokens=8, ignore_eos=True)
    engine.prefill(book).free()
    most = 0
    with engine.batch(interleaved=False) as batch:
        requests = [batch.add([*book, *[n + 1] * 20], sampling) for n in range(3)]
        while len(batch):
            batch.step()
            most = max(most, len(batch.answering))
    assert most == 3 and batch.timing.reused_tokens == 3 * 7 * 1280
    assert [request.finish for request in requests] == ["length"] * 3


def test_without_a_window_one_token_is_left_to_read(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(window=0), max_context=4000, prefix_cache=True)
    engine.prefill(random_ids(2560)).free()
    engine.prefill(random_ids(2560)).free()
    assert (engine.timing.reused_tokens, engine.timing.prompt_tokens) == (1280, 1280)


def test_what_no_model_has_read_is_no_prefix(folder: Path) -> None:
    engine = engine_of(folder)
    sequence = engine.new_sequence()
    engine.fill(sequence, 1500)
    engine.read(sequence.fork(), [1])
    engine.read(sequence, [1])
    assert engine.prefixes.pages == []


def test_sixteen_bit_pages_give_the_same_answer(folder: Path) -> None:
    """Reuse then differs from reading everything only by rounding to 16 bits, which pages share with the window."""
    given = {"max_context": 2000, "max_sequences": 2}
    book = random_ids(1500)
    engine, plain = (tiny_engine(folder, tiny_cache(method="fp"), **given, prefix_cache=on) for on in (True, False))
    engine.prefill([*book[:1400], 3]).free()
    logits, wanted = (e.read(e.new_sequence(), book) for e in (engine, plain))
    assert (engine.timing.reused_tokens, plain.timing.reused_tokens) == (1280, 0)
    streamed = tiny_engine(folder, tiny_cache(method="fp"), **given, prefill="streaming")
    rounding = (streamed.read(streamed.new_sequence(), book) - wanted).abs().max()
    assert (logits - wanted).abs().max() <= 2 * rounding + 1e-6


def test_pages_are_shared_only_behind_those_they_were_written_behind(folder: Path) -> None:
    """Read in another way a text has other keys by rounding, so other tokens are kept: those of a reading go with its pages."""
    rules = (AttentionSinks(3), KeyOutliers(threshold=2.5, budget=200))
    engine = tiny_engine(folder, tiny_cache(filters=rules), max_context=4000, max_sequences=4, prefix_cache=True)
    book, arena = random_ids(3200), engine.parts.setup.arena
    engine.prefill(book[:1400]).free()  # read exactly: the first page
    second = engine.new_sequence()  # the same text in two turns, streamed: its own first page, and a second
    engine.read(second, book[:200])
    engine.read(second, book[200:3000])
    third = engine.prefill(book[:3000])
    assert engine.timing.reused_tokens == 1280 and second.pages[0] != third.pages[0]
    for layer in range(arena.shape.layers):
        held = arena.full(layer).positions[third.slot, : engine.parts.setup.regions.retained]
        run = engine.parts.setup.method._runs[layer][0]
        flagged = reference.read_heads(run.pages, run.codec, third.page_row, 0, third.packed)[2].nonzero()[:, 0]
        assert sorted(held[held >= 0].tolist()) == flagged.tolist()
    check(engine, second, third)


@pytest.mark.parametrize("where", ["reuse", "keep"])
def test_ctrl_c_while_pages_are_taken_over_or_kept_loses_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine, book = engine_of(folder), random_ids(3000)
    if where == "reuse":
        engine.prefill(book).free()
    sequence, share = engine.new_sequence(), Arena.share

    def asked(arena: Arena, page: int) -> None:
        share(arena, page)
        monkeypatch.setattr(Arena, "share", share)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Arena, "share", asked)
    with pytest.raises(KeyboardInterrupt):
        engine.read(sequence, book)
    assert sequence.length == (0 if where == "reuse" else 3000)
    check(engine, sequence)
    sequence.truncate(0)
    assert engine.read(sequence, book).isfinite().all() and engine.timing.reused_tokens == 2560
    sequence.free()
    check(engine)


def test_what_is_read_once_more_is_kept_where_its_beginning_was_not(folder: Path) -> None:
    """A sequence that has dropped its first page holds the second: of what is kept that alone could not be found again."""
    engine, ids = engine_of(folder, on_full="shift"), random_ids(3000)
    first = engine.prefill(ids)
    engine.read(first, random_ids(1500, seed=3))
    arena = engine.parts.setup.arena
    assert first.dropped == 1280 and len(engine.prefixes.pages) == 2
    arena.collect(arena.unused_pages + 1)
    assert engine.prefixes.pages == first.pages[:1]
    first.free()
    for reused in (0, 2560):
        with engine.prefill(ids) as again:
            assert again.timing.reused_tokens == reused and again.pages[:2] == engine.prefixes.pages[::-1]
            check(engine, again)


def test_what_was_pending_is_pending_when_a_read_behind_a_prefix_is_broken_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids = engine_of(folder), random_ids(3000)
    engine.prefill(ids).free()
    sequence = engine.prefill(ids[:1])
    sequence.take_back()
    assert (sequence.length, sequence.pending) == (0, ids[:1])
    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "commit", lambda *of: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.read(sequence, ids[1:])
    assert (sequence.length, sequence.pending) == (0, ids[:1])
    engine.read(sequence, ids[1:])
    assert sequence.token_ids == ids and sequence.timing.reused_tokens == 2560


def test_nothing_is_seen_of_a_step_that_was_broken_off_before_a_prefix_was_reused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has marked the slot of its token, which the few tokens behind a prefix need not overwrite."""
    engine, ids = tiny_engine(folder, tiny_cache(window=16), max_context=2000, prefix_cache=True), random_ids(1296)
    engine.prefill(ids).free()
    fresh, broken = engine.new_sequence(), engine.new_sequence()
    with monkeypatch.context() as patch:
        patch.setattr(DecodeBatch, "commit", lambda *of: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            engine.decode_step([broken], [7])
    assert torch.equal(*(engine.read(sequence, ids) for sequence in (fresh, broken)))
    assert broken.timing.reused_tokens == 1280 and broken.timing.prefill == "as decode steps"
    assert torch.equal(*(s.setup.arena.positions[:, s.slot] for s in (fresh, broken)))


def test_a_copy_of_retained_tokens_is_of_those_there_are(folder: Path) -> None:
    """A rule's budget is room that may never be used: for each page that is kept it took memory of the host."""
    cache = tiny_cache(filters=(AttentionSinks(3), TokenIds(frozenset({5, 6}), 1000)))
    options: dict[str, Any] = {"max_context": 4000, "max_sequences": 3, "prefill": "streaming"}
    engine = tiny_engine(folder, cache, **options, prefix_cache=True)
    book = [token if token > 6 else 7 for token in random_ids(1500)]
    book[10] = book[20] = 5
    engine.prefill(book).free()
    [entry] = engine.prefixes._entries.values()  # type: ignore[attr-defined]
    assert engine.parts.setup.regions.retained == 1003 and entry.retained["full_keys"].shape[2] == 5
    again, fresh = engine.prefill(book), tiny_engine(folder, cache, **options).prefill(book)
    assert engine.timing.reused_tokens == 1280
    assert torch.equal(*(s.setup.arena.positions[:, s.slot, :1003] for s in (again, fresh)))
