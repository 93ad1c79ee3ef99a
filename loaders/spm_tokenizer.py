"""SentencePiece's tokenizer.model, encoded by the `sentencepiece` package itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skvq.engine.errors import ModelError
from skvq.loaders.added_tokens import AddedToken
from skvq.loaders.fast_tokenizer import piece_bytes
from skvq.loaders.fields import reason
from skvq.loaders.file_tokenizer import FileTokenizer, TokenizerSettings

NO_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])
"""``ModelProto(normalizer_spec(add_dummy_prefix=False))``: behind another message it overrides what that says."""


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model; control tokens (``<s>``, ``[INST]``), ``<unk>`` and added ones are recognized in text, as by
    `transformers`."""

    def __init__(
        self,
        processor: Any,
        pieces: Sequence[str],
        added: Mapping[int, AddedToken],
        settings: TokenizerSettings,
        *,
        prefix: str = "",
    ) -> None:
        """``processor`` and ``pieces`` of ``open_sentencepiece``; ``added`` by id, some of which may be pieces too.

        prefix: put before a text, not before what follows a special token, where the processor puts nothing itself.
        """
        super().__init__(settings)
        self._processor, self._pieces, self._added, self._prefix = processor, pieces, added, prefix
        self._flags = {token.content: token for token in added.values()}
        special = [index for index in range(len(pieces)) if processor.is_control(index) or processor.is_unknown(index)]
        control = {pieces[index]: index for index in special} | {token.content: index for index, token in added.items()}
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
        parts = self._split.split(text) if self._control else [text]  # every other one is a special token
        for at in range(1, len(parts), 2):
            flags = self._flags.get(parts[at])
            if flags is not None and flags.lstrip:
                parts[at - 1] = parts[at - 1].rstrip()
            if flags is not None and flags.rstrip:
                parts[at + 1] = parts[at + 1].lstrip()
        if parts[0]:
            parts[0] = self._prefix + parts[0]
        ids: list[int] = []
        for at, part in enumerate(parts):
            ids += [self._control[part]] if at % 2 else self._processor.encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token."""
        if token_id in self._added:
            token = self._added[token_id]
            return b"" if token.special else token.content.encode()
        if not 0 <= token_id < len(self._pieces) or self._processor.is_control(token_id):
            return b""
        if self._processor.is_unknown(token_id):
            return " \u2047 ".encode()
        return piece_bytes(self._pieces[token_id])

    def _prefixes(self) -> bool:
        """Whether the model puts a space before a text."""
        pieces = "".join(self._processor.encode(f"{self._prefix}a", out_type=str))
        return piece_bytes(pieces).startswith(b" ")


def open_sentencepiece(path: Path, *, prefixes: bool = True) -> tuple[Any, list[str]]:
    """A SentencePieceProcessor and its pieces by id; without ``prefixes`` it puts no space before a text, whatever the file
    says. ModelError if the file is broken or the package is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ModelError(f"{path} needs the sentencepiece package: pip install sentencepiece") from error
    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(path.read_bytes() + (b"" if prefixes else NO_PREFIX))
        return processor, [str(processor.id_to_piece(index)) for index in range(processor.get_piece_size())]
    except Exception as error:
        raise ModelError(f"{path} is not a SentencePiece model ({reason(error)}): download it again") from error
