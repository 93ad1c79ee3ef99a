"""SentencePiece's tokenizer.model, encoded by the `sentencepiece` package itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skvq.engine.errors import ModelError
from skvq.loaders.fast_tokenizer import piece_bytes
from skvq.loaders.fields import reason
from skvq.loaders.file_tokenizer import FileTokenizer, TokenizerSettings


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a model has besides the pieces of its SentencePiece file; special ones are no text."""

    text: str
    special: bool


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model; control tokens (``<s>``, ``[INST]``) and added ones are recognized in text, as by
    `transformers`."""

    def __init__(
        self, processor: Any, pieces: Sequence[str], added: Mapping[int, AddedToken], settings: TokenizerSettings
    ) -> None:
        """``processor`` and ``pieces`` of ``open_sentencepiece``; ``added`` by id, some of which may be pieces too."""
        super().__init__(settings)
        self._processor = processor
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
    def strips_first_space(self) -> bool:
        """True where the model puts a space before a text."""
        return self._strip

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text) if self._control else [text]:
            ids += [self._control[part]] if part in self._control else self._processor.encode(part)
        return ids

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
