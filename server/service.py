"""Prompts of many threads answered in one batch, and texts scored beside it; one thread does all of it."""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Condition

from skvq.engine.batch import ALONE, Batch
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError, OptionError, SkvqError
from skvq.engine.generate import Engine
from skvq.engine.guard import computing
from skvq.engine.measure import wait_for
from skvq.engine.prompt import Prompt
from skvq.engine.request import Request
from skvq.server.calls import Answers, Scores

MOST_SCORES = 1 << 20
"""Log probabilities of one request: they are held at once."""
INTERNAL = "an internal error, which the server has printed: please report it"


class NotRunning(SkvqError):
    """The server has been stopped, or has not begun: a client may try again."""


class Service:
    """An engine that answers. ``run`` does the work; any thread may ask for some meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = Condition()
        self._batch: Batch | None = None
        self._answers: dict[Request, tuple[Answers, int]] = {}  # what each is one of, and which
        self._scores: deque[Scores] = deque()
        self._last_step = 0.0  # seconds
        self._waits = False  # the next score, for room beside the answers that have begun: no other begins until there is
        self._stopping = False

    def answer(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingConfig]) -> Answers:
        """Have each prompt answered once with each of ``sampling``, all or none. Raises SkvqError for one that is wrong or does
        not fit."""
        texts = [self.engine.encode(prompt) for prompt in prompts]  # of long ones it takes a while: steps go on
        for config in sampling:
            self.engine.sampling_of(config)  # and so does a large schema
        with self._changed:
            batch, requests = self._running(), list[Request]()
            try:
                for ids in texts:
                    requests.extend(batch.add_each(ids, sampling))
            except BaseException:
                for request in requests:
                    request.cancel()
                raise
            call = Answers(texts, requests)
            self._answers |= {request: (call, index) for index, request in enumerate(requests)}
            self._changed.notify_all()
        return call

    def score(self, prompts: Sequence[Prompt], count: int) -> Scores:
        """Have prompts scored, one after another, when there is a place for each: they take turns with those of other clients,
        and time with the answers. Raises SkvqError as ``answer``."""
        call = Scores([self.engine.encode(prompt) for prompt in prompts], count)
        for ids in call.prompts:
            self.engine.parts.setup.require(0, len(ids))
        if (told := count * sum(map(len, call.prompts))) > MOST_SCORES:
            raise OptionError(
                f"{told:,} log probabilities are more than the {MOST_SCORES:,} of one request: score fewer prompts"
            )
        with self._changed:
            self._running()
            self._scores.append(call)
            self._changed.notify_all()
        return call

    def _running(self) -> Batch:
        if self._batch is None or self._stopping:
            raise NotRunning("the server is not running")
        return self._batch

    def stop(self) -> None:
        """Let ``run`` end; may be called from any thread, and by a signal."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Do what is asked for until ``stop``, or an interrupt; what is not over is cancelled then. ``ready`` is called when
        something can be asked for."""
        try:
            with self.engine.batch() as batch:
                self._batch = batch
                ready()
                while not self._stopping:
                    with self._changed:
                        # a signal that comes just before the wait does not end it: hence the timeout
                        self._changed.wait_for(lambda: self._stopping or len(batch) or self._scores, timeout=1)
                    if self._scores and not self._stopping:
                        self._score(batch, self._last_step if len(batch) else ALONE)
                    if len(batch) and not self._stopping:
                        self._step(batch)
        finally:
            stopped = NotRunning("the server has been stopped")
            with self._changed:
                self._batch = None
                for call, index in self._answers.values():
                    call.end(index, stopped)
                self._answers.clear()
                for scores in self._scores:
                    self._break_off(scores)
                    _fail(scores, stopped)
                self._scores.clear()

    def _score(self, batch: Batch, seconds: float) -> None:
        """Go on with the text whose turn it is, for so long. If there is no room for it beside the answers under way, it begins
        when enough of them are over; meanwhile no other begins."""
        call, beside = self._scores[0], batch.begun
        begins = not call.pieces and not call.cancelled
        self._waits = begins and beside > 0 and not batch.has_room_for(len(call.prompts[len(call.found)]))
        if self._waits:
            return
        end = time.perf_counter() + seconds
        try:
            call.pieces = call.pieces or self.engine.scoring(call.prompts[len(call.found)], call.count)
            with computing(self.engine):
                while not call.cancelled:
                    next(call.pieces)
                    wait_for(self.engine.device)
                    if time.perf_counter() >= end or self._stopping:
                        return
        except StopIteration as last:
            call.pieces = None
            call.found.append(last.value)
            call.tell(len(call.found) - 1, None)
        except SkvqError as error:
            call.pieces = None
            if isinstance(error, CapacityError) and beside:  # of memory, which answers hold too
                self._waits = True
                return
            _fail(call, error)
        except Exception:
            _fail(call, _internal())
        self._break_off(call)
        with self._changed:
            self._scores.popleft()
            if not call.cancelled and not call.error and len(call.found) < len(call.prompts):
                self._scores.append(call)

    def _break_off(self, call: Scores) -> None:
        """Nobody waits for the text that is being scored, if there is one: what it holds is free."""
        if call.pieces:
            with computing(self.engine):
                call.pieces.close()

    def _step(self, batch: Batch) -> None:
        """One step, told to those who wait for it. An error is of one request: the others go on."""
        error, start = SkvqError("the request has been cancelled"), time.perf_counter()
        try:
            batch.step(begin=not self._waits, alone=not (self._scores and self._scores[0].pieces))
        except SkvqError as failed:
            error = failed
        except Exception:
            error = _internal()
        self._last_step = time.perf_counter() - start
        with self._changed:
            over = [request for request in self._answers if request.finish]
            for request in over:
                call, index = self._answers.pop(request)
                call.end(index, request.error if isinstance(request.error, SkvqError) else error)
            for request in batch.answering:
                if known := self._answers.get(request):
                    call, index = known
                    call.go_on(index)


def _fail(call: Scores, error: SkvqError) -> None:
    call.error = error
    call.tell(len(call.found), None)


def _internal() -> SkvqError:
    """The error of a bug, which is printed if there is anywhere to."""
    with suppress(OSError, ValueError):
        traceback.print_exc(file=sys.stderr)
    return SkvqError(INTERNAL)
