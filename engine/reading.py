"""A prompt read into a sequence: pages of an earlier prompt that begins alike are shared, the rest goes through the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import Checkpoint, FileCheckpoint, NoCheckpoint
from skvq.engine.exact import exact_prefill
from skvq.engine.loading import EngineParts
from skvq.engine.measure import wait_for
from skvq.engine.prefill import short_prefill, streaming_prefill
from skvq.engine.prefix import Prefixes
from skvq.engine.report import Reporter
from skvq.engine.timing import Timing

SHORT_TOKENS = 128
"""Most tokens appended to a sequence as decode steps of several tokens instead of streamed."""


class Reader:
    """Reads prompts for an engine."""

    def __init__(self, parts: EngineParts, prefixes: Prefixes, report: Reporter) -> None:
        self._parts, self._prefixes, self._report = parts, prefixes, report

    def read(self, sequence: SequenceCache, ids: Sequence[int]) -> tuple[Tensor, Timing]:
        """Append ``ids``, at least one: logits float32 [V] of the last, and what that took.

        Broken off after a prefix was reused, the sequence is empty again, and what was read is found by the next try.
        """
        self._require_room(sequence, ids)
        start = time.perf_counter()
        reused = self._prefixes.reuse(sequence, ids) if sequence.length == 0 else 0
        rest = ids[reused:]
        try:
            if sequence.length and len(rest) <= SHORT_TOKENS:
                parts = self._parts
                how, hidden = "as decode steps", short_prefill(parts.model, parts.rope, sequence, rest)
            else:
                how, hidden = self._prefill(sequence, rest, NoCheckpoint())
        except BaseException:
            if reused:
                self._prefixes.keep(sequence)
                sequence.truncate(0)
            raise
        return self._done(sequence, hidden, len(rest), reused, how, start)

    def read_with_checkpoint(
        self, sequence: SequenceCache, ids: Sequence[int], checkpoint: Path, seconds: float
    ) -> tuple[Tensor, Timing]:
        """The same, reusing no prefix; work is kept in a file every so many seconds and on Ctrl-C, and taken up from there."""
        self._require_room(sequence, ids)
        start = time.perf_counter()
        kept = FileCheckpoint(checkpoint, seconds, self._report)
        how, hidden = self._prefill(sequence, ids, kept)
        return self._done(sequence, hidden, len(ids), 0, how, start - kept.spent)

    def _require_room(self, sequence: SequenceCache, ids: Sequence[int]) -> None:
        """Raise CapacityError before any work; say so if they fit only by dropping what cannot be seen any more."""
        sequence.require_room(len(ids))
        context = self._parts.setup.max_context
        if len(ids) > context:
            self._report.message(
                f"{len(ids):,} tokens are more than the context of {context:,}: they are streamed through it, and the answer "
                "sees the last of them"
            )

    def _prefill(self, sequence: SequenceCache, ids: Sequence[int], kept: Checkpoint) -> tuple[str, Tensor]:
        """Read ``ids`` after whatever the sequence holds: how, and the hidden state [d] of the last."""
        parts, where = self._parts, (self._parts.model, self._parts.rope, sequence, ids)
        if sequence.length == 0 and parts.prefill == "exact" and len(ids) <= parts.setup.max_context:
            form = parts.plan.form_of(parts.model.config, len(ids), parts.model.weights.embedding.dtype)
            return str(form), exact_prefill(*where, form, self._report, kept)
        return "streaming", streaming_prefill(*where, self._report, kept)

    def _done(
        self, sequence: SequenceCache, hidden: Tensor, count: int, reused: int, how: str, start: float
    ) -> tuple[Tensor, Timing]:
        logits = self._parts.model.head(hidden)
        sequence.logits = logits
        self._prefixes.keep(sequence)
        wait_for(logits.device)
        seconds = time.perf_counter() - start
        return logits, Timing(prompt_tokens=count, reused_tokens=reused, prefill=how, prefill_seconds=seconds)
