"""SentencePiece's tokenizer.model, encoded by the `sentencepiece` package itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skvq.engine.errors import ModelError
from skvq.loaders.fast_tokenizer import TokenizerSettings, piece_bytes
from skvq.loaders.fields import reason
from skvq.loaders.text import Message, decode_ids


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a model has besides the pieces of its SentencePiece file; special ones are no text."""

    text: str
    special: bool


class SentencePieceTokenizer:
    """A SentencePiece model; control tokens (``<s>``, ``[INST]``) and added ones are recognized in text, as by
    `transformers`."""

    def __init__(
        self, processor: Any, pieces: Sequence[str], added: Mapping[int, AddedToken], settings: TokenizerSettings
    ) -> None:
        """``processor`` and ``pieces`` of ``open_sentencepiece``; ``added`` by id, some of which may be pieces too."""
        self._processor = processor
        self._settings = settings
        self._pieces = pieces
        self._added = added
        control = {piece: index for index, piece in enumerate(self._pieces) if processor.is_control(index)}
        control |= {token.text: index for index, token in added.items()}
        self._control = control
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")
        self._strip = self._prefixes()

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return max(len(self._pieces), *(index + 1 for index in self._added), 0)

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
        """True where the model puts a space before a text."""
        return self._strip

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of a text; spellings of control and added tokens in it become those tokens."""
        ids: list[int] = []
        try:
            for part in self._split.split(text) if self._control else [text]:
                ids += [self._control[part]] if part in self._control else self._processor.encode(part)
        except Exception as error:
            raise self._settings.not_encoded(text, error) from error
        first = self._settings.bos_token_id
        prefix = [first] if bos and self._settings.adds_bos and first is not None else []
        return self._settings.checked(prefix + ids)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of the rendered conversation."""
        return self.encode(self._settings.chat(messages, add_generation_prompt=add_generation_prompt), bos=False)

    def encode_turn(self, messages: Sequence[Message]) -> list[int]:
        """Ids of what the messages add to a conversation."""
        return self.encode(self._settings.turn(messages), bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return decode_ids(self, ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token."""
        if token_id in self._added:
            token = self._added[token_id]
            return b"" if token.special else token.text.encode()
        if not 0 <= token_id < len(self._pieces) or self._processor.is_control(token_id):
            return b""
        if self._processor.is_unknown(token_id):
            return " \u2047 ".encode()
        return piece_bytes(self._pieces[token_id])

    def _prefixes(self) -> bool:
        """Whether the model puts a space before a text."""
        pieces = "".join(self._processor.encode("a", out_type=str))
        return piece_bytes(pieces).startswith(b" ")


def open_sentencepiece(path: Path) -> tuple[Any, list[str]]:
    """A SentencePieceProcessor and its pieces by id. ModelError if the file is broken or the package is not installed."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ModelError(f"{path} needs the sentencepiece package: pip install sentencepiece") from error
    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(path.read_bytes())
        return processor, [str(processor.id_to_piece(index)) for index in range(processor.get_piece_size())]
    except Exception as error:
        raise ModelError(f"{path} is not a SentencePiece model ({reason(error)}): download it again") from error
