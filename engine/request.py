"""One prompt of a batch, from when it waits to its answer's end."""

from __future__ import annotations

from collections.abc import Sequence

from skvq.engine.answer import Answer
from skvq.engine.cache import Mark, SequenceCache
from skvq.engine.config import SamplingConfig
from skvq.engine.prefill_form import CHUNK_TOKENS
from skvq.engine.prefix import Prefixes
from skvq.engine.sampling import TokenLogprob
from skvq.engine.timing import Timing
from skvq.kernels.layout import PAGE_TOKENS


class Request:
    """A prompt of a batch and its answer.

    text: what has been answered so far.
    logprobs: of each token of that, if ``SamplingConfig.logprobs`` asks for them.
    timing: what that took; of a step of several answers each counts all of it.
    error: what it has ``failed`` with.
    """

    def __init__(self, ids: Sequence[int], config: SamplingConfig, sequence: SequenceCache | None, *, fork: bool) -> None:
        self.ids, self.config = ids, config
        self.text, self.timing = "", Timing()
        self.error: BaseException | None = None
        self.given, self.fork, self.after = sequence, fork, sequence.mark if sequence else Mark()
        self.twins: Sequence[Request] = ()  # to the same prompt, this one among them, until it is over
        self.answer: Answer | None = None  # from when the prompt has been read
        self.cancelled = False
        self.known: list[int] = []  # pages of its beginning
        self._looked_up = -1  # with so many changes of what is known

    def __repr__(self) -> str:
        return f"<Request: {len(self.ids):,} tokens, {self.finish or ('being answered' if self.answer else 'waiting')}>"

    @property
    def finish(self) -> str:
        """What ended the answer, as ``Summary.finish``, or ``cancelled``, or ``failed`` (``Batch.step`` has raised its
        ``error``); empty while it waits or is being answered.
        """
        return self.timing.finish

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """See the class."""
        return self.answer.logprobs if self.answer else []

    def look_up(self, prefixes: Prefixes) -> None:
        """Which pages of its beginning are known: to be asked while the engine's lock is held."""
        if self.given is None and len(self.ids) > PAGE_TOKENS and self._looked_up != prefixes.changes:
            self.known, self._looked_up = prefixes.known(self.ids), prefixes.changes

    @property
    def is_long(self) -> bool:
        """Whether what is not known of it is read in more than one piece a layer."""
        return len(self.ids) - len(self.known) * PAGE_TOKENS > CHUNK_TOKENS

    @property
    def held(self) -> int:
        """Tokens that it continues."""
        return self.given.length + len(self.given.pending) if self.given else 0

    @property
    def most_tokens(self) -> int:
        """Of its sequence, when the answer is as long as it may be."""
        return self.held + len(self.ids) + self.config.max_new_tokens

    def cancel(self) -> None:
        """Give its place to another prompt, with the next step. May be called from any thread."""
        self.cancelled = True
