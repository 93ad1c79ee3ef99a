"""What a client of OpenAI's API asks for: prompts and sampling options of the JSON that it sends.

Source: https://platform.openai.com/docs/api-reference, of completions and chat completions; ``top_k``, ``min_p``,
``repetition_penalty``, ``ignore_eos`` and ``prompt_lookup`` are additions, the first four named as by vLLM. What would change
an answer and cannot be done here is refused; other names are left alone, which is told of those that nobody knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from skvq.engine.config import MOST_LIKELY, SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.options import is_whole
from skvq.engine.prompt import Prompt, is_several

MOST_ANSWERS = 128
"""To all prompts of a request."""
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
WITHOUT_EFFECT: Mapping[str, Any] = {
    "bad_words": [],
    "best_of": 1,
    "chat_template": "",
    "chat_template_kwargs": {},
    "continue_final_message": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "grammar": "",
    "guided_choice": [],
    "guided_json": {},
    "guided_regex": "",
    "include_stop_str_in_output": False,
    "logit_bias": {},
    "min_tokens": 0,
    "presence_penalty": 0,
    "skip_special_tokens": True,
    "stop_token_ids": [],
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "truncate_prompt_tokens": -1,
    "typical_p": 1,
}
"""Names that this server can do nothing about, and the value of each that asks for nothing."""
MOST_STOPS = 16
FORMS = {"response_format", "structured_outputs"}
KNOWN = {"echo", "logprobs", "messages", "model", "n", "prompt", "stream", "stream_options", "top_logprobs", *FORMS}
HARMLESS = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
"""Names that change no answer of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request. sampling: of each answer to each prompt; likeliest: 0, or how many tokens are told for each of a prompt that
    is to be scored, not answered; tells_usage: whether a stream ends with its counts; unknown: names that were left alone.
    """

    prompts: tuple[Prompt, ...]
    sampling: tuple[SamplingConfig, ...]
    likeliest: int
    is_chat: bool
    is_stream: bool
    tells_usage: bool
    unknown: tuple[str, ...]


def asked_for(body: bytes, defaults: SamplingConfig, *, is_chat: bool) -> Asked:
    """The request in a body; ``defaults`` hold where it says nothing. Raises OptionError, one line."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the request is not JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(fields, dict):
        raise OptionError("the request must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    if fields.get("tool_choice") == "auto" and not fields.get("tools"):
        del fields["tool_choice"]
    if fields.get("tool_choice") == "none":  # of what there is, none is to be used
        fields.pop("tools", None)
    if fields.get("best_of") == fields.get("n", 1):
        fields.pop("best_of", None)
    likeliest = _likeliest(fields) if fields.get("echo") and not is_chat else 0
    if likeliest:
        del fields["logprobs"], fields["echo"]
    for name, nothing in {**WITHOUT_EFFECT, "echo": False}.items():
        if name in fields and not _is_same(fields[name], nothing):
            raise OptionError(f"{name} is not supported by this server: leave it out")
    prompts = [_messages(fields.get("messages"))] if is_chat else _prompts(fields.get("prompt"))
    count = fields.get("n", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count * len(prompts) <= MOST_ANSWERS:
        raise OptionError(f"a request has 1 to {MOST_ANSWERS} answers, got n={count!r} for {len(prompts)} prompts")
    sampling = _sampling(fields, defaults, _told(fields, is_chat=is_chat))
    if "stop" in fields and len(sampling.stops) > MOST_STOPS:
        raise OptionError(f"a request has up to {MOST_STOPS} stop strings, got {len(sampling.stops):,}")
    stream, options = fields.get("stream", False), fields.get("stream_options", {})
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise OptionError(f"stream must be true or false, stream_options an object, got {stream!r} and {str(options)[:40]!r}")
    return Asked(
        prompts=tuple(prompts),
        sampling=tuple(_nth(sampling, at) for at in range(count)),
        likeliest=likeliest,
        is_chat=is_chat,
        is_stream=stream,
        tells_usage=bool(options.get("include_usage", False)),
        unknown=tuple(sorted(fields.keys() - SETTINGS.keys() - WITHOUT_EFFECT.keys() - KNOWN - HARMLESS)),
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


def _told(fields: Mapping[str, Any], *, is_chat: bool) -> int | None:
    """How many of the likeliest tokens are told beside each that is written, or None if not even its own log probability is. A
    completion says it by ``logprobs`` alone; in a chat that is true or false, and ``top_logprobs`` the number."""
    said, most = fields.get("logprobs", False), fields.get("top_logprobs", 0)
    if not is_chat and not most:
        return None if said is False else said
    if not isinstance(said, bool) or not is_chat:
        raise OptionError("a chat says logprobs as true or false, and their number as top_logprobs; a completion as logprobs")
    if most and not said:
        raise OptionError("top_logprobs goes with logprobs as true")
    return most if said else None


def _sampling(fields: Mapping[str, Any], defaults: SamplingConfig, told: int | None) -> SamplingConfig:
    given = _form(fields) | {ours: fields[theirs] for theirs, ours in SETTINGS.items() if theirs in fields}
    given["logprobs"] = told
    if given.get("top_k") == -1:  # all, as vLLM says it
        given["top_k"] = 0
    if given.get("top_p") == 0:  # the likeliest alone
        given |= {"top_p": 1.0, "temperature": 0.0}
    try:
        return replace(defaults, **given)
    except OptionError as error:  # by the name that the client knows
        name, _, rest = str(error).partition(" ")
        theirs = next((theirs for theirs, ours in SETTINGS.items() if ours == name and theirs in fields), name)
        raise OptionError(f"{theirs} {rest}") from None


def _form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The form of the answer: OpenAI's ``response_format``, or vLLM's ``structured_outputs`` with ``json``, ``regex`` or
    ``choice``. Raises OptionError for another."""
    asked = {name: fields[name] for name in FORMS if fields.get(name)}
    if isinstance(outputs := asked.get("structured_outputs"), dict):
        asked["structured_outputs"] = {name: value for name, value in outputs.items() if value is not None}
    match asked:
        case nothing if not nothing:
            return {}
        case {"response_format": _, "structured_outputs": _}:
            raise OptionError("response_format and structured_outputs are two forms of an answer: give one")
        case {"response_format": {"type": "text"}}:
            return {"json_schema": None, "regex": None}
        case {"response_format": {"type": "json_object"}}:
            form: dict[str, Any] = {"json_schema": {"type": "object"}}
        case {"response_format": {"type": "json_schema", "json_schema": {"schema": dict(schema)}}}:
            form = {"json_schema": schema}
        case {"structured_outputs": {"json": (dict() | str()) as schema, **more}} if not more:
            form = {"json_schema": schema}
        case {"structured_outputs": {"regex": str(regex), **more}} if not more:
            form = {"regex": regex}
        case {"structured_outputs": {"choice": [*choices], **more}} if not more and _are_texts(choices):
            form = {"regex": "|".join(map(re.escape, choices))}
        case _:
            raise OptionError(
                "response_format has type text, json_object or json_schema (with json_schema.schema, an object), "
                f"structured_outputs one of json, regex and choice; got {str(asked)[:100]}"
            )
    return {"json_schema": None, "regex": None, "ignore_eos": False} | form


def _are_texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _nth(sampling: SamplingConfig, at: int) -> SamplingConfig:
    """Those of one of several answers to a prompt: with a seed, each has its own."""
    return sampling if sampling.seed is None or not at else replace(sampling, seed=(sampling.seed + at) % 2**63)


def _prompts(prompt: Any) -> list[Prompt]:
    """A text, token ids, or a list of either."""
    if not isinstance(prompt, (str, list)) or not prompt:
        raise OptionError(f"prompt is {_lack(prompt, 'text')}: give a text, token ids, or a list of those")
    return prompt if is_several(prompt) and not isinstance(prompt, str) else [prompt]


def _messages(messages: Any) -> Prompt:
    """Chat messages, which the engine looks at."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        raise OptionError(f"messages is {_lack(messages, 'list of objects')}: give a list of objects with role and content")
    return messages


def _lack(found: Any, wanted: str) -> str:
    return "missing" if found is None else "empty" if found in ("", []) else f"no {wanted}"
