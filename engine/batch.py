"""Answers written together: a prompt waits for a place, is answered beside others and makes room for the next, while they go
on (continuous batching; Orca, OSDI 2022)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from skvq.engine.answer import Answer
from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.generation import begun, continuing, end_of, step
from skvq.engine.options import names_options, require_type
from skvq.engine.prompt import Prompt
from skvq.engine.timing import Timing
from skvq.kernels.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from skvq.engine.generate import Engine


class Request:
    """A prompt of a batch and its answer.

    text: what has been answered so far.
    timing: what that took; of a step of several answers each counts all of it.
    """

    def __init__(self, ids: Sequence[int], config: SamplingConfig, sequence: SequenceCache | None, *, fork: bool) -> None:
        self.ids, self.config = ids, config
        self.text, self.timing = "", Timing()
        self.given, self.fork, self.after = sequence, fork, sequence.mark if sequence else (0, ())
        self.answer: Answer | None = None
        self.cancelled = False

    def __repr__(self) -> str:
        return f"<Request: {len(self.ids):,} tokens, {self.finish or ('being answered' if self.answer else 'waiting')}>"

    @property
    def finish(self) -> str:
        """What ended the answer, as ``Summary.finish``, or ``cancelled``, or ``failed`` (``Batch.step`` has raised why); empty
        while it waits or is being answered.
        """
        return self.timing.finish

    def cancel(self) -> None:
        """Give its place to another prompt, with the next step. May be called from any thread."""
        self.cancelled = True


class Batch:
    """Prompts answered together; open one with ``Engine.batch``. ``add`` prompts whenever there are any, and take steps.

    One thread takes the steps; others may add prompts and cancel them.
    """

    def __init__(self, engine: Engine) -> None:
        self.timing = Timing()
        """Of all requests that are over, and of all steps."""
        self._engine = engine
        self._adding = Lock()
        self._waiting: deque[Request] = deque()
        self._going: dict[Request, SequenceCache] = {}

    def __len__(self) -> int:
        """Requests that are not over."""
        return len(self._waiting) + len(self._going)

    @names_options(sampling=SamplingConfig)
    def add(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        sequence: SequenceCache | None = None,
        fork: bool = False,
    ) -> Request:
        """One more prompt, to be answered when its turn comes.

        With ``sequence`` it continues that, as in ``Engine.stream``; with ``fork`` too, a fork of it, which is made when there
        is a place and lasts as long as the answer: so many questions about one text share its pages and are answered together.

        Raises OptionError for wrong arguments, CapacityError for a prompt that does not fit the context.
        """
        require_type("fork", fork, bool)
        if fork and sequence is None:
            raise OptionError("fork needs a sequence: the text that the prompt continues")
        engine, config = self._engine, self._engine.sampling_of(sampling)
        request = Request(engine.encode_after(prompt, sequence), config, sequence, fork=fork)
        held = 0 if sequence is None else sequence.length + len(sequence.pending)
        engine.parts.setup.require_room(held, len(request.ids), config.max_new_tokens)
        with self._adding:
            self._waiting.append(request)
        return request

    def step(self) -> list[tuple[Request, str]]:
        """Read the next prompt if there is room for its answer beside the others, else decode a token of every answer.

        The requests that went on, and the text by which they did, which may be empty; nothing if there are none left. Raises
        what went wrong with a prompt, whose request has ``failed`` then; the others go on with the next step.
        """
        self._cancel(lambda request: request.cancelled)
        following = self._next()
        if following is not None:
            self._begin(following)
            return [(following, self._piece(following))]
        answers = [request.answer for request in self._going if request.answer]
        if answers:
            self.timing.decode_seconds += step(self._engine, answers)
        return [(request, self._piece(request)) for request in [*self._going]]

    def close(self) -> None:
        """Cancel what is not over."""
        self._cancel(lambda request: True)

    def _cancel(self, which: Callable[[Request], bool]) -> None:
        with self._adding:
            left = [request for request in self._waiting if which(request)]
            for request in left:
                self._waiting.remove(request)
        for request in (*left, *filter(which, [*self._going])):
            self._end(request, "cancelled")

    def _next(self) -> Request | None:
        """The prompt that waits longest, if it can be answered to its end beside the others, which have yet to take their
        pages."""
        if not self._waiting:
            return None
        request, setup = self._waiting[0], self._engine.parts.setup

        def pages(tokens: int) -> int:
            return setup.regions.pages(min(tokens, setup.max_context))

        given, takes_place = request.given, request.given is None or request.fork
        held = 0 if given is None else given.length + len(given.pending)
        shared = 0 if given is None else given.packed // PAGE_TOKENS
        needed = pages(held + len(request.ids) + request.config.max_new_tokens) - shared
        for other, sequence in self._going.items():
            left = other.answer.left if other.answer else 0
            needed += pages(sequence.length + 1 + left) - len(sequence.pages)
        with self._engine.lock:
            arena = setup.arena
            has_room = arena.free_pages >= needed and (arena.free_sequences > 0 or not takes_place)
        with self._adding:
            return self._waiting.popleft() if has_room or not self._going else None

    def _begin(self, request: Request) -> None:
        """Read a prompt and draw the first token of its answer."""
        engine, given = self._engine, request.given
        try:
            sequence = engine.new_sequence() if given is None else given.fork() if request.fork else given
            self._going[request] = sequence
            logits = continuing(engine, sequence, request.ids, request.config, after=request.after)
            request.answer = begun(engine, sequence, logits, request.config, resumed=not request.ids)
        except BaseException:
            self._end(request, "failed")
            raise
        request.timing = request.answer.timing

    def _piece(self, request: Request) -> str:
        """What the answer went on by; if it is over, its place is free."""
        assert request.answer is not None
        piece = request.answer.piece()
        request.text += piece
        if request.finish:
            end_of(self._engine, request.answer)
            self._end(request, request.finish)
        return piece

    def _end(self, request: Request, finish: str) -> None:
        """It is over, whether or not it had begun."""
        request.timing = replace(request.timing, finish=finish)
        if request.answer is not None:
            self.timing.add(replace(request.timing, decode_seconds=0.0))
        sequence = self._going.pop(request, None)
        if sequence is not None and sequence is not request.given:
            sequence.free()
