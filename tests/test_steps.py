"""Prefill, decode and scoring against their definition, at every boundary of sinks, window and tile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skvq.engine.config import FULL_SPAN
from skvq.engine.generate import Engine
from skvq.engine.steps import DecodeBatch
from skvq.tests.simulated import simulated_logits
from skvq.tests.tiny import random_ids, stepped_nll, steps, tiny_cache, tiny_engine, tiny_folder

WINDOW, SINKS = 16, 3
SAME = 1e-4  # nats: float32 sums in another order, and the 16-bit roundings that follow from them
CACHES: dict[str, dict[str, Any]] = {
    "fp": {"method": "fp"},
    "plain K2V2": {"method": "plain"},
    "plain K8V8": {"method": "plain", "key_bits": 8, "value_bits": 8},
    "reorder K2V1.5": {"method": "reorder", "value_bits": 1.5},
    "reorder K3V2": {"method": "reorder", "key_bits": 3},
    "rotate K2V2": {},
    "rotate K1.5V1.5": {"key_bits": 1.5, "value_bits": 1.5},
    "rotate K1.5V4": {"key_bits": 1.5, "value_bits": 4},
    "rotate K4V3": {"key_bits": 4, "value_bits": 3},
}
FEW = ["fp", "plain K2V2", "reorder K2V1.5", "rotate K2V2"]
BOUNDARIES = ["0", "1", "s-1", "s", "s+1", "w-1", "w", "w+1", "w+t-1", "w+t", "w+t+1", "w+t+s", "w+2t-1", "w+2t", "w+2t+1"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """Engines by cache, made when first asked for, over one model with grouped heads and biases."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"), family="qwen2", qkv_bias=True)

    class Made(dict[str, Engine]):
        def __missing__(self, name: str) -> Engine:
            self[name] = tiny_engine(folder, tiny_cache(**CACHES[name]))
            return self[name]

    return Made()


def sinks_of(engine: Engine) -> int:
    return 0 if engine.parts.cache.method == "fp" else SINKS


def nll(logits: Tensor, ids: list[int]) -> Tensor:
    return -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max())


@pytest.mark.parametrize("name", CACHES)
def test_nll_equals_its_definition_and_decode_step_by_step(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    ids = random_ids(WINDOW + 2 * engine.parts.setup.regions.tile + 37)
    found = engine.nll(ids)
    assert (found - nll(simulated_logits(engine, ids, [], sinks_of(engine)), ids)).abs().max() <= SAME
    assert (found - stepped_nll(engine, ids)).abs().max() <= SAME


def test_what_the_definition_says_depends_on_every_region(engines: dict[str, Engine]) -> None:
    """The comparison above can fail: another window, other sinks or another method are far outside its tolerance."""
    ids = random_ids(WINDOW + 2 * 128 + 37)
    found = engines["rotate K2V2"].nll(ids)
    for other in (
        simulated_logits(engines["rotate K2V2"], ids, [], SINKS + 1),
        simulated_logits(engines["plain K2V2"], ids, [], SINKS),
        simulated_logits(engines["fp"], ids, [], 0),
        simulated_logits(engines["rotate K2V2"], ids, [WINDOW + 128 + 1], SINKS),
    ):
        assert (found - nll(other, ids)).abs().max() > 10 * SAME


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", FEW)
def test_exact_prefill_then_decode_equals_its_definition(engines: dict[str, Engine], name: str, boundary: str) -> None:
    engine = engines[name]
    tile = engine.parts.setup.regions.tile
    count = eval(boundary.replace("2t", "2*t"), {"s": SINKS, "w": WINDOW, "t": tile})
    ids = random_ids(count + 3)
    wanted = simulated_logits(engine, ids, [count], sinks_of(engine))
    sequence = engine.new_sequence()
    if count:
        assert apart(engine.read(sequence, ids[:count]), wanted[count - 1]) <= SAME
    assert apart(steps(engine, [sequence], [ids[count:]])[0], wanted[count:]) <= SAME
    sequence.free()


@pytest.mark.parametrize("name", [*FEW, "rotate K1.5V1.5"])
def test_streaming_in_odd_chunks_then_decode_equals_its_definition(engines: dict[str, Engine], name: str) -> None:
    engine = replaced(engines[name], prefill="streaming")
    chunks = [1, WINDOW - 1, 2, 129, 160, 1, 53]
    ids = random_ids(sum(chunks) + 2)
    wanted = simulated_logits(engine, ids, chunks, sinks_of(engine))
    sequence = engine.new_sequence()
    start = 0
    for count in chunks:
        found = engine.read(sequence, ids[start : start + count])
        start += count
        assert apart(found, wanted[start - 1]) <= SAME
    assert apart(steps(engine, [sequence], [ids[start:]])[0], wanted[start:]) <= SAME
    sequence.free()


def test_streaming_chunks_of_one_are_decode_steps(engines: dict[str, Engine]) -> None:
    """But for the token itself, which a decode step reads back from 16 bits."""
    engine = replaced(engines["rotate K2V2"], prefill="streaming")
    ids = random_ids(WINDOW + 128 + 5)
    one, other = engine.new_sequence(), engine.new_sequence()
    rows = torch.stack([engine.read(one, [token]) for token in ids])
    decoded = steps(engine, [other], [ids])[0]
    half = apart(decoded, simulated_logits(engine, ids, [1] * len(ids), SINKS))
    assert apart(rows, decoded) <= half + SAME < 0.02
    one.free(), other.free()


def replaced(engine: Engine, **parts: Any) -> Engine:
    return Engine(replace(engine.parts, **parts), engine.report)


def test_streaming_in_segments_equals_one_segment(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replaced(engines["rotate K2V2"], prefill="streaming")
    ids = random_ids(WINDOW + 5 * 128 + 7)
    rows = []
    for segment in (8192, 256):
        monkeypatch.setattr("skvq.engine.steps.SEGMENT_TOKENS", segment)
        sequence = engine.new_sequence()
        engine.read(sequence, ids[:-9])
        rows.append(engine.read(sequence, ids[-9:]))
        sequence.free()
    assert apart(*rows) <= SAME


@pytest.mark.parametrize("spans", [(21, 21), (150, FULL_SPAN), (FULL_SPAN, 1)])
@pytest.mark.parametrize("method", ["fp", "rotate", "reorder"])
def test_sliding_windows_hold_in_every_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, spans: tuple[int, int]
) -> None:
    folder = tiny_folder(tmp_path, family="qwen2", qkv_bias=True, attention_spans=spans)
    engine = tiny_engine(folder, tiny_cache(method=method))
    monkeypatch.setattr("skvq.engine.steps.SEGMENT_TOKENS", 128)
    ids = random_ids(WINDOW + 2 * 128 + 21)
    sinks = sinks_of(engine)
    assert (engine.nll(ids) - nll(simulated_logits(engine, ids, [], sinks), ids)).abs().max() <= SAME
    for mode, chunks in (("exact", [290]), ("streaming", [31, 150, 109])):
        wanted = simulated_logits(engine, ids, chunks, sinks)[289:]
        reader, sequence, start = replaced(engine, prefill=mode), engine.new_sequence(), 0
        for count in chunks:
            last = reader.read(sequence, ids[start : start + count])
            start += count
        found = torch.cat([last[None], steps(engine, [sequence], [ids[start:]])[0]])
        assert apart(found, wanted) <= SAME
        sequence.free()


def test_decode_over_a_page_boundary(engines: dict[str, Engine]) -> None:
    engine = engines["rotate K2V2"]
    count = 1280 + WINDOW - 1
    ids = random_ids(count + 130)
    wanted = simulated_logits(engine, ids, [count], SINKS)
    sequence = engine.new_sequence()
    engine.read(sequence, ids[:count])
    assert len(sequence.pages) == 1
    found = steps(engine, [sequence], [ids[count:]])[0]
    assert sequence.packed == 1280 + 128 - 128 + 0 or len(sequence.pages) == 2
    assert apart(found, wanted[count:]) <= SAME
    sequence.free()


def test_a_window_of_nothing(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(window=0))
    ids = random_ids(300)
    assert (engine.nll(ids) - nll(simulated_logits(engine, ids, [], SINKS), ids)).abs().max() <= SAME
    assert (engine.nll(ids) - stepped_nll(engine, ids)).abs().max() <= SAME


@pytest.mark.parametrize("name", FEW)
def test_a_batch_equals_its_singles(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    lengths = (1, WINDOW + 127, WINDOW + 160 + 131)
    prompts = [random_ids(n, seed=n) for n in lengths]
    ends = [random_ids(35, seed=n + 1) for n in lengths]
    together = [engine.new_sequence() for _ in lengths]
    for sequence, prompt in zip(together, prompts, strict=True):
        engine.read(sequence, prompt)
    rows = steps(engine, together, ends)
    for sequence in together:
        sequence.free()
    for prompt, end, row in zip(prompts, ends, rows, strict=True):
        single = engine.new_sequence()
        engine.read(single, prompt)
        assert apart(steps(engine, [single], [end])[0], row) <= SAME
        single.free()


def life(engine: Engine) -> list[Tensor]:
    """Logits of everything a sequence can go through: prefill, decode, fork, truncation, streaming."""
    ids = random_ids(WINDOW + 160 + 61)
    sequence = engine.new_sequence()
    found = [engine.read(sequence, ids[:-30]), steps(engine, [sequence], [ids[-30:]])]
    twin = sequence.fork()
    twin.truncate(WINDOW + 77)
    found += [engine.read(twin, ids[5:170]), steps(engine, [sequence, twin], [ids[:9], ids[9:18]]), engine.nll(ids)]
    sequence.free(), twin.free()
    return found


@pytest.mark.parametrize("name", FEW)
def test_what_lies_in_fresh_memory_changes_nothing(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    clean = life(engine)
    tensors = engine.parts.setup.arena.tensors
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        elif tensor.dtype == torch.int32:
            tensor.random_(-(2**31), 2**31 - 1, generator=generator)
        else:
            tensor.fill_(torch.nan)
            tensor.flatten()[::2] = torch.inf
    tensors["page_table"].fill_(-1)
    assert all(torch.equal(a, b) for a, b in zip(clean, life(engine), strict=True))


@pytest.mark.parametrize("name", FEW)
def test_the_order_of_pages_changes_nothing(engines: dict[str, Engine], name: str) -> None:
    engine = engines[name]
    arena = engine.parts.setup.arena
    clean = life(engine)
    arena._free_pages.reverse()
    arena._free_pages.insert(0, arena._free_pages.pop())
    arena._free_sequences.reverse()
    assert all(torch.equal(a, b) for a, b in zip(clean, life(engine), strict=True))


def test_a_step_without_room_changes_nothing(engines: dict[str, Engine]) -> None:
    engine = engines["rotate K2V2"]
    sequence = engine.new_sequence()
    engine.read(sequence, random_ids(1499))
    before = {name: t.clone() for name, t in engine.parts.setup.arena.tensors.items()}
    with pytest.raises(Exception, match="context of 1,500"):
        engine.read(sequence, random_ids(2))
    batch = DecodeBatch([sequence], engine.parts.model.config.attention_spans)
    engine.decode_step(batch, [1])
    with pytest.raises(Exception, match="1,500"):
        engine.decode_step(batch, [1])
    changed = [name for name, t in engine.parts.setup.arena.tensors.items() if not torch.equal(t.nan_to_num(), before[name].nan_to_num())]
    assert set(changed) <= {"full_keys", "full_values", "full_positions", "full_mass"}, "the one decode step writes its own token"
    sequence.free()
