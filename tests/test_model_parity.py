"""Whole models against `transformers`, float32, tiny random configs of every family and RoPE scaling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loader_fixtures import byte_level_pipeline
from tiny import random_ids
from torch import Tensor

from skvq.engine.config import CacheConfig
from skvq.engine.generate import Engine
from skvq.engine.report import Quiet

pytestmark = pytest.mark.usefixtures("one_thread")
MAX_DIFFERENCE = 1e-3  # the project's promise, in logits
VOCAB = 320
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
"""Of Ministral 3, whose queries grow with their position: by a half, three quarters, ... at every eighth token."""
EXPERTS = {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with as many kv heads as heads": ("Llama", {"num_key_value_heads": 4}),
    "llama with grouped heads": ("Llama", {}),
    "llama with one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama with tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "llama with attention bias": ("Llama", {"attention_bias": True}),
    "llama with mlp bias": ("Llama", {"mlp_bias": True}),
    "llama with wide heads": ("Llama", {"head_dim": 40}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 7}),
    "mistral with wide heads": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window in its second layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3 with attention bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral with a window": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen3 of experts": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3 of experts whose weights do not add to one, with a window": (
        "Qwen3Moe",
        EXPERTS | {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 7},
    ),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "phi3 with a window": ("Phi3", {"pad_token_id": 0, "sliding_window": 7}),
    "phi3 that turns three quarters of a head": ("Phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.75}),
    "glm": ("Glm", {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 2}),
    "glm without bias, less of its heads turned": (
        "Glm",
        {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 2, "attention_bias": False, "partial_rotary_factor": 0.25},
    ),
    "ministral": ("Ministral", {"head_dim": 16, "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "ministral3": ("Ministral3", {"head_dim": 16, "rope_parameters": GROWING}),
    "ministral3 without yarn": ("Ministral3", {"head_dim": 16, "rope_parameters": GROWING | {"rope_type": "default"}}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "smollm3 with a window": (
        "SmolLM3",
        {"pad_token_id": 0, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 7, "attention_bias": True},
    ),
    "cwm": ("Cwm", {"head_dim": 16, "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]}),
}
RISING = [1.0 + 0.4 * j for j in range(8)]
STEEP = [1.0 + 2.5 * j for j in range(8)]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": RISING,
    "long_factor": STEEP,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {
    "theta": ({"rope_type": "default", "rope_theta": 500.0}, 53),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 53),
    "dynamic, past the trained length": ({"rope_type": "dynamic", "factor": 2.0}, 149),
    "yarn": (YARN, 101),
    "yarn with its own attention factor": (YARN | {"attention_factor": 1.7, "beta_fast": 16.0, "beta_slow": 2.0}, 101),
    "yarn as DeepSeek writes it": (YARN | {"mscale": 1.4, "mscale_all_dim": 0.7, "truncate": False}, 101),
    "llama3": (LLAMA3, 101),
    "longrope, short": (LONGROPE, 53),
    "longrope, long": (LONGROPE, 149),
    "longrope, factor 1": ({**LONGROPE, "factor": 1.0}, 149),
}


def oracle(family: str, **changes: Any) -> Any:
    """A `transformers` model whose logits depend on everything: wide weights, biases and norms off their defaults."""
    return random_model(family, getattr(transformers, f"{family}Config")(**(BASE | changes), attn_implementation="eager"))


def random_model(family: str, config: Any) -> Any:
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(
                1 + 0.3 * noise if "norm" in name else noise if weight.ndim == 1 else 1.5 * noise / weight.shape[-1] ** 0.5
            )
    return model


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0].float()


def load(model: Any, folder: Path, context: int, config: str = "", **options: Any) -> Engine:
    model.save_pretrained(folder, **options)
    if config:
        (folder / "config.json").write_text(config)
    byte_level_pipeline(size=VOCAB).save(str(folder / "tokenizer.json"))
    return Engine.load(
        folder,
        cache=CacheConfig(method="fp"),
        max_context=context,
        backend="reference",
        device="cpu",
        dtype="float32",
        report=Quiet(),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(tmp_path: Path, name: str) -> None:
    family, changes = FAMILIES[name]
    model, ids = oracle(family, **changes), random_ids(37)
    wanted = expected(model, ids)
    found = load(model, tmp_path, len(ids)).logits(ids)
    assert wanted.std() > 0.5, "an oracle with flat logits proves nothing"
    assert (found - wanted).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("name", ["mistral with a window", "qwen2 with a window in its second layer"])
def test_the_window_is_shorter_than_the_text(name: str) -> None:
    family, changes = FAMILIES[name]
    ids = random_ids(37)
    apart = expected(oracle(family, **changes), ids) - expected(oracle(family, **changes | {"sliding_window": 512}), ids)
    assert apart[:7].abs().max() <= MAX_DIFFERENCE < apart[7:].abs().max()


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_equals_transformers(tmp_path: Path, name: str) -> None:
    rope, count = SCALINGS[name]
    ids = random_ids(count)
    model = oracle("Llama", max_position_embeddings=128, rope_parameters={"rope_theta": 10_000.0} | rope)
    wanted = expected(model, ids)
    assert (wanted - expected(oracle("Llama"), ids)).abs().max() > 100 * MAX_DIFFERENCE, "the scaling changes nothing here"
    assert (load(model, tmp_path, count).logits(ids) - wanted).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("count", [53, 149])
@pytest.mark.parametrize("turned", [16, 12])
def test_longrope_of_phi3_equals_transformers(tmp_path: Path, turned: int, count: int) -> None:
    """Of the short factors and of the long ones; what is not turned is not scaled either."""
    factors = {key: LONGROPE[key][: turned // 2] for key in ("short_factor", "long_factor")}
    rope = LONGROPE | factors | {"rope_theta": 10_000.0, "partial_rotary_factor": turned / 16}
    changes = {"pad_token_id": 0, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
    model, ids = oracle("Phi3", rope_parameters=rope, **changes), random_ids(count)
    wanted = expected(model, ids)
    assert (load(model, tmp_path, count).logits(ids) - wanted).abs().max() <= MAX_DIFFERENCE


FACTORS = {"short_factor": RISING, "long_factor": STEEP}
STATED: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM3's theta where only a stretch is stated": ("SmolLM3", {"rope_scaling": YARN}),
    "SmolLM3's theta where only a type is stated": ("SmolLM3", {"rope_parameters": {"rope_type": "default"}}),
    "CWM's theta where only a stretch is stated": ("Cwm", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "CWM's stretch where only a theta is stated": ("Cwm", {"rope_theta": 5e5}),
    "Ministral 3's stretch where only a theta is stated": ("Ministral3", {"head_dim": 16, "rope_theta": 5e5}),
    "Ministral 3 without yarn, with another trained length": (
        "Ministral3",
        {"head_dim": 16, "rope_parameters": GROWING | {"rope_type": "default"}, "original_max_position_embeddings": 128},
    ),
    "Phi-3's own trained length": ("Phi3", {"rope_scaling": {"type": "longrope", **FACTORS}, "max_position_embeddings": 8192}),
    "Phi-3's own trained length, whatever its RoPE says": ("Phi3", {"rope_scaling": LONGROPE, "max_position_embeddings": 8192}),
    "Phi-3's longrope by the name of yarn": (
        "Phi3",
        {"rope_scaling": {"type": "yarn", **FACTORS}, "original_max_position_embeddings": 64},
    ),
    "a stretch added to another": (
        "Llama",
        {"rope_parameters": YARN | {"attention_factor": 1.7, "rope_theta": 1e4}, "rope_scaling": YARN | {"factor": 2.0}},
    ),
    "yarn whose betas are in the wrong order": (
        "Llama",
        {"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 2.0, "truncate": False}},
    ),
}


@pytest.mark.parametrize("name", STATED)
def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path: Path, name: str) -> None:
    family, stated = STATED[name]
    layers = {"layer_types": ["full_attention"] * 2, "head_dim": 16} if family == "Cwm" else {}
    kind = getattr(transformers, f"{family}Config").model_type
    data = {"architectures": [f"{family}ForCausalLM"], "model_type": kind, "pad_token_id": 0}
    text = json.dumps(BASE | data | layers | stated)
    (tmp_path / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    model, ids = random_model(family, config), random_ids(101)
    wanted = expected(model, ids)
    assert (load(model, tmp_path, 101, config=text).logits(ids) - wanted).abs().max() <= MAX_DIFFERENCE


def test_dynamic_rope_within_the_trained_length_is_no_scaling(tmp_path: Path) -> None:
    rope = {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 2.0}
    model, ids = oracle("Llama", max_position_embeddings=128, rope_parameters=rope), random_ids(53)
    wanted = expected(model, ids)
    assert torch.equal(wanted, expected(oracle("Llama"), ids))
    assert (load(model, tmp_path, len(ids)).logits(ids) - wanted).abs().max() <= MAX_DIFFERENCE


def test_shards_equal_one_file(tmp_path: Path) -> None:
    model, ids = oracle("Qwen2"), random_ids(23)
    engine = load(model, tmp_path, len(ids), max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (engine.logits(ids) - expected(model, ids)).abs().max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize(
    "name",
    [
        "llama with grouped heads",
        "mistral with a window",
        "qwen2 with a window in its second layer",
        "qwen3",
        "ministral3",
        "phi3 that turns three quarters of a head",
        "smollm3",
    ],
)
def test_prefill_in_chunks_equals_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, prefill: str
) -> None:
    """Exact prefill keeps full precision; streaming reads 16-bit keys back, and may be as wrong as 16 bits make it."""
    monkeypatch.setattr("skvq.engine.prefill.CHUNK_TOKENS", 11)
    family, changes = FAMILIES[name]
    model, ids = oracle(family, **changes), random_ids(37)
    engine = load(model, tmp_path, len(ids))
    engine.parts = replace(engine.parts, options=replace(engine.parts.options, prefill=prefill))
    found = engine.read(engine.new_sequence(), ids)
    wanted = expected(model, ids)[-1]
    half = expected(model.half(), ids)[-1]
    bound = MAX_DIFFERENCE if prefill == "exact" else 2 * (half - wanted).abs().max()
    assert (found - wanted).abs().max() <= bound
