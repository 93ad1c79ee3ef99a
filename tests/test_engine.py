"""The engine's loop on tiny models: streams, batches, conversations, limits; with the specification and with numba."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dense_nll, random_ids, stepped_nll, tiny_cache, tiny_engine, tiny_folder

from skvq.engine.config import CacheConfig, SamplingConfig
from skvq.engine.errors import CapacityError, OptionError
from skvq.engine.generate import Engine
from skvq.engine.methods import PackedMethod
from skvq.engine.report import Quiet
from skvq.loaders.text import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_is_left_behind")
PROMPT = "It was the best of times, it was the worst of times. "
CACHES = {"fp": {"method": "fp"}, "rotate": {}, "reorder": {"method": "reorder", "value_bits": 1.5}}


class Ending(ByteTokenizer):
    """A tokenizer of bytes for which a chosen token ends an answer."""

    def __init__(self, vocab_size: int, end: int) -> None:
        super().__init__(vocab_size)
        self._end = end

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (self._end,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"), family="qwen2", qkv_bias=True)


@pytest.fixture(scope="module")
def engine(folder: Path, backend: str) -> Engine:
    return tiny_engine(folder, tiny_cache(), backend=backend, max_context=700)


def answer_ids(engine: Engine, count: int, prompt: str = PROMPT, **options: object) -> list[int]:
    """The tokens of an answer, which its sequence holds afterwards."""
    sequence = engine.new_sequence()
    for _ in engine.stream(prompt, SamplingConfig(max_new_tokens=count, **options), sequence=sequence):
        pass
    found = [*sequence.token_ids, *sequence.pending][len(engine.encode(prompt)) :]
    sequence.free()
    return found


def with_end(engine: Engine, token: int) -> Engine:
    tokenizer = Ending(engine.parts.model.config.vocab_size, token)
    return Engine(replace(engine.parts, loaded=replace(engine.parts.loaded, tokenizer=tokenizer)), engine.report)


# --- every mode with every backend ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_scores_are_those_of_decode_step_by_step(folder: Path, backend: str, name: str) -> None:
    """To a hundredth of what quantization itself does, in the mean: float32 sums in another order flip a code now and then."""
    engine = tiny_engine(folder, tiny_cache(**CACHES[name]), backend=backend)
    ids = random_ids(16 + 2 * 160 + 21)
    found, steps = engine.nll(ids), stepped_nll(engine, ids)
    dense = dense_nll(engine, ids)
    bound = 1e-4 if name == "fp" else (found - dense).abs().mean() / 100
    assert (found - steps).abs().mean() <= bound


@pytest.mark.parametrize("name", CACHES)
def test_backends_agree(folder: Path, backend: str, name: str) -> None:
    ids = random_ids(16 + 2 * 160 + 21, seed=4)
    ours, specified = (tiny_engine(folder, tiny_cache(**CACHES[name]), backend=b) for b in (backend, "reference"))
    found, wanted = ours.nll(ids), specified.nll(ids)
    error = (wanted - dense_nll(specified, ids)).abs().mean()
    assert (found - wanted).abs().mean() <= (1e-4 if name == "fp" else error / 100)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_a_batch_answers_as_its_singles_would(engine: Engine, prefill: str) -> None:
    """Five texts, four at a time, of lengths that end at different steps; greedy, so near ties could differ: there are none."""
    engine = Engine(replace(engine.parts, options=replace(engine.parts.options, prefill=prefill)), engine.report)
    texts = [PROMPT * n for n in (1, 5, 2, 1, 3)]
    texts[3] = "x"
    sampling = SamplingConfig(max_new_tokens=11)
    assert engine.generate(texts, sampling) == [engine.generate(text, sampling) for text in texts]


def test_an_evaluation_calibrates_with_the_backend_it_runs_on(engine: Engine) -> None:
    rows = engine.evaluate(PROMPT * 6, [tiny_cache(value_bits=3), tiny_cache(method="fp")], tokens=300, stride=170)
    assert [r["tokens"] for r in rows] == [300, 300] and rows[0]["kl"] > rows[1]["kl"]


# --- text -------------------------------------------------------------------------------------------------------------


def test_pieces_are_the_answer_and_a_seed_repeats_it(engine: Engine) -> None:
    sampling = SamplingConfig(max_new_tokens=20, temperature=1.0, seed=3)
    pieces = list(engine.stream(PROMPT, sampling))
    assert len(pieces) > 5 and "".join(pieces) == engine.generate(PROMPT, sampling)
    assert engine.generate(PROMPT, replace(sampling, seed=4)) != "".join(pieces)


def test_no_tokens_asked_are_no_text_and_a_cached_prompt(engine: Engine) -> None:
    sequence = engine.new_sequence()
    assert list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=0), sequence=sequence)) == []
    assert sequence.token_ids == engine.encode(PROMPT) and sequence.pending == []
    sequence.free()


def test_an_answer_stops_before_its_stop_string(engine: Engine) -> None:
    whole = engine.generate(PROMPT, SamplingConfig(max_new_tokens=24))
    stop = whole[7:10]
    sampling = SamplingConfig(max_new_tokens=24, stop=("never there", stop))
    assert engine.generate(PROMPT, sampling) == whole[: whole.index(stop)]


def test_what_looked_like_a_stop_string_is_shown_when_the_answer_ends(engine: Engine) -> None:
    """Held back because a stop string might begin there: an end of sequence must let it out, as the token limit does."""
    ids = answer_ids(engine, 40)
    count = next(n for n in range(3, 40) if ids[n] not in ids[:n])
    text = engine.parts.tokenizer.decode(ids[:count])
    sampling = SamplingConfig(max_new_tokens=40, stop=(text[-2:] + "\x00",))
    assert with_end(engine, ids[count]).generate(PROMPT, sampling) == text
    assert engine.generate(PROMPT, replace(sampling, max_new_tokens=count)) == text


def test_an_end_token_ends_an_answer_unless_told_otherwise(engine: Engine) -> None:
    ids = answer_ids(engine, 40)
    count = next(n for n in range(3, 40) if ids[n] not in ids[:n])
    ending = with_end(engine, ids[count])
    assert answer_ids(ending, 40) == ids[: count + 1]
    assert answer_ids(ending, 40, ignore_eos=True) == ids


def test_a_batch_whose_answers_end_at_different_times(engine: Engine) -> None:
    ids = answer_ids(engine, 40)
    ending = with_end(engine, ids[5])
    texts = [PROMPT, "y", PROMPT * 2]
    sampling = SamplingConfig(max_new_tokens=30)
    assert ending.generate(texts, sampling) == [ending.generate(text, sampling) for text in texts]


def test_what_a_call_took_is_told_of_the_call_and_of_each_sequence(engine: Engine) -> None:
    """A batch is the sum of its texts; a sequence keeps its own figures whatever is read after it."""
    sampling = SamplingConfig(max_new_tokens=4)
    texts = [PROMPT, "y", PROMPT * 2, "x", "z"]  # more than go together
    engine.generate(texts, sampling)
    assert engine.timing.prompt_tokens == sum(len(engine.encode(text)) for text in texts) and engine.timing.new_tokens == 20
    sequence = engine.prefill(PROMPT)
    engine.generate("y", sampling)
    assert engine.summary(sequence).prompt_tokens == len(engine.encode(PROMPT)) and engine.summary(sequence).new_tokens == 0
    sequence.free()


# --- sequences --------------------------------------------------------------------------------------------------------


def test_a_conversation_keeps_every_token_of_its_answers(engine: Engine) -> None:
    sequence = engine.new_sequence()
    wanted: list[int] = []
    for text in (PROMPT, "Go on. ", "And on. "):
        wanted += engine.encode(text)
        list(engine.stream(text, SamplingConfig(max_new_tokens=9), sequence=sequence))
        held = [*sequence.token_ids, *sequence.pending]
        assert held[: len(wanted)] == wanted and len(held) == len(wanted) + 9
        wanted = held
    sequence.free()


def test_of_two_answers_asked_for_at_once_one_is_given(engine: Engine) -> None:
    with engine.prefill(PROMPT) as sequence:
        first, second = (engine.stream("Go on. ", SamplingConfig(max_new_tokens=3), sequence=sequence) for _ in range(2))
        list(first)
        with pytest.raises(OptionError, match="since this answer was asked for"):
            next(second)


def test_a_pending_token_is_cached_before_random_ones(engine: Engine) -> None:
    with engine.prefill(PROMPT) as sequence:
        list(engine.stream("", SamplingConfig(max_new_tokens=3), sequence=sequence))
        held = [*sequence.token_ids, *sequence.pending]
        engine.fill(sequence, 10)
        assert sequence.token_ids[:-10] == held and not sequence.pending


def test_a_reader_who_leaves_early_leaves_nothing_behind(engine: Engine) -> None:
    pieces = engine.stream(PROMPT, SamplingConfig(max_new_tokens=50))
    next(pieces)
    pieces.close()


def test_a_prompt_too_long_in_a_batch_frees_the_others(engine: Engine) -> None:
    with pytest.raises(CapacityError, match="context of 700"):
        engine.generate(["short", PROMPT * 30])


def test_a_prompt_takes_the_place_of_an_answer_that_has_ended(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a", PROMPT * 2, "b", PROMPT, PROMPT * 3]
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.0, seed=1)
    ended = with_end(engine, answer_ids(engine, 12, "a", temperature=1.0, seed=1)[3])  # "a" is answered in four tokens
    alone = [ended.generate(prompt, sampling) for prompt in prompts]
    sizes, run = [], ended.step.run
    monkeypatch.setattr(ended.step, "run", lambda sequences, ids: sizes.append(len(sequences)) or run(sequences, ids))
    assert ended.generate(prompts, sampling) == alone
    assert sizes[:3] == [4] * 3 and sizes[3] == 3, "of the four places two are free after four tokens, and one prompt waited"
    assert ended.timing.decoded_tokens == sum(sizes) and ended.timing.prompt_tokens == sum(map(len, map(ended.encode, prompts)))


@pytest.mark.parametrize("size", [2, 6, 20, 34, 100, 130])
def test_heads_of_any_size_in_16_bits(tmp_path: Path, backend: str, size: int) -> None:
    engine = tiny_engine(tiny_folder(tmp_path, head_size=size), tiny_cache(method="fp"), backend=backend)
    ids = random_ids(200)
    with engine.prefill(ids) as sequence:
        found, exact = engine.decode_step([sequence], [5])[0], engine.logits([*ids, 5])[-1]
    assert float((found - exact).norm() / exact.norm()) < 2e-3


def test_an_interrupted_prefill_frees_its_sequence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.parts.model, "layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(PROMPT)


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_an_answer_ends_where_the_context_is_full(engine: Engine, spare: int) -> None:
    """A full context still gives the token that its last position predicts."""
    ids = random_ids(700 - spare, vocab=256)
    sequence = engine.new_sequence()
    list(engine.stream(ids, SamplingConfig(max_new_tokens=50), sequence=sequence))
    assert sequence.length == 700 and len(sequence.pending) == 1
    sequence.free()


@pytest.mark.parametrize("text", ["", []])
def test_an_empty_prompt_is_refused(engine: Engine, text: str | list[int]) -> None:
    for call in (lambda: list(engine.stream(text)), lambda: engine.prefill(text), lambda: engine.logits(text)):
        with pytest.raises(OptionError, match="empty"):
            call()


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_that_is_not_there_is_refused(engine: Engine, token: int) -> None:
    with pytest.raises(OptionError, match=f"{token}.*320"):
        engine.nll([5, token])


def test_an_engine_over_the_same_weights_with_another_cache(engine: Engine) -> None:
    ids = random_ids(400)
    plain = engine.with_cache(tiny_cache(method="fp"))
    planned = sum(size for part, size in plain.parts.plan.parts.items() if part.startswith("cache"))
    assert planned == plain.parts.setup.arena.nbytes != engine.parts.setup.arena.nbytes
    dense = dense_nll(engine, ids)
    assert plain.parts.model is engine.parts.model
    assert (plain.nll(ids) - dense).abs().mean() < (engine.nll(ids) - dense).abs().mean() / 10


def test_device_and_dtype_may_be_those_of_torch(folder: Path) -> None:
    options: dict[str, Any] = {
        "backend": "reference",
        "cache": CacheConfig(method="fp"),
        "dummy_weights": True,
        "report": Quiet(),
    }
    found = Engine.load(folder, device=torch.device("cpu"), dtype=torch.float16, **options)
    assert found.device == torch.device("cpu") and found.parts.setup.arena.shape.dtype == torch.float16
    with pytest.raises(OptionError, match="unknown dtype 'float64'"):
        Engine.load(folder, dtype=torch.float64, **options)
    with pytest.raises(OptionError, match="dtype must be str or dtype, got 16"):
        Engine.load(folder, dtype=16, **options)


def test_loading_names_the_option_that_was_meant(folder: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'max_context'"):
        Engine.load(folder, max_contxt=5, report=Quiet())
    engine = Engine.load(folder, max_context=64, report=Quiet(), cache=CacheConfig(method="fp"), dummy_weights=True)
    for ask in (engine.logits, engine.nll, engine.restore, engine.new_sequence().save):
        with pytest.raises(OptionError, match="unknown option 'pth'; known"):
            ask([1, 2], pth=3)  # type: ignore[call-arg]
    sequence = engine.new_sequence()
    of_engine = (engine.batch, engine.new_sequence, engine.summary, engine.decode, engine.decode_step)
    for call in (*of_engine, sequence.fork, sequence.truncate, sequence.rewind, sequence.free):
        with pytest.raises(OptionError, match="unknown option 'zzz'"):
            call(zzz=1)  # type: ignore[operator]
    with engine.batch() as batch:
        for call in (batch.add_each, batch.step):
            with pytest.raises(OptionError, match="unknown option 'zzz'"):
                call(zzz=1)  # type: ignore[operator]
    with pytest.raises(OptionError, match="give it as max_context"):
        Engine.load(folder, ctx=5, report=Quiet())  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"CacheConfig\(key_bits"):
        engine.with_cache(CacheConfig(), key_bits=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="did you mean 'streaming'"):
        Engine.load(folder, prefill="streamed", report=Quiet())


def test_likelihoods_are_those_of_the_packed_cache(engine: Engine) -> None:
    """Of the next token as ``nll``; of the likeliest by definition, which at 16 bits is that of the model."""
    ids = random_ids(16 + 2 * 160 + 21, seed=6)
    found = engine.likelihoods(ids, 4)
    assert torch.equal(found.following, -engine.nll(ids))
    assert found.likeliest.shape == found.ids.shape == (len(ids), 4)
    assert bool((found.likeliest[:, 0] >= found.likeliest[:, 1]).all()) and bool(
        (found.likeliest[:-1, 0] >= found.following).all()
    )
    at_16_bits = engine.with_cache(tiny_cache(method="fp"))
    exact = engine.logits(ids).log_softmax(-1)
    found = at_16_bits.likelihoods(ids, 4)
    assert (found.likeliest - exact.topk(4).values).abs().max() < 5e-3
    assert (found.likeliest - exact.gather(1, found.ids)).abs().max() < 5e-3
    for count in (0, 321, 1.5):
        with pytest.raises(OptionError, match="count must be from 1 to the vocabulary's 320"):
            engine.likelihoods(ids, count)  # type: ignore[arg-type]


def test_a_freed_sequence_keeps_no_arena(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache())
    sequence = engine.prefill([1, 2, 3])
    arena = weakref.ref(engine.parts.setup.arena)
    sequence.free()
    sequence.free()
    with pytest.raises(OptionError, match="has been freed"):
        sequence.fork()
    with pytest.raises(OptionError, match="has been freed"):
        engine.read(sequence, [4])
    del engine
    gc.collect()
    assert arena() is None and repr(sequence) == "<SequenceCache: freed>"


def test_loading_compiles_what_packs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each layout: nobody's first prompt waits for it."""
    packed: list[int] = []
    pack = PackedMethod.pack

    def counted(self: PackedMethod[Any], layer: int, *given: Any) -> None:
        packed.append(layer)
        pack(self, layer, *given)

    monkeypatch.setattr(PackedMethod, "pack", counted)
    engine = tiny_engine(folder, tiny_cache(method="plain", layer_bits=((2, 2), (3, 2))))
    assert packed == [0, 1]
    assert engine.parts.setup.arena.free_pages == engine.parts.setup.arena.shape.pages
    packed.clear()
    tiny_engine(folder, tiny_cache(method="plain"), max_context=100)
    assert packed == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda engine: pickle.dumps(engine), "an engine cannot be copied, pickled or sent"),
        (lambda engine: copy.copy(engine), "an engine cannot be copied, pickled or sent"),
        (lambda engine: engine.read(engine.new_sequence(), [1], chekpoint="x"), "did you mean 'checkpoint'"),
        (lambda engine: engine.encode("a", bos="x"), "bos must be bool, got 'x'"),
        (lambda engine: engine.fill(engine.new_sequence(), 3, seed="x"), "count and seed must be whole numbers"),
        (lambda engine: Engine.load("smollm2-135m", report=Quiet), "report must be an object with bar and message"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(engine: Engine, wrong: Callable[[Engine], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        wrong(engine)
