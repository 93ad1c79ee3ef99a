"""What the engine tells a person while it works: messages and progress bars, on stderr or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from tqdm import tqdm


class Bar(Protocol):
    """Progress of one piece of work, in units proportional to time."""

    def advance(self, work: float) -> None: ...


class Reporter(Protocol):
    """Where messages and progress go."""

    def message(self, text: str) -> None: ...

    def bar(self, label: str, total: float) -> AbstractContextManager[Bar]: ...


class _Tqdm:
    def __init__(self, bar: tqdm[None]) -> None:
        self._bar = bar

    def advance(self, work: float) -> None:
        self._bar.update(work)


class _Nothing:
    def advance(self, work: float) -> None:
        pass


class StderrReporter:
    """Lines and bars on stderr; a bar appears once its work has taken half a second."""

    def message(self, text: str) -> None:
        tqdm.write(f"skvq: {text}", file=sys.stderr)

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} to go"
        with tqdm(total=total, desc=label, bar_format=form, smoothing=0, delay=0.5, file=sys.stderr, leave=False) as bar:
            yield _Tqdm(bar)


class Quiet:
    """Nothing anywhere."""

    def message(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        yield _Nothing()
