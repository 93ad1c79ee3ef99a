"""What tokenizers from a model's files have in common: settings, and everything but their vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skvq.engine.errors import ModelError
from skvq.loaders.chat import render_chat, render_turn
from skvq.loaders.fields import is_failure, reason
from skvq.loaders.text import Message, decode_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """What a model's files say besides the vocabulary.

    before_text: ids that a text begins with, such as ``(bos_token_id,)``; special_tokens: name -> spelling, for the chat
    template; model_vocab: rows of the model's embedding: a larger id would read past its end.
    """

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    before_text: tuple[int, ...]
    chat_template: str | None
    model_vocab: int
    where: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)


class FileTokenizer(ABC):
    """``text.Tokenizer`` over a vocabulary, which subclasses know."""

    def __init__(self, settings: TokenizerSettings) -> None:
        self._settings = settings
        self.template_kwargs: Mapping[str, Any] = {}
        """What the chat template is given besides what it always gets, such as ``{"enable_thinking": False}`` of Qwen3's."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Largest id plus one, added tokens included."""

    @property
    @abstractmethod
    def strips_first_space(self) -> bool:
        """Whether encoding puts a space before a text."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token."""

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Ids of a text; spellings of special tokens in it become those tokens, as in `transformers`. Raises whatever."""

    @property
    def bos_token_id(self) -> int | None:
        """Beginning of sequence."""
        return self._settings.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ends of an answer."""
        return self._settings.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        """Jinja source."""
        return self._settings.chat_template

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of a text, as of ``_ids``. ModelError for a text that is none, or an id that the model has no row for."""
        settings = self._settings
        try:
            ids = self._ids(text)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise self._not_encoded(text, error) from error
        if bos:
            ids = [*settings.before_text, *ids]
        if ids and max(ids) >= settings.model_vocab:
            raise ModelError(
                f"{settings.where}: the text needs token id {max(ids)}, but the model has {settings.model_vocab} tokens: "
                "tokenizer and weights belong to different models"
            )
        return ids

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of the rendered conversation; the template itself writes the beginning-of-sequence token."""
        prompt = add_generation_prompt
        text = render_chat(self._settings.chat_template, messages, self._given, add_generation_prompt=prompt)
        return self.encode(text, bos=False)

    def encode_turn(self, messages: Sequence[Message]) -> list[int]:
        """Ids of what the messages add to a conversation."""
        return self.encode(render_turn(self._settings.chat_template, messages, self._given), bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return decode_ids(self, ids)

    @property
    def _given(self) -> dict[str, Any]:
        """Names that the template may use."""
        return {**self._settings.special_tokens, **self.template_kwargs}

    def _not_encoded(self, text: str, error: BaseException) -> ModelError:
        """The error of a text that the vocabulary refuses, such as one with half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as wrong:
            return ModelError(f"the text is not valid Unicode: character {wrong.start:,} is half of a surrogate pair")
        return ModelError(f"{self._settings.where}: a text of {len(text)} characters cannot be encoded ({reason(error)})")
