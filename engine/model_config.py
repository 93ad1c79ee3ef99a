"""What a model is: its shape, how its heads are turned, how far they see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from skvq.engine.errors import ModelError, nearest
from skvq.kernels.layout import FULL_SPAN as FULL_SPAN
from skvq.kernels.layout import PAGE_TOKENS

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and how it is stretched past the trained length.

    ``kind`` is one of ``ROPE_TYPES``; every other field has the meaning it has in Hugging Face's config.json.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_beta: float = 0.0  # ``llama_4_scaling_beta``

    def __post_init__(self) -> None:
        if self.kind not in ROPE_TYPES:
            raise ModelError(f"unknown RoPE type {self.kind!r}{nearest(self.kind, ROPE_TYPES)}")
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise ModelError(f"rope theta must be positive, got {self.theta}")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ModelError(f"rope scaling factor must be positive, got {self.factor}")


MOST_EXPERTS = 1024
"""More than any model has in a layer: a corrupt count must not build a table of millions of names."""


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by for a stretch of ``factor`` (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkConfig:
    """Dual chunk attention (``engine.dual_chunks``) for contexts above ``reach`` tokens, the largest distance that it leaves.

    length: tokens of a chunk, whole pages. gain_from: tokens from which on queries grow with their position, 0 for none.
    """

    length: int
    reach: int
    gain_from: int = 0

    def __post_init__(self) -> None:
        if self.length % PAGE_TOKENS or not 0 < self.length <= self.reach < 2**31:
            raise ModelError(
                f"chunks of {self.length} tokens with distances up to {self.reach}: the first must be {PAGE_TOKENS} or a "
                "multiple of it, and no more than the second"
            )

    @classmethod
    def of_at_most(cls, tokens: int, reach: int, gain_from: int = 0) -> ChunkConfig:
        """Chunks of as many whole pages as there are in ``tokens``.

        >>> ChunkConfig.of_at_most(262144 - 8192, 262144).length
        253440
        """
        return cls(length=tokens // PAGE_TOKENS * PAGE_TOKENS, reach=reach, gain_from=gain_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """Mixture of experts (arXiv 2401.04088): each layer has ``count`` MLPs, of which a token goes through ``chosen``.

    normed: their weights add to one; else they are what a softmax over all of them gives.
    """

    count: int
    chosen: int
    normed: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.chosen <= self.count <= MOST_EXPERTS:
            raise ModelError(
                f"model config: {self.chosen} of {self.count} experts for each token: this engine has from 1 to all of at most "
                f"{MOST_EXPERTS:,}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama-family model. ``attention_spans[l]`` is how many tokens, itself included, a query of layer l sees;
    ``unturned_layers`` have no RoPE; ``qk_norm``: heads of queries and keys are normed before RoPE (arXiv 2010.04245, Qwen3).
    ``weights_head_size``: of heads as weights make them, if they are cached with more channels (``with_heads_of``).
    ``rotary_size``: channels of a head that RoPE turns, if not all of them (Phi-4-mini); pairs that it leaves lie behind the
    others, in both halves of a head. ``chunks``: how contexts beyond those it was trained for are attended to (Qwen2.5-1M).
    ``intermediate_size``: of the MLP, or of each of the ``experts``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    weights_head_size: int = 0
    rotary_size: int = 0
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    chunks: ChunkConfig | None = None
    experts: ExpertConfig | None = None
    trained_context: int = 4096
    attention_spans: tuple[int, ...] = ()
    unturned_layers: tuple[int, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
            "trained_context",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ModelError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"model config: {self.num_heads} query heads are not a multiple of {self.num_kv_heads} kv heads")
        if self.head_size % 2:
            raise ModelError(f"model config: head size {self.head_size} is odd, but RoPE needs pairs of channels")
        if self.rotary_size % 2 or not 0 <= self.rotary_size < self.head_size:
            raise ModelError(f"model config: RoPE turns {self.rotary_size} channels, not an even number below {self.head_size}")
        if not self.attention_spans:
            object.__setattr__(self, "attention_spans", (FULL_SPAN,) * self.num_layers)
        if len(self.attention_spans) != self.num_layers or min(self.attention_spans) < 1:
            raise ModelError(f"model config: {len(self.attention_spans)} attention spans for {self.num_layers} layers")
        if self.experts and (self.mlp_bias or self.intermediate_size % 16 or self.hidden_size % 16):
            raise ModelError(
                f"model config: experts from {self.hidden_size} to {self.intermediate_size} channels"
                f"{' with biases' if self.mlp_bias else ''}: this engine has them without biases, of multiples of 16 channels"
            )
        if self.chunks and (min(self.attention_spans) < FULL_SPAN or self.unturned_layers):
            raise ModelError("model config: dual chunk attention needs full attention and RoPE in all layers")

    @property
    def own_head_size(self) -> int:
        """Channels of a head that weights make: all, but for those that ``with_heads_of`` has added."""
        return self.weights_head_size or self.head_size

    @property
    def turned_size(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.rotary_size or self.own_head_size

    def cut_at(self, context: int) -> ChunkConfig | None:
        """Its chunks, where a context is longer than the distances they leave."""
        return self.chunks if self.chunks and context > self.chunks.reach else None

    def with_heads_of(self, size: int) -> ModelConfig:
        """The same model with channels of zeros added to its heads, for kernels that take no others."""
        return self if size == self.head_size else replace(self, head_size=size, weights_head_size=self.own_head_size)

    @property
    def kv_elements_per_token(self) -> int:
        """The model's own numbers that are cached per token, keys and values of all layers: 2*L*KH*D."""
        return 2 * self.num_layers * self.num_kv_heads * self.own_head_size

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        layers = self.num_layers * self._layer_parameters(self.experts.count if self.experts else 1)
        return layers + self.hidden_size + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def active_parameters(self) -> int:
        """Those of all layers that a token is multiplied by: of experts, the chosen ones."""
        return self.num_layers * self._layer_parameters(self.active_mlps) + self.hidden_size

    @property
    def active_mlps(self) -> int:
        """MLPs of a layer that a token goes through."""
        return self.experts.chosen if self.experts else 1

    def _layer_parameters(self, mlps: int) -> int:
        d, f, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.own_head_size
        q = self.num_heads * self.own_head_size
        layer = d * (q + 2 * kv) + q * d + 3 * d * f * mlps + 2 * d
        layer += d * self.experts.count if self.experts else 0
        layer += (q + 2 * kv) * self.qkv_bias + d * self.output_bias + (2 * f + d) * self.mlp_bias
        return layer + 2 * self.own_head_size * self.qk_norm
