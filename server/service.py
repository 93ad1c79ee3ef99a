"""Prompts of many threads answered in one batch, whose steps one thread takes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Condition

from skvq.engine.batch import Batch, Request
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError, SkvqError
from skvq.engine.evaluate import Likelihoods
from skvq.engine.generate import Engine
from skvq.engine.prompt import Prompt

STOPPED = "the server has been stopped"
INTERNAL = "an internal error, which the server has printed: please report it"
IDLE = 0.5
"""Seconds between two looks at whether the server is to end, where nothing is asked."""


class Call:
    """Requests of one client, answered together. News of them come in order: an index and a piece of text, None at its end."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.error = ""  # of the first request that failed
        self._news: SimpleQueue[tuple[int, str | None]] = SimpleQueue()

    def tell(self, request: Request, piece: str | None) -> None:
        """For the thread that takes the steps."""
        self._news.put((self.requests.index(request), piece))

    def next(self, seconds: float) -> tuple[int, str | None] | None:
        """The next of the news, or None if there are none for so long."""
        try:
            return self._news.get(timeout=seconds)
        except Empty:
            return None

    def cancel(self) -> None:
        """The client has gone."""
        for request in self.requests:
            request.cancel()


class Service:
    """An engine that answers. ``run`` takes the steps; any thread may ``add`` prompts meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = Condition()
        self._batch: Batch | None = None
        self._calls: dict[Request, Call] = {}
        self._scores: list[tuple[Future[Likelihoods], list[int], int]] = []  # texts to be scored
        self._stopping = False

    def add(self, prompts: Sequence[Prompt], sampling: Sequence[SamplingConfig]) -> Call:
        """Have prompts answered, all or none. Raises SkvqError for one that is wrong or does not fit."""
        texts = [self.engine.encode(prompt) for prompt in prompts]  # of long ones it takes a while: steps go on
        with self._changed:
            batch, requests = self._require_running(), list[Request]()
            try:
                for ids, config in zip(texts, sampling, strict=True):
                    requests.append(batch.add(ids, config))
            except BaseException:
                for request in requests:
                    request.cancel()
                raise
            call = Call(requests)
            self._calls |= dict.fromkeys(requests, call)
            self._changed.notify_all()
        return call

    def score(self, ids: list[int], count: int) -> Future[Likelihoods]:
        """Have a text scored, as ``Engine.likelihoods``, when there is a place for it."""
        found: Future[Likelihoods] = Future()
        with self._changed:
            self._require_running()
            self._scores.append((found, ids, count))
            self._changed.notify_all()
        return found

    def _require_running(self) -> Batch:
        if self._batch is None:
            raise SkvqError("the server is not running")
        return self._batch

    def stop(self) -> None:
        """Let ``run`` end; may be called from any thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def run(self) -> None:
        """Take steps until ``stop``, or an interrupt; what is not over is cancelled then."""
        try:
            with self.engine.batch() as batch:
                self._batch = batch
                while not self._stopping:
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopping or len(batch) or self._scores, timeout=IDLE)
                    if self._scores and not self._stopping:
                        self._score_next(alone=not len(batch))
                    if len(batch) and not self._stopping:
                        self._step(batch)
        finally:
            with self._changed:
                self._batch = None
                for request in [*self._calls]:
                    self._end(request, STOPPED)
                for found, _, _ in self._scores:
                    found.set_exception(SkvqError(STOPPED))
                self._scores.clear()

    def _score_next(self, *, alone: bool) -> None:
        """The text that waits longest; if there is no room for it beside answers, not before one of them is over."""
        found, ids, count = self._scores[0]
        try:
            found.set_result(self.engine.likelihoods(ids, count))
        except SkvqError as error:
            if isinstance(error, CapacityError) and not alone:
                return
            found.set_exception(error)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            found.set_exception(RuntimeError(INTERNAL))
        with self._changed:
            self._scores.pop(0)

    def _step(self, batch: Batch) -> None:
        """One step, told to those who wait for it. An error is of one request: the others go on."""
        went_on: list[tuple[Request, str]] = []
        error = ""
        try:
            went_on = batch.step()
        except SkvqError as failed:
            error = str(failed)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            error = INTERNAL
        with self._changed:
            for request, piece in went_on:
                if piece and request in self._calls:
                    self._calls[request].tell(request, piece)
            for request in [request for request in self._calls if request.finish]:
                self._end(request, error)

    def _end(self, request: Request, error: str) -> None:
        call = self._calls.pop(request)
        if request.finish in ("", "failed", "cancelled") and not call.error:
            call.error = error or "the request has been cancelled"
        call.tell(request, None)
