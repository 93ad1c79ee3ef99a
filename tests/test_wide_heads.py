"""Heads widened with zeros for kernels that take no others: the same model, whatever its cache packs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import random_ids, tiny_cache, tiny_engine, tiny_folder

from skvq.engine.errors import CalibrationError
from skvq.engine.generate import Engine
from skvq.engine.model_config import RopeConfig
from skvq.engine.plan_report import plan_report
from skvq.engine.rope import narrowed, widened
from skvq.kernels.numba_cpu import NumbaCpu
from skvq.kernels.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")
LONGROPE = RopeConfig(
    kind="longrope",
    original_context=256,
    factor=8.0,
    short_factor=(1.0,) * 24,
    long_factor=tuple(1 + 0.2 * i for i in range(24)),
)
PARTIAL = replace(LONGROPE, short_factor=LONGROPE.short_factor[:18], long_factor=LONGROPE.long_factor[:18])
MODELS = {
    "llama": {},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "longrope": {"rope": LONGROPE},
    "turned in part": {"family": "phi3", "rotary_size": 36, "rope": PARTIAL},
    "growing": {"family": "ministral3", "rope": RopeConfig(original_context=64, query_beta=0.5)},
}


def engine_of(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int, method: str, **options: object) -> Engine:
    """With heads of ``size``, by any backend: as a GPU's has it."""
    for backend in (Reference, NumbaCpu):
        monkeypatch.setattr(backend, "head_size_for", lambda self, own: size)
    return tiny_engine(folder, tiny_cache(method=method), max_context=700, cuda_graph=False, **options)


def test_zeros_lie_behind_each_half() -> None:
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    wide = widened(x, 64)
    assert torch.equal(narrowed(wide, 48), x) and not wide[..., 24:32].any() and not wide[..., 56:].any()
    assert torch.equal(wide[..., 32:56], x[..., 24:])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_wide_model_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, backend: str) -> None:
    """In 16 bits what is cached is the same: prefill, decode steps and full precision agree."""
    folder, ids, found = tiny_folder(tmp_path, num_layers=2, head_size=48, **MODELS[kind]), random_ids(300), []
    for size in (48, 64):
        engine = engine_of(folder, monkeypatch, size, "fp", backend=backend)
        assert engine.parts.setup.arena.shape.head_size == size and engine.parts.model.config.own_head_size == 48
        with engine.prefill(ids[:250]) as sequence:
            steps = torch.stack([engine.decode_step([sequence], [token])[0] for token in ids[250:]])
        found.append((engine.logits(ids), steps))
    (dense, steps), (wide_dense, wide_steps) = found
    assert float((dense - wide_dense).abs().max()) < 1e-4 * float(dense.abs().max())
    assert float((steps - wide_steps).abs().max()) < 1e-2 * float(steps.abs().max())


@pytest.mark.parametrize("method", ["plain", "rotate", "reorder"])
def test_what_wide_heads_pack_is_as_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Calibrated, packed and read back; the sums over heads of a calibration are those of heads that are there."""
    folder, ids, error = tiny_folder(tmp_path, num_layers=2, head_size=32), random_ids(400), []
    for size in (32, 64):
        engine = engine_of(folder, monkeypatch, size, method, backend="numba")
        with engine.prefill(ids[:300]) as sequence:
            steps = torch.stack([engine.decode_step([sequence], [token])[0] for token in ids[300:]]).log_softmax(-1)
            assert sequence.packed >= 256
            assert sequence.bits_per_element > 2 * size / 32
        dense = engine.logits(ids)[300:].log_softmax(-1)
        error.append(float((dense.exp() * (dense - steps)).sum(-1).mean()))
    assert 0 < error[1] < 1.2 * error[0]


def test_a_calibration_of_other_heads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model", num_layers=1, head_size=32)
    narrow = engine_of(folder, monkeypatch, 32, "rotate")
    narrow.calibrate(tiny_cache(), "abc " * 300, tmp_path / "c.st", corpus_name="x", tokens=300)
    with pytest.raises(CalibrationError, match=r"c\.st: .* has shape"):
        engine_of(folder, monkeypatch, 64, "rotate", calibration=tmp_path / "c.st")


def test_a_plan_counts_what_is_added(tmp_path: Path) -> None:
    """A cache of 128 channels where 96 are the model's, on a GPU only; weights are what they are."""
    folder = tiny_folder(tmp_path, num_layers=2, head_size=96)
    options = {"context": 20_000, "sequences": 1, "memory": None, "dtype": "float16", "prefill": "exact"}
    wide, narrow = (plan_report(str(folder), tiny_cache(), device=device, **options).plan for device in ("a100", "cpu"))
    assert wide.bits_per_element == pytest.approx(narrow.bits_per_element * 128 / 96), "of each number that is the model's own"
    cache = [next(count for part, count in plan.parts.items() if part.startswith("cache")) for plan in (wide, narrow)]
    assert cache[0] == pytest.approx(cache[1] * 128 / 96, rel=0.02)
    assert wide.parts["weights"] == narrow.parts["weights"]
