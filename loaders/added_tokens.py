"""Tokens that a model's files add to its vocabulary, and how each is found in a text."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Pipeline

from skvq.engine.errors import ModelError
from skvq.loaders.fields import Fields, read_by_library, read_json

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA_NAMES = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """Special ones are no text; ``lstrip`` and ``rstrip`` take in the white space before and after."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


def special_tokens(options: Fields) -> dict[str, AddedToken]:
    """Special tokens by name, such as ``bos_token``, or such as a file makes up; it may write one as an object."""
    named = {name: options.data[name] for name in SPECIAL_NAMES if name in options.data}
    for name in EXTRA_NAMES:
        if isinstance(own := options.data.get(name), dict):
            named |= {key: value for key, value in own.items() if key not in named}
    found = {name: _special(value, name, options) for name, value in named.items()}
    return {name: token for name, token in found.items() if token is not None}


def nameless_tokens(options: Fields) -> list[AddedToken]:
    """Special tokens that have no name."""
    listed = [(name, value) for name in EXTRA_NAMES if isinstance(value := options.data.get(name), list)]
    found = [_special(item, name, options) for name, value in listed for item in value]
    return [token for token in found if token is not None]


def declared_tokens(options: Fields) -> dict[int, AddedToken]:
    """``added_tokens_decoder`` of tokenizer_config.json, by id."""
    found = {}
    for name, token in options.section("added_tokens_decoder").data.items():
        fields = Fields(token if isinstance(token, dict) else {}, f"added token {name[:20]} of {options.where}")
        text = require_unicode(fields.text("content"), fields.where)
        flags = {flag: fields.flag(flag, False) for flag in ("special", *FLAGS)}
        index = int(name) if name.isdecimal() and len(name) < 10 else name
        found[require_id(index, text, options.where)] = AddedToken(text, **flags)
    return found


def listed_tokens(folder: Path, special: Container[str]) -> dict[int, AddedToken]:
    """added_tokens.json, by id: older files, which say nothing else of a token; those in ``special`` are."""
    path = folder / "added_tokens.json"
    listed = read_json(path).data.items() if path.is_file() else ()
    return {
        require_id(index, text, str(path)): AddedToken(require_unicode(text, str(path)), special=text in special)
        for text, index in listed
    }


def with_tokens(
    pipeline: Pipeline,
    declared: Mapping[int, AddedToken],
    listed: Mapping[int, AddedToken],
    special: Iterable[AddedToken],
    where: str,
) -> Pipeline:
    """A pipeline that finds these tokens too, as `transformers` adds them: ``declared`` as it says, ``listed`` and ``special``
    unless the pipeline knows better; what it has under another id stays there. ModelError if one that it does not have would
    get another id.
    """
    known = {index: AddedToken(**_flags(token)) for index, token in pipeline.get_added_tokens_decoder().items()}
    spelled = {token.content for token in (*known.values(), *declared.values())}
    new = {**{index: token for index, token in listed.items() if token.content not in spelled}, **declared}
    new = {i: token for i, token in new.items() if known.get(i) != token and pipeline.token_to_id(token.content) in (None, i)}
    if new:
        data = json.loads(pipeline.to_str())
        entries = {index: asdict(token) for index, token in (known | new).items()}
        data["added_tokens"] = [{"id": index, **entries[index]} for index in sorted(entries)]
        with read_by_library(f"{where} adds tokens that do not go with tokenizer.json"):
            pipeline = Pipeline.from_str(json.dumps(data))
    spelled = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    others = {token.content: token for token in special if token.content not in spelled}
    pipeline.add_special_tokens([tokenizers.AddedToken(**asdict(token)) for token in others.values()])
    for index, token in new.items():
        text, found = token.content[:40], pipeline.token_to_id(token.content)
        if found != index:
            raise ModelError(f"{where} gives {text!r} the id {index}, tokenizer.json gives it {found}: download both again")
    return pipeline


def require_unicode(text: str, what: str) -> str:
    """The text, or ModelError if it holds half a surrogate pair, which JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError(f"{what} is not valid Unicode: half of a surrogate pair") from None
    return text


def require_id(index: object, text: str, where: str) -> int:
    """The id of a token. ModelError if it is none, or the token is empty."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 2**31 or not text:
        raise ModelError(f"{where} adds the token {text[:40]!r} with id {str(index)[:40]!r}: download it again")
    return index


def _special(value: Any, name: str, options: Fields) -> AddedToken | None:
    """The token that a file spells, or describes in an object; None if it is neither, or empty."""
    data = value if isinstance(value, dict) else {"content": value}
    text = data.get("content")
    if not isinstance(text, str) or not text:
        return None
    flags = {flag: data.get(flag) is True for flag in FLAGS}
    return AddedToken(require_unicode(text, f"{name} of {options.where}"), special=True, **flags)


def _flags(token: Any) -> dict[str, Any]:
    return {name: getattr(token, name) for name in AddedToken.__dataclass_fields__}
