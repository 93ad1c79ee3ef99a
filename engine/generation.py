"""Several sequences continued together, a token of each at a time."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from skvq.engine.answer import Answer
from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.guard import computing, own_settings
from skvq.engine.timing import Timing

if TYPE_CHECKING:
    from skvq.engine.generate import Engine


class Generation:
    """Answers that grow together. Timings of their sequences are kept up to date; a reader's own time is no part of them."""

    def __init__(
        self,
        engine: Engine,
        sequences: Sequence[SequenceCache],
        logits: Sequence[Tensor],
        config: SamplingConfig,
        *,
        resumed: bool = False,
    ) -> None:
        """``resumed``: no text came before, the answers go on from what the sequences hold."""
        self._engine, self._timings = engine, [sequence.timing for sequence in sequences]
        tokenizer = engine.parts.tokenizer
        with own_settings(engine.device):
            self.answers = [
                Answer(tokenizer, s, row, config, resumed=resumed) for s, row in zip(sequences, logits, strict=True)
            ]
        for timing, answer in zip(self._timings, self.answers, strict=True):
            timing.new_tokens = answer.count

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(index of the sequence, piece of its text), as they are drawn."""
        live = list(range(len(self.answers)))
        while live:
            for index in live:
                if piece := self.answers[index].piece():
                    yield index, piece
            ended = [i for i in live if self.answers[i].done]
            if ended:
                self._tell(ended)
                live = [i for i in live if i not in ended]
            if live:
                self._step(live)

    def _step(self, live: Sequence[int]) -> None:
        """Decode the token of each answer, and draw its next."""
        start = time.perf_counter()
        answers = [self.answers[i] for i in live]
        with computing(self._engine):
            for answer in answers:
                answer.require_next()
            rows = self._engine.step.run([a.sequence for a in answers], [a.token for a in answers])
            for index, row in zip(live, rows, strict=True):
                self.answers[index].take(row)
        seconds = time.perf_counter() - start
        for index in live:
            timing = self._timings[index]
            timing.new_tokens = self.answers[index].count
            timing.decoded_tokens += 1
            timing.decode_seconds += seconds

    def _tell(self, ended: Sequence[int]) -> None:
        context = self._engine.parts.setup.max_context
        for answer in (self.answers[i] for i in ended):
            if answer.finish == "context":
                self._engine.report.message(
                    f"the context of {context:,} tokens is full, the answer ends after {answer.count:,} of "
                    f"{answer.config.max_new_tokens:,} tokens: load with a larger max_context (--ctx) to go on"
                )
        for index in ended:
            self._timings[index].finish = self.answers[index].finish


def continued(
    engine: Engine, sequence: SequenceCache, ids: Sequence[int], config: SamplingConfig, checkpoint: str | Path | None
) -> Generator[str, None, None]:
    """Pieces of what follows ``ids`` in a sequence; without ids, of what follows its last token."""
    logits = sequence.logits
    if ids or sequence.pending or logits is None:
        if not ids and not sequence.pending:
            sequence.take_back()
        sequence.require_room(len(sequence.pending) + len(ids), config.max_new_tokens)
        logits = engine.read(sequence, ids, checkpoint=checkpoint)
    else:
        engine.timing = sequence.timing = Timing()
    for _, piece in Generation(engine, [sequence], [logits], config, resumed=not ids).pieces():
        yield piece
    with engine.lock:
        engine.prefixes.keep(sequence)


def answered(
    engine: Engine, ids: Sequence[int], config: SamplingConfig, checkpoint: str | Path | None
) -> Generator[str, None, None]:
    """``continued`` in a sequence that is there for this answer alone."""
    with engine.new_sequence() as sequence:
        yield from continued(engine, sequence, ids, config, checkpoint)


def answer_all(engine: Engine, prompts: Sequence[list[int]], config: SamplingConfig) -> tuple[list[str], Timing]:
    """The answers to all prompts, as many of them at a time as can be answered together, and what they took."""
    answers: list[str] = []
    total = Timing()
    with engine.batches:
        while len(answers) < len(prompts):
            answers += _answer_together(engine, _fitting(engine, prompts[len(answers) :], config), config, total)
    return answers, total


def _fitting(engine: Engine, prompts: Sequence[list[int]], config: SamplingConfig) -> Sequence[list[int]]:
    """As many of the prompts, in order, as there are sequences and pages for; the first in any case."""
    setup = engine.parts.setup
    with engine.lock:
        room, places, count = setup.arena.free_pages, setup.arena.free_sequences, 0
    for ids in prompts[:places]:
        room -= setup.regions.pages(min(len(ids) + config.max_new_tokens, setup.max_context))
        if room < 0:
            break
        count += 1
    return prompts[: max(1, count)]


def _answer_together(engine: Engine, prompts: Sequence[list[int]], config: SamplingConfig, total: Timing) -> list[str]:
    """The answers; what they took is added to ``total``."""
    answers = [""] * len(prompts)
    sequences: list[SequenceCache] = []
    try:
        logits = []
        for ids in prompts:
            sequences.append(engine.new_sequence())
            logits.append(engine.read(sequences[-1], ids))
        for index, piece in Generation(engine, sequences, logits, config).pieces():
            answers[index] += piece
        timings = [sequence.timing for sequence in sequences]
        for timing in timings:
            total.add(replace(timing, decode_seconds=0.0))
        total.decode_seconds += max(timing.decode_seconds for timing in timings)  # they were decoded together
    finally:
        for sequence in sequences:
            sequence.free()
    return answers
