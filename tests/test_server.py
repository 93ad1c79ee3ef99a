"""The HTTP server: what clients of OpenAI's API send and get, from a tiny engine and from the command."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from http.client import HTTPConnection, HTTPException
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT
from loader_fixtures import byte_level_pipeline, random_weights, tiny_config, write_checkpoint
from processes import import_paths
from tiny import Listener, tiny_cache

from skvq import Engine, SamplingConfig
from skvq.cli import main
from skvq.engine.batch import Batch
from skvq.engine.errors import OptionError
from skvq.engine.report import Quiet
from skvq.server import connection, handler
from skvq.server.asked import asked_for
from skvq.server.handler import Handler
from skvq.server.listener import MOST_TOLD, Server, Settings
from skvq.server.service import NotRunning, Service

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEXT = "the quick brown fox"
DEFAULTS = SamplingConfig(max_new_tokens=12, ignore_eos=True)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_checkpoint(folder, tiny_config(num_layers=1), random_weights(tiny_config(num_layers=1)))
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(
        folder, cache=tiny_cache(method="plain"), max_context=700, max_sequences=4, device="cpu", report=Listener()
    )


class Client:
    """A server of its own, and what it is asked."""

    def __init__(self, engine: Engine, key: str | None = None, origin: str | None = None) -> None:
        self.report = Listener()
        self.server = Server("127.0.0.1", 0, Handler)
        self.service = Service(engine)
        settings = Settings(model="tiny", defaults=DEFAULTS, key=key, origin=origin, report=self.report)
        self.port = int(self.server.server_address[1])
        serving = Thread(target=self.server.serve, args=(self.service, settings))
        self._threads = [serving, Thread(target=self.service.run)]
        for thread in self._threads:
            thread.start()
        while self.service._batch is None:
            time.sleep(0.01)

    def close(self) -> None:
        self.service.stop()
        self.server.shutdown()
        self.server.server_close()
        for thread in self._threads:
            thread.join()

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON; ``body``: an object, or bytes as they are; none: a GET."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", path, data, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The objects of a stream, which must end as it should."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps(body | {"stream": True}).encode())
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        *events, end = [event for event in answer.read().decode().split("\n\n") if event and not event.startswith(":")]
        assert end == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def error(self, path: str, body: object) -> str:
        """The message of a request that is refused."""
        status, found = self.ask(path, body)
        assert status == 400, found
        assert "\n" not in found["error"]["message"]
        return str(found["error"]["message"])


@pytest.fixture
def client(engine: Engine) -> Iterator[Client]:
    found = Client(engine)
    yield found
    found.close()
    assert engine.parts.setup.arena.free_sequences == 4


def wanted(engine: Engine, prompt: Any, **changes: Any) -> str:
    """What the engine itself answers."""
    return engine.generate(prompt, SamplingConfig(**({"max_new_tokens": 12, "ignore_eos": True} | changes)))


# --- answers ----------------------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_engine_answers(engine: Engine, client: Client) -> None:
    status, found = client.ask(COMPLETIONS, {"model": "any", "prompt": TEXT, "user": "somebody"})
    text = wanted(engine, TEXT)
    assert status == 200 and found["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    count = len(engine.encode(TEXT))
    assert found["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 12,
        "total_tokens": count + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert (found["object"], found["model"]) == ("text_completion", "tiny") and found["id"].startswith("cmpl-")
    assert client.ask(COMPLETIONS, {"prompt": engine.encode(TEXT), "max_tokens": 5})[1]["choices"][0]["text"] == wanted(
        engine, TEXT, max_new_tokens=5
    )


def test_a_chat_is_written_by_the_template(engine: Engine, client: Client) -> None:
    parts = [{"type": "text", "text": "lazy "}, {"type": "text", "text": "dogs"}]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": parts}]
    status, found = client.ask(CHAT, {"messages": messages, "temperature": 0, "max_completion_tokens": 7})
    text = wanted(engine, [messages[0], {"role": "user", "content": "lazy dogs"}], max_new_tokens=7)
    assert status == 200 and found["object"] == "chat.completion"
    assert found["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_streams_say_the_same(engine: Engine, client: Client) -> None:
    *pieces, last, usage = client.events(COMPLETIONS, {"prompt": TEXT, "stream_options": {"include_usage": True}})
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == wanted(engine, TEXT) and len(pieces) > 3
    assert {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}
    assert last["choices"][0]["finish_reason"] == "length" and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    first, *pieces, last = client.events(CHAT, {"messages": [{"role": "user", "content": "hi"}]})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = wanted(engine, [{"role": "user", "content": "hi"}])
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == text
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert len({event["id"] for event in (first, *pieces, last)}) == 1


def test_several_prompts_and_several_answers(engine: Engine, client: Client) -> None:
    """Prompt by prompt; answers to one prompt have seeds of their own."""
    body = {"prompt": [TEXT, "jumps over"], "n": 2, "temperature": 1.5, "seed": 5}
    choices = client.ask(COMPLETIONS, body)[1]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    expected = [wanted(engine, p, temperature=1.5, seed=s) for p in (TEXT, "jumps over") for s in (5, 6)]
    read = sum(len(engine.encode(prompt)) for prompt in (TEXT, "jumps over"))
    assert client.ask(COMPLETIONS, body)[1]["usage"]["prompt_tokens"] == read, "each prompt is counted once"
    assert [choice["text"] for choice in choices] == expected and len(set(expected)) > 2
    texts = ["", "", "", ""]
    for event in client.events(COMPLETIONS, body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == expected


def test_log_probabilities_of_what_is_written(engine: Engine, client: Client) -> None:
    """As completions and as chats tell them, whole and in pieces; a token that is no whole character has bytes and an id."""
    body = {"prompt": TEXT, "logprobs": 2, "temperature": 1.0, "seed": 1}
    with engine.new_sequence() as sequence:
        list(engine.stream(TEXT, replace(DEFAULTS, temperature=1.0, seed=1, logprobs=2), sequence=sequence))
        told = sequence.logprobs
    found = client.ask(COMPLETIONS, body)[1]["choices"][0]["logprobs"]
    assert len(told) == 12 and found["token_logprobs"] == [one.logprob for one in told]
    assert [max(top.values()) for top in found["top_logprobs"]] == [one.likeliest[0][1] for one in told]
    assert all(token in top and 1 <= len(top) <= 3 for token, top in zip(found["tokens"], found["top_logprobs"], strict=True))
    pieces = [e["choices"][0]["logprobs"] for e in client.events(COMPLETIONS, body) if e["choices"][0]["logprobs"]]
    assert {name: [one for piece in pieces for one in piece[name]] for name in found} == found and len(pieces) > 3

    chat = {"messages": [{"role": "user", "content": "hi"}], "temperature": 1.0, "seed": 1, "logprobs": True}
    choice = client.ask(CHAT, chat | {"top_logprobs": 2})[1]["choices"][0]
    content = choice["logprobs"]["content"]
    assert [len(one["top_logprobs"]) for one in content] == [2] * 12
    text = b"".join(bytes(one["bytes"]) for one in content).decode(errors="replace")
    assert text.startswith(choice["message"]["content"].rstrip("\ufffd")) and len({one["logprob"] for one in content}) > 3
    for one in content:
        assert one["token"] == bytes(one["bytes"]).decode(errors="replace") or one["token"].startswith("token_id:")
    text = choice["message"]["content"]
    stopped = client.ask(CHAT, chat | {"stop": text[5:8]})[1]["choices"][0]
    told = "".join(bytes(one["bytes"]).decode(errors="replace") for one in stopped["logprobs"]["content"])
    assert stopped["message"]["content"] == text[: text.index(text[5:8])] != "" and told.startswith(
        text[: text.index(text[5:8])]
    )
    assert len(told) < 8, "nothing of what begins with the stop string or comes after it"
    pieces = [
        e["choices"][0]["logprobs"] for e in client.events(CHAT, chat | {"top_logprobs": 2}) if e["choices"][0]["logprobs"]
    ]
    assert [one for piece in pieces for one in piece["content"]] == content
    found = client.ask(CHAT, chat)[1]["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in found] == [[]] * 12 and [one["logprob"] for one in found] == [
        o["logprob"] for o in content
    ]


def test_stop_strings_and_the_end_of_the_context(engine: Engine, client: Client) -> None:
    text = wanted(engine, TEXT)
    stop = text[3:5]
    choice = client.ask(COMPLETIONS, {"prompt": TEXT, "stop": [stop, "nowhere"]})[1]["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    choice = client.ask(COMPLETIONS, {"prompt": [7] * 690, "max_tokens": 600})[1]["choices"][0]
    assert choice["finish_reason"] == "length"


def test_clients_are_answered_together_and_a_long_prompt_waits_for_its_place(engine: Engine, client: Client) -> None:
    prompts = [f"{TEXT} {n}" for n in range(9)] + ["dogs " * 120]
    with ThreadPoolExecutor(10) as pool:
        found = [*pool.map(lambda p: client.ask(COMPLETIONS, {"prompt": p})[1]["choices"][0]["text"], prompts)]
    assert found == [wanted(engine, prompt) for prompt in prompts]
    assert len(client.report.messages) == 10 and all("12 written" in line for line in client.report.messages)


@pytest.mark.parametrize("beside", [False, True])
def test_a_prompt_is_scored_as_lm_eval_asks(engine: Engine, client: Client, beside: bool) -> None:
    """Log probabilities through the packed cache, and what would have been likeliest; beside answers under way too."""
    ids = [*engine.encode(TEXT), *range(30, 200)]
    nll, exact = engine.nll(ids), engine.likelihoods(ids, 3)
    body = {"prompt": [ids, ids[:9]], "temperature": 0, "max_tokens": 1, "logprobs": 3, "seed": 1234, "echo": True}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(client.ask, COMPLETIONS, {"prompt": TEXT, "max_tokens": 60}) for _ in range(4 * beside)]
        status, found = client.ask(COMPLETIONS, body)
        assert all(other.result()[0] == 200 for other in others)
    assert status == 200 and [choice["index"] for choice in found["choices"]] == [0, 1]
    told = found["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(ids) + 1
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:-1] == pytest.approx((-nll).tolist(), abs=1e-4)
    best = exact.likeliest[:, 0].tolist()
    assert [max(top.values()) for top in told["top_logprobs"][1:]] == pytest.approx(best, abs=1e-4)
    assert told["token_logprobs"][-1] == pytest.approx(best[-1], abs=1e-4)
    assert found["usage"]["prompt_tokens"] == len(ids) + 9
    body = {"prompt": ids, "max_tokens": 0, "logprobs": 1, "echo": True}
    choice = client.ask(COMPLETIONS, body)[1]["choices"][0]
    assert choice["text"] == engine.decode(ids) and len(choice["logprobs"]["tokens"]) == len(ids)


# --- what goes wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (COMPLETIONS, b"{", "not JSON"),
        (COMPLETIONS, b"[" * 100_000, "not JSON"),
        (COMPLETIONS, [1], "JSON object"),
        (COMPLETIONS, {}, "prompt is missing"),
        (COMPLETIONS, {"prompt": ""}, "prompt is empty"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt is no text"),
        (COMPLETIONS, {"prompt": [1.5]}, "must be a text, token ids"),
        (COMPLETIONS, {"prompt": [5, 1.5]}, "whole numbers"),
        (COMPLETIONS, {"prompt": [5, 320]}, "token id 320"),
        (COMPLETIONS, {"prompt": TEXT, "n": 0}, "1 to 128 answers"),
        (COMPLETIONS, {"prompt": [TEXT] * 70, "n": 2}, "1 to 128 answers"),
        (COMPLETIONS, {"prompt": TEXT, "temperature": "hot"}, "temperature must be"),
        (COMPLETIONS, {"prompt": TEXT, "max_tokens": -1}, "max_tokens must be"),
        (COMPLETIONS, {"prompt": TEXT, "logprobs": 21}, "logprobs must be a whole number from 0 to 20"),
        (COMPLETIONS, {"prompt": TEXT, "logprobs": True}, "logprobs must be a whole number from 0 to 20"),
        (COMPLETIONS, {"prompt": TEXT, "top_logprobs": 2}, "a completion as logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "logprobs": 2}, "as true or false"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "goes with logprobs"),
        (COMPLETIONS, {"prompt": TEXT, "echo": True}, "echo goes with logprobs"),
        (COMPLETIONS, {"prompt": TEXT, "echo": True, "logprobs": 1}, "max_tokens 0 or 1"),
        (COMPLETIONS, {"prompt": TEXT, "echo": True, "logprobs": 21, "max_tokens": 0}, "from 1 to 20"),
        (COMPLETIONS, {"prompt": [7] * 701, "echo": True, "logprobs": 1, "max_tokens": 0}, "701 tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "echo": True}, "echo is not supported"),
        (COMPLETIONS, {"prompt": [7] * 701}, "701 tokens do not fit a context of 700"),
        (COMPLETIONS, {"prompt": "\ud800"}, "surrogate"),
        (CHAT, {"prompt": TEXT}, "messages is missing"),
        (CHAT, {"messages": [TEXT]}, "messages is no list of objects"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}, TEXT]}, "chat message 1 must have"),
        (CHAT, {"messages": [{"role": "user"}]}, "chat message 0 has no content"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "chat message 0 has no content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "this engine reads text"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "this engine reads text"),
        (COMPLETIONS, {"prompt": TEXT, "stream": "false"}, "stream must be true or false"),
        (COMPLETIONS, {"prompt": TEXT, "min_tokens": 4}, "min_tokens is not supported"),
        (COMPLETIONS, {"prompt": TEXT, "stop": ["x"] * 17}, "up to 16 stop strings"),
        (COMPLETIONS, {"prompt": [7] * 9000, "max_tokens": int("9" * 4300)}, "below 2^62"),
        (COMPLETIONS, {"prompt": [[7] * 690] * 100, "echo": True, "logprobs": 20, "max_tokens": 0}, "score fewer prompts"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools is not supported"),
        (COMPLETIONS, {"prompt": TEXT, "response_format": {"type": "xml"}}, "text, json_object or json_schema"),
        (COMPLETIONS, {"prompt": TEXT, "response_format": "json"}, "text, json_object or json_schema"),
        (COMPLETIONS, {"prompt": TEXT, "response_format": {"type": "json_schema"}}, "with json_schema.schema"),
        (COMPLETIONS, {"prompt": TEXT, "structured_outputs": {"choice": ["\ud800"]}}, "regex must be a text"),
        (COMPLETIONS, {"prompt": TEXT, "structured_outputs": {"choice": []}}, "one of json, regex and choice"),
        (COMPLETIONS, {"prompt": TEXT, "structured_outputs": {"json": {}, "regex": "a"}}, "one of json, regex and choice"),
        (COMPLETIONS, {"prompt": TEXT, "structured_outputs": {"regex": "("}}, "regex '(' cannot be used: unclosed group"),
        (COMPLETIONS, {"prompt": TEXT, "structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos goes without"),
        (
            COMPLETIONS,
            {"prompt": TEXT, "structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
            "two forms of an answer",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(client: Client, path: str, body: object, words: str) -> None:
    assert words in client.error(path, body)
    assert client.ask(COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [2]}, "strict": True}}},
            {"json_schema": {"enum": [2]}},
        ),
        ({"structured_outputs": {"json": '{"enum": [1]}'}}, {"json_schema": {"enum": [1]}}),
        ({"structured_outputs": {"regex": "[ab]{3}", "json": None}}, {"regex": "[ab]{3}"}),
        ({"structured_outputs": {"choice": ["a b.", "(c)", "d|e"]}}, {"regex": r"a\ b\.|\(c\)|d\|e"}),
    ],
    ids=str,
)
def test_an_answer_has_the_form_that_a_client_asks_for(
    engine: Engine, client: Client, asked: dict[str, Any], form: dict[str, Any]
) -> None:
    """Whatever form the server's own defaults have; and it ends, though they ignore its end."""
    body = {"prompt": TEXT, "max_tokens": 60, "temperature": 2.0, "seed": 5, **asked}
    choice = client.ask(COMPLETIONS, body)[1]["choices"][0]
    ignores = {} if form else {"ignore_eos": True}
    sampling = SamplingConfig(max_new_tokens=60, temperature=2.0, seed=5, **form, **ignores)
    assert choice["text"] == engine.generate(TEXT, sampling)
    assert choice["finish_reason"] == ("stop" if engine.timing.finish == "end" else "length")
    for defaults in (SamplingConfig(regex="x"), SamplingConfig(json_schema={})):
        (found,) = asked_for(json.dumps(body).encode(), defaults, is_chat=False).sampling
        assert (found.json_schema, found.regex) == (sampling.json_schema, sampling.regex)


def test_what_asks_for_nothing_is_no_error(client: Client) -> None:
    body = {
        "prompt": TEXT,
        "logprobs": None,
        "echo": False,
        "presence_penalty": 0.0,
        "best_of": 1,
        "top_k": -1,
        "logit_bias": {},
        "response_format": {},
        "structured_outputs": {},
        "top_logprobs": 0,
        "tool_choice": "auto",
    }
    assert client.ask(COMPLETIONS, body)[0] == 200
    assert asked_for(json.dumps(body).encode(), DEFAULTS, is_chat=False).sampling == (DEFAULTS,)
    body |= {"n": 3, "best_of": 3, "tools": [{"type": "function"}], "tool_choice": "none", "temperature": 0.8, "top_p": 0}
    asked = asked_for(json.dumps(body).encode(), DEFAULTS, is_chat=False)
    assert len(asked.sampling) == 3 and asked.sampling[0] == DEFAULTS, "greedy"


def test_places_that_there_are_and_others(client: Client) -> None:
    assert client.ask("/health") == (200, {"status": "ok"})
    assert [model["id"] for model in client.ask("/v1/models?x=1")[1]["data"]] == ["tiny"]
    assert client.ask("/v1/models/tiny")[1]["id"] == "tiny"
    assert client.ask("/v1/nothing")[0] == client.ask("/v1/embeddings", {})[0] == 404
    assert client.ask(CHAT)[0] == 405
    assert client.ask(f"http://127.0.0.1:{client.port}{COMPLETIONS}", {"prompt": "a", "max_tokens": 1})[0] == 200
    connection = HTTPConnection("127.0.0.1", client.port, timeout=60)
    for path, status in (("/health", 200), ("/nothing", 404)):
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert answer.status == status and int(answer.headers["Content-Length"]) > 9 and answer.read() == b""
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert b"413" in plain.recv(100)
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        plain.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = plain.makefile("rb").read()  # to its end: headers and body may come apart
        assert b"501" in answer and b'{"error"' in answer


@pytest.mark.parametrize("origin", [None, "http://localhost:3000", "*"])
def test_web_pages_may_ask_if_the_server_says_so(engine: Engine, origin: str | None) -> None:
    client = Client(engine, origin=origin)
    connection = HTTPConnection("127.0.0.1", client.port, timeout=60)
    try:
        asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Headers": "authorization,content-type"}
        connection.request("OPTIONS", CHAT, headers=asked)
        answer = connection.getresponse()
        assert answer.status == (404 if origin is None else 204)
        allowed = answer.headers.get("Access-Control-Allow-Headers"), answer.headers.get("Access-Control-Allow-Methods")
        assert allowed == ((None, None) if origin is None else ("authorization,content-type", "GET, POST"))
        answer.read()
        for path, body in (("/v1/models", None), (COMPLETIONS, {"prompt": "a", "max_tokens": 1, "stream": True}), (CHAT, {})):
            connection = HTTPConnection("127.0.0.1", client.port, timeout=60)
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body).encode())
            answer = connection.getresponse()
            assert answer.headers.get("Access-Control-Allow-Origin") == origin, "of errors too: a page may read them"
            answer.read()
    finally:
        client.close()


def test_a_key_is_asked_for(engine: Engine) -> None:
    client = Client(engine, key="sécret")
    try:
        for headers in ({}, {"Authorization": "Bearer other"}):
            assert client.ask("/v1/models", **headers)[0] == client.ask(COMPLETIONS, {"prompt": "a"}, **headers)[0] == 401
            for _ in range(9):  # what is still being sent is read, lest the answer is lost
                assert client.ask(COMPLETIONS, b"[" * 800_000, **headers)[0] == 401
        right = {"Authorization": "Bearer sécret".encode().decode("latin-1")}
        assert client.ask(COMPLETIONS, {"prompt": "a"}, **right)[0] == 200 and client.ask("/health")[0] == 200
    finally:
        client.close()


def test_no_depth_of_json_is_a_bug(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    for depth in (*range(900, 1000), 100_000):
        body = b'{"prompt": "a", "max_tokens": 1, "stop": %s%s}' % (b"[" * depth, b"]" * depth)
        status, found = client.ask(COMPLETIONS, body)
        assert status == 400 and "\n" not in found["error"]["message"]
    assert not capfd.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_gives_its_place_back(
    engine: Engine, client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Long before its answer is over, which takes until the context is full."""
    monkeypatch.setattr(handler, "PULSE", 0.05)
    begun = Event()
    step = Batch.step

    def slow(self: Batch, **options: Any) -> Any:
        begun.set()
        time.sleep(0.05)
        return step(self, **options)

    monkeypatch.setattr(Batch, "step", slow)
    body = json.dumps({"prompt": TEXT, "max_tokens": 650, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(body), body))
        begun.wait(10)
        time.sleep(0.2)
    end = time.monotonic() + 20
    while engine.parts.setup.arena.free_sequences < 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert engine.parts.setup.arena.free_sequences == 4
    while not client.report.messages:
        time.sleep(0.01)
    assert client.report.messages[0].endswith("the client has gone")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_is_told_and_others_go_on(
    client: Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stream: bool
) -> None:
    step, failed = Batch.step, []

    def failing(self: Batch, **options: Any) -> Any:
        if not failed:
            failed.append(1)
            for request in self._all():
                self._end(request, "failed")
            raise RuntimeError("a bug")
        return step(self, **options)

    monkeypatch.setattr(Batch, "step", failing)
    connection = HTTPConnection("127.0.0.1", client.port, timeout=60)
    connection.request("POST", COMPLETIONS, json.dumps({"prompt": TEXT, "stream": stream}).encode())
    answer = connection.getresponse()
    said = answer.read().decode()
    assert answer.status == (200 if stream else 500) and "an internal error" in said and "[DONE]" not in said
    assert "RuntimeError: a bug" in capfd.readouterr().err
    assert client.ask(COMPLETIONS, {"prompt": "a"})[0] == 200


def test_what_is_being_answered_when_the_server_ends_is_told(engine: Engine) -> None:
    client = Client(engine)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.ask, COMPLETIONS, {"prompt": TEXT, "max_tokens": 650})
        while not len(client.service._batch or ()):
            time.sleep(0.01)
        client.service.stop()
        status, found = asked.result()
    assert status == 503 and "has been stopped" in found["error"]["message"]
    status, found = client.ask(COMPLETIONS, {"prompt": TEXT})
    assert status == 503 and "not running" in found["error"]["message"]
    client.close()


def test_a_text_that_cannot_be_scored_is_refused_beside_an_answer(client: Client) -> None:
    """At once, and the next score does not wait behind it."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.ask, COMPLETIONS, {"prompt": TEXT, "max_tokens": 600})
        while not len(client.service._batch or ()):
            time.sleep(0.01)
        body = {"prompt": [7] * 701, "echo": True, "logprobs": 1, "max_tokens": 0}
        status, found = client.ask(COMPLETIONS, body)
        assert (status, found["error"]["code"]) == (400, "context_length_exceeded") and not answer.done()
        assert client.ask(COMPLETIONS, body | {"prompt": [7] * 9})[0] == 200 and not answer.done()
        assert answer.result()[0] == 200


def test_a_score_gets_its_place_however_many_answers_are_asked_for(engine: Engine, client: Client) -> None:
    """Twelve clients who ask again at once for four places: none begins before the score that came first."""
    done, over = [], Event()

    def asks_again() -> None:
        while not over.is_set():
            done.append(client.ask(COMPLETIONS, {"prompt": TEXT, "max_tokens": 40})[0])

    with ThreadPoolExecutor(12) as pool:
        loops = [pool.submit(asks_again) for _ in range(12)]
        while not done:
            time.sleep(0.01)
        before = len(done)
        status, _ = client.ask(COMPLETIONS, {"prompt": [7] * 600, "echo": True, "logprobs": 1, "max_tokens": 0})
        over.set()
        assert status == 200 and len(done) - before <= 8, "those under way, and those whose end the score's request overlapped"
        for loop in loops:
            loop.result()
    assert set(done) == {200}


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """Texts are scored in 50 more pieces of 20 ms each; the text of each that has begun."""
    scoring, begun = Engine.scoring, []

    def slow(self: Engine, ids: Sequence[int], count: int) -> Any:
        for _ in range(50):
            begun.append(ids)
            time.sleep(0.02)
            yield
        return (yield from scoring(self, ids, count))

    monkeypatch.setattr(Engine, "scoring", slow)
    return begun


def scored(count: int, token: int = 7) -> dict[str, Any]:
    return {"prompt": [[token] * 9] * count, "echo": True, "logprobs": 1, "max_tokens": 0}


def test_a_score_that_nobody_waits_for_ends(client: Client, pieces: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "PULSE", 0.02)
    body = json.dumps(scored(100)).encode()
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        end = time.monotonic() + 20
        while not pieces and time.monotonic() < end:
            time.sleep(0.01)
    assert client.ask(COMPLETIONS, {"prompt": TEXT})[0] == 200
    assert 0 < len(pieces) < 50 and client.report.messages[0].endswith("the client has gone")


def test_the_end_of_the_server_breaks_off_a_score(engine: Engine, pieces: list[Any]) -> None:
    client = Client(engine)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.ask, COMPLETIONS, scored(100))
        while not pieces:
            time.sleep(0.01)
        client.close()
        assert asked.result()[0] == 503 and len(pieces) < 50
    assert engine.parts.setup.arena.free_sequences == 4


def test_texts_that_are_scored_take_turns_and_answers_go_on(client: Client, pieces: list[Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        many, one = pool.submit(client.ask, COMPLETIONS, scored(3, 8)), pool.submit(client.ask, COMPLETIONS, scored(1, 9))
        while not pieces:
            time.sleep(0.01)
        before = len(pieces)
        assert client.ask(COMPLETIONS, {"prompt": TEXT, "max_tokens": 30})[0] == 200
        assert 10 < len(pieces) - before < 150, "a piece a step, or more in the time that a step takes"
        assert one.result()[0] == 200 and not many.done()
        assert many.result()[0] == 200


@pytest.fixture
def whole_scores(monkeypatch: pytest.MonkeyPatch) -> tuple[Event, Event]:
    """A text to be scored stops behind its first piece: when it has, and until it may go on."""
    scoring, begun, go_on = Engine.scoring, Event(), Event()

    def slow(self: Engine, ids: Sequence[int], count: int) -> Any:
        pieces = scoring(self, ids, count)
        next(pieces)
        begun.set()
        while not go_on.is_set():
            time.sleep(0.002)
            yield
        return (yield from pieces)

    monkeypatch.setattr(Engine, "scoring", slow)
    return begun, go_on


def test_answers_wait_for_what_a_score_holds(folder: Path, whole_scores: tuple[Event, Event]) -> None:
    """They are not refused: the place will be free again."""
    begun, go_on = whole_scores
    client = Client(Engine.load(folder, cache=tiny_cache(method="plain"), max_context=700, max_sequences=1, report=Listener()))
    try:
        with ThreadPoolExecutor(2) as pool:
            score = pool.submit(client.ask, COMPLETIONS, scored(1))
            assert begun.wait(20)
            answer = pool.submit(client.ask, COMPLETIONS, {"prompt": TEXT})
            time.sleep(0.3)
            assert not answer.done() and not score.done()
            go_on.set()
            assert score.result()[0] == answer.result()[0] == 200
    finally:
        client.close()


def test_a_score_leaves_the_pages_that_answers_will_take(folder: Path, whole_scores: tuple[Event, Event]) -> None:
    begun, go_on = whole_scores
    engine = Engine.load(folder, cache=tiny_cache(method="plain"), max_context=3000, max_sequences=2, report=Listener())
    arena, client = engine.parts.setup.arena, Client(engine)
    taken = [arena.new_page() for _ in range(arena.free_pages - 4)]  # of 3 each may need, 4 are left
    try:
        with ThreadPoolExecutor(2) as pool:
            answer = pool.submit(client.ask, COMPLETIONS, {"prompt": [7] * 2600, "max_tokens": 300})
            while not client.service._batch.begun:  # type: ignore[union-attr]
                time.sleep(0.01)
            score = pool.submit(client.ask, COMPLETIONS, scored(1) | {"prompt": [9] * 2700})
            assert answer.result()[0] == 200 and not score.done()
            assert begun.wait(20)
            go_on.set()
            assert score.result()[0] == 200
    finally:
        client.close()
        for page in taken:
            arena.release(page)


def test_an_answer_on_an_open_connection_does_not_wait_for_the_network(client: Client) -> None:
    """Nagle's algorithm would hold back what follows the headers, for 40 ms each time."""
    connection = HTTPConnection("127.0.0.1", client.port, timeout=60)
    taken = []
    for _ in range(15):
        begun = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        taken.append(time.perf_counter() - begun)
    connection.close()
    assert min(taken[1:]) < 0.02


def test_many_open_files_and_a_bug_in_a_handler(
    client: Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """File descriptors beyond 1,024 are as good as others; a bug is printed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with ExitStack() as held:
        for _ in range(1100):
            held.enter_context(open(os.devnull))
        assert client.ask(COMPLETIONS, {"prompt": TEXT})[0] == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(handler, "asked_for", lambda *args, **options: 1 / 0)
    with pytest.raises((ConnectionError, HTTPException)):
        client.ask(COMPLETIONS, {"prompt": TEXT})
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_only_bodies_of_one_stated_length_are_taken(client: Client) -> None:
    wrong = {b"Transfer-Encoding: chunked": b"411", b"X: y": b"411", b"Content-Length: -1": b"400"}
    wrong |= {b"Content-Length: 3\r\nContent-Length: 4": b"400", b"Content-Length: 99999999": b"413"}
    for headers, status in wrong.items():
        request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n{}"
        assert answers_of(client, request, more=False).split()[1] == status
    status, found = client.ask(COMPLETIONS, b"x" * (2 << 20))
    assert status == 413 and "up to" in found["error"]["message"]


def answers_of(client: Client, sent: bytes, *, more: bool) -> bytes:
    """All that comes back for these bytes; ``more``: a client that may send more."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as plain:
        plain.sendall(sent)
        if not more:
            plain.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: plain.recv(1 << 16), b""))


def test_what_is_no_address_and_bodies_that_are_not_read(client: Client) -> None:
    assert b" 404 " in answers_of(client, b"GET http://[ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", more=True)
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    found = answers_of(client, b"OPTIONS / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(inner), inner), more=True)
    assert found.count(b"HTTP/1.1 ") == 1
    kind = {"Content-Type": "multipart/form-data; boundary=q"}  # a body that is JSON all the same
    assert client.ask(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, **kind)[0] == 200


def test_a_broken_header_line_hides_no_others(client: Client) -> None:
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port)) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nbroken\r\nContent-Length: %d\r\n\r\n%s" % (len(inner), inner))
        answer = plain.makefile("rb").read()
    assert answer.count(b"HTTP/1.1") == 1 and b"headers is broken" in answer


def test_without_file_descriptors_connections_wait(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, tries = ThreadingHTTPServer.get_request, []

    def refused(self: Server) -> Any:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(ThreadingHTTPServer, "get_request", refused)
    assert client.ask("/health")[0] == 200 and len(tries) == 4 and tries[-1] - tries[0] > 0.2


def test_a_body_of_a_get_is_not_the_next_request(client: Client) -> None:
    inner = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
    for header in (b"Content-Length: %d" % len(inner), b"Transfer-Encoding: chunked"):
        found = answers_of(client, b"GET /health HTTP/1.1\r\n" + header + b"\r\n\r\n" + inner, more=True)
        assert found.count(b"HTTP/1.1 ") == 1 and found.endswith(b'{"status": "ok"}')


@pytest.mark.parametrize("line", [b"GARBAGE", b"GET /health HTTP/9.9"])
def test_a_broken_request_line_is_answered_as_http(client: Client, line: bytes) -> None:
    found = answers_of(client, line + b"\r\n\r\n", more=True)
    assert found.startswith(b"HTTP/1.1 ") and b'{"error": ' in found


def test_replies_in_slices_are_whole(engine: Engine, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SLICE", 7)
    assert client.ask(COMPLETIONS, {"prompt": TEXT})[1]["choices"][0]["text"] == wanted(engine, TEXT)


def test_an_unknown_name_is_told_once(client: Client) -> None:
    for _ in range(2):
        assert client.ask(COMPLETIONS, {"prompt": TEXT, "temprature": 1, "user": "me"})[0] == 200
    assert sum("'temprature'" in line and "left alone" in line for line in client.report.messages) == 1
    for names in (range(90), range(500, 700), range(1000, 1200)):
        assert client.ask(COMPLETIONS, {"prompt": "a", "max_tokens": 1} | {f"x{n}": 1 for n in names})[0] == 200
    assert sum("left alone" in line for line in client.report.messages) == MOST_TOLD


def test_turns_of_a_conversation_share_pages(folder: Path) -> None:
    options: dict[str, Any] = {"max_context": 3000, "max_sequences": 2, "device": "cpu", "report": Listener()}
    client = Client(Engine.load(folder, cache=tiny_cache(method="plain"), **options))
    try:
        said = [{"role": "user", "content": "lazy dogs " * 500}]
        first = client.ask(CHAT, {"messages": said})[1]
        said += [first["choices"][0]["message"], {"role": "user", "content": "and"}]
        usage = client.ask(CHAT, {"messages": said})[1]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 1280
    finally:
        client.close()


# --- the command ----------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=rf"cannot listen on 127.0.0.1, port {port} .*--port"):
            Server("127.0.0.1", port, Handler)


@pytest.mark.parametrize("host", ["\u00e9..\u00e9", "\udcff", "no such host"])
def test_a_host_that_is_none_is_one_line(host: str) -> None:
    with pytest.raises(OptionError, match=r"cannot listen on .*--host"):
        Server(host, 0, Handler)


@pytest.mark.parametrize(
    "options, told",
    [
        (("--allow-origin", "http://\u4f8b.jp"), "--allow-origin 'http://"),
        (("--allow-origin", "a\r\nX-Evil: 1"), "--allow-origin 'a\\r\\nX-Evil: 1'"),
        (("--prompt-lookup", 3, "--filter", "heavy-hitters"), "--prompt-lookup cannot be combined"),
    ],
    ids=str,
)
def test_what_no_request_could_be_answered_with_is_refused_at_the_start(
    folder: Path, options: tuple[object, ...], told: str
) -> None:
    given = ["--port", 0, "--ctx", 300, "--method", "plain", "--group-size", 32, "--device", "cpu", "--backend", "reference"]
    result = CliRunner().invoke(main, ["serve", "--model", str(folder), *map(str, [*given, *options])])
    assert result.exit_code == 2 and told in result.stderr and len(result.stderr.splitlines()) <= 2, result.stderr


def test_the_command_may_have_more_stop_strings_than_a_request() -> None:
    defaults = SamplingConfig(stop=tuple("abcdefghijklmnopqrs"))
    assert len(asked_for(b'{"prompt": "x"}', defaults, is_chat=False).sampling[0].stops) == 19


def test_a_key_may_be_any_bytes(engine: Engine) -> None:
    client = Client(engine, key="\udcff\u00e9")  # as Python holds the bytes ff c3 a9 of an argument
    try:
        assert client.ask("/v1/models", Authorization="Bearer \xff\xc3\xa9")[0] == 200
        assert client.ask("/v1/models", Authorization="Bearer \xff")[0] == 401
    finally:
        client.close()


def test_the_end_waits_until_clients_have_been_told() -> None:
    with Server("127.0.0.1", 0, Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        begun, told = Event(), list[bool]()

        def tell() -> None:
            with server.answering():
                begun.set()
                time.sleep(0.3)
                told.append(True)

        Thread(target=tell).start()
        begun.wait()
        server.end()
        assert told == [True]


def test_what_is_asked_for_at_once_is_answered(folder: Path) -> None:
    """A service is ready when it says so: who reads its address may ask."""
    engine = Engine.load(folder, cache=tiny_cache(method="fp"), max_context=300, device="cpu", report=Quiet())
    service, calls = Service(engine), list[Any]()

    def ready() -> None:
        calls.append(service.answer([TEXT], [SamplingConfig(max_new_tokens=1)]))
        service.stop()

    service.run(ready)
    assert len(calls) == 1 and isinstance(calls[0].error, NotRunning), "it was stopped after it had been asked"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "skvq", "serve", "--model", str(folder), "--port", "0", "--ctx", "300", "-n", "5"]
    options = ["--method", "fp", "--device", "cpu", "--backend", "reference", "--threads", "1", "--ignore-eos"]
    environment = {**os.environ, "PYTHONPATH": import_paths()}
    process = subprocess.Popen([*command, *options], cwd=ROOT.parent, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        at = next(line for line in lines if " at http://" in line)
        port = int(at.partition("127.0.0.1:")[2].partition("/v1")[0])
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", COMPLETIONS, json.dumps({"prompt": TEXT}).encode())
        found = json.loads(connection.getresponse().read())
        assert "usage" in found, found
        assert found["usage"]["completion_tokens"] == 5 and found["model"] == str(folder)
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else 0)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
