"""`skvq eval`'s figures against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attending import SAME, SINKS, WINDOW, trace
from simulated import SimulatedLayer, schedule
from tiny import random_ids, tiny_cache, tiny_engine, tiny_folder

from skvq.engine import scoring
from skvq.engine.comparison import compare
from skvq.engine.decode_regime import StrictWindowLayer
from skvq.engine.errors import CalibrationError, CapacityError, OptionError, SkvqError
from skvq.engine.filters import AttentionSinks, HeavyHitters
from skvq.engine.generate import Engine
from skvq.engine.model_config import FULL_SPAN
from skvq.engine.pieces import finished
from skvq.engine.trials.plots import depth_plot
from skvq.kernels.reference import masked_attention
from skvq.loaders.text import first_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 5


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tiny_folder(tmp_path_factory.mktemp("tiny")), tiny_cache(), max_context=600)


def test_every_figure_is_what_its_name_says(engine: Engine) -> None:
    ids = torch.tensor(engine.encode(TEXT)[:401])
    row = engine.evaluate(TEXT, [tiny_cache()], tokens=401, stride=401)[0]
    with torch.no_grad():
        p = engine.logits(ids.tolist()).double().log_softmax(-1)
        q = engine.parts.model.head(finished(scoring.regime_hidden(engine.parts, ids, engine.report))).double().log_softmax(-1)
    rows = torch.arange(400)
    assert row["ppl_fp"] == pytest.approx(float((-p[rows, ids[1:]]).mean().exp()), rel=1e-4)
    assert row["ppl"] == pytest.approx(float((-q[rows, ids[1:]]).mean().exp()), rel=1e-4)
    assert row["ppl"] == pytest.approx(float(engine.nll(ids.tolist()).mean().exp()), rel=1e-4)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert row["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (row["tokens"], row["key_bits"], row["value_bits"], row["method"]) == (401, 2, 2, "rotate")
    assert row["bits_per_element"] == 2.5, "2 bits and 16 of metadata for 32 channels"


def test_error_by_depth_is_drawn(engine: Engine, tmp_path: Path) -> None:
    rows = engine.evaluate("to be or not to be " * 40, [tiny_cache(), tiny_cache(method="fp")], tokens=300, stride=300)
    depth_plot(rows, ["rotate", "fp"], "a title", tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SkvqError, match="cannot write"):
        depth_plot(rows, ["rotate", "fp"], "a title", tmp_path / "missing" / "depth.png")
    with pytest.raises(OptionError, match=r"must end in \.png"):
        depth_plot(rows, ["rotate", "fp"], "a title", tmp_path / "depth.jpgg")


def test_the_16_bit_cache_is_its_own_equal(engine: Engine) -> None:
    row = engine.evaluate(TEXT, [tiny_cache(method="fp")], tokens=300, stride=300)[0]
    assert abs(row["kl"]) < 1e-5 and row["ppl"] == pytest.approx(row["ppl_fp"], rel=1e-4) and row["bits_per_element"] == 16


def test_stretches_are_scored_each_on_its_own(engine: Engine) -> None:
    whole = engine.evaluate(TEXT, [tiny_cache()], tokens=400, stride=200)[0]
    first = engine.evaluate(TEXT, [tiny_cache()], tokens=200, stride=200)[0]
    second = engine.evaluate(
        engine.parts.tokenizer.decode(engine.encode(TEXT)[200:400]), [tiny_cache()], tokens=200, stride=200
    )[0]
    assert whole["kl"] == pytest.approx((first["kl"] + second["kl"]) / 2, rel=1e-3)
    assert whole["tokens"] == 400


def test_error_by_position_is_nothing_where_nothing_is_packed(engine: Engine) -> None:
    parts = engine.evaluate(TEXT, [tiny_cache()], tokens=400, stride=400)[0]["by_position"]
    assert [p["first"] for p in parts] == [50 * i for i in range(8)] and parts[-1]["last"] == 399
    assert abs(parts[0]["kl"]) < 1e-5 < parts[-1]["kl"], "window and tile are 144 tokens"


def test_comparing_in_pieces_is_comparing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor(engine.encode(TEXT)[:43])
    a, b = torch.randn(2, 43, 64, generator=torch.Generator().manual_seed(0))
    whole = compare(engine.parts.model, a, b, ids)
    monkeypatch.setattr("skvq.engine.likelihoods.ROWS", 7)
    pieces = compare(engine.parts.model, a, b, ids)
    assert len(pieces.nll) == 42 and len(pieces.kl) == 43
    assert torch.equal(whole.same_top, pieces.same_top)
    for name in ("nll_fp", "nll", "kl"):
        assert (getattr(whole, name) - getattr(pieces, name)).abs().max() <= 100 * SAME


@pytest.mark.parametrize("changes", [{}, {"filters": (AttentionSinks(3), HeavyHitters(8))}, {"method": "reorder"}])
def test_a_text_is_scored_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """As at once, whether a layer's span is longer than a chunk or not; nothing but keys and values is there of all of it."""
    spans = {"family": "qwen2", "qkv_bias": True, "attention_spans": (50, FULL_SPAN)}
    engine, ids = tiny_engine(tiny_folder(tmp_path, **spans), tiny_cache(**changes), max_context=600), random_ids(500)
    found: list[tuple[torch.Tensor, ...]] = []
    for size in (1024, 64):
        monkeypatch.setattr("skvq.engine.prefill.CHUNK_TOKENS", size)
        seen = list[int]()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(engine.parts.model, "heads", watched(engine.parts.model.heads, seen))
            found.append((scored_strictly(engine, ids), engine.nll(ids), engine.logits(ids)))
        assert max(seen) == min(size, 500)
    for whole, pieces in zip(*found, strict=True):
        assert (whole - pieces).abs().max() <= 100 * SAME


def watched(heads: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    """``Model.heads`` that notes how many tokens it is given."""

    def noted(index: int, x: torch.Tensor, rope: Any) -> Any:
        seen.append(x.shape[1])
        return heads(index, x, rope)

    return noted


def scored_strictly(engine: Engine, ids: list[int]) -> torch.Tensor:
    return finished(scoring.regime_hidden(engine.parts, torch.tensor(ids), engine.report, StrictWindowLayer))


def test_what_there_is_no_memory_for_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = engine.parts.plan.parts["workspace"]
    monkeypatch.setattr(scoring, "available_memory", lambda device: planned + 1000)
    for score in (engine.nll, engine.likelihoods, engine.logits):
        with pytest.raises(CapacityError, match="scoring 200 tokens at once needs"):
            score(random_ids(200))
    monkeypatch.setattr(scoring, "available_memory", lambda device: planned + 10**6)
    engine.nll(random_ids(200))


def test_an_exact_window_is_what_papers_simulate(engine: Engine) -> None:
    """Each query sees exactly WINDOW recent tokens, its own included, and what is never packed; the rest as packed."""
    text = trace(engine, WINDOW + 2 * 128 + 37)
    rope = engine_rope(engine, len(text))
    sequence = engine.new_sequence()
    sequence.reserve(len(text))
    layer = StrictWindowLayer(sequence, 0, torch.tensor(text.ids))
    layer.take(0, text.q, text.k, text.v, rope)
    found = layer.attend(0, text.q, rope)[0]
    sequence.free()
    q, k, v = rope.apply(text.q)[0], rope.apply(text.k)[0].half(), text.v[0].half()
    far_k, far_v = SimulatedLayer(engine, 0, SINKS, *schedule(len(text), []))._rounded(k, v)
    i, j = torch.arange(len(text))[:, None], torch.arange(len(text))[None]
    near = (i - j < WINDOW) | (j >= 256) | (j < SINKS)
    seen = torch.cat([(j <= i) & near, (j <= i) & ~near], 1)
    wanted = masked_attention(q, torch.cat([k.float(), far_k]), torch.cat([v.float(), far_v]), seen)[0]
    assert (found - wanted).abs().max() <= SAME


def engine_rope(engine: Engine, count: int):
    from skvq.engine.rope import at_positions

    return at_positions(engine.parts.rope, torch.arange(count)[None])


@pytest.mark.parametrize("text", ["", "x"])
def test_a_text_too_short_to_score_is_refused(engine: Engine, text: str) -> None:
    with pytest.raises(OptionError, match=r"empty|at least 2"):
        engine.evaluate(text, [tiny_cache()], tokens=5, stride=5)


@pytest.mark.parametrize(("tokens", "window"), [(290, 283), (290, 286), (220, 100)])
def test_what_leaves_nothing_quantized_is_refused(engine: Engine, tokens: int, window: int) -> None:
    """With an exact window the last query sees packed tokens behind the sinks and outside of its window, or there are none."""
    cache = tiny_cache(method="plain", window=window, filters=(AttentionSinks(3),))
    told = {"tokens": tokens, "stride": tokens, "exact_window": True}
    with pytest.raises(OptionError, match="nothing is quantized"):
        engine.evaluate(TEXT, [cache], **told)


def test_an_exact_window_of_all_but_one_token_has_one_that_is_quantized(engine: Engine) -> None:
    cache = tiny_cache(method="plain", window=100, filters=(AttentionSinks(3),))
    (row,) = engine.evaluate(TEXT, [cache], tokens=260, stride=260, exact_window=True)
    assert row["kl"] > 0


def test_a_text_longer_than_the_context_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "dense_hidden", lambda *_: pytest.fail("the text was read"))
    with pytest.raises(CapacityError, match="context of 600"):
        engine.evaluate(TEXT * 2, [tiny_cache()], tokens=700, stride=700)


def test_a_calibration_of_other_options_is_refused_before_the_work(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [tiny_cache(method="plain"), tiny_cache(method="reorder")]
    engine.calibrate(caches[0], "some words " * 50, tmp_path / "c", corpus_name="x", tokens=300)
    monkeypatch.setattr(scoring, "dense_hidden", lambda *_: pytest.fail("the text was read"))
    with pytest.raises(CalibrationError, match="made for method 'plain'"):
        engine.evaluate("abc " * 200, caches, tokens=400, stride=10**30, calibration=tmp_path / "c")
    with pytest.raises(OptionError, match="exact_window"):
        engine.evaluate("abc", caches, tokens=400, stride=400, exact_window=1)  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_is_refused_before_any_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path, trained_context=2048)
    cut = tiny_engine(folder, tiny_cache(), max_context=4000, rope_scaling="chunks:4")
    shifting = tiny_engine(folder, tiny_cache(), max_context=4000, on_full="shift")
    monkeypatch.setattr(scoring, "dense_hidden", lambda *_: pytest.fail("the text was read"))
    with pytest.raises(OptionError, match="dual chunk attention"):
        cut.evaluate(TEXT, [tiny_cache(), tiny_cache(filters=(HeavyHitters(2),))], tokens=400, stride=400)
    with pytest.raises(CapacityError, match="drops whole pages"):
        shifting.evaluate(TEXT, [tiny_cache(), tiny_cache(window=3000)], tokens=400, stride=400, exact_window=True)


def test_of_a_long_text_only_the_beginning_is_encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, tokenizer = [], engine.parts.tokenizer
    original = type(tokenizer).encode

    def encode(self: Any, text: str, *, bos: bool = True) -> list[int]:
        encoded.append(len(text))
        return original(self, text, bos=bos)

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    whole = original(tokenizer, TEXT * 1000)
    assert first_tokens(tokenizer, TEXT * 1000, 300) == whole[:300]
    assert sum(encoded) < 20_000
    encoded.clear()
    blank = " " * 20_000  # of which a tokenizer makes few tokens: the beginning grows until there are enough
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text, bos=True: original(self, text[::100], bos=bos))
    assert first_tokens(tokenizer, blank, 150) == original(tokenizer, blank[::100])[:150]
    assert first_tokens(tokenizer, blank, 999) == original(tokenizer, blank[::100])
