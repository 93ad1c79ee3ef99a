# ruff: noqa: N802 (http.server names these methods)
"""HTTP around a ``Service``: OpenAI's completions and chat completions, whole or as a stream of events.

GET  /health               {"status": "ok"}
GET  /v1/models            the one model that is served
POST /v1/completions       a text, token ids, or a list of those
POST /v1/chat/completions  messages
"""

from __future__ import annotations

from contextlib import nullcontext

from skvq.engine.errors import OptionError, SkvqError, counted
from skvq.server.asked import Asked, asked_for
from skvq.server.calls import Answers, Call, Scores
from skvq.server.connection import Connection
from skvq.server.replies import Replies, error_of

PULSE = 10.0
"""Seconds between signs of life in a stream whose prompt is still being read, and looks at whether a client is still there."""
LONG_BYTES = 1 << 18
"""Longer requests are encoded one at a time."""
POSTS = {"/v1/completions": False, "/v1/chat/completions": True}
"""Where prompts are sent to, and whether they are chats."""


class Handler(Connection):
    """Answers what one client asks."""

    def do_HEAD(self) -> None:
        """As a GET is answered, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """See the module."""
        self.expect_no_body()
        if self.place == "/health":
            return self.send(200, {"status": "ok"})
        if not self.is_known():
            return None
        if self.place == "/v1/models" or self.place.startswith("/v1/models/"):
            model = {"id": self.server.settings.model, "object": "model", "created": 0, "owned_by": "skvq"}
            return self.send(200, {"object": "list", "data": [model]} if self.place == "/v1/models" else model)
        return self._not_here()

    def do_OPTIONS(self) -> None:
        """What a browser asks first, if web pages may ask."""
        self.expect_no_body()
        if self.server.settings.origin is None:
            return self.send(404, error_of("web pages may not ask here: start the server with --allow-origin"))
        self.send_response(204)
        self.send_header("Access-Control-Allow-Methods", "GET, POST")
        asked = self.headers.get("Access-Control-Request-Headers", "*")
        self.send_header("Access-Control-Allow-Headers", " ".join(asked.split()))
        self.send_header("Access-Control-Max-Age", "86400")
        return self.end_headers()

    def do_POST(self) -> None:
        """See the module."""
        body = self.body() if self.is_known() else None
        if body is None:
            return None
        if self.place not in POSTS:
            return self._not_here()
        with self.server.answering():
            return self._answer(body)

    def _answer(self, body: bytes) -> None:
        service, settings = self.server.service, self.server.settings
        try:
            with self.server.long_request if len(body) > LONG_BYTES else nullcontext():
                asked = asked_for(body, settings.defaults, is_chat=POSTS[self.place])
                self.server.tell_unknown(asked.unknown)
                if asked.likeliest:
                    call: Call = service.score(asked.prompts, asked.likeliest)
                else:
                    call = service.answer(asked.prompts, asked.sampling)
        except RecursionError:
            return self.refuse(OptionError("the request's JSON is nested too deeply"))
        except SkvqError as error:
            return self.refuse(error)
        gone = ""
        try:
            self._wait(asked, call)
        except OSError:
            gone, self.close_connection = "the client has gone", True
        finally:
            call.cancel()
        return settings.report.message(_line(self.place, call, gone))

    def _wait(self, asked: Asked, call: Call) -> None:
        """Send what is asked for, as it comes or when it is there."""
        tokenizer = self.server.service.engine.parts.tokenizer
        replies = Replies(self.server.settings.model, tokenizer, is_chat=asked.is_chat)
        if asked.is_stream and isinstance(call, Answers):
            return self._stream(asked, call, replies)
        left = len(asked.prompts) * (len(asked.sampling) if isinstance(call, Answers) else 1)
        while left and not call.error:
            news = call.next(PULSE)
            self.require_there()
            left -= news is not None and news[1] is None
        if call.error:
            return self.refuse(call.error, status=500)
        if isinstance(call, Scores):
            return self.send(200, replies.scored(call, drawn=bool(asked.sampling[0].max_new_tokens)))
        assert isinstance(call, Answers)
        return self.send(200, replies.whole(call))

    def _stream(self, asked: Asked, call: Answers, replies: Replies) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.send_events(replies.first(len(call.requests)))
        left = len(call.requests)
        while left and not call.error:
            news = call.next(PULSE)
            if news is None:
                self.write(b": reading\n\n")
            elif news[1] is not None:
                self.send_events([replies.piece(news[0], news[1])])
            else:
                left -= 1
                if not call.error:
                    self.send_events([replies.last(news[0], call.requests[news[0]].finish)])
        if call.error:
            return self.send_events([error_of(str(call.error), kind="server_error")])
        if asked.tells_usage:
            self.send_events([replies.usage(call)])
        return self.write(b"data: [DONE]\n\n")

    def _not_here(self) -> None:
        if self.place in POSTS:
            return self.send(405, error_of(f"{self.place} is asked by POST"))
        there_is = f"GET /v1/models, or POST to {' or '.join(POSTS)}"
        return self.send(404, error_of(f"there is nothing at {self.path[:80]}: {there_is}"))


def _line(path: str, call: Call, gone: str) -> str:
    """What was done for a client, for people; ``gone``: why it is over, if nobody waits for it."""
    read, why = sum(map(len, call.prompts)), gone or (str(call.error) if call.error else "")
    if not isinstance(call, Answers):
        return f"{path}: {counted(read, 'token')} {why or 'scored'}"
    timings = [request.timing for request in call.requests]
    reused, written = sum(t.reused_tokens for t in timings), sum(t.new_tokens for t in timings)
    again = f", {reused:,} of them reused" if reused else ""
    seconds = max(t.prefill_seconds for t in timings), max(t.decode_seconds for t in timings)
    finish = why or ", ".join(dict.fromkeys(t.finish for t in timings))
    begun = f" read{again} in {seconds[0]:.1f} s, {written:,} written in {seconds[1]:.1f} s" if seconds[0] else ""
    return f"{path}: {counted(read, 'token')}{begun}, {finish}"
