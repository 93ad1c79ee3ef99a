"""What the engine reports while it works: messages and progress bars, on stderr or nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from time import perf_counter
from typing import Any, Protocol, TextIO, runtime_checkable

from tqdm import tqdm

from skvq.engine.pace import Pace
from skvq.kernels.notices import stderr


class Bar(Protocol):
    """Progress of one piece of work, in one kind of work or several."""

    def advance(self, *work: float) -> None:
        """Report how much of each kind has been done since the last call."""


@runtime_checkable
class Reporter(Protocol):
    """Where messages and progress go."""

    def message(self, text: str) -> None: ...

    def bar(self, label: str, *total: float) -> AbstractContextManager[Bar]:
        """A bar for ``total`` of each kind of work. A kind takes time in proportion; how much, the bar finds out."""


MOMENT = 0.05
"""Seconds between two looks at a bar's progress: a look takes as long as several launches."""


LOGGED = 5.0
"""Seconds between two lines of a bar where nobody watches it, as in a file."""


class _Tqdm:
    """Shows the share of the whole time that has passed, so that tqdm's remaining time is that of the pace."""

    def __init__(self, bar: tqdm[None], pace: Pace) -> None:
        self._bar, self._pace = bar, pace
        self._start = perf_counter()
        self._then = 0.0
        self._work: list[float] = []  # done since then

    def advance(self, *work: float) -> None:
        self._work = [a + b for a, b in zip_longest(self._work, work, fillvalue=0.0)]
        elapsed = perf_counter() - self._start
        if elapsed < self._then + MOMENT:
            return
        self._pace.advance(self._work, elapsed)
        self._then, self._work = elapsed, []
        self._bar.update(max(0.0, self._pace.share(elapsed) - self._bar.n))


class _Lines:
    """A stream that nobody watches: each state of a bar is a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


class _Nothing:
    def advance(self, *work: float) -> None:
        pass


class StderrReporter:
    """Lines and bars on stderr, if there is one; a bar appears once its work has taken half a second."""

    def message(self, text: str) -> None:
        if (stream := stderr()) is not None:
            tqdm.write(f"skvq: {text}", file=stream)

    @contextmanager
    def bar(self, label: str, *total: float) -> Iterator[Bar]:
        if (stream := stderr()) is None:
            yield _Nothing()
            return
        watched = getattr(stream, "isatty", bool)()
        form = "{desc}: {percentage:3.0f}%, {remaining} to go"  # what a narrow terminal cuts off comes after it
        shown: dict[str, Any] = {"bar_format": form + "|{bar}| {elapsed} elapsed", "mininterval": 0.1, "file": stream}
        if not watched:
            shown = {"bar_format": form + ", {elapsed} elapsed", "mininterval": LOGGED, "file": _Lines(stream)}
        with tqdm(total=1.0, desc=label, smoothing=0, delay=0.5, leave=False, dynamic_ncols=watched, **shown) as bar:
            try:
                yield _Tqdm(bar, Pace(total))
            finally:
                bar.clear()  # a message may have drawn it before its delay was over


class Quiet:
    """Reports nothing."""

    def message(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, label: str, *total: float) -> Iterator[Bar]:
        yield _Nothing()
