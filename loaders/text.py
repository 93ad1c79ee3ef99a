"""What the engine asks of a tokenizer, and text that appears token by token.

Every token stands for bytes. ``decode`` joins the bytes and reads them as UTF-8, so that a stream of tokens can be
turned into text one at a time and still give exactly the text of the whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from skvq.engine.errors import ModelError

Message = Mapping[str, Any]
"""One turn of a chat: ``{"role": "user", "content": "..."}`` and whatever else the model's template reads."""


class Tokenizer(Protocol):
    """Text to token ids and back, as the model was trained."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that ``encode`` can return; a model's embedding may be padded to more."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if there is one; whether ``encode`` adds it is the model's own rule."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source, or None for a model without a chat format."""

    @property
    def strips_first_space(self) -> bool:
        """Whether encoding puts a space before a text, which decoding takes off again."""

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of a text. ``bos`` adds the beginning-of-sequence token where the model's own tokenizer adds it."""

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's chat format. ModelError if it has none or its template refuses."""

    def encode_turn(self, messages: Sequence[Message]) -> list[int]:
        """Ids of what messages add to a conversation that the assistant spoke last in: they begin with the end of its turn."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out, invalid UTF-8 as U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token contributes to the text; empty for special tokens and ids outside the vocabulary."""


CUT_TOKENS = 64
"""So far, in tokens, does where a text is cut change how it is encoded."""


def first_tokens(tokenizer: Tokenizer, text: str, count: int, *, bos: bool = True) -> list[int]:
    """The first ``count`` token ids of a text, all if it has fewer. Of a long text no more is encoded than they need."""
    assert count >= 0, count
    size = 8 * (count + CUT_TOKENS)
    while size < len(text):
        ids = tokenizer.encode(text[:size], bos=bos)
        if len(ids) >= count + CUT_TOKENS:
            return ids[:count]
        size *= 2
    return tokenizer.encode(text, bos=bos)[:count]


CHARACTER_BYTES = 4
"""At most, in UTF-8."""


class TextStream:
    """Text of a growing list of tokens: ``push`` returns what is new, and only whole characters.

    The pieces and the final ``flush`` joined are ``tokenizer.decode`` of all pushed ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, after: Sequence[int] = (), begins: bool = True) -> None:
        """``after``: the text goes on from these tokens, whose text was seen: a character they begin is finished. Unless it
        ``begins`` here, a first space is kept."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_first_space and begins
        self._decoder.decode(b"".join(map(tokenizer.token_bytes, after)))

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is complete with it."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._strip:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return what is left of an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def decode_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of ``ids`` by the tokenizer's bytes: what its ``decode`` returns."""
    data = b"".join(map(tokenizer.token_bytes, ids))
    return (data.removeprefix(b" ") if tokenizer.strips_first_space else data).decode("utf-8", errors="replace")


class ByteTokenizer:
    """A token per byte, for models whose weights are random: ids of 256 and more decode to ``<id>``."""

    def __init__(self, vocab_size: int) -> None:
        assert vocab_size >= 256
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary."""
        return self._vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """None: nothing is added."""
        return None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """None at all: generation runs to its limit."""
        return ()

    @property
    def chat_template(self) -> str | None:
        """None."""
        return None

    @property
    def strips_first_space(self) -> bool:
        """False."""
        return False

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The UTF-8 bytes of the text."""
        return list(text.encode("utf-8", errors="replace"))

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Always a ModelError: random weights have no chat format."""
        raise ModelError("dummy weights have no chat template: give the prompt as plain text")

    def encode_turn(self, messages: Sequence[Message]) -> list[int]:
        """As ``encode_chat``."""
        return self.encode_chat(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes."""
        return decode_ids(self, ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, or ``<id>``."""
        return bytes([token_id]) if token_id < 256 else f"<{token_id}>".encode()
