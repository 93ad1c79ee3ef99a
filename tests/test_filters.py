"""Filter rules: what each keeps, within its budget, and the same tokens whichever way they came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from attending import Trace, decode, exact, stream, trace
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_ids, steps, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.engine import mass
from skvq.engine.cache import SequenceCache
from skvq.engine.config import CacheConfig
from skvq.engine.errors import OptionError, SkvqError
from skvq.engine.filters import (
    AttentionSinks,
    FilterRule,
    HeavyHitters,
    KeyOutliers,
    LeavingTokens,
    TokenIds,
    rule_from_text,
)
from skvq.engine.generate import Engine
from skvq.engine.model_config import FULL_SPAN
from skvq.engine.retained import seats

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, slots=True)
class EveryTenth:
    """A user's rule, found by its import path."""

    budget: int = 5
    needs_attention_mass: bool = False

    def keep(self, tokens: LeavingTokens) -> Tensor:
        return tokens.positions % 10 == 9


class NoRule:
    budget = 3


def leaving(count: int = 256, **changes: Tensor) -> LeavingTokens:
    generator = torch.Generator().manual_seed(0)
    given = {
        "positions": torch.arange(count),
        "token_ids": torch.arange(count) % 50,
        "keys": torch.randn(count, 2, 32, generator=generator),
        "values": torch.randn(count, 2, 32, generator=generator),
        "attention_mass": torch.rand(count, generator=generator) + 0.5,
    }
    return LeavingTokens(layer=0, tile=128, **(given | changes))


def retained(sequence: SequenceCache, layer: int = 0) -> list[int]:
    held = sequence.setup.arena.full(layer).positions[sequence.slot, : sequence.setup.regions.retained]
    return sorted(held[held >= 0].tolist())


def engine_with(folder: Path, *rules: FilterRule, **cache: object) -> Engine:
    return tiny_engine(tiny_folder(folder, num_layers=1), tiny_cache(filters=rules, method="plain", **cache), max_context=900)


@given(st.lists(st.booleans(), max_size=9), st.lists(st.booleans(), min_size=1, max_size=12))
def test_seats_are_given_in_order(free: list[bool], wanted: list[bool]) -> None:
    """The first token that wants one gets the first free slot, and so on."""
    given = dict(zip([s for s, f in enumerate(free) if f], [t for t, w in enumerate(wanted) if w], strict=False))
    taken, source = seats(torch.tensor(free, dtype=torch.bool), torch.tensor(wanted))
    assert {s: int(source[s]) for s in taken.nonzero()[:, 0].tolist()} == given


# --- each rule alone --------------------------------------------------------------------------------------------------


def test_sinks_are_the_first_tokens() -> None:
    assert AttentionSinks(3).keep(leaving()).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert not AttentionSinks(0).keep(leaving()).any()


def test_token_ids_are_found_anywhere() -> None:
    assert TokenIds(frozenset({7, 49})).keep(leaving()).nonzero()[:, 0].tolist() == [
        7,
        49,
        57,
        99,
        107,
        149,
        157,
        199,
        207,
        249,
    ]


@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_planted_key_outliers_are_found_and_nothing_else(factor: float) -> None:
    tokens = leaving()
    keys = tokens.keys.clone()
    keys[[40, 200]] *= factor
    assert KeyOutliers().keep(leaving(keys=keys)).nonzero()[:, 0].tolist() == [40, 200]
    assert not KeyOutliers().keep(tokens).any()


def test_planted_heavy_hitters_are_found_and_nothing_else() -> None:
    mass = leaving().attention_mass.clone()
    mass[[40, 200]] = 20.0
    assert HeavyHitters().keep(leaving(attention_mass=mass)).nonzero()[:, 0].tolist() == [40, 200]
    assert not HeavyHitters().keep(leaving()).any()


@pytest.mark.parametrize(
    "rule", [AttentionSinks(130), TokenIds(frozenset({7})), KeyOutliers(0.7), HeavyHitters(1.2), EveryTenth()]
)
def test_an_answer_does_not_depend_on_how_many_tiles_leave_at_once(rule: FilterRule) -> None:
    whole = leaving()
    names = ("positions", "token_ids", "keys", "values", "attention_mass")
    tiles = [leaving(**{n: getattr(whole, n)[a : a + 128] for n in names}) for a in (0, 128)]
    kept = rule.keep(whole)
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(kept, torch.cat([rule.keep(tile) for tile in tiles]))


# --- in a cache -------------------------------------------------------------------------------------------------------


def read(engine: Engine, text: Trace, how: str) -> SequenceCache:
    sequence = engine.new_sequence()
    if how == "exact":
        exact(engine, sequence, text, chunk=101)
    elif how == "streaming":
        for start in range(0, len(text), 61):
            stream(engine, sequence, text[start : start + 61])
    else:
        decode(engine, [sequence], [text])
    return sequence


WAYS = ["exact", "streaming", "decode"]


@pytest.mark.parametrize("way", WAYS)
def test_rules_share_tokens_in_their_order_and_within_their_budgets(tmp_path: Path, way: str) -> None:
    engine = engine_with(tmp_path, AttentionSinks(2), TokenIds(frozenset({7}), budget=3), EveryTenth(budget=4))
    text = trace(engine, 16 + 2 * 128 + 9)
    ids = [7 if at in (1, 19, 30, 31, 200) else 8 for at in range(len(text))]
    sequence = read(engine, Trace(q=text.q, k=text.k, v=text.v, ids=ids), way)
    # 1 is a sink, so TokenIds has room for 19, 30 and 31; EveryTenth takes 9 and, as 19 is taken, 29, 39 and 49
    assert retained(sequence) == [0, 1, 9, 19, 29, 30, 31, 39, 49]
    keys = sequence.stage(0, 0, 128)[0]
    full = sequence.setup.arena.full(0)
    for slot, position in enumerate(full.positions[sequence.slot, :9].tolist()):
        assert torch.equal(keys[position], full.keys[sequence.slot][:, slot].float()), "a retained token is read in 16 bits"
    sequence.free()


@pytest.mark.parametrize("way", WAYS)
def test_a_token_whose_key_draws_attention_is_kept(tmp_path: Path, way: str) -> None:
    engine = engine_with(tmp_path, HeavyHitters(threshold=6.0, budget=4), window=32)
    text = trace(engine, 32 + 2 * 128 + 9)
    q, k = text.q.clone(), text.k.clone()
    q[..., 31], k[..., 31] = 3.0, 0.0  # the slowest pair of channels hardly turns in 300 positions
    k[:, [40, 201], :, 31] = 14.0
    sequence = read(engine, Trace(q=q, k=k, v=text.v, ids=text.ids), way)
    assert retained(sequence) == [0, 40, 201], "the first token has no rival: it draws attention without being planted"
    sequence.free()


@pytest.mark.parametrize("span", [1, 8, 64])
def test_tokens_get_no_attention_from_queries_that_do_not_see_them(tmp_path: Path, span: int) -> None:
    """A sliding window shorter than the cache's: no query gives out more than one, and all three paths the same."""
    folder = tiny_folder(tmp_path, num_layers=1, family="mistral", attention_spans=(span,))
    cache, ids, found = tiny_cache(filters=(HeavyHitters(),), window=64), random_ids(60), []
    for prefill in ("exact", "streaming", "decode"):
        engine = tiny_engine(folder, cache, prefill=prefill.replace("decode", "exact"))
        sequence = engine.new_sequence()
        for ids_at_once in [[token] for token in ids] if prefill == "decode" else [ids]:
            engine.read(sequence, ids_at_once)
        slots = engine.parts.setup.regions.slot(torch.arange(60))
        found.append(engine.parts.setup.arena.mass[0, sequence.slot, slots])
    assert torch.allclose(found[0], found[1], atol=1e-4) and torch.allclose(found[0], found[2], atol=3e-3)
    heads = engine.parts.model.config.num_heads
    assert float(found[0].min()) >= 0 and float(found[0].sum()) <= heads * 60 and (found[0].sum() > 9) == (span > 1)
    assert float(found[0].max()) <= heads * max(0, span - 1)


def test_attention_mass_is_the_same_whichever_way_tokens_came(tmp_path: Path) -> None:
    """By definition: softmax weights of the `window` queries after a token, summed over heads. Nothing is packed yet, so only
    the 16-bit rounding of keys, of which a decode step sees its own, sets the ways apart."""
    engine = engine_with(tmp_path, HeavyHitters(), window=40)
    text = trace(engine, 40 + 127)
    config, rope = engine.parts.model.config, engine.parts.rope.turned
    turn = torch.arange(len(text)).double()[:, None, None] * rope.inv_freq
    (q1, q2), (k1, k2) = text.q[0].double().chunk(2, -1), text.k[0].double().chunk(2, -1)
    q = torch.cat([q1 * turn.cos() - q2 * turn.sin(), q2 * turn.cos() + q1 * turn.sin()], -1)
    k = torch.cat([k1 * turn.cos() - k2 * turn.sin(), k2 * turn.cos() + k1 * turn.sin()], -1).repeat_interleave(
        config.num_heads // config.num_kv_heads, 1
    )
    score = torch.einsum("ihd,jhd->hij", q, k) / config.head_size**0.5
    i, j = torch.arange(len(text))[:, None], torch.arange(len(text))[None]
    weight = score.masked_fill(j > i, -torch.inf).softmax(-1) * ((i > j) & (i - j <= 40))
    wanted = weight.sum((0, 1)).float()
    for way in WAYS:
        sequence = read(engine, text, way)
        assert sequence.packed == 0
        found = sequence.window(0, sequence.length)[2]
        half = torch.finfo(torch.float16).eps * score.abs().max()  # of a score, so of a weight, relative
        assert ((found - wanted).abs() <= half * wanted + 1e-6).all()
        sequence.free()


def test_tokens_that_come_back_into_the_window_bring_no_mass(tmp_path: Path) -> None:
    """Whatever tokens lay in their slots before drew does not decide what is kept of them."""
    cache = tiny_cache(filters=(HeavyHitters(threshold=1.3, budget=90),))
    engine = tiny_engine(tiny_folder(tmp_path), cache, prefill="streaming", max_context=2000)
    mass = engine.parts.setup.arena.mass
    with engine.prefill(random_ids(500)) as one, engine.prefill(random_ids(430)) as other:
        engine.read(other, random_ids(70, seed=9))
        for sequence in (one, other):
            sequence.truncate(300)
            at = engine.parts.setup.regions.slot(torch.arange(sequence.packed, 300))
            assert len(at) and not mass[:, sequence.slot, at].any()


def test_a_user_class_by_import_path_works_in_an_engine(tmp_path: Path) -> None:
    rule = rule_from_text("test_filters:EveryTenth(budget=3)")
    assert (type(rule).__name__, rule.budget) == ("EveryTenth", 3)
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(filters=(rule,)))
    sequence = engine.prefill(random_ids(150))
    assert retained(sequence, layer=1) == [9, 19, 29]
    steps(engine, [sequence], [random_ids(5)])
    sequence.free()


def test_a_16_bit_cache_asks_no_rule(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(method="fp", filters=(HeavyHitters(),)))
    assert engine.parts.setup.regions.retained == 0 and not engine.parts.setup.needs_mass


# --- from text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, rule",
    [
        ("sinks", AttentionSinks(5)),
        ("sinks(n=0)", AttentionSinks(0)),
        (" sinks(7) ", AttentionSinks(7)),
        ("token-ids(ids=[3, 4], budget=2)", TokenIds(frozenset({3, 4}), 2)),
        ("key-outliers(threshold=2.5)", KeyOutliers(2.5)),
        ("heavy-hitters(budget=16)", HeavyHitters(budget=16)),
    ],
)
def test_rules_from_text(text: str, rule: FilterRule) -> None:
    assert rule_from_text(text) == rule


BAD = {
    "": "unknown filter rule",
    "sink": "did you mean 'sinks'",
    "heavy-hiters(budget=3)": "did you mean 'heavy-hitters'",
    "sinks(": "missing ')'",
    "sinks(n=3": "missing ')'",
    "sinks(n=3)x": "missing ')'",
    "sinks(3)(5)": "more than one pair of brackets",
    "sinks(n=open('x'))": "not of the form",
    "sinks(m=3)": "unknown option 'm'; known: n",
    "sinks(-1)": "from 0 to 65536",
    "sinks(n=2.5)": "from 0 to 65536",
    "token-ids": "missing",
    "token-ids(ids=5)": "must be a set",
    "token-ids(ids='abc')": "ids",
    "token-ids(ids=[1.5])": "ids",
    "key-outliers(threshold=0)": "positive",
    "key-outliers(threshold='x')": "threshold",
    "heavy-hitters(budget=0)": "from 1 to 65536",
    "nowhere.at.all:Rule": "cannot be imported",
    "test_filters:Nothing": "cannot be imported",
    ":Rule": "cannot be imported",
    ".filters:Rule": "",
    "test_filters:NoRule": "must have",
    "test_filters:Breaks": "cannot be made (KeyError: 'x')",
    "test_filters:Unasked": "cannot be asked for its budget (OSError: disk)",
    "nothing_but_an_error:Rule": "cannot be imported: RuntimeError: boo",
    "token-ids(ids=" + "-" * 3000 + "1)": "...",
    "os:getcwd": "must have",
    "test_filters:EveryTenth(budget=-1)": "budget",
    "test_filters:EveryTenth(budget='x')": "budget",
}


class Breaks:
    def __init__(self) -> None:
        raise KeyError("x")


class Unasked:
    needs_attention_mass = False

    @property
    def budget(self) -> int:
        raise OSError("disk")

    def keep(self, tokens: LeavingTokens) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize("text", BAD)
def test_a_bad_rule_is_refused_in_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing_but_an_error.py").write_text("raise RuntimeError('boo')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError) as caught:
        CacheConfig(filters=(rule_from_text(text),))
    assert BAD[text] in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@given(
    text=st.text(max_size=30)
    | st.from_regex(r"(sinks|token-ids|key-outliers|heavy-hitters)\([a-z0-9=\[\], .'-]{0,20}\)", fullmatch=True)
)
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = rule_from_text(text)
    except SkvqError:
        return
    kept = rule.keep(leaving())
    assert kept.dtype == torch.bool and kept.shape == (256,)


@pytest.mark.parametrize("count, tokens, window, limit", [(5, 40, 7, 1 << 21), (300, 700, 500, 1 << 21), (300, 700, 500, 2000)])
def test_attention_mass_is_the_weights_of_those_that_follow(
    count: int, tokens: int, window: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mass, "MOST_NUMBERS", limit)
    generator = torch.Generator().manual_seed(0)
    q, keys = torch.randn(count, 6, 16, generator=generator), torch.randn(2, tokens, 16, generator=generator)
    score = torch.einsum("nhrd,htd->nhrt", q.view(count, 2, 3, 16).double(), keys.double()).reshape(count, 6, tokens) / 4
    lse = score.logsumexp(2)
    t, at = torch.arange(tokens - count, tokens)[:, None], torch.arange(tokens)[None]
    wanted = ((score - lse[..., None]).exp() * ((at < t) & (t - at <= window))[:, None]).sum((0, 1))
    found = torch.ones(tokens)
    mass.add_mass(found, q, lse.float(), keys, window, FULL_SPAN)
    torch.testing.assert_close(found, 1 + wanted.float(), rtol=1e-5, atol=1e-5)
