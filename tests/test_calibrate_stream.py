"""Calibration reads its corpus text by text: figures are those of all tokens at once, and memory does not grow with it."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.calibrate.hidden import HiddenStates
from skvq.calibrate.outliers import OutlierTokens
from skvq.calibrate.run import calibrate, recorded
from skvq.calibrate.stats import SAMPLE_TEXTS, SINKS, STRETCH, Recorder, sample_of
from skvq.engine.errors import CalibrationError
from skvq.engine.generate import Engine
from skvq.engine.model import Model
from skvq.engine.rope import StepRope, at_positions

TOKENS = 96


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tiny_folder(tmp_path_factory.mktemp("stream") / "model"), tiny_cache(method="fp"))


def texts_of_random_ids(count: int) -> Tensor:
    return torch.randint(320, (count, TOKENS), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 3, SAMPLE_TEXTS + 3])
def test_streamed_figures_are_those_of_all_tokens_at_once(engine: Engine, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means, covariances, extremes and typical ranges, in float64 to a thousandth of a thousandth; the sample as it was."""
    seen: list[tuple[Tensor, ...]] = []
    attend = Recorder.attend

    def watched(self: Recorder, q: Tensor, k: Tensor, v: Tensor, rope: StepRope) -> Tensor:
        seen.append((rope.apply(q)[0], k[0], v[0]))
        return attend(self, q, k, v, rope)

    monkeypatch.setattr(Recorder, "attend", watched)
    texts, parts = texts_of_random_ids(count), engine.parts
    with torch.no_grad():
        stats = next(recorded(parts.model, parts.rope, texts, OutlierTokens(texts)))
    q, k, v = (torch.stack(t) for t in zip(*seen, strict=True))  # [S, T, heads, D]
    rope = at_positions(parts.rope, torch.arange(TOKENS)[None])
    for side, x, turned in ((stats.keys, k, rope), (stats.values, v, None)):
        mean = x[:, SINKS:].double().flatten(0, 1).mean(0)
        left = x.double() - mean
        left = left if turned is None else turned_in_double(left, turned)
        left = left[:, SINKS:].flatten(0, 1)
        torch.testing.assert_close(side.mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(side.covariance, torch.einsum("thi,thj->hij", left, left) / len(left), rtol=1e-5, atol=1e-6)
        assert torch.equal(side.top, x.abs().amax((0, 1)))
        stretches = x.reshape(-1, STRETCH, x.shape[2] * x.shape[3]).double()
        typical = torch.stack([stretches.amin(1).mean(0), stretches.amax(1).mean(0)], 1)
        torch.testing.assert_close(side.typical, typical, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stats.query_energy, q[:, SINKS:].double().square().mean((0, 1)), rtol=1e-9, atol=1e-9)
    assert torch.equal(stats.sample_keys, k[sample_of(count)]) and torch.equal(stats.sample_values, v[sample_of(count)])


def turned_in_double(x: Tensor, rope: StepRope) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], -1)


def held_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    tensors = (t for t in gc.get_objects() if type(t) is Tensor)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("method", ["rotate", "reorder"])
def test_memory_does_not_grow_with_the_corpus(engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that is held beside the ids, at any time when a layer is about to run: equal with 9 texts and with 18."""
    parts, layer = engine.parts, Model.layer
    peaks = []
    for count in (SAMPLE_TEXTS + 1, 2 * (SAMPLE_TEXTS + 1)):
        texts = texts_of_random_ids(count)
        texts[:, SINKS : SINKS + 64] = torch.arange(64)  # the same ids in both
        texts[:, SINKS + 64 :] = 7
        found = []

        def watched(self: Model, *arguments: object, found: list[int] = found) -> Tensor:
            found.append(held_bytes())
            return layer(self, *arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Model, "layer", watched)
            options = {"seed": 0, "progress": lambda work: None, "outliers": OutlierTokens(texts)}
            calibrate(parts.model, parts.rope, texts, tiny_cache(method=method), parts.loaded.backend, **options)
        assert len(found) == 2 * count
        peaks.append(max(found) - texts.nbytes)
    assert peaks[0] == peaks[1]


def test_hidden_states_come_back_from_their_file() -> None:
    with HiddenStates(3, 5, 7, torch.bfloat16, torch.device("cpu")) as hidden:
        given = torch.randn(3, 5, 7).to(torch.bfloat16)
        for text in (2, 0, 1):
            hidden[text] = given[text]
        hidden[1] = given[1] * 2
        assert torch.equal(hidden[0], given[0]) and torch.equal(hidden[2], given[2]) and torch.equal(hidden[1], given[1] * 2)


def test_no_room_for_hidden_states_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: open("/dev/full", "r+b", **options))  # noqa: SIM115
    told = pytest.raises(CalibrationError, match=r"420 bytes .*No space left.* TMPDIR")
    with HiddenStates(3, 5, 7, torch.float32, torch.device("cpu")) as hidden, told:
        hidden[0] = torch.zeros(5, 7)


MAKE = """
import sys, torch
from pathlib import Path
from tiny import tiny_cache, tiny_engine
torch.set_num_threads(int(sys.argv[2]))
cache = tiny_cache(**({"bits_budget": 2.7} if sys.argv[4] == "budget" else {"method": sys.argv[4]}))
engine = tiny_engine(Path(sys.argv[1]), tiny_cache(method="fp"), backend="numba")
corpus = "In the beginning there was a text of no great length. " * 200
engine.calibrate(cache, corpus, Path(sys.argv[3]), corpus_name="x", tokens=4096)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rotate", "reorder", "budget"])
def test_same_bytes_whatever_the_number_of_threads(method: str, tmp_path: Path) -> None:
    """In processes of their own, as the number of threads of a process is its environment's."""
    shape = {"hidden_size": 192, "intermediate_size": 384, "num_heads": 6, "num_kv_heads": 3, "head_size": 64}
    folder, found = tiny_folder(tmp_path / "model", **shape), set()
    for threads in ("1", "2", "3"):
        file = tmp_path / threads
        command = [sys.executable, "-c", MAKE, str(folder), threads, str(file), method]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads})
        found.add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(found) == 1
