"""Layers without RoPE (SmolLM3), heads turned in part (Phi-4-mini), and queries that grow with their position (Ministral 3).

``test_model_parity`` compares the model itself with `transformers`; here it meets the packed cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import dense_nll, random_ids, stepped_nll, tiny_cache, tiny_engine, tiny_folder

from skvq.engine.model_config import RopeConfig
from skvq.engine.overflow import drop_pages
from skvq.kernels.layout import PAGE_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")
GROWING = RopeConfig(kind="yarn", factor=8.0, original_context=64, query_beta=0.4)
PARTIAL = RopeConfig(kind="longrope", factor=8.0, original_context=64, short_factor=(1.0,) * 12, long_factor=(2.0,) * 12)
MODELS = {
    "a layer without RoPE": {"family": "smollm3", "unturned_layers": (1,)},
    "growing queries": {"family": "ministral3", "rope": GROWING},
    "heads turned in part": {"family": "phi3", "rotary_size": 24, "rope": PARTIAL},
}


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("method", ["rotate", "reorder", "plain", "fp"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_at_8_bits_it_is_nearly_the_model(tmp_path: Path, name: str, method: str, backend: str) -> None:
    """Streamed, and step by step; a tenth of what the same weights give without what sets this model apart."""
    cache = tiny_cache(method=method, key_bits=8, value_bits=8)
    engine = tiny_engine(tiny_folder(tmp_path / "it", **MODELS[name]), cache, backend=backend)
    usual = tiny_engine(tiny_folder(tmp_path / "usual"), tiny_cache(method="fp"))
    ids = random_ids(500)
    wanted = dense_nll(engine, ids)
    apart = (wanted - dense_nll(usual, ids)).abs().mean()
    assert (engine.nll(ids) - wanted).abs().mean() < apart / 10
    assert (stepped_nll(engine, ids[:300]) - wanted[:299]).abs().mean() < apart / 10


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_calibrated_by_the_layer_it_is_of(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "model", **MODELS[name])
    cache, file = tiny_cache(bits_budget=6.0), tmp_path / "calibration"
    tiny_engine(folder, tiny_cache(method="fp")).calibrate(cache, "a few words of it " * 400, file, corpus_name="x", tokens=700)
    engine, ids = tiny_engine(folder, cache, calibration=file), random_ids(500)
    wanted = dense_nll(engine, ids)
    usual = dense_nll(tiny_engine(tiny_folder(tmp_path / "usual"), tiny_cache(method="fp")), ids)
    assert (engine.nll(ids) - wanted).abs().mean() < (wanted - usual).abs().mean() / 3


def test_keys_that_were_not_turned_are_not_moved(tmp_path: Path) -> None:
    """When the oldest pages are dropped, ``reorder`` gives keys of the window other positions: where there is RoPE."""
    folder = tiny_folder(tmp_path, **MODELS["a layer without RoPE"])
    engine = tiny_engine(folder, tiny_cache(method="reorder"), on_full="shift", max_context=2700)
    sequence = engine.prefill(random_ids(PAGE_TOKENS + 200))
    before = [sequence.window(layer, sequence.length)[0].clone() for layer in range(2)]
    drop_pages(sequence, 1)
    after = [sequence.window(layer, sequence.length)[0] for layer in range(2)]
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])
    sequence.free()


def test_identities_tell_them_apart(tmp_path: Path) -> None:
    """A session of one cannot be restored into another that has the same frequencies."""
    changes = [{}, MODELS["a layer without RoPE"], {"rope": RopeConfig(original_context=512, query_beta=0.4)}]
    changes += [MODELS["heads turned in part"], MODELS["heads turned in part"] | {"rope": replace(PARTIAL, factor=7.0)}]
    engines = [tiny_engine(tiny_folder(tmp_path / str(n), **c), tiny_cache(method="fp")) for n, c in enumerate(changes)]
    assert len({engine.parts.setup.identity.rope for engine in engines}) == len(changes)
