"""Sequences continued together, a step of each at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from skvq.engine.answer import Answer, draw, guesses_of
from skvq.engine.cache import SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.guard import computing, own_settings
from skvq.engine.rollback import RING_MARKS, all_or_nothing
from skvq.engine.timing import Timing

if TYPE_CHECKING:
    from skvq.engine.generate import Engine


def begun(engine: Engine, sequence: SequenceCache, logits: Tensor, config: SamplingConfig, *, resumed: bool = False) -> Answer:
    """An answer whose first token is drawn from ``logits`` [V]."""
    with own_settings(engine.device):
        return Answer(engine.parts.tokenizer, sequence, logits, config, resumed=resumed)


def step(engine: Engine, answers: Sequence[Answer]) -> float:
    """Decode the token of each answer, with what it is guessed to go on with, and draw its next; seconds that took."""
    start = time.perf_counter()
    before = [answer.count for answer in answers]
    with computing(engine), ExitStack() as guarded:
        for answer in answers:
            answer.require_next()
        guesses = guesses_of(answers)
        for answer in answers if any(guesses) else ():  # broken off, no guess is left in a sequence
            guarded.enter_context(all_or_nothing(answer.sequence, RING_MARKS))
        decoded = [token for answer, guessed in zip(answers, guesses, strict=True) for token in (answer.token, *guessed)]
        draw(answers, engine.step.run([a.sequence for a in answers], decoded), guesses)
    seconds = time.perf_counter() - start
    for answer, count in zip(answers, before, strict=True):
        answer.timing.decoded_tokens += answer.count - count
        answer.timing.decode_seconds += seconds
    return seconds


def tell_if_full(engine: Engine, answer: Answer) -> None:
    """Say so if the context ended an answer."""
    if answer.finish == "context":
        engine.report.message(
            f"the context of {engine.parts.setup.max_context:,} tokens is full, the answer ends after {answer.count:,} of "
            f"{answer.config.max_new_tokens:,} tokens: load with a larger max_context (--ctx) to go on"
        )


def continued(
    engine: Engine,
    sequence: SequenceCache,
    ids: Sequence[int],
    config: SamplingConfig,
    checkpoint: str | Path | None,
    *,
    after: tuple[int, tuple[int, ...]],
) -> Generator[str, None, None]:
    """Pieces of what follows ``ids`` in a sequence; without ids, of what follows its last token.

    after: the sequence's mark when ``ids`` were chosen.
    """
    if sequence.mark != after:
        raise OptionError("the sequence was continued or cut since this answer was asked for: ask for it again")
    logits = sequence.logits
    if ids or sequence.pending or logits is None:
        if not ids and not sequence.pending:
            sequence.take_back()
        sequence.require_room(len(sequence.pending) + len(ids), config.max_new_tokens)
        logits = engine.read(sequence, ids, checkpoint=checkpoint)
    else:
        engine.timing = sequence.timing = Timing()
    answer = begun(engine, sequence, logits, config, resumed=not ids)
    while True:
        if piece := answer.piece():
            yield piece
        if answer.finish:
            break
        step(engine, [answer])
    tell_if_full(engine, answer)
    with computing(engine):
        engine.prefixes.keep(sequence)


def answered(
    engine: Engine, ids: Sequence[int], config: SamplingConfig, checkpoint: str | Path | None
) -> Generator[str, None, None]:
    """``continued`` in a sequence that is there for this answer alone."""
    with engine.new_sequence() as sequence:
        yield from continued(engine, sequence, ids, config, checkpoint, after=sequence.mark)


def answer_all(engine: Engine, prompts: Sequence[list[int]], config: SamplingConfig) -> tuple[list[str], Timing]:
    """The answers to all prompts and what they took, as many at a time as there are places and pages for.

    A prompt waits until one that is answered gives up its place, not until all of them have (continuous batching).
    """
    texts, total = [""] * len(prompts), Timing()
    waiting = deque(enumerate(prompts))
    sequences: dict[int, SequenceCache] = {}  # of the prompts being answered, by their index
    answers: dict[int, Answer] = {}
    with engine.batches:
        try:
            while waiting or answers:
                sequence = _place_beside(engine, answers.values(), waiting[0][1], config) if waiting else None
                if sequence is not None:
                    index, ids = waiting.popleft()
                    sequences[index] = sequence
                    answers[index] = begun(engine, sequence, engine.read(sequence, ids), config)
                    drawn = [index]
                else:
                    total.decode_seconds += step(engine, list(answers.values()))
                    drawn = list(answers)
                for index in drawn:
                    texts[index] += answers[index].piece()
                    if answers[index].finish:
                        answer = answers.pop(index)
                        tell_if_full(engine, answer)
                        total.add(replace(answer.timing, decode_seconds=0.0))
                        sequences.pop(index).free()
        finally:
            for sequence in sequences.values():
                sequence.free()
    return texts, total


def _place_beside(
    engine: Engine, answers: Collection[Answer], ids: Sequence[int], config: SamplingConfig
) -> SequenceCache | None:
    """A sequence for one more prompt if it can be answered to its end beside others, which have yet to take their pages."""
    setup = engine.parts.setup

    def pages(tokens: int) -> int:
        return setup.regions.pages(min(tokens, setup.max_context))

    needed = pages(len(ids) + config.max_new_tokens)
    needed += sum(pages(a.sequence.length + 1 + a.left) - len(a.sequence.pages) for a in answers)
    with engine.lock:
        room = setup.arena.free_sequences > 0 and setup.arena.free_pages >= needed
        return engine.new_sequence() if room or not answers else None
