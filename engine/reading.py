"""A prompt read into a sequence: pages of an earlier prompt that begins alike are shared, the rest goes through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import Checkpoint
from skvq.engine.exact import exact_prefill
from skvq.engine.loading import EngineParts
from skvq.engine.measure import wait_for
from skvq.engine.pieces import Pieces, Stopwatch
from skvq.engine.prefill import short_prefill, streaming_prefill
from skvq.engine.prefix import Prefixes
from skvq.engine.report import Reporter
from skvq.engine.timing import Timing

R = TypeVar("R")
SHORT_TOKENS = 128
"""Most tokens appended to a sequence as decode steps of several tokens instead of streamed."""


def read(
    parts: EngineParts,
    prefixes: Prefixes,
    sequence: SequenceCache,
    ids: Sequence[int],
    checkpoint: Checkpoint,
    report: Reporter,
) -> Pieces[tuple[Tensor, Timing]]:
    """Append ``ids``, at least one: logits float32 [V] of the last, and what that took.

    With a checkpoint in a file no prefix is reused. Broken off after one was, the sequence is empty again, and what was read is
    found by the next try. Between two pieces the sequence is ``suspended``.
    """
    sequence.require_whole()
    parts.setup.require_room(sequence.length, len(ids))  # before any work
    tell_if_streamed_through(parts, len(ids), report)
    watch = Stopwatch()
    reused, pending = 0, sequence.pending
    if sequence.total_tokens == 0 and not checkpoint.in_file:
        try:
            reused = prefixes.reuse(sequence, ids)
        except BaseException:
            _empty(sequence, pending)
            raise
    try:
        pieces = _read_rest(parts, sequence, ids[reused:], checkpoint, report)
        how, logits = yield from _suspending(sequence, watch, pieces)
    except BaseException:
        if reused:
            prefixes.keep(sequence)
            _empty(sequence, pending)
        raise
    sequence.logits = logits
    prefixes.keep(sequence)
    seconds = watch.seconds + checkpoint.spent
    return logits, Timing(prompt_tokens=len(ids) - reused, reused_tokens=reused, prefill=how, prefill_seconds=seconds)


def _empty(sequence: SequenceCache, pending: list[int]) -> None:
    """As it was before a prefix was put into it."""
    sequence.truncate(0)
    sequence.pending = pending


def _suspending(sequence: SequenceCache, watch: Stopwatch, pieces: Pieces[R]) -> Pieces[R]:
    """The same pieces; between them the sequence is left alone, and time stands still."""
    try:
        while True:
            next(pieces)
            sequence.suspended = True
            try:
                with watch.pause():
                    yield
            finally:
                sequence.suspended = False
    except StopIteration as end:
        result: R = end.value
        return result
    finally:
        pieces.close()


def tell_if_streamed_through(parts: EngineParts, count: int, report: Reporter) -> None:
    """Say so if a prompt fits only by dropping what cannot be seen any more."""
    context = parts.setup.max_context
    if count > context:
        report.message(
            f"{count:,} tokens are more than the context of {context:,}: they are streamed through it, and the answer "
            "sees the last of them"
        )


def _read_rest(
    parts: EngineParts, sequence: SequenceCache, ids: Sequence[int], checkpoint: Checkpoint, report: Reporter
) -> Pieces[tuple[str, Tensor]]:
    """Read ``ids`` after whatever the sequence holds: how, and the logits of the last, which the device has computed."""
    model, rope = parts.model, parts.rope
    if sequence.total_tokens and len(ids) <= SHORT_TOKENS and not checkpoint.in_file:
        how, hidden = "as decode steps", short_prefill(model, rope, sequence, ids)
    elif sequence.total_tokens == 0 and parts.options.prefill == "exact" and len(ids) <= parts.setup.max_context:
        form = parts.plan.form_of(model.config, len(ids), model.dtype)
        how, hidden = str(form), (yield from exact_prefill(model, rope, sequence, ids, form, report, checkpoint))
    else:
        how, hidden = "streaming", (yield from streaming_prefill(model, rope, sequence, ids, report, checkpoint))
    logits = model.head(hidden)
    wait_for(logits.device)
    return how, logits
