"""An answer as it grows: tokens drawn, text released, and what ends it."""

from __future__ import annotations

from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.sampling import Sampler, StopWatch
from skvq.loaders.text import CHARACTER_BYTES, TextStream, Tokenizer


class Answer:
    """One sequence being continued: sampler, text, and whether it is over."""

    def __init__(
        self, tokenizer: Tokenizer, sequence: SequenceCache, logits: Tensor, config: SamplingConfig, *, resumed: bool
    ) -> None:
        self.sequence, self.config = sequence, config
        self._ends = () if config.ignore_eos else tokenizer.eos_token_ids
        self._sampler = Sampler(config, sequence.token_ids, logits.shape[-1], logits.device)
        self._text = TextStream(tokenizer, after=sequence.token_ids[-CHARACTER_BYTES:] if resumed else ())
        self._stop = StopWatch(config.stops)
        self._room = sequence.setup.on_full.room(sequence)
        self.count = 0
        self.done = False
        self.finish = ""
        """What ended it: ``end`` (an end token), ``stop`` (a stop string), ``length`` (enough tokens) or ``context`` (full)."""
        self.token = -1
        self.take(logits)

    def take(self, logits: Tensor) -> None:
        """Draw the next token from ``logits`` [V]; it is the next to be decoded unless the answer is over."""
        if self.count >= self.config.max_new_tokens:
            self.done, self.finish = True, "length"
            return
        self._place = self.sequence.place
        self.token = self._sampler.draw(logits, self._place)
        self.sequence.pending = [self.token]
        self.count += 1
        self.done = self.token in self._ends
        self.finish = "end" if self.done else ""

    def require_next(self) -> None:
        """Raise OptionError unless the sequence is as the last draw has left it."""
        if self.sequence.pending != [self.token] or self.sequence.place != self._place:
            raise OptionError("the sequence was continued or cut while this answer was being written: fork it for another")

    def piece(self) -> str:
        """Text that the token just drawn completes; called once a token."""
        if self.done or self.count == 0:
            return self.rest()
        shown = self._stop.push(self._text.push(self.token))
        if self._stop.stopped:
            self.done, self.finish = True, "stop"
            return shown
        if self.count >= self.config.max_new_tokens:
            self.done, self.finish = True, "length"
        elif self.count > self._room:
            self.done, self.finish = True, "context"
        return shown + self.rest() if self.done else shown

    def rest(self) -> str:
        """What was held back, when the answer is over; what there is of a character that may go on is for the next answer."""
        unfinished = "" if self.finish in ("length", "context") else self._text.flush()
        return self._stop.push(unfinished) + self._stop.flush()
