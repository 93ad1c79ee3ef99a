"""An answer as it grows: tokens drawn, text released, and what ends it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from skvq.engine.cache import Mark, SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError, SkvqError
from skvq.engine.grammar import Grammars
from skvq.engine.lookup import Lookup
from skvq.engine.prompt import ChatIds
from skvq.engine.sampling import Sampler, StopStrings, TokenLogprob, as_logprob
from skvq.engine.sizes import GUESSED_ROWS
from skvq.loaders.text import CHARACTER_BYTES, TextStream, Tokenizer


class Answer:
    """One sequence being continued: sampler, text, and whether it is over. The sequence's timing is kept up to date."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sequence: SequenceCache,
        logits: Tensor,
        config: SamplingConfig,
        prompt: Sequence[int],
        grammars: Grammars,
    ) -> None:
        """Draws the first token from ``logits`` [V]. ``prompt``: ids of what it answers; without any it goes on from what the
        sequence holds."""
        self.sequence, self.config, self.timing = sequence, config, sequence.timing
        self._tokenizer = tokenizer
        self._ends = () if config.ignore_eos else tokenizer.eos_token_ids
        before = prompt or sequence.token_ids
        asked = isinstance(prompt, ChatIds) if prompt else sequence.asked and sequence.logits is not None
        begins = asked or not (before and tokenizer.token_bytes(before[-1]))
        self._text = TextStream(tokenizer, after=() if prompt else sequence.token_ids[-CHARACTER_BYTES:], begins=begins)
        grammar = grammars.of(config, logits.device, begins=begins)
        self._sampler = Sampler(config, sequence.token_ids, logits.shape[-1], logits.device, grammar)
        self._stop = StopStrings(config.stops)
        self._ready = ""  # text that is complete and not given out yet
        self._room = sequence.setup.room(sequence.length)
        self._lookup = Lookup(sequence.token_ids, logits.shape[-1]) if config.prompt_lookup else None
        self._mark: Mark | None = None  # the sequence's after the last draw
        self.logprobs: list[TokenLogprob] = []  # of the tokens whose text is complete, if the configuration asks for them
        sequence.logprobs = self.logprobs
        self._drawn: deque[tuple[int, TokenLogprob]] = deque()  # those to come, and where in the text each begins
        self._length = self._shown = 0  # of the text: in characters, and how many of these may be shown
        self.token = -1
        if config.max_new_tokens:
            raise_first(draw([self], [logits]))
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

    def guess(self, count: int, *, free: bool = False) -> list[int]:
        """``count`` tokens that may follow the one to be decoded, or none. ``free``: a wrong guess costs nothing."""
        if self._lookup is None:
            return []
        return self._lookup.find(count) if free else self._lookup.guess(count)

    def has_room(self, count: int) -> bool:
        """Whether ``count`` tokens can be decoded in one step, and forgotten again: nothing is packed or dropped for them."""
        sequence = self.sequence
        most = min(1 + self.left, sequence.ring_room, sequence.setup.max_context - sequence.length)
        return count <= most and sequence.packed_after(count) == sequence.packed

    def choose(self, logits: Iterable[Tensor], guessed: Sequence[int]) -> list[Tensor]:
        """``Sampler.choose`` of what follows the token decoded last, and each that was ``guessed`` behind it."""
        first = self.sequence.total_tokens - len(guessed)
        return [self._sampler.choose(row, first + i, guessed[:i]) for i, row in enumerate(logits)]

    def take(self, chosen: Iterable[Sequence[float]], guessed: Sequence[int]) -> None:
        """Take what was chosen, up to the first token that was not guessed; the sequence forgets the guesses from there on.

        The last one taken is the next to be decoded, unless it ends the answer.
        """
        right, length = 0, self.sequence.length - len(guessed)
        self._mark = None  # an answer that has taken half of it cannot go on
        try:
            for largest, number, *told in chosen:
                token = self._sampler.take(largest, number)
                self._push(token, told)
                if self.finish or self.token not in guessed[right : right + 1]:
                    break
                right += 1
        finally:
            if guessed:
                self.sequence.truncate(length + right)
        if guessed:
            self.timing.guessed_tokens += right
            if self._lookup is not None:
                self._lookup.tell(right)
        self.sequence.pending = [self.token]
        self._mark = self.sequence.mark

    def _push(self, token: int, told: Sequence[float]) -> None:
        """The answer goes on with a token, and what ``Sampler.choose`` told of it."""
        self.token = token
        self.timing.new_tokens += 1
        if self._lookup is not None:
            self._lookup.push(token)
        if token in self._ends:
            self._end("end")
            return
        text = self._text.push(token)
        if told:  # it begins behind what it may have ended, a character that came to nothing
            own = len(self._tokenizer.token_bytes(token).decode(errors="replace"))
            self._drawn.append((self._length + max(0, len(text) - own), as_logprob(token, told)))
        self._length += len(text)
        self._show(self._stop.push(text))
        if self._stop.stopped:
            self._end("stop")
        elif self.left <= 0:
            self._end("length")
        elif self.count > self._room:
            self._end("context")

    def require_next(self) -> None:
        """Raise OptionError unless the sequence is as the last draw has left it."""
        self.sequence.require_whole()
        if not self.is_next:
            raise OptionError("the sequence was continued or cut while this answer was being written: fork it for another")

    @property
    def is_next(self) -> bool:
        """Whether the sequence is as the last draw has left it: the token drawn then is to be decoded."""
        return self.sequence.mark == self._mark

    def piece(self) -> str:
        """Text that is complete and has not been given out."""
        shown, self._ready = self._ready, ""
        return shown

    def _end(self, finish: str) -> None:
        """The answer is over: what was held back follows. What there is of a character that may go on is for the next one."""
        self.timing.finish = finish
        goes_on = finish in ("length", "context")
        unfinished = "" if goes_on else self._text.flush()
        self._show(self._stop.push(unfinished) + self._stop.flush())
        if not self._stop.stopped:  # the last may have no text
            self.logprobs.extend(one for _, one in self._drawn)

    def _show(self, text: str) -> None:
        """Text that is complete, and the tokens that begin in it: not one that ends the answer or begins a stop string."""
        self._ready += text
        self._shown += len(text)
        while self._drawn and self._drawn[0][0] < self._shown:
            self.logprobs.append(self._drawn.popleft()[1])


def draw(
    answers: Sequence[Answer], logits: Sequence[Tensor] | Tensor, guesses: Sequence[Sequence[int]] | None = None
) -> list[SkvqError]:
    """The next tokens of each answer, from the logits [V] that follow each token decoded last: its own, then its guesses.

    A GPU is waited for once. Returns what answers raise that cannot take their own; the others have taken theirs.
    """
    guesses = guesses or [()] * len(answers)
    rows = iter(logits)
    chosen = [
        choice
        for answer, guessed in zip(answers, guesses, strict=True)
        for choice in answer.choose(islice(rows, 1 + len(guessed)), guessed)
    ]
    rows = torch.split(torch.cat(chosen).cpu(), [len(choice) for choice in chosen])
    told, errors = (row.tolist() for row in rows), []
    for answer, guessed in zip(answers, guesses, strict=True):
        try:
            answer.take(list(islice(told, 1 + len(guessed))), guessed)
        except SkvqError as error:  # of this answer alone, such as logits that are no numbers: the others have theirs
            errors.append(error)
    return errors


def raise_first(errors: Sequence[SkvqError]) -> None:
    """Raise the first of what ``draw`` returns."""
    if errors:
        raise errors[0]


def guesses_of(answers: Sequence[Answer]) -> list[list[int]]:
    """Tokens to be decoded behind each answer's own, as many for each, or none: half of the texts must repeat themselves, for
    all pay, and all must have room.
    """
    count = min(GUESSED_ROWS // len(answers) - 1, *(answer.config.prompt_lookup for answer in answers))
    if count <= 0 or not all(answer.has_room(1 + count) for answer in answers):
        return [[] for _ in answers]
    found = [answer.guess(count) for answer in answers]
    if sum(map(bool, found)) < len(found) / 2:
        return [[] for _ in answers]
    return [
        guess or answer.guess(count, free=True) or [answer.token] * count for answer, guess in zip(answers, found, strict=True)
    ]
