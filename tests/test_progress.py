"""The time to go that a progress bar shows after a tenth of a run is right within a fifth: though work grows quadratically, and
though attention is faster or slower than its multiply-adds say. Time is what a fake clock says."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import time
from io import StringIO
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from loader_fixtures import tiny_config
from tqdm import tqdm

from skvq.engine.pace import Pace
from skvq.engine.prefill import NO_WORK, Work, chunk_work, chunks
from skvq.engine.report import StderrReporter
from skvq.kernels.notices import notice

LAYERS = 8
SHAPE = tiny_config(
    num_layers=LAYERS, hidden_size=512, intermediate_size=1536, num_heads=8, num_kv_heads=4, head_size=64, trained_context=2**20
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def parts_of(tokens: int, layers_outside: bool) -> list[Work]:
    """The parts of reading a prompt, exactly or by streaming."""
    pieces = [chunk_work(SHAPE, *piece) for piece in chunks(tokens)]
    return [p for _ in range(LAYERS) for p in pieces] if layers_outside else [p for p in pieces for _ in range(LAYERS)]


def times_of(parts: list[Work], slower: float, noise: float) -> list[float]:
    """When each part is done, of 100 seconds, if attention is so many times slower than the rest."""
    draw = np.random.default_rng(0)
    ends = list(accumulate(float(p @ (1.0, slower)) * draw.uniform(1 - noise, 1 + noise) for p in parts))
    return [100 * end / ends[-1] for end in ends]


@pytest.mark.parametrize("tokens", [12_000, 100_000, 1_000_000])
@pytest.mark.parametrize("layers_outside", [True, False])
@pytest.mark.parametrize("slower", [1 / 3, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("share, noise", [(0.1, 0.0), (0.25, 0.2)])
def test_the_time_to_go_is_right(tokens: int, layers_outside: bool, slower: float, share: float, noise: float) -> None:
    parts = parts_of(tokens, layers_outside)
    pace = Pace(sum(parts, NO_WORK))
    for part, now in zip(parts, times_of(parts, slower, noise), strict=True):
        pace.advance(part, now)
        if now >= 100 * share:
            break
    assert now / pace.share(now) - now == pytest.approx(100 - now, rel=0.2)


def test_the_bar_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(), []
    for name in ("tqdm.std.time", "skvq.engine.report.perf_counter"):
        monkeypatch.setattr(name, clock)
    parts = parts_of(100_000, False)
    update = tqdm.update

    def watched(bar: Any, n: float = 1) -> Any:
        found = update(bar, n)
        form = bar.format_dict
        seen.append((clock.now - 1000.0, form["elapsed"], (form["total"] - form["n"]) / (form["n"] / form["elapsed"])))
        return found

    monkeypatch.setattr(tqdm, "update", watched)
    with StderrReporter().bar("reading", *sum(parts, NO_WORK)) as bar:
        for part, now in zip(parts, times_of(parts, 3.0, 0.0), strict=True):
            clock.now = 1000 + now
            bar.advance(*part)
    at, elapsed, to_go = next(s for s in seen if s[0] >= 10)
    assert elapsed == pytest.approx(at, abs=0.5)
    assert to_go == pytest.approx(100 - at, rel=0.2)
    assert seen[-1][2] == pytest.approx(0, abs=1e-6)


def test_work_of_one_kind_is_as_long_as_it_is_large() -> None:
    pace = Pace([200.0])
    pace.advance([50.0], 3.0)
    assert pace.share(3.0) == pytest.approx(0.25)
    pace.advance([150.0], 4.0)
    assert pace.share(4.0) == 1.0


def test_before_anything_is_done_nothing_is() -> None:
    assert Pace([10.0, 20.0]).share(0.0) == 0.0


class Plain:
    """A stream of a program that has its stderr elsewhere: it can be written to, no more."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None: ...


class Gone(Plain):
    """One whose reader has gone."""

    def write(self, text: str) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("kind", ["none", "plain", "closed", "gone"])
def test_any_stderr_or_none(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    closed = StringIO()
    closed.close()
    stream = {"none": None, "plain": Plain(), "closed": closed, "gone": Gone()}[kind]
    monkeypatch.setattr("sys.stderr", stream)
    report = StderrReporter()
    report.message("one")
    with report.bar("work", 2.0) as bar:
        time.sleep(0.6)
        bar.advance(1.0)
    notice("two")
    assert not capsys.readouterr().out
    assert not isinstance(stream, Plain) or kind == "gone" or ("skvq: one" in stream.written and "skvq: two" in stream.written)


@pytest.mark.parametrize("columns", [24, 40, 200])
def test_a_bar_is_no_wider_than_its_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each drawing of it leaves a line behind."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        clock = Clock()
        patch.setattr("skvq.engine.report.perf_counter", clock)
        with StderrReporter().bar("reading 1,234,567 tokens", 10.0) as bar:
            for _ in range(4):
                clock.now += 1
                time.sleep(0.2)  # tqdm's own clock: it waits for half a second, then draws every tenth
                bar.advance(1.0)
    os.set_blocking(ours, False)
    drawn = re.sub(rb"\x1b\[[0-9;]*[A-Za-z]", b"", os.read(ours, 1 << 16)).decode()
    os.close(ours)
    lines = re.split(r"[\r\n]", drawn)
    assert any("reading 1,234" in line for line in lines) and max(map(len, lines)) <= columns
