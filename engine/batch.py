"""Answers written together: a prompt waits for a place, is answered beside others and makes room for the next, while they go
on (continuous batching; Orca, OSDI 2022). Between pieces of a long prompt the others are decoded (Sarathi-Serve, OSDI 2024).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from threading import Lock

from torch import Tensor

from skvq.engine.answer import Answer
from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError, OptionError, SkvqError
from skvq.engine.generation import begun, continuing, end_of, step
from skvq.engine.guard import computing
from skvq.engine.measure import wait_for
from skvq.engine.options import is_whole, names_options, require_type
from skvq.engine.pieces import Pieces
from skvq.engine.places import Places
from skvq.engine.prompt import Prompt
from skvq.engine.request import Request
from skvq.engine.timing import Timing
from skvq.engine.token_engine import TokenEngine

ALONE = 0.1
"""Seconds that a step reads for where nothing else is to be done: then it can be cancelled. A short prompt may take as long
beside answers."""

WHOLE = float("inf")


class Batch:
    """Prompts answered together; open one with ``Engine.batch``. ``add`` prompts whenever there are any, and take steps while
    there are.

    One thread takes the steps; others may add prompts and cancel them.
    """

    def __init__(self, engine: TokenEngine, *, interleaved: bool) -> None:
        self.interleaved = interleaved
        self.timing = Timing()
        """Of all requests that are over, and of all steps."""
        self._engine = engine
        self._adding = Lock()  # of those who add and close; a step needs none: it alone takes from a list that others append to
        self._waiting: list[Request] = []
        self._going = Places(engine)
        self._reading: dict[Request, Pieces[Tensor]] = {}  # of those going: one long prompt at most, and a short one
        self._last_step = 0.0  # seconds of decoding
        self._why_alone = ""  # as it was told
        self._told: list[tuple[Request, str]] = []  # what this step gives
        self._closed = False

    def __len__(self) -> int:
        """Requests that are not over."""
        return len(self._waiting) + len(self._going)

    @property
    def begun(self) -> int:
        """Requests that have begun and are not over."""
        return len(self._going)

    @property
    def answering(self) -> list[Request]:
        """Those of them whose answers have begun."""
        return [request for request in self._going if request.answer]

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
        engine.parts.setup.require_room(request.held, len(request.ids), config.max_new_tokens)
        return self._add([request])[0]

    @names_options()
    def add_each(self, prompt: Prompt, samplings: Sequence[SamplingConfig]) -> list[Request]:
        """One prompt answered once with each of ``samplings``. It is read once for as many of the answers as there is room for
        when it has been read; they share its pages. For the others it is read again when their turn comes. Raises as ``add``.
        """
        require_type("samplings", samplings, list, tuple)
        configs = [self._engine.sampling_of(sampling) for sampling in samplings]
        ids = self._engine.encode_after(prompt, None)
        for config in configs:
            self._engine.parts.setup.require_room(0, len(ids), config.max_new_tokens)
        requests = [Request(ids, config, None, fork=False) for config in configs]
        for request in requests:
            request.twins = requests
        return self._add(requests)

    def _add(self, requests: list[Request]) -> list[Request]:
        with self._adding:
            self._require_open()
            self._waiting.extend(requests)
        return requests

    @names_options()
    def has_room_for(self, count: int) -> bool:
        """Whether a sequence of ``count`` tokens that is none of them has room beside those that have begun."""
        if not is_whole(count) or count < 0:
            raise OptionError(f"count must be a whole number of tokens, got {count!r}")
        return self._going.has_room_for(count)

    @names_options()
    def step(self, *, begin: bool = True, alone: bool = True) -> list[tuple[Request, str]]:
        """Read of the prompts that are due, then decode a token of every answer.

        A long prompt is read for about as long as decoding takes, a short one for a tenth of a second, each by one piece at
        least; without ``interleaved`` a prompt is read whole, before anything is decoded.

        begin: the prompt that waits longest begins, if there is room for it; without, all go on waiting, and what ends makes
            room for something else.
        alone: nothing else takes room in the engine, so a prompt that has none though no other is going is refused; without, it
            waits.

        Returns the requests that went on and the text by which they did, which may be empty; an empty list while only a part of
        a prompt has been read. Raises what went wrong with a request, which has ``failed`` then; the others go on with the next
        step.
        """
        self._require_open()
        for request in self._all():
            if request.cancelled:
                self._end(request, "cancelled")
        answers = self._ready()
        following = self._next(alone=alone and not self._going) if begin else None
        if following is not None:
            self._begin(following)
        for request in [*self._reading]:
            seconds = self._last_step if answers and request.is_long else ALONE
            self._read(request, seconds if self.interleaved else WHOLE, twins=begin)
        if answers and (self.interleaved or following is None):
            self._decode(answers)
        errors = []
        for request in self._going:
            if request.answer:
                try:
                    self._tell(request)
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise errors[0]  # what has been told by then comes with the next step
        told, self._told = self._told, []
        return told

    def close(self) -> None:
        """Cancel what is not over. The batch takes no more."""
        with self._adding:
            self._closed = True
        errors = []
        for request in self._all():
            try:
                self._end(request, "cancelled")
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _require_open(self) -> None:
        if self._closed:
            raise OptionError("the batch has been closed: open another one")

    def _all(self) -> list[Request]:
        return [*self._waiting, *self._going]

    def _ready(self) -> dict[Request, Answer]:
        """Answers that go on, each with room for its next token. Raises what one of them has, whose request has failed then."""
        found = {}
        with computing(self._engine):
            for request in self._going:
                if request.answer is None or request.finish:
                    continue
                with self._failing(request):
                    request.answer.require_next()
                    request.answer.sequence.reserve(1)
                found[request] = request.answer
        return found

    def _decode(self, answers: Mapping[Request, Answer]) -> None:
        """The next token of each. If that fails, so do those whose token is cached but whose next could not be drawn; if there
        are none, each is decoded alone, and fails if that does: a step that cannot be done would be tried for ever.
        """
        try:
            self._last_step = step(self._engine, [*answers.values()])
        except BaseException as error:
            behind = [request for request, answer in answers.items() if not answer.is_next]
            for request in behind:
                self._fail(request, error)
            if behind or not isinstance(error, Exception):
                raise
            self._last_step = self._decode_alone(answers, error)
        self.timing.decode_seconds += self._last_step

    def _decode_alone(self, answers: Mapping[Request, Answer], why: Exception) -> float:
        """The next token of each, one after another, for together they could not be decoded; seconds that took. Raises what the
        first has that cannot be decoded alone either."""
        errors, seconds = [], 0.0
        for request, answer in answers.items():
            try:
                seconds += step(self._engine, [answer])
            except BaseException as error:
                if isinstance(error, Exception) or not answer.is_next:
                    self._fail(request, error)
                if not isinstance(error, Exception):
                    raise
                errors.append(error)
        if errors:
            raise errors[0]
        if str(why) != self._why_alone:
            self._why_alone = str(why)
            self._engine.report.message(f"{len(answers)} answers are decoded one by one: together they cannot be ({why})")
        return seconds

    def _next(self, *, alone: bool) -> Request | None:
        """The prompt that waits longest, if there is room for it; while a long one is read, the first that is short, or will be
        with the prefix that is known of it. One that continues a sequence which is being read waits for the end of that, and
        lets others pass.
        """
        if not all(request.is_long for request in self._reading):
            return None
        for request in self._waiting:
            with self._engine.lock:
                request.look_up(self._engine.prefixes)
            suspended = request.given is not None and request.given.suspended
            if suspended or (self._reading and request.is_long):
                continue
            return request if alone or self._going.has_room(request) else None
        return None

    def _begin(self, request: Request) -> None:
        """Give a prompt its sequence, to be read into."""
        with self._failing(request):
            try:
                sequence = self._going.take(request)
            except CapacityError:
                if self._going:  # another thread has taken the last place meanwhile, and one of these will be free
                    return
                raise
            self._reading[request] = continuing(self._engine, sequence, request.ids, request.config, after=request.after)
            self._waiting.remove(request)

    def _read(self, request: Request, seconds: float, *, twins: bool) -> None:
        """Read of a prompt for so long, at least one piece; after the last draw the first token of its answer. With ``twins``
        others to it begin then."""
        engine, pieces = self._engine, self._reading[request]
        end = time.perf_counter() + seconds
        with self._failing(request):
            with computing(engine):
                try:
                    while True:
                        next(pieces)
                        if seconds == WHOLE:
                            continue  # a GPU that is waited for has nothing to do while the host goes on
                        wait_for(engine.device)
                        if time.perf_counter() >= end:
                            return
                except StopIteration as last:
                    logits = last.value
                    request.answer = begun(engine, self._going.sequence(request), logits, request.config, request.ids)
            del self._reading[request]
            request.timing = request.answer.timing
        if twins:
            self._begin_twins(request, logits)

    def _begin_twins(self, request: Request, logits: Tensor) -> None:
        """Begin the answers that wait for the prompt which has just been read, in forks of it, while there is room."""
        sequence = self._going.sequence(request)
        for twin in request.twins:
            if twin.cancelled or twin.finish or twin in self._going or not self._going.has_room(twin, sequence):
                continue
            with self._failing(twin):
                try:
                    fork = self._going.take_fork(twin, sequence)
                except CapacityError:  # another thread has taken the last place
                    return
                self._waiting.remove(twin)
                twin.answer = begun(self._engine, fork, logits, twin.config, twin.ids)
                twin.timing = twin.answer.timing

    def _tell(self, request: Request) -> None:
        """What the answer went on by; if it is over, its place is free."""
        assert request.answer is not None
        piece = request.answer.piece()
        request.text += piece
        self._told.append((request, piece))
        if request.finish:
            try:
                end_of(self._engine, request.answer)
            finally:
                self._end(request, request.finish)

    @contextmanager
    def _failing(self, request: Request) -> Iterator[None]:
        """What goes wrong here is the request's."""
        try:
            yield
        except BaseException as error:
            self._fail(request, error)
            raise

    def _fail(self, request: Request, error: BaseException) -> None:
        try:
            request.error = copy(error)  # without what it was traced through, which would live as long as the request
        except Exception:
            request.error = SkvqError(str(error))
        self._end(request, "failed")

    def _end(self, request: Request, finish: str) -> None:
        """It is over, whether or not it had begun."""
        if request in self._waiting:
            self._waiting.remove(request)
        request.timing, request.twins = replace(request.timing, finish=finish), ()
        if request.answer is not None:
            self.timing.add(replace(request.timing, decode_seconds=0.0))
        if request in self._reading:
            with computing(self._engine):
                self._reading.pop(request).close()
        self._going.give_back(request)
