"""What a client of OpenAI's API asks for: prompts and sampling options of the JSON that it sends.

Source: https://platform.openai.com/docs/api-reference, of completions and chat completions; ``top_k``, ``min_p``,
``repetition_penalty``, ``ignore_eos`` and ``prompt_lookup`` are additions, the first four named as by vLLM. What would change
an answer and is not known here is refused; anything else that clients send (``user``, ``store``) is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.options import is_whole
from skvq.engine.prompt import Prompt, is_several

MOST_ANSWERS = 128
MOST_LIKELY = 20
"""Of the likeliest tokens that a scored prompt tells."""
SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "repeat_penalty": "repeat_penalty",
    "seed": "seed",
    "stop": "stop",
    "ignore_eos": "ignore_eos",
    "prompt_lookup": "prompt_lookup",
}
"""Names in a request and in ``SamplingConfig``; null is absent."""
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
    "top_logprobs": (0,),
    "chat_template_kwargs": ({},),
}
"""Names that this server does not know what to do with, and the values that ask for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request. prompts and sampling: of each choice in the answer; likeliest: 0, or how many tokens are told for each of a
    prompt that is to be scored, not answered; tells_usage: whether a stream ends with its counts.
    """

    prompts: tuple[Prompt, ...]
    sampling: tuple[SamplingConfig, ...]
    likeliest: int
    is_chat: bool
    is_stream: bool
    tells_usage: bool


def asked_for(body: bytes, defaults: SamplingConfig, *, is_chat: bool) -> Asked:
    """The request in a body; ``defaults`` hold where it says nothing. Raises OptionError, one line."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the request is not JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(fields, dict):
        raise OptionError("the request must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    likeliest = _likeliest(fields) if fields.get("echo", False) is not False and not is_chat else 0
    if likeliest:
        del fields["logprobs"], fields["echo"]
    for name, ignored in {**WITHOUT_EFFECT, "echo": (False,)}.items():
        if name in fields and not any(_is_same(fields[name], value) for value in ignored):
            raise OptionError(f"{name} is not supported by this server: leave it out")
    prompts = [_messages(fields.get("messages"))] if is_chat else _prompts(fields.get("prompt"))
    count = fields.get("n", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count * len(prompts) <= MOST_ANSWERS:
        raise OptionError(f"a request has 1 to {MOST_ANSWERS} answers, got n={count!r} for {len(prompts)} prompts")
    sampling = _sampling(fields, defaults)
    options = fields.get("stream_options", {})
    return Asked(
        prompts=tuple(prompt for prompt in prompts for _ in range(count)),
        sampling=tuple(_nth(sampling, at) for _ in prompts for at in range(count)),
        likeliest=likeliest,
        is_chat=is_chat,
        is_stream=bool(fields.get("stream", False)),
        tells_usage=isinstance(options, dict) and bool(options.get("include_usage", False)),
    )


def _likeliest(fields: Mapping[str, Any]) -> int:
    """How many tokens ``logprobs`` asks for beside each of the prompt, which ``echo`` asks for. Raises OptionError if more than
    the prompt is to be scored."""
    count = fields.get("logprobs")
    if not is_whole(count) or not 1 <= count <= MOST_LIKELY:
        raise OptionError(f"echo goes with logprobs, from 1 to {MOST_LIKELY}: it scores the prompt")
    if fields.get("max_tokens") not in (0, 1) or fields.get("n", 1) != 1 or fields.get("stream", False):
        raise OptionError("echo scores the prompt: give max_tokens 0 or 1, one answer, and no stream")
    return int(count)


def _is_same(one: object, other: object) -> bool:
    """Whether two values of JSON are equal: 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _sampling(fields: Mapping[str, Any], defaults: SamplingConfig) -> SamplingConfig:
    given = {ours: fields[theirs] for theirs, ours in SETTINGS.items() if theirs in fields}
    if given.get("top_k") == -1:  # all, as vLLM says it
        given["top_k"] = 0
    return replace(defaults, **given)


def _nth(sampling: SamplingConfig, at: int) -> SamplingConfig:
    """Those of one of several answers to a prompt: with a seed, each has its own."""
    return sampling if sampling.seed is None or not at else replace(sampling, seed=(sampling.seed + at) % 2**63)


def _prompts(prompt: Any) -> list[Prompt]:
    """A text, token ids, or a list of either."""
    if not isinstance(prompt, (str, list)) or not prompt:
        raise OptionError("prompt is missing: give a text, token ids, or a list of those")
    return prompt if is_several(prompt) and not isinstance(prompt, str) else [prompt]


def _messages(messages: Any) -> Prompt:
    """Chat messages whose content is text: that of several parts joined."""
    if not isinstance(messages, list) or not messages:
        raise OptionError("messages is missing: give a list of objects with role and content")
    found = []
    for message in messages:
        if not isinstance(message, dict):
            raise OptionError(f"each message must be an object with role and content, got {str(message)[:40]!r}")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part if isinstance(part, dict) else {"type": type(part).__name__} for part in content]
            other = next((part.get("type") for part in parts if part.get("type") not in ("text", "input_text")), None)
            if other is not None:
                raise OptionError(f"a part of a message is of type {str(other)[:40]!r}: this server reads text")
            content = "".join(str(part.get("text", "")) for part in parts)
        found.append({**message, "content": content})
    return found
