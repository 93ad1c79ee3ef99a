"""An answer as it grows: tokens drawn, text released, and what ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.sampling import Sampler, StopWatch
from skvq.loaders.text import CHARACTER_BYTES, TextStream, Tokenizer


class Answer:
    """One sequence being continued: sampler, text, and whether it is over. The sequence's timing is kept up to date."""

    def __init__(
        self, tokenizer: Tokenizer, sequence: SequenceCache, logits: Tensor, config: SamplingConfig, *, resumed: bool
    ) -> None:
        """Draws the first token from ``logits`` [V]. ``resumed``: it goes on from an answer, not from a text."""
        self.sequence, self.config, self.timing = sequence, config, sequence.timing
        self._ends = () if config.ignore_eos else tokenizer.eos_token_ids
        self._sampler = Sampler(config, sequence.token_ids, logits.shape[-1], logits.device)
        self._text = TextStream(tokenizer, after=sequence.token_ids[-CHARACTER_BYTES:] if resumed else ())
        self._stop = StopWatch(config.stops)
        self._room = sequence.setup.on_full.room(sequence)
        self.token = -1
        if config.max_new_tokens:
            draw([self], [logits])
        else:
            self._end("length")

    @property
    def finish(self) -> str:
        """What ended it: ``end`` (an end token), ``stop`` (a stop string), ``length`` (enough tokens) or ``context`` (full)."""
        return self.timing.finish

    @property
    def count(self) -> int:
        """Tokens drawn."""
        return self.timing.new_tokens

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.config.max_new_tokens - self.count

    def choose(self, logits: Tensor) -> Tensor:
        """``Sampler.choose`` of the next token."""
        return self._sampler.choose(logits, self.sequence.total_tokens)

    def take(self, largest: float, number: float) -> None:
        """The token chosen is the next to be decoded, unless it ends the answer."""
        self.token = self._sampler.take(largest, number)
        self.sequence.pending = [self.token]
        self._mark = self.sequence.mark
        self.timing.new_tokens += 1
        if self.token in self._ends:
            self._end("end")

    def require_next(self) -> None:
        """Raise OptionError unless the sequence is as the last draw has left it."""
        if self.sequence.mark != self._mark:
            raise OptionError("the sequence was continued or cut while this answer was being written: fork it for another")

    def piece(self) -> str:
        """Text that the token just drawn completes; called once a token."""
        if self.finish:
            return self._rest()
        shown = self._stop.push(self._text.push(self.token))
        if self._stop.stopped:
            self._end("stop")
        elif not self.left:
            self._end("length")
        elif self.count > self._room:
            self._end("context")
        return shown + self._rest() if self.finish else shown

    def _rest(self) -> str:
        """What was held back, when the answer is over; what there is of a character that may go on is for the next answer."""
        unfinished = "" if self.finish in ("length", "context") else self._text.flush()
        return self._stop.push(unfinished) + self._stop.flush()

    def _end(self, finish: str) -> None:
        self.timing.finish = finish


def draw(answers: Sequence[Answer], logits: Iterable[Tensor]) -> None:
    """The next token of each answer from its ``logits`` [V]. A GPU is waited for once."""
    chosen = torch.stack([answer.choose(row) for answer, row in zip(answers, logits, strict=True)])
    for answer, (largest, number) in zip(answers, chosen.tolist(), strict=True):
        answer.take(largest, number)
