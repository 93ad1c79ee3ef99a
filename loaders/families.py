"""What each family of models assumes where its config.json is silent, and what sets it apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skvq.engine.errors import ModelError
from skvq.engine.model_config import ExpertConfig
from skvq.loaders.fields import Fields, config_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family's configuration class assumes where config.json is silent; 0 kv heads: as many as query heads, head
    size 0: the hidden size divided among the heads.
    """

    name: str
    kv_heads: int
    head_size: int = 0
    context: int
    sliding_window: int
    bos: int | None
    eos: tuple[int, ...]
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    tie_embeddings: bool = False
    theta: float = 10_000.0
    rope: Mapping[str, Any] = field(default_factory=dict)  # as ``rope_parameters``, where a config has none
    original_context: int = 0  # before it was stretched, if that is not in ``rope_parameters``
    rotary_part: float = 1.0  # of a head
    experts: Callable[[Fields], ExpertConfig] | None = None
    expert_size: int = 0  # of each of its channels, as ``moe_intermediate_size``; 0: as many as ``intermediate_size`` says


def _of_mixtral(fields: Fields) -> ExpertConfig:
    return _experts(fields, count=8, chosen=2, normed=True)


def _of_qwen(fields: Fields) -> ExpertConfig:
    if fields.integer("decoder_sparse_step", 1) != 1 or fields.data.get("mlp_only_layers"):
        raise ModelError(f"{fields.where}: some layers have no experts (mlp_only_layers, decoder_sparse_step): not supported")
    return _experts(fields, count=128, chosen=8, normed=fields.flag("norm_topk_prob", False))


def _experts(fields: Fields, *, count: int, chosen: int, normed: bool) -> ExpertConfig:
    """What a config says, under the first names that Qwen gave or those of Mixtral; else the numbers given."""
    count = fields.integer("num_experts", fields.integer("num_local_experts", count))
    chosen = fields.integer("num_experts_per_tok", chosen)
    return config_of(ExpertConfig, fields.where, count=count, chosen=chosen, normed=normed)


FAMILIES = {
    "LlamaForCausalLM": Family(name="llama", kv_heads=0, context=2048, sliding_window=0, bos=1, eos=(2,)),
    "MistralForCausalLM": Family(name="mistral", kv_heads=8, context=131072, sliding_window=4096, bos=1, eos=(2,)),
    "Qwen2ForCausalLM": Family(name="qwen2", kv_heads=32, context=32768, sliding_window=4096, bos=None, eos=()),
    "MinistralForCausalLM": Family(name="ministral", kv_heads=8, context=131072, sliding_window=4096, bos=1, eos=(2,)),
    "Phi3ForCausalLM": Family(
        name="phi3", kv_heads=0, context=4096, sliding_window=0, bos=1, eos=(32000,), norm_eps=1e-5, original_context=4096
    ),
    "GlmForCausalLM": Family(
        name="glm", kv_heads=2, head_size=128, context=131072, sliding_window=0, bos=None, eos=(151329, 151336, 151338),
        norm_eps=1.5625e-7, qkv_bias=True, rotary_part=0.5,
    ),
    "SeedOssForCausalLM": Family(
        name="seed_oss", kv_heads=8, head_size=128, context=524288, sliding_window=0, bos=0, eos=(2,), qkv_bias=True
    ),
    "Qwen3ForCausalLM": Family(name="qwen3", kv_heads=32, head_size=128, context=32768, sliding_window=4096, bos=None, eos=()),
    "MixtralForCausalLM": Family(
        name="mixtral", kv_heads=8, context=131072, sliding_window=0, bos=1, eos=(2,), norm_eps=1e-5, theta=1e6,
        experts=_of_mixtral,
    ),
    "Qwen3MoeForCausalLM": Family(
        name="qwen3_moe", kv_heads=4, context=32768, sliding_window=4096, bos=None, eos=(), experts=_of_qwen,
        expert_size=768,
    ),
    "Ministral3ForCausalLM": Family(
        name="ministral3", kv_heads=8, head_size=128, context=262144, sliding_window=0, bos=1, eos=(2,), norm_eps=1e-5,
        rope={
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    ),
    "SmolLM3ForCausalLM": Family(
        name="smollm3", kv_heads=4, context=32768, sliding_window=0, bos=128000, eos=(128001,), tie_embeddings=True,
        theta=2e6,
    ),
    "CwmForCausalLM": Family(
        name="cwm", kv_heads=8, head_size=128, context=131072, sliding_window=8192, bos=128000, eos=(128001, 128008, 128009),
        norm_eps=1e-5, theta=1e6,
        rope={
            "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}  # fmt: skip
WRAPPED = {"Mistral3ForConditionalGeneration": "mistral3"}
"""Models of text and images whose ``text_config`` is one of these families: the text is read, the rest left alone."""
ARCHITECTURES = (*FAMILIES, *WRAPPED)
QWENS = ("qwen2", "qwen3")
QK_NORMED = ("qwen3", "qwen3_moe")
WINDOW_IF_USED = (*QWENS, "qwen3_moe", "smollm3")
"""Families whose window counts only with ``use_sliding_window``."""
BY_LAYER = (*QWENS, "smollm3", "ministral", "cwm")
"""Families whose config names the layers in which attention slides."""
SLIDING = ("mistral", "mixtral", "ministral", "ministral3", "phi3", "qwen3_moe")
"""Families in all of whose layers attention slides, unless their config names those in which it does."""
