"""Keys with a huge bias (Qwen2): what does not depend on the token must not eat the range that the token's part needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loader_fixtures import byte_level_pipeline, random_weights, tiny_config, write_checkpoint
from tiny import tiny_cache

from skvq.calibrate.corpus import built_in_corpus
from skvq.engine.config import CacheConfig
from skvq.engine.generate import Engine
from skvq.engine.model_config import RopeConfig
from skvq.engine.report import Quiet

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 600
BIASED_PAIRS = 8
"""The slowest of 32 RoPE pairs, where Qwen2's biases are largest. In fast pairs a bias of 300 makes a random model's attention
nearly one-hot by position: another model, whose KL says nothing about keys."""


def biased_model(folder: Path, bias: float, seed: int) -> Path:
    """A random Qwen2 of two layers whose key biases are uniform in +-bias."""
    rope = RopeConfig(theta=1e6, original_context=2048)
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_size": 64}
    config = tiny_config(family="qwen2", qkv_bias=True, rope=rope, trained_context=2048, **shape)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, tensor in random_weights(config, seed).items():
        louder = 3.0 if "lm_head" in name else 1.5 if "q_proj" in name else 1.0  # so that attention matters to the logits
        scaled = tensor if tensor.ndim == 1 or "embed" in name else louder * tensor / tensor.shape[1] ** 0.5
        weights[name] = torch.ones_like(tensor) if name.endswith("norm.weight") else scaled
        if name.endswith(".bias"):
            weights[name] = torch.zeros_like(tensor)
        if name.endswith("k_proj.bias"):
            slow = torch.zeros(config.num_kv_heads, 2, 32)
            slow[:, :, -BIASED_PAIRS:] = bias * (2 * torch.rand(2, 2, BIASED_PAIRS, generator=generator) - 1)
            weights[name] = slow.flatten()
    write_checkpoint(folder, config, weights)
    byte_level_pipeline().save(str(folder / "tokenizer.json"))
    return folder


def kl(folder: Path, cache: CacheConfig) -> float:
    """KL of a cache calibrated on one part of the built-in corpus and measured on another."""
    place = {"backend": "reference", "device": "cpu", "dtype": "float32", "report": Quiet()}
    engine = Engine.load(folder, max_context=TOKENS, max_sequences=1, cache=CacheConfig(method="fp"), **place)  # type: ignore[arg-type]
    text, artifact = built_in_corpus(), folder / "calibration"
    engine.calibrate(cache, text[:6000], artifact, corpus_name="beginning", tokens=4096)
    (row,) = engine.evaluate(text[20000:], [cache], tokens=TOKENS, stride=TOKENS, calibration=artifact)
    return float(row["kl"])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_key_bias_of_300_costs_next_to_nothing(tmp_path: Path, seed: int) -> None:
    models = {bias: biased_model(tmp_path / str(bias), bias, seed) for bias in (0.0, 300.0)}
    without, biased = (kl(models[bias], tiny_cache(group_size=64)) for bias in models)
    assert without > 1e-3  # two bits are felt: the comparison means something
    assert max(biased, without) < 1.5 * min(biased, without), (without, biased)
    assert kl(models[300.0], tiny_cache(group_size=64, method="plain")) > 20 * biased
