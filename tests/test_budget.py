"""Bits chosen by layer: measured, kept in the artifact, and the cache of many formats is one cache like any other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import arena_of, bytes_of, dense_nll, random_ids, stepped_nll, steps, tiny_cache, tiny_engine, tiny_folder

from skvq.engine import loading
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CalibrationError, OptionError, SessionError
from skvq.engine.generate import Engine
from skvq.engine.plan_report import plan_report
from skvq.loaders.artifact import load_artifact, save_artifact

CORPUS = "In the beginning there was a text, of no great length but long enough to be cut in pieces. " * 40
pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = 2.7  # with groups of 32 metadata take half a bit

MIXED = {
    "rotate": tiny_cache(layer_bits=((3, 1.5), (2, 4))),
    "rotate by head": tiny_cache(layer_bits=(((3, 1.5), (2, 4)), (2, 2))),
    "rotate without trits": tiny_cache(layer_bits=((8, 2), (3, 4))),
    "reorder": tiny_cache(method="reorder", layer_bits=((2, 2), (1.5, 3))),
    "plain": tiny_cache(method="plain", layer_bits=((4, 4), (2, 1.5))),
    "plain by head": tiny_cache(method="plain", layer_bits=((4, 4), ((2, 8), (3, 2)))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("budget") / "model")


@pytest.fixture(scope="module", params=list(MIXED))
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    """Two layers of different formats, set by hand."""
    return tiny_engine(folder, MIXED[request.param], max_context=1700)


def calibrated(folder: Path, output: Path, cache: CacheConfig) -> Path:
    tiny_engine(folder, tiny_cache(method="fp")).calibrate(cache, CORPUS, output, corpus_name="x", tokens=700)
    return output


@pytest.fixture(scope="module", params=["rotate", "reorder", "plain"])
def artifact(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts") / request.param
    return calibrated(folder, output, tiny_cache(method=request.param, bits_budget=BUDGET))


def test_a_budget_is_spent_and_the_artifact_says_how(artifact: Path, folder: Path, tmp_path: Path) -> None:
    header = load_artifact(artifact).header
    assert header.bits_budget == BUDGET and len(header.layer_bits) == 2
    cache = tiny_cache(method=artifact.name, bits_budget=BUDGET)
    engine = tiny_engine(folder, cache, calibration=artifact)
    assert engine.parts.cache.layer_bits == header.layer_bits
    assert engine.parts.plan.bits_per_element <= BUDGET
    again = calibrated(folder, tmp_path / "again", cache)
    assert again.read_bytes() == artifact.read_bytes()


def test_codecs_of_a_layer_are_fitted_at_its_own_bits(artifact: Path, folder: Path, tmp_path: Path) -> None:
    """The same as a calibration for those bits, set by hand."""
    chosen = load_artifact(artifact)
    by_hand = tiny_cache(method=artifact.name, layer_bits=chosen.header.layer_bits)
    wanted = load_artifact(calibrated(folder, tmp_path / "by hand", by_hand))
    assert wanted.header.layer_bits == chosen.header.layer_bits
    assert all(torch.equal(t, chosen.tensors[name]) for name, t in wanted.tensors.items())


def test_an_artifact_serves_its_own_budget_only(artifact: Path, folder: Path, tmp_path: Path) -> None:
    cache = tiny_cache(method=artifact.name, bits_budget=BUDGET)
    fixed = calibrated(folder, tmp_path / "fixed", tiny_cache(method=artifact.name))
    other = tiny_cache(method=artifact.name, layer_bits=((8, 8), (8, 8)))
    for options, path, words in (
        (replace(cache, bits_budget=3.0), artifact, ("bits_budget 2.7", "3.0")),
        (tiny_cache(method=artifact.name), artifact, ("bits_budget 2.7", "none")),
        (cache, fixed, ("bits_budget none", "2.7")),
        (other, fixed, ("layer_bits ()", "8.0")),
    ):
        with pytest.raises(CalibrationError) as error:
            tiny_engine(folder, options, calibration=path)
        assert all(word in str(error.value) for word in words), error.value


def test_without_an_artifact_one_is_made_and_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKVQ_CACHE", str(tmp_path))
    cache = tiny_cache(method="plain", bits_budget=BUDGET)
    first = tiny_engine(folder, cache)
    again = tiny_engine(folder, cache)
    tiny_engine(folder, replace(cache, bits_budget=3.0))
    tiny_engine(folder, replace(cache, window=48))  # what is packed is something else
    assert first.parts.setup.identity == again.parts.setup.identity
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def assert_planned_to_the_byte(engine: Engine) -> None:
    planned = sum(size for part, size in engine.parts.plan.parts.items() if part.startswith("cache"))
    assert engine.parts.setup.arena.nbytes == engine.parts.setup.arena.shape.nbytes == planned


def test_the_arena_is_what_the_plan_says_to_the_byte(engine: Engine) -> None:
    assert_planned_to_the_byte(engine)


def test_with_a_budget_too(artifact: Path, folder: Path) -> None:
    assert_planned_to_the_byte(tiny_engine(folder, tiny_cache(method=artifact.name, bits_budget=BUDGET), calibration=artifact))


def test_memory_is_measured_once(folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are there before calibration chooses the bits: less is free by then, and that is no reason to stop."""
    monkeypatch.setenv("SKVQ_CACHE", str(tmp_path))
    cache = tiny_cache(method=artifact.name, bits_budget=BUDGET)
    needed = tiny_engine(folder, replace(cache, bits_budget=2.8)).parts.plan.total
    free = iter([2 * needed])
    monkeypatch.setattr(loading, "available_memory", lambda device: next(free, 0))
    engine = tiny_engine(folder, cache)
    assert engine.parts.plan.fits and not engine.parts.cache.is_open


def test_another_cache_is_refused_what_loading_is_and_planned_alike(artifact: Path, folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(method="fp"))
    for load in (partial(tiny_engine, folder), engine.with_cache):
        with pytest.raises(OptionError, match=f"needs no calibration: leave {artifact}"):
            load(tiny_cache(method="fp"), calibration=artifact)
    cache = tiny_cache(method=artifact.name, bits_budget=BUDGET)
    other = engine.with_cache(cache, calibration=artifact, max_sequences=4)
    assert other.parts.setup.arena.shape == tiny_engine(folder, cache, calibration=artifact).parts.setup.arena.shape


def test_a_kept_calibration_with_bits_of_other_layers_is_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKVQ_CACHE", str(tmp_path))
    cache = tiny_cache(method="plain", bits_budget=BUDGET)
    tiny_engine(folder, cache)
    [path] = tmp_path.rglob("*.safetensors")
    kept = load_artifact(path)
    save_artifact(replace(kept, header=replace(kept.header, layer_bits=kept.header.layer_bits[:1])), path)
    tiny_engine(folder, cache)
    assert load_artifact(path).header == kept.header


def test_a_plan_is_a_bound_without_the_artifact_and_exact_with_it(artifact: Path, folder: Path) -> None:
    cache = tiny_cache(method=artifact.name, bits_budget=BUDGET)
    options = {"context": 1700, "sequences": 4, "memory": "80GiB", "device": "cpu", "dtype": "float32", "prefill": "exact"}
    bound = plan_report(str(folder), cache, **options)
    exact = plan_report(str(folder), cache, **options, calibration=artifact)
    assert bound.as_dict()["upper_bound"] and not exact.as_dict()["upper_bound"]
    assert "at most" in bound.table() and "upper bound" in bound.table() and "upper bound" not in exact.table()
    engine = tiny_engine(folder, cache, calibration=artifact)
    assert exact.as_dict()["arena"] == engine.parts.setup.arena.nbytes <= bound.as_dict()["arena"]


@pytest.mark.parametrize("count", [145, 330, 497])
def test_prefill_and_decode_equal_scoring_again(engine: Engine, count: int) -> None:
    ids = random_ids(count)
    found, wanted = engine.nll(ids), stepped_nll(engine, ids)
    dense = dense_nll(engine, ids)
    assert (found - wanted)[: 16 + 128].abs().max() <= 2e-4, "before anything is packed"
    assert (found - wanted).abs().mean() <= max(1e-4, float((found - dense).abs().mean()) / 100)


def test_fork_truncate_and_append_as_if_never_forked(engine: Engine) -> None:
    setup, ids = engine.parts.setup, random_ids(900)
    parent = engine.prefill(ids[:700])
    twin = parent.fork()
    kept = parent.packed
    steps(engine, [parent, twin], [ids[700:], random_ids(200, seed=1)])
    setup.arena.check(arena_of(parent, twin))
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(parent, kept), bytes_of(twin, kept), strict=True))
    tile = setup.regions.tile
    twin.truncate(3 * tile + 7)
    assert twin.packed == 3 * tile and twin.length == 3 * tile + 7
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(twin, 3 * tile), bytes_of(parent, 3 * tile), strict=True))
    parent.free(), twin.free()
    setup.arena.check({})


def test_save_and_restore(engine: Engine, folder: Path, tmp_path: Path) -> None:
    ids = random_ids(760)
    sequence = engine.prefill(ids[:700])
    sequence.save(tmp_path / "session")
    restored = engine.restore(tmp_path / "session")
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(restored, 640), bytes_of(sequence, 640), strict=True))
    assert restored.nbytes == sequence.nbytes
    a, b = (steps(engine, [s], [ids[700:]]) for s in (sequence, restored))
    assert torch.equal(a, b)
    swapped = replace(engine.parts.cache, layer_bits=engine.parts.cache.layer_bits[::-1])
    with pytest.raises(SessionError, match=r"bits by layer '1x K.*', this run has '1x K"):
        tiny_engine(folder, swapped).restore(tmp_path / "session")
    sequence.free(), restored.free()


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_an_interrupted_prefill_goes_on_from_its_checkpoint(
    folder: Path, tmp_path: Path, prefill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(folder, MIXED["rotate"], prefill=prefill)
    ids = random_ids(1500)
    whole = engine.prefill(ids)
    file = tmp_path / "checkpoint"
    layer = type(engine.parts.model).layer
    calls = []

    def dies(self: object, *arguments: object) -> object:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return layer(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.parts.model), "layer", dies)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(ids, checkpoint=file, checkpoint_seconds=0)
    assert file.exists()
    resumed = engine.prefill(ids, checkpoint=file, checkpoint_seconds=0)
    count = whole.packed
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(whole, count), bytes_of(resumed, count), strict=True))
    assert not file.exists()


def test_a_row_shows_what_is_stored(engine: Engine) -> None:
    row = engine.evaluate(CORPUS, [engine.parts.cache], tokens=300, stride=300)[0]
    arena = engine.parts.setup.arena
    elements = arena.shape.pages * 1280 * engine.parts.model.config.kv_elements_per_token
    assert row["bits_per_element"] == pytest.approx(8 * arena.shape.page_bytes * arena.shape.pages / elements)
    assert row["layer_bits"] == engine.parts.cache.layer_bits
    pairs = [pair for heads in engine.parts.cache.bits_of_heads(engine.parts.model.config) for pair in heads]
    assert row["key_bits"] == sum(k for k, _ in pairs) / len(pairs)
