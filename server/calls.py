"""What clients wait for, and the news that they get of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from skvq.engine.errors import SkvqError
from skvq.engine.likelihoods import Likelihoods
from skvq.engine.pieces import Pieces
from skvq.engine.request import Request
from skvq.engine.sampling import TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer went on by: text, which may be empty, and the tokens drawn since the last piece, if they are told."""

    text: str
    logprobs: Sequence[TokenLogprob]


class Call:
    """What one client waits for, in some parts. News come in order: an index and a piece of it, None at the part's end."""

    def __init__(self, prompts: Sequence[list[int]]) -> None:
        self.prompts = prompts
        self.error: SkvqError | None = None  # of the first part that failed
        self._news: SimpleQueue[tuple[int, Piece | None]] = SimpleQueue()

    def tell(self, index: int, piece: Piece | None) -> None:
        """For the thread that does the work."""
        self._news.put((index, piece))

    def next(self, seconds: float) -> tuple[int, Piece | None] | None:
        """The next of the news, or None if there are none for so long."""
        try:
            return self._news.get(timeout=seconds)
        except Empty:
            return None

    def cancel(self) -> None:
        """The client has gone, or has all that it wanted."""


class Answers(Call):
    """Requests of a batch, as many for each prompt."""

    def __init__(self, prompts: Sequence[list[int]], requests: Sequence[Request]) -> None:
        super().__init__(prompts)
        self.requests = tuple(requests)
        self._told = [(0, 0)] * len(requests)  # characters, and tokens with their log probabilities

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    def go_on(self, index: int) -> None:
        """Tell what the answer of that index has grown by."""
        request = self.requests[index]
        characters, tokens = self._told[index]
        piece = Piece(request.text[characters:], request.logprobs[tokens:])
        self._told[index] = len(request.text), len(request.logprobs)
        if piece.text or piece.logprobs:
            self.tell(index, piece)

    def end(self, index: int, error: SkvqError) -> None:
        """That answer is over; ``error``: why, if there is none."""
        self.go_on(index)
        if self.requests[index].finish in ("", "failed", "cancelled"):
            self.error = self.error or error
        self.tell(index, None)


class Scores(Call):
    """Texts to be scored, with the ``count`` likeliest tokens at each place."""

    def __init__(self, prompts: Sequence[list[int]], count: int) -> None:
        super().__init__(prompts)
        self.count = count
        self.found: list[Likelihoods] = []
        self.pieces: Pieces[Likelihoods] | None = None  # of the text that is being scored
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
