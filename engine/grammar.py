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
from skvq.engine.errors import OptionError, shortened
from skvq.loaders.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

BLANKS = r"[ \t\n\r]{0,40}"
"""Between parts of JSON: as much as a model indents by, but no answer of nothing else."""
MOST_FORMS = 256
"""That are known to be good."""
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
        """The answer goes on with a token. Raises OptionError if its form has become too much to be followed: llguidance then
        allows the end alone."""
        if self._matcher.is_error() or not self._matcher.consume_token(token):
            raise OptionError(f"the form that the answer was to have cannot be followed: {_why(self._matcher.get_error())}")


class Grammars:
    """Forms of answers by one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab_size
        self._preparing = Lock()
        self._prepared: LLTokenizer | None = None
        self._try = lru_cache(MOST_FORMS)(self._tried)

    def require(self, config: SamplingConfig) -> None:
        """Raise OptionError if the form that a configuration asks for, if any, cannot be had."""
        if config.form:
            self._try(*config.form)

    def of(self, config: SamplingConfig, device: torch.device, *, begins: bool = True) -> Grammar | None:
        """A grammar for one answer, if the configuration asks for a form. Where the text ``begins`` with it, a space that
        decoding takes off may come first.

        Each is compiled anew: what llguidance has learnt of a form, of which it holds so much and no more, is of one answer.
        """
        if config.form is None:
            return None
        matcher = self._compile(*config.form, spaced=begins and self._tokenizer.strips_first_space)
        return Grammar(matcher, self._vocab, device)

    def _tried(self, name: str, form: str) -> None:
        """Raise OptionError unless an answer of this form can begin: there may be none, or too many ways to go on."""
        matcher = self._compile(name, form, spaced=False)
        trial = Grammar(matcher, self._vocab, torch.device("cpu"))
        for _ in range(2):
            first = trial.allowed().nonzero()
            if matcher.is_error():
                raise _refused(name, form, matcher.get_error())
            if matcher.is_stopped() or not matcher.consume_token(int(first[0])):
                return

    def _compile(self, name: str, form: str, *, spaced: bool) -> LLMatcher:
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

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        """``ends``: tokens that end an answer; they may have a text, that none shows."""
        self.tokens = [b"" if token in ends else tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if not text]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, ends[0]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, bos=False)


def require_form(config: SamplingConfig) -> None:
    """Raise OptionError for a form that cannot be had of any model: before one is loaded."""
    if config.form:
        is_wrong, found = _library().LLMatcher.validate_grammar_with_warnings(_source(*config.form))
        if is_wrong:
            raise _refused(*config.form, found[0])


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
    words = _library().TokenizerWrapper(_Words(tokenizer, vocab_size, ends))
    tokens: LLTokenizer = _library().LLTokenizer(words, n_vocab=vocab_size, eos_token=ends)
    return tokens


def _source(name: str, form: str, *, spaced: bool = False) -> str:
    """A form in llguidance's own language. Raises OptionError for a backslash that it would overlook."""
    if name == "json_schema":
        schema = json.loads(form) | {"x-guidance": {"whitespace_pattern": BLANKS}}
        return f"start: {SPACE if spaced else ''}value\nvalue: %json {json.dumps(schema)}"
    if (len(form) - len(form.rstrip("\\"))) % 2:
        raise _refused(name, form, "the backslash at its end escapes nothing")
    source = str(_library().LLMatcher.grammar_from_regex(form))
    if not spaced:
        return source
    value = json.loads(source)["grammars"][0]["lark_grammar"].removeprefix("start: ")
    return f"start: {SPACE}value\nvalue: {value}"


def _refused(name: str, form: str, message: str) -> OptionError:
    return OptionError(f"{name} {shortened(form)!r} cannot be used: {_why(message)}")


def _why(message: str) -> str:
    """What llguidance has to say, without its state and the place in its own source."""
    lines = [line.strip() for line in message.partition("<state>")[0].splitlines() if line.strip()]
    if not lines or lines[0].startswith("NoExtension"):  # not even a first token
        return "nothing has that form"
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return shortened(re.sub(PLACE, "", told), 200)
