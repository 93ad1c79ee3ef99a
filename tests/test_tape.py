"""Steps on tape: played again, a step is what it would have been, launch by launch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_ids, tiny_cache, tiny_engine, tiny_folder

from skvq.engine.config import CacheConfig
from skvq.engine.decode import EagerStep, GraphStep
from skvq.engine.errors import OptionError
from skvq.engine.generate import Engine
from skvq.kernels.numba_cpu import tape
from skvq.kernels.numba_cpu.launch import Team
from skvq.kernels.numba_cpu.ops import NumbaOps
from skvq.kernels.numba_cpu.tape import Launches, Tape
from skvq.kernels.numba_cpu.tapes import Tapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tape"))


class Counted(Tapes):
    def __init__(self) -> None:
        self.count = 0

    def capture(self, work: Any) -> Any:
        self.count += 1
        return super().capture(work)


@torch.no_grad()
def logits(engine: Engine, step: Any) -> torch.Tensor:
    """Of two sequences of different lengths over the edges of tiles, one of them forked and gone on with."""
    sequences = [engine.prefill(random_ids(40)), engine.prefill(random_ids(300, seed=1))]
    rows = []
    for i in range(140):
        if i == 70:
            fork = sequences[1].fork()
            sequences[1].free()
            sequences[1] = fork
        ids = random_ids(2, seed=100 + i)
        rows.append(step.run(sequences, ids))
    for sequence in sequences:
        sequence.free()
    return torch.stack(rows)


CACHES = {
    "rotate": tiny_cache(),
    "reorder": tiny_cache(method="reorder"),
    "plain": tiny_cache(method="plain", key_bits=4.0, value_bits=1.5),
    "fp": CacheConfig(method="fp"),
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_played_steps_are_eager_steps(folder: Path, cache: CacheConfig) -> None:
    engine = tiny_engine(folder, cache, max_context=600, backend="numba")
    of = engine.parts.model, engine.parts.rope, engine.parts.setup
    wanted, graphs = logits(engine, EagerStep(*of)), Counted()
    got = logits(engine, GraphStep(*of, graphs))
    assert torch.equal(got, wanted)
    assert graphs.count < 8  # when the longer has packed a tile, or shares its method with the other no more


def test_of_many_sequences_few_tapes_are_held(folder: Path) -> None:
    """Each has logits of its own: of 16 sequences 8 tapes are held beside the one that is played."""
    engine = tiny_engine(folder, CACHES["plain"], max_context=3000, max_sequences=16, total_tokens=48_000, backend="numba")
    assert isinstance(engine.step, GraphStep)
    sequences = [engine.new_sequence() for _ in range(16)]
    tile = engine.parts.setup.regions.tile
    for _ in range(12):
        for sequence in sequences:
            engine.fill(sequence, tile)
        engine.decode_step(sequences, [1] * 16)
    assert len(engine.step._held) == 9 and len(engine.step._held[0].captured.result) == 16
    engine.decode_step(sequences, [1] * 16)
    assert len(engine.step._held) == 9


def test_a_model_that_norms_queries_and_keys(tmp_path: Path) -> None:
    """Played steps are eager ones, and those are the specification's but for rounding."""
    shape = {"family": "qwen3", "num_layers": 2}
    found = []
    for backend, step in (("numba", GraphStep), ("numba", EagerStep), ("reference", EagerStep)):
        engine = tiny_engine(tiny_folder(tmp_path, qk_norm=True, **shape), CACHES["plain"], max_context=600, backend=backend)
        of = engine.parts.model, engine.parts.rope, engine.parts.setup
        found.append(logits(engine, GraphStep(*of, Tapes()) if step is GraphStep else EagerStep(*of)))
    played, eager, wanted = found
    assert torch.equal(played, eager)
    assert (eager - wanted).norm() < 0.01 * wanted.norm()


def test_without_openmp_launches_are_played_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(folder, CACHES["rotate"], max_context=600, backend="numba")
    of = engine.parts.model, engine.parts.rope, engine.parts.setup
    wanted = logits(engine, EagerStep(*of))
    monkeypatch.setattr(Team, "parallel_address", 0)
    monkeypatch.setattr(tape, "PLAY", None)
    assert torch.equal(logits(engine, GraphStep(*of, Tapes())), wanted)


def test_operations_are_played_on_what_tensors_hold() -> None:
    x, kept, ops = torch.tensor([[1.0, 2.0]]), torch.zeros(2), NumbaOps()
    with Tape() as recorded:
        found = ops.add(x * 2, x.view(1, 2)).flatten()
        kept[1:] = found[:1] + 1
    assert found.tolist() == [3.0, 6.0] and kept.tolist() == [0.0, 4.0]
    x.copy_(torch.tensor([[10.0, 20.0]]))
    kept.zero_()
    recorded.play()
    assert found.tolist() == [30.0, 60.0] and kept.tolist() == [0.0, 31.0]


def test_launches_that_follow_each_other_are_one_call() -> None:
    x, weight, ops = torch.ones(1, 64), torch.ones(64), NumbaOps()
    with Tape() as recorded:
        for _ in range(5):
            x = ops.rms_norm(ops.add(x, x), weight, 1e-5)
    [step] = recorded._steps
    assert isinstance(step, Launches) and len(step.launches) == 10


def test_what_the_host_reads_is_refused() -> None:
    with pytest.raises(RuntimeError, match="tells the host a number"), Tape():
        torch.ones(2).sum().item()
    with Tape():  # the one that failed is off
        torch.ones(2)


def test_unknown_tokens_are_refused(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=600)
    vocab = engine.parts.model.config.vocab_size
    sequence = engine.prefill([1, 2, 3])
    for call in (
        lambda: engine.read(sequence, [vocab]),
        lambda: engine.decode_step([sequence], [-1]),
    ):
        with pytest.raises(OptionError, match=f"is not one of the vocabulary's {vocab}"):
            call()
    assert sequence.length == 3


def test_a_tape_does_not_import_what_it_does_not_use() -> None:
    """``torch._dynamo`` takes longer to import than a small model to load; torch does it for a mode that does not say no."""
    code = (
        "import sys, torch; from skvq.kernels.numba_cpu.tape import Tape\n"
        "x = torch.zeros(3)\nwith Tape():\n    x.add_(1)\nassert x[0] == 1 and 'torch._dynamo' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
