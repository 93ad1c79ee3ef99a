"""Prefill checkpoints: killed, interrupted or left, a prefill goes on to the same bytes; another text or model is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_fixtures import refused
from tiny import Listener, arena_of, random_ids, rewritten, tiny_cache, tiny_engine, tiny_folder

from skvq.engine import checkpoint, session
from skvq.engine import prefill as prefill_module
from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import FileCheckpoint
from skvq.engine.container import read_header
from skvq.engine.errors import CapacityError, SessionError, SkvqError
from skvq.engine.filters import AttentionSinks, HeavyHitters
from skvq.engine.generate import Engine
from skvq.engine.report import Quiet

MASS = tiny_cache(filters=(AttentionSinks(3), HeavyHitters(threshold=2.0)))
SLOW = """
import sys, time
from pathlib import Path
from skvq.engine import prefill
from skvq.engine.model import Model
from test_checkpoint import MASS, reading
from tiny import *
folder, mode, delay = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
layer = Model.layer
def slow(self, *args):
    time.sleep(delay)
    return layer(self, *args)
Model.layer = slow
prefill.CHUNK_TOKENS = 100
engine = tiny_engine(folder, MASS, prefill=mode, max_context=3000)
print("loaded", flush=True)
sequence = reading(engine, folder / "ck", 0.0)
sequence.save(folder / "done")
"""


def reading(engine: Engine, path: Path | None, seconds: float, ids: list[int] | None = None) -> Any:
    """A sequence that has read 2,000 tokens, with a checkpoint."""
    return engine.prefill(random_ids(2000) if ids is None else ids, checkpoint=path, checkpoint_seconds=seconds)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_module, "CHUNK_TOKENS", 100)


def undisturbed(folder: Path, mode: str) -> bytes:
    """The session file of a prefill that nothing interrupted."""
    tiny_engine(folder, MASS, prefill=mode, max_context=3000).prefill(random_ids(2000)).save(folder / "whole")
    return (folder / "whole").read_bytes()


def started(folder: Path, mode: str, delay: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(folder), mode, str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, times: int, process: subprocess.Popen[str]) -> None:
    """Until the file has been written that many times by a process that is still alive."""
    seen: set[int] = set()
    end = time.monotonic() + 120
    while len(seen) < times:
        assert time.monotonic() < end, "no checkpoint was written"
        assert process.poll() is None, process.communicate()
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.005)


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_after_kill_9_it_goes_on_to_the_same_bytes(folder: Path, mode: str) -> None:
    process = started(folder, mode, 0.05)
    wait_for(folder / "ck", 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "done").exists()
    assert (folder / "ck").exists()
    again = started(folder, mode, 0.0)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert (folder / "done").read_bytes() == undisturbed(folder, mode)
    assert not (folder / "ck").exists()


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_the_bar_of_what_is_resumed_says_that_it_is_the_rest(folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [Listener(), Listener()]
    for report in reports:
        engine = tiny_engine(folder, tiny_cache(), prefill=mode, max_context=3000, report=report)
        layer, calls = engine.parts.model.layer, []

        def broken(*args: Any, layer: Any = layer, calls: list[int] = calls, report: Listener = report) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 27 and report is reports[0]:
                os.kill(os.getpid(), signal.SIGINT)
            return layer(*args)

        monkeypatch.setattr(engine.parts.model, "layer", broken)
        with suppress(KeyboardInterrupt):
            reading(engine, folder / "ck", 60)
    assert reports[0].bars[-1] == "reading 2,000 tokens" and reports[1].bars[-1] == "reading the rest of 2,000 tokens"


def test_ctrl_c_writes_it_and_the_next_run_goes_on(folder: Path) -> None:
    engine = tiny_engine(folder, MASS, max_context=3000)
    layer, calls = engine.parts.model.layer, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(args[0])
        if len(calls) == 27:
            os.kill(os.getpid(), signal.SIGINT)
        return layer(*args)

    engine.parts.model.layer = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        reading(engine, folder / "ck", 60)
    assert len(calls) == 27
    engine.parts.setup.arena.check({})
    spent = read_header(folder / "ck", "checkpoint")["seconds"]
    fresh = tiny_engine(folder, MASS, max_context=3000)
    count = _counted(fresh)
    start = time.perf_counter()
    sequence = reading(fresh, folder / "ck", 60)
    assert count == [40 - 27]
    taken = sequence.timing.prefill_seconds
    assert 0 < spent < taken < spent + time.perf_counter() - start, "the time of both runs for the tokens of both"
    sequence.save(folder / "done")
    assert (folder / "done").read_bytes() == undisturbed(folder, "exact")


@pytest.mark.parametrize("stop", [1, 20, 21, 40])
def test_exact_goes_on_from_any_chunk(folder: Path, stop: int) -> None:
    _broken_off(folder, "exact", stop)
    engine = tiny_engine(folder, MASS, max_context=3000)
    count = _counted(engine)
    reading(engine, folder / "ck", 60).save(folder / "done")
    assert count == [40 - stop]
    assert (folder / "done").read_bytes() == undisturbed(folder, "exact")


def test_streaming_goes_on_from_a_continued_sequence(folder: Path) -> None:
    def half(engine: Engine) -> Any:
        sequence = engine.prefill(random_ids(450))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.parts.model, "layer", _failing(engine, 8))
            with pytest.raises(RuntimeError):
                engine.read(sequence, random_ids(900, seed=5), checkpoint=folder / "ck", checkpoint_seconds=0)
        sequence.free()

    half(tiny_engine(folder, MASS, max_context=3000))
    engine = tiny_engine(folder, MASS, max_context=3000)
    sequence, plain = engine.prefill(random_ids(450)), engine.prefill(random_ids(450))
    engine.read(plain, random_ids(900, seed=5))
    engine.read(sequence, random_ids(900, seed=5), checkpoint=folder / "ck")
    engine.parts.setup.arena.check(arena_of(sequence, plain))
    for which, name in ((sequence, "a"), (plain, "b")):
        which.save(folder / name)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


@pytest.mark.parametrize("held", [200, 450, 1300])
def test_streaming_goes_on_from_a_shorter_or_longer_beginning(folder: Path, held: int) -> None:
    """Of the same text, whatever the chunks of the file were; a file that is behind the sequence is of no use."""
    text = [*random_ids(450), *random_ids(900, seed=5)]
    engine = tiny_engine(folder, tiny_cache(method="fp"), max_context=3000)
    sequence, plain = engine.prefill(text[:450]), engine.prefill(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.model, "layer", _failing(engine, 8))
        with pytest.raises(RuntimeError):
            engine.read(sequence, text[450:], checkpoint=folder / "ck", checkpoint_seconds=0)
    sequence.free()
    with engine.prefill(text[:held]) as other:
        found = engine.read(other, text[held:], checkpoint=folder / "ck")
        assert other.token_ids == text and not (folder / "ck").exists()
        assert torch.allclose(found, plain.logits, atol=1e-3)  # type: ignore[arg-type]
    plain.free()


def test_a_checkpoint_that_does_not_fit_leaves_the_sequence(folder: Path) -> None:
    engine = tiny_engine(folder, MASS, max_context=3000, max_sequences=2, prefill="streaming")
    text, file = random_ids(2900), folder / "ck"
    with engine.prefill(text[:300]) as sequence, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.model, "layer", _failing(engine, 26))
        with pytest.raises(RuntimeError):
            engine.read(sequence, text[300:], checkpoint=file, checkpoint_seconds=0)
    with engine.prefill(text[:300]) as sequence, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.setup.arena, "require_pages", _none_left)
        logits = sequence.logits
        refused(lambda: engine.read(sequence, text[300:], checkpoint=file), "no pages for 1")
        assert sequence.length == 300 and sequence.logits is logits and file.exists()


@pytest.mark.parametrize(("name", "value"), [("layer", -1), ("layer", "x"), ("layer", 2), ("group", -1), ("chunk", None)])
def test_a_place_that_is_none_is_refused(folder: Path, name: str, value: object) -> None:
    """In a file whose checksum is right."""
    engine = tiny_engine(folder, tiny_cache(), max_context=3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.model, "layer", _failing(engine, 8))
        with pytest.raises(RuntimeError):
            reading(engine, folder / "ck", 0.0)
    rewritten(folder / "ck", folder / "changed", "checkpoint", {name: value})
    refused(lambda: reading(engine, folder / "changed", 0.0), f"damaged: its {name}")
    rewritten(folder / "ck", folder / "changed", "checkpoint", {"seconds": []})
    assert reading(engine, folder / "changed", 0.0).length == 2000


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_checkpoint_that_is_half_copied_is_no_sequence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Ctrl-C comes after the copy, of which all is there; any other error leaves nothing that claims to be a text."""
    engine = tiny_engine(folder, MASS, max_context=3000, prefill="streaming")
    with engine.prefill(random_ids(450)) as sequence, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.model, "layer", _failing(engine, 8))
        with pytest.raises(RuntimeError):
            engine.read(sequence, random_ids(900, seed=5), checkpoint=folder / "ck", checkpoint_seconds=0)
        wanted = engine.restore(_session_of(sequence, folder / "s"))
    write = session.write_tiles

    def broken(*args: Any) -> None:
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            return write(*args)
        raise error

    monkeypatch.setattr(session, "write_tiles", broken)
    with engine.prefill(random_ids(450)) as sequence:
        with pytest.raises(error):
            engine.read(sequence, random_ids(900, seed=5), checkpoint=folder / "ck")
        if error is KeyboardInterrupt:
            assert _session_of(sequence, folder / "a").read_bytes() == _session_of(wanted, folder / "b").read_bytes()
        else:
            assert sequence.length == sequence.packed == 0 and not sequence.pages
            engine.read(sequence, random_ids(20))
    wanted.free()
    engine.parts.setup.arena.check({})


def test_a_checkpoint_knows_what_was_dropped_before_its_text(folder: Path) -> None:
    """The same tokens held, of a text that has shifted and of one that has not: places in the file are of another text."""
    engine = tiny_engine(folder, tiny_cache(), max_context=2700, on_full="shift", prefill="streaming")
    with engine.prefill(random_ids(3500)) as sequence, pytest.MonkeyPatch.context() as patch:
        held = list(sequence.token_ids)
        assert sequence.dropped
        patch.setattr(engine.parts.model, "layer", _failing(engine, 9))
        with pytest.raises(RuntimeError):
            engine.read(sequence, random_ids(900, seed=1), checkpoint=folder / "ck", checkpoint_seconds=0)
    with engine.prefill(held) as other:
        refused(lambda: engine.read(other, random_ids(900, seed=1), checkpoint=folder / "ck"), "of another text")


def test_reading_goes_on_where_the_disk_is_full_or_the_file_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Listener()
    engine = tiny_engine(folder, MASS, max_context=3000)
    engine.report = report

    def full(*args: object) -> None:
        raise SkvqError("cannot write ck: no room")

    monkeypatch.setattr("skvq.engine.checkpoint.write_container", full)
    with reading(engine, folder / "ck", 0) as sequence:
        assert sequence.length == 2000 and "cannot write ck: no room; reading goes on" in report.messages
    monkeypatch.undo()
    unlink = Path.unlink

    def kept(path: Path, *args: Any, **options: Any) -> None:
        if path.name == "ck":
            raise PermissionError(1, "not permitted")
        unlink(path, *args, **options)

    monkeypatch.setattr(Path, "unlink", kept)
    with reading(engine, folder / "ck", 60):
        assert "cannot be removed: not permitted" in report.messages[-1]


def test_what_ignores_ctrl_c_goes_on_ignoring_it(folder: Path) -> None:
    """As what a script starts in the background does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with FileCheckpoint(folder / "ck", 60, Quiet()).watch():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [27, 40])
def test_the_hosts_own_handler_is_called_once_the_file_is_written(folder: Path, at: int) -> None:
    """Reading goes on if it only takes note, also after the last chunk of the last layer."""
    engine, got = tiny_engine(folder, MASS, max_context=3000), list[bool]()
    layer, calls = engine.parts.model.layer, list[int]()

    def asked(*args: Any) -> torch.Tensor:
        calls.append(args[0])
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return layer(*args)

    engine.parts.model.layer = asked  # type: ignore[method-assign]
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append((folder / "ck").exists()))
    try:
        with reading(engine, folder / "ck", 60) as sequence:
            assert sequence.length == 2000 and got == [True]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (folder / "ck").exists()


@pytest.mark.parametrize("full", [False, True])
def test_every_signal_is_answered(folder: Path, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that come before the file can be written the second does not take the place of the first; a full disk changes
    nothing about it."""
    engine, got, report = tiny_engine(folder, MASS, max_context=3000), list[int](), Listener()
    engine.report = report
    layer, calls = engine.parts.model.layer, list[int]()

    def asked(*args: Any) -> torch.Tensor:
        calls.append(args[0])
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        return layer(*args)

    def broken(*args: Any) -> None:
        raise SkvqError("the disk is full")

    engine.parts.model.layer = asked  # type: ignore[method-assign]
    if full:
        monkeypatch.setattr(checkpoint, "write_container", broken)
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            reading(engine, folder / "ck", 60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM] and len(calls) == 5
    assert (folder / "ck").exists() != full
    assert ("not saved" in report.messages[-1]) == full


@pytest.mark.parametrize("file", [None, "ck"])
def test_ctrl_c_at_the_very_end_of_an_exact_read_leaves_it_empty(
    folder: Path, file: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(folder, MASS, max_context=3000)
    commit = SequenceCache.commit

    def last(sequence: SequenceCache, ids: Any) -> None:
        commit(sequence, ids)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SequenceCache, "commit", last)
    with engine.new_sequence() as sequence:
        with pytest.raises(KeyboardInterrupt):
            engine.read(sequence, random_ids(300), checkpoint=None if file is None else folder / file)
        assert (sequence.length, sequence.packed, sequence.token_ids) == (0, 0, [])


def test_another_text_model_or_option_is_refused(folder: Path, tmp_path: Path) -> None:
    _broken_off(folder, "exact", 25)
    engine = tiny_engine(folder, MASS, max_context=3000)
    refused(lambda: reading(engine, folder / "ck", 60, random_ids(2000, seed=9)), "of another text", "delete the file")
    other = tiny_engine(folder, tiny_cache(), max_context=3000)
    refused(lambda: reading(other, folder / "ck", 60), "filter rules")
    other = tiny_engine(tiny_folder(tmp_path / "other", num_layers=3), MASS, max_context=3000)
    refused(lambda: reading(other, folder / "ck", 60), "model with fingerprint")
    streaming = tiny_engine(folder, MASS, max_context=3000, prefill="streaming")
    refused(lambda: reading(streaming, folder / "ck", 60), "'exact'", "'streaming'")
    engine.parts.setup.arena.check({})
    assert (folder / "ck").exists()


def test_a_session_is_no_checkpoint(folder: Path) -> None:
    engine = tiny_engine(folder, MASS, max_context=3000)
    engine.prefill(random_ids(300)).save(folder / "s")
    with pytest.raises(SessionError, match="no skvq checkpoint"):
        reading(engine, folder / "s", 60)


def _session_of(sequence: Any, path: Path) -> Path:
    sequence.save(path)
    return path


def _none_left(count: int) -> None:
    if count:
        raise CapacityError(f"no pages for {count}")


def _failing(engine: Engine, stop: int) -> Any:
    """The model's layer, which fails after ``stop`` calls."""
    layer, calls = engine.parts.model.layer, [0]

    def failing(*args: Any) -> torch.Tensor:
        if calls[0] == stop:
            raise RuntimeError("power cut")
        calls[0] += 1
        return layer(*args)

    return failing


def _broken_off(folder: Path, mode: str, stop: int) -> None:
    engine = tiny_engine(folder, MASS, max_context=3000, prefill=mode)
    engine.parts.model.layer = _failing(engine, stop)  # type: ignore[method-assign]
    if stop < 40:
        with pytest.raises(RuntimeError):
            reading(engine, folder / "ck", 0)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skvq.engine.checkpoint.FileCheckpoint.done", _power_cut)
        with pytest.raises(RuntimeError):
            reading(engine, folder / "ck", 0)


def _power_cut(self: object) -> None:
    raise RuntimeError("power cut")


def _counted(engine: Engine) -> list[int]:
    """How often the model's layer is called from now on."""
    layer, count = engine.parts.model.layer, [0]

    def counting(*args: Any) -> torch.Tensor:
        count[0] += 1
        return layer(*args)

    engine.parts.model.layer = counting  # type: ignore[method-assign]
    return count
