"""Tokens whose keys stand out are named by calibration: which, and in how much of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Listener, random_ids, tiny_cache, tiny_engine, tiny_folder
from torch import Tensor

from skvq.calibrate.outliers import LEAST_SEEN, OutlierTokens
from skvq.calibrate.stats import SINKS
from skvq.loaders.artifact import load_artifact

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = torch.tensor(random_ids(600, vocab=50)).view(2, 300)


def see_layer(outliers: OutlierTokens, texts: Tensor, scale: Tensor) -> None:
    """A layer of normal keys, times ``scale`` [S, T]."""
    keys = torch.randn(*scale.shape, 2, 32, generator=torch.Generator().manual_seed(0)) * scale[..., None, None]
    for text, norms in zip(texts, keys.norm(dim=-1).mean(-1), strict=True):
        outliers.see(text, norms)
    outliers.advance()


@pytest.mark.parametrize("scale", [0.05, 8.0])
def test_a_token_with_odd_keys_is_named(scale: float) -> None:
    outliers, odd = OutlierTokens(TEXTS), torch.where(TEXTS == 7, scale, 1.0)
    for layer in range(8):
        see_layer(outliers, TEXTS, odd if layer < 2 else torch.ones(TEXTS.shape))
    assert outliers.found() == (7,)


def test_what_is_not_enough() -> None:
    """Too few layers, too few of its places, too rare, or only at the start, which the sinks keep anyway."""
    ids = TEXTS.clone()
    ids[ids == 9] = 8
    ids[0, 100 : 100 + LEAST_SEEN - 1] = 9
    ids[ids == 11] = 8
    ids[:, :SINKS] = 11
    seen = (ids == 5).nonzero()
    some = torch.zeros(ids.shape, dtype=torch.bool)
    some[tuple(seen[: len(seen) // 2].T)] = True  # half of its places
    always = torch.where((ids == 9) | (ids == 11) | some, 8.0, 1.0)
    outliers = OutlierTokens(ids)
    for layer in range(9):
        see_layer(outliers, ids, torch.where(ids == 7, 8.0, always) if layer < 2 else always)
    assert outliers.found() == ()


def test_calibration_names_them_in_its_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(method="fp"))
    engine.report = listener = Listener()
    monkeypatch.setattr(OutlierTokens, "found", lambda self: (3, 42))
    header = engine.calibrate(tiny_cache(), "some words " * 60, tmp_path / "c", corpus_name="x", tokens=200)
    assert header.outlier_tokens == load_artifact(tmp_path / "c").header.outlier_tokens == (3, 42)
    assert listener.messages and "token ids 3, 42" in listener.messages[0]
    assert "token-ids(ids=[3, 42])" in listener.messages[0]
