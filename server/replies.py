"""What a client of OpenAI's API is answered with: JSON objects, whole or in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from skvq.engine.sampling import TokenLogprob
from skvq.loaders.text import Tokenizer
from skvq.server.calls import Answers, Piece, Scores

FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


class Replies:
    """The objects of one answer, which share an id."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, is_chat: bool) -> None:
        self.tokenizer, self.is_chat = tokenizer, is_chat
        name = "chatcmpl" if is_chat else "cmpl"
        self._common = {"id": f"{name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, call: Answers) -> dict[str, Any]:
        """All choices at once."""
        choices = []
        for index, request in enumerate(call.requests):
            said = {"message": {"role": "assistant", "content": request.text}} if self.is_chat else {"text": request.text}
            logprobs = self._logprobs(request.logprobs)
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": FINISH[request.finish]})
        name = "chat.completion" if self.is_chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, "usage": usage_of(call)}

    def scored(self, call: Scores, *, drawn: bool) -> dict[str, Any]:
        """Prompts as choices, with the log probabilities of their tokens; ``drawn``: the likeliest next one is told as well."""
        choices, written = [], int(drawn)
        for index, (ids, found) in enumerate(zip(call.prompts, call.found, strict=True)):
            likeliest = [
                tuple(zip(*row, strict=True)) for row in zip(found.ids.tolist(), found.likeliest.tolist(), strict=True)
            ]
            following = [*zip(ids[1:], found.following.tolist(), strict=True), likeliest[-1][0]][: len(ids) - 1 + written]
            told = [TokenLogprob(*one, row) for one, row in zip(following, likeliest, strict=False)]
            scores = {name: [None, *column] for name, column in self._columns(told).items()}  # nothing precedes the first
            scores["tokens"][0] = self._spelling(ids[0])
            text = self.tokenizer.decode([ids[0], *(one.token for one in told)])
            choices.append({"index": index, "text": text, "logprobs": scores, "finish_reason": "length"})
        read, more = sum(map(len, call.prompts)), written * len(call.prompts)
        usage = {"prompt_tokens": read, "completion_tokens": more, "total_tokens": read + more}
        return {**self._common, "object": self._name, "choices": choices, "usage": usage}

    def first(self, count: int) -> Iterable[dict[str, Any]]:
        """What a stream of a chat begins with: who speaks."""
        return [self._piece(index, {"role": "assistant", "content": ""}, None) for index in range(count) if self.is_chat]

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """What a choice went on by."""
        return self._piece(index, {"content": piece.text}, None, self._logprobs(piece.logprobs))

    def last(self, index: int, finish: str) -> dict[str, Any]:
        """That a choice is over, and why."""
        return self._piece(index, {}, FINISH[finish])

    def usage(self, call: Answers) -> dict[str, Any]:
        """The counts of all choices, as a piece without any."""
        return {**self._common, "object": self._name, "choices": [], "usage": usage_of(call)}

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Of tokens of an answer; None if there are none to tell."""
        if not told or not self.is_chat:
            return self._columns(told) if told else None
        content = [
            {**self._spelt(one.token, one.logprob), "top_logprobs": [self._spelt(*other) for other in one.likeliest]}
            for one in told
        ]
        return {"content": content, "refusal": None}

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._spelling(token), "logprob": logprob, "bytes": [*self.tokenizer.token_bytes(token)]}

    def _columns(self, told: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """As completions tell them. Of tokens that are spelt alike the likeliest is told."""
        top = [
            {self._spelling(token): value for token, value in ((one.token, one.logprob), *reversed(one.likeliest))}
            for one in told
        ]
        return {
            "tokens": [self._spelling(one.token) for one in told],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": top,
        }

    def _spelling(self, token: int) -> str:
        """A token's own text, or, as vLLM writes it, its id if it has none that is whole characters."""
        try:
            return self.tokenizer.token_bytes(token).decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return f"token_id:{token}"

    @property
    def _name(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _piece(
        self, index: int, delta: dict[str, str], finish: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return {**self._common, "object": self._name, "choices": [choice]}


def usage_of(call: Answers) -> dict[str, Any]:
    """Tokens of the prompts, each counted once, and of the answers; and how many of the prompts' were there already, in whole
    pages of a common beginning."""
    read, each = sum(map(len, call.prompts)), len(call.requests) // len(call.prompts)
    written = sum(request.timing.new_tokens for request in call.requests)
    reused = sum(request.timing.reused_tokens for request in call.requests[::each])
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def error_of(message: str, *, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """The object of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
