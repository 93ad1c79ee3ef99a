"""Tokens that a model's files add to its vocabulary, and how each is found in a text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Pipeline

from skvq.engine.errors import ModelError
from skvq.loaders.fields import Fields, read_json, reason

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
EXTRA_NAMES = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """Special ones are no text; ``lstrip`` and ``rstrip`` take in the white space before and after."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


def special_tokens(options: Fields) -> dict[str, str]:
    """Name -> spelling, such as ``bos_token``; older files write a token as an object with ``content``."""
    found = {name: _spelling(options.data.get(name), name, options) for name in SPECIAL_NAMES}
    return {name: text for name, text in found.items() if text is not None}


def extra_tokens(options: Fields) -> list[str]:
    """Spellings of special tokens that have no name of their own."""
    found = []
    for name in EXTRA_NAMES:
        value = options.data.get(name)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found += [text for item in items if (text := _spelling(item, name, options))]
    return found


def declared_tokens(options: Fields) -> dict[int, AddedToken]:
    """``added_tokens_decoder`` of tokenizer_config.json, by id."""
    found = {}
    for name, token in options.section("added_tokens_decoder").data.items():
        fields = Fields(token if isinstance(token, dict) else {}, f"added token {name[:20]} of {options.where}")
        text = require_unicode(fields.text("content"), fields.where)
        flags = {flag: fields.flag(flag, False) for flag in ("special", "lstrip", "rstrip", "normalized", "single_word")}
        index = int(name) if name.isdecimal() and len(name) < 10 else name
        found[require_id(index, text, options.where)] = AddedToken(text, **flags)
    return found


def listed_tokens(folder: Path) -> dict[int, AddedToken]:
    """added_tokens.json, by id: older files, which say nothing else of a token."""
    path = folder / "added_tokens.json"
    listed = read_json(path).data.items() if path.is_file() else ()
    return {
        require_id(index, text, str(path)): AddedToken(require_unicode(text, str(path)), special=True) for text, index in listed
    }


def with_tokens(
    pipeline: Pipeline, declared: Mapping[int, AddedToken], listed: Mapping[int, AddedToken], names: Iterable[str], where: str
) -> Pipeline:
    """A pipeline that finds these tokens too, as `transformers` adds them: ``declared`` as it says, ``listed`` and ``names``,
    which are special, unless the pipeline knows better; what it has under another id stays there. ModelError if one that it
    does not have would get another id.
    """
    known = {index: AddedToken(**_flags(token)) for index, token in pipeline.get_added_tokens_decoder().items()}
    spelled = {token.content for token in (*known.values(), *declared.values())}
    new = {**{index: token for index, token in listed.items() if token.content not in spelled}, **declared}
    new = {i: token for i, token in new.items() if known.get(i) != token and pipeline.token_to_id(token.content) in (None, i)}
    if new:
        data = json.loads(pipeline.to_str())
        entries = {index: asdict(token) for index, token in (known | new).items()}
        data["added_tokens"] = [{"id": index, **entries[index]} for index in sorted(entries)]
        try:
            pipeline = Pipeline.from_str(json.dumps(data))
        except Exception as error:
            raise ModelError(f"{where} adds tokens that do not go with tokenizer.json ({reason(error)})") from error
    spelled = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    names = [text for text in dict.fromkeys(names) if text and text not in spelled]
    pipeline.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in names])
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


def _spelling(value: Any, name: str, options: Fields) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return require_unicode(text, f"{name} of {options.where}") if isinstance(text, str) else None


def _flags(token: Any) -> dict[str, Any]:
    return {name: getattr(token, name) for name in AddedToken.__dataclass_fields__}
