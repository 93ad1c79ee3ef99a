"""Chat templates: Jinja source from a model's files, rendered in a sandbox with the helpers of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

from skvq.engine.errors import ModelError, OptionError, counted
from skvq.loaders.fields import reason

ALWAYS_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
"""Names that every template gets."""
SAID = ("text", "refusal")
"""Parts of a content that are text, each under its own name."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names that what an assistant thought goes by."""
LAST_WORD = "last-word-of-the-assistant"
"""What an assistant says in a conversation rendered for what comes after it: no template changes it."""


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """Render a conversation. ``given`` are the names a template may use, such as ``bos_token``.

    Raises OptionError for malformed messages, ModelError for a missing or broken template or one that refuses them.
    """
    if template is None:
        raise ModelError("this model has no chat template: give the prompt as plain text, or use an instruct model")
    plain = [_plain(index, message) for index, message in enumerate(messages)]
    if not plain:
        raise OptionError("a chat needs at least one message")
    try:
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ModelError("chat templates need jinja2: pip install jinja2") from error

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says, for training: it is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    names = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **given}
    try:
        text = environment.from_string(template).render(messages=plain, **names)
        if _reads(text, plain):
            return text
        with suppress(Exception):  # one that reads parts, as Llama Guard 3's does, and finds none in a string
            in_parts = environment.from_string(template).render(messages=[_in_parts(message) for message in plain], **names)
            if _reads(in_parts, plain):
                return in_parts
        if _reads(text, plain, any):  # some leave the beginning of a conversation out
            return text
        raise ValueError("it leaves out what the user says")
    except Exception as error:
        if any("content" not in message for message in plain):
            with suppress(Exception):  # a template that asks for ``content is none``
                return environment.from_string(template).render(messages=[{"content": None, **m} for m in plain], **names)
        raise ModelError(f"the chat template failed on {counted(len(messages), 'message')} ({reason(error)})") from error


def render_turn(template: str | None, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> str:
    """What ``messages`` add to a conversation after the assistant's last word: first what ends that turn, then they.

    Raises as ``render_chat``. Messages that a template refuses in the middle of a conversation, such as a system message,
    are rendered as a conversation of their own.
    """
    alone = render_chat(template, messages, given, add_generation_prompt=True)
    before = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": LAST_WORD}]
    try:
        whole = render_chat(template, [*before, *messages], given, add_generation_prompt=True)
    except ModelError:
        return alone
    _, found, turn = whole.partition(LAST_WORD)
    return turn if found else alone


def _plain(index: int, message: object) -> dict[str, Any]:
    """The message as templates expect it: what is null left out, OpenAI's parts, ``[{"type": "text", "text": ...}, ...]``,
    joined, and what was thought under the name of ``reasoning_content`` too."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise OptionError(f"chat message {index} must have 'role' and 'content', got {str(message)[:80]!r}")
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[key] for key in THOUGHTS if key in message), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    content = message.get("content")
    if content is None:
        if message["role"] in ("system", "user"):
            raise OptionError(f"chat message {index} has no content: give a text")
        return message
    if isinstance(content, str):
        return message
    if not isinstance(content, (list, tuple)):
        raise OptionError(f"chat message {index}: content must be a text, got {str(content)[:80]!r}")
    texts = [part.get(part["type"]) if isinstance(part, Mapping) and part.get("type") in SAID else None for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            raise OptionError(
                f"chat message {index} holds {str(part)[:80]!r}: this engine reads text, {{'type': 'text', 'text': ...}}"
            )
    return {**message, "content": "".join(map(str, texts))}


def _reads(text: str, messages: Sequence[Mapping[str, Any]], of: Callable[[Iterable[bool]], bool] = all) -> bool:
    """Whether a rendered conversation holds the beginning of what users said, each time or, with ``any``, once."""
    said = [str(message["content"]).split(maxsplit=1) for message in messages if message["role"] == "user"]
    return not any(said) or of([words[0] in text for words in said if words])


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
