"""What a client of OpenAI's API is answered with: JSON objects, whole or in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

from skvq.loaders.text import Tokenizer
from skvq.server.service import Answers, Scores

FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


class Replies:
    """The objects of one answer, which share an id."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self.is_chat = is_chat
        name = "chatcmpl" if is_chat else "cmpl"
        self._common = {"id": f"{name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, call: Answers) -> dict[str, Any]:
        """All choices at once."""
        choices = []
        for index, request in enumerate(call.requests):
            said = {"message": {"role": "assistant", "content": request.text}} if self.is_chat else {"text": request.text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": FINISH[request.finish]})
        name = "chat.completion" if self.is_chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, "usage": usage_of(call)}

    def scored(self, call: Scores, tokenizer: Tokenizer, *, drawn: bool) -> dict[str, Any]:
        """Prompts as choices, with the log probabilities of their tokens; ``drawn``: the likeliest next one is told as well."""
        choices, written = [], int(drawn)
        for index, (ids, found) in enumerate(zip(call.prompts, call.found, strict=True)):
            following, likeliest, others = found.following.tolist(), found.likeliest.tolist(), found.ids.tolist()
            shown = [*ids, others[-1][0]][: len(ids) + written]
            tokens = [spelling(tokenizer, token) for token in shown]
            chosen = [*following, likeliest[-1][0]][: len(shown) - 1]
            top = []
            for row, values, token, value in zip(others, likeliest, tokens[1:], chosen, strict=False):
                told = dict(zip([spelling(tokenizer, one) for one in reversed(row)], reversed(values), strict=True))
                top.append({**told, token: max(value, told.get(token, value))})  # two tokens may have one spelling
            scores = {"tokens": tokens, "token_logprobs": [None, *chosen], "top_logprobs": [None, *top]}
            choices.append({"index": index, "text": tokenizer.decode(shown), "logprobs": scores, "finish_reason": "length"})
        read, more = sum(map(len, call.prompts)), written * len(call.prompts)
        usage = {"prompt_tokens": read, "completion_tokens": more, "total_tokens": read + more}
        return {**self._common, "object": self._name, "choices": choices, "usage": usage}

    def first(self, count: int) -> Iterable[dict[str, Any]]:
        """What a stream of a chat begins with: who speaks."""
        return [self._piece(index, {"role": "assistant", "content": ""}, None) for index in range(count) if self.is_chat]

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """What a choice went on by."""
        return self._piece(index, {"content": text}, None)

    def last(self, index: int, finish: str) -> dict[str, Any]:
        """That a choice is over, and why."""
        return self._piece(index, {}, FINISH[finish])

    def usage(self, call: Answers) -> dict[str, Any]:
        """The counts of all choices, as a piece without any."""
        return {**self._common, "object": self._name, "choices": [], "usage": usage_of(call)}

    @property
    def _name(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _piece(self, index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        return {**self._common, "object": self._name, "choices": [choice]}


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text, or, as vLLM writes it, its id if it has none that is whole characters."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else f"token_id:{token}"


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
