"""The methods that accuracy is compared with do what their papers say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scripts import loaded
from tiny import random_ids, tiny_cache, tiny_engine, tiny_folder

others = loaded("other_methods")
TURBO_QUANT = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
"""Distortion of unit vectors by bits (arXiv 2504.19874, theorem 1)."""


@pytest.mark.parametrize("bits", TURBO_QUANT)
def test_normal_levels_distort_as_little_as_turbo_quants(bits: int) -> None:
    levels = others.normal_levels(bits)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-5)
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000).float()
    error = (x - levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]).square().mean()
    assert float(error) == pytest.approx(TURBO_QUANT[bits], rel=0.16), "the paper rounds"


def test_heads_keep_their_norm_and_most_of_their_direction() -> None:
    x = torch.randn(500, 2, 64) * torch.rand(500, 2, 1) * 9
    x[0] = 0
    found = others.TurboQuant(3, 64).stored(x)
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-3) and not found[0].any()
    assert float(torch.cosine_similarity(found[1:], x[1:], dim=-1).mean()) > 0.97


def test_schemes_leave_all_that_is_not_rounded(tmp_path: Path) -> None:
    """With 2^16 levels and nothing cut off nothing is lost, whatever the rotation; OSCAR's are of each head and orthogonal."""
    engine = tiny_engine(tiny_folder(tmp_path), tiny_cache(method="fp"))
    ids = torch.tensor(random_ids(300, seed=1))
    schemes = others.oscar_schemes(others.observe(engine, torch.tensor(random_ids(400, seed=2))))
    fine = [others.Rotated(s.key_rotation, s.value_rotation, levels=2**16) for s in schemes]
    for scheme in schemes:
        for rotation in (scheme.key_rotation, scheme.value_rotation):
            assert torch.allclose(rotation @ rotation.mT, torch.eye(rotation.shape[-1]).expand_as(rotation), atol=1e-5)
    assert others.simulate(engine, ids, lambda layer: fine[layer])["kl"] < 1e-6
    assert others.simulate(engine, ids, lambda layer: schemes[layer])["kl"] > 1e-4
