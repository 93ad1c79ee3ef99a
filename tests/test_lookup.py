"""Prompt lookup: guesses come from the text, and an answer with guesses is the answer without."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import arena_of, random_ids, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine.answer import Answer, guesses_of
from skvq.engine.cache import SequenceCache
from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.decode import EagerStep
from skvq.engine.errors import ModelError, OptionError
from skvq.engine.filters import HeavyHitters
from skvq.engine.generate import Engine
from skvq.engine.lookup import MATCH, MOST_MISSES, Lookup

pytestmark = pytest.mark.usefixtures("one_thread")
CACHES = {
    "rotate": tiny_cache(key_bits=3),
    "reorder": tiny_cache(method="reorder"),
    "plain K1.5": tiny_cache(method="plain", key_bits=1.5),
    "fp": tiny_cache(method="fp"),
}


@given(begin=st.lists(st.integers(0, 3), max_size=30), rest=st.lists(st.integers(0, 3), max_size=30))
def test_it_guesses_what_followed_the_latest_occurrence(begin: list[int], rest: list[int]) -> None:
    text, lookup = list(begin), Lookup(begin, 4)
    for token in rest:
        text.append(token)
        lookup.push(token)
        ends = [at for at in range(MATCH, len(text)) if text[at - MATCH : at] == text[-MATCH:]]
        wanted = (text[ends[-1] :] * 5)[:5] if ends else []
        assert lookup.guess(5) == wanted


def test_after_each_miss_it_waits_twice_as_long_until_that_is_made_up_for() -> None:
    lookup, waits = Lookup([1, 2, 3] * 5, 4), []
    lookup.push(1)
    for _ in range(MOST_MISSES + 2):
        waits.append(next(n for n in range(99) if lookup.guess(1)))
        lookup.tell(0)
    assert waits == [0, 1, 3, 7, 15, 31, 31]
    assert [bool(lookup.guess(1)) for _ in range(32)] == [False] * 31 + [True]
    lookup.tell(3)
    assert [bool(lookup.guess(1)) for _ in range(4)] == [False] * 3 + [True]
    lookup.tell(2)
    assert lookup.guess(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("lookup") / "model")


def engine_of(folder: Path, cache: CacheConfig, **options: Any) -> Engine:
    return tiny_engine(folder, cache, **({"backend": "numba", "max_context": 900} | options))


@pytest.fixture(scope="module", params=CACHES)
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return engine_of(folder, CACHES[request.param])


def foretold(monkeypatch: pytest.MonkeyPatch, texts: list[list[int]], wrong: float) -> None:
    """Guesses are what the texts hold, but for one token in ``1 / wrong``, whatever else lookups would have found."""
    rng = random.Random(5)

    def guess(self: Lookup, count: int) -> list[int]:
        begun = self._ids
        text = next(t for t in texts if t[: len(begun)] == begun)
        coming = [*text[len(begun) :], *[0] * count][:count]
        return [rng.randrange(320) if rng.random() < wrong else token for token in coming]

    monkeypatch.setattr(Lookup, "guess", guess)


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_p": 0.95, "seed": 3},
    "penalty": {"temperature": 0.5, "repeat_penalty": 1.3, "top_k": 50},
    "end tokens": {"temperature": 1.5, "ignore_eos": False, "max_new_tokens": 700},
    "stop": {"temperature": 1.5, "stop": ["a", "Z"], "max_new_tokens": 700},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_answer_with_guesses_is_the_answer_without(engine: Engine, monkeypatch: pytest.MonkeyPatch, sampling: str) -> None:
    """Text, tokens, what is pending and how it ended; over three tiles, and in the answer that goes on from there."""
    config: dict[str, Any] = {"max_new_tokens": 400, "ignore_eos": True} | SAMPLINGS[sampling]
    for wrong in (0.0, 0.3):
        found = []
        for count in (0, 4):
            with engine.prefill(random_ids(90)) as sequence, monkeypatch.context() as patch:
                if count:
                    foretold(patch, [found[0][0] + found[0][1]], wrong)
                first = "".join(engine.stream("", SamplingConfig(**config, prompt_lookup=count), sequence=sequence))
                finish, guessed = sequence.timing.finish, sequence.timing.guessed_tokens
                assert sequence.timing.decoded_tokens == sequence.timing.new_tokens - 1
                after = list(sequence.token_ids), list(sequence.pending)
                more = "".join(engine.stream("", SamplingConfig(max_new_tokens=20, ignore_eos=True), sequence=sequence))
                engine.parts.setup.arena.check(arena_of(sequence))
                found.append((*after, first, finish, more))
        assert found[0] == found[1]
        new = len(found[0][0]) - 90
        assert guessed > 0.4 * new or new < 12, (guessed, new)


def written(
    engine: Engine, prompts: list[list[int]], config: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[list[int]]]:
    """The answers to prompts, and all tokens of each sequence."""
    kept: list[list[int]] = []
    free = SequenceCache.free

    def freed(self: SequenceCache) -> None:
        kept.append([*self.token_ids, *self.pending])
        free(self)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "free", freed)
        return engine.generate(prompts, config), kept


def test_answers_decoded_together_guess_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_ids(n, seed=n) for n in (30, 60, 90, 45)]
    config = SamplingConfig(max_new_tokens=150, temperature=0.8, ignore_eos=True)
    wanted, kept = written(engine, prompts, config, monkeypatch)
    foretold(monkeypatch, kept, 0.2)
    assert engine.generate(prompts, replace(config, prompt_lookup=3)) == wanted
    assert engine.timing.guessed_tokens > 200


@pytest.mark.parametrize(("count", "guessed"), [(1, 15), (4, 15), (8, 7), (20, 2), (33, 0), (70, 0)])
def test_many_answers_have_few_guesses_each(count: int, guessed: int) -> None:
    """A step has at most 64 tokens where some are guessed: their logits are planned for."""

    class Guessing:
        config = SamplingConfig(prompt_lookup=15)

        def has_room(self, count: int) -> bool:
            return True

        def guess(self, count: int, *, free: bool = False) -> list[int]:
            return [7] * count

    assert guesses_of([Guessing() for _ in range(count)]) == [[7] * guessed for _ in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("row", [0, 1])
def test_an_answer_that_fails_takes_no_other_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """Its logits are no numbers, after its own token or after its first guess; the others keep what they have drawn."""
    engine = engine_of(folder, CACHES["rotate"], max_sequences=3)
    monkeypatch.setattr(engine, "step", EagerStep(engine.parts.model, engine.parts.rope, engine.parts.setup))
    sampling = SamplingConfig(max_new_tokens=30, ignore_eos=True)
    prompts = [random_ids(20, seed=seed) for seed in range(3)]
    wanted, texts = written(engine, prompts, sampling, monkeypatch)
    foretold(monkeypatch, texts, 0.0)
    head = engine.parts.model.head

    def broken(x: Tensor) -> Tensor:
        logits = head(x).clone()
        logits.view(-1, logits.shape[-1])[row] = torch.nan
        return logits

    with engine.batch() as batch:
        requests = [batch.add(prompt, replace(sampling, prompt_lookup=3)) for prompt in prompts]
        for _ in range(3):
            batch.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.parts.model, "head", broken)
            with pytest.raises(ModelError, match="logits is nan"):
                batch.step()
        while len(batch):
            batch.step()
    assert [request.finish for request in requests] == ["failed", "length", "length"]
    assert [request.text for request in requests[1:]] == wanted[1:]
    engine.parts.setup.arena.check({})


def test_an_answer_interrupted_in_the_middle_of_its_tokens_is_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the second of the tokens of a step: what of it was shown cannot be told. The other answer goes on."""
    engine = engine_of(folder, CACHES["rotate"])
    sampling = SamplingConfig(max_new_tokens=30, ignore_eos=True)
    prompts = [random_ids(20, seed=seed) for seed in range(2)]
    wanted, texts = written(engine, prompts, sampling, monkeypatch)
    foretold(monkeypatch, texts, 0.0)
    push = Answer._push

    def interrupted(self: Answer, token: int, told: list[float]) -> None:
        if self is requests[1].answer and self.count == 3:
            monkeypatch.setattr(Answer, "_push", push)
            signal.raise_signal(signal.SIGINT)
        push(self, token, told)

    with engine.batch() as batch:
        requests = [batch.add(prompt, replace(sampling, prompt_lookup=3)) for prompt in prompts]
        batch.step()
        batch.step()
        monkeypatch.setattr(Answer, "_push", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.step()
        while len(batch):
            batch.step()
    assert [request.finish for request in requests] == ["length", "failed"] and requests[0].text == wanted[0]
    engine.parts.setup.arena.check({})


def test_text_that_repeats_itself_takes_fewer_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is foretold here: a greedy answer of a model of random weights falls into a loop."""
    engine = engine_of(folder, CACHES["fp"])
    run, taken = engine.step.run, []
    monkeypatch.setattr(engine.step, "run", lambda sequences, ids: taken.append(len(ids)) or run(sequences, ids))
    text, config = random_ids(20) * 4, {"max_new_tokens": 300, "ignore_eos": True, "repeat_penalty": 0.5}
    wanted = engine.generate(text, SamplingConfig(**config))
    assert taken == [1] * 299
    taken.clear()
    assert engine.generate(text, SamplingConfig(**config, prompt_lookup=5)) == wanted
    assert set(taken) == {1, 6} and len(taken) < 200


def test_a_full_context_and_the_last_pages_end_it_as_without(folder: Path) -> None:
    """Guesses take no page, and no place in the context, that the answer would not."""
    engine = engine_of(folder, CACHES["fp"], max_context=260, max_sequences=1)
    text = random_ids(20) * 4
    for count in (300, 170):
        config = {"max_new_tokens": count, "ignore_eos": True, "repeat_penalty": 0.5}
        wanted = engine.generate(text, SamplingConfig(**config))
        ended = engine.timing
        assert engine.generate(text, SamplingConfig(**config, prompt_lookup=15)) == wanted
        assert engine.timing.guessed_tokens > 30
        assert (engine.timing.finish, engine.timing.new_tokens) == (ended.finish, ended.new_tokens)


def test_past_a_full_context_it_goes_on(folder: Path) -> None:
    engine = engine_of(folder, CACHES["rotate"], max_context=2700, max_sequences=1, on_full="shift")
    config = {"max_new_tokens": 400, "ignore_eos": True, "repeat_penalty": 0.5}
    text = random_ids(500) * 5
    wanted = engine.generate(text, SamplingConfig(**config))
    assert engine.generate(text, SamplingConfig(**config, prompt_lookup=4)) == wanted
    assert engine.timing.guessed_tokens > 50


@pytest.mark.parametrize("where", ["run", "draw"])
def test_broken_off_no_guess_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    engine = engine_of(folder, CACHES["rotate"])
    config = SamplingConfig(max_new_tokens=60, ignore_eos=True)
    with engine.prefill(random_ids(90)) as sequence:
        wanted = "".join(engine.stream("", config, sequence=sequence))
        text = [*sequence.token_ids, *sequence.pending]
    with engine.prefill(random_ids(90)) as sequence:
        foretold(monkeypatch, [text], 0.0)
        run, take, calls = engine.step.run, Answer.take, [0]

        def interrupt() -> None:
            calls[0] += 1
            if calls[0] == 4:
                signal.raise_signal(signal.SIGINT)

        def broken_run(*args: Any) -> Any:
            result = run(*args)
            interrupt()
            return result

        def broken_take(self: Answer, *args: Any) -> None:
            take(self, *args)
            interrupt()

        guessing = SamplingConfig(max_new_tokens=60, ignore_eos=True, prompt_lookup=4)
        with monkeypatch.context() as patch:
            patch.setattr(*(engine.step, "run", broken_run) if where == "run" else (Answer, "take", broken_take))
            with pytest.raises(KeyboardInterrupt):
                list(engine.stream("", guessing, sequence=sequence))
        held = [*sequence.token_ids, *sequence.pending]
        assert 90 < len(held) < 115 and held == text[: len(held)]
        rest = "".join(engine.stream("", SamplingConfig(max_new_tokens=150 - len(held), ignore_eos=True), sequence=sequence))
        assert wanted.endswith(rest) and [*sequence.token_ids, *sequence.pending] == text


def test_it_is_refused_where_guesses_would_add_attention_mass(folder: Path) -> None:
    engine = engine_of(folder, tiny_cache(method="plain", filters=(HeavyHitters(budget=8),)))
    with pytest.raises(OptionError, match="attention mass"):
        engine.stream("x", SamplingConfig(prompt_lookup=3))
    with pytest.raises(OptionError, match="from 0 to 15"):
        SamplingConfig(prompt_lookup=16)


@settings(max_examples=20, deadline=None)
@given(begin=st.lists(st.integers(0, 2), max_size=5))
def test_short_texts_have_nothing_to_find(begin: list[int]) -> None:
    lookup = Lookup(begin[:MATCH], 3)
    assert lookup.guess(3) == []
