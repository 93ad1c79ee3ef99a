"""Sequences continued: one by itself, or several by steps that they take together."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from skvq.engine.answer import Answer, draw, guesses_of, raise_first
from skvq.engine.cache import Mark, SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.errors import OptionError
from skvq.engine.guard import computing
from skvq.engine.pieces import Pieces, finished
from skvq.engine.rollback import RING_MARKS, all_or_nothing
from skvq.engine.timing import Timing
from skvq.engine.token_engine import TokenEngine


def begun(
    engine: TokenEngine, sequence: SequenceCache, logits: Tensor, config: SamplingConfig, prompt: Sequence[int]
) -> Answer:
    """An answer whose first token is drawn from ``logits`` [V]: while the engine still computes what they follow."""
    with computing(engine):
        return Answer(engine.parts.tokenizer, sequence, logits, config, prompt, engine.grammars)


def step(engine: TokenEngine, answers: Sequence[Answer]) -> float:
    """Decode the token of each answer, with what it is guessed to go on with, and draw its next; seconds that took."""
    start = time.perf_counter()
    before = [answer.count for answer in answers]
    with computing(engine), ExitStack() as guarded:
        for answer in answers:
            answer.require_next()
        guesses = guesses_of(answers)
        for answer in answers if any(guesses) else ():  # broken off, no guess is left in a sequence
            drawn = partial(_has_drawn, answer, answer.count)
            guarded.enter_context(all_or_nothing(answer.sequence, RING_MARKS, unless=drawn))
        decoded = [token for answer, guessed in zip(answers, guesses, strict=True) for token in (answer.token, *guessed)]
        errors = draw(answers, engine.step.run([a.sequence for a in answers], decoded), guesses)
    raise_first(errors)  # outside: what the other answers have taken stays
    seconds = time.perf_counter() - start
    for answer, count in zip(answers, before, strict=True):
        answer.timing.decoded_tokens += answer.count - count
        answer.timing.decode_seconds += seconds
    return seconds


def _has_drawn(answer: Answer, count: int) -> bool:
    """Whether an answer that had ``count`` tokens has taken all that it could of a step: it can go on."""
    return answer.count > count and answer.is_next


def end_of(engine: TokenEngine, answer: Answer) -> None:
    """An answer is over: its pages may be of use to prompts that go on from it. Say so if the context ended it."""
    with computing(engine):
        engine.prefixes.keep(answer.sequence)
    if answer.finish == "context":
        engine.report.message(
            f"the context of {engine.parts.setup.max_context:,} tokens is full, the answer ends after {answer.count:,} of "
            f"{answer.config.max_new_tokens:,} tokens: load with a larger max_context (--ctx) to go on"
        )


def continued(
    engine: TokenEngine,
    sequence: SequenceCache,
    ids: Sequence[int],
    config: SamplingConfig,
    checkpoint: str | Path | None,
    *,
    after: Mark,
) -> Generator[str, None, None]:
    """Pieces of the answer to ``ids`` in a sequence; arguments as for ``continuing``."""
    with computing(engine):  # until its first token is pending, no other thread may change the sequence
        logits = finished(continuing(engine, sequence, ids, config, checkpoint, after=after))
        answer = begun(engine, sequence, logits, config, ids)
    while True:
        if piece := answer.piece():
            yield piece
        if answer.finish:
            break
        step(engine, [answer])
    end_of(engine, answer)


def continuing(
    engine: TokenEngine,
    sequence: SequenceCache,
    ids: Sequence[int],
    config: SamplingConfig,
    checkpoint: str | Path | None = None,
    *,
    after: Mark,
) -> Pieces[Tensor]:
    """Read ``ids`` into a sequence: logits float32 [V] of what follows them; without ids, of what follows its last token.

    after: the sequence's mark when ``ids`` were chosen.
    """
    sequence.require_whole()
    if sequence.mark != after:
        raise OptionError("the sequence was continued or cut since this answer was asked for: ask for it again")
    logits = sequence.logits
    if ids or sequence.pending or logits is None:
        if not ids and not sequence.pending:
            sequence.take_back()
        engine.parts.setup.require_room(sequence.length, len(sequence.pending) + len(ids), config.max_new_tokens)
        return (yield from engine.reading(sequence, ids, checkpoint=checkpoint))
    engine.timing = sequence.timing = Timing()
    return logits


def answered(
    engine: TokenEngine, ids: Sequence[int], config: SamplingConfig, checkpoint: str | Path | None
) -> Generator[str, None, None]:
    """``continued`` in a sequence that is there for this answer alone."""
    with engine.new_sequence() as sequence:
        yield from continued(engine, sequence, ids, config, checkpoint, after=sequence.mark)
