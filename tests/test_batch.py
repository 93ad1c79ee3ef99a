"""Answers written together: each is what it would be alone, whatever comes and goes beside it."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny import Listener, random_ids, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq import SamplingConfig
from skvq.engine.batch import Batch
from skvq.engine.cache import SequenceCache
from skvq.engine.decode import EagerStep
from skvq.engine.errors import CapacityError, ModelError, OptionError, SkvqError
from skvq.engine.filters import LeavingTokens
from skvq.engine.generate import Engine
from skvq.engine.request import Request

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_is_left_behind")
TEXT = "It was the best of times. "
SAMPLING = SamplingConfig(max_new_tokens=6, ignore_eos=True)
OTHERS = [
    SamplingConfig(max_new_tokens=9, temperature=1.0, seed=3),
    SamplingConfig(max_new_tokens=4, ignore_eos=True, prompt_lookup=2),
    SamplingConfig(max_new_tokens=0),
    SamplingConfig(max_new_tokens=12, ignore_eos=True, repeat_penalty=1.5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"), num_layers=1)


@pytest.fixture(scope="module", params=["reference", "numba"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return tiny_engine(folder, tiny_cache(), backend=request.param, max_context=700)


@pytest.fixture
def pieces_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of more than 64 tokens are long, and a step of a batch that does nothing else reads one piece."""
    for module in ("prefill", "prefill_form", "request"):
        monkeypatch.setattr(f"skvq.engine.{module}.CHUNK_TOKENS", 64)
    monkeypatch.setattr("skvq.engine.batch.ALONE", 0.0)


def finished(batch: Batch) -> dict[Request, str]:
    """Step until all is over: the pieces that each request was given."""
    pieces: dict[Request, str] = {}
    while len(batch):
        for request, piece in batch.step():
            pieces[request] = pieces.get(request, "") + piece
    assert batch.step() == []
    return pieces


def test_answers_are_those_that_are_written_alone(engine: Engine) -> None:
    """Eight prompts with options of their own for four places, three of which come while others are being answered."""
    prompts = [(TEXT * (n + 1), ([SAMPLING, *OTHERS])[n % 5]) for n in range(8)]
    wanted = [engine.generate(*prompt) for prompt in prompts]
    with engine.batch() as batch:
        requests = [batch.add(*prompt) for prompt in prompts[:5]]
        assert [r.finish for r in requests] == [""] * 5 and len(batch) == 5
        for prompt in prompts[5:]:
            for _ in range(3):
                batch.step()
            requests.append(batch.add(*prompt))
        finished(batch)
        assert batch.timing.new_tokens == sum(r.timing.new_tokens for r in requests) > 0
        assert batch.timing.prompt_tokens == sum(len(r.ids) for r in requests)
    assert engine.timing is batch.timing
    assert [r.text for r in requests] == wanted
    assert {r.finish for r in requests} <= {"length", "end"}


def test_pieces_make_up_the_text(engine: Engine) -> None:
    with engine.batch() as batch:
        requests = [batch.add(TEXT * 2, SAMPLING), batch.add(TEXT, SAMPLING)]
        pieces = finished(batch)
    assert pieces == {request: request.text for request in requests}


def test_one_prompt_is_read_once_for_all_the_answers_there_is_room_for(folder: Path) -> None:
    """Five answers for three places, one of them not wanted any more: each as if it were alone."""
    engine = tiny_engine(folder, tiny_cache(), max_context=3000, max_sequences=3, prefix_cache=False)
    prompt = random_ids(1500)
    samplings = [SamplingConfig(max_new_tokens=n, ignore_eos=True, temperature=1.0, seed=n) for n in (9, 12, 9, 10, 11)]
    wanted = [engine.generate(prompt, sampling) for sampling in samplings]
    arena = engine.parts.setup.arena
    before = arena.free_pages
    with engine.batch() as batch:
        requests = batch.add_each(prompt, samplings)
        requests[1].cancel()
        while not requests[0].answer:
            batch.step()
        assert [bool(r.answer) for r in requests] == [True, False, True, True, False]
        pages = engine.parts.setup.regions.pages(1500)
        assert before - arena.free_pages <= pages + 2, "a fork copies the last page if it writes to it, and no other"
        finished(batch)
    assert [r.text for r in requests] == [wanted[0], "", *wanted[2:]] and requests[1].finish == "cancelled"
    assert [r.timing.prompt_tokens for r in requests] == [1500, 0, 0, 0, 1500], "the last is read when its turn comes"
    assert arena.free_pages == before and arena.free_sequences == 3
    assert not any(r.twins for r in requests), "or they would keep each other alive"


def test_twins_wait_where_others_may_not_begin_or_the_last_place_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=700, max_sequences=2)
    with engine.batch() as batch:
        first, second = batch.add_each(TEXT, [SAMPLING, SAMPLING])
        batch._begin(first)
        while not first.finish:
            batch.step(begin=False)
        assert (batch.begun, second.text, second.finish) == (0, "", "")
        third, fourth = batch.add_each(TEXT, [SAMPLING, SAMPLING])
        with engine.new_sequence(), monkeypatch.context() as patch:
            patch.setattr(batch._going, "has_room", lambda *_: True)
            while not third.answer:
                second.cancel()
                batch.step()
            assert not fourth.answer and not fourth.finish
        finished(batch)
    assert first.text == third.text == fourth.text != ""


def test_a_prompt_whose_place_another_thread_takes_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for room and the sequence there is time; where nothing else is going, nothing would free one."""
    real, taken = engine.new_sequence, []

    def new_sequence() -> SequenceCache:
        if len(taken) == 1:
            taken.append("by another thread")
            raise CapacityError("all sequences are taken")
        taken.append("here")
        return real()

    monkeypatch.setattr(engine, "new_sequence", new_sequence)
    config = SamplingConfig(max_new_tokens=4, ignore_eos=True)
    with engine.batch() as batch:
        first, second = batch.add("one", config), batch.add("two", config)
        while len(batch):
            batch.step()
    assert [first.finish, second.finish] == ["length"] * 2 and taken == ["here", "by another thread", "here"]
    taken[:] = ["here"]
    with engine.batch() as batch:
        alone = batch.add("one", config)
        with pytest.raises(CapacityError, match="are taken"):
            batch.step()
    assert alone.finish == "failed"


def test_those_that_wait_go_on_waiting_if_they_are_told_to(engine: Engine) -> None:
    with engine.batch() as batch:
        first = batch.add(TEXT, SAMPLING)
        batch.step()
        second = batch.add(TEXT, SAMPLING)
        while not first.finish:
            batch.step(begin=False)
        assert (len(batch), batch.begun, second.text) == (1, 0, "") and batch.step(begin=False) == []
        finished(batch)
    assert first.text == second.text


def test_several_answers_that_do_not_fit_are_refused_together(engine: Engine) -> None:
    with engine.batch() as batch:
        with pytest.raises(CapacityError, match="701"):
            batch.add_each([7] * 701, [SAMPLING, SAMPLING])
        with pytest.raises(OptionError, match="samplings must be"):
            batch.add_each(TEXT, SAMPLING)  # type: ignore[arg-type]
        assert batch.add_each(TEXT, []) == [] and not len(batch)


@pytest.mark.parametrize("others", [{}, {"temperature": 1.5, "seed": 3, "repeat_penalty": 1.3, "top_k": 4}])
def test_log_probabilities_are_those_of_the_model(engine: Engine, others: dict[str, Any]) -> None:
    """Of every token drawn, before temperature and filters, beside answers that ask for none, with guesses or without."""
    sampling = replace(SAMPLING, logprobs=3, max_new_tokens=20, **others)
    with engine.batch() as batch:
        plain, told, none = (
            batch.add(TEXT, replace(sampling, logprobs=None)),
            batch.add(TEXT, sampling),
            batch.add("a", SAMPLING),
        )
        finished(batch)
    assert plain.text == told.text and plain.logprobs == none.logprobs == [] and len(told.logprobs) == 20
    with engine.new_sequence() as sequence:
        list(engine.stream(TEXT, replace(sampling, prompt_lookup=3), sequence=sequence))
        ids, again = [*sequence.token_ids, *sequence.pending], sequence.logprobs
    assert [one.token for one in told.logprobs] == ids[-20:] == [one.token for one in again]
    rows = engine.logits(ids).log_softmax(-1)[-21:-1]
    for one, other, row in zip(told.logprobs, again, rows, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=4e-3) == pytest.approx(other.logprob, abs=4e-3)
        assert [value for _, value in one.likeliest] == pytest.approx(row.topk(3).values.tolist(), abs=4e-3)
        assert [float(row[token]) for token, _ in one.likeliest] == pytest.approx(row.topk(3).values.tolist(), abs=4e-3)


def test_questions_about_one_text_share_its_pages(folder: Path) -> None:
    """More of them than places, answered in forks: as by streams in forks made by hand; the text is as it was."""
    engine = tiny_engine(folder, tiny_cache(), max_context=3000, max_sequences=3)
    book, questions = engine.prefill(random_ids(1500)), ["who?", "where to?", "", "why not?"]
    mark, wanted = book.mark, []
    for question in questions:
        with book.fork() as fork:
            wanted.append("".join(engine.stream(question, SAMPLING, sequence=fork)))
    arena = engine.parts.setup.arena
    before = arena.free_pages
    with engine.batch() as batch:
        requests = [batch.add(question, SAMPLING, sequence=book, fork=True) for question in questions]
        least = before
        while batch.step():
            least = min(least, arena.free_pages)
    assert [r.text for r in requests] == wanted
    assert before - least <= 2, "a fork copies the last page if it writes to it, and no other"
    assert engine.generate(questions, SAMPLING, sequence=book) == wanted
    assert book.mark == mark and arena.free_pages == before
    book.free()


def test_a_sequence_is_continued(engine: Engine) -> None:
    """Without ``fork`` the answer stays in it, as that of a stream; one prompt given to ``generate`` continues it too."""
    found = []
    for how in ("stream", "batch", "generate"):
        with engine.prefill(TEXT * 3) as sequence:
            for text in ("And then?", ""):
                if how == "batch":
                    with engine.batch() as batch:
                        batch.add(text, SAMPLING, sequence=sequence)
                        finished(batch)
                elif how == "generate":
                    engine.generate(text, SAMPLING, sequence=sequence)
                else:
                    list(engine.stream(text, SAMPLING, sequence=sequence))
            found.append((sequence.token_ids, sequence.pending))
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("pieces_of_64")
@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_long_prompt_is_read_beside_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prefill: str, interleaved: bool
) -> None:
    """Answers go on while it is read, and a short prompt passes by; all say what they say alone. One by one otherwise."""
    monkeypatch.setattr(Batch, "_last_step", property(lambda batch: 0.0, lambda batch, seconds: None), raising=False)
    engine = tiny_engine(folder, tiny_cache(), max_context=2000, prefill=prefill)
    long, other = random_ids(1500), random_ids(900, seed=1)
    answering = SamplingConfig(max_new_tokens=30, ignore_eos=True)
    wanted = [engine.generate(prompt, answering) for prompt in (TEXT, long, TEXT * 2, other)]
    with engine.batch(interleaved=interleaved) as batch:
        first = batch.add(TEXT, answering)
        batch.step()
        requests = [first, *(batch.add(prompt, answering) for prompt in (long, TEXT * 2, other))]
        beside = 0
        while not requests[1].answer:
            said = first.text
            batch.step()
            beside += len(first.text) > len(said)
            assert requests[3].answer is None
        assert (beside > 10 and requests[2].text != "") if interleaved else (beside == 0 and not requests[2].text)
        finished(batch)
    assert [r.text for r in requests] == wanted
    assert engine.parts.setup.arena.free_sequences == 4
    reading = engine.prefill(long)
    seconds = requests[1].timing.prefill_seconds
    assert seconds > 0 and requests[1].timing.prefill == reading.timing.prefill
    reading.free()


@pytest.mark.usefixtures("pieces_of_64")
def test_a_prompt_can_be_cancelled_while_it_is_read(folder: Path) -> None:
    """A new one leaves nothing behind; a sequence that was to be continued is what it was, or holds whole chunks more."""
    engine = tiny_engine(folder, tiny_cache(), max_context=2000)
    book = engine.prefill(TEXT)
    length = book.length
    with engine.batch() as batch:
        requests = [batch.add(random_ids(1000), SAMPLING), batch.add(random_ids(500), SAMPLING, sequence=book)]
        for request in requests:
            for _ in range(5):
                assert batch.step() == []
            request.cancel()
        batch.step()
        assert len(batch) == 0
    assert [r.finish for r in requests] == ["cancelled"] * 2 and engine.parts.setup.arena.free_sequences == 3
    more = book.length - length
    assert more > 0 and more % 64 == 0 and book.token_ids[length:] == random_ids(500)[:more]
    with engine.prefill(TEXT) as other:
        engine.read(other, random_ids(500)[:more])
        assert engine.generate("", SAMPLING, sequence=book) == engine.generate("", SAMPLING, sequence=other)
    book.free()


def test_what_is_cancelled_makes_room(engine: Engine) -> None:
    wanted = engine.generate(TEXT, SAMPLING)
    long = SamplingConfig(max_new_tokens=600, ignore_eos=True)
    with engine.batch() as batch:
        going = [batch.add(TEXT * 2, long) for _ in range(4)]
        waiting = [batch.add(TEXT, SAMPLING) for _ in range(2)]
        for _ in range(6):
            batch.step()
        assert all(r.text for r in going) and not any(r.text for r in waiting)
        for request in (*going[:3], waiting[0]):
            request.cancel()
        while not waiting[1].finish:
            batch.step()
        assert waiting[1].text == wanted and [r.finish for r in (*going, waiting[0])] == ["cancelled"] * 3 + ["", "cancelled"]
        assert not waiting[0].text and len(batch) == 1 and "being answered" in repr(going[3])
    assert going[3].finish == "cancelled" and engine.parts.setup.arena.free_sequences == 4


def test_one_that_fails_does_not_stop_the_others(engine: Engine) -> None:
    wanted = engine.generate(TEXT, SAMPLING)
    gone, moved = engine.prefill(TEXT), engine.prefill(TEXT)
    with engine.batch() as batch:
        requests = [batch.add("?", SAMPLING, sequence=s, fork=True) for s in (gone, moved)] + [batch.add(TEXT, SAMPLING)]
        gone.free()
        moved.truncate(3)
        for reason in ("has been freed", "continued or cut"):
            with pytest.raises(OptionError, match=reason):
                batch.step()
        finished(batch)
    assert [r.finish for r in requests] == ["failed", "failed", "length"] and requests[2].text == wanted
    moved.free()


def test_what_cannot_be_answered_is_refused_at_once(engine: Engine, folder: Path) -> None:
    with engine.batch() as batch:
        with pytest.raises(CapacityError, match=r"750 tokens do not fit .* at least 755"):
            batch.add([5] * 750, SAMPLING)
        for arguments, reason in (
            ({"fork": True}, "fork needs a sequence"),
            ({"sequence": "book"}, "must come from prefill"),
            ({"fork": 1}, "fork must be bool"),
            ({"sampling": 3}, "sampling must be SamplingConfig"),
            ({"max_new_tokens": 3}, "give it as sampling=SamplingConfig"),
        ):
            wrong: dict[str, Any] = arguments
            with pytest.raises(OptionError, match=reason):
                batch.add(TEXT, **wrong)
        with pytest.raises(OptionError, match="prompt is empty"):
            batch.add("")
        assert len(batch) == 0
    endless = tiny_engine(folder, tiny_cache(), max_context=2560, on_full="shift")
    with endless.batch() as batch:
        batch.add([5] * 2700, SAMPLING)
        finished(batch)


def test_one_batch_at_a_time(engine: Engine) -> None:
    """A second one of the same thread would wait for ever and is refused; that of another thread waits for this."""
    order: list[str] = []

    def another() -> None:
        engine.generate([TEXT], SAMPLING)
        order.append("another")

    with ThreadPoolExecutor(1) as pool:
        with engine.batch() as batch:
            with pytest.raises(OptionError, match="has a batch open"):
                engine.generate([TEXT])
            waits = pool.submit(another)
            batch.add(TEXT, SAMPLING)
            finished(batch)
            order.append("this")
        waits.result()
    assert order == ["this", "another"]


def test_prompts_come_and_go_from_other_threads(engine: Engine) -> None:
    wanted = [engine.generate(TEXT * (n + 1), SAMPLING) for n in range(3)]
    lengths = [len(engine.encode(TEXT * (n + 1))) for n in range(3)]
    made: SimpleQueue[Request] = SimpleQueue()
    with engine.batch() as batch, ThreadPoolExecutor(3) as pool:

        def ask(n: int) -> None:
            for turn in range(8):
                request = batch.add(TEXT * (n + 1), SAMPLING)
                if turn % 4 == 3:
                    request.cancel()
                made.put(request)

        askers = [pool.submit(ask, n) for n in range(3)]
        while len(batch) or not all(asker.done() for asker in askers):
            batch.step()
        for asker in askers:
            asker.result()
    requests = [made.get() for _ in range(24)]
    assert {r.finish for r in requests} == {"length", "cancelled"}
    for request in requests:
        assert request.finish == "cancelled" or request.text == wanted[lengths.index(len(request.ids))]


def test_the_server_of_the_documentation(engine: Engine) -> None:
    """Eight clients at once for four places, one that asks nothing and one that leaves: the others get their answers."""
    [text] = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S) if "serve(" in b]
    names: dict[str, Any] = {"SamplingConfig": SamplingConfig}
    exec(text, names)
    wanted = [engine.generate(TEXT * (n + 1), SamplingConfig(max_new_tokens=100)) for n in range(4)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ask(text: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/", text.encode())
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    stop = Event()
    with ThreadPoolExecutor(9) as pool:
        served = pool.submit(names["serve"], engine, port, stop)
        try:
            while True:
                try:
                    left = socket.create_connection(("127.0.0.1", port))
                    break
                except ConnectionRefusedError:
                    assert not served.done(), served.result()
            left.sendall(b"POST / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc")
            left.close()
            asked = [pool.submit(ask, TEXT * (n % 4 + 1)) for n in range(8)]
            assert [a.result() for a in asked] == [(200, wanted[n % 4]) for n in range(8)]
            assert ask("")[0] == 400
        finally:
            stop.set()
        served.result()


# --- what others do to a batch ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pieces_of_64")
def test_a_sequence_that_is_read_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Between two pieces it is neither what it was nor what it will be. It can be cancelled; then it is the user's again."""
    engine = tiny_engine(folder, tiny_cache(), max_context=2000)
    sequence = engine.prefill(random_ids(200))
    held = sequence.length
    with engine.batch() as batch:
        request = batch.add(random_ids(1000, seed=1), SAMPLING, sequence=sequence)
        for _ in range(3):
            batch.step()
        for use in (
            sequence.fork,
            sequence.free,
            lambda: sequence.truncate(5),
            lambda: sequence.save(tmp_path / "s"),
            lambda: engine.read(sequence, [1]),
            lambda: engine.decode_step([sequence], [1]),
            lambda: engine.generate("a", SAMPLING, sequence=sequence),
        ):
            with pytest.raises(OptionError, match="is being read"):
                use()
        later = [batch.add("?", SAMPLING, sequence=sequence, fork=fork) for fork in (True, False)]
        for _ in range(3):
            assert batch.step() == []
        assert [r.finish for r in later] == ["", ""], "they wait for the end of the reading"
        request.cancel()
        for _ in later:
            with pytest.raises(OptionError, match="continued or cut"):
                batch.step()
    assert [r.finish for r in (request, *later)] == ["cancelled", "failed", "failed"]
    assert sequence.length > held and sequence.length % 64 == held % 64
    sequence.fork().free()
    sequence.free()
    assert engine.parts.setup.arena.free_sequences == 4


@pytest.mark.parametrize("harm, reason", [("free", "has been freed"), ("truncate", "continued or cut")])
def test_harm_to_one_answer_ends_that_alone(engine: Engine, harm: str, reason: str) -> None:
    wanted = engine.generate(TEXT, SAMPLING)
    sequence = engine.prefill(TEXT)
    with engine.batch() as batch:
        harmed, other = batch.add("?", SAMPLING, sequence=sequence), batch.add(TEXT, SAMPLING)
        for _ in range(3):
            batch.step()
        sequence.free() if harm == "free" else sequence.truncate(3)
        with pytest.raises(OptionError, match=reason):
            batch.step()
        finished(batch)
    assert (harmed.finish, other.finish, other.text) == ("failed", "length", wanted)
    assert reason in str(harmed.error) and other.error is None
    assert harmed.error is not None and harmed.error.__traceback__ is None  # whose frames would hold the engine
    sequence.free()


@pytest.mark.parametrize("first", [True, False])
def test_logits_that_are_no_numbers_end_one_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """The first of two, of which each has its own row of logits; or the first token of an answer alone."""
    wanted, head = engine.generate(TEXT, SAMPLING), engine.parts.model.head

    def broken(x: torch.Tensor) -> torch.Tensor:
        logits = head(x)
        logits.view(-1, logits.shape[-1])[0] = torch.nan
        return logits

    monkeypatch.setattr(engine, "step", EagerStep(engine.parts.model, engine.parts.rope, engine.parts.setup))
    with engine.batch() as batch:
        requests = [batch.add(TEXT, SAMPLING) for _ in range(1 if first else 2)]
        for _ in range(0 if first else 2):
            batch.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.parts.model, "head", broken)
            with pytest.raises(ModelError, match="logits is nan"):
                batch.step()
        finished(batch)
    assert requests[0].finish == "failed" and [r.text for r in requests[1:]] == [wanted] * (len(requests) - 1)


def test_a_step_that_never_works_ends_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of raising the same for ever."""
    with engine.batch() as batch:
        requests = [batch.add(TEXT, SAMPLING) for _ in range(2)]
        for _ in range(2):
            batch.step()
        monkeypatch.setattr(engine.step, "run", lambda *of: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.step()
        assert batch.step() == [] and [r.finish for r in requests] == ["failed"] * 2


def test_an_answer_that_cannot_be_decoded_fails_alone(folder: Path) -> None:
    """A rule that raises on the tokens of one of three."""

    class Picky:
        budget, needs_attention_mass = 4, False

        def keep(self, tokens: LeavingTokens) -> Tensor:
            if (tokens.token_ids == 311).any():
                raise ValueError("311 is here")
            return tokens.positions < 0

    report = Listener()
    engine = tiny_engine(folder, tiny_cache(filters=(Picky(),)), backend="numba", max_context=700, report=report)
    prompts, config = [[7] * 60, [*[8] * 50, 311], [9] * 40], SamplingConfig(max_new_tokens=150, ignore_eos=True)
    with engine.batch() as batch:
        requests = [batch.add(prompt, config) for prompt in prompts]
        with pytest.raises(SkvqError, match="311 is here"):
            finished(batch)
        finished(batch)
    assert [r.finish for r in requests] == ["length", "failed", "length"] and len(report.messages) == 1
    for at in (0, 2):
        assert requests[at].text == engine.generate(prompts[at], config)


def test_a_step_that_works_for_each_alone_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Listener()
    engine = tiny_engine(folder, tiny_cache(), max_context=700, report=report)
    wanted, run = engine.generate(TEXT, SAMPLING), engine.step.run

    def only_alone(sequences: Sequence[Any], token_ids: Sequence[int]) -> Any:
        if len(sequences) > 1:
            raise RuntimeError("out of memory")
        return run(sequences, token_ids)

    monkeypatch.setattr(engine.step, "run", only_alone)
    with engine.batch() as batch:
        requests = [batch.add(TEXT, SAMPLING) for _ in range(2)]
        finished(batch)
    assert [r.text for r in requests] == [wanted] * 2
    assert report.messages[1:] == ["2 answers are decoded one by one: together they cannot be (out of memory)"]


def test_an_interrupt_while_answers_are_decoded_one_by_one_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside an error; the answers go on with the next step."""
    engine = tiny_engine(folder, tiny_cache(), max_context=700)
    wanted, run = engine.generate(TEXT, SAMPLING), engine.step.run
    errors = [KeyboardInterrupt(), RuntimeError("alone"), RuntimeError("together")]

    def failing(sequences: Sequence[Any], token_ids: Sequence[int]) -> Any:
        if len(sequences) == (3 if len(errors) == 3 else 1) and errors:
            raise errors.pop()
        return run(sequences, token_ids)

    monkeypatch.setattr(engine.step, "run", failing)
    with engine.batch() as batch:
        requests = [batch.add(TEXT, SAMPLING) for _ in range(3)]
        with pytest.raises(KeyboardInterrupt):
            finished(batch)
        finished(batch)
    assert sorted(r.finish for r in requests) == ["failed", "length", "length"]
    assert all(r.text == wanted for r in requests if r.finish == "length")


def test_pages_of_a_cut_sequence_are_not_free(folder: Path) -> None:
    """One that goes on in it may hold more pages than its answer needs: a prompt that needs more than are left waits."""
    engine = tiny_engine(folder, tiny_cache(window=1000), max_context=4000, max_sequences=3)
    cut, other = engine.prefill(random_ids(3000)), engine.prefill(random_ids(3990))
    cut.truncate(1930)
    with engine.batch() as batch:
        first = batch.add([5], SamplingConfig(max_new_tokens=300, ignore_eos=True), sequence=cut)
        batch.step()
        second = batch.add(random_ids(3980), SAMPLING)
        for _ in range(20):
            batch.step()
        assert batch.begun == 1 and not second.finish
        other.free()
        finished(batch)
    assert first.finish == second.finish == "length"
    cut.free()


def test_pages_that_others_took(folder: Path) -> None:
    """An answer without a page fails, and gives what it had to the other."""
    engine = tiny_engine(folder, tiny_cache(), max_context=1400, max_sequences=4)
    arena, long = engine.parts.setup.arena, SamplingConfig(max_new_tokens=150, ignore_eos=True)
    with engine.batch() as batch:
        requests = [batch.add(TEXT, long) for _ in range(2)]
        for _ in range(2):
            batch.step()
        taken = [arena.new_page() for _ in range(arena.free_pages - 1)]
        with pytest.raises(CapacityError, match="pages of 1280 tokens are in use"):
            finished(batch)
        finished(batch)
    assert sorted(r.finish for r in requests) == ["failed", "length"]
    for page in taken:
        arena.release(page)
    assert arena.free_sequences == 4


@pytest.mark.usefixtures("pieces_of_64")
def test_an_interrupt_anywhere_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the n-th layer, of a reading or a step: with the next steps all ends, whole or failed, and nothing is held."""
    engine = tiny_engine(folder, tiny_cache(), max_context=2000)
    layer, prompts = engine.parts.model.layer, [random_ids(n, seed=n) for n in (300, 20, 150, 30)]
    wanted = [engine.generate([ids], SAMPLING)[0] for ids in prompts]
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise KeyboardInterrupt
        return layer(*arguments)

    for count in range(1, 18, 2):
        with monkeypatch.context() as patch, engine.batch() as batch:
            calls = count
            patch.setattr(engine.parts.model, "layer", interrupted)
            patch.setattr(engine, "step", EagerStep(engine.parts.model, engine.parts.rope, engine.parts.setup))
            requests = [batch.add(ids, SAMPLING) for ids in prompts]
            with pytest.raises(KeyboardInterrupt):
                finished(batch)
            finished(batch)
        texts = [r.text for r in requests if r.finish == "length"]
        assert len(texts) >= 3 and texts == [w for w, r in zip(wanted, requests, strict=True) if r.finish == "length"]
        assert engine.parts.setup.arena.free_sequences == 4


def test_a_closed_batch_takes_nothing(engine: Engine) -> None:
    with engine.batch() as batch:
        batch.add(TEXT, SAMPLING)
    for use in (lambda: batch.add(TEXT), batch.step):
        with pytest.raises(OptionError, match="has been closed"):
            use()
    assert len(batch) == 0


def test_adding_waits_for_no_computation(engine: Engine) -> None:
    """Nor does a thread that computes and adds, as from a progress bar, wait for a batch that waits for it."""
    with engine.batch() as batch, ThreadPoolExecutor(1) as pool:
        batch.add(TEXT, SamplingConfig(max_new_tokens=50, ignore_eos=True))
        batch.step()
        batch.add(TEXT, SAMPLING)
        holds, added = Event(), Event()

        def elsewhere() -> None:
            with engine.lock:
                holds.set()
                batch.add(TEXT, SAMPLING)
                added.set()

        stepped = pool.submit(elsewhere)
        holds.wait()
        batch.step()
        assert added.wait(60)
        stepped.result()
        finished(batch)


def test_short_answers_do_not_hold_up_others(engine: Engine) -> None:
    with engine.batch() as batch:
        answer = batch.add(TEXT, SamplingConfig(max_new_tokens=20, ignore_eos=True))
        batch.step()
        for _ in range(10):
            batch.add(TEXT, SamplingConfig(max_new_tokens=1))
            batch.step()
        assert answer.timing.new_tokens == 11


@pytest.mark.parametrize("shared_by", ["a book", "prefixes"])
def test_answers_that_drop_shared_pages_wait_for_pages_of_their_own(tmp_path: Path, shared_by: str) -> None:
    """Dropping a page that others read frees none: answers that outgrow the context are not begun as if they kept theirs."""
    options = {"max_context": 5200, "on_full": "shift", "backend": "numba", "prefill": "streaming"}
    engine = tiny_engine(tiny_folder(tmp_path, num_layers=1), tiny_cache(), **options, prefix_cache=shared_by == "prefixes")
    text, questions = random_ids(5000), [random_ids(20, seed=n) for n in range(3)]
    config = SamplingConfig(max_new_tokens=700, ignore_eos=True)
    if shared_by == "a book":
        with engine.prefill(text) as book:
            found = engine.generate(questions, config, sequence=book)
    else:
        engine.prefill(text).free()
        found = engine.generate([[*text, *question] for question in questions], config)
    assert engine.timing.new_tokens == 2100 and all(found)
    assert engine.parts.setup.arena.free_sequences == 4


def test_a_reporter_that_raises_ends_the_request_it_was_told_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError("stderr is gone")

    monkeypatch.setattr(engine.report, "message", gone)
    pieces: dict[Request, str] = {}
    with engine.batch() as batch:
        full, other = batch.add(random_ids(690), SamplingConfig(max_new_tokens=50, ignore_eos=True)), batch.add(TEXT, SAMPLING)
        errors = 0
        while len(batch):
            try:
                for request, piece in batch.step():
                    pieces[request] = pieces.get(request, "") + piece
            except BrokenPipeError:
                errors += 1
                assert errors < 3
    assert (full.finish, other.finish) == ("context", "length") and pieces[other] == other.text


def test_pages_that_only_the_prefix_store_keeps_are_room(tmp_path: Path) -> None:
    """Beside an answer that outgrows its context a short prompt is begun while pages are left, whatever prefixes are kept."""
    options: dict[str, Any] = {"max_context": 5200, "on_full": "shift", "backend": "numba", "prefill": "streaming"}
    engine = tiny_engine(tiny_folder(tmp_path, num_layers=1), tiny_cache(), **options, prefix_cache=True)
    outgrowing = SamplingConfig(max_new_tokens=2500, ignore_eos=True)
    with engine.batch() as batch:
        batch.add(random_ids(2800), outgrowing)
        while not any(piece for _, piece in batch.step()):
            pass
        short = batch.add(random_ids(200, seed=1), SAMPLING)
        for _ in range(40):
            batch.step()
        assert short.finish == "length"
