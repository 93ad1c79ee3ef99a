"""config.json -> ModelConfig, against the attributes and the RoPE of `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config_json import write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import one_line, refused, tiny_config
from transformers import (
    CwmConfig,
    GlmConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from skvq.engine.errors import ModelError, SkvqError
from skvq.engine.model_config import FULL_SPAN, ChunkConfig, RopeConfig
from skvq.engine.rope import model_rope
from skvq.loaders.fields import Fields
from skvq.loaders.hf import parse_config, read_config

SMOL: dict[str, Any] = {"pad_token_id": 0, "vocab_size": 128256}
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 1024,
    },
]


def saved(config: PreTrainedConfig, folder: Path, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "architecture", "options"),
    [
        (LlamaConfig, "LlamaForCausalLM", {}),
        (LlamaConfig, "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        (LlamaConfig, "LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": None}),
        (LlamaConfig, "LlamaForCausalLM", {"eos_token_id": [7, 8], "bos_token_id": 3, "rms_norm_eps": 1e-5}),
        (MistralConfig, "MistralForCausalLM", {}),
        (MistralConfig, "MistralForCausalLM", {"sliding_window": 128, "head_dim": 32}),
        (MistralConfig, "MistralForCausalLM", {"sliding_window": None}),
        (Qwen2Config, "Qwen2ForCausalLM", {}),
        (Qwen2Config, "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        (Phi3Config, "Phi3ForCausalLM", {"pad_token_id": 0, "eos_token_id": 7, "head_dim": 16}),
        (Phi3Config, "Phi3ForCausalLM", {"pad_token_id": 0, "eos_token_id": 7, "head_dim": 16, "sliding_window": 64}),
        (Phi3Config, "Phi3ForCausalLM", {"pad_token_id": 0, "eos_token_id": 7, "head_dim": 16, "partial_rotary_factor": 0.75}),
        (MinistralConfig, "MinistralForCausalLM", {}),
        (MinistralConfig, "MinistralForCausalLM", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        (SeedOssConfig, "SeedOssForCausalLM", {}),
        (SeedOssConfig, "SeedOssForCausalLM", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
        (Ministral3Config, "Ministral3ForCausalLM", {"max_position_embeddings": 262144}),
        (Ministral3Config, "Ministral3ForCausalLM", {"max_position_embeddings": 262144, "sliding_window": 64, "head_dim": 32}),
        (SmolLM3Config, "SmolLM3ForCausalLM", {**SMOL}),
        (
            SmolLM3Config,
            "SmolLM3ForCausalLM",
            {**SMOL, "attention_bias": True, "mlp_bias": True},
        ),
        (
            SmolLM3Config,
            "SmolLM3ForCausalLM",
            {**SMOL, "no_rope_layers": [0, 1, 1, 0], "rms_norm_eps": 1e-5},
        ),
        (CwmConfig, "CwmForCausalLM", {"vocab_size": 128256, "max_position_embeddings": 131072}),
        (
            CwmConfig,
            "CwmForCausalLM",
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "eos_token_id": 9, "bos_token_id": 7},
        ),
        (MixtralConfig, "MixtralForCausalLM", {}),
        (MixtralConfig, "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 64}),
        (Qwen3MoeConfig, "Qwen3MoeForCausalLM", {"head_dim": 32}),
        (
            Qwen3MoeConfig,
            "Qwen3MoeForCausalLM",
            {
                "head_dim": 32,
                "num_experts": 16,
                "num_experts_per_tok": 3,
                "norm_topk_prob": True,
                "moe_intermediate_size": 48,
                "use_sliding_window": True,
                "sliding_window": 64,
            },
        ),
        (GlmConfig, "GlmForCausalLM", {"vocab_size": 151552}),
        (
            GlmConfig,
            "GlmForCausalLM",
            {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 0.75, "eos_token_id": 9},
        ),
        (Qwen3Config, "Qwen3ForCausalLM", {}),
        (Qwen3Config, "Qwen3ForCausalLM", {"attention_bias": True, "head_dim": 32, "eos_token_id": 9}),
        (Qwen3Config, "Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        (
            Qwen2Config,
            "Qwen2ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
    ],
)
def test_every_family_agrees_with_transformers(
    tmp_path: Path, kind: type[PreTrainedConfig], architecture: str, options: dict[str, Any]
) -> None:
    theirs: Any = kind(**(SIZES | options))
    ours = read_config(saved(theirs, tmp_path, architecture))
    assert ours.family == theirs.model_type
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_size == (getattr(theirs, "head_dim", None) or 64 // 4)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.trained_context == theirs.max_position_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    part = theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.rotary_size == (int(part * ours.head_size) if part < 1 else 0)
    assert ours.rope.query_beta == theirs.rope_parameters.get("llama_4_scaling_beta", 0.0)
    assert ours.unturned_layers == tuple(n for n, turned in enumerate(getattr(theirs, "no_rope_layers", [1])) if not turned)
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert ours.qkv_bias == (kind is Qwen2Config or getattr(theirs, "attention_bias", False))
    biased = kind is not GlmConfig and getattr(theirs, "attention_bias", False)
    assert ours.output_bias == getattr(theirs, "attention_out_bias", biased)
    assert ours.qk_norm == (kind in (Qwen3Config, Qwen3MoeConfig))
    assert ours.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    if ours.experts:
        assert (ours.experts.count, ours.experts.chosen) == (theirs.num_local_experts, theirs.num_experts_per_tok)
        assert ours.experts.normed == getattr(theirs, "norm_topk_prob", True)
    assert (ours.experts is not None) == hasattr(theirs, "num_experts_per_tok")
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    window = getattr(theirs, "sliding_window", None)
    layers = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 4
    assert ours.attention_spans == tuple(window if name == "sliding_attention" else FULL_SPAN for name in layers)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "type"])
def test_every_rope_in_both_spellings(tmp_path: Path, rope: dict[str, Any], style: str) -> None:
    theirs: Any = LlamaConfig(**SIZES, rope_parameters=rope | {"rope_theta": 5e5})
    data = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if style == "rope_parameters":
        data["rope_parameters"] = rope | {"rope_theta": 5e5}
    else:
        names = {"rope_type": "type"} if style == "type" else {}
        data |= {"rope_theta": 5e5, "rope_scaling": {names.get(key, key): value for key, value in rope.items()}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    ours = read_config(tmp_path).rope
    want = theirs.rope_parameters
    assert (ours.kind, ours.theta) == (want["rope_type"], want["rope_theta"])
    assert ours.factor == want.get("factor", 4.0 if ours.kind == "longrope" else 1.0)
    assert ours.original_context == want.get("original_max_position_embeddings", 4096)
    assert ours.short_factor == tuple(want.get("short_factor", ()))
    assert ours.long_factor == tuple(want.get("long_factor", ()))
    for key in ("low_freq_factor", "high_freq_factor", "beta_fast"):
        if key in want:
            assert getattr(ours, key) == want[key]


def test_dynamic_rope_starts_at_max_position_embeddings_as_in_transformers() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1024}
    config = parse_config(Fields(SIZES | {"model_type": "llama", "rope_scaling": rope}, "x"))
    assert config.rope.original_context == 4096


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    saved(LlamaConfig(**SIZES, eos_token_id=7), tmp_path, "LlamaForCausalLM")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7, 5000]}')
    assert read_config(tmp_path).eos_token_ids == (7, 9)


def test_end_tokens_of_generation_config_stand_for_those_that_a_family_assumes() -> None:
    fields = Fields(SIZES | {"model_type": "llama"}, "config.json")
    assert parse_config(fields).eos_token_ids == (2,)
    assert parse_config(fields, (128, 129)).eos_token_ids == (128, 129)


def test_attn_factor_multiplies_what_yarn_scales_by() -> None:
    """DeepSeek-R1-0528-Qwen3-8B's config.json: together they are 1."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attn_factor": 0.8782488562869419}
    config = parse_config(Fields(SIZES | {"model_type": "qwen3", "rope_scaling": rope}, "config.json"))
    assert model_rope(config, 4096, torch.device("cpu")).turned.scale == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("parameters", [{}, {"rope_type": "default", "rope_theta": 1e6}])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_a_scaling_that_was_added_by_hand_counts(parameters: dict[str, Any], spelling: str) -> None:
    added = {spelling: "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    data = SIZES | {"model_type": "qwen3", "rope_parameters": parameters, "rope_scaling": added}
    rope = parse_config(Fields(data, "config.json")).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("yarn", 4.0, 1024)
    assert rope.theta == parameters.get("rope_theta", 10_000.0)


def test_the_text_part_of_a_model_of_images_is_read() -> None:
    text = SIZES | {"model_type": "mistral", "head_dim": 32, "sliding_window": None}
    data = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "vision_config": {}}
    config = parse_config(Fields(data | {"text_config": text}, "config.json"))
    assert config == parse_config(Fields(text, "config.json")) and config.family == "mistral"
    untyped = {key: value for key, value in text.items() if key != "model_type"}
    assert parse_config(Fields({"model_type": "mistral3", "text_config": untyped}, "x")).family == "mistral"
    assert parse_config(Fields(data | {"text_config": text, "tie_word_embeddings": True}, "x")).tie_embeddings
    refused(lambda: parse_config(Fields(data, "config.json")), "text_config", "num_attention_heads is missing")
    assert parse_config(Fields(data | {"text_config": text | {"model_type": "ministral3"}}, "c")).family == "ministral3"
    refused(lambda: parse_config(Fields(data | {"text_config": text | {"model_type": "mistral4"}}, "c")), "mistral4")


def test_mistral_defaults_where_the_file_is_silent() -> None:
    data = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    config = parse_config(Fields(data | {"model_type": "mistral", "num_attention_heads": 16}, "x"))
    assert (config.num_kv_heads, config.attention_spans) == (8, (4096,) * 4)


@pytest.mark.parametrize("full", [0, 1, 3, 4, 28])
def test_qwen2_slides_from_max_window_layers_on(full: int) -> None:
    options: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": full}
    theirs: Any = Qwen2Config(**SIZES, **options)
    ours = parse_config(Fields(SIZES | {"model_type": "qwen2"} | options, "x"))
    assert [span == 64 for span in ours.attention_spans] == [kind == "sliding_attention" for kind in theirs.layer_types]


def test_dual_chunk_attention() -> None:
    """As in the config.json of Qwen2.5-7B-Instruct-1M; a chunk is cut to whole pages."""
    dual = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    data = SIZES | {"model_type": "qwen2", "max_position_embeddings": 1010000, "dual_chunk_attention_config": dual}
    config = parse_config(Fields(data, "x"))
    assert config.chunks == ChunkConfig(length=253440, reach=262144, gain_from=262144)
    assert config.trained_context == 1010000
    with pytest.raises(ModelError, match="dual chunk attention needs full attention and RoPE in all layers"):
        parse_config(Fields(data | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "x"))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "LlamaForCausalLM"]),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, ["spiral", "llama3"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor is missing"]),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, ["8 numbers"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5"]),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, ["partial_rotary_factor", "0.2", "even"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"quantization_config": {"quant_method": "hqq"}}, ["hqq", "16-bit"]),
        ({"architectures": [["x"]]}, ["unknown architecture"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"hidden_size": 66}, ["66", "4 heads"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_hidden_layers": 2**31 - 1}, ["2147483647", "1024"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"eos_token_id": "two"}, ["eos_token_id", "two"]),
    ],
)
def test_a_config_that_cannot_be_right_is_one_line(tmp_path: Path, change: dict[str, Any], fragments: list[str]) -> None:
    data = SIZES | {"architectures": ["LlamaForCausalLM"]} | change
    (tmp_path / "config.json").write_text(json.dumps(data))
    refused(lambda: read_config(tmp_path), "config.json", *fragments)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(kind="yarn", theta=1.0, factor=4.0),
        RopeConfig(kind="yarn", beta_fast=-1.0, factor=4.0),
        RopeConfig(kind="yarn", beta_slow=5e-324, factor=4.0),
        RopeConfig(kind="dynamic", factor=9e299),
        RopeConfig(kind="linear", factor=5e-324),
        RopeConfig(kind="longrope", factor=2.0, original_context=1, short_factor=(1.0,) * 16, long_factor=(2.0,) * 16),
    ],
    ids=str,
)
def test_a_rope_that_has_no_frequencies_is_one_line(rope: RopeConfig) -> None:
    refused(lambda: model_rope(tiny_config(rope=rope), 2048, torch.device("cpu")), "RoPE", f"kind='{rope.kind}'")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff\xfe", "[" * 100_000, "9" * 10_000])
def test_a_file_that_is_no_object_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(lambda: read_config(tmp_path), "config.json")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    refused(lambda: read_config(tmp_path), "config.json is missing", "copy")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"family": "mistral", "attention_spans": (64, 64)},
        {"family": "qwen2", "qkv_bias": True, "attention_spans": (64, FULL_SPAN)},
        {"family": "qwen3", "qk_norm": True, "attention_spans": (64, FULL_SPAN)},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "tie_embeddings": True},
        {"rope": RopeConfig(kind="longrope", original_context=256, short_factor=(1.0,) * 16, long_factor=(2.0,) * 16)},
        {"family": "phi3", "head_size": 96, "rotary_size": 66},
    ],
)
def test_writing_and_reading_gives_the_same_config(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config


KEYS = [
    *SIZES, "architectures", "model_type", "rope_scaling", "rope_parameters", "rope_theta", "head_dim",
    "sliding_window", "partial_rotary_factor",
    "use_sliding_window", "layer_types", "max_window_layers", "eos_token_id", "bos_token_id", "rms_norm_eps",
    "quantization_config", "dual_chunk_attention_config", "original_max_position_embeddings", "hidden_act",
]  # fmt: skip
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(
    ["llama", "mistral", "qwen2", "yarn", "longrope", "silu", "sliding_attention"]
)  # fmt: skip
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "short_factor"]
VALUES = ATOMS | st.lists(ATOMS, max_size=4) | st.dictionaries(st.sampled_from(ROPE_KEYS), ATOMS, max_size=4)


@settings(max_examples=400, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "ministral", "phi3", "qwen2", "qwen3", "seed_oss"]),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
)
def test_no_config_raises_anything_but_our_error(family: str, changes: dict[str, Any]) -> None:
    try:
        config = parse_config(Fields(SIZES | {"model_type": family} | changes, "config.json"))
    except SkvqError as error:
        one_line(error)
    else:
        assert len(config.attention_spans) == config.num_layers
