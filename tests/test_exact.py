"""Exact prefill gives the same bytes whichever way it is held: heads in groups, hidden states apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_fixtures import refused
from tiny import Listener, arena_of, bytes_of, random_ids, steps, tiny_cache, tiny_engine, tiny_folder

from skvq.engine import loading
from skvq.engine.cache import SequenceCache
from skvq.engine.checkpoint import FileCheckpoint
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CapacityError
from skvq.engine.filters import AttentionSinks, HeavyHitters, KeyOutliers
from skvq.engine.generate import Engine
from skvq.engine.planner import Plan
from skvq.engine.prefill_form import PrefillForm
from skvq.engine.report import Quiet

TOKENS = 1500
HEADS = {"gqa": {"num_heads": 8, "num_kv_heads": 4}, "mha": {"num_heads": 4, "num_kv_heads": 4}}
RULES = (AttentionSinks(3), KeyOutliers(budget=4), HeavyHitters(budget=6, threshold=0.5))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a piece, several pieces a layer, and a last chunk that is packed in part."""
    monkeypatch.setattr("skvq.engine.prefill.CHUNK_TOKENS", 150)
    for module in ("exact", "absorb"):
        monkeypatch.setattr(f"skvq.engine.{module}.PIECE_TOKENS", 640)


def engine_for(folder: Path, cache: CacheConfig, heads: str, **options: Any) -> Engine:
    return tiny_engine(tiny_folder(folder, head_size=32, **HEADS[heads]), cache, max_context=TOKENS + 100, **options)


def read_as(engine: Engine, form: PrefillForm, **options: Any) -> SequenceCache:
    """A sequence of the text, read in that form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "form_of", lambda *args: form)
        return engine.prefill(random_ids(TOKENS), **options)


def same(engine: Engine, one: SequenceCache, other: SequenceCache) -> None:
    """Packed bytes, full-precision slots, and what decoding goes on with."""
    assert one.packed == other.packed > 1000
    assert all(map(torch.equal, bytes_of(one, one.packed), bytes_of(other, other.packed)))
    tensors = one.setup.arena.tensors
    assert torch.equal(tensors["full_positions"][:, one.slot], tensors["full_positions"][:, other.slot])
    held = tensors["full_positions"][:, one.slot] >= 0
    for name in ("full_keys", "full_values"):
        slots = (tensors[name][:, s.slot].transpose(1, 2)[held] for s in (one, other))
        assert torch.equal(*slots)
    torch.testing.assert_close(*(tensors["full_mass"][:, s.slot][held] for s in (one, other)))
    assert torch.equal(*(steps(engine, [s], [[5, 6]]) for s in (one, other)))


@pytest.mark.parametrize("heads", ["gqa", "mha"])
@pytest.mark.parametrize("method", ["rotate", "reorder", "plain", "fp"])
@pytest.mark.parametrize(
    "form", [PrefillForm(head_groups=2), PrefillForm(head_groups=4, host_states=True), PrefillForm(host_states=True)], ids=str
)
def test_every_form_gives_the_same_bytes(tmp_path: Path, heads: str, method: str, form: PrefillForm) -> None:
    engine = engine_for(tmp_path, tiny_cache(method=method, filters=RULES), heads)
    same(engine, read_as(engine, PrefillForm()), read_as(engine, form))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_short_spans_and_stored_weights_too(tmp_path: Path, backend: str) -> None:
    folder = tiny_folder(tmp_path, family="mistral", head_size=32, attention_spans=(200, 200), **HEADS["gqa"])
    engine = tiny_engine(folder, tiny_cache(filters=RULES), max_context=TOKENS + 100, backend=backend)
    same(engine, read_as(engine, PrefillForm()), read_as(engine, PrefillForm(head_groups=4)))


def test_without_room_for_all_heads_the_plan_has_groups_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, so that groups pay at a few thousand tokens. A shorter prompt has room for all heads."""
    for module in ("exact", "absorb", "prefill_form"):
        monkeypatch.setattr(f"skvq.engine.{module}.PIECE_TOKENS", 128)
    monkeypatch.setattr("skvq.engine.prefill_form.SEGMENT_TOKENS", 0)
    ample = engine_for(tmp_path, tiny_cache(), "mha")
    config, plan = ample.parts.model.config, ample.parts.plan
    assert plan.form == PrefillForm() and not plan.host_parts
    grouped = PrefillForm(head_groups=4)
    total = plan.total - plan.form_bytes + sum(grouped.device_parts(config, plan.context, 4).values())
    assert total < plan.total
    monkeypatch.setattr(loading, "available_memory", lambda device: total)
    told = Listener()
    engine = engine_for(tmp_path, tiny_cache(), "mha", report=told)
    assert (engine.parts.plan.form, engine.parts.plan.total) == (grouped, total)
    assert any(str(grouped) in line for line in told.messages)
    for count, form in ((TOKENS, grouped), (TOKENS // 2, PrefillForm())):
        sequence = engine.prefill(random_ids(count))
        assert engine.timing.prefill == str(form) and f"({form})" in engine.summary(sequence).line()
        sequence.free()
    monkeypatch.setattr(loading, "available_memory", lambda device: total - 1)
    with pytest.raises(CapacityError, match="heads in 4 groups"):
        engine_for(tmp_path, tiny_cache(), "mha")


@pytest.mark.parametrize("stop", [1, 7, 19, 20, 39, 40, 41, 60, 79, 80])
def test_broken_off_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, stop: int) -> None:
    """Two layers, four groups of ten chunks each: 80 attention calls, and a checkpoint after each."""
    cache, form = tiny_cache(filters=RULES), PrefillForm(head_groups=4)
    engine = engine_for(tmp_path, cache, "gqa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skvq.engine.checkpoint.FileCheckpoint.exact_point", _breaking(stop))
        with pytest.raises(RuntimeError, match="power cut"):
            read_as(engine, form, checkpoint=tmp_path / "ck", checkpoint_seconds=0)
    engine.parts.setup.arena.check({})
    fresh = engine_for(tmp_path, cache, "gqa")
    again = read_as(fresh, form, checkpoint=tmp_path / "ck")
    same(fresh, read_as(fresh, form), again)
    assert not (tmp_path / "ck").exists()


def test_a_checkpoint_of_another_form_is_refused(tmp_path: Path) -> None:
    engine = engine_for(tmp_path, tiny_cache(), "gqa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skvq.engine.checkpoint.FileCheckpoint.exact_point", _breaking(25))
        with pytest.raises(RuntimeError):
            read_as(engine, PrefillForm(head_groups=2), checkpoint=tmp_path / "ck", checkpoint_seconds=0)
    refused(
        lambda: read_as(engine, PrefillForm(), checkpoint=tmp_path / "ck"), "'head_groups': 2", "'head_groups': 1", "delete"
    )
    engine.parts.setup.arena.check(arena_of())
    sequence = read_as(engine, PrefillForm(head_groups=2, host_states=True), checkpoint=tmp_path / "ck")
    assert sequence.length == TOKENS


def test_the_bar_counts_all_the_work(tmp_path: Path) -> None:
    """In every form what is done comes to what was announced, per kind."""
    engine = engine_for(tmp_path, tiny_cache(), "gqa")
    for form in (PrefillForm(), PrefillForm(head_groups=2)):
        counting = Counting()
        engine.report = counting
        read_as(engine, form).free()
        np.testing.assert_allclose(counting.done, counting.total)
        assert (counting.total > 0).all()


class Counting(Quiet):
    """Adds up what a bar is told."""

    @contextmanager
    def bar(self, label: str, *total: float) -> Iterator[Any]:
        self.total, self.done = np.array(total), np.zeros(len(total))
        yield self

    def advance(self, *work: float) -> None:
        self.done += work


def _breaking(stop: int) -> Any:
    """A checkpoint's point after whose ``stop``-th writing the power goes."""
    point, calls = FileCheckpoint.exact_point, []

    def breaking(self: FileCheckpoint, *args: Any) -> None:
        point(self, *args)
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("power cut")

    return breaking
