"""Stress without a model: the soak and the planted keys pass on what is right and fail on what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from loader_fixtures import refused, tiny_config
from processes import import_paths
from tiny import tiny_cache, tiny_engine, tiny_folder

from skvq.cli import main
from skvq.engine.arena import Arena
from skvq.engine.cache import SequenceCache
from skvq.engine.config import CacheConfig
from skvq.engine.errors import CapacityError, SkvqError
from skvq.engine.report import Quiet
from skvq.engine.stress import bare_setup, fill, fill_fast
from skvq.engine.trials.planted import planted, require_found, rows
from skvq.engine.trials.soak import SoakError, soak
from skvq.kernels.registry import get_backend

CPU = torch.device("cpu")
REFERENCE = get_backend("reference", CPU)


def test_1000_steps() -> None:
    result = soak(1000, 0, REFERENCE, Quiet())
    assert result["steps"] == 1000 == sum(result["operations"].values())
    assert set(result["operations"]) == {"append", "fork", "free", "new", "refused", "restore", "save", "truncate"}
    assert result["most_tokens"] > 3 * 1280


def test_the_same_seed_does_the_same() -> None:
    first, second = (soak(40, 5, REFERENCE, Quiet()) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def _never(*args: Any) -> bool:
    return False


def _leak(self: Arena, page: int) -> None:
    self._references[page] -= 1


BREAKS: dict[str, tuple[type, str, Any]] = {
    "a shared page is written": (Arena, "is_shared", _never),
    "pages are lost": (Arena, "release", _leak),
    "slots are not copied": (Arena, "copy_slot", lambda self, source, target: None),
    "a cut forgets its tile": (SequenceCache, "_reopen", lambda self, packed, length: None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, attribute, broken = BREAKS[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises((SoakError, IndexError)):
        soak(400, 1, REFERENCE, Quiet())


def setup_of(cache: CacheConfig, context: int, **changes: Any) -> Any:
    """An arena without a model."""
    config = tiny_config(**({"head_size": 64} | changes))
    return bare_setup(config, cache, max_context=context, max_sequences=1, backend=REFERENCE, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("method", ["rotate", "reorder", "plain", "fp"])
@pytest.mark.parametrize("bits", [(2, 2), (2, 1.5), (8, 4)])
def test_planted_keys_are_found_at_every_depth(method: str, bits: tuple[float, float]) -> None:
    cache = tiny_cache(method=method, key_bits=bits[0], value_bits=bits[1])
    found = planted(setup_of(cache, 3000), 4, 3000, [0, 1, 50, 95, 100], seed=0, report=Quiet())
    require_found(found)
    assert [f.region for f in found] == ["packed" if method == "fp" else "retained", "packed", "packed", "packed", "window"]
    assert all(row["found"] for row in rows(found))


@pytest.mark.parametrize("method", ["plain", "fp"])
def test_a_long_run_is_filled_by_repeating_pages(method: str) -> None:
    setup = setup_of(tiny_cache(method=method), 60_000)
    sequence = SequenceCache(setup)
    fill_fast(sequence, 50_001, seed=0, vocab=256, report=Quiet())
    assert (sequence.length, len(sequence.token_ids), sequence.packed) == (50_001, 50_001, setup.regions.packed(50_001))
    keys, _ = sequence.stage(1, 0, sequence.packed)
    assert torch.equal(keys[10_240:20_480], keys[20_480:30_720])
    assert keys.isfinite().all()
    held = sequence.setup.arena.positions[0, 0, setup.regions.retained :]
    assert sorted(p for p in held.tolist() if p >= 0) == list(range(sequence.packed, 50_001))
    setup.arena.check({sequence.slot: sequence.pages})


def test_a_wrong_page_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(tiny_cache(), 4000)
    attend = setup.method.attend

    def other_pages(layer: int, q: Any, step: Any) -> Any:
        step.page_table[:, 1] = step.page_table[:, 0]
        return attend(layer, q, step)

    monkeypatch.setattr(setup.method, "attend", other_pages)
    found = planted(setup, 4, 4000, [50], seed=0, report=Quiet())
    refused(lambda: require_found(found), "1 of 1 planted tokens were lost", "2,000 of 4,000")


def test_depths_that_do_not_fit_are_refused() -> None:
    setup = setup_of(tiny_cache(), 100)
    refused(lambda: planted(setup, 4, 100, [101], seed=0, report=Quiet()), "0 to 100", "101")
    refused(lambda: planted(setup, 4, 100, [50, 50.1], seed=0, report=Quiet()), "2 depths are not as many places in 100 tokens")


def test_an_arena_larger_than_memory_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(CapacityError, match="GiB"):
        setup_of(tiny_cache(method="fp"), 2**30)


def test_filling_is_bounded_and_decode_goes_on_from_it(tmp_path: Path) -> None:
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(), max_context=2000)
    sequence = engine.new_sequence()
    refused(lambda: fill(sequence, 2001, seed=0, vocab=320, report=Quiet()), "2,001", "2,000")
    engine.fill(sequence, 1900)
    assert (sequence.length, sequence.packed) == (1900, 1792)
    list(engine.stream([5, 6], sequence=sequence))
    assert sequence.length == 2000
    with pytest.raises(SkvqError):
        engine.read(sequence, [1])


def test_the_commands(tmp_path: Path) -> None:
    options = ["--steps", "20", "--backend", "reference", "--json", "--seed", str(-(10**30))]
    soaked = CliRunner().invoke(main, ["bench", "soak", *options])
    assert soaked.exit_code == 0, soaked.output
    assert json.loads(soaked.stdout.splitlines()[-1])["steps"] == 20
    shape = ["--shape", str(tiny_folder(tmp_path)), "--backend", "reference", "--device", "cpu", "--group-size", "32"]
    looked = CliRunner().invoke(main, ["bench", "planted", *shape, "--ctx", "600,1500", "--depths", "0,50", "--json"])
    assert looked.exit_code == 0, looked.output
    results = json.loads(looked.stdout.splitlines()[-1])["results"]
    assert [(r["context"], r["depth"], r["found"]) for r in results] == [(c, d, True) for c in (600, 1500) for d in (0.0, 50.0)]
    assert json.loads(looked.stdout.splitlines()[-1]).items() >= {"layers": 2, "key_bits": 2.0, "seed": 0}.items()
    for contexts, words in (("many", "not a list of numbers"), ("600,1", "2 depths are not as many places in 1 token")):
        wrong = CliRunner().invoke(main, ["bench", "planted", *shape, "--ctx", contexts, "--depths", "0,50"])
        assert wrong.exit_code == 2 and words in wrong.stderr and not wrong.stdout


def test_asked_to_end_it_leaves_no_file_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skvq", "bench", "soak", "--steps", "1000000", "--backend", "reference"]
    paths = {"PYTHONPATH": import_paths(), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env={**os.environ, **paths}, stderr=subprocess.PIPE, text=True) as soaking:
        while not any(tmp_path.rglob("*.session")):
            assert soaking.poll() is None
            time.sleep(0.05)
        soaking.terminate()
        _, said = soaking.communicate(timeout=60)
    assert soaking.returncode == 130 and "skvq: interrupted" in said and not [*tmp_path.iterdir()]
