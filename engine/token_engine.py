"""Prompts and token ids into sequences, logits out: what answers are made of. Arguments are checked here and handed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import RLock
from typing import NoReturn

import torch
from torch import Tensor

from skvq.engine import reading
from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import Checkpoint, FileCheckpoint
from skvq.engine.config import SamplingConfig
from skvq.engine.decode import decode_step_of
from skvq.engine.errors import OptionError
from skvq.engine.grammar import Grammars
from skvq.engine.guard import computes
from skvq.engine.interrupts import uninterrupted
from skvq.engine.loading import EngineParts
from skvq.engine.options import is_number, is_whole, names_options, path_of, path_or_none, require_type
from skvq.engine.pieces import Pieces, finished
from skvq.engine.prefix import PagePrefixes, Prefixes
from skvq.engine.prompt import ChatIds, Ids, Prompt, is_chat, is_empty, token_ids_of, whole_ids
from skvq.engine.report import Reporter
from skvq.engine.session import fill_from, open_session
from skvq.engine.sizes import bits_per_element
from skvq.engine.stress import fill_fast
from skvq.engine.summary import Summary, summary_of
from skvq.engine.timing import Timing
from skvq.loaders.files import require_writable


class TokenEngine:
    """A model, its arena and its tokenizer, and sequences in them. ``Engine`` is one that answers."""

    def __init__(self, parts: EngineParts, report: Reporter, *, prefix_cache: bool = True) -> None:
        self.parts, self.report = parts, report
        self.timing = Timing()
        """Of the last call that read or wrote text."""
        self.grammars = Grammars(parts.tokenizer, parts.model.config.vocab_size)
        self.step = decode_step_of(parts.model, parts.rope, parts.setup, graph=parts.options.cuda_graph)
        self.prefix_cache = prefix_cache
        self.prefixes: Prefixes = PagePrefixes(parts.setup) if prefix_cache else Prefixes()

    def __repr__(self) -> str:
        setup, config = self.parts.setup, self.parts.model.config
        cache = f"{self.parts.cache.method} of {bits_per_element(self.parts.cache, config):.2f} bits"
        size = f"{config.num_parameters / 1e6:,.0f}M parameters, context {setup.max_context:,}"
        return f"<Engine: {size}, cache {cache}, {setup.backend.name} on {self.device}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise OptionError("an engine cannot be copied, pickled or sent to another process: load one there")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.parts.setup.device

    @property
    def lock(self) -> RLock:
        """Held while it computes."""
        return self.parts.setup.lock

    # --- prompts ---------------------------------------------------------------------------------------------------------

    @names_options()
    def encode(self, text: Prompt, *, bos: bool = True) -> list[int]:
        """Token ids of a text, or of chat messages; ids are passed through. Special tokens are recognized in a text.

        bos: whether a text or a conversation begins here. Without, a text has no BOS, and messages first end the assistant's
            turn before them.

        Raises OptionError if there are none or one is unknown.
        """
        require_type("bos", bos, bool)
        ids = token_ids_of(text, self.parts.tokenizer, bos=bos)
        if not ids:
            raise OptionError("the prompt is empty: give at least one token")
        self._require_known(ids)
        return ids

    def encode_after(self, text: Prompt, sequence: SequenceCache | None) -> list[int]:
        """``encode`` of what continues a sequence, or of a prompt without one: see ``stream``."""
        if sequence is None:
            return self.encode(text)
        self._require_own(sequence)
        begun, pending = bool(sequence.length or sequence.pending), sequence.pending
        ids = [] if begun and is_empty(text) else self.encode(text, bos=not begun)
        if not is_chat(text) or not pending:
            return ids
        blank = next((n for n, token in enumerate(ids) if not self.parts.tokenizer.token_bytes(token).isspace()), 0)
        if ids[blank : blank + len(pending)] == pending:  # the end of the answer before, drawn already, after Llama 2's space
            return ChatIds(ids[blank + len(pending) :])
        return ids

    @names_options()
    def decode(self, ids: Ids) -> str:
        """Text of token ids, special tokens left out."""
        known = whole_ids(ids)
        if known:
            self._require_known(known)
        return self.parts.tokenizer.decode(known)

    def _require_known(self, ids: Sequence[int]) -> None:
        vocab = self.parts.model.config.vocab_size
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocab:
                raise OptionError(f"token id {token} is not one of the vocabulary's {vocab:,}, 0 to {vocab - 1:,}")

    def _require_own(self, sequence: SequenceCache) -> None:
        if not isinstance(sequence, SequenceCache):
            raise OptionError(f"sequence must come from prefill, new_sequence, fork or restore, got {type(sequence).__name__}")
        sequence.require_of(self.parts.setup)

    def sampling_of(self, config: SamplingConfig | None) -> SamplingConfig:
        """The options that a user gave, or the default ones. Raises OptionError if they do not go with this engine."""
        require_type("sampling", config, SamplingConfig, None)
        config = config if config is not None else SamplingConfig()
        if config.prompt_lookup and self.parts.setup.needs_mass:
            raise OptionError(
                "prompt_lookup cannot be combined with a filter rule that needs attention mass: guesses would add to it"
            )
        self.grammars.require(config)
        return config

    # --- sequences ---------------------------------------------------------------------------------------------------------

    @names_options()
    @computes
    @uninterrupted()
    def new_sequence(self) -> SequenceCache:
        """An empty sequence in the arena."""
        return SequenceCache(self.parts.setup)

    @names_options()
    def prefill(self, text: Prompt, *, checkpoint: str | Path | None = None, checkpoint_seconds: float = 60) -> SequenceCache:
        """A sequence that has read a text, token ids or chat messages: fork it, continue it with ``stream(..., sequence=...)``.

        It takes one of ``max_sequences`` until it is freed: by ``free()``, at the end of ``with engine.prefill(...) as s``, or
        when nothing refers to it any more.

        ``checkpoint`` as for ``read``.
        """
        sequence = self.new_sequence()
        try:
            self.read(sequence, self.encode(text), checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds)
        except BaseException:
            sequence.free()
            raise
        return sequence

    @names_options()
    @computes
    def fill(self, sequence: SequenceCache, count: int, *, seed: int = 0) -> None:
        """Append what is pending and ``count`` random tokens, without running the model on these: a full cache to measure."""
        self._require_own(sequence)
        if not is_whole(count) or count < 0 or not is_whole(seed):
            raise OptionError(
                f"count and seed must be whole numbers, the first of tokens, got {str(count)[:40]} and {str(seed)[:40]}"
            )
        if sequence.pending:
            self.read(sequence, [])
        fill_fast(sequence, count, seed=seed, vocab=self.parts.model.config.vocab_size, report=self.report)

    @names_options()
    @computes
    def restore(self, file: str | Path) -> SequenceCache:
        """The sequence that ``SequenceCache.save`` wrote, of this process or another. Fork it to ask several questions.

        Raises SessionError if the file is broken or of another model, calibration or options, CapacityError if it does not
        fit; other sequences are as they were.
        """
        found = open_session(self.parts.setup.identity, path_of("file", file))
        sequence = self.new_sequence()
        try:
            fill_from(sequence, found)
            if sequence.length or sequence.pending:
                self._require_known([*sequence.token_ids, *sequence.pending])
        except BaseException:
            sequence.free()
            raise
        return sequence

    @names_options()
    @computes
    def read(
        self,
        sequence: SequenceCache,
        ids: Ids,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_seconds: float = 60,
    ) -> Tensor:
        """Append what is pending and ``ids`` to a sequence; logits float32 [V] of the last.

        An empty sequence is read as ``prefill`` says, any other by streaming, or a few tokens as decode steps. With a reused
        prefix the rest is read as of a sequence that holds it; broken off, the sequence is empty again and what was read is
        found by the next try. With ``checkpoint`` no prefix is reused: the work is written to that file every so many seconds
        and on Ctrl-C, taken up from it if it exists, and the file is removed when all is read.
        """
        return finished(self.reading(sequence, ids, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds))

    def reading(
        self,
        sequence: SequenceCache,
        ids: Ids,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_seconds: float = 60,
    ) -> Pieces[Tensor]:
        """``read`` in pieces, each to be done while the engine computes (``guard.computing``): other sequences may be decoded
        between them.
        """
        self._require_own(sequence)
        file = path_or_none("checkpoint", checkpoint)
        if not is_number(checkpoint_seconds) or not checkpoint_seconds >= 0:
            raise OptionError(f"checkpoint_seconds must be a number of seconds, 0 or more, got {checkpoint_seconds!r}")
        asked, ids = isinstance(ids, ChatIds), [*sequence.pending, *whole_ids(ids)]
        if not ids:
            raise OptionError("nothing to read: give at least one token")
        self._require_known(ids)
        if file is not None:
            require_writable(file)
        kept = Checkpoint() if file is None else FileCheckpoint(file, checkpoint_seconds, self.report)
        read = partial(reading.read, self.parts, self.prefixes, sequence, ids, kept, self.report)
        logits, timing = yield from self._in_memory(read, sequence)
        self.timing = sequence.timing = timing
        sequence.asked = asked
        return logits.clone()  # the sequence keeps its own

    def _in_memory(
        self, read: Callable[[], Pieces[tuple[Tensor, Timing]]], sequence: SequenceCache
    ) -> Pieces[tuple[Tensor, Timing]]:
        """Read. Where memory is short for it, that of the steps' graphs may be what is missing."""
        before = sequence.total_tokens, list(sequence.pending)
        try:
            return (yield from read())
        except torch.OutOfMemoryError:
            if before != (sequence.total_tokens, sequence.pending) or not self.step.give_up_graphs():
                raise
        return (yield from read())  # only now is gone what the first try held

    @names_options()
    @computes
    def decode_step(self, sequences: Sequence[SequenceCache], tokens: Ids) -> Tensor:
        """One more token of each sequence: logits float32 [B, V] of what follows.

        Raises OptionError for an unknown token, and for another one than an answer has left pending.
        """
        if not isinstance(sequences, Sequence):
            raise OptionError(f"a decode step takes a list of sequences, got {type(sequences).__name__}")
        tokens = whole_ids(tokens)
        for sequence in sequences:
            self._require_own(sequence)
        if len({id(s) for s in sequences}) != len(sequences):
            raise OptionError("a decode step takes one token of each sequence, and a sequence was given twice")
        if not sequences or len(tokens) != len(sequences):
            raise OptionError(f"a decode step takes a token for each of some sequences, got {len(tokens)} for {len(sequences)}")
        self._require_known(tokens)
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence.pending and sequence.pending != [token]:
                raise OptionError(f"token {sequence.pending[0]} of the last answer is pending: decode it before {token}")
        return self.step.run(sequences, tokens)

    @names_options()
    def summary(self, sequence: SequenceCache) -> Summary:
        """What a sequence and the last generation that used it came to."""
        self._require_own(sequence)
        return summary_of(self.parts, sequence)
