"""A `tokenizers` pipeline with a model's settings: tokenizer.json as it is, or built from a GGUF vocabulary."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Pipeline

from skvq.engine.errors import ModelError
from skvq.loaders.file_tokenizer import FileTokenizer, TokenizerSettings

SPACE = "\u2581"
"""How SentencePiece spells a space."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of each byte as a printable character: itself, or one from U+0100 on.

    >>> byte_alphabet()["A"], byte_alphabet()["\u0120"]
    (65, 32)
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in shown]
    return {chr(value): value for value in shown} | {chr(256 + index): value for index, value in enumerate(hidden)}


class FastTokenizer(FileTokenizer):
    """Byte-level BPE (Llama 3, Qwen2, SmolLM2) or SentencePiece-like BPE with byte fallback (Llama 1-2, Mistral)."""

    def __init__(self, pipeline: Pipeline, settings: TokenizerSettings) -> None:
        super().__init__(settings)
        self._pipeline = pipeline
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
    def strips_first_space(self) -> bool:
        """True for SentencePiece vocabularies."""
        return self._strip

    def _ids(self, text: str) -> list[int]:
        [found] = self._pipeline.encode_batch([text], add_special_tokens=False)  # other threads go on: ``encode`` stops them
        ids: list[int] = found.ids
        return ids

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
