"""A half-read prompt on disk: what a prefill needs to resume after Ctrl-C, a crash or kill -9, with bit-identical results.

Exact prefill is saved between two chunks of a layer: layers packed so far, hidden states of the whole prompt (those of this
layer's finished chunks already replaced), this layer's keys and values so far. Streaming prefill is the sequence itself.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skvq.engine.cache import SequenceCache
from skvq.engine.container import Container, Entry, open_container, whole, write_container
from skvq.engine.errors import SessionError, SkvqError
from skvq.engine.exact_state import ExactState
from skvq.engine.measure import wait_for
from skvq.engine.report import Reporter
from skvq.engine.session import (
    MOST_TOKENS,
    check_header,
    expect_slots,
    expect_tiles,
    fill_from,
    header_of,
    ids_entry,
    slot_entries,
    tile_entries,
    write_slots,
    write_tiles,
)

KIND = "checkpoint"
WRITING_SHARE = 10
"""A checkpoint is due at the earliest after this many times as long as the last one took to write."""


class Checkpoint:
    """What a prefill reports to its checkpoint; here nothing is kept, and an interrupt interrupts.

    ``ids`` are the tokens to read after those the sequence held at the start.
    """

    in_file = False
    spent = 0.0
    """Seconds that earlier runs took for what this one found."""

    def resume_exact(self, sequence: SequenceCache, ids: Sequence[int], state: ExactState) -> None:
        """Bring state and reserved sequence to where the file says; nothing if there is none."""

    def exact_point(self, sequence: SequenceCache, state: ExactState) -> None:
        """A chunk of a layer is done."""

    def resume_streaming(self, sequence: SequenceCache, ids: Sequence[int]) -> None:
        """Replace the sequence by the one in the file, if that is longer; some of ``ids`` are left to read."""

    def streaming_point(self, sequence: SequenceCache) -> None:
        """A chunk is committed."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around the work. With a file an interrupt waits for the next point, where the file is written first."""
        yield

    def done(self) -> None:
        """The prompt has been read: the file is no longer needed."""


class FileCheckpoint(Checkpoint):
    """A file written every ``seconds`` (0: at every point), and when the process is asked to end by SIGINT or SIGTERM.

    Raises SessionError if the file there is broken, or of another text, model, calibration or options.
    """

    in_file = True

    def __init__(self, path: Path, seconds: float, report: Reporter) -> None:
        self.path, self.seconds, self.report = path, seconds, report
        self._text = ""
        self._began = time.monotonic()
        self._due = self._began + seconds
        self._asked: list[Callable[[], object]] = []  # what signals do, once the file is written

    def resume_exact(self, sequence: SequenceCache, ids: Sequence[int], state: ExactState) -> None:
        self._text = _digest(ids)
        if not self.path.exists():
            return
        file = self._open(sequence, "exact")
        ours = {"chunk_tokens": state.chunk_tokens, "head_groups": max(1, len(state.attended))}
        theirs = {name: file.header.get(name) for name in ours}
        if theirs != ours:
            raise SessionError(
                f"checkpoint {self.path} was written with {theirs}, this run has {ours}: give it as much memory as "
                "then, or delete the file to start again"
            )
        state.layer = layer = file.number("layer", sequence.setup.arena.shape.layers - 1)
        state.group = file.number("group", max(1, len(state.attended)) - 1)
        state.chunk = file.number("chunk", -(-len(state.hidden) // state.chunk_tokens))
        filled = state.filled
        hidden = file.expect("hidden", state.hidden.dtype, state.hidden.shape)
        kv_shape = (state.keys.shape[0], filled, state.keys.shape[2])
        keys, values = (file.expect(name, state.keys.dtype, kv_shape) for name in ("layer_keys", "layer_values"))
        attended = file.expect("attended", state.attended.dtype, state.attended_rows.shape)
        mass = file.expect("layer_mass", torch.float32, state.mass.shape)
        tiles = expect_tiles(sequence, file, range(layer), sequence.packed_after(len(ids)))
        write_slots(sequence, expect_slots(sequence, file))
        write_tiles(sequence, tiles, range(layer))
        state.attended_rows.copy_(attended)
        state.hidden.copy_(hidden)
        state.keys[:, :filled], state.values[:, :filled] = keys.to(state.keys.device), values.to(state.keys.device)
        state.mass.copy_(mass)
        layers = sequence.setup.arena.shape.layers
        self.report.message(f"resuming from {self.path}: {layer} of {layers} layers and {filled:,} tokens of the next are done")

    def exact_point(self, sequence: SequenceCache, state: ExactState) -> None:
        if not self._is_due():
            return
        wait_for(state.keys.device)  # hidden states may be on their way to the host
        packed = sequence.packed_after(len(state.hidden))
        entries = [
            *tile_entries(sequence, range(state.layer), packed),
            *slot_entries(sequence),
            _by_head("layer_keys", state.keys, state.filled),
            _by_head("layer_values", state.values, state.filled),
            _by_rows("hidden", state.hidden, state.chunk_tokens),
            _by_rows("attended", state.attended_rows, state.chunk_tokens),
            whole("layer_mass", state.mass),
        ]
        header = {"layer": state.layer, "group": state.group, "chunk": state.chunk}
        header |= {"chunk_tokens": state.chunk_tokens, "head_groups": max(1, len(state.attended))}
        self._write(sequence, "exact", header, entries)

    def resume_streaming(self, sequence: SequenceCache, ids: Sequence[int]) -> None:
        whole_text = [*sequence.token_ids, *ids]
        self._text = _digest([sequence.dropped, *whole_text] if sequence.dropped else whole_text)
        if not self.path.exists():
            return
        file = self._open(sequence, "streaming")
        if file.number("length", MOST_TOKENS) + file.number("dropped", MOST_TOKENS) <= sequence.total_tokens:
            return
        fill_from(sequence, file)
        self.report.message(f"resuming from {self.path}: {sequence.length:,} of {len(whole_text):,} tokens have been read")

    def streaming_point(self, sequence: SequenceCache) -> None:
        if self._is_due():
            layers = range(sequence.setup.arena.shape.layers)
            entries = [*tile_entries(sequence, layers, sequence.packed), *slot_entries(sequence)]
            self._write(sequence, "streaming", {}, [*entries, ids_entry(sequence.token_ids)])

    @contextmanager
    def watch(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: handler
            for number in (signal.SIGINT, signal.SIGTERM)
            if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)  # not Python's, or to be ignored
        }

        def ask(number: int, frame: FrameType | None) -> None:
            handler = before[signal.Signals(number)]
            signal.signal(number, handler)  # a second one does not wait
            self._asked.append(partial(handler, number, frame) if callable(handler) else _interrupt)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._answer()  # too late for a point: the older file, if any, stays

    def done(self) -> None:
        try:
            self.path.resolve().unlink(missing_ok=True)
        except OSError as error:
            self.report.message(f"all has been read, but checkpoint {self.path} cannot be removed: {error.strerror}")

    def _is_due(self) -> bool:
        return bool(self._asked) or time.monotonic() >= self._due

    def _answer(self) -> None:
        """Do what signals asked for while they had to wait: what they did before the prefill began, or KeyboardInterrupt."""
        while self._asked:
            self._asked.pop(0)()

    def _open(self, sequence: SequenceCache, mode: str) -> Container:
        file = open_container(self.path, KIND)
        check_header(sequence.setup.identity, file, KIND)
        theirs = file.header.get("mode")
        other = "of another text" if theirs == mode else f"made with prefill {theirs!r}, this run has {mode!r}"
        if (theirs, file.header.get("text")) != (mode, self._text):
            raise SessionError(
                f"checkpoint {self.path} is {other}: resume with the same text and options, or delete the file to start again"
            )
        seconds = file.header.get("seconds")
        self.spent = seconds if isinstance(seconds, float) and seconds >= 0 else 0.0
        return file

    def _write(self, sequence: SequenceCache, mode: str, more: dict[str, Any], entries: Sequence[Entry]) -> None:
        start = time.monotonic()
        own = {"mode": mode, "text": self._text, "seconds": self.spent + start - self._began}
        saved = f"what has been read so far is saved in {self.path}: run the same command to resume"
        try:
            write_container(self.path, KIND, {**header_of(sequence), **own, **more}, entries)
        except SkvqError as error:  # a full disk is no reason to lose what has been read
            saved = f"{error}: what has been read so far is not saved"
            if not self._asked:
                self.report.message(f"{error}; reading goes on")
        end = time.monotonic()
        self._due = end + (max(self.seconds, WRITING_SHARE * (end - start)) if self.seconds else 0)
        if self._asked:
            self.report.message(saved)
            self._answer()


def _interrupt() -> None:
    raise KeyboardInterrupt


def _by_head(name: str, tensor: Tensor, tokens: int) -> Entry:
    """The first tokens of [KH, T, D], a head at a time."""
    heads, _, size = tensor.shape
    return Entry(name, tensor.dtype, (heads, tokens, size), lambda: (head[:tokens] for head in tensor))


def _by_rows(name: str, tensor: Tensor, count: int) -> Entry:
    """[T, d], ``count`` rows at a time."""
    starts = range(0, len(tensor), count)
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor[start : start + count] for start in starts))


def _digest(ids: Sequence[int]) -> str:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).hexdigest()
