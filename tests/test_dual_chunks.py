"""Dual chunk attention against its definition, in every mode; and what cannot be had together with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attending import CACHES, SAME, SINKS, Engines, apart, decode, defined, exact, scored, stream, trace
from loader_fixtures import tiny_config
from tiny import random_ids, stepped_nll, tiny_cache, tiny_engine, tiny_folder

from skvq.engine.calibrating import make_artifact
from skvq.engine.calibration import header_for
from skvq.engine.dual_chunk_method import ChunkedMethod
from skvq.engine.dual_chunks import Chunks, TrueDistances
from skvq.engine.errors import ModelError, OptionError, SessionError
from skvq.engine.filters import HeavyHitters
from skvq.engine.generate import Engine
from skvq.engine.model_config import ChunkConfig, RopeConfig
from skvq.engine.plan_report import plan_report
from skvq.engine.report import Quiet
from skvq.engine.rope import model_rope
from skvq.engine.rope_scaling import scaled
from skvq.kernels.interface import RopeFrequencies
from skvq.kernels.ops import apply_rope, rope_turns

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, REACH = 1280, 1500
CHUNKS = ChunkConfig(length=LENGTH, reach=REACH)


class ChunkedEngines(Engines):
    """One layer each, with room for four chunks."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, chunks=CHUNKS)
        self.options = options

    def __missing__(self, name: str) -> Engine:
        self[name] = tiny_engine(self.folder, tiny_cache(**CACHES[name]), max_context=4500, **self.options)
        return self[name]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChunkedEngines]:
    return {name: ChunkedEngines(tmp_path_factory.mktemp(name), backend=name) for name in ("reference", "numba")}


def sinks_of(engine: Engine) -> int:
    return 0 if engine.parts.cache.method == "fp" else SINKS


def same(engine: Engine) -> float:
    """Of outputs of order one. The kernels for CPUs round queries to 16 bits."""
    return 2e-3 if engine.parts.loaded.backend.name == "numba" else 2 * SAME


@pytest.mark.parametrize(
    "start, first, count", [(0, 0, 700), (0, 1200, 1400), (0, 3000, 1000), (1100, 1300, 20), (2000, 3900, 60)]
)
def test_attention_is_what_the_paper_says(start: int, first: int, count: int) -> None:
    """Every pair of a query and a token, one by one: they meet where the paper turns them to, and see nothing to come."""
    size, generator = 8, torch.Generator().manual_seed(0)
    frequencies = RopeFrequencies(inv_freq=torch.tensor([1.0, 0.3, 0.02, 0.001], dtype=torch.float64), scale=1.0)
    chunks = Chunks(length=LENGTH, reach=REACH, gain_from=0, frequencies=frequencies)
    for stop in (first + count, first):  # with the queries' own tokens, and without
        if stop <= start:
            continue
        q = torch.randn(count, 4, size, generator=generator)
        k, v = torch.randn(2, 2, stop - start, size, generator=generator)
        t, s = torch.arange(first, first + count), torch.arange(start, stop)

        def turn(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return apply_rope(x.double(), *(part.double() for part in rope_turns(frequencies, places)))

        keys = turn(k.transpose(0, 1), s % LENGTH)
        score = torch.full((4, count, stop - start), -torch.inf, dtype=torch.float64)
        for behind, places in (
            (0, t % LENGTH),
            (1, (t % LENGTH + LENGTH).clamp_max(REACH)),
            (2, torch.full_like(t, REACH)),
            (3, torch.full_like(t, REACH)),
        ):
            met = (t[:, None] // LENGTH - s // LENGTH == behind) & (s <= t[:, None])
            dots = torch.einsum("nhd,thd->hnt", turn(q, places), keys.repeat_interleave(2, 1)) / size**0.5
            score = torch.where(met, dots, score)
        wanted = torch.einsum("hnt,thd->nhd", score.softmax(-1), v.transpose(0, 1).double().repeat_interleave(2, 1))
        near = apply_rope(q, *rope_turns(frequencies, chunks.places(t)))
        seen = apply_rope(k.transpose(0, 1), *rope_turns(frequencies, chunks.places(s))).transpose(0, 1)
        out, lse = chunks.attend(near, first, seen, v, start, 2**31 - 1)
        assert apart(out.double(), wanted) < 1e-5
        assert apart(lse.double(), score.logsumexp(-1).T) < 1e-4


@pytest.mark.parametrize(
    ("backend", "name", "count"),
    [
        ("reference", "rotate K2V2", LENGTH - 2),
        ("reference", "reorder K2V1.5", LENGTH + 150),
        *(("reference", name, 2 * LENGTH + 18) for name in ("rotate K1.5V4", "plain K2V2", "fp")),
        *(("numba", name, 2 * LENGTH + 18) for name in ("rotate K2V2", "reorder K2V1.5", "fp")),
    ],
)
def test_exact_prefill_and_decode(engines: dict[str, ChunkedEngines], backend: str, name: str, count: int) -> None:
    """Over the border of a chunk, with the window on both sides of it, and with packed tokens behind it."""
    engine = engines[backend][name]
    assert isinstance(engine.parts.setup.method, ChunkedMethod)
    text = trace(engine, count + 4)
    wanted = defined(engine, text, [count], sinks_of(engine))
    sequence = engine.new_sequence()
    assert apart(exact(engine, sequence, text[:count], chunk=999), wanted[:count]) <= same(engine)
    assert apart(decode(engine, [sequence], [text[count:]])[0], wanted[count:]) <= same(engine)
    sequence.free()


@pytest.mark.parametrize("name", ["rotate K1.5V4", "reorder K2V1.5", "fp"])
def test_streaming_and_scoring(engines: dict[str, ChunkedEngines], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    engine = engines["reference"][name]
    tile = engine.parts.setup.regions.tile
    monkeypatch.setattr("skvq.engine.layer_caches.SEGMENT_TOKENS", 4 * tile)
    parts = [1000, 500, 1, 1100, 7]
    text, sequence, start = trace(engine, sum(parts)), engine.new_sequence(), 0
    wanted = defined(engine, text, parts, sinks_of(engine))
    for count in parts:
        assert apart(stream(engine, sequence, text[start : start + count]), wanted[start : start + count]) <= same(engine)
        start += count
    sequence.free()
    assert apart(scored(engine, text), defined(engine, text, [], sinks_of(engine))) <= same(engine)


def test_sequences_in_different_chunks_are_decoded_together(engines: dict[str, ChunkedEngines]) -> None:
    engine = engines["numba"]["rotate K2V2"]
    counts = [40, LENGTH + 150, 2 * LENGTH + 140]
    texts = [trace(engine, count + 3, seed=count) for count in counts]
    sequences = [engine.new_sequence() for _ in counts]
    for sequence, text, count in zip(sequences, texts, counts, strict=True):
        exact(engine, sequence, text[:count])
    found = decode(engine, sequences, [text[count:] for text, count in zip(texts, counts, strict=True)])
    for out, text, count in zip(found, texts, counts, strict=True):
        assert apart(out, defined(engine, text, [count], SINKS)[count:]) <= same(engine)
    for sequence in sequences:
        sequence.free()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), chunks=replace(CHUNKS, gain_from=900), num_layers=2)


@pytest.mark.parametrize("cache", [{}, {"method": "reorder"}, {"method": "fp"}])
def test_a_whole_model_decodes_what_it_scores(folder: Path, tmp_path: Path, cache: dict[str, Any]) -> None:
    """As tapes of several lengths; then with a cut back over the border of a chunk, a fork and a session."""
    engine = tiny_engine(folder, tiny_cache(key_bits=8, value_bits=8, **cache), max_context=3000, backend="numba")
    ids = random_ids(1700)
    assert apart(engine.nll(ids), stepped_nll(engine, ids)) < 1e-2
    sequence = engine.prefill(ids)
    wanted = engine.decode_step([sequence.fork()], [5])
    sequence.save(tmp_path / "one.skvq")
    sequence.truncate(1250)
    engine.read(sequence, ids[1250:])
    assert apart(engine.decode_step([sequence], [5]), wanted) < 0.05
    assert torch.equal(engine.decode_step([engine.restore(tmp_path / "one.skvq")], [5]), wanted)


def test_within_the_reach_nothing_is_cut(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=REACH)
    assert isinstance(engine.parts.rope.distances, TrueDistances)
    assert not isinstance(engine.parts.setup.method, ChunkedMethod)


def test_queries_grow_from_where_the_model_was_trained_to(folder: Path) -> None:
    config = tiny_engine(folder, tiny_cache(), max_context=REACH).parts.model.config
    gain = model_rope(config, 4000, torch.device("cpu")).distances.gain(torch.tensor([0, 899, 1799, 8999]))
    assert gain is not None and apart(gain, torch.tensor([1.0, 1.0, 1.0693147, 1.2302585]).square()) < 1e-6


def test_a_session_of_other_chunks_is_refused(folder: Path, tmp_path: Path) -> None:
    long, short = (tiny_engine(folder, tiny_cache(), max_context=most) for most in (3000, REACH))
    with short.prefill(random_ids(200)) as sequence:
        sequence.save(tmp_path / "one.skvq")
    with pytest.raises(SessionError, match="RoPE"):
        long.restore(tmp_path / "one.skvq")


def test_what_cannot_be_had_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="on_full 'shift' cannot be used with dual chunk attention"):
        tiny_engine(folder, tiny_cache(), max_context=4500, on_full="shift")
    with pytest.raises(OptionError, match=r"HeavyHitters.*cannot be used with dual chunk attention"):
        tiny_engine(folder, tiny_cache(filters=(HeavyHitters(4),)), max_context=4500)
    tiny_engine(folder, tiny_cache(filters=(HeavyHitters(4),)), max_context=REACH)
    given = {"sequences": 1, "memory": None, "device": "cpu", "dtype": None, "prefill": "exact"}
    with pytest.raises(OptionError, match="cannot be used with dual chunk attention"):
        plan_report(str(folder), tiny_cache(filters=(HeavyHitters(4),)), context=4500, **given)  # type: ignore[arg-type]
    data = json.loads((folder / "config.json").read_text())
    data["dual_chunk_attention_config"]["local_size"] = REACH - 100
    tmp_path.joinpath("config.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match="chunks of 0 tokens with distances up to 1500: the first must be 1280"):
        tiny_engine(tmp_path, tiny_cache())


@pytest.mark.parametrize(
    ("text", "chunks", "good"),
    [
        ("chunks:4", ChunkConfig(length=6400, reach=8192), 32768),
        ("chunks:2.5:4096", ChunkConfig(length=2560, reach=4096), 10240),
    ],
)
def test_any_model_can_be_cut(text: str, chunks: ChunkConfig, good: int) -> None:
    config = tiny_config(trained_context=8192)
    found = scaled(config, text)
    assert (found.chunks, found.trained_context, found.rope.kind) == (chunks, good, config.rope.kind)


def test_rope_that_grows_with_the_context_does_not_in_chunks() -> None:
    """No distance is longer than those it was trained for."""
    config = tiny_config(trained_context=8192, rope=RopeConfig(kind="dynamic", factor=4.0))
    cut = model_rope(scaled(config, "chunks:4"), 65536, torch.device("cpu"))
    assert torch.equal(cut.turned.inv_freq, model_rope(config, 8192, torch.device("cpu")).turned.inv_freq)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("chunks:4:1000", {"trained_context": 8192}, "needs a trained length of at least 1,600 tokens, not 1,000"),
        ("chunks:4", {"chunks": CHUNKS}, "has chunks for contexts above 1,500 tokens"),
        ("yarn:4", {"chunks": CHUNKS}, "has chunks for contexts above 1,500 tokens"),
        ("chunks:4", {"family": "mistral", "attention_spans": (64, 64), "trained_context": 8192}, "needs full attention"),
        ("chunks", {}, "lacks its factor"),
    ],
)
def test_wrong_cuts(text: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scaled(tiny_config(num_layers=2, **changes), text)


def test_a_calibration_knows_nothing_of_chunks(folder: Path) -> None:
    """Its texts may be longer than a chunk; what is kept for a model serves every context."""
    plain, cut = (tiny_engine(folder, tiny_cache(), max_context=most).parts.loaded for most in (REACH, 4500))
    ids = random_ids(2048)
    made = []
    for loaded in (plain, cut):
        header = header_for(tiny_cache().fitted(loaded.model.config), loaded, "ids", len(ids))
        made.append(make_artifact(loaded, tiny_cache().fitted(loaded.model.config), ids, header, Quiet()))
    assert made[0].header == made[1].header
    assert all(torch.equal(tensor, made[1].tensors[name]) for name, tensor in made[0].tensors.items())


def test_marks_are_planned(folder: Path) -> None:
    engine = tiny_engine(folder, tiny_cache(), max_context=4500, max_sequences=3)
    setup, plan = engine.parts.setup, engine.parts.plan
    assert setup.arena.tensors["chunk_positions"].shape[0] == 3  # of four chunks
    assert setup.arena.nbytes == plan.parts["cache: packed pages"] + plan.parts["cache: window and retained"]
