"""The time to go that a progress bar shows after a tenth of a run is right within a fifth, though work grows quadratically."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from loader_fixtures import tiny_config
from tqdm import tqdm

from skvq.engine.prefill import chunk_work, chunks
from skvq.engine.report import StderrReporter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("tokens", [12_000, 1_000_000])
@pytest.mark.parametrize("layers_outside", [True, False])
@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_the_bar_is_right_after_a_tenth(
    monkeypatch: pytest.MonkeyPatch, tokens: int, layers_outside: bool, speed: float
) -> None:
    """Attention may run at half or twice the speed of the rest, exact and streaming. Time is what a fake clock says."""
    model: Any = SimpleNamespace(
        config=tiny_config(num_layers=8, hidden_size=512, intermediate_size=1536, num_heads=8, num_kv_heads=4, head_size=64)
    )
    clock, seen = Clock(), []
    monkeypatch.setattr("tqdm.std.time", clock)
    pieces = chunks(tokens)
    order = [p for _ in range(8) for p in pieces] if layers_outside else [p for p in pieces for _ in range(8)]
    linear = {p: (p[1] - p[0]) * chunk_work(model, 0, 1) for p in pieces}
    cost = {p: linear[p] + (chunk_work(model, *p) - linear[p]) / speed for p in pieces}
    whole = sum(cost[p] for p in order)
    update = tqdm.update

    def watched(bar: Any, n: float = 1) -> Any:
        found = update(bar, n)
        form = bar.format_dict
        seen.append((clock.now - 1000.0, form["elapsed"], (form["total"] - form["n"]) / (form["n"] / form["elapsed"])))
        return found

    monkeypatch.setattr(tqdm, "update", watched)
    with StderrReporter().bar("reading", sum(chunk_work(model, *p) for p in order)) as bar:
        for piece in order:
            clock.now += 100 * cost[piece] / whole
            bar.advance(chunk_work(model, *piece))
    at, elapsed, to_go = next(s for s in seen if s[0] >= 10)
    assert elapsed == pytest.approx(at, abs=0.5)
    if layers_outside or speed == 1.0:
        assert to_go == pytest.approx(100 - at, rel=0.2)
