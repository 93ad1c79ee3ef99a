"""Answers of a form that is given: whatever is drawn, the whole answer is JSON of the schema, or matches the expression."""

from __future__ import annotations

import builtins
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_cache, tiny_engine, tiny_folder

from skvq.engine.batch import Batch
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError, SkvqError
from skvq.engine.generate import Engine
from skvq.engine.grammar import Grammar, Grammars
from skvq.loaders import dummy
from skvq.loaders.text import ByteTokenizer

CPU = torch.device("cpu")
END = 300
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Ending(ByteTokenizer):
    """Bytes, but that 257 is ``yes`` and 300 ends an answer; a space before a text is taken off if ``strips``."""

    strips = False

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (END,)

    @property
    def strips_first_space(self) -> bool:
        return self.strips

    def token_bytes(self, token_id: int) -> bytes:
        return {257: b"yes", END: b""}.get(token_id, super().token_bytes(token_id))


class Stripping(Ending):
    strips = True


@pytest.fixture(scope="module", params=[Ending, Stripping])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dummy, "ByteTokenizer", request.param)
        folder = tiny_folder(tmp_path_factory.mktemp("tiny"), num_layers=1)
        yield tiny_engine(folder, tiny_cache(method="plain"), backend="numba")


def grammar(regex: str | None = None, schema: Any = None, tokenizer: type[Ending] = Ending, **options: Any) -> Grammar:
    config = SamplingConfig(regex=regex, json_schema=schema)
    found = Grammars(tokenizer(320), 320).of(config, CPU, **options)
    assert found is not None
    return found


def answer_all(batch: Batch) -> None:
    while len(batch):
        batch.step()


def allowed(form: Grammar, *after: int) -> set[int]:
    return set(form.allowed(after).nonzero().flatten().tolist())


def test_what_may_be_next() -> None:
    """Tokens that the expression can go on with: whole ones, and the end where it may end; looking ahead changes nothing."""
    form = grammar("yes!?|y")
    assert allowed(form) == {ord("y"), 257}
    assert allowed(form, ord("y")) == {ord("e"), END}
    assert allowed(form, 257) == allowed(form, *b"yes") == {ord("!"), END}
    assert allowed(form, 257, ord("!")) == {END} and allowed(form) == {ord("y"), 257}
    allowed(form, 257, ord("x"))  # what cannot be taken does not matter
    form.take(257)
    form.take(ord("!"))
    assert allowed(form) == {END} == allowed(form, END)
    form.take(END)
    with pytest.raises(SkvqError, match="cannot be followed"):
        form.take(ord("x"))


@pytest.mark.parametrize("form", [{"regex": "a"}, {"schema": {"type": "boolean"}}], ids=str)
def test_a_space_that_is_taken_off_may_come_first(form: dict[str, Any]) -> None:
    space = ord(" ")
    first = allowed(grammar(**form))
    assert space not in first and first
    spaced = grammar(**form, tokenizer=Stripping)
    assert allowed(spaced) == {space, *first} and allowed(spaced, space) == first
    assert allowed(grammar(**form, tokenizer=Stripping, begins=False)) == first


@pytest.mark.parametrize("regex", ["^(yes|no)$", "(?x)a # c", "a/b", "\\\\"])
def test_an_expression_means_the_same_behind_a_space(regex: str) -> None:
    plain, spaced = grammar(regex), grammar(regex, tokenizer=Stripping)
    assert allowed(spaced, ord(" ")) == allowed(plain) and END not in allowed(plain)


def test_a_form_that_becomes_too_much_is_told_of() -> None:
    """llguidance then allows the end alone, and takes it: an answer would be over, and would seem whole."""

    class Exhausted:
        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "at 1(2): too many states\n<state>\n" + "x" * 90_000

        def consume_token(self, token: int) -> bool:
            return True

    with pytest.raises(OptionError, match=r"cannot be followed: too many states$"):
        Grammar(Exhausted(), 320, CPU).take(END)  # type: ignore[arg-type]


def test_answers_of_one_form_share_nothing() -> None:
    """What one of them has used up of what llguidance may hold is not missing to the others."""
    grammars, config = Grammars(Ending(320), 320), SamplingConfig(regex="[ab]*a[ab]{12}")
    for seed in range(3):
        form, draw = grammars.of(config, CPU), random.Random(seed)
        assert form is not None
        for _ in range(300):
            assert {ord("a"), ord("b")} <= allowed(form)
            form.take(draw.choice(b"ab"))


def test_an_end_token_that_has_a_text_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ending, "token_bytes", lambda self, token: b"</s>" if token == END else bytes([token % 256]))
    assert END not in allowed(grammar("<?/?s?>?</s>x"))


@pytest.mark.parametrize("own", [{}, {"x-guidance": {"whitespace_flexible": True}}])
def test_json_is_not_blank_for_ever(own: dict[str, Any]) -> None:
    form = grammar(schema={"type": "array", **own})
    blanks = {*b" \t\n\r"}
    form.take(ord("["))
    for _ in range(40):
        assert blanks < allowed(form)
        form.take(ord(" "))
    assert not blanks & allowed(form)


FORMS: list[dict[str, Any]] = [
    {"regex": "yes|no"},
    {"regex": r"\d{3}-[a-c]{2,4}"},
    {"json_schema": PERSON},
    {"json_schema": json.dumps(PERSON)},
    {"json_schema": {"enum": ["a", 7, None]}},
]


def fits(text: str, form: dict[str, Any]) -> bool:
    if "regex" in form:
        return re.fullmatch(form["regex"], text) is not None
    found, schema = json.loads(text), form["json_schema"]
    if "enum" in schema and isinstance(schema, dict):
        return found in schema["enum"]
    return set(found) == {"name", "age"} and len(found["name"]) <= 5 and 0 <= found["age"] <= 99


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_answers_have_their_form(engine: Engine, form: dict[str, Any]) -> None:
    """Of random weights: one by itself, as one of several, with guesses, and after others in a sequence; all alike."""
    samplings = [SamplingConfig(max_new_tokens=400, temperature=t, seed=s, **form) for t, s in ((0.0, 0), (1.0, 1), (3.0, 2))]
    texts = [engine.generate("Who?", sampling) for sampling in samplings]
    assert all(fits(text, form) for text in texts), texts
    assert engine.timing.finish == "end"
    with engine.batch() as batch:
        plain = batch.add("Who?", SamplingConfig(max_new_tokens=30))
        requests = [batch.add("Who?", sampling) for sampling in samplings]
        answer_all(batch)
    assert [request.text for request in requests] == texts and plain.text == engine.generate("Who?", plain.config)
    for sampling, text in zip(samplings, texts, strict=True):
        looking = SamplingConfig(
            **form, prompt_lookup=3, max_new_tokens=400, temperature=sampling.temperature, seed=sampling.seed
        )
        assert engine.generate("Who?", looking) == text
    with engine.prefill("Who?") as sequence:
        for sampling in samplings:
            assert fits("".join(engine.stream("And?", sampling, sequence=sequence)), form)


def test_the_model_chooses_among_what_is_allowed(engine: Engine) -> None:
    """Greedy: at each place the likeliest of the allowed tokens. What is told of it is what the model gave it."""
    with engine.prefill("Who?") as sequence:
        assert sequence.logits is not None
        first = sequence.logits.clone()
        "".join(engine.stream("", SamplingConfig(regex="[a-z]", logprobs=3), sequence=sequence))
        told = sequence.logprobs[0]
        letters = [*range(ord("a"), ord("z") + 1), *([ord(" ")] if engine.parts.tokenizer.strips_first_space else [])]
        assert told.token == max(letters, key=lambda token: float(first[token]))
        assert told.logprob == pytest.approx(float(first.log_softmax(-1)[told.token]), abs=1e-5)
        assert [token for token, _ in told.likeliest] == first.topk(3).indices.tolist()


def test_a_form_that_fails_ends_its_own_answer_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = Grammar.take, list[int]()

    def take(self: Grammar, token: int) -> None:
        taken.append(token)
        if len(taken) == 3:
            raise SkvqError("too complex")
        real(self, token)

    monkeypatch.setattr(Grammar, "take", take)
    with engine.batch() as batch:
        other = batch.add("Who?", SamplingConfig(max_new_tokens=6))
        failing = batch.add("Who?", SamplingConfig(max_new_tokens=6, regex="[a-z]{9}"))
        with pytest.raises(SkvqError, match="too complex"):
            answer_all(batch)
        answer_all(batch)
    assert failing.finish == "failed" and other.finish == "length" and other.timing.new_tokens == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regex": "(a"}, r"regex '\(a' cannot be used: unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "[a&&b]"}, "cannot be used: nothing has that form"),
        ({"regex": "a\\"}, "the backslash at its end escapes nothing"),
        ({"regex": "a)|(b"}, "cannot be used"),
        ({"regex": "\ud800"}, "regex must be a text, or None"),
        ({"json_schema": {"$ref": "#"}}, "cannot be used: nothing has that form"),
        ({"json_schema": [1]}, "or its text, got 'list'"),
        ({"regex": 3}, "regex must be a text, or None, got 3"),
        ({"json_schema": {"type": "thing"}}, 'json_schema \'{"type": "thing"}\' cannot be used: .*Invalid type: thing'),
        ({"json_schema": {"$ref": "#/none"}}, "does not exist"),
        ({"json_schema": "[1]"}, "must be a JSON object"),
        ({"json_schema": "{"}, "must be a JSON object"),
        ({"json_schema": {"a": {1, 2}}}, "must be a JSON object"),
        ({"json_schema": {"minimum": float("nan")}}, "must be a JSON object"),
        ({"json_schema": {}, "regex": "a"}, "give one"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos goes without"),
    ],
    ids=str,
)
def test_a_wrong_form_is_refused_before_anything_is_read(engine: Engine, options: dict[str, Any], words: str) -> None:
    for ask in (engine.stream, lambda text, config: engine.batch().__enter__().add(text, config)):
        with pytest.raises(OptionError, match=words):
            ask("a", SamplingConfig(**options))


def test_a_model_without_an_end_token_has_no_forms() -> None:
    with pytest.raises(OptionError, match="end token"):
        Grammars(ByteTokenizer(320), 320).require(SamplingConfig(regex="a"))


def test_without_llguidance_a_form_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    Grammars(Ending(320), 320).require(SamplingConfig())
    with pytest.raises(OptionError, match=r'pip install "skvq\[grammar\]"'):
        Grammars(Ending(320), 320).require(SamplingConfig(regex="a"))
