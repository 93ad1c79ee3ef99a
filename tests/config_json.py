"""config.json of a model's shape: the way back from ``loaders.hf.read_config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skvq.engine.model_config import FULL_SPAN, ModelConfig
from skvq.loaders.families import BY_LAYER, FAMILIES


def write_config(folder: Path, config: ModelConfig) -> Path:
    """Write ``config.json`` to a folder, made if need be. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_json(config), allow_nan=False))
    return folder


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json that ``read_config`` turns into an equal ModelConfig (for the families' own combinations)."""
    architecture = next(name for name, family in FAMILIES.items() if family.name == config.family)
    sliding = [span for span in config.attention_spans if span != FULL_SPAN]
    window = sliding[0] if sliding else None
    names = ["full_attention" if span == FULL_SPAN else "sliding_attention" for span in config.attention_spans]
    rope = {
        "rope_type": config.rope.kind,
        "rope_theta": config.rope.theta,
        "partial_rotary_factor": (config.rotary_size + 0.5) / config.own_head_size if config.rotary_size else 1.0,  # cut off
        "factor": config.rope.factor,
        "original_max_position_embeddings": config.rope.original_context or config.trained_context,
        "low_freq_factor": config.rope.low_freq_factor,
        "high_freq_factor": config.rope.high_freq_factor,
        "beta_fast": config.rope.beta_fast,
        "beta_slow": config.rope.beta_slow,
        "mscale": config.rope.mscale,
        "mscale_all_dim": config.rope.mscale_all_dim,
        "attention_factor": config.rope.attention_factor,
        "truncate": config.rope.truncate,
        "llama_4_scaling_beta": config.rope.query_beta or None,
        "short_factor": list(config.rope.short_factor) or None,
        "long_factor": list(config.rope.long_factor) or None,
    }
    return {
        "architectures": [architecture],
        "model_type": config.family,
        **experts_to_json(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.own_head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.trained_context,
        "rope_parameters": {key: value for key, value in rope.items() if value is not None},
        "dual_chunk_attention_config": config.chunks
        and {
            "chunk_size": config.chunks.reach,
            "local_size": config.chunks.reach - config.chunks.length,
            "original_max_position_embeddings": config.chunks.gain_from or None,
        },
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": names if config.family in BY_LAYER else None,
        "no_rope_layers": [int(layer not in config.unturned_layers) for layer in range(config.num_layers)],
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias if config.family == "seed_oss" else config.output_bias,
        "attention_out_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "original_max_position_embeddings": config.rope.original_context if config.family == "phi3" else None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def experts_to_json(config: ModelConfig) -> dict[str, Any]:
    """What a config.json says of experts; nothing of a model without."""
    if config.experts is None:
        return {}
    return {
        "num_local_experts" if config.family == "mixtral" else "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.chosen,
        "norm_topk_prob": config.experts.normed,
        "moe_intermediate_size": config.intermediate_size,
    }
