"""A text and then questions, each answered as it comes; what ends that early, and what is kept of it."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from skvq.engine.config import SamplingConfig
from skvq.engine.errors import CapacityError, ModelError, OptionError
from skvq.engine.interrupts import uninterrupted

if TYPE_CHECKING:
    from skvq.engine.cache import Mark, SequenceCache
    from skvq.engine.generate import Engine
    from skvq.engine.prompt import Prompt
    from skvq.engine.report import Bar, Reporter
    from skvq.engine.timing import Timing


def converse(
    engine: Engine, sequence: SequenceCache, text: str, asked: Iterable[str], sampling: SamplingConfig, options: dict[str, Any]
) -> str:
    """Answer a text, then each question in turn; the first answer. What ends it early, but for a full context where questions
    are asked, is raised when the session is saved, with what it held before a text of which only a part was read."""
    turn = first = Turn.begins(sequence)
    written = ""
    try:
        with ended_like_interrupted():
            written = answer(engine, sequence, text, sampling, options)
            for question in asked:
                turn = Turn.begins(sequence)
                try:
                    answer(engine, sequence, question, sampling, {**options, "system": None})
                except (OptionError, ModelError) as error:  # the question's: others can be asked
                    engine.report.message(str(error))
    except BaseException as error:
        if isinstance(error, CapacityError) and options["interactive"] and sequence.length:
            engine.report.message(str(error))
            return written
        whole = turn.is_read(sequence) or ((turn is not first or options["fill"]) and sequence.rewind(turn.mark))
        if options["session"] is not None and whole:
            save_whole(sequence, options["session"])
            engine.report.message(f"what has been read and written is saved in {options['session']}")
        elif isinstance(error, KeyboardInterrupt) and options["checkpoint"] is None and not whole:
            engine.report.message("the text was being read, and none of that is kept: --checkpoint FILE would keep it")
        raise
    return written


class Ended(KeyboardInterrupt):
    """The process was asked to end, not an answer."""


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended


@contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """SIGTERM, unless it is ignored, does what Ctrl-C does outside of an answer."""
    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_DFL or current_thread() is not main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def save_whole(sequence: SequenceCache, path: Path) -> None:
    """Save a session though Ctrl-C is pressed meanwhile, which comes after it: a large one takes seconds."""
    with uninterrupted():
        sequence.save(path)


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a sequence was before a text was read, so that a text of which only half was read can be forgotten."""

    mark: Mark
    timing: Timing

    @classmethod
    def begins(cls, sequence: SequenceCache) -> Turn:
        return cls(sequence.mark, sequence.timing)

    def is_read(self, sequence: SequenceCache) -> bool:
        """Whether all of the text has been read: a sequence then gets a timing of its own."""
        return sequence.timing is not self.timing


def answer(engine: Engine, sequence: SequenceCache, text: str, sampling: SamplingConfig, options: dict[str, Any]) -> str:
    """Read a text and write what follows, as it comes unless it is for JSON. Ctrl-C ends one of several answers."""
    pieces, report = [], engine.report
    below = engine.report = BelowAnswer(report)
    try:
        for piece in engine.stream(run_prompt(text, options), sampling, sequence=sequence, checkpoint=options["checkpoint"]):
            pieces.append(piece)
            if len(pieces) == 1 and options["checkpoint"] is not None and options["session"] is not None:
                save_whole(sequence, options["session"])  # the checkpoint is gone: what has been read is kept here
            if not options["as_json"]:
                below.is_open = True
                click.echo(piece, nl=False)
    except KeyboardInterrupt as error:
        if isinstance(error, Ended) or not (options["interactive"] and pieces):
            raise
    finally:
        engine.report = report
        if below.is_open:
            click.echo()
        below.close()
    if not below.is_open and not options["as_json"]:
        click.echo()
    return "".join(pieces)


class BelowAnswer:
    """A reporter whose messages wait while a line of an answer ``is_open``."""

    def __init__(self, report: Reporter) -> None:
        self._report, self._held = report, list[str]()
        self.is_open = False

    def message(self, text: str) -> None:
        if self.is_open:
            self._held.append(text)
        else:
            self._report.message(text)

    def bar(self, label: str, *total: float) -> AbstractContextManager[Bar]:
        return self._report.bar(label, *total)

    def close(self) -> None:
        """The line has ended: what has waited is told."""
        for text in self._held:
            self._report.message(text)


def run_prompt(text: str, options: dict[str, Any]) -> Prompt:
    """What ``skvq run`` reads next: the text or a chat message; with no text a sequence continues from its last token."""
    if not text or not options["chat"]:
        return text
    system = [] if options["system"] is None else [{"role": "system", "content": options["system"]}]
    return [*system, {"role": "user", "content": text}]
