"""SentencePiece's tokenizer.model, encoded by the `sentencepiece` package itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skvq.engine.errors import ModelError
from skvq.loaders.fast_tokenizer import TokenizerSettings, piece_bytes
from skvq.loaders.fields import reason
from skvq.loaders.text import Message, decode_ids


class SentencePieceTokenizer:
    """A SentencePiece model; control tokens (``<s>``, ``[INST]``) are recognized in text, as by `transformers`."""

    def __init__(self, processor: Any, pieces: Sequence[str], settings: TokenizerSettings) -> None:
        """``processor`` and ``pieces`` of ``open_sentencepiece``."""
        self._processor = processor
        self._settings = settings
        self._pieces = pieces
        control = {piece: index for index, piece in enumerate(self._pieces) if processor.is_control(index)}
        self._control = control
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")
        self._strip = self._prefixes()

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return len(self._pieces)

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
        """Ids of a text; spellings of control tokens in it become those tokens."""
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
        """Bytes of a piece."""
        if not 0 <= token_id < self.vocab_size or self._processor.is_control(token_id):
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
