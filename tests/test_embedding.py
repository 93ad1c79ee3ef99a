"""The engine in another program: its settings, mistakes of its users, and what is asked of sequences at odd moments."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from tiny import arena_of, random_ids, tiny_cache, tiny_engine, tiny_folder

from skvq import AttentionSinks, CacheConfig, KeyOutliers, Quiet, SamplingConfig, SkvqError, TokenIds
from skvq.engine.cache import SequenceCache
from skvq.engine.decode import GraphStep
from skvq.engine.errors import CapacityError, OptionError
from skvq.engine.generate import Engine

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_is_left_behind")
TEXT = "It was the best of times. "
SAMPLING = SamplingConfig(max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"), num_layers=1)


@pytest.fixture(scope="module", params=["reference", "numba"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return tiny_engine(folder, tiny_cache(), backend=request.param, max_context=700)


def test_what_the_documentation_shows_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = engine.parts.tokenizer
    monkeypatch.setattr(Engine, "load", lambda *args, **options: engine)
    monkeypatch.setattr(tokenizer, "encode_chat", lambda messages: tokenizer.encode(messages[0]["content"]))
    text = (Path(__file__).parent.parent / "docs" / "library.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["answer"] and len(names["several"]) == 2 and names["more"] and names["book"].alive is False
    assert names["cache"].filters[0].budget == 64
    assert len(names["both"]) == 2
    assert names["loss"] > 0 and len(names["full"]) == len(names["ids"]) and isinstance(names["written"], str)


# --- torch settings of the host program -------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype, "the host's own setting was not left alone"
    finally:
        torch.set_default_dtype(torch.float32)


HOSTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing set": nullcontext,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("host", HOSTS)
def test_settings_of_the_host_program_change_nothing(engine: Engine, folder: Path, host: str) -> None:
    wanted = engine.generate([TEXT, TEXT * 3], SamplingConfig(max_new_tokens=6, temperature=1.0))
    ids = random_ids(300)
    nll = engine.nll(ids)
    with HOSTS[host]():
        assert engine.generate([TEXT, TEXT * 3], SamplingConfig(max_new_tokens=6, temperature=1.0)) == wanted
        scored = engine.nll(ids)
        sequence = engine.prefill(ids)
        sequence.truncate(100)
        fork = sequence.fork()
        loaded = tiny_engine(folder, tiny_cache(), backend=engine.parts.setup.backend.name, max_context=700)
        assert loaded.generate(TEXT * 3, SamplingConfig(max_new_tokens=6, temperature=1.0)) == wanted[1]
    assert torch.equal(scored, nll)
    sequence.free()
    fork.free()


# --- sequences --------------------------------------------------------------------------------------------------------


def test_a_sequence_goes_on_from_its_last_token(engine: Engine) -> None:
    """An empty text continues what is there: after reading as that text alone would, after a truncation from its last token."""
    wanted = engine.generate(TEXT * 20, SAMPLING)
    with engine.prefill(TEXT * 20) as sequence:
        with sequence.fork() as fork:
            assert "".join(engine.stream("", SAMPLING, sequence=fork)) == wanted
            assert "".join(engine.stream("", SAMPLING, sequence=fork)) and fork.length == sequence.length + 11
        assert "".join(engine.stream("", SAMPLING, sequence=sequence)) == wanted
    prompt = engine.encode(TEXT * 20)
    with engine.prefill([*prompt, 5]) as sequence, engine.prefill(prompt[:-1]) as shorter:
        sequence.truncate(len(prompt))
        assert "".join(engine.stream("", SAMPLING, sequence=sequence)) == "".join(
            engine.stream(prompt[-1:], SAMPLING, sequence=shorter)
        )
    with engine.new_sequence() as empty, pytest.raises(OptionError, match="empty"):
        engine.stream("", SAMPLING, sequence=empty)


def test_a_sequence_that_nothing_refers_to_is_freed(engine: Engine) -> None:
    for _ in range(6):
        sequence = engine.prefill(TEXT)
        list(engine.stream("", SAMPLING, sequence=sequence.fork()))
        del sequence
        gc.collect()


USES: dict[str, Callable[[Engine, Any], object]] = {
    "truncate": lambda engine, s: s.truncate(0),
    "fork": lambda engine, s: s.fork(),
    "save": lambda engine, s: s.save("never.skvq"),
    "nbytes": lambda engine, s: s.nbytes,
    "summary": lambda engine, s: engine.summary(s),
    "stream": lambda engine, s: engine.stream("x", sequence=s),
    "read": lambda engine, s: engine.read(s, [1]),
    "fill": lambda engine, s: engine.fill(s, 3),
}


@pytest.mark.parametrize("use", USES)
def test_a_sequence_that_was_freed_is_refused_and_its_slots_next_owner_is_safe(engine: Engine, use: str) -> None:
    gone = engine.prefill(TEXT)
    gone.free()
    with engine.prefill(TEXT) as owner:
        assert owner.slot == gone.slot
        with pytest.raises(OptionError, match="has been freed"):
            USES[use](engine, gone)
        assert "".join(engine.stream("", SAMPLING, sequence=owner)) == engine.generate(TEXT, SAMPLING)
    assert repr(gone) == "<SequenceCache: freed>"


@pytest.mark.parametrize("length", [3.0, None, True, "3"])
def test_a_length_that_is_no_number_changes_nothing(engine: Engine, length: Any) -> None:
    with engine.prefill(TEXT) as sequence:
        before = sequence.length
        with pytest.raises(OptionError, match="length"):
            sequence.truncate(length)
        assert sequence.length == before == len(sequence.token_ids)


def test_a_sequence_of_another_engine_is_refused(engine: Engine, folder: Path) -> None:
    other = tiny_engine(folder, tiny_cache(), max_context=700)
    with other.prefill(TEXT) as sequence:
        with pytest.raises(OptionError, match="another engine"):
            engine.stream("x", sequence=sequence)
        with pytest.raises(OptionError, match="must come from"):
            engine.stream("x", sequence="x")  # type: ignore[arg-type]


def test_threads_share_an_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that take turns are what they are one after another; the host's default dtype is anything."""
    texts = [TEXT * (n + 1) for n in range(3)]
    wanted = [engine.generate(text, SAMPLING) for text in texts] * 3
    with default_dtype(torch.float64), ThreadPoolExecutor(3) as pool:

        def answer(text: str) -> str:
            torch.set_num_threads(1)
            with engine.prefill(text) as sequence:
                return "".join(engine.stream("", SAMPLING, sequence=sequence))

        assert list(pool.map(answer, texts * 3)) == wanted


def test_lists_of_several_threads_wait_for_places(engine: Engine) -> None:
    """Each takes all the places there are."""
    texts = [TEXT * n for n in (1, 2, 3, 4)]
    wanted = [engine.generate(text, SAMPLING) for text in texts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: engine.generate(texts, SAMPLING), range(6))) == [wanted] * 6


def test_a_pending_token_is_not_lost_in_a_decode_step(engine: Engine) -> None:
    with engine.prefill(TEXT) as sequence:
        "".join(engine.stream("", SAMPLING, sequence=sequence))
        [pending], length = sequence.pending, sequence.length
        with pytest.raises(OptionError, match=f"token {pending} of the last answer is pending"):
            engine.decode_step([sequence], [pending + 1 if pending < 9 else pending - 1])
        assert sequence.pending == [pending] and sequence.length == length
        engine.decode_step([sequence], [pending])
        assert sequence.pending == [] and sequence.length == length + 1


def test_a_batch_that_is_gone_holds_no_sequence(engine: Engine) -> None:
    def use() -> None:
        sequence = engine.prefill(TEXT)
        engine.decode_step([sequence], [4])

    for _ in range(6):
        use()
        gc.collect()


def test_a_sequence_of_a_cycle_is_given_back_once(engine: Engine) -> None:
    """The garbage collector may finalize it before the generator whose ``with`` frees it."""

    def asking(book: SequenceCache) -> Iterator[int]:
        with book:
            yield 1
            yield 2

    class Holder:
        def __init__(self, pieces: Iterator[int]) -> None:
            self.itself, self.pieces = self, pieces

    arena = engine.parts.setup.arena
    book = engine.prefill(random_ids(400))
    with book.fork() as twin:
        before = twin.stage(0, 0, twin.packed)[0].clone()
        holder = Holder(asking(book))
        next(holder.pieces)
        del book, holder
        gc.collect()
        with engine.prefill(random_ids(600, seed=4)) as other:
            assert not {*other.pages} & {*twin.pages}
            assert torch.equal(twin.stage(0, 0, twin.packed)[0], before)
    arena.check(arena_of())


def test_logits_that_were_returned_are_the_callers(engine: Engine) -> None:
    wanted = engine.generate(TEXT, SAMPLING)
    with engine.new_sequence() as sequence, torch.inference_mode():
        engine.read(sequence, engine.encode(TEXT)).fill_(0.0)
        assert "".join(engine.stream("", SAMPLING, sequence=sequence)) == wanted


def test_a_sequence_of_one_token_goes_on(engine: Engine) -> None:
    wanted = engine.generate([5], SAMPLING)
    with engine.prefill([5]) as sequence:
        sequence.take_back()
        assert "".join(engine.stream(np.array([], int), SAMPLING, sequence=sequence)) == wanted


def test_free_that_is_broken_off_releases_nothing_twice(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = engine.prefill(TEXT * 20)
    arena = engine.parts.setup.arena
    release = arena.release_sequence

    def broken(slot: int) -> None:
        release(slot)
        raise KeyboardInterrupt

    monkeypatch.setattr(arena, "release_sequence", broken)
    with pytest.raises(KeyboardInterrupt):
        sequence.free()
    sequence.free()


def test_another_cache_must_leave_room_to_shift(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=3000, on_full="shift")
    with pytest.raises(CapacityError, match="at least 5,332"):
        engine.with_cache(tiny_cache(window=2900))
    with pytest.raises(OptionError, match="cache must be CacheConfig"):
        engine.with_cache("fp")  # type: ignore[arg-type]


def test_ids_of_a_rule_are_the_same_in_any_order() -> None:
    assert repr(TokenIds([8, 0])) == repr(TokenIds({0, 8})) == "TokenIds(ids=frozenset({0, 8}), budget=64)"


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_answered_as_many_at_a_time_as_fit(engine: Engine) -> None:
    """With sequences held, and with texts that together need more pages than there are."""
    texts = [TEXT * n for n in (1, 20, 2, 20, 3, 20)]
    wanted = [engine.generate(text, SAMPLING) for text in texts]
    with engine.prefill(TEXT * 20), engine.prefill(TEXT * 20):
        assert engine.generate(texts, SAMPLING) == wanted
    assert engine.generate([], SAMPLING) == []


def test_texts_are_checked_before_any_is_answered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "read", lambda *args, **options: pytest.fail("a text was read"))
    with pytest.raises(OptionError, match="empty"):
        engine.generate([TEXT, ""])
    with pytest.raises(OptionError):
        engine.stream(TEXT, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "numpy", "torch"])
def test_ids_may_come_in_any_form(engine: Engine, make: Callable[[list[int]], Any]) -> None:
    ids = random_ids(30)
    assert engine.encode(make(ids)) == ids
    assert engine.generate(make(ids), SAMPLING) == engine.generate(ids, SAMPLING)


@pytest.mark.parametrize(
    "prompt",
    [[1.7, 2.2], ["1", "2", 3], [True, False], b"abc", None, 5, torch.tensor([1.5]), torch.tensor([[1, 2]]), {"a": 1}, [None]],
    ids=str,
)
def test_what_is_no_prompt_is_refused(engine: Engine, prompt: Any) -> None:
    for call in (engine.generate, engine.stream, engine.prefill, engine.encode):
        with pytest.raises(OptionError, match=r"prompt|token ids"):
            call(prompt)
    with pytest.raises(SkvqError):
        engine.chat(prompt)


def test_answers_that_take_turns_share_what_is_captured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    if isinstance(engine.step, GraphStep):  # the specification has none
        graphs: Any = engine.step.graphs
        capture = graphs.capture
        monkeypatch.setattr(graphs, "capture", lambda work: captured.append(1) or capture(work))
    count = engine.parts.setup.arena.shape.sequences
    wanted = [engine.generate(TEXT * (n + 1), SAMPLING) for n in range(count)]
    captured.clear()
    streams = [engine.stream(TEXT * (n + 1), SAMPLING) for n in range(count)]
    texts = [""] * count
    live = dict(enumerate(streams))
    while live:
        for n, stream in list(live.items()):
            piece = next(stream, None)
            if piece is None:
                del live[n]
            else:
                texts[n] += piece
    assert texts == wanted and not captured  # each has been decoded before


def test_why_an_answer_ended(engine: Engine) -> None:
    with engine.prefill(TEXT) as sequence:
        whole = "".join(engine.stream("", SAMPLING, sequence=sequence))
        assert engine.summary(sequence).finish == "length" and engine.timing.finish == "length"
    list(engine.stream(TEXT, SamplingConfig(max_new_tokens=6, stop=whole[2:3], ignore_eos=True)))
    assert engine.timing.finish == "stop"
    list(engine.stream(random_ids(695), SamplingConfig(max_new_tokens=60, ignore_eos=True)))
    assert engine.timing.finish == "context"


def test_a_new_seed_for_each_answer(engine: Engine) -> None:
    drawn = engine.generate([TEXT] * 4, SamplingConfig(max_new_tokens=20, temperature=1.0, seed=None))
    assert len(set(drawn)) == 4
    assert len(set(engine.generate([TEXT] * 4, SamplingConfig(max_new_tokens=20, temperature=1.0)))) == 1


# --- options ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[Engine], object]] = {
    "did you mean 'checkpoint'": lambda e: e.prefill([1], checkpont="x"),
    "unknown option 'max_new_tokens': give it as sampling=SamplingConfig": lambda e: e.generate("a", max_new_tokens=3),
    "unknown option 'window': give it as cache=CacheConfig": lambda e: Engine.load("x", window=64),
    "max_sequences must be a whole number": lambda e: Engine.load("smollm2-135m", max_sequences=None),  # type: ignore[arg-type]
    "report must be Reporter or None": lambda e: Engine.load("x", report=print),  # type: ignore[arg-type]
    "calibration must be the path of a file, got 5": lambda e: Engine.load("x", calibration=5),  # type: ignore[arg-type]
    "checkpoint must be the path of a file, got 5": lambda e: e.prefill("a", checkpoint=5),  # type: ignore[arg-type]
    "file must be the path of a file, got None": lambda e: e.new_sequence().save(None),  # type: ignore[arg-type]
    "file must be the path of a file, got ''": lambda e: e.restore(""),
    "checkpoint_seconds must be a number": lambda e: e.prefill("a", checkpoint_seconds="a"),  # type: ignore[arg-type]
    "token id -3 is not one of": lambda e: e.decode([-3]),
    "sequence must come from prefill": lambda e: e.summary("a"),  # type: ignore[arg-type]
    "not int": lambda e: e.generate(["a", 3]),  # type: ignore[list-item]
    "must be whole numbers, got '1.5'": lambda e: e.read(e.new_sequence(), [1.5]),  # type: ignore[list-item]
    "of at least 755": lambda e: e.generate([5] * 750, SAMPLING),
    "got the text 'abc'": lambda e: e.read(e.new_sequence(), "abc"),  # type: ignore[arg-type]
    "unknown option 'sinks'": lambda e: AttentionSinks(sinks=3),  # type: ignore[call-arg]
    "sampling must be SamplingConfig": lambda e: e.generate("a", {"max_new_tokens": 3}),  # type: ignore[call-overload]
    "TokenIds.ids": lambda e: TokenIds(5),  # type: ignore[arg-type]
    "KeyOutliers.threshold": lambda e: KeyOutliers(threshold="x"),  # type: ignore[arg-type]
    "stride": lambda e: e.evaluate(TEXT, [CacheConfig()], tokens=10, stride=0),
    "tokens": lambda e: e.evaluate(TEXT, [CacheConfig()], tokens=-1, stride=5),
    "each of caches": lambda e: e.evaluate(TEXT, ["fp"], tokens=10, stride=5),  # type: ignore[list-item]
    "ignore_eos": lambda e: SamplingConfig(ignore_eos="no"),  # type: ignore[arg-type]
    "dummy_weights must be bool": lambda e: Engine.load("x", dummy_weights="no"),  # type: ignore[arg-type]
    "cache must be CacheConfig or None": lambda e: Engine.load("x", cache={"method": "fp"}),  # type: ignore[arg-type]
    "rope_scaling must be str or None": lambda e: Engine.load("x", rope_scaling=4),  # type: ignore[arg-type]
    "must be names and values": lambda e: Engine.load("x", chat_template_kwargs=[1]),  # type: ignore[arg-type]
    "backend must be str": lambda e: Engine.load("x", backend=e.parts.setup.backend),  # type: ignore[arg-type]
    "got 0 for 0": lambda e: e.decode_step([], []),
    "a sequence was given twice": lambda e: (lambda s: e.decode_step([s, s], [1, 2]))(e.new_sequence()),
    "got 2 for 1": lambda e: e.decode_step([e.new_sequence()], [1, 2]),
    "must be whole numbers, got 'a'": lambda e: e.decode_step([e.new_sequence()], ["a"]),  # type: ignore[list-item]
    "is a class: give a rule, as TokenIds": lambda e: CacheConfig(filters=(TokenIds,)),  # type: ignore[arg-type]
    "cannot be copied or pickled": lambda e: copy.copy(e.new_sequence()),
    "cannot be copied or pickled: fork": lambda e: copy.deepcopy(e.new_sequence()),
    "caches must be list or tuple": lambda e: e.evaluate(TEXT, CacheConfig(), tokens=9, stride=5),  # type: ignore[arg-type]
    "seed must be a whole number": lambda e: e.calibrate(CacheConfig(), TEXT, "x", corpus_name="", tokens=9, seed=1.5),  # type: ignore[arg-type]
    "tokens must be a whole number": lambda e: e.calibrate(CacheConfig(), TEXT, "x", corpus_name="", tokens=0),
    "701 tokens do not fit": lambda e: e.logits([5] * 701),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_option_is_named(engine: Engine, message: str) -> None:
    with pytest.raises((OptionError, CapacityError), match=message):
        WRONG[message](engine)


def test_numbers_of_numpy_are_numbers(folder: Path) -> None:
    cache = CacheConfig(
        window=np.int64(64), group_size=np.int32(32), key_bits=np.float32(1.5), filters=[TokenIds([np.int64(7)])]
    )
    assert cache == CacheConfig(window=64, group_size=32, key_bits=1.5, filters=[TokenIds([7])])
    assert all(type(value) in (int, float) for value in (cache.window, cache.group_size, cache.key_bits))
    assert repr(cache.filters) == repr((TokenIds([7]),))
    sampling = SamplingConfig(max_new_tokens=np.int16(3), temperature=np.float64(0.5), seed=np.uint64(3))
    assert sampling == SamplingConfig(max_new_tokens=3, temperature=0.5, seed=3) and type(sampling.seed) is int
    with pytest.raises(OptionError, match="window"):
        CacheConfig(window=np.float64(64))
    engine = tiny_engine(folder, tiny_cache(), max_context=np.int64(300))
    with engine.prefill(TEXT) as sequence:
        sequence.truncate(np.int64(3))
        assert sequence.length == 3 and type(sequence.length) is int and sequence.setup.max_context == 300
        sequence.save(folder / "numbers.skvq")
    assert engine.evaluate(TEXT, [tiny_cache(method="fp")], tokens=np.int64(9), stride=np.int64(5))[0]["tokens"] == 9


def test_a_rule_that_fails_is_named(folder: Path) -> None:
    class Broken:
        budget, needs_attention_mass = 3, False

        def __repr__(self) -> str:
            return "Broken()"

        def keep(self, tokens: object) -> Any:
            raise KeyError("oops")

    with pytest.raises(OptionError, match=r"Broken\(\): keep failed: KeyError: 'oops'"):
        tiny_engine(folder, tiny_cache(filters=(Broken(),)), max_context=700).prefill(random_ids(600))


@pytest.mark.parametrize("kept", [[True], None, torch.zeros(128), torch.zeros(3, dtype=torch.bool)], ids=str)
def test_a_rule_that_does_not_answer_is_named(folder: Path, kept: object) -> None:
    class Odd:
        budget, needs_attention_mass = 3, False

        def __repr__(self) -> str:
            return "Odd()"

        def keep(self, tokens: object) -> Any:
            return kept

    with pytest.raises(OptionError, match=r"Odd\(\): keep must return a bool tensor"):
        tiny_engine(folder, tiny_cache(filters=[Odd()], method="plain"), report=Quiet()).prefill(random_ids(300))


def test_an_engine_says_what_it_is(engine: Engine) -> None:
    assert "context 700" in repr(engine) and "rotate" in repr(engine) and str(engine.device) in repr(engine)
    with engine.prefill(TEXT) as sequence:
        assert repr(sequence) == f"<SequenceCache: {sequence.length} tokens, 0 packed in 0 pages>"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_an_answer_in_two_parts_is_the_whole_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cut: int, temperature: float
) -> None:
    """Also where a tokenizer takes the first space of a text away, as SentencePiece's do."""
    tokenizer = engine.parts.tokenizer
    monkeypatch.setattr(type(tokenizer), "strips_first_space", property(lambda self: True))
    monkeypatch.setattr(type(tokenizer), "token_bytes", lambda self, token: f" {token}".encode())
    whole, parts = whole_and_parts(engine, cut, temperature)
    assert parts == whole and whole.startswith(" ")


def test_a_first_space_is_of_the_answer_unless_a_text_begins_with_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a completion it is what the model wrote; SentencePiece puts one before each text, and so do answers to chats."""
    tokenizer, seen = engine.parts.tokenizer, {5: b" sea", 7: b""}
    monkeypatch.setattr(type(tokenizer), "strips_first_space", property(lambda self: True))
    monkeypatch.setattr(type(tokenizer), "token_bytes", lambda self, token: seen.get(token, b" and"))
    monkeypatch.setattr(type(tokenizer), "encode_chat", lambda self, messages: [7, 5])
    monkeypatch.setattr(type(tokenizer), "encode_turn", lambda self, messages: [7, 5])
    chat = [{"role": "user", "content": "Go on."}]
    for prompt, space in ((TEXT, True), ([7, 5], True), ([7], False), (chat, False), (engine.encode(chat), False)):
        with engine.batch() as batch:
            twins = batch.add_each(prompt, [SAMPLING, SAMPLING])
            while len(batch):
                batch.step()
        answers = [engine.generate(prompt, SAMPLING), *engine.generate([prompt], SAMPLING), *(twin.text for twin in twins)]
        assert answers[0].startswith(" ") == space and len(set(answers)) == 1, (prompt, answers)
    assert not engine.chat(chat, SAMPLING).startswith(" ")
    with engine.prefill(TEXT) as sequence:
        assert not engine.generate(chat, SAMPLING, sequence=sequence).startswith(" ")
        assert engine.generate([5], SAMPLING, sequence=sequence).startswith(" ")
    with engine.prefill(chat) as sequence:
        assert not engine.generate("", SAMPLING, sequence=sequence).startswith(" ")
        assert engine.generate("", SAMPLING, sequence=sequence).startswith(" "), "an answer goes on"
    for read, space in ((TEXT, True), ([5, 7], False), (chat, False)):
        with engine.prefill(read) as whole, whole.fork() as sequence:
            assert engine.generate("", SAMPLING, sequence=sequence).startswith(" ") == space, "what was read has the say"


def test_an_end_that_was_drawn_is_not_read_again_with_a_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn begins with it, in Llama 2's own template after a space; other tokens before it are part of the turn."""
    tokenizer, turn, spelled = engine.parts.tokenizer, [9, 8, 7, 3], {9: b" ", 8: b"\n ", 7: b"", 6: b"", 3: b"x"}
    monkeypatch.setattr(type(tokenizer), "encode_turn", lambda self, messages: list(turn))
    monkeypatch.setattr(type(tokenizer), "token_bytes", lambda self, token: spelled[token])
    chat = [{"role": "user", "content": "Go on."}]
    with engine.prefill(TEXT) as sequence:
        for begins, pending, left in (
            ([9, 8, 7, 3], [7], [3]), ([7, 3], [7], [3]), ([9, 7, 3], [3], [9, 7, 3]), ([6, 7, 3], [7], [6, 7, 3]),
            ([9, 9], [7], [9, 9]), ([9, 7, 3], [], [9, 7, 3]),
        ):  # fmt: skip
            turn[:], sequence.pending = begins, pending
            assert engine.encode_after(chat, sequence) == left, (begins, pending)


def whole_and_parts(engine: Engine, cut: int, temperature: float = 1.0) -> tuple[str, str]:
    """An answer of 12 tokens, and the same cut in two."""
    with engine.prefill(TEXT) as one, engine.prefill(TEXT) as two:
        whole, *parts = (
            "".join(engine.stream("", SamplingConfig(max_new_tokens=n, temperature=temperature), sequence=sequence))
            for n, sequence in ((12, one), (cut, two), (12 - cut, two))
        )
    return whole, "".join(parts)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_character_cut_between_two_answers_is_shown_by_the_second(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Tokens are single bytes of characters here, in any order, so some never become one."""
    byte_of = (0xC3, 0x80, 0xC3, 0xA9, 0xF0, 0x41)
    monkeypatch.setattr(type(engine.parts.tokenizer), "token_bytes", lambda self, token: bytes([byte_of[token % 6]]))
    whole, parts = whole_and_parts(engine, cut)
    assert parts == whole and any("\ufffd" != character > "\x7f" for character in whole)


def test_a_checkpoint_that_cannot_be_written_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(SkvqError, match="/nowhere is no folder"):
        engine.prefill("a", checkpoint="/nowhere/file")


@pytest.mark.parametrize("change", ["continued", "cut", "replaced"])
def test_an_answer_whose_sequence_is_another_by_now_ends(engine: Engine, change: str) -> None:
    with engine.prefill(TEXT) as sequence:
        answer = engine.stream("", SAMPLING, sequence=sequence)
        next(answer)
        if change == "cut":
            sequence.truncate(3)
        elif change == "replaced":  # by as many other tokens, and the same one pending
            mark = sequence.mark
            sequence.truncate(mark[0] - 2)
            engine.read(sequence, [9, 9, 9])
            assert sequence.rewind(mark) and sequence.mark[:2] == mark[:2]
        else:
            "".join(engine.stream("x", SAMPLING, sequence=sequence))
        with pytest.raises(OptionError, match="was continued or cut while this answer was being written"):
            "".join(answer)


def test_a_question_about_a_text_that_is_another_by_now_is_refused(engine: Engine) -> None:
    with engine.prefill(TEXT) as sequence:
        answer = engine.stream("x", SAMPLING, sequence=sequence)  # nothing is read yet
        length = sequence.length
        sequence.truncate(2)
        engine.read(sequence, [9] * (length - 2))
        with pytest.raises(OptionError, match="since this answer was asked for"):
            "".join(answer)


def test_logits_of_reading_and_of_a_step_are_the_callers_own(engine: Engine) -> None:
    with engine.new_sequence() as sequence:
        logits = [engine.read(sequence, [1, 2, 3]), engine.decode_step([sequence], [4])[0]]
        for row in logits:
            row[7] = -torch.inf
            assert not row.is_inference()


def test_scores_are_tensors_of_the_callers_own(engine: Engine) -> None:
    engine.logits(list(range(9))).add_(1)
    engine.nll(list(range(9))).add_(1)


def test_a_fill_that_does_not_fit_writes_nothing(folder: Path) -> None:
    """Nor does one of no tokens make a sequence one that no model has read."""
    engine = tiny_engine(folder, tiny_cache(), max_context=12000, max_sequences=2)
    first, second = engine.new_sequence(), engine.new_sequence()
    engine.fill(second, 0)
    assert not second.filled
    arena = engine.parts.setup.arena
    held = [arena.new_page() for _ in range(arena.unused_pages - 2)]
    with pytest.raises(CapacityError, match="pages of 1280 tokens are in use"):
        engine.fill(first, 11000)
    assert first.length == 0 and not first.pages and not first.filled
    for page in held:
        arena.release(page)
    engine.fill(first, 11000)
    assert first.length == 11000 and first.filled


def test_a_batch_asks_for_room_while_others_read(folder: Path) -> None:
    """The store of prefixes is looked through under the engine's lock: it would change meanwhile."""
    engine = tiny_engine(folder, tiny_cache(), max_context=4000, max_sequences=4)
    with engine.batch() as batch, engine.prefill(TEXT) as sequence:
        batch.add("", SamplingConfig(max_new_tokens=3, ignore_eos=True), sequence=sequence)
        batch.step()
        asked: list[bool] = []
        shared = engine.parts.setup.arena.shared_by_sequences
        with pytest.MonkeyPatch.context() as patch:
            free = Thread(target=lambda: asked.append(engine.lock.acquire(blocking=False)))

            def look(pages: Any) -> int:
                free.start()
                free.join()
                return shared(pages)

            patch.setattr(engine.parts.setup.arena, "shared_by_sequences", look)
            batch.has_room_for(100)
        assert asked == [False]
        while len(batch):
            batch.step()
