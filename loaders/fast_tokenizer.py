"""A `tokenizers` pipeline with a model's settings: tokenizer.json as it is, or built from a GGUF vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as Pipeline

from skvq.engine.errors import ModelError
from skvq.loaders.chat import render_chat, render_turn
from skvq.loaders.fields import reason
from skvq.loaders.text import Message, decode_ids

SPACE = "\u2581"
"""How SentencePiece spells a space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """What a model's files say besides the vocabulary.

    adds_bos: whether a text begins with ``bos_token_id``; special_tokens: name -> spelling, for the chat template;
    model_vocab: rows of the model's embedding: a larger id would read past its end.
    """

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None
    model_vocab: int
    where: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """See ``render_chat``."""
        return render_chat(self.chat_template, messages, self.special_tokens, add_generation_prompt=add_generation_prompt)

    def turn(self, messages: Sequence[Message]) -> str:
        """See ``render_turn``."""
        return render_turn(self.chat_template, messages, self.special_tokens)

    def checked(self, ids: list[int]) -> list[int]:
        """The ids, or ModelError if one has no row in the embedding."""
        if ids and max(ids) >= self.model_vocab:
            raise ModelError(
                f"{self.where}: the text needs token id {max(ids)}, but the model has {self.model_vocab} tokens: "
                "tokenizer and weights belong to different models"
            )
        return ids

    def not_encoded(self, text: str, error: Exception) -> ModelError:
        """The error of a text that the tokenizer refuses, such as one with half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as wrong:
            return ModelError(f"the text is not valid Unicode: character {wrong.start:,} is half of a surrogate pair")
        return ModelError(f"{self.where}: a text of {len(text)} characters cannot be encoded ({reason(error)})")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of each byte as a printable character: itself, or one from U+0100 on.

    >>> byte_alphabet()["A"], byte_alphabet()["\u0120"]
    (65, 32)
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in shown]
    return {chr(value): value for value in shown} | {chr(256 + index): value for index, value in enumerate(hidden)}


class FastTokenizer:
    """Byte-level BPE (Llama 3, Qwen2, SmolLM2) or SentencePiece-like BPE with byte fallback (Llama 1-2, Mistral)."""

    def __init__(self, pipeline: Pipeline, settings: TokenizerSettings) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._added = dict(pipeline.get_added_tokens_decoder())
        steps = _decoder_steps(json.loads(pipeline.to_str()).get("decoder"), settings.where)
        self._byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        self._strip = any(_strips_space(step) for step in steps)
        self._vocab_size = max(pipeline.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._alphabet = byte_alphabet()

    @property
    def vocab_size(self) -> int:
        """Largest id plus one, added tokens included."""
        return self._vocab_size

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

    @property
    def strips_first_space(self) -> bool:
        """True for SentencePiece vocabularies."""
        return self._strip

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of a text; spellings of special tokens in it become those tokens, as in `transformers`."""
        try:
            ids: list[int] = self._pipeline.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise self._settings.not_encoded(text, error) from error
        first = self._settings.bos_token_id
        prefix = [first] if bos and self._settings.adds_bos and first is not None else []
        return self._settings.checked(prefix + ids)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of the rendered conversation; the template itself writes the beginning-of-sequence token."""
        return self.encode(self._settings.chat(messages, add_generation_prompt=add_generation_prompt), bos=False)

    def encode_turn(self, messages: Sequence[Message]) -> list[int]:
        """Ids of what the messages add to a conversation."""
        return self.encode(self._settings.turn(messages), bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return decode_ids(self, ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token."""
        added = self._added.get(token_id)
        if added is not None and added.special:
            return b""
        piece = self._pipeline.id_to_token(token_id)
        if piece is None:
            return b""
        if not self._byte_level:
            return piece_bytes(piece)
        return piece.encode() if added is not None else self._byte_level_bytes(piece)

    def _byte_level_bytes(self, piece: str) -> bytes:
        """A piece is spelled in the byte alphabet; one that is not is taken as plain text, as `tokenizers` does."""
        values = [self._alphabet.get(char) for char in piece]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else piece.encode()


def piece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: ``<0x41>`` is one byte, U+2581 a space.

    >>> piece_bytes("<0xE2>"), piece_bytes("\u2581a")
    (b'\\xe2', b' a')
    """
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(SPACE, " ").encode()


def _decoder_steps(decoder: Any, where: str) -> list[dict[str, Any]]:
    """All steps of a tokenizer.json decoder. ModelError for one that does not spell tokens as bytes."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = {str(step.get("type")) for step in steps}
    spelling = {"ByteLevel", "Metaspace", "Replace"}
    if not kinds & spelling or kinds - spelling - {"ByteFallback", "Fuse", "Strip"}:
        found = ", ".join(sorted(kinds)) or "none"
        raise ModelError(f"{where}: its decoder ({found}) is not that of a Llama-family tokenizer (ByteLevel, SentencePiece)")
    return list(steps)


def _strips_space(step: dict[str, Any]) -> bool:
    """Whether a decoder step takes off the space that encoding put before the text."""
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme", "always") != "never" and bool(step.get("add_prefix_space", True))
    return step.get("type") == "Strip" and step.get("start", 0) > 0
