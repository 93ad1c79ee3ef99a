"""Prefill, decode and scoring against their definition, at every boundary of sinks, window and tile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attending import CACHES, SAME, SINKS, WINDOW, Engines, apart, decode, defined, exact, scored, stream, trace
from simulated import simulated_nll
from tiny import dense_nll, random_ids, stepped_nll, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine.errors import CapacityError
from skvq.engine.generate import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ["fp", "plain K2V2", "reorder K2V1.5", "rotate K2V2"]
BOUNDARIES = [
    (windows, tiles, more)
    for windows, tiles, around in ((0, 0, SINKS), (1, 0, 0), (1, 1, 0), (1, 2, 0))
    for more in (around - 1, around, around + 1)
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("tiny"))


def sinks_of(engine: Engine) -> int:
    return 0 if engine.parts.cache.method == "fp" else SINKS


# --- one layer, the same numbers in every mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_decode_and_scoring_equal_their_definition(engines: Engines, name: str) -> None:
    engine = engines[name]
    text = trace(engine, WINDOW + 2 * engine.parts.setup.regions.tile + 37)
    wanted = defined(engine, text, [], sinks_of(engine))
    assert apart(scored(engine, text), wanted) <= SAME
    sequence = engine.new_sequence()
    assert apart(decode(engine, [sequence], [text])[0], wanted) <= SAME
    sequence.free()


def test_the_definition_depends_on_every_region(engines: Engines) -> None:
    """What the comparison above would miss: a sink too many, another method, a token seen from the wrong region."""
    engine = engines["rotate K2V2"]
    text = trace(engine, WINDOW + 2 * 128 + 37)
    found = scored(engine, text)
    for other in (
        defined(engine, text, [], SINKS + 1),
        defined(engines["plain K2V2"], text, [], SINKS),
        defined(engines["fp"], text, [], 0),
        defined(engine, text, [WINDOW + 128 + 1], SINKS),
    ):
        assert apart(found, other) > 1000 * SAME


@pytest.mark.parametrize("windows, tiles, more", BOUNDARIES)
@pytest.mark.parametrize("name", FEW)
def test_exact_prefill_then_decode_at_a_boundary(engines: Engines, name: str, windows: int, tiles: int, more: int) -> None:
    engine = engines[name]
    count = windows * WINDOW + tiles * engine.parts.setup.regions.tile + more
    text = trace(engine, count + 3)
    wanted = defined(engine, text, [count], sinks_of(engine))
    sequence = engine.new_sequence()
    assert apart(exact(engine, sequence, text[:count], chunk=59), wanted[:count]) <= SAME
    assert sequence.packed == engine.parts.setup.regions.packed(count)
    assert apart(decode(engine, [sequence], [text[count:]])[0], wanted[count:]) <= SAME
    sequence.free()


@pytest.mark.parametrize("segment", [8192, 320])
@pytest.mark.parametrize("name", [*FEW, "rotate K1.5V1.5"])
def test_streaming_in_odd_chunks_then_decode(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, name: str, segment: int
) -> None:
    tile = engines[name].parts.setup.regions.tile
    monkeypatch.setattr("skvq.engine.layer_caches.SEGMENT_TOKENS", segment // tile * tile)
    engine, chunks = engines[name], [1, WINDOW - 1, 2, 129, 160, 1, 353, 7]
    text = trace(engine, sum(chunks) + 2)
    wanted = defined(engine, text, chunks, sinks_of(engine))
    sequence, start = engine.new_sequence(), 0
    for count in chunks:
        assert apart(stream(engine, sequence, text[start : start + count]), wanted[start : start + count]) <= SAME
        start += count
    assert apart(decode(engine, [sequence], [text[start:]])[0], wanted[start:]) <= SAME
    sequence.free()


@pytest.mark.parametrize("span", [1, 21, 150])
@pytest.mark.parametrize("name", FEW)
def test_a_sliding_window_holds_in_every_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, span: int) -> None:
    engine = Engines(tmp_path, family="mistral", attention_spans=(span,))[name]
    tile, sinks = engine.parts.setup.regions.tile, sinks_of(engine)
    monkeypatch.setattr("skvq.engine.layer_caches.SEGMENT_TOKENS", tile)
    text, count = trace(engine, WINDOW + 2 * tile + 21), WINDOW + 2 * tile + 2
    assert apart(scored(engine, text), defined(engine, text, [], sinks)) <= SAME
    for chunks in ([count], [31, count - 131, 100]):
        wanted, sequence, start = defined(engine, text, chunks, sinks), engine.new_sequence(), 0
        for length in chunks:
            read = exact if len(chunks) == 1 else stream
            assert apart(read(engine, sequence, text[start : start + length]), wanted[start : start + length]) <= SAME
            start += length
        assert apart(decode(engine, [sequence], [text[start:]])[0], wanted[start:]) <= SAME
        sequence.free()


@pytest.mark.parametrize("name", ["fp", "rotate K2V2"])
def test_decode_over_a_page_boundary(engines: Engines, name: str) -> None:
    engine, count = engines[name], 1280 + WINDOW + 125
    text = trace(engine, count + 5)
    wanted = defined(engine, text, [count], sinks_of(engine))
    sequence = engine.new_sequence()
    exact(engine, sequence, text[:count])
    assert (sequence.packed, len(sequence.pages)) == (1280, 1)
    assert apart(decode(engine, [sequence], [text[count:]])[0], wanted[count:]) <= SAME
    assert (sequence.packed, len(sequence.pages)) == (1408, 2)
    sequence.free()


@pytest.mark.parametrize("window", [0, 1, 300])
def test_any_window(engines: Engines, window: int) -> None:
    engine = tiny_engine(engines.folder, tiny_cache(window=window))
    text = trace(engine, 301)
    wanted = defined(engine, text, [], SINKS)
    sequence = engine.new_sequence()
    assert apart(decode(engine, [sequence], [text])[0], wanted) <= SAME
    assert apart(scored(engine, text), wanted) <= SAME


@pytest.mark.parametrize("name", FEW)
def test_a_batch_equals_its_singles(engines: Engines, name: str) -> None:
    engine, lengths = engines[name], (1, WINDOW + 127, WINDOW + 160 + 131)
    texts = [trace(engine, n + 35, seed=n) for n in lengths]
    together = [engine.new_sequence() for _ in lengths]
    for sequence, text, n in zip(together, texts, lengths, strict=True):
        exact(engine, sequence, text[:n])
    rows = decode(engine, together, [text[n:] for text, n in zip(texts, lengths, strict=True)])
    for sequence in together:
        sequence.free()
    for row, text, n in zip(rows, texts, lengths, strict=True):
        single = engine.new_sequence()
        exact(engine, single, text[:n])
        assert apart(decode(engine, [single], [text[n:]])[0], row) <= SAME
        single.free()


def life(engine: Engine) -> list[Tensor]:
    """Outputs of everything a sequence can go through: prefill, decode, fork, truncation, streaming, a batch, scoring."""
    text, other = trace(engine, WINDOW + 160 + 61), trace(engine, 400, seed=1)
    sequence = engine.new_sequence()
    found = [exact(engine, sequence, text[:-30]), decode(engine, [sequence], [text[-30:]])]
    twin = sequence.fork()
    twin.truncate(WINDOW + 77)
    found += [stream(engine, twin, other[:199]), decode(engine, [sequence, twin], [other[:150], other[150:300]])]
    sequence.free()
    twin.free()
    return [*found, scored(engine, text)]


@pytest.mark.parametrize("name", FEW)
def test_what_lies_in_fresh_memory_changes_nothing(engines: Engines, name: str) -> None:
    engine = engines[name]
    clean = life(engine)
    for tensor in engine.parts.setup.arena.tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
            tensor.flatten()[::2] = torch.inf
        else:
            tensor.random_(generator=torch.Generator().manual_seed(1))
    engine.parts.setup.arena.page_table.fill_(-1)
    assert all(torch.equal(a, b) for a, b in zip(clean, life(engine), strict=True))


@pytest.mark.parametrize("name", FEW)
def test_the_order_of_pages_changes_nothing(engines: Engines, name: str) -> None:
    engine = engines[name]
    arena = engine.parts.setup.arena
    clean = life(engine)
    arena._free_pages.reverse()
    arena._free_pages.insert(0, arena._free_pages.pop())
    arena._free_sequences.reverse()
    assert all(torch.equal(a, b) for a, b in zip(clean, life(engine), strict=True))


# --- whole models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FEW, "rotate K1.5V1.5"])
def test_nll_of_a_model_equals_its_definition(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-4 nats. Step by step, with dense attention of torch's or of ours, sums round otherwise, on some CPUs also in the
    definition, which flips a code now and then: once something is packed, the difference may be a hundredth of what the
    quantization does, in the mean."""
    engine = tiny_engine(tiny_folder(tmp_path, family="qwen2", qkv_bias=True), tiny_cache(**CACHES[name]))
    tile = engine.parts.setup.regions.tile
    ids = random_ids(WINDOW + 2 * tile + 37, seed=3)
    found, steps = engine.nll(ids), stepped_nll(engine, ids)
    dense = dense_nll(engine, ids)
    bound = 1e-4 if name == "fp" else (found - dense).abs().mean() / 100
    monkeypatch.setattr("skvq.kernels.dense._is_ours", lambda q: False)
    torchs, defined = engine.nll(ids), simulated_nll(engine, ids, sinks_of(engine))
    assert (torchs - defined).abs().median() <= 1e-4
    unpacked = slice(None if name == "fp" else WINDOW + tile)
    for one, other in ((torchs, defined), (found, steps), (found, torchs)):
        assert (one - other)[unpacked].abs().max() <= 2e-4, "before anything is packed"
        assert (one - other).abs().mean() <= bound


def test_a_text_beyond_the_context_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(), max_context=301)
    sequence = engine.new_sequence()
    engine.read(sequence, random_ids(300))
    before = {name: t.clone() for name, t in engine.parts.setup.arena.tensors.items()}
    with pytest.raises(CapacityError, match="context of 301"):
        engine.read(sequence, random_ids(2))
    after = engine.parts.setup.arena.tensors
    assert all(torch.equal(t.view(torch.uint8), after[name].view(torch.uint8)) for name, t in before.items())
    with pytest.raises(CapacityError, match="context of 301"):
        engine.nll(random_ids(302))
    assert sequence.length == 300 and engine.parts.setup.arena._free_sequences == [3, 2, 1]
