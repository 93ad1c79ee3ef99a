"""Answers of a form that is given: JSON of a schema, or text of a regular expression.

llguidance (https://github.com/guidance-ai/llguidance) says after each token, in some 0.1 ms, which tokens may be next; no
other is drawn. The form is that of one answer alone, from its first character on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError, SkvqError, shortened
from skvq.loaders.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

BLANKS = r"[ \t\n\r]{0,40}"
"""Between parts of JSON: as much as a model indents by, but no answer of nothing else."""
MOST_FORMS = 32
"""That are kept compiled: many answers have the same."""
PLACE = r"^at \d+\(\d+\): "
SPACE = '" "? '


class Grammar:
    """What one answer may go on with."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, device: torch.device) -> None:
        self._matcher, self._vocab = matcher, vocab_size
        self._bits = torch.arange(8, device=device, dtype=torch.uint8)

    def allowed(self, after: Sequence[int] = ()) -> Tensor:
        """Whether each token may be next, bool [V], once those ``after`` are taken too, up to the first that may not be."""
        matcher = self._matcher
        if after:
            matcher = matcher.deep_copy()
            matcher.try_consume_tokens([*after])
        octets = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        octets = octets.to(self._bits.device, non_blocking=True)
        return ((octets[:, None] >> self._bits) & 1).bool().flatten()[: self._vocab]

    def take(self, token: int) -> None:
        """The answer goes on with a token. Raises SkvqError if its form is too much to be followed."""
        if not self._matcher.consume_token(token):
            raise SkvqError(f"the form that the answer was to have cannot be followed: {self._matcher.get_error()}")


class Grammars:
    """Forms of answers by one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab_size
        self._preparing = Lock()
        self._prepared: LLTokenizer | None = None
        self._compiled = lru_cache(MOST_FORMS)(self._compile)

    def require(self, config: SamplingConfig) -> None:
        """Raise OptionError if the form that a configuration asks for, if any, cannot be had."""
        self.of(config, torch.device("cpu"))

    def of(self, config: SamplingConfig, device: torch.device, *, begins: bool = True) -> Grammar | None:
        """A grammar for one answer, if the configuration asks for a form. Where the text ``begins`` with it, a space that
        decoding takes off may come first."""
        form = form_of(config)
        if form is None:
            return None
        matcher = self._compiled(*form, begins and self._tokenizer.strips_first_space)
        return Grammar(matcher.deep_copy(), self._vocab, device)

    def _compile(self, name: str, form: str, spaced: bool) -> LLMatcher:
        tokens = self._tokens()
        matcher: LLMatcher = _library().LLMatcher(tokens, _source(name, form, spaced=spaced), log_level=0)
        if matcher.is_error():
            raise _refused(name, form, matcher.get_error())
        return matcher

    def _tokens(self) -> LLTokenizer:
        """The vocabulary as llguidance wants it: made once, in a quarter of a second per 50,000 tokens."""
        with self._preparing:
            if self._prepared is None:
                self._prepared = _vocabulary(self._tokenizer, self._vocab)
            return self._prepared


class _Words:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if not text]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_ids[0]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, bos=False)


def form_of(config: SamplingConfig) -> tuple[str, str] | None:
    """The option that says what form an answer has, and what it says, if one does."""
    if config.regex is not None:
        return "regex", config.regex
    return None if config.json_schema is None else ("json_schema", str(config.json_schema))


def require_form(config: SamplingConfig) -> None:
    """Raise OptionError for a form that cannot be had of any model: before one is loaded."""
    if form := form_of(config):
        is_wrong, found = _library().LLMatcher.validate_grammar_with_warnings(_source(*form))
        if is_wrong:
            raise _refused(*form, found[0])


def _library() -> ModuleType:
    """llguidance. Raises OptionError if it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise OptionError('json_schema and regex need the llguidance package: pip install "skvq[grammar]"') from error
    return llguidance


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    if not (ends := [token for token in tokenizer.eos_token_ids if token < vocab_size]):
        raise OptionError("json_schema and regex need a model with an end token; dummy weights have none")
    words = _library().TokenizerWrapper(_Words(tokenizer, vocab_size))
    tokens: LLTokenizer = _library().LLTokenizer(words, n_vocab=vocab_size, eos_token=ends)
    return tokens


def _source(name: str, form: str, *, spaced: bool = False) -> str:
    """A form in llguidance's own language."""
    if name == "regex":
        return str(_library().LLMatcher.grammar_from_regex(f" ?(?:{form})" if spaced else form))
    schema = {"x-guidance": {"whitespace_pattern": BLANKS}} | json.loads(form)
    return f"start: {SPACE if spaced else ''}value\nvalue: %json {json.dumps(schema)}"


def _refused(name: str, form: str, message: str) -> OptionError:
    """``message``: llguidance's, of which the place in its own source is left out."""
    lines = [line.strip() for line in message.splitlines()]
    why = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return OptionError(f"{name} {shortened(form)!r} cannot be used: {re.sub(PLACE, '', why)}")
