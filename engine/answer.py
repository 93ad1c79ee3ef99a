"""An answer as it grows: tokens drawn, text let through, and what ends it."""

from __future__ import annotations

from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.sampling import Sampler, StopWatch
from skvq.loaders.text import TextStream, Tokenizer


class Answer:
    """One sequence being continued: sampler, text, and whether it is over."""

    def __init__(self, tokenizer: Tokenizer, sequence: SequenceCache, logits: Tensor, config: SamplingConfig) -> None:
        self.sequence, self.config = sequence, config
        self._ends = () if config.ignore_eos else tokenizer.eos_token_ids
        self._sampler = Sampler(config, sequence.token_ids, logits.shape[-1], logits.device)
        self._text = TextStream(tokenizer)
        self._stop = StopWatch(config.stop)
        self._room = sequence.setup.on_full.room(sequence)
        self.count = 0
        self.done = False
        self.token = -1
        self.take(logits)

    def take(self, logits: Tensor) -> None:
        """Draw the next token from ``logits`` [V]; it is the next to be decoded unless the answer is over."""
        if self.count >= self.config.max_new_tokens:
            self.done = True
            return
        self.token = self._sampler.draw(logits)
        self.sequence.pending = [self.token]
        self.count += 1
        self.done = self.token in self._ends

    def piece(self) -> str:
        """Text that the token just drawn completes; called once a token."""
        if self.done or self.count == 0:
            return self.rest()
        shown = self._stop.push(self._text.push(self.token))
        self.done = self._stop.stopped or self.count >= self.config.max_new_tokens or self.count > self._room
        return shown + self.rest() if self.done and not self._stop.stopped else shown

    @property
    def cut_off(self) -> bool:
        """Whether the answer is over only because the context is full."""
        return self.done and self._room < self.count < self.config.max_new_tokens and self.token not in self._ends

    def rest(self) -> str:
        """What was held back, when the answer is over."""
        return self._stop.push(self._text.flush()) + self._stop.flush()
